"""The compiled PTX of every kernel, executed by the simulator: numbers, no reports, memory traffic. For sm_80, and for
sm_90, whose products are wgmma's.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import OPERATORS, arguments, to
from ptxsim import Result
from simulated import simulate
from torch import Tensor

from parnet_kernels import reference
from parnet_kernels.call import Call
from parnet_kernels.triton import backend, float32_precision, launch, layers, policy

pytestmark = pytest.mark.ptxsim
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
FLOAT32 = {"ieee": 3e-6, "tf32x3": 3e-6, "tf32": 2e-3}

CASES = [
    ("repvgg_sse", 64, 64, (7, 7), 2, 1, torch.float16, "ieee"),
    ("downsample_se", 12, 92, (9, 5), 2, 2, torch.bfloat16, "ieee"),
    ("fusion_se", 92, 36, (7, 7), 1, 2, torch.float16, "ieee"),
    ("repvgg_sse", 36, 36, (6, 7), 1, 1, torch.float32, "tf32x3"),
    ("downsample_se", 3, 64, (14, 13), 1, 2, torch.float32, "tf32"),
]
MORE = [
    ("fusion_se", 65, 130, (9, 5), 2, 1, torch.bfloat16, "ieee"),
    ("fusion_se", 64, 128, (14, 14), 1, 2, torch.float32, "ieee"),
    ("repvgg_sse", 130, 130, (14, 14), 3, 1, torch.bfloat16, "ieee"),
    ("downsample_se", 130, 12, (1, 1), 3, 1, torch.float16, "ieee"),
    ("downsample_se", 64, 64, (8, 8), 2, 1, torch.float16, "ieee"),
]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def forward_and_backward(
    op: str, positional: list[Any], options: dict[str, Any], g: Tensor | None = None, **simulator: Any
) -> list[Tensor]:
    """Result and every gradient, from the simulator; raises if it reports anything."""
    call = Call.of(op, positional, options)
    y, _ = simulate(lambda: backend.run(call), **simulator)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    every = [*call.tensors.values()]
    found, _ = simulate(
        lambda: backend.triton_backward(op, g, every, call.stride, call.activation, [True] * len(every)),
        **simulator,
    )
    return [y, *found]


def case(index: Any) -> str:
    if isinstance(index, str):
        return index
    op, c, k, size, n, stride, dtype, precision = index
    return f"{op}-{n}x{c}x{size[0]}x{size[1]}-{k}-s{stride}-{str(dtype)[6:]}-{precision}"


@pytest.mark.parametrize(
    ("target", "values"),
    [
        *(("sm_80", v) for v in CASES),
        ("sm_90", CASES[1]),
        *(pytest.param("sm_80", v, marks=pytest.mark.slow) for v in MORE),
        *(pytest.param("sm_90", v, marks=pytest.mark.slow) for v in [CASES[0], *CASES[2:], *MORE]),
    ],
    ids=case,
)
def test_against_float64(target: str, values: Any) -> None:
    op, c, k, size, n, stride, dtype, precision = values
    positional, options = arguments(op, n, c, k, size, dtype=dtype, stride=stride)
    positional[0] = positional[0].contiguous(memory_format=torch.channels_last)
    wide, wide_options = to(torch.float64, positional, options)
    leaves = [t.requires_grad_() for t in (*wide, wide_options["out_scale"], wide_options["out_shift"])]
    expected = getattr(reference, op)(*wide, **wide_options)
    with float32_precision(precision):
        y, *found = forward_and_backward(op, positional, options, target=target)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    tolerance = TOLERANCE.get(dtype) or FLOAT32[precision]
    assert relative(y, expected.detach()) <= tolerance
    for index, (a, b) in enumerate(zip(found, torch.autograd.grad(expected, leaves, g.double()), strict=True)):
        assert relative(a, b) <= tolerance, index


@pytest.mark.parametrize("op", [OPERATORS[0], *(pytest.param(op, marks=pytest.mark.slow) for op in OPERATORS[1:])])
def test_order_interleaving_and_offset_width_change_no_bit(op: str) -> None:
    """Blocks in descending order, warps interleaved at random, offsets in int64: the same bits as plain execution."""
    positional, options = arguments(op, 2, 20, 34, (7, 6), dtype=torch.float16, stride=2)
    expected = forward_and_backward(op, positional, options)
    for changed in ({"block_order": "descending"}, {"seed": 3}):
        found = forward_and_backward(op, positional, options, **changed)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), changed
    with launch.int64_offsets():
        found = forward_and_backward(op, positional, options)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def scalar_flops(result: Result) -> int:
    """Of a launch, outside of matrix instructions; a multiply-add counts twice."""
    mix = result.thread_mix.items()
    return 2 * sum(n for name, n in mix if name.split(".")[0] in ("fma", "mul", "add") and ".f32" in name)


def test_backward_is_in_matrix_instructions() -> None:
    """≥ 95 % of the arithmetic of each convolution of a backward pass, epilogues included."""
    positional, options = arguments("repvgg_sse", 1, 128, 128, (14, 14), dtype=torch.float16)
    positional[:2] = [t.contiguous(memory_format=torch.channels_last) for t in positional[:2]]
    g = torch.ones(1, 128, 14, 14, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    every = [*positional, options["out_scale"], options["out_shift"]]
    with mock.patch.object(policy, "split", return_value=1):
        _, results = simulate(
            lambda: backend.triton_backward("repvgg_sse", g, every, 1, options["activation"], [True] * len(every))
        )
    for name in ("conv_se_bwd_kernel:whole", "conv_se_fwd_kernel:whole", "weight_se_bwd_kernel"):
        flops = results[name].mma_flops
        assert flops >= 2 * 9 * 128 * 128 * 14 * 14, name
        assert flops >= 0.95 * (flops + scalar_flops(results[name])), name


def block_28x28x256() -> tuple[layers.Layer, Tensor, Tensor]:
    """A RepVGG-SSE block of ParNet-M's middle stream, its input, and its result in float64."""
    positional, options = arguments("repvgg_sse", 1, 256, 256, (28, 28), dtype=torch.float16)
    wide, wide_options = to(torch.float64, positional, options)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in positional[:2])
    _, _, bias, scale, shift, gate_weight, gate_bias = positional
    layer = layers.Layer(weight, bias, gate_weight, gate_bias, scale, shift, **options)
    return layer, x, reference.repvgg_sse(*wide, **wide_options)


#: An im2col prototype with this tile requested 104 MB for the three layers of a ParNet-M level; this is the share of
#: the middle layer, by tile loads: 30.67 of 97.3 MB.
PROTOTYPE_BYTES = 104e6 * 30.67 / 97.3


def test_traffic_of_a_block_at_28x28x256() -> None:
    layer, x, expected = block_28x28x256()
    (maps,), _ = simulate(lambda: layers.maps_of(x))
    out, results = simulate(lambda: layers.forward(layer, (maps,), "ieee"))
    assert set(results) == {"gate_se_fwd_kernel", "conv_se_fwd_kernel:whole"}, "one launch beside the gate's"
    assert relative(out.data.permute(0, 3, 1, 2), expected) <= 1e-3

    conv: Result = results["conv_se_fwd_kernel:whole"]
    compulsory = 2 * (x.numel() + layer.weight.numel() + layer.gate_weight.numel() + out.data.numel())
    lines = sum(r.unique_lines for r in results.values())
    assert 128 * lines <= 1.1 * compulsory
    requested = sum(r.global_load["bytes"] + r.global_store["bytes"] for r in results.values())
    assert requested <= PROTOTYPE_BYTES
    for name, result in results.items():
        for counters in (result.global_load, result.global_store):
            assert counters["efficiency"] >= 0.95, f"{name}: sectors used"
    # All products of the main loop are in matrix instructions: rows of the last tile are computed in vain.
    tiles = -(-784 // 64) * 64
    assert conv.mma_flops == 2 * tiles * 256 * 9 * 256
    # of the rest of the floating-point work, the epilogue's, there are a few dozen operations a result
    assert conv.mma_flops >= 0.95 * (conv.mma_flops + scalar_flops(conv))
    assert conv.ldmatrix["bank_conflict"] <= 1.12
