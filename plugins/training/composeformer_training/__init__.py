"""What trains a model: objectives and optimizers."""
