"""Products of single tokens on NVIDIA GPUs."""
