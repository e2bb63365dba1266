"""The backend through PyTorch: dispatch, autograd, compile, export, layouts, errors."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import OPERATORS, arguments
from test_transforms import WAYS, Case
from torch import Tensor

from parnet_kernels import ops, reference
from parnet_kernels.triton import backend, float32_precision, policy, tuning

each_operator = pytest.mark.parametrize("op", OPERATORS)


@pytest.fixture(autouse=True)
def _exact() -> Any:
    with float32_precision("ieee"), ops.use_backend("triton"):
        yield


def call(op: str, where: torch.device, **changes: Any) -> tuple[list[Tensor | None], dict[str, Any]]:
    positional, options = arguments(op, 2, 6, 8, (5, 6), **changes)
    positional = [t if t is None else t.to(where) for t in positional]
    return positional, {key: v.to(where) if isinstance(v, Tensor) else v for key, v in options.items()}


def gradients(function: Any, positional: list[Any], options: dict[str, Any]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in positional]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", [OPERATORS[0], *(pytest.param(op, marks=pytest.mark.slow) for op in OPERATORS[1:])])
@pytest.mark.usefixtures("inductor")
def test_compiled_forward_and_backward_call_the_backend(op: str, where: torch.device) -> None:
    positional, options = call(op, where)
    expected = gradients(getattr(reference, op), positional, options)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, dynamic=True)
    same(gradients(compiled, positional, options), expected)
    layer = backend._layer
    with mock.patch.object(backend, "_layer", side_effect=layer) as counted:
        same(gradients(compiled, positional, options), expected)
    assert counted.call_count == 2, "one forward and one backward on this backend"


@each_operator
def test_exported(op: str, where: torch.device) -> None:
    positional, options = call(op, where)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return getattr(ops, op)(*tensors, **options)

    program = torch.export.export(Module(), tuple(positional))
    same([program.module()(*positional)], [getattr(reference, op)(*positional, **options)])


@pytest.mark.usefixtures("inductor")
def test_packaged_by_aot_inductor(where: torch.device, tmp_path: Any) -> None:
    """The package calls this backend through the dispatcher."""
    positional, options = call("fusion_se", where)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return ops.fusion_se(*tensors, **options) + 1

    program = torch.export.export(Module(), tuple(positional))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    with mock.patch.object(backend, "_layer", side_effect=backend._layer) as counted:
        y = loaded(*positional)
    assert counted.call_count == 1
    same([y], [reference.fusion_se(*positional, **options) + 1])


@each_operator
def test_the_backward_operator_matches_its_fake(op: str, where: torch.device) -> None:
    positional, options = call(op, where)
    for layout in (torch.contiguous_format, torch.channels_last):
        moved = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in positional]
        y = getattr(ops, op)(*moved, **options)
        every = [*moved, options["out_scale"], options["out_shift"]]
        need = [True, False] + [True] * len(positional)
        torch.library.opcheck(
            torch.ops.parnet.triton_backward.default,
            (op, y, every, options.get("stride", 1), options["activation"], need),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("op", "way"),
    [
        pytest.param(op, way, marks=[pytest.mark.slow] * ((i + j) % len(OPERATORS) > 0))  # one operator each way
        for i, way in enumerate(["grad", "vmap of maps", "vmap of grad", "jvp", "is_grads_batched"])
        for j, op in enumerate(OPERATORS)
    ],
)
def test_transforms(op: str, way: str, where: torch.device) -> None:
    with mock.patch.object(backend, "_layer", side_effect=backend._layer) as counted:
        Case(op, torch.float32, where).check(WAYS[way], 1e-4)
    assert counted.call_count == (way != "jvp"), "one forward on this backend, unless decomposed"


@each_operator
def test_flops_are_those_of_the_formulas(op: str, where: torch.device) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    positional, options = call(op, where)
    found = []
    for name in ("triton", "reference"):
        with FlopCounterMode(display=False) as counter, ops.use_backend(name):
            gradients(getattr(ops, op), positional, options)
        found.append(counter.get_total_flops())
    n, k, h, w = getattr(ops, op)(*positional, **options).shape
    # PyTorch counts the weight gradient of two groups as if each group had all channels.
    twice = 2 * n * h * w * k * 6 * 9 if op == "fusion_se" else 0
    assert found[0] == found[1] - twice > 0


@each_operator
def test_second_derivative_falls_back(op: str, where: torch.device) -> None:
    positional, options = call(op, where)

    def second(function: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in positional]
        first = torch.autograd.grad(function(*leaves, **options).square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(d.square().sum() for d in first), leaves))

    for a, b in zip(second(getattr(ops, op)), second(getattr(reference, op)), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@each_operator
def test_only_what_is_needed(op: str, where: torch.device) -> None:
    positional, options = call(op, where, affine=False, gate_bias=False)
    weight = positional[2 if op == "fusion_se" else 1]
    assert weight is not None
    weight.requires_grad_()
    y = getattr(ops, op)(*positional, **options)
    (found,) = torch.autograd.grad(y.sum(), [weight])
    (expected,) = torch.autograd.grad(getattr(reference, op)(*positional, **options).sum(), [weight])
    same([found], [expected])


@each_operator
def test_any_strides(op: str, where: torch.device) -> None:
    """Slices of wider tensors, channels_last and not, and gradients that are expanded or of another layout."""
    positional, options = call(op, where)
    y = getattr(ops, op)(*positional, **options)
    x = positional[0]
    wider = torch.full((*x.shape[:3], 2 * x.shape[3]), float("nan"), device=where)
    wider[..., ::2] = x
    vectors = [
        torch.stack((t, t), 1)[:, 0] if t.dim() == 1 else t.transpose(0, 1).contiguous().transpose(0, 1)
        for t in positional[1:]
    ]
    same([getattr(ops, op)(wider[..., ::2], *vectors, **options)], [y])
    tall = x.contiguous(memory_format=torch.channels_last)
    found = getattr(ops, op)(tall, *positional[1:], **options)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous()
    same([found], [y])
    leaves = [t.detach().requires_grad_() for t in positional]
    y = getattr(ops, op)(*leaves, **options)
    plain = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    expanded = torch.ones(1, 1, 1, 1, device=where).expand_as(y)
    same(list(torch.autograd.grad(y, leaves, expanded)), list(plain))


@each_operator
def test_empty_batch(op: str, where: torch.device) -> None:
    positional, options = call(op, where)
    inputs = 2 if op == "fusion_se" else 1
    leaves = [t.detach()[: 0 if i < inputs else None].requires_grad_() for i, t in enumerate(positional)]
    y = getattr(ops, op)(*leaves, **options)
    assert y.shape[0] == 0
    assert all(not d.any() for d in torch.autograd.grad(y.sum(), leaves))


def test_not_a_number_is_not_swallowed(where: torch.device) -> None:
    positional, options = call("repvgg_sse", where, activation="relu")
    positional[0][0, 1, 2, 3] = float("nan")
    y = ops.repvgg_sse(*positional, **options)
    assert y[0].isnan().all()  # the gates of the image
    assert not y[1].isnan().any()


def test_autocast(where: torch.device) -> None:
    positional, options = call("downsample_se", where)
    with torch.autocast(where.type, torch.bfloat16):
        y = ops.downsample_se(*positional, **options)
    assert y.dtype == torch.bfloat16
    assert (y.float() - reference.downsample_se(*positional, **options)).norm() < 0.02 * y.float().norm()


def test_reasons(where: torch.device) -> None:
    x = torch.zeros(1, 4, 4, 4, device=where)
    assert ops.explain("repvgg_sse", x)["triton"] is None
    assert "float64" in str(ops.explain("repvgg_sse", x.double())["triton"])
    positional, options = call("downsample_se", where, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="computes float16, bfloat16 and float32"):
        ops.downsample_se(*positional, **options)
    with pytest.raises(ValueError, match="precision must be one of"), float32_precision("tf64"):
        pass


def test_warmup_and_autotune(where: torch.device, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest tile by the given measure is written and then used; an unreadable table is ignored, loudly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    policy.user_table.cache_clear()
    arch = policy.architecture(where)
    small, large = policy.Tile(16, 32, 16, 4, 2), policy.Tile(64, 64, 16, 4, 2)
    rules = (policy.Rule(10**9, 0, small), policy.Rule(0, 0, large))
    monkeypatch.setitem(policy.TABLES, arch, {(kind, mode): rules for kind in policy.KINDS for mode in policy.MODES})
    positional, options = call("downsample_se", where)
    tuning.warmup("downsample_se", positional, options, training=True)
    tried: list[policy.Tile] = []
    pick = policy.tile_for

    def noted(*arguments: Any) -> policy.Tile:
        tried.append(pick(*arguments))
        return tried[-1]

    def cost(work: Any) -> float:
        tried.clear()
        work()
        return sum(tile.bm for tile in tried)

    monkeypatch.setattr(policy, "tile_for", noted)
    path = tuning.autotune("downsample_se", positional, options, training=True, measure=cost)
    assert path.is_relative_to(tmp_path)
    tried.clear()
    tuning.warmup("downsample_se", positional, options, training=True)
    assert set(tried) == {small}
    path.write_text('{"conv": 3}')
    policy.user_table.cache_clear()
    with pytest.warns(UserWarning, match="ignoring the tile table"):
        tuning.warmup("downsample_se", positional, options)
    assert tried[-1] == large
    policy.user_table.cache_clear()


def test_nothing_is_tuned_during_a_capture(where: torch.device) -> None:
    positional, options = call("downsample_se", where)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        for what in (tuning.warmup, tuning.autotune):
            with pytest.raises(RuntimeError, match="before a CUDA graph capture"):
                what("downsample_se", positional, options)
