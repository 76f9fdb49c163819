"""Every objective and every optimizer obeys the laws of its slot."""

from composeformer.testing import laws_of

test_objectives = laws_of(slot="objective")
test_optimizers = laws_of(slot="optimizer")
