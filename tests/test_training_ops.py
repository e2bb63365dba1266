"""The operators of the training form against the plain form in float64, and the model's use of them."""

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

from parnet_kernels import training
from parnet_kernels.config import ParNetConfig
from parnet_kernels.cpu import training as cpu
from parnet_kernels.model import Block, ParNet
from parnet_kernels.ops import use_backend

NATIVE = cpu.why_not(torch.empty(0)) is None
native = pytest.mark.skipif(not NATIVE, reason="no compiled library")

# n, c, k, height, width, stride, groups, activation; a skip where c = k and stride 1 and one group
CASES = [
    (2, 3, 3, 5, 7, 1, 1, "silu"),
    (5, 12, 12, 1, 2, 1, 1, "relu"),
    (3, 92, 92, 13, 14, 1, 1, "silu"),
    (1, 130, 130, 3, 3, 1, 1, "silu"),
    (2, 20, 20, 28, 28, 1, 1, "relu"),
    (3, 12, 130, 15, 17, 2, 1, "silu"),
    (9, 3, 16, 1, 1, 2, 1, "silu"),
    (2, 40, 64, 16, 18, 2, 2, "relu"),
    (2, 36, 48, 9, 9, 1, 2, "silu"),
    (2, 17, 33, 6, 5, 1, 1, "silu"),
    (3, 33, 20, 23, 29, 2, 1, "silu"),  # tiles of 4, 4 + 3 and single pixels of stride 2
    (5, 20, 37, 25, 12, 2, 1, "silu"),
    (2, 70, 40, 9, 8, 2, 1, "silu"),  # so many channels that Y1 is kept
    (1, 17, 18, 80, 79, 2, 1, "relu"),  # several sets of tiles in one image
]


def make(case: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, training.Block]:
    n, c, k, height, width, stride, groups, activation = case
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    skip, each = (c, stride, groups) == (k, 1, 1), c // groups
    vectors = [normal(k, mean=m) for m in (1, 0, 1, 0, 1, 0)]
    if not skip:
        vectors[4:] = [None, None]  # type: ignore[list-item]
    weights = normal(k, each, 3, 3, scale=(9 * each) ** -0.5), normal(k, each, 1, 1, scale=each**-0.5)
    eps = [1e-5, 1e-3, 1e-4] if skip else [1e-5, 1e-3]
    block = training.Block(*weights, *vectors, normal(k, each, scale=each**-0.5), eps, stride, groups, activation)
    return normal(n, c, height, width, mean=0.5), block


def leaves(x: Tensor, block: training.Block) -> list[Tensor]:
    return [t for t in (x, *block[:9]) if isinstance(t, Tensor)]


def double(block: training.Block) -> training.Block:
    return training.Block(*(t.double() if isinstance(t, Tensor) else t for t in block))


def operator(x: Tensor, block: training.Block) -> tuple[Tensor, ...]:
    given = [t for t in block[:9] if t is not None]
    options = {"eps": block.eps, "activation": block.activation}
    if block.gamma0 is not None:
        return torch.ops.parnet.repvgg_sse_train(x, *given, **options)
    return torch.ops.parnet.downsample_se_train(x, *given, stride=block.stride, groups=block.groups, **options)


def reference(x: Tensor, block: training.Block, g: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """y, statistics and gradients in float64, and g."""
    x, block = x.double(), double(block)
    wanted = [t.detach().requires_grad_() for t in leaves(x, block)]
    rest = iter(wanted[1:])
    y, statistics = training.plain(
        wanted[0], training.Block(*(next(rest) if isinstance(t, Tensor) else t for t in block))
    )
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype) if g is None else g.double()
    return [y.detach(), statistics.detach(), *torch.autograd.grad(y, wanted, g)], g


def differentiated(x: Tensor, block: training.Block, g: Tensor) -> list[Tensor]:
    wanted = [t.detach().requires_grad_() for t in leaves(x, block)]
    rest = iter(wanted[1:])
    y, statistics, *_ = operator(
        wanted[0], training.Block(*(next(rest) if isinstance(t, Tensor) else t for t in block))
    )
    return [y.detach(), statistics, *torch.autograd.grad(y, wanted, g.to(y.dtype))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_algebra_in_float64(case: tuple[Any, ...]) -> None:
    x, block = make(case, torch.float64)
    expected, g = reference(x, block)
    for found, wanted in zip(differentiated(x, block, g), expected, strict=True):
        assert (found - wanted).norm() <= 1e-12 * (wanted.norm() + 1e-2)


def near(found: list[Tensor], expected: list[Tensor], bound: float = 1e-5) -> None:
    scale = max(e.norm().item() for e in expected[2:])
    for name, f, e in zip(("y", "statistics", "x", *training.Block._fields), found, expected, strict=False):
        # A gradient that is zero but for rounding is compared with what it is a difference of.
        assert error(f, e) <= bound or (f.double() - e).norm() <= 1e-7 * scale, name


@native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native(case: tuple[Any, ...]) -> None:
    x, block = make(case)
    expected, g = reference(x, block)
    near(differentiated(x, block, g), expected)


@native
def test_any_strides() -> None:
    x, block = make(CASES[2])
    wide = torch.randn(3, 184, 28, 28)
    expanded = torch.randn(1, 92, 13, 1).expand(3, 92, 13, 14)
    for other in (wide[:, ::2, 1:14, :14], wide.permute(0, 1, 3, 2)[:, 92:, :13, :14], expanded):
        expected, _ = reference(other, block, g := torch.randn(1, 92, 1, 1).expand(3, 92, 13, 14))
        near(differentiated(other, block, g), expected)
    expected, g = reference(x, block)
    near(
        differentiated(x.contiguous(memory_format=torch.channels_last), block, g.flip(2)),
        reference(x, block, g.flip(2))[0],
    )


@native
@pytest.mark.parametrize("case", [CASES[4], CASES[5], CASES[7]], ids=str)
def test_same_bits_for_any_number_of_threads(case: tuple[Any, ...]) -> None:
    x, block = make(case)
    g = torch.randn_like(operator(x, block)[0])
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(differentiated(x, block, g))
    torch.set_num_threads(before)
    # Matrix products are PyTorch's: their gradients may differ. Those of weight3 and the result are ours.
    for other in found[1:]:
        assert all(torch.equal(other[i], found[0][i]) for i in (3,))


@native
@pytest.mark.parametrize(
    "shape", [(1, 40, 17, 33, 39), (5, 12, 130, 7, 4), (3, 3, 20, 1, 1), (2, 70, 92, 12, 13)], ids=str
)
def test_input_gradient_of_stride_2(shape: tuple[int, ...]) -> None:
    """Against PyTorch in float64: added to what a map holds, in channels of a larger one; always the same bits."""
    n, k, c, height, width = shape
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(n, k, (height + 1) // 2, (width + 1) // 2, generator=generator)
    d = d.contiguous(memory_format=torch.channels_last)
    weight, x = torch.randn(k, c, 3, 3, generator=generator), torch.randn(n, c, height, width, generator=generator)
    settings = [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
    expected, *_ = torch.ops.aten.convolution_backward(d.double(), x.double(), weight.double(), None, *settings)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        wide = torch.cat([torch.ones_like(x), x, torch.ones_like(x)], 1).contiguous(memory_format=torch.channels_last)
        cpu.CpuKernels().add_input_gradient(wide[:, c : 2 * c], d, weight, 2, 1)
        assert (wide[:, :c] == 1).all()
        assert (wide[:, 2 * c :] == 1).all()
        results.append(wide[:, c : 2 * c])
    assert error(results[0], expected + x.double()) < 3e-6
    assert all(torch.equal(results[0], other) for other in results[1:])


@native
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 40, 1, 1), (3, 17, 8, 6), (0, 4, 3, 3)], ids=str)
def test_pool(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for map in (x, x.contiguous(memory_format=torch.channels_last), x.expand(*shape).flip(3)):
        assert torch.allclose(cpu.CpuKernels().pool(map), training.pool(map), atol=1e-6)


@native
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7, 4), (1, 130, 33, 20, 15), (3, 1, 1, 17, 16), (2, 48, 64, 16, 16)], ids=str
)
def test_weight_gradient_of_1x1(shape: tuple[int, ...]) -> None:
    n, c, k, height, width = shape
    x, d = torch.randn(n, c, height, width), torch.randn(n, k, height, width)
    x, d = (t.contiguous(memory_format=torch.channels_last) for t in (x, d))
    expected = torch.einsum("nchw,nkhw->kc", x.double(), d.double())[:, :, None, None]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu.CpuKernels().weight_gradient(x, d, torch.empty(k, c, 1, 1), 1, 1))
    assert error(results[0], expected) < 2e-6
    assert all(torch.equal(results[0], other) for other in results[1:])


@native
def test_large_means_do_not_cancel() -> None:
    x, block = make((2, 16, 16, 12, 12, 1, 1, "silu"))
    _, statistics, *_ = operator(x + 1000, block)
    mean, variance = statistics[4:].double()
    exact = (x + 1000).double()
    assert error(variance, exact.var((0, 2, 3), correction=0)) < 1e-4
    assert error(mean, exact.mean((0, 2, 3))) < 1e-7


BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@native
@pytest.mark.parametrize("mixed", [False, True], ids=["all 16-bit", "float32 parameters"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bit(case: tuple[Any, ...], dtype: torch.dtype, mixed: bool) -> None:
    x, block = make(case)
    x = x.to(dtype)
    if not mixed:
        block = training.Block(*(t.to(dtype) if isinstance(t, Tensor) else t for t in block))
    expected, g = reference(x, block)
    found = differentiated(x, block, g)
    scale = max(e.norm().item() for e in expected[2:])
    for f, e, t in zip(found, expected, [x, torch.empty(0), *leaves(x, block)], strict=True):
        assert f.dtype == t.dtype
        # Where rounding changes the sign of a small value, the slope of ReLU changes by 1: a share of all values that
        # is in proportion to the rounding, so that norms change with its root.
        bound = BOUNDS[dtype]
        if block.activation == "relu" and f is not found[0]:
            bound = 2 * bound**0.5
        assert error(f, e) <= bound or (f.double() - e).norm() <= bound * 1e-2 * scale
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@native
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Closer to float64 than the modules, whose BatchNorms and sums see what was rounded."""
    torch.manual_seed(0)
    model, x = ParNet(SMALL), torch.randn(4, 3, 64, 64)
    exact, _ = trained(copy.deepcopy(model).double(), x.double(), "reference")
    with torch.autocast("cpu", dtype):
        found, _ = trained(copy.deepcopy(model), x, "cpu")
        others, _ = trained(copy.deepcopy(model), x, "reference")
        assert model.block("inits.0.0").why_not_fused(x) is None
    off = [
        sum((f.double() - e).square().sum() for f, e in zip(of, exact, strict=True))
        / sum(e.square().sum() for e in exact)
        for of in (found, others)
    ]
    assert off[0] <= 1.5 * off[1]
    assert [f.dtype for f in found] == [o.dtype for o in others]


def test_what_is_saved() -> None:
    x, block = make((2, 16, 16, 12, 12, 1, 1, "silu"))
    saved: list[Tensor] = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operator(x, block)
    maps = [t for t in saved if t.numel() >= x.numel()]
    assert len(maps) == 3
    assert maps[0] is x
    assert sum(t.numel() for t in saved if t.dim() < 4) <= 16 * (16 + 20)
    for channels, expected in ((16, [2, 0]), (70, [2, 2])):
        x, block = make((2, channels, 24, 12, 12, 2, 1, "silu"))
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            operator(x.requires_grad_(), block)
        assert [t.shape[0] for t in saved if t.shape[1:] == (24, 6, 6)] == expected  # images of Y3, of Y1


def test_double_backward() -> None:
    for case in (CASES[0], CASES[7], CASES[8]):
        x, block = make(case, torch.float64)
        inputs = [t.requires_grad_() for t in leaves(x, block)]
        g = torch.randn_like(operator(x, block)[0], requires_grad=True)
        found = []
        for y in (operator(x, block)[0], training.plain(x, block)[0]):
            first = torch.autograd.grad(y, inputs, g, create_graph=True)
            found.append(torch.autograd.grad(sum(d.square().sum() for d in first), [*inputs, g]))
        for f, e in zip(*found, strict=True):
            assert (f - e).norm() <= 1e-11 * (1 + e.norm())


def test_errors_name_the_argument() -> None:
    x, block = make(CASES[0])
    for name, value, what in (
        ("weight3", torch.ones(3, 3, 1, 1), "weight3"),
        ("weight1", torch.ones(3, 2, 1, 1), "weight1"),
        ("gamma1", torch.ones(4), "gamma1"),
        ("beta0", torch.ones(3, dtype=torch.float64), "beta0"),
        ("gate_weight", torch.ones(3, 4), "gate_weight"),
        ("eps", [1e-5], "eps"),
        ("activation", "gelu", "activation"),
    ):
        with pytest.raises(ValueError, match=what):
            operator(x, block._replace(**{name: value}))
    with pytest.raises(ValueError, match="more than one value"):
        operator(x[:1, :, :1, :1], block)
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        operator(x, block)


# ------------------------------------------------------------------ the model

SMALL = ParNetConfig((12, 24, 40, 64), (2, 3, 3), num_classes=7)


def trained(model: nn.Module, x: Tensor, backend: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits and all gradients, and the buffers."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with use_backend(backend):
        y = model(x)
        y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], dict(model.named_buffers())  # type: ignore[list-item]


@native
def test_a_model_step() -> None:
    torch.manual_seed(0)
    model = ParNet(SMALL)
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    keys = [*model.state_dict()]
    x = torch.randn(4, 3, 64, 64)
    found, buffers = trained(model, x, "cpu")
    expected, exact = trained(wide, x.double(), "reference")
    others, _ = trained(plain, x, "reference")
    for f, e, o in zip(found, expected, others, strict=True):
        assert error(f, e) < max(3e-5, 8 * error(o, e))  # of a whole network
    for name, buffer in buffers.items():
        assert buffer.shape == exact[name].shape
        assert torch.allclose(buffer.double(), exact[name].double(), rtol=1e-5, atol=1e-6), name
    assert [*model.state_dict()] == keys


@native
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None) -> None:
    torch.manual_seed(0)
    block = Block(8, 8, 1, 1, "silu")
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    block.rbr_dense.bn.track_running_stats = block.rbr_dense.bn.running_mean = block.rbr_dense.bn.running_var = None  # type: ignore[assignment]
    other = copy.deepcopy(block)
    for x in torch.randn(3, 2, 8, 5, 5):
        assert block.why_not_fused(x) is None
        block(x)
        with use_backend("reference"):
            other(x)
    for (name, found), expected in zip(block.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6), name


@native
def test_what_is_not_fused() -> None:
    x = torch.randn(2, 8, 5, 5)

    def reason(change: Any, x: Tensor = x) -> str | None:
        block = Block(8, 8, 1, 1, "silu")
        change(block)
        found = block.why_not_fused(x)
        block(x)  # works either way
        return found

    assert reason(lambda b: None) is None
    assert "eval" in str(reason(lambda b: b.eval()))
    assert "eval" in str(reason(lambda b: b.rbr_1x1.bn.eval()))  # frozen
    assert "hooks" in str(reason(lambda b: b.rbr_dense.conv.register_forward_hook(lambda *a: None)))
    assert "hooks" in str(reason(lambda b: b.se.register_full_backward_hook(lambda *a: None)))
    assert "SyncBatchNorm" in str(nn.SyncBatchNorm.convert_sync_batchnorm(Block(8, 8, 1, 1, "silu")).why_not_fused(x))
    assert "patched" in str(reason(lambda b: setattr(b.rbr_dense, "bn", nn.Identity())))
    assert "settings" in str(reason(lambda b: setattr(b.rbr_dense.conv, "padding_mode", "reflect")))
    assert "Parametrized" in str(reason(lambda b: nn.utils.parametrizations.spectral_norm(b.rbr_dense.conv)))
    assert "float64" in str(reason(lambda b: b.double(), x.double()))
    assert "groups" in str(Block(8, 8, 1, 2, "silu").why_not_fused(x))
    block = Block(8, 8, 1, 1, "silu")
    with torch.autocast("cpu"):
        assert block.why_not_fused(x) is None
        assert "a parameter is not" in str(reason(lambda b: b.bfloat16(), x.bfloat16()))
    with use_backend("reference"):
        assert "reference" in str(block.why_not_fused(x))
    with pytest.raises(ValueError, match="more than 1 value"):
        block(x[:1, :, :1, :1])
    reasons: list[str | None] = []
    torch.func.jvp(lambda x: reasons.append(block.why_not_fused(x)) or x, (x,), (x,))
    torch.func.grad(lambda x: reasons.append(block.why_not_fused(x)) or x.sum())(x)
    assert len(reasons) == 2
    assert all(reasons)


@native
def test_frozen_weights_and_images_that_need_no_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 9)
    for which in itertools.product((False, True), repeat=3):
        block = Block(6, 8, 2, 1, "relu")
        for p, needed in zip((block.rbr_dense.conv.weight, block.se.cvsig.conv.weight), which[1:], strict=True):
            p.requires_grad_(needed)
        other = copy.deepcopy(block)
        a, b = (x.clone().requires_grad_(which[0]) for _ in range(2))
        block(a).square().sum().backward()
        with use_backend("reference"):
            other(b).square().sum().backward()
        for p, q in zip((a, *block.parameters()), (b, *other.parameters()), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or error(p.grad, q.grad) < 1e-5


@native
def test_checkpointing_and_repeated_backward() -> None:
    torch.manual_seed(0)
    block, x = Block(8, 8, 1, 1, "silu"), torch.randn(2, 8, 5, 5, requires_grad=True)
    y = block(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0])
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)[0]
    assert torch.equal(first, again)
    penalty = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)[0].square().sum()
    with use_backend("reference"):
        other = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)[0].square().sum()
    for f, e in zip(*(torch.autograd.grad(p, [x, *block.parameters()]) for p in (penalty, other)), strict=True):
        assert error(f, e) < 1e-4


@native
def test_compiled_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(3, 8, 2, 1, "silu"), Block(8, 8, 1, 1, "silu"), Block(8, 4, 1, 2, "relu"))
    other, x = copy.deepcopy(model), torch.randn(2, 3, 9, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x).square().sum().backward()
        other(x).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert error(p.grad, q.grad) < 1e-6
    for p, q in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.allclose(p, q)


@native
def test_tools() -> None:
    block, x = Block(8, 8, 1, 1, "silu"), torch.randn(2, 8, 5, 5, requires_grad=True)
    counts = []
    for backend in ("cpu", "reference"):
        with FlopCounterMode(display=False) as counter, use_backend(backend):
            block(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(counts[1], rel=0.01)
    torch.fx.symbolic_trace(block)(x)
