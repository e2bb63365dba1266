"""SyncBatchNorm2d on CPUs: two gloo ranks train as one process with the doubled batch does."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parnet_kernels import training_sync
from parnet_kernels.config import ParNetConfig
from parnet_kernels.cpu import training as cpu
from parnet_kernels.model import Block, ParNet, parnet_cifar
from parnet_kernels.ops import use_backend

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
]
NATIVE = cpu.why_not(torch.empty(0)) is None
NETS = {"cifar": (16, 3), "s": (32, 3)}  # side of the images, steps
BACKENDS = ("cpu", "reference") if NATIVE else ("reference",)
UNEVEN = [*((backend, torch.float32) for backend in BACKENDS), ("reference", torch.float64)]


def make(net: str) -> nn.Module:
    torch.manual_seed(0)
    small = ParNetConfig((12, 16, 16, 20), (2, 2, 2), num_classes=5)
    return parnet_cifar(width=8) if net == "cifar" else ParNet(small)


def images(net: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, NETS[net][0], NETS[net][0], generator=generator)
    return x, torch.randint(0, 5, (8,), generator=generator)


def train(model: nn.Module, net: str, part: slice) -> tuple[list[float], list[Tensor]]:
    """Losses; gradients of the first step, then parameters and buffers after the last one."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses, kept = [], []
    for step in range(NETS[net][1]):
        x, target = images(net, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[part]), target[part])
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            kept = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        optimizer.step()
    return losses, [*kept, *(p.detach() for p in model.parameters()), *(b for b in model.buffers() if b.dim())]


def uneven(block: nn.Module, part: slice, dtype: torch.dtype) -> list[Tensor]:
    """Of a block on a part of five images: the result, first and second gradients of the sum over all parts."""
    x = torch.randn(5, 6, 7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x[part].to(dtype).requires_grad_()
    y = block(x)
    inputs = [x, *block.parameters()]
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), inputs, allow_unused=True)
    return [y.detach(), *(d.detach() for d in first), *(d for d in second if d is not None)]


def rank_main(rank: int, store: str, to: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    convert = training_sync.convert
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        with use_backend(backend):
            for net in NETS:
                model = convert(make(net))
                fused = [m.why_not_fused(torch.randn(2, 8, 4, 4)) for m in model.modules() if isinstance(m, Block)]
                found[f"reasons {net} {backend}"] = fused
                wrapped = nn.parallel.DistributedDataParallel(model)
                found[f"{net} {backend}"] = train(wrapped, net, slice(4 * rank, 4 * rank + 4))
    for backend, dtype in UNEVEN:
        with use_backend(backend):
            torch.manual_seed(0)
            block = convert(Block(6, 6, 1, 1, "silu")).to(dtype)
            found[f"uneven {backend} {dtype}"] = uneven(block, slice(3 * rank, 3 + 2 * rank), dtype)
    block = convert(Block(6, 6, 1, 1, "silu"))
    block.rbr_identity = nn.BatchNorm2d(6)
    found["mixed"] = block.why_not_fused(torch.randn(2, 6, 4, 4))
    one = convert(Block(6, 6, 1, 1, "silu"))(torch.randn(1, 6, 1, 1))  # two values in all
    found["one value"] = bool(one.isfinite().all())
    alone = dist.new_group([rank], use_local_synchronization=True)
    block = convert(Block(6, 6, 1, 1, "silu"), alone.group_name)
    found["alone"] = training_sync.group_of(block.rbr_identity)
    torch.save(found, to)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    where = tmp_path_factory.mktemp("ranks")
    files = [where / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(where / "store"), str(file)], stderr=subprocess.PIPE)
        for rank, file in enumerate(files)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in processes:
            process.kill()
    return [torch.load(file) for file in files]


def off(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / (expected.double().norm() + 1e-3)).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("net", NETS)
def test_two_ranks_train_as_one_with_the_doubled_batch(net: str, backend: str, found: list[dict[str, Any]]) -> None:
    with use_backend("reference"):
        losses, tensors = train(make(net), net, slice(0, 8))
    (mine, of_first), (others, of_second) = (of_rank[f"{net} {backend}"] for of_rank in found)
    for one, a, b in zip(losses, mine, others, strict=True):
        assert one == pytest.approx((a + b) / 2, rel=2e-4)
    for i, (one, a, b) in enumerate(zip(tensors, of_first, of_second, strict=True)):
        assert torch.equal(a, b)  # the ranks agree to the bit
        assert off(a, one) < 2e-3, i
    if backend == "cpu":
        for reason in found[0][f"reasons {net} cpu"]:
            assert reason is None or "channels" in reason or "groups" in reason


@pytest.mark.parametrize(("backend", "dtype"), UNEVEN, ids=str)
def test_ranks_of_different_sizes(backend: str, dtype: torch.dtype, found: list[dict[str, Any]]) -> None:
    """Also second gradients; those of parameters are parts, which DDP adds."""
    key = f"uneven {backend} {dtype}"
    torch.manual_seed(0)
    block = Block(6, 6, 1, 1, "silu").double()
    expected = uneven(block, slice(0, 5), torch.float64)
    parts = [of_rank[key] for of_rank in found]
    for i, (e, a, b) in enumerate(zip(expected, *parts, strict=True)):
        whole = torch.cat([a, b]) if a.shape[:1] != b.shape[:1] else a + b
        assert off(whole, e) < (1e-11 if dtype == torch.float64 else 1e-5), i


def test_which_processes(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert "different processes" in of_rank["mixed"] if NATIVE else of_rank["mixed"]
        assert of_rank["one value"]
        assert of_rank["alone"] == ""


def test_without_a_process_group_it_is_batch_norm() -> None:
    model = make("s")
    other = training_sync.convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    assert [*other.state_dict()] == [*model.state_dict()]
    found, expected = (m.deploy()(images("s", 0)[0]) for m in (copy.deepcopy(other), model))  # type: ignore[operator]
    assert torch.equal(found, expected)
    results = [train(m, "s", slice(0, 8)) for m in (model, other)]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    rank_main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
