"""A bounded attack: random calls of the operators and of deployed networks, with random changes between them, against
the reference on the values of the moment. The slow form is the same, longer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPERATORS, arguments, to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import error
from torch import Tensor, nn

from parnet_kernels import DeployedParNet, ParNetConfig, ops, reference
from parnet_kernels.call import SIGNATURES

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def bounded(examples: int) -> Any:
    """The same cases at every run."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
    )


# ------------------------------------------------------------------ layouts


def sliced(t: Tensor) -> Tensor:
    """Part of a larger tensor full of NaN, every stride odd."""
    wide = t.new_full([2 * n + 1 for n in t.shape], float("nan"))
    part = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    part.copy_(t)
    return part


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "sliced": sliced,
    "transposed": lambda t: t.transpose(-1, 0).contiguous().transpose(-1, 0),
    "shifted": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),  # not at a multiple of 8 bytes
}

# ------------------------------------------------------------------ operators

#: What may happen to one tensor of a call before the next one.
CHANGES: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda t: None,
    "in place": lambda t: t.mul_(1.25),
    "data": lambda t: setattr(t, "data", t.data * 0.75),
    "data in place": lambda t: t.data.add_(0.1),
    "storage": lambda t: t.view(-1)[-1:].fill_(0.5) if t.is_contiguous() and t.numel() else None,
    "NaN": lambda t: t.view(-1)[:1].fill_(float("nan")) if t.is_contiguous() and t.numel() else None,
    "infinity": lambda t: t.view(-1)[-1:].fill_(float("inf")) if t.is_contiguous() and t.numel() else None,
    "no longer": lambda t: t.nan_to_num_(0.25, 0.5, -0.5),
}

calls = st.fixed_dictionaries(
    {
        "op": st.sampled_from(OPERATORS),
        "n": st.integers(0, 3),
        "c": st.sampled_from([1, 2, 3, 8, 12, 17, 33]),
        "k": st.sampled_from([2, 4, 6, 14, 16, 34]),
        "size": st.tuples(st.integers(1, 19), st.integers(1, 19)),
        "stride": st.integers(1, 2),
        "activation": st.sampled_from(["silu", "relu"]),
        "gate_bias": st.booleans(),
        "affine": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
steps = st.lists(st.tuples(st.integers(0, 20), st.sampled_from([*CHANGES])), min_size=1, max_size=4)
layouts = st.lists(st.sampled_from([*LAYOUTS]), min_size=10, max_size=10)


def attack_operator(
    call: dict[str, Any], dtype: torch.dtype, ways: list[str], changes: list[tuple[int, str]], grad: bool
) -> None:
    op = call.pop("op")
    args, options = to(dtype, *arguments(op, **call, dtype=torch.float64))
    named = dict(zip(SIGNATURES[op].tensors, args, strict=False)) | options
    named = {
        name: LAYOUTS[way](v) if isinstance(v, Tensor) else v
        for (name, v), way in zip(named.items(), [*ways, *ways], strict=False)
    }
    tensors = [v for v in named.values() if isinstance(v, Tensor)]
    for which, change in [(0, "nothing"), *changes]:
        CHANGES[change](tensors[which % len(tensors)])
        found = getattr(ops, op)(**named)
        wide = {name: v.double() if isinstance(v, Tensor) else v for name, v in named.items()}
        expected = getattr(reference, op)(**wide)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        if expected.isfinite().all():
            assert not expected.numel() or error(found, expected) <= LIMITS[dtype]
        else:
            # Of the reference in the same dtype: whether padding times NaN is NaN differs between PyTorch's own.
            with ops.use_backend("reference"):
                narrow = getattr(ops, op)(**named)
            torch.testing.assert_close(found, narrow, equal_nan=True, rtol=0.05, atol=0.05)
    if grad and all(bool(t.isfinite().all()) for t in tensors) and dtype in (torch.float32, torch.float64):
        for one in (named, wide):
            one.update({name: v.detach().requires_grad_() for name, v in one.items() if isinstance(v, Tensor)})
        leaves = [[v for v in one.values() if isinstance(v, Tensor)] for one in (named, wide)]
        results = getattr(ops, op)(**named).sum(), getattr(reference, op)(**wide).sum()
        gradients = [torch.autograd.grad(y, of) for y, of in zip(results, leaves, strict=True)]
        scale = max(float(g.abs().max()) for g in gradients[1] if g.numel())
        for a, b in zip(*gradients, strict=True):
            assert not b.numel() or float((a.double() - b).abs().max()) <= 10 * LIMITS[dtype] * scale


operator_cases = given(call=calls, dtype=st.sampled_from([*LIMITS]), ways=layouts, changes=steps, grad=st.booleans())


@operator_cases
@bounded(60)
def test_operators(**case: Any) -> None:
    attack_operator(**case)


@pytest.mark.slow
@operator_cases
@bounded(5000)
def test_operators_for_long(**case: Any) -> None:
    attack_operator(**case)


# ------------------------------------------------------------------ networks

CONFIGS = (
    ParNetConfig((8, 12, 16, 24), (2, 2, 2), num_classes=5),
    ParNetConfig((3, 6, 10), (2, 3), num_classes=0, activation="relu"),
    ParNetConfig((5, 10), (3,), num_classes=3),
    ParNetConfig((4, 4, 8, 12), (1, 2, 2), num_classes=3),  # a stream without blocks
    ParNetConfig((8, 8, 8, 16), (2, 2, 2), num_classes=4, pointwise_head=True, stem_stride=1),
)


def weights(net: DeployedParNet) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.numel()]


def write(change: Callable[[Tensor], object]) -> Callable[[DeployedParNet, int], object]:
    def apply(net: DeployedParNet, which: int) -> None:
        every = weights(net)
        with torch.no_grad():
            change(every[which % len(every)])

    return apply


def slot(net: DeployedParNet, which: int) -> str:
    return [*net.layers][which % len(net.layers)]


def replace(net: DeployedParNet, which: int) -> None:
    name = slot(net, which)
    layer = net.layers[name]
    net.layers[name] = layer[0] if isinstance(layer, nn.Sequential) else Wrapped(layer)


class Wrapped(nn.Sequential):
    def forward(self, *inputs: Tensor) -> Tensor:
        return 1.5 * self[0](*inputs)


def hook(net: DeployedParNet, which: int) -> None:
    layer = net.layers[slot(net, which)]
    if layer._forward_hooks:
        layer._forward_hooks.clear()
    else:
        layer.register_forward_hook(halved)


def halved(module: nn.Module, inputs: Any, result: Tensor) -> Tensor:
    return result / 2


def swap(net: DeployedParNet, which: int) -> None:
    name, p = [(name, p) for name, p in net.named_parameters() if p.numel()][which % len(weights(net))]
    parent, _, own = name.rpartition(".")
    setattr(net.get_submodule(parent), own, nn.Parameter(1.1 * p.detach(), requires_grad=bool(which % 2)))


EVENTS: dict[str, Callable[[DeployedParNet, int], object]] = {
    "in place": write(lambda t: t.mul_(1.2)),
    "data": write(lambda t: setattr(t, "data", t.data * 0.8)),
    "data in place": write(lambda t: t.data.mul_(0.9)),
    "numpy": write(lambda t: t.detach().numpy().__imul__(1.1)),
    "replaced weight": swap,
    "wrapped layer": replace,
    "hook": hook,
    "gradients": lambda net, which: weights(net)[which % len(weights(net))].requires_grad_(bool(which % 3)),
    "prepare": lambda net, which: net.prepare(),
    "loaded": lambda net, which: net.load_state_dict({k: v * 0.9 for k, v in net.state_dict().items()}),
    "there and back": lambda net, which: net.double().float(),
    "settings": lambda net, which: (
        setattr(net.layers[slot(net, 0)], "activation", ("silu", "relu")[which % 2])
        if not isinstance(net.layers[slot(net, 0)], Wrapped)
        else None
    ),
}


def attack_network(which: int, seed: int, sizes: list[tuple[int, int, int]], events: list[tuple[str, int]]) -> None:
    config = CONFIGS[which]
    net = DeployedParNet(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = p[0].numel() if p.dim() > 1 and p.numel() else 25
            p.copy_(torch.randn(p.shape, generator=generator) * fan**-0.5 + name.endswith("scale"))
    for i, (event, at) in enumerate([("prepare", 0), *events]):
        EVENTS[event](net, at)
        x = torch.randn(sizes[i % len(sizes)][0], 3, *sizes[i % len(sizes)][1:], generator=generator)
        with ops.use_backend("reference"):
            expected = copy.deepcopy(net).double()(x.double()).detach()
        for layout in (torch.contiguous_format, torch.channels_last):
            found = net(x.contiguous(memory_format=layout)).detach()
            assert found.shape == expected.shape
            assert not expected.numel() or error(found, expected) <= 1e-4, (event, net.why_layer_by_layer(x))


network_cases = given(
    which=st.integers(0, len(CONFIGS) - 1),
    seed=st.integers(0, 99),
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    events=st.lists(st.tuples(st.sampled_from([*EVENTS]), st.integers(0, 50)), min_size=1, max_size=6),
)


@network_cases
@bounded(12)
def test_networks(**case: Any) -> None:
    attack_network(**case)


@pytest.mark.slow
@network_cases
@bounded(1000)
def test_networks_for_long(**case: Any) -> None:
    attack_network(**case)
