"""The training form of fusions against the plain form in float64, and the model's use of it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from oracle import error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from parnet_kernels import ops, reference, training, training_fusion
from parnet_kernels.config import ParNetConfig
from parnet_kernels.cpu import training as cpu
from parnet_kernels.model import Block, MultiBatchNorm, ParNet
from parnet_kernels.ops import use_backend

NATIVE = cpu.why_not(torch.empty(0)) is None
native = pytest.mark.skipif(not NATIVE, reason="no compiled library")

# n, c (of one input), k, height, width, stride, activation
CASES = [
    (2, 3, 4, 5, 7, 1, "silu"),
    (3, 12, 12, 1, 2, 1, "relu"),
    (9, 12, 10, 1, 1, 2, "silu"),
    (1, 46, 130, 13, 14, 2, "silu"),
    (2, 65, 92, 6, 5, 2, "relu"),
    (2, 2, 6, 9, 8, 1, "silu"),
]
EPS = [1e-5, 1e-3, 1e-4, 1e-2]


def make(case: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    n, c, k, height, width, *_ = case
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    maps = [normal(n, c, height, width, mean=m, scale=s) for m, s in ((0.5, 1.0), (-2.0, 3.0))]
    weights = normal(k, c, 3, 3, scale=(9 * c) ** -0.5), normal(k, c, 1, 1, scale=c**-0.5)
    vectors = [normal(size, mean=m) for size, m in ((k, 1), (k, 0), (k, 1), (k, 0), (c, 1), (c, 0), (c, 1), (c, 0))]
    return [*maps, *weights, *vectors, normal(k, c, scale=c**-0.5)]


def plain(tensors: list[Tensor], stride: int, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    x, y, *block = tensors
    vectors = block[2:6]
    norms = training_fusion.Norms([block[6], block[8]], [block[7], block[9]], EPS[2:])
    inner = training.Block(*block[:2], *vectors, None, None, block[-1], EPS[:2], stride, 2, activation)
    return training_fusion.plain((x, y), norms, inner)


def operator(tensors: list[Tensor], stride: int, activation: str) -> tuple[Tensor, ...]:
    return ops.fusion_se_train(*tensors, eps=EPS, stride=stride, activation=activation)


def differentiated(function: Any, tensors: list[Tensor], case: tuple[Any, ...], g: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    result, *statistics = function(leaves, *case[5:])
    if g is None:
        g = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [
        result.detach(),
        *(s.detach() for s in statistics),
        *torch.autograd.grad(result, leaves, g.to(result.dtype)),
    ]


def gradient(case: tuple[Any, ...], *shape: int) -> Tensor:
    n, _, k, height, width, stride, _ = case
    size = shape or (n, k, (height - 1) // stride + 1, (width - 1) // stride + 1)
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def near(found: list[Tensor], expected: list[Tensor], bound: float = 1e-5) -> None:
    scale = max(e.norm().item() for e in expected[3:])
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        # A gradient that is zero but for rounding is compared with what it is a difference of.
        assert error(f, e) <= bound or (f.double() - e).norm() <= 1e-7 * scale, i


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plain_form_is_that_of_the_modules(case: tuple[Any, ...]) -> None:
    """Written from the modules of PyTorch, not from the algebra."""
    _, c, k, *_, stride, activation = case
    x, y, *rest = make(case, torch.float64)
    norm, block = MultiBatchNorm(c, c).double(), Block(2 * c, k, stride, 2, activation).double()
    point = block.rbr_1x1 if stride == 1 else block.rbr_1x1[1]  # type: ignore[index]
    norms = block.rbr_dense.bn, point.bn, norm.b1, norm.b2
    with torch.no_grad():
        for conv, weight in zip((block.rbr_dense.conv, point.conv), rest, strict=False):
            conv.weight.copy_(weight)
        for i, bn in enumerate(norms):
            bn.weight.copy_(rest[2 + 2 * i])
            bn.bias.copy_(rest[3 + 2 * i])
            bn.eps = EPS[i]
        block.se.cvsig.conv.weight.copy_(rest[-1][:, :, None, None])
        result = block(reference.interleave(*norm(x, y)))
    expected, statistics, of_inputs = plain([x, y, *rest], stride, activation)
    assert torch.allclose(result, expected, rtol=1e-11, atol=1e-11)
    for found, bn in zip((*statistics[0::2], *of_inputs[0::2]), norms, strict=True):
        assert torch.allclose(bn.running_mean, 0.1 * found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_algebra_in_float64(case: tuple[Any, ...]) -> None:
    tensors = make(case, torch.float64)
    expected = differentiated(plain, tensors, case, gradient(case))
    for found, wanted in zip(differentiated(operator, tensors, case, gradient(case)), expected, strict=True):
        assert (found - wanted).norm() <= 1e-12 * (wanted.norm() + 1e-2)


@native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native(case: tuple[Any, ...]) -> None:
    tensors = make(case)
    expected = differentiated(plain, [t.double() for t in tensors], case, gradient(case))
    near(differentiated(operator, tensors, case, gradient(case)), expected)


@native
def test_any_strides() -> None:
    case = CASES[3]
    tensors = make(case)
    wide = torch.randn(1, 92, 28, 28)
    expanded = torch.randn(1, 46, 1, 14).expand(1, 46, 13, 14)
    last = tensors[0].contiguous(memory_format=torch.channels_last)
    views = wide[:, ::2, 1:14, :14], wide.permute(0, 1, 3, 2)[:, 46:, :13, :14], expanded, last
    for x, y in itertools.permutations(views, 2):
        given = [x, y, *tensors[2:]]
        for g in (gradient(case, 1, 130, 1, 1).expand(1, 130, 7, 7), gradient(case, 1, 130, 7, 14)[..., ::2].flip(2)):
            expected = differentiated(plain, [t.double() for t in given], case, g)
            near(differentiated(operator, given, case, g), expected)


@native
def test_same_bits_for_any_number_of_threads() -> None:
    tensors, case = make((2, 40, 64, 16, 18, 2, "silu")), (2, 40, 64, 16, 18, 2, "silu")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(differentiated(operator, tensors, case, gradient(case)))
    for other in found[1:]:
        assert torch.equal(other[2], found[0][2])  # statistics of the inputs
        for i in (1, 3, 4, 5):  # those that follow the gate's product, which is PyTorch's
            assert error(other[i], found[0][i].double()) < 1e-6


def test_what_is_saved() -> None:
    tensors = [t.requires_grad_() for t in make((2, 16, 48, 12, 12, 1, "silu"))]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operator(tensors, 1, "silu")
    assert [t.shape for t in saved if t.dim() == 4 and t.shape[2:] == (12, 12)] == [(2, 16, 12, 12)] * 2 + [
        (2, 48, 12, 12)
    ] * 2
    assert saved[0] is tensors[0]
    assert saved[1] is tensors[1]
    assert sum(t.numel() for t in saved if t.dim() < 4) <= 4 * 48 + 4 * 16 + 4 * 48 + 4 * 16 + 48 * 16 + 2 * (32 + 48)


def test_double_backward() -> None:
    case = CASES[0]
    tensors = [t.requires_grad_() for t in make(case, torch.float64)]
    g = gradient(case).requires_grad_()
    found = []
    for function in (operator, plain):
        first = torch.autograd.grad(function(tensors, *case[5:])[0], tensors, g, create_graph=True)
        found.append(torch.autograd.grad(sum(d.square().sum() for d in first), [*tensors, g]))
    for f, e in zip(*found, strict=True):
        assert (f - e).norm() <= 1e-11 * (1 + e.norm())


def test_errors_name_the_argument() -> None:
    names = [
        "x",
        "y",
        "weight3",
        "weight1",
        "gamma3",
        "beta3",
        "gamma1",
        "beta1",
        "gamma_x",
        "beta_x",
        "gamma_y",
        "beta_y",
        "gate_weight",
    ]
    tensors = dict(zip(names, make(CASES[0]), strict=True))
    for name, value in (
        ("y", torch.ones(2, 3, 5, 6)),
        ("y", torch.ones(2, 3, 5, 7, dtype=torch.float64)),
        ("y", torch.ones(3, 5, 7)),
        ("weight3", torch.ones(4, 6, 3, 3)),
        ("weight3", torch.ones(3, 3, 3, 3)),
        ("weight1", torch.ones(4, 2, 1, 1)),
        ("beta_x", torch.ones(4)),
        ("gamma_y", torch.ones(3, dtype=torch.float64)),
        ("gate_weight", torch.ones(4, 6)),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            ops.fusion_se_train(**{**tensors, name: value})
    for option, value in (("eps", [1e-5, 1e-5]), ("stride", 3), ("activation", "gelu")):
        with pytest.raises(ValueError, match=option):
            ops.fusion_se_train(**tensors, **{option: value})


@native
def test_gradients_that_nobody_needs() -> None:
    case = CASES[0]
    for needed in ({0}, {1}, {8}, {11}, {2}, {3}, {12}, {4}, {0, 2, 9}):
        tensors = [t.requires_grad_(i in needed) for i, t in enumerate(make(case))]
        expected = [t.detach().double().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        for function, given in ((operator, tensors), (plain, expected)):
            result = function(given, *case[5:])[0]
            result.backward(gradient(case).to(result.dtype))
        for f, e in zip(tensors, expected, strict=True):
            assert (f.grad is None) == (e.grad is None)
            assert f.grad is None or error(f.grad, e.grad) < 1e-5 or e.grad.norm() < 1e-9


# ------------------------------------------------------------------ the model

FUSIONS = "downsamples_2.1.2", "combine.2"


def small() -> ParNet:
    torch.manual_seed(0)
    return ParNet(ParNetConfig((12, 16, 16, 20), (2, 2, 2), num_classes=3))


MAPS = torch.Generator().manual_seed(2)
X, Y = torch.randn(2, 16, 6, 6, generator=MAPS), torch.randn(2, 16, 6, 6, generator=MAPS)


@native
@pytest.mark.parametrize("name", FUSIONS)
def test_the_model_uses_it(name: str) -> None:
    model = small()
    other = copy.deepcopy(model)
    assert model.why_not_fused(name, X, Y) is None
    for m, backend in ((model, "cpu"), (other, "reference")):
        with use_backend(backend):
            for _ in range(2):
                m.run_layer(name, X, Y).square().sum().backward()
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), n
        assert p.grad is None or error(p.grad, q.grad) < 1e-5 or (p.grad - q.grad).norm() < 1e-5, n
    for (n, found), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), n
    assert any(n.startswith(name[:-2]) and "running" in n for n, _ in model.named_buffers())


@native
def test_what_is_not_fused() -> None:
    def reason(change: Any, x: Tensor = X, y: Tensor = Y) -> str:
        model = small()
        change(model, model.block(FUSIONS[0]), model.fusion_norm(FUSIONS[0]))
        found = model.why_not_fused(FUSIONS[0], x, y)
        model.run_layer(FUSIONS[0], x, y)  # works either way
        return str(found)

    seen: list[Any] = []
    assert reason(lambda m, b, n: None) == "None"
    assert "eval" in reason(lambda m, b, n: m.eval())
    assert "eval" in reason(lambda m, b, n: n.b2.eval())  # frozen
    for of in (lambda b, n: b, lambda b, n: n, lambda b, n: n.b1, lambda b, n: b.se):
        assert "hooks" in reason(lambda m, b, n, of=of: of(b, n).register_forward_hook(lambda *a: seen.append(a)))
    assert len(seen) == 4
    assert "forward" in reason(lambda m, b, n: setattr(b, "forward", b.forward))
    assert "Identity" in reason(lambda m, b, n: setattr(n, "b1", nn.Identity()))
    assert "Parametrized" in reason(lambda m, b, n: nn.utils.parametrizations.weight_norm(b.rbr_dense.conv))
    assert "float64" in reason(lambda m, b, n: m.double(), X.double(), Y.double())
    assert "BatchNorm" in reason(lambda m, b, n: setattr(n, "b1", nn.BatchNorm2d(16, affine=False)))
    assert "shape" in str(small().why_not_fused(FUSIONS[0], X, Y[:1]))
    assert small().why_not_fused(FUSIONS[0], X[:, :15], Y[:, :15]) == "x has 15 channels"
    with use_backend("reference"):
        assert "reference" in reason(lambda m, b, n: None)
    with torch.autocast("cpu"):
        assert reason(lambda m, b, n: None) == "None"


@native
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None) -> None:
    model = small()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    norm = model.fusion_norm(FUSIONS[0])
    norm.b2.track_running_stats = norm.b2.running_mean = norm.b2.running_var = None  # type: ignore[assignment]
    other = copy.deepcopy(model)
    for i in range(3):
        assert model.why_not_fused(FUSIONS[0], X, Y) is None
        model.run_layer(FUSIONS[0], X + i, Y)
        with use_backend("reference"):
            other.run_layer(FUSIONS[0], X + i, Y)
    for (name, found), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), name


@native
def test_compiled_and_checkpointed() -> None:
    model = small()
    other = copy.deepcopy(model)

    def step(model: ParNet, x: Tensor) -> Tensor:
        return model.run_layer(FUSIONS[1], x, Y).square().sum()

    x, z = (X.clone().requires_grad_() for _ in range(2))
    torch.compile(step, fullgraph=True, backend="aot_eager")(model, x).backward()
    step(other, z).backward()
    again = torch.autograd.grad(checkpoint(step, other, z, use_reentrant=False), z)[0]
    assert error(x.grad, z.grad.double()) < 1e-6  # type: ignore[union-attr, arg-type]
    assert torch.equal(again, z.grad)  # type: ignore[arg-type]
    for p, q in zip(model.buffers(), copy.deepcopy(model).buffers(), strict=True):
        assert torch.equal(p, q)
    counts = []
    for backend in ("cpu", "reference"):
        with FlopCounterMode(display=False) as counter, use_backend(backend):
            step(model, x).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(counts[1], rel=0.01)
