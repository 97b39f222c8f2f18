"""Weights of live slots read from other ranks' memory, and gradients returned the same way."""
