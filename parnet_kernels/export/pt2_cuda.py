"""A network for images of one shape as one operator of the CUDA library, for AOTInductor packages."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parnet_kernels.cuda.network import lower, pack_network
from parnet_kernels.cuda.plan import Gpu
from parnet_kernels.cuda.program import ALIGNMENT
from parnet_kernels.whole import WholeNetwork


class CudaExported(nn.Module):
    """Logits [N, classes], or channel means without a classifier, of contiguous images of `shape` [N, in_chans, H, W].

    The packed weights and the recorded launches are its constants; both are made for `gpu`.
    """

    packed: Tensor

    def __init__(self, network: WholeNetwork, shape: tuple[int, ...], precision: str, gpu: Gpu) -> None:
        super().__init__()
        weights = pack_network(network, precision)
        like, result = network.head[0], "logits" if network.config.num_classes else "pooled"
        strides = torch.empty(shape, device="meta").stride()
        lowered = lower(network.config, weights, shape, strides, like.dtype, precision, gpu, result, aligned=False)
        parts = [t.contiguous().view(-1).view(torch.uint8) for t in weights.tensors]
        padded = [F.pad(part, (0, -part.numel() % ALIGNMENT)) for part in parts]
        # One constant: the compiler would make small ones anew at each call.
        self.register_buffer("packed", torch.cat(padded))
        self.starts = [0, *itertools.accumulate(part.numel() for part in padded[:-1])]
        self.program = lowered.program.view(torch.int64).tolist()
        self.workspace_bytes, self.image = lowered.workspace_bytes, gpu.image
        self.shape, self.result = [*shape], [*lowered.shape]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.parnet._cuda_exported(
            x, self.packed, self.starts, self.program, self.workspace_bytes, self.shape, self.result, self.image
        )
        return y


def why_not(network: WholeNetwork) -> str | None:
    """The reason why a network is not one operator of the CUDA library, or None."""
    if network.config.pointwise_head:
        return "the last layer of the CIFAR form is none of its kernels"
    return None


@torch.library.register_fake("parnet::_cuda_exported")
def _shape(x: Tensor, packed: Any, starts: Any, program: Any, space: int, size: Any, result: Any, image: int) -> Tensor:
    return x.new_empty(result)
