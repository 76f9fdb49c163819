"""The laws of whole models, over every slot and plugin; a long look is `benchmarks/laws_of_models.py`."""

from composeformer.testing import laws_of

test_laws = laws_of(slot="model")
