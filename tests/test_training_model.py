"""The model's use of the operators of the training form."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from oracle import error
from test_training_ops import BOUNDS, native
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from parnet_kernels.config import ParNetConfig
from parnet_kernels.model import Block, ParNet
from parnet_kernels.ops import use_backend

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
