"""Every operator, forward and backward, through torch.ops and autograd, against the reference in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from cases import OPERATORS, arguments, to
from pairwise import pairwise
from torch import Tensor

from parnet_kernels import ops, reference
from parnet_kernels.triton import float32_precision

#: Norm-wise against float64 of the rounded inputs.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
PARAMETERS: dict[str, list[Any]] = {
    "dtype": list(TOLERANCE),
    "stride": [1, 2],
    "size": [(1, 1), (7, 7), (14, 14), (9, 5)],
    "channels": [3, 12, 64, 92, 130],
    "batch": [1, 3],
    "activation": ["silu", "relu"],
    "gate_bias": [False, True],
    "affine": [False, True],
    "channels_last": [False, True],
}


def usual(case: dict[str, Any]) -> dict[str, Any]:
    """K differs from C where it may; fusion's K is even."""
    return {**case, "k": {3: 64, 12: 92, 64: 20, 92: 36, 130: 12}[case["channels"]]}


def name(case: dict[str, Any]) -> str:
    c = case
    parts = [
        c["op"],
        str(c["dtype"])[6:],
        f"s{c['stride']}",
        f"{c['batch']}x{c['channels']}x{c['size'][0]}x{c['size'][1]}",
    ]
    parts += [c["activation"]] + [option for option in ("gate_bias", "affine", "channels_last") if c[option]]
    return "-".join(parts)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, or the absolute norm where nothing is expected."""
    scale = expected.norm().item()
    return (found.double().cpu() - expected).norm().item() / (scale if scale > 1e-12 else 1.0)


def check(case: dict[str, Any], where: torch.device) -> None:
    """Forward and every gradient of one case."""
    positional, options = arguments(
        case["op"], case["batch"], case["channels"], case["k"], case["size"],
        dtype=case["dtype"], stride=case["stride"], activation=case["activation"], gate_bias=case["gate_bias"],
        affine=case["affine"],
    )  # fmt: skip
    wide, wide_options = to(torch.float64, positional, options)
    layout = torch.channels_last if case["channels_last"] else torch.contiguous_format

    def leaf(t: Tensor) -> Tensor:
        return t.to(where, memory_format=layout if t.dim() == 4 else torch.preserve_format).requires_grad_()

    positional = [None if t is None else leaf(t) for t in positional]
    options = {key: leaf(v) if isinstance(v, Tensor) else v for key, v in options.items()}
    for t in (*wide, *wide_options.values()):
        if isinstance(t, Tensor):
            t.requires_grad_()
    leaves = [t for t in (*positional, *options.values()) if isinstance(t, Tensor)]
    wide_leaves = [t for t in (*wide, *wide_options.values()) if isinstance(t, Tensor)]
    saved = [t.detach().clone() for t in leaves]

    with ops.use_backend("triton"), float32_precision("ieee"):
        y = getattr(ops, case["op"])(*positional, **options)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
        found = torch.autograd.grad(y, leaves, g.to(where))
    expected_y = getattr(reference, case["op"])(*wide, **wide_options)
    expected = torch.autograd.grad(expected_y, wide_leaves, g.double())

    tolerance = TOLERANCE[case["dtype"]]
    assert relative(y.detach(), expected_y.detach()) <= tolerance
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == case["dtype"]
        assert relative(a, b) <= tolerance, f"gradient of leaf {index}: {relative(a, b):.1e}"
    assert all(torch.equal(a, b) for a, b in zip(leaves, saved, strict=True)), "an argument was changed"


FEW = [usual(case) for case in pairwise({"op": OPERATORS, **PARAMETERS})]
MORE = [usual({"op": op, **case}) for op in OPERATORS for case in pairwise(PARAMETERS)]


@pytest.mark.parametrize(
    "case",
    [*FEW, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE if case not in FEW)],
    ids=name,
)
def test_against_float64(case: dict[str, Any], where: torch.device) -> None:
    if case["op"] == "repvgg_sse":
        case = {**case, "stride": 1}
    check(case, where)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_more_combinations(op: str, dtype: torch.dtype, where: torch.device) -> None:
    """Every 29th of all combinations: 29 divides no parameter's count, so every value meets every other."""
    values = {**PARAMETERS, "dtype": [dtype]}
    for combination in list(product(*values.values()))[::29]:
        case = usual({"op": op, **dict(zip(values, combination, strict=True))})
        check({**case, "stride": 1} if op == "repvgg_sse" else case, where)
