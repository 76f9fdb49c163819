"""Norms, positions, residuals, embeddings and heads obey their laws."""

from composeformer.testing import laws_of

test_laws_of_norms = laws_of(slot="norm")
test_laws_of_positions = laws_of(slot="position")
test_laws_of_residuals = laws_of(slot="residual")
test_laws_of_embeddings = laws_of(slot="embedding")
test_laws_of_heads = laws_of(slot="head")
