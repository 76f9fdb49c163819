"""Every router obeys the laws of its slot."""

from composeformer.testing import laws_of

test_laws = laws_of(slot="router")
