"""The laws of every mixer that is built in, by all its implementations."""

from composeformer.testing import laws_of

test_laws = laws_of(slot="mixer")
