"""Predictors obey their laws."""

from composeformer.testing import laws_of

test_laws = laws_of(slot="predictor")
