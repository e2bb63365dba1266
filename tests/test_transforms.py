"""The public operators and the deployed network under torch.func and the other transforms of PyTorch: each gives what
it gives for the reference in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPERATORS, arguments
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.utils._pytree import tree_flatten, tree_map

from parnet_kernels import ParNet, ParNetConfig, _native, ops, reference

CONFIG = ParNetConfig((8, 12, 16, 24), (2, 2, 2), num_classes=5)
BACKENDS = {"reference": (torch.float64, 1e-12), "cpu": (torch.float32, 2e-5)}

Operator = Callable[..., Tensor]  # of all tensors of the signature


class Case:
    """Tensors of one call, others like them, and the two operators as functions of the tensors alone."""

    def __init__(self, op: str, dtype: torch.dtype, where: torch.device | None = None, **changes: Any) -> None:
        positional, options = arguments(op, 2, 3, 4, (5, 4), dtype=torch.float64, **changes)
        affine = {name: options.pop(name) for name in ("out_scale", "out_shift")}
        self.tensors = [*positional, *affine.values()]
        self.maps = 2 if op == "fusion_se" else 1
        self.every = tuple(range(len(self.tensors)))
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randn(3, *t.shape, generator=generator, dtype=torch.float64) for t in self.tensors]

        def flat(operator: Any) -> Operator:
            def call(*tensors: Tensor) -> Tensor:
                *given, out_scale, out_shift = tensors
                return operator(*given, out_scale=out_scale, out_shift=out_shift, **options)

            return call

        self.exact, self.ours = flat(getattr(reference, op)), flat(getattr(torch.ops.parnet, op))
        self.dtype, self.where = dtype, where

    def check(self, way: Callable[[Operator, Case], Any], limit: float) -> None:
        expected = tree_flatten(way(self.exact, self))[0]
        narrow = copy.copy(self)
        narrow.tensors, narrow.batches = tree_map(lambda t: t.to(self.where, self.dtype), (self.tensors, self.batches))
        found = tree_flatten(way(self.ours, narrow))[0]
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            assert a.dtype == self.dtype
            assert (a.cpu().double() - b).abs().max() <= limit * b.abs().max()


def loss(f: Operator) -> Operator:
    return lambda *t: f(*t).sin().sum()


def maps_alone(f: Operator, c: Case) -> Operator:
    """f of its maps, the parameters given."""
    return lambda *maps: f(*maps, *c.tensors[c.maps :])


def dual(f: Operator, c: Case) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, b[0]) for t, b in zip(c.tensors, c.batches, strict=True)]
        return tuple(forward_ad.unpack_dual(f(*duals)))


def batched_gradients(f: Operator, c: Case) -> Any:
    leaves = [t.clone().requires_grad_() for t in c.tensors]
    y = f(*leaves)
    return torch.autograd.grad(y, leaves, torch.stack([y.detach(), torch.ones_like(y)]), is_grads_batched=True)


def gradients_of_gradients(f: Operator, c: Case) -> Any:
    def first(*t: Tensor) -> Tensor:
        return sum(d.cos().sum() for d in func.grad(loss(f), argnums=c.every)(*t))  # type: ignore[return-value]

    return func.grad(first, argnums=c.every)(*c.tensors)


WAYS: dict[str, Callable[[Operator, Case], Any]] = {
    "grad": lambda f, c: func.grad(loss(f), argnums=c.every)(*c.tensors),
    "vjp": lambda f, c: func.vjp(f, *c.tensors)[1](f(*c.tensors)),
    "jacrev": lambda f, c: func.jacrev(f, argnums=c.every)(*c.tensors),
    "jvp": lambda f, c: func.jvp(f, tuple(c.tensors), tuple(b[0] for b in c.batches)),
    "jacfwd": lambda f, c: func.jacfwd(f, argnums=(0, c.maps))(*c.tensors),
    "dual numbers": dual,
    "vmap of maps": lambda f, c: func.vmap(maps_alone(f, c))(*c.batches[: c.maps]),
    "vmap of one map": lambda f, c: func.vmap(f, in_dims=(2, *[None] * (len(c.tensors) - 1)), out_dims=1)(
        c.batches[0].movedim(0, 2), *c.tensors[1:]
    ),
    "vmap of everything": lambda f, c: func.vmap(f)(*c.batches),
    "vmap of bias": lambda f, c: func.vmap(lambda b: f(*c.tensors[: c.maps + 1], b, *c.tensors[c.maps + 2 :]))(
        c.batches[c.maps + 1]
    ),
    "vmap of nothing": lambda f, c: func.vmap(lambda t: f(*c.tensors) + t)(c.batches[0][:, 0, 0, 0, 0]),
    "vmap of vmap": lambda f, c: func.vmap(func.vmap(maps_alone(f, c)))(*(b[None] for b in c.batches[: c.maps])),
    "vmap of grad": lambda f, c: func.vmap(lambda *m: func.grad(loss(f), argnums=c.every)(*m, *c.tensors[c.maps :]))(
        *c.batches[: c.maps]
    ),
    "vmap of grad of everything": lambda f, c: func.vmap(func.grad(loss(f), argnums=c.every))(*c.batches),
    "grad of vmap": lambda f, c: func.grad(lambda *m: func.vmap(loss(maps_alone(f, c)))(*m).sum())(
        *c.batches[: c.maps]
    ),
    "grad of grad": gradients_of_gradients,
    "hessian": lambda f, c: func.hessian(loss(f), argnums=(0, c.maps + 1))(*c.tensors),
    "jacrev of jacrev": lambda f, c: func.jacrev(func.jacrev(loss(f), argnums=c.maps + 1))(*c.tensors),
    "jvp of jvp": lambda f, c: func.jvp(
        lambda *t: func.jvp(f, t, tuple(b[0] for b in c.batches))[1], tuple(c.tensors), tuple(b[1] for b in c.batches)
    ),
    "is_grads_batched": batched_gradients,
    "vectorized jacobian": lambda f, c: jacobian(f, tuple(c.tensors), vectorize=True),
    "vectorized forward jacobian": lambda f, c: jacobian(f, tuple(c.tensors), vectorize=True, strategy="forward-mode"),
    "vectorized hessian": lambda f, c: hessian(loss(maps_alone(f, c)), tuple(c.tensors[: c.maps]), vectorize=True),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPERATORS)
def test_operators(op: str, way: str, backend: str) -> None:
    dtype, limit = BACKENDS[backend]
    if backend == "cpu" and _native.cpu_error:
        pytest.skip(_native.cpu_error)
    with ops.use_backend(backend):
        Case(op, dtype).check(WAYS[way], limit)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("way", ["vmap of maps", "vmap of everything", "vmap of grad", "jvp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes(op: str, way: str, dtype: torch.dtype) -> None:
    Case(op, dtype, stride=1, activation="relu").check(WAYS[way], 0.05)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_batch_of_batches_is_one_call_of_the_kernel(op: str) -> None:
    """With the bits, and the layout, of single calls."""
    case = Case(op, torch.float32)
    maps = [b.float() for b in case.batches[: case.maps]]
    case.tensors = [t.float() for t in case.tensors]
    f = maps_alone(case.ours, case)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = [m.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, m.shape[:2]) for m in maps]
        found = func.vmap(f)(*given)
        expected = torch.stack([f(*(m[i] for m in given)) for i in range(3)])
        assert torch.equal(found, expected)
        assert found[0].is_contiguous(memory_format=layout)


def test_empty_batches() -> None:
    case = Case("repvgg_sse", torch.float64)
    x, rest = case.tensors[0], case.tensors[1:]
    assert func.vmap(lambda x: case.ours(x, *rest))(x.new_empty(3, 0, *x.shape[1:])).shape == (3, 0, *x.shape[1:])


def test_errors_are_those_of_a_call() -> None:
    case = Case("repvgg_sse", torch.float64)
    wrong = [*case.tensors]
    wrong[2] = wrong[2][:-1]
    case.tensors, case.batches = wrong, [torch.stack([t, t]) for t in wrong]
    for way in (WAYS["grad"], WAYS["jvp"], WAYS["vmap of maps"], WAYS["vmap of everything"]):
        with pytest.raises(ValueError, match="`bias` must have shape"):
            way(case.ours, case)


def deployed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ParNet(CONFIG).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    return model.eval().deploy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_ensemble_of_networks(dtype: torch.dtype) -> None:
    networks = [deployed(seed).to(dtype) for seed in range(3)]
    parameters, buffers = func.stack_module_state(networks)
    x = torch.randn(3, 2, 3, 33, 40, dtype=dtype)

    def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return func.functional_call(networks[0], (parameters, buffers), (x,))

    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for images, dims in ((x, 0), (x[0], None)):
        found = func.vmap(call, in_dims=(0, 0, dims))(parameters, buffers, images)
        expected = torch.stack([n(images if dims is None else images[i]) for i, n in enumerate(networks)])
        assert (found - expected).abs().max() <= limit * expected.abs().max()


def test_gradients_of_each_image_of_a_network() -> None:
    network, x = deployed(0).double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def score(image: Tensor) -> Tensor:
        return network(image[None]).sin().sum()

    found = func.vmap(func.grad(score))(x)
    expected = [torch.autograd.grad(score(image), image)[0] for image in x.requires_grad_().unbind()]
    assert torch.allclose(found, torch.stack(expected))
    assert func.jacrev(network)(x[:1]).shape == (1, 5, 1, 3, 32, 32)
    found = func.vmap(network)(x[:, None].detach())
    assert torch.allclose(found[:, 0], network(x.detach()))


def test_compiled_transforms() -> None:
    case = Case("repvgg_sse", torch.float64)
    x, rest = case.batches[0], case.tensors[1:]
    per_image = func.vmap(func.grad(lambda x: loss(case.ours)(x, *rest)))
    compiled = torch.compile(per_image, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), per_image(x))
