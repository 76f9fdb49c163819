"""A router that is balanced by all that passes through it."""
