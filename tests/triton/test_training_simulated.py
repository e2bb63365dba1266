"""The compiled PTX of the training kernels, for sm_80 and sm_90, executed by the simulator: numbers against float64, no
reports.

The library's convolutions are PyTorch's on the CPU. Memory that nobody wrote is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import test_training_fusion as fusions
import test_training_ops as blocks
import torch
from simulated import simulate
from torch import Tensor
from training_error import near

from parnet_kernels import training, training_ops
from parnet_kernels.ops import use_backend
from parnet_kernels.triton import float32_precision, launch
from parnet_kernels.triton.convolutions import OWN, forced

pytestmark = pytest.mark.ptxsim

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SLOW = pytest.mark.slow
# n, c, k, height, width, stride, groups, activation; a skip where c = k, at stride 1 in one group
BLOCKS = [
    ((2, 12, 12, 3, 5, 1, 1, "silu"), F16),
    ((1, 92, 92, 5, 3, 1, 1, "relu"), F32),
    ((3, 3, 12, 5, 7, 2, 1, "silu"), BF16),  # an image, whose channels the library adds up; Y1 is made again
]
MORE_BLOCKS = [
    ((17, 3, 3, 2, 3, 1, 1, "silu"), F32),  # more images than a tile of the gate has
    ((2, 130, 130, 1, 1, 1, 1, "silu"), F32),
    ((1, 130, 130, 3, 1, 1, 1, "relu"), BF16),
    ((1, 20, 20, 14, 15, 1, 1, "silu"), BF16),  # parts of an image, the last one smaller
    ((1, 12, 92, 9, 5, 2, 1, "relu"), F32),
    ((2, 92, 36, 3, 3, 2, 1, "silu"), F16),
    ((1, 130, 12, 5, 3, 1, 1, "silu"), F32),
    ((3, 12, 92, 1, 1, 2, 1, "silu"), BF16),
    ((2, 36, 48, 3, 5, 1, 2, "silu"), F16),
]
# n, c of one input, k, height, width, stride, activation
FUSIONS = [((2, 6, 12, 3, 5, 2, "silu"), F16)]
MORE_FUSIONS = [
    ((1, 46, 12, 5, 3, 1, "relu"), F32),
    ((3, 65, 130, 1, 3, 1, "silu"), BF16),
    ((9, 3, 64, 1, 1, 2, "silu"), F32),
]


def slow(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case, marks=SLOW) for case in cases]


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(training_ops.KERNELS, "triton", lambda x: None)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    # oneDNN's weight gradients in bfloat16 hold what memory held before (torch 2.13; 1 × 1 maps, two groups).
    with use_backend("triton"), torch.backends.mkldnn.flags(enabled=False):
        yield
    torch.use_deterministic_algorithms(False)


def of_a_block(case: tuple[Any, ...], dtype: torch.dtype, **simulator: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(found, expected): result, statistics, every gradient."""
    x, block = blocks.make(case)
    x = x.to(dtype)
    block = training.Block(*(t.to(dtype) if isinstance(t, Tensor) else t for t in block))
    expected, g = blocks.reference(x, block)
    return ran(lambda: blocks.differentiated(x, block, g), 7, **simulator), expected


def ran(host: Callable[[], list[Tensor]], kernels: int, **simulator: Any) -> list[Tensor]:
    found, results = simulate(host, **simulator)
    assert sum(name.startswith("train_") for name in results) == kernels, sorted(results)
    return found


def targets(cases: list[Any], more: list[Any]) -> list[Any]:
    """All of `more`, and what is for sm_90, is slow."""
    return [
        *(("sm_80", *case) for case in cases),
        *slow([("sm_80", *case) for case in more]),
        *slow([("sm_90", *case) for case in cases + more]),
    ]


@pytest.mark.parametrize(("target", "case", "dtype"), targets(BLOCKS, MORE_BLOCKS), ids=str)
def test_a_block(target: str, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    found, expected = of_a_block(case, dtype, target=target)
    near(found, expected, dtype, case[-1] == "relu")


@pytest.mark.parametrize(("target", "case", "dtype"), targets(FUSIONS, MORE_FUSIONS), ids=str)
def test_a_fusion(target: str, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    tensors = fusions.make(case, dtype)
    g = fusions.gradient(case)
    expected = fusions.differentiated(fusions.plain, [t.double() for t in tensors], case, g)
    found = ran(lambda: fusions.differentiated(fusions.operator, tensors, case, g), 10, target=target)
    near(found, expected, dtype, case[-1] == "relu")


@pytest.mark.parametrize("width", ["int32", pytest.param("int64", marks=SLOW)])
def test_order_interleaving_and_offset_width_change_no_bit(width: str) -> None:
    """Blocks in descending order, warps interleaved at random, offsets in int64: the same bits as plain execution."""
    expected, _ = of_a_block(*BLOCKS[0])
    for changed in ({"block_order": "descending"}, {"seed": 3}):
        with launch.int64_offsets() if width == "int64" else nullcontext():
            found, _ = of_a_block(*BLOCKS[0], **changed)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), changed


@pytest.mark.slow
@pytest.mark.parametrize("case", [(2, 12, 12, 3, 5, 1, 1, "silu"), (1, 92, 36, 5, 3, 2, 1, "silu")], ids=str)
@pytest.mark.parametrize(("target", "dtype"), [("sm_80", F32), ("sm_90", F32), ("sm_90", F16)], ids=str)
def test_with_our_convolutions(target: str, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    with forced(OWN), float32_precision("ieee"):
        found, expected = of_a_block(case, dtype, target=target)
    near(found, expected, dtype)


@pytest.mark.slow
def test_any_strides() -> None:
    """A map with a pitch, and a gradient that is one value for each channel."""
    case = BLOCKS[0][0]
    _, block = blocks.make(case)
    n, c, k, h, w, *_ = case
    wide = torch.randn(n, 2 * c + 1, h, w).contiguous(memory_format=torch.channels_last)
    view, g = wide[:, c : 2 * c], torch.randn(n, k, 1, 1).expand(n, k, h, w)
    expected, _ = blocks.reference(view, block, g)
    near(ran(lambda: blocks.differentiated(view, block, g), 7), expected, F32)
