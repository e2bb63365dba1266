"""The CPU backend: native fused Winograd kernels (csrc/cpu)."""
