"""What differs between devices: AMD's compilers, channel counts that are no multiple of 16, batches, first calls."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from cases import arguments
from offline import Launch, record

from parnet_kernels.call import Call
from parnet_kernels.triton import backend, compilation, launch, layers, policy, tuning


def launches(op: str, batch: int, channels: int, size: int = 6, tile: policy.Tile | None = None) -> list[Launch]:
    """Forward and backward in float16, in channels_last."""
    tensors, options = arguments(op, batch, channels, channels, (size, size), dtype=torch.float16, stride=1)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    call = Call.of(op, tensors, options)

    def host() -> None:
        y = backend.run(call)
        backend.backward(call, torch.zeros_like(y), call.tensors.keys())

    tile_for = policy.tile_for if tile is None else lambda *_: tile
    with mock.patch.object(policy, "tile_for", tile_for):
        return record(host)


def convolutions(found: list[Launch]) -> dict[str, Launch]:
    """One of each kind of matrix product."""
    return {one.kernel.__name__: one for one in found if "BK" in one.arguments and "PRECISION" in one.arguments}


# ------------------------------------------------------------------ AMD


@pytest.mark.parametrize("target", ["gfx90a", "gfx950", "gfx1100"])
def test_sixteen_bit_products_compile_on_amd(target: str) -> None:
    """Their compilers have no tf32, which 16-bit products do not mean."""
    products = convolutions(launches("repvgg_sse", 2, 64, tile=policy.Tile(64, 64, 32, 4, 2)))
    assert set(products) == {"conv_se_fwd_kernel", "conv_se_bwd_kernel", "weight_se_bwd_kernel"}
    for name in ("conv_se_fwd_kernel", "weight_se_bwd_kernel"):
        assert products[name].compile(target).asm["amdgcn"]


@pytest.mark.parametrize(
    ("name", "has"),
    [("gfx942:sramecc+:xnack-", {"ieee", "tf32"}), ("gfx90a:sramecc+", {"ieee"}), ("gfx950", {"ieee"})],
)  # fmt: skip
def test_products_of_float32_on_amd(monkeypatch: pytest.MonkeyPatch, name: str, has: set[str]) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=name))
    device = torch.device("cuda", 0)
    for precision in ("ieee", "tf32", "tf32x3"):
        expected = precision if precision in has else "ieee"
        assert layers.dot_precision(device, torch.float32, precision) == expected
        assert layers.dot_precision(device, torch.bfloat16, precision) == "ieee"


def test_pointers_to_little_memory_are_told_on_amd() -> None:
    """As the JIT does on a device, where loads and stores then go through buffers."""
    one = convolutions(launches("repvgg_sse", 2, 64, tile=policy.Tile(64, 64, 32, 4, 2)))["conv_se_fwd_kernel"]
    assert "tt.pointer_range" in str(one.source("gfx942")[0].attrs)
    assert "tt.pointer_range" not in str(one.source("sm_90")[0].attrs)
    assert "buffer_load" in one.compile("gfx942").asm["amdgcn"]


# ------------------------------------------------------------------ narrow accesses


@pytest.mark.parametrize(("channels", "aligned"), [(92, 4), (96, 16), (90, 2)])
def test_accesses_are_as_wide_as_the_channels_allow(channels: int, aligned: int) -> None:
    """Results, skips and gradients are not accessed by single channels where several divide their number."""
    for one in launches("repvgg_sse", 2, channels, 14, policy.Tile(64, 64, 32, 4, 2)):
        name = one.kernel.__name__
        if "ALIGN" not in one.arguments:
            continue
        ptx = one.compile("sm_80").asm["ptx"]
        narrow = len(re.findall(r"(?:st|ld)\.global\S*\.b16 ", ptx))
        assert narrow == 0, f"{name}: {narrow} accesses of one channel"
        assert one.arguments["ALIGN"] == aligned


def test_alignment() -> None:
    x = torch.empty(2, 92, 7, 5).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    from parnet_kernels.triton.conv_fwd import alignment

    assert alignment(92, x) == 4
    assert alignment(92, torch.empty(2, 7, 5, 96)) == 4
    assert alignment(96, torch.empty(2, 7, 5, 96), None) == 16
    assert alignment(96, torch.empty(2, 7, 5, 97)[..., :96]) == 1
    assert alignment(1, torch.empty(2, 7, 5, 1)) == 1


# ------------------------------------------------------------------ first calls


def specialisations(found: list[Launch]) -> set[str]:
    return {f"{one.kernel.__name__} {one.source()[0].signature} {one.source()[0].constants} {one.source()[0].attrs}"
            for one in found}  # fmt: skip


@pytest.mark.parametrize("op", ["repvgg_sse", "fusion_se"])
def test_another_batch_compiles_nothing_anew(op: str) -> None:
    first = specialisations(launches(op, 32, 64, 14))
    for batch in (33, 47):
        assert specialisations(launches(op, batch, 64, 14)) <= first


def test_warmup_compiles_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of forward and backward is compiled, without running, before the first runs."""
    events: list[tuple[str, str]] = []
    monkeypatch.setattr(
        compilation, "together", lambda ones: events.extend(("compiles", o.kernel.__name__) for o in ones)
    )
    tensors, options = arguments("downsample_se", 2, 32, 32, (6, 6), dtype=torch.float16)
    with launch.recorded() as ran:
        # Inside, the warm-up's own record takes the launches of its first pass.
        tuning.warmup("downsample_se", tensors, options, training=True)
    compiled = [name for _, name in events]
    assert compiled == [one.kernel.__name__ for one in ran]
    assert {"conv_se_fwd_kernel", "conv_se_bwd_kernel", "weight_se_bwd_kernel"} <= set(compiled)


def test_kernels_compile_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own pool gets every launch; the first does not wait for its result."""
    seen: list[Any] = []

    class Kernel:
        __name__ = "a_kernel"

        def warmup(self, *, grid: Any, **arguments: Any) -> None:
            mode = triton.runtime._async_compile.active_mode.get()
            seen.append((mode is not None, grid, arguments["num_warps"]))

    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    one = launch.Launch(Kernel(), (3, 1), {"x": torch.zeros(1)}, {"num_warps": 4})
    compilation.together([one, one])
    assert seen == [(True, (3, 1), 4)] * 2


class Compiles:
    """A kernel that has to be compiled, as far as the JIT's hook can see."""

    def __init__(self, compiled: bool):
        self.compiled, self.ran = compiled, False

    def __getitem__(self, grid: Any) -> Any:
        def call(**arguments: Any) -> None:
            hook = triton.knobs.runtime.jit_cache_hook
            if not self.compiled and hook is not None:
                hook(fn=SimpleNamespace(name="conv_se_fwd_kernel"))
            self.ran = True

        return call


class OnGpu(torch.Tensor):
    is_cuda = True


def test_a_kernel_that_was_not_compiled_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    x = torch.zeros(1).as_subclass(OnGpu)
    ready, new = Compiles(True), Compiles(False)
    launch.run(ready, (1,), {"x": x}, {})
    assert ready.ran
    with pytest.raises(
        RuntimeError, match=r"conv_se_fwd_kernel is not compiled .* call parnet_kernels.triton.tuning.warmup"
    ):
        launch.run(new, (1,), {"x": x}, {})
    assert not new.ran
    assert triton.knobs.runtime.jit_cache_hook is None
    capturing = False
    launch.run(new, (1,), {"x": x}, {})
    assert new.ran


# ------------------------------------------------------------------ measured tiles


def test_measured_tiles_are_of_one_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """An A100 and an L4 share a table; what was measured on one is not taken on the other."""
    names = {0: "NVIDIA A100-SXM4-80GB", 1: "NVIDIA L4", 2: "NVIDIA A100-SXM4-80GB"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: names[d.index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (8, 9) if d.index == 1 else (8, 0))
    devices = [torch.device("cuda", i) for i in names]
    for cached in (policy.model, policy.user_table):
        cached.cache_clear()
    fastest = policy.Tile(16, 16, 16, 1, 1)
    path = policy.write_user_table(policy.model(devices[0]), {policy.shape_key("conv", "half", 784, 96): fastest})
    assert path.name == "triton-nvidia-a100-sxm4-80gb.json"
    found = [policy.tile_for(d, "conv", "half", 784, 96) for d in devices]
    for cached in (policy.model, policy.user_table):
        cached.cache_clear()
    assert found[0] == found[2] == fastest
    assert found[1] == policy._first_fit(policy.TABLES["sm_80"]["conv", "half"], 784, 96)


def test_tiles_are_measured_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the host's clock all would tie."""
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", lambda call, return_mode: (call(), 2.5)[1])
    called: list[int] = []
    assert tuning.milliseconds(lambda: called.append(1)) == 2.5
    assert called
