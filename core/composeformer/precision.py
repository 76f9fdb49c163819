"""Precision on paper."""
