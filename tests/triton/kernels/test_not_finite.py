"""A NaN or an infinity reaches what the definition says, and nothing else. (0 · ∞ is NaN: zeros in a kernel's products
do not keep out what lies beside an image, a group or a channel.)
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import OPERATORS, arguments, to
from torch import Tensor

from parnet_kernels import ops, reference
from parnet_kernels.triton import float32_precision, layers, policy
from parnet_kernels.triton.pack import Map

INF, NAN = float("inf"), float("nan")


def results(op: str, function: Any, positional: list[Tensor], options: dict[str, Any], g: Tensor) -> dict[str, Tensor]:
    """The result, and the gradient of every argument, by name."""
    leaves = {str(i): t.detach().requires_grad_() for i, t in enumerate(positional)}
    named = {name: t.detach().requires_grad_() for name, t in options.items() if isinstance(t, Tensor)}
    y = function(*leaves.values(), **{**options, **named})
    found = torch.autograd.grad(y, [*leaves.values(), *named.values()], g)
    return {"y": y.detach(), **dict(zip([*leaves, *named], found, strict=True))}


def check(op: str, positional: list[Tensor], options: dict[str, Any], g: Tensor, where: torch.device) -> set[str]:
    """Compares what is finite by definition; returns the names of results that are so in part."""
    wide, wide_options = to(torch.float64, positional, options)
    expected = results(op, getattr(reference, op), wide, wide_options, g.double())
    given = [t.to(where) for t in positional]
    given_options = {name: v.to(where) if isinstance(v, Tensor) else v for name, v in options.items()}
    with ops.use_backend("triton"), float32_precision("ieee"):
        found = results(op, getattr(ops, op), given, given_options, g.to(where))
    assert not all(t.isfinite().all() for t in expected.values())
    for name, exact in expected.items():
        finite = exact.isfinite()
        value = found[name].cpu().double()[finite]
        assert torch.allclose(value, exact[finite], rtol=1e-4, atol=1e-4), name
    return {name for name, exact in expected.items() if not exact.isfinite().all() and exact.isfinite().any()}


def gradient(positional: list[Tensor], options: dict[str, Any], op: str) -> Tensor:
    shape = getattr(reference, op)(*positional, **options).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Channels of an input, stride, splits, what is spoiled with what. Half of the channels is no multiple of 16 or 32: a
# chunk holds channels of both groups.
FUSIONS = [
    (8, 2, 1, "x", NAN, "silu"),
    (8, 1, 2, "g", INF, "silu"),
    (96, 1, 1, "x", INF, "relu"),
    (96, 2, 3, "g", NAN, "silu"),
    (41, 2, 2, "y", NAN, "relu"),
    (41, 1, 1, "g", NAN, "silu"),
    (1, 1, 1, "y", INF, "silu"),
    (1, 2, 1, "g", NAN, "relu"),
    (40, 2, 3, "x", -INF, "relu"),
]


@pytest.mark.parametrize(("c", "stride", "splits", "of", "value", "activation"), FUSIONS)
def test_a_group_of_a_fusion_does_not_see_the_other(
    c: int, stride: int, splits: int, of: str, value: float, activation: str, where: torch.device
) -> None:
    """Neither in the result nor in the gradients."""
    positional, options = arguments("fusion_se", 2, c, 12, (7, 5), stride=stride, activation=activation, affine=False)
    g = gradient(positional, options, "fusion_se")
    with mock.patch.object(policy, "split", return_value=splits):
        for group in (0, 1):
            spoiled, spoiled_g = [t.clone() for t in positional], g.clone()
            if of == "g":
                spoiled_g[:, group, 1, 1] = value
            else:
                index = "xy".index(of)
                spoiled[index][:, (c - 1) * group, 3, 2] = value
            partly = check("fusion_se", spoiled, options, spoiled_g, where)
            assert ("y" in partly) == (of != "g")
            assert c == 1 or {"0", "1"} <= partly, "the group's own channels are not finite, the other's are"


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("of", ["x", "g"])
def test_an_image_does_not_see_another(op: str, of: str, where: torch.device) -> None:
    """Tiles of several images; channels that are padded."""
    positional, options = arguments(op, 3, 12, 10, (3, 3), stride=1)
    g = gradient(positional, options, op)
    for value in (NAN, INF):
        spoiled, spoiled_g = [t.clone() for t in positional], g.clone()
        (spoiled[0] if of == "x" else spoiled_g)[1, 2, 1, 1] = value
        partly = check(op, spoiled, options, spoiled_g, where)
        assert "0" in partly
        assert ("y" in partly) == (of == "x")


@pytest.mark.parametrize(
    ("op", "parameter"),
    [
        pytest.param(op, parameter, marks=[pytest.mark.slow] * ((i + j) % len(OPERATORS) > 0))  # one operator each
        for i, parameter in enumerate(["weight", "gate_weight", "out_shift"])
        for j, op in enumerate(OPERATORS)
    ],
)
def test_a_channel_does_not_see_another(op: str, parameter: str, where: torch.device) -> None:
    """Pixels of a tile that lie in no image do not count, whatever the parameters of their channel."""
    positional, options = arguments(op, 2, 12, 10, (3, 5), stride=1, activation="relu")
    g = gradient(positional, options, op)
    maps = 2 if op == "fusion_se" else 1
    at = {"weight": maps, "gate_weight": maps + 2 + 2 * (op == "repvgg_sse")}
    for value in (NAN, -INF):
        spoiled, spoiled_options = [t.clone() for t in positional], dict(options)
        if parameter in at:
            spoiled[at[parameter]][3, 1] = value
        else:
            spoiled_options[parameter] = options[parameter].clone()
            spoiled_options[parameter][3] = value
        assert check(op, spoiled, spoiled_options, g, where)


def test_padding_between_layers_stays_zero(where: torch.device) -> None:
    """A map that goes to the next layer has channels that do not exist: there the kernel's products are zeros."""
    (x, *parameters), _ = arguments("downsample_se", 2, 8, 12, (4, 4), stride=1, activation="relu")
    x[0, 1, 2, 2] = -INF
    layer = layers.Layer(*(t.to(where) for t in parameters), stride=1, activation="relu")
    (packed,) = layers.maps_of(x.to(where))
    out: Map = layers.forward(layer, (packed,), "ieee")
    assert not out.data[..., :12].isfinite().all()
    assert not out.data[..., 12:].any()
    assert out.data[..., 12:].numel() > 0
