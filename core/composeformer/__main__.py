"""`python -m composeformer` is `compose`."""

from composeformer.cli import main

main()
