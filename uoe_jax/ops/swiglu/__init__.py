"""Gated activations of rows times a factor of each, by backend."""
