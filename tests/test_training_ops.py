"""The operators of the training form against the plain form in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import error
from torch import Tensor

from parnet_kernels import training
from parnet_kernels.cpu import training as cpu
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
