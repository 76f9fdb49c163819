"""Multi-token prediction: modules that each predict one token further, in training and as drafts."""
