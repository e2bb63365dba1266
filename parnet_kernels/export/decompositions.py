"""What a public operator is made of, for exporters that know PyTorch's own operators only.

`torch.onnx.export(…, dynamo=True)` takes them from PyTorch's table of decompositions; compilers, which call the
operators as they are, do not read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from parnet_kernels import ops, reference


def _decomposition(name: str) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return getattr(reference, name)(*args, **kwargs)

    return call


for _name in ("repvgg_sse", "downsample_se", "fusion_se"):
    assert ops  # the operators are registered
    register_decomposition(getattr(torch.ops.parnet, _name).default)(_decomposition(_name))
