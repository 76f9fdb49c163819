"""A mean over what came before, and with a cache over a little more."""
