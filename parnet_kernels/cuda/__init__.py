"""The CUDA backend: hand-written level kernels (csrc/cuda) for low latency."""
