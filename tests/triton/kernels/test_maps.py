"""Layers on maps: sums handed from layer to layer, padded channels, every way of cutting the work."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cases import arguments, to
from torch import Tensor

from parnet_kernels import reference
from parnet_kernels.triton import launch, layers, policy
from parnet_kernels.triton.pack import Map, pack_map, padded
from parnet_kernels.triton.policy import Tile

real_tiles = pytest.mark.real_tiles


def layer_of(op: str, parameters: list[Tensor | None], options: dict[str, Any]) -> layers.Layer:
    if op == "repvgg_sse":
        weight, bias, scale, shift, gate_weight, gate_bias = parameters
        return layers.Layer(weight, bias, gate_weight, gate_bias, scale, shift, **options)
    return layers.Layer(*parameters, **options)


def nchw(m: Map) -> Tensor:
    return m.data[..., : m.channels].permute(0, 3, 1, 2)


def sums_of(m: Map) -> Tensor:
    """[N, C] from the per-tile sums, as the gate kernel is told to read them."""
    assert m.sums is not None
    n, slots, _ = m.sums.partial.shape
    out = torch.zeros(n, m.channels, dtype=torch.float64)
    for image in range(n):
        last = slots
        if not m.sums.per_image:
            last = ((image + 1) * m.area - 1) // m.sums.tile - image * m.area // m.sums.tile + 1
        out[image] = m.sums.partial[image, :last, : m.channels].double().cpu().sum(0)
    return out


def close(found: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    error = (found.double().cpu() - expected).norm() / expected.norm()
    assert error <= tolerance, f"{error:.1e}"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(9, 7), (5, 4)])
def test_a_chain_pools_nothing(batch: int, size: tuple[int, int], where: torch.device) -> None:
    """down → block → fusion with another branch: each reads its producer's sums; only the first map is packed."""
    c, k = 12, 36
    down, down_options = arguments("downsample_se", batch, c, k, size, stride=2)
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    block, block_options = arguments("repvgg_sse", batch, k, k, half, seed=1)
    fuse, fuse_options = arguments("fusion_se", batch, k, 20, half, stride=1, seed=2)
    wide = [to(torch.float64, *pair) for pair in ((down, down_options), (block, block_options), (fuse, fuse_options))]
    a64 = reference.downsample_se(*wide[0][0], **wide[0][1])
    b64 = reference.repvgg_sse(a64, *wide[1][0][1:], **wide[1][1])
    f64 = reference.fusion_se(b64, a64, *wide[2][0][2:], **wide[2][1])

    def here(values: Any) -> Any:
        return [v if v is None else v.to(where) for v in values]

    def options(values: dict[str, Any]) -> dict[str, Any]:
        return {key: v.to(where) if isinstance(v, Tensor) else v for key, v in values.items()}

    x = pack_map(down[0].to(where))
    with mock.patch.object(layers, "pack_map", side_effect=AssertionError("a map was packed again")):
        a = layers.forward(layer_of("downsample_se", here(down[1:]), options(down_options)), (x,), "ieee")
        # A split has its own tiles for the epilogue: the fusion's inputs are then cut differently.
        with mock.patch.object(policy, "split", return_value=2):
            b = layers.forward(layer_of("repvgg_sse", here(block[1:]), options(block_options)), (a,), "ieee")
        f = layers.forward(layer_of("fusion_se", here(fuse[2:]), options(fuse_options)), (b, a), "ieee")
    assert a.sums is not None
    assert b.sums is not None
    assert a.sums.tile != b.sums.tile
    for found, expected in ((a, a64), (b, b64), (f, f64)):
        assert found.data.shape[3] == padded(found.channels)
        assert not found.data[..., found.channels :].any(), "padding must stay zero"
        close(nchw(found), expected)
        close(sums_of(found), expected.sum((2, 3)))


@real_tiles
@pytest.mark.parametrize("op", ["repvgg_sse", "downsample_se", "fusion_se"])
@pytest.mark.parametrize(
    "tile", [Tile(64, 32, 16, 4, 2), Tile(16, 64, 32, 4, 2)], ids=lambda t: f"{t.bm}x{t.bn}x{t.bk}"
)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_way_of_cutting(
    op: str, tile: Tile, splits: int, where: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tiles in both directions, within and across images, whole and split, forward and backward."""
    from parnet_kernels.call import Call
    from parnet_kernels.triton import backend, float32_precision

    monkeypatch.setattr(policy, "tile_for", lambda *_: tile)
    monkeypatch.setattr(policy, "split", lambda *_: splits)
    positional, options = arguments(op, 2, 33, 50, (7, 6), stride=2)
    wide, wide_options = to(torch.float64, positional, options)
    leaves = [t.requires_grad_() for t in (*wide, wide_options["out_scale"], wide_options["out_shift"])]
    expected = getattr(reference, op)(*wide, **wide_options)
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    expected_gradients = torch.autograd.grad(expected, leaves, g.double())
    positional = [t.to(where) for t in positional]
    options = {key: v.to(where) if isinstance(v, Tensor) else v for key, v in options.items()}
    with float32_precision("ieee"):
        call = Call.of(op, positional, options)
        close(backend.run(call), expected.detach())
        found = backend.backward(call, g.to(where), call.tensors.keys())
    for a, b in zip(found.values(), expected_gradients, strict=True):
        close(a, b)


def test_pack_reads_in_place_what_it_can(where: torch.device) -> None:
    x = torch.randn(2, 48, 5, 5, device=where).contiguous(memory_format=torch.channels_last)
    assert pack_map(x).data.data_ptr() == x.data_ptr()
    part = x[:, 16:48]
    assert pack_map(part).data.data_ptr() == part.data_ptr()
    close(sums_of(pack_map(part)), part.double().cpu().sum((2, 3)))
    for other in (x.contiguous(), x[:, :20], x[:, ::2], x[..., :1].expand(-1, -1, -1, 7)):
        packed = pack_map(other)
        assert torch.equal(nchw(packed), other)
        assert not packed.data[..., packed.channels :].any()
        close(sums_of(packed), other.double().cpu().sum((2, 3)))


def test_offsets_past_two_to_the_31() -> None:
    """Sizes decide the width of offsets; a tensor on the meta device takes no memory."""

    def empty(*size: int) -> Tensor:
        return torch.empty(size, device="meta")

    assert not launch.needs_int64([empty(2**10, 2**20), None])
    assert launch.needs_int64([None, empty(2**11, 2**20)])
    assert launch.needs_int64([empty(2**12, 2**20)[:, :1]]), "a slice spans what lies between"
    with launch.int64_offsets():
        assert launch.needs_int64([empty(1)])
