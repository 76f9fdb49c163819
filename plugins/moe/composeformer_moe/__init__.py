"""Mixture of experts: a feed-forward network of which each token passes through a few parts, and its routers."""
