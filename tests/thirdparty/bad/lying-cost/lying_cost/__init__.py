"""Means over what came before, which are said to be cheaper than they are."""
