"""Four-bit weights in groups that share a scale, trained through the rounding."""
