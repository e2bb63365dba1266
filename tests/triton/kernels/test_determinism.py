"""The same bits again: over repeated runs, over the order of programs, over the width of offsets."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from cases import OPERATORS, arguments
from torch import Tensor

from parnet_kernels.call import Call
from parnet_kernels.triton import backend, float32_precision, launch, policy


def results(op: str, batch: int, where: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Result and every gradient."""
    positional, options = arguments(op, batch, 20, 34, (7, 6), stride=2, dtype=dtype)
    positional = [t.to(where) for t in positional]
    options = {key: v.to(where) if isinstance(v, Tensor) else v for key, v in options.items()}
    with float32_precision("ieee"):
        call = Call.of(op, positional, options)
        y = backend.run(call)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(where, dtype)
        return [y, *backend.backward(call, g, call.tensors.keys()).values()]


@pytest.fixture(autouse=True)
def _many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and splits, so that the order of programs could matter."""
    monkeypatch.setattr(policy, "tile_for", lambda *_: policy.Tile(32, 32, 16, 4, 2))
    monkeypatch.setattr(policy, "split", lambda *_: 2)


@pytest.mark.real_tiles
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("op", OPERATORS)
def test_bitwise_the_same(op: str, batch: int, where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results(op, batch, where)
    wider = launch.int64_offsets()
    for change in (nullcontext(), wider):
        with change:
            assert all(torch.equal(a, b) for a, b in zip(expected, results(op, batch, where), strict=True)), change
    if launch.INTERPRETED:
        from triton.runtime.interpreter import interpreter_builder

        place = interpreter_builder.set_grid_idx

        def backwards(x: int, y: int, z: int) -> None:
            nx, ny, nz = interpreter_builder.grid_dim
            place(nx - 1 - x, ny - 1 - y, nz - 1 - z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
        assert all(torch.equal(a, b) for a, b in zip(expected, results(op, batch, where), strict=True))
