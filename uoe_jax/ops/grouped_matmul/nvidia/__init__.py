"""Grouped matmul on NVIDIA GPUs, in Triton."""
