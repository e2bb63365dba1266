"""The training form on the Triton kernels, against the plain form in float64: results, statistics, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import test_training_fusion as fusions
import test_training_ops as blocks
import torch
from oracle import error
from torch import Tensor

from parnet_kernels import training
from parnet_kernels.ops import use_backend

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# n, c, k, height, width, stride, groups, activation; a skip where c = k, at stride 1 in one group
CASES = [
    (1, 12, 12, 7, 7, 1, 1, "silu"),
    (3, 92, 92, 9, 5, 1, 1, "relu"),
    (9, 130, 130, 1, 1, 1, 1, "silu"),
    (17, 3, 3, 2, 3, 1, 1, "silu"),  # more images than a tile of the gate has
    (3, 3, 64, 14, 14, 2, 1, "silu"),  # an image, whose channels the library adds up; Y1 is made again
    (1, 12, 92, 9, 5, 2, 1, "relu"),
    (3, 92, 36, 7, 7, 2, 1, "silu"),
    (1, 130, 12, 14, 14, 1, 1, "silu"),
    (3, 12, 92, 1, 1, 2, 1, "relu"),
    (2, 36, 48, 9, 9, 1, 2, "silu"),
]
FUSIONS = [
    # n, c of one input, k, height, width, stride, activation
    (1, 46, 12, 9, 5, 2, "silu"),
    (3, 65, 130, 7, 7, 1, "relu"),
    (9, 3, 64, 1, 1, 2, "silu"),
    (2, 12, 92, 14, 14, 2, "silu"),
]


@pytest.fixture(autouse=True)
def _on_triton() -> Any:
    # oneDNN's weight gradients in bfloat16 hold what memory held before (torch 2.13; 1 × 1 maps, two groups).
    with use_backend("triton"), torch.backends.mkldnn.flags(enabled=False):
        yield


def near(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, relu: bool = False) -> None:
    bound = TOLERANCE[dtype]
    if relu and dtype != torch.float32:  # rounding of the maps changes signs, a share of all in proportion to it
        bound = 2 * bound**0.5
    scale = max(e.norm().item() for e in expected[2:])
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        # A gradient that is zero but for rounding is compared with what it is a difference of.
        off = (f.double().cpu() - e).norm().item()
        assert off <= bound * e.norm().item() or off <= bound * 1e-2 * scale, f"{i}: {error(f.cpu(), e):.1e}"


def moved(block: training.Block, *where: Any) -> training.Block:
    return training.Block(*(t.to(*where) if isinstance(t, Tensor) else t for t in block))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block(case: tuple[Any, ...], dtype: torch.dtype, where: torch.device) -> None:
    x, block = blocks.make(case)
    x, block = x.to(dtype), moved(block, dtype)
    expected, g = blocks.reference(x, block)
    found = blocks.differentiated(x.to(where), moved(block, where), g.to(where))
    near(found, expected, dtype, case[-1] == "relu")
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert [f.dtype for f in found[2:]] == [dtype] * (len(found) - 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", FUSIONS, ids=str)
def test_a_fusion(case: tuple[Any, ...], dtype: torch.dtype, where: torch.device) -> None:
    tensors = fusions.make(case, dtype)
    g = fusions.gradient(case)
    expected = fusions.differentiated(fusions.plain, [t.double() for t in tensors], case, g)
    found = fusions.differentiated(fusions.operator, [t.to(where) for t in tensors], case, g.to(where))
    near(found, expected, dtype, case[-1] == "relu")
