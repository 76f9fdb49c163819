"""Families of models, whose names are paired with wrong ones of ours."""
