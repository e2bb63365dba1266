"""The training form on the Triton kernels, against the plain form in float64: results, statistics, every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import test_training_fusion as fusions
import test_training_ops as blocks
import torch
from oracle import error
from torch import Tensor
from training_error import TOLERANCE, near

from parnet_kernels import training, training_ops, training_sync
from parnet_kernels.config import ParNetConfig
from parnet_kernels.model import Block, ParNet
from parnet_kernels.ops import use_backend
from parnet_kernels.triton import convolution_table, convolutions, float32_precision, launch, policy

# n, c, k, height, width, stride, groups, activation; a skip where c = k, at stride 1 in one group
CASES = [
    (1, 12, 12, 7, 7, 1, 1, "silu"),
    (3, 92, 92, 9, 5, 1, 1, "relu"),
    (9, 130, 130, 1, 1, 1, 1, "silu"),
    (2, 20, 20, 14, 15, 1, 1, "silu"),  # parts of an image, the last one smaller
    (17, 3, 3, 2, 3, 1, 1, "silu"),  # more images than a tile of the gate has
    (3, 3, 64, 14, 14, 2, 1, "silu"),  # an image, whose channels the library adds up; Y1 is made again
    (1, 12, 92, 9, 5, 2, 1, "relu"),
    (3, 92, 36, 7, 7, 2, 1, "silu"),
    (1, 130, 12, 14, 14, 1, 1, "silu"),
    (3, 12, 92, 1, 1, 2, 1, "relu"),
    (2, 36, 48, 9, 9, 1, 2, "silu"),
]
FUSIONS = [
    # n, c of one input, k, height, width, stride, activation
    (1, 46, 12, 9, 5, 2, "silu"),
    (3, 65, 130, 7, 7, 1, "relu"),
    (9, 3, 64, 1, 1, 2, "silu"),
    (2, 12, 92, 14, 14, 2, "silu"),
]


@pytest.fixture(autouse=True)
def _on_triton() -> Any:
    # oneDNN's weight gradients in bfloat16 hold what memory held before (torch 2.13; 1 × 1 maps, two groups).
    with use_backend("triton"), torch.backends.mkldnn.flags(enabled=False):
        yield


def moved(block: training.Block, *where: Any) -> training.Block:
    return training.Block(*(t.to(*where) if isinstance(t, Tensor) else t for t in block))


def one_dtype_each(cases: list[Any]) -> list[Any]:
    """Every case with every dtype; all but one dtype of a case are slow."""
    return [
        pytest.param(case, dtype, marks=[pytest.mark.slow] * ((i + j) % len(TOLERANCE) > 0))
        for i, case in enumerate(cases)
        for j, dtype in enumerate(TOLERANCE)
    ]


@pytest.mark.parametrize(("case", "dtype"), one_dtype_each(CASES), ids=str)
def test_a_block(case: tuple[Any, ...], dtype: torch.dtype, where: torch.device) -> None:
    x, block = blocks.make(case)
    x, block = x.to(dtype), moved(block, dtype)
    expected, g = blocks.reference(x, block)
    found = blocks.differentiated(x.to(where), moved(block, where), g.to(where))
    near(found, expected, dtype, case[-1] == "relu")
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert [f.dtype for f in found[2:]] == [dtype] * (len(found) - 2)


@pytest.mark.parametrize(("case", "dtype"), one_dtype_each(FUSIONS), ids=str)
def test_a_fusion(case: tuple[Any, ...], dtype: torch.dtype, where: torch.device) -> None:
    tensors = fusions.make(case, dtype)
    g = fusions.gradient(case)
    expected = fusions.differentiated(fusions.plain, [t.double() for t in tensors], case, g)
    found = fusions.differentiated(fusions.operator, [t.to(where) for t in tensors], case, g.to(where))
    near(found, expected, dtype, case[-1] == "relu")


SKIP, STRIDED = CASES[1], CASES[6]


@pytest.mark.parametrize("case", [SKIP, STRIDED], ids=str)
def test_an_infinite_gradient_ends_at_relu(case: tuple[Any, ...], where: torch.device) -> None:
    x, block = blocks.make(case)
    expected, g = blocks.reference(x, block)
    at = tuple((expected[0] == 0).nonzero()[0])
    for value in (0.0, float("inf")):
        g[at] = value
        found = blocks.differentiated(x.to(where), moved(block, where), g.to(where))
        expected = expected if value else found
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("case", [SKIP, STRIDED], ids=str)
def test_any_strides(case: tuple[Any, ...], where: torch.device) -> None:
    x, block = blocks.make(case)
    n, c, k, h, w, stride, *_ = case
    size = n, k, (h - 1) // stride + 1, (w - 1) // stride + 1
    wide = torch.randn(n, 2 * c, 2 * h, 2 * w, generator=torch.Generator().manual_seed(2))
    last = wide.contiguous(memory_format=torch.channels_last)
    for view in (
        wide[:, ::2, 1 : h + 1, :w],
        last[:, c:, :h, :w],
        last[:, c:, ::2, ::2],
        wide[:1, :c, :h, :1].expand(x.shape),
    ):
        g = torch.randn(n, k, 1, 1, generator=torch.Generator().manual_seed(3)).expand(size)
        expected, _ = blocks.reference(view, block, g)
        near(blocks.differentiated(view.to(where), moved(block, where), g.to(where)), expected, torch.float32, True)


@pytest.mark.parametrize("case", [SKIP, STRIDED, CASES[7]], ids=str)
@pytest.mark.parametrize("which", [convolutions.OWN, convolutions.LIBRARY])
def test_either_convolution(case: tuple[Any, ...], which: str, where: torch.device) -> None:
    x, block = blocks.make(case)
    expected, g = blocks.reference(x, block)
    with convolutions.forced(which), float32_precision("ieee"):
        assert convolutions.choose("forward", x, block.weight3, case[5], 1).which == which
        assert convolutions.choose("forward", x, block.weight1, 1, 1).which == convolutions.LIBRARY
        found = blocks.differentiated(x.to(where), moved(block, where), g.to(where))
    near(found, expected, torch.float32)


@pytest.mark.parametrize("own", [convolutions.OF_INPUT, convolutions.OF_WEIGHT])
def test_a_measured_table_goes_before_arithmetic(
    own: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, where: torch.device
) -> None:
    """One gradient ours, the other the library's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    convolution_table.measured.cache_clear()
    x, block = blocks.make(CASES[7])
    keys = [convolutions.key(role, x, block.weight3, 2) for role in convolutions.ROLES]
    entries = {key: {"which": "own" if key.startswith(own) else "library"} for key in keys}
    assert convolution_table.write(policy.model(where), entries).is_relative_to(tmp_path)
    launched: list[str] = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (launched.append(kernel.__name__), run(kernel, *rest)))
    expected, g = blocks.reference(x, block)
    with float32_precision("ieee"):
        found = blocks.differentiated(x.to(where), moved(block, where), g.to(where))
    near(found, expected, torch.float32)
    # `conv_se_fwd_kernel` makes the input's, which is a convolution too
    assert ("conv_se_fwd_kernel" in launched) == (own == convolutions.OF_INPUT)
    assert ("weight_se_bwd_kernel" in launched) == (own == convolutions.OF_WEIGHT)
    convolution_table.measured.cache_clear()


@pytest.mark.parametrize(("role", "dtype"), [*zip(convolutions.ROLES, ("fp16", "fp32", "bf16"), strict=True)])
def test_measuring_convolutions(
    role: str, dtype: str, where: torch.device, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's own way, kernels and clock as they are; ours are right in each role."""
    pytest.importorskip("typer")
    from fake_device import HostDevice

    from bench.gpu import convolutions as bench
    from bench.gpu.timing import CudaDevice

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bench, "SAMPLES", 1)
    launched: list[str] = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (launched.append(kernel.__name__), run(kernel, *rest)))
    device = CudaDevice() if where.type == "cuda" else HostDevice()
    row = bench.time_one(bench.Shape((2, 12, 7, 6), 20, 2), role, dtype, device, 1)
    assert not row.reason, row.reason
    assert row.difference <= bench.PEER_TOLERANCE[dtype][0]
    assert min(row.milliseconds.values()) > 0
    assert ("weight_se_bwd_kernel" if role == convolutions.OF_WEIGHT else "conv_se_fwd_kernel") in launched


@pytest.mark.parametrize("case", [SKIP, STRIDED], ids=str)
def test_statistics_of_a_group(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, where: torch.device) -> None:
    """Of two ranks that hold the same images: results are those of one."""
    monkeypatch.setattr(training_sync, "_gather", lambda values, group: torch.stack([values, values]))
    x, block = blocks.make(case)
    expected, g = blocks.reference(x, block)
    given = [x, *(t for t in block[:9] if t is not None)]
    leaves = [t.to(where).requires_grad_() for t in given]
    options = {"eps": block.eps, "activation": block.activation, "group": "two"}
    if block.gamma0 is None:
        y, statistics, *_, values = torch.ops.parnet.downsample_se_train(*leaves, stride=block.stride, **options)
    else:
        y, statistics, *_, values = torch.ops.parnet.repvgg_sse_train(*leaves, **options)
    assert values == 2 * y.numel() // y.shape[1]
    found = torch.autograd.grad(y, leaves, g.to(where, y.dtype))
    near([y.detach(), statistics, *found], expected, torch.float32)


def test_large_means_do_not_cancel(where: torch.device) -> None:
    x, block = blocks.make((2, 16, 16, 12, 12, 1, 1, "silu"))
    found = blocks.operator((x + 1000).to(where), moved(block, where))[1][4:].double().cpu()
    exact = (x + 1000).double()
    assert error(found[1], exact.var((0, 2, 3), correction=0)) < 1e-4
    assert error(found[0], exact.mean((0, 2, 3))) < 1e-7


@pytest.mark.usefixtures("inductor")
def test_a_compiled_step_of_the_model(where: torch.device) -> None:
    torch.manual_seed(0)
    model = ParNet(ParNetConfig((6, 8, 12, 16), (2, 2, 2), num_classes=3)).to(where)
    exact = copy.deepcopy(model).double()
    x = torch.randn(3, 3, 32, 32, device=where)
    assert model.block("streams.0.0").why_not_fused(torch.randn(3, 6, 8, 8, device=where)) is None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.square().sum().backward()
    with use_backend("reference"):
        exact(x.double()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert error(p.grad.cpu(), q.grad.cpu()) < 2e-4, name  # of a whole network
    for (name, p), q in zip(model.named_buffers(), exact.buffers(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=1e-5, atol=1e-6), name


def test_autocast_and_why_not(where: torch.device) -> None:
    torch.manual_seed(0)
    block, x = Block(8, 8, 1, 1, "silu").to(where), torch.randn(2, 8, 5, 5, device=where)
    exact = copy.deepcopy(block).double()
    with torch.autocast(where.type, torch.bfloat16):
        assert block.why_not_fused(x) is None
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    with use_backend("reference"):
        exact(x.double()).sum().backward()
    assert block.rbr_dense.conv.weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert error(block.rbr_dense.conv.weight.grad.cpu(), exact.rbr_dense.conv.weight.grad.cpu()) < 0.1  # type: ignore[union-attr]
    assert "float64" in str(training_ops.reasons(x.double())["triton"])
    assert "float64" in str(exact.why_not_fused(x.double()))
