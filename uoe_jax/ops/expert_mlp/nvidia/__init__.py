"""Expert MLPs on NVIDIA GPUs, in Triton."""
