"""Norms, positions, residuals, embeddings and heads obey their laws."""

from composeformer.testing import laws_of

test_laws_of_norms = laws_of(slot="norm")
test_laws_of_positions = laws_of(slot="position")
