"""Cached attention of single tokens on NVIDIA GPUs."""
