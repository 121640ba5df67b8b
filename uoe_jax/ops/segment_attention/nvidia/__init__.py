"""Segment attention on NVIDIA GPUs: one schedule, kernels for Hopper and in Triton."""
