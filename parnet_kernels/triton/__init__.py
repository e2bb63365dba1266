"""Triton backend: forward and backward of every operator, for training and large batches, on NVIDIA and AMD GPUs.

Nothing here imports triton until a CUDA tensor (or, under TRITON_INTERPRET=1, a CPU tensor) asks for it.

Saved for backward: the operator's inputs only. Backward recomputes the convolution, fused with φ′, because φ′ needs
the value before φ and SiLU has no inverse; that costs one convolution more and no memory.
"""

from __future__ import annotations

from parnet_kernels.precision import current_precision as current_precision
from parnet_kernels.precision import float32_precision as float32_precision
