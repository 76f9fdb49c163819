"""Every precision policy of every installed plugin obeys the laws."""

from composeformer.testing import laws_of

test_laws = laws_of(slot="precision")
