"""The gradient of ReLU is zero where it gives zero, also for an infinite gradient of its result."""

from __future__ import annotations

from typing import Any

import pytest
import test_training_ops as blocks
import torch
from cases import OPERATORS, arguments
from torch import Tensor

from parnet_kernels.ops import use_backend

BACKENDS = ("cpu", "reference")


def spoiled(g: Tensor, y: Tensor) -> Tensor:
    """g with an infinity where y is zero."""
    at = tuple((y == 0).nonzero()[0])
    g = g.clone()
    g[at] = float("inf")
    return g


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)  # by another algorithm, where a tile would spread it


def without(g: Tensor) -> Tensor:
    return g.masked_fill(g.isinf(), 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("stride", [1, 2])
def test_of_an_operator(op: str, stride: int, backend: str) -> None:
    if (op, stride) == ("repvgg_sse", 2):
        pytest.skip("a skip needs stride 1")
    positional, options = arguments(op, c=12, k=8, size=(7, 9), stride=stride, activation="relu", affine=False)
    given = [t.requires_grad_() for t in positional if t is not None]
    with use_backend(backend):
        y = getattr(torch.ops.parnet, op)(*given, **options)
        g = spoiled(torch.randn_like(y), y.detach())
        found, expected = (torch.autograd.grad(y, given, each, retain_graph=True) for each in (g, without(g)))
    same([*found], [*expected])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [(3, 12, 12, 7, 9, 1, 1, "relu"), (3, 12, 92, 9, 5, 2, 1, "relu")], ids=str)
def test_of_a_training_operator(case: tuple[Any, ...], backend: str) -> None:
    x, block = blocks.make(case)
    with use_backend(backend):
        y, *_ = blocks.operator(x, block)
        g = spoiled(torch.randn_like(y), y)
        found, expected = (blocks.differentiated(x, block, each) for each in (g, without(g)))
    same(found, expected)
