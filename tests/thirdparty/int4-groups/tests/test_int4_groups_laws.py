"""The laws of every part that this plugin brings."""

from composeformer.testing import laws_of

test_laws = laws_of("int4-groups")
