"""Tables and availability, without launching anything."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton

from parnet_kernels import ops
from parnet_kernels.triton import current_precision, float32_precision, policy
from parnet_kernels.triton.pack import Slices, padded

CPU = torch.device("cpu")


def test_every_table_answers_for_every_shape() -> None:
    assert set(policy.TABLES) == set(policy.ARCHITECTURES)
    for table in policy.TABLES.values():
        assert set(table) == {(kind, mode) for kind in policy.KINDS for mode in policy.MODES}
        for (_, mode), rules in table.items():
            if mode == "tf32x3" and table is policy.TABLES["gfx942"]:
                assert not rules, "AMD computes exactly instead"
                continue
            assert (rules[-1].rows, rules[-1].columns) == (0, 0), "the last rule is the fallback"
            for tile in (rule.tile for rule in rules):
                assert all(n & (n - 1) == 0 and n >= 16 for n in (tile.bm, tile.bn, tile.bk))
    assert policy.architecture(torch.device("cpu")) == "sm_80"


def test_no_rule_is_unreachable() -> None:
    for table in policy.TABLES.values():
        for rules in table.values():
            for i, later in enumerate(rules):
                assert not any(e.rows <= later.rows and e.columns <= later.columns for e in rules[:i]), later


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_each_device_has_a_table(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    expected = {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")
    assert policy.architecture(torch.device("cuda")) == expected


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.1", "3.8.0+git1234"])
def test_one_stage_where_triton_sets_no_proxy_fence(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tables, of a user's table and of tiles that are tried."""
    monkeypatch.setattr(triton, "__version__", version)
    policy.fenced.cache_clear()
    asked, other = ("conv", "half", 4096, 128), policy.Tile(64, 64, 32, 4, 3)
    for arch in policy.TABLES:
        monkeypatch.setattr(policy, "architecture", lambda _, arch=arch: arch)
        unfenced = version in ("3.6.0", "3.7.0") and arch in ("sm_90", "sm_100")
        listed = policy._first_fit(policy.TABLES[arch]["conv", "half"], 4096, 128)
        monkeypatch.setattr(policy, "user_table", lambda _: {})
        found = [(policy.tile_for(CPU, *asked), listed)]
        monkeypatch.setattr(policy, "user_table", lambda _: {policy.shape_key(*asked): other})
        found.append((policy.tile_for(CPU, *asked), other))
        with policy.trial() as trial:
            trial.tiles[policy.shape_key(*asked)] = listed
            found.append((policy.tile_for(CPU, *asked), listed))
        for tile, expected in found:
            assert tile == (replace(expected, stages=1) if unfenced else expected), arch
            assert expected.stages > 1 or not unfenced
    policy.fenced.cache_clear()


def test_split_only_where_processors_idle() -> None:
    assert policy.split(tiles=52, steps=36, sms=108) == 1
    assert policy.split(tiles=32, steps=72, sms=108) == 3
    assert policy.split(tiles=1, steps=72, sms=108) == 8
    assert policy.split(tiles=1, steps=9, sms=108) == 1


@pytest.mark.parametrize(
    ("channels", "stored"), [(1, 16), (3, 16), (16, 16), (17, 32), (92, 96), (200, 224), (208, 208)]
)
def test_channels_stored(channels: int, stored: int) -> None:
    assert padded(channels) == stored


@pytest.mark.parametrize("channels", range(1, 140))
def test_both_groups_of_a_fusion_lie_in_their_slices(channels: int) -> None:
    pitch = padded(channels)
    slices = Slices.of(channels, 2, pitch)
    for group, first in enumerate(slices.first):
        read = {u // 2 for u in range(group * channels, (group + 1) * channels)}
        assert first <= min(read)
        assert max(read) < first + slices.span <= pitch
        assert slices.span % 16 == 0


def test_precision_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert current_precision() == "ieee"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert current_precision() == "tf32"
        with float32_precision("tf32x3"):
            assert current_precision() == "tf32x3"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_reasons() -> None:
    x = torch.zeros(1, 4, 3, 3)
    assert "needs a CUDA device" in str(ops.explain("repvgg_sse", x)["triton"])
    assert "float64" in str(ops.explain("repvgg_sse", x.double())["triton"])
    assert "needs a CUDA device" in str(ops.explain("repvgg_sse", x.to("meta"))["triton"])


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_leaves_triton_alone() -> None:
    assert run("import sys, parnet_kernels; print('triton' in sys.modules)").strip() == "False"


def test_a_missing_triton_is_a_reason() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from parnet_kernels import ops
x = torch.ones(1, 4, 3, 3)
print(ops.explain("downsample_se", x)["triton"])
print(ops.downsample_se(x, torch.ones(2, 4, 3, 3), torch.ones(2), torch.ones(2, 4)).shape)
"""
    reason, shape = run(code).splitlines()
    assert "triton cannot be imported" in reason
    assert shape == "torch.Size([1, 2, 2, 2])"
