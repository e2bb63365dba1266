"""The native CPU kernels (csrc/cpu), each variant against the float64 reference."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import cpu_sweep
import pytest
import torch
from cases import OPERATORS, arguments
from cpu_sweep import expected_of
from oracle import error

from parnet_kernels import _native
from parnet_kernels.cpu import pack as cpu

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))

STRIDES = [("repvgg_sse", 1), ("downsample_se", 1), ("downsample_se", 2), ("fusion_se", 1), ("fusion_se", 2)]
each_stride = pytest.mark.parametrize(("op", "stride"), STRIDES, ids=lambda v: str(v))
each_storage = pytest.mark.parametrize("storage", ["transformed", "rows", "taps"])
INFO = _native.cpu_info() if _native.cpu_error is None else {"supported": []}


# ------------------------------------------------------------------ values


@each_stride
@each_storage
@pytest.mark.parametrize(
    ("n", "c", "k", "size"),
    [
        (1, 1, 2, (1, 1)),
        (2, 3, 64, (9, 12)),
        (1, 12, 92, (14, 14)),
        (1, 92, 130, (7, 7)),
        (3, 130, 12, (5, 6)),
        (1, 24, 20, (65, 67)),
        (4, 72, 40, (13, 14)),
        (2, 516, 14, (18, 17)),
    ],
    ids=str,
)
def test_values(op: str, stride: int, storage: str, n: int, c: int, k: int, size: tuple[int, int]) -> None:
    args, options = arguments(op, n, c, k, size, stride=stride)
    assert error(cpu_sweep.run(op, args, options, storage), expected_of(op, args, options)) <= 3e-6


def sweep(level: str, seed: int, count: int) -> None:
    """A sweep in a process of its own, with everything that a run must write before it reads starting as NaN."""
    environment = {**os.environ, "PARNET_CPU_ISA": level, "PARNET_CPU_POISON": "1"}
    script = [sys.executable, str(Path(cpu_sweep.__file__)), str(seed), str(count)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"'isa': '{level}'" in done.stdout


@pytest.mark.parametrize("level", INFO["supported"])
def test_instruction_sets(level: str) -> None:
    sweep(level, 0, 60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("level", INFO["supported"])
def test_instruction_sets_long(level: str, seed: int) -> None:
    sweep(level, seed, 500)


def test_instruction_set_can_only_be_lowered() -> None:
    environment = {**os.environ, "PARNET_CPU_ISA": "avx1024"}
    code = "import torch, parnet_kernels; torch.ops.parnet._cpu_info()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PARNET_CPU_ISA must be one of portable16, portable" in done.stderr


@each_stride
def test_batch_of_none(op: str, stride: int) -> None:
    args, options = arguments(op, n=0, stride=stride)
    assert cpu_sweep.run(op, args, options).shape == expected_of(op, args, options).shape


@each_stride
def test_expanded_inputs(op: str, stride: int) -> None:
    args, options = arguments(op, n=1, c=9, k=10, size=(1, 6), stride=stride)
    maps = 2 if op == "fusion_se" else 1
    args[:maps] = [x.expand(3, 9, 5, 6) for x in args[:maps]]
    assert error(cpu_sweep.run(op, args, options), expected_of(op, args, options)) <= 3e-6


@each_stride
def test_large_batch_transforms_per_item(op: str, stride: int) -> None:
    args, options = arguments(op, n=24, c=64, k=16, size=(32, 32), stride=stride)
    assert error(cpu_sweep.run(op, args, options), expected_of(op, args, options)) <= 3e-6


@each_stride
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_inputs(op: str, stride: int, value: float) -> None:
    """The kernels say that they cannot; the public operators then take the reference (tests/test_ops.py)."""
    args, options = arguments(op, n=2, c=8, k=16, size=(12, 12), stride=stride)
    args[0][1, 3, 5, 6] = value
    assert cpu_sweep.run(op, args, options).numel() == 0
    args[0][1, 3, 5, 6] = 1e30
    assert cpu_sweep.run(op, args, options).numel() > 0


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_not_finite_images(channels: int) -> None:
    """The stem, too, and channels that do not fill a block."""
    args, options = arguments("downsample_se", n=1, c=channels, k=8, size=(9, 9))
    args[0][0, channels - 1, 8, 8] = float("nan")
    assert cpu_sweep.run("downsample_se", args, options).numel() == 0


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_activation_of_large_values(activation: str) -> None:
    args, options = arguments("downsample_se", n=1, c=1, k=8, size=(1, 1), activation=activation, affine=False)
    args[1].zero_()
    args[2].copy_(torch.tensor([-1e30, -200.0, -88.8, -88.0, 88.0, 200.0, 1e30, 0.0]))
    expected = expected_of("downsample_se", args, options)
    torch.testing.assert_close(cpu_sweep.run("downsample_se", args, options).double(), expected, rtol=2e-6, atol=1e-13)


def test_activation_of_infinity() -> None:
    """A product with the skip input that overflows."""
    one, zero = torch.ones(8), torch.zeros(8)
    args = [1e20 * torch.ones(1, 8, 2, 2), torch.zeros(8, 8, 3, 3), zero, 1e20 * one, zero, torch.zeros(8, 8), one]
    assert cpu_sweep.run("repvgg_sse", args, {"activation": "silu"}).isposinf().all()


# ------------------------------------------------------------------ determinism and threads


@each_stride
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "size"), [(2, (30, 29)), (1, (28, 28)), (1, (14, 14))], ids=str)
def test_threads_do_not_change_a_bit(op: str, stride: int, dtype: torch.dtype, n: int, size: tuple[int, int]) -> None:
    size = (stride * size[0], stride * size[1])
    args, options = arguments(op, n, c=40, k=72, size=size, stride=stride, dtype=dtype)
    for storages in [("transformed",), ("rows", "taps")]:  # equal tiles and sums
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results += [cpu_sweep.run(op, args, options, storage) for storage in storages for _ in range(2)]
        assert all(torch.equal(results[0], other) for other in results)


def test_calls_from_several_threads() -> None:
    cases = [(op, *arguments(op, n=1, c=33, k=34, size=(17, 14 + i))) for i, op in enumerate(OPERATORS * 2)]
    expected = [cpu_sweep.run(op, args, options) for op, args, options in cases]
    wrong: list[int] = []

    def call(start: int) -> None:
        for i in range(40):
            at = (start + i) % len(cases)
            if not torch.equal(cpu_sweep.run(*cases[at]), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_packing_needs_a_place() -> None:
    args, options = arguments("downsample_se", stride=2)
    layer = cpu.OPTIONAL | dict(zip(("weight", "bias", "gate_weight", "gate_bias"), args[1:], strict=True))
    layer = cpu.coded(
        layer | {"kind": "downsample_se", "stride": 2, "activation": options["activation"], "storage": "taps"}
    )
    pack, empty = torch.ops.parnet._cpu_pack, torch.empty(0, dtype=torch.uint8)
    size = pack(empty, 0, **layer)
    assert pack(torch.ops.parnet._cpu_bytes(size + 64), 64, **layer) == size + 64
    for into, at in ((size - 64, 0), (size, 64), (size + 64, 32), (size + 64, -64)):
        with pytest.raises(RuntimeError, match=f"a place for {size} bytes at {at}"):
            pack(torch.ops.parnet._cpu_bytes(into), at, **layer)


def test_packed_weights_are_checked() -> None:
    args, _ = arguments("downsample_se", stride=2)
    parameters = dict(zip(("weight", "bias", "gate_weight", "gate_bias"), args[1:], strict=True))
    packed = cpu.pack("downsample_se", 2, "silu", parameters)
    with pytest.raises(RuntimeError, match="made by parnet::_cpu_pack"):
        torch.ops.parnet._cpu_layer(args[0], None, torch.zeros(512, dtype=torch.uint8), False)
    moved = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].copy_(packed)
    with pytest.raises(RuntimeError, match="64-byte aligned"):
        torch.ops.parnet._cpu_layer(args[0], None, moved, False)
    with pytest.raises(RuntimeError, match="channels, got"):
        torch.ops.parnet._cpu_layer(torch.randn(1, 5, 4, 4), None, packed, False)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        torch.ops.parnet._cpu_layer(args[0].double(), None, packed, False)


@each_storage
@pytest.mark.parametrize(("c", "size"), [(130, (28, 28)), (512, (28, 28)), (800, (23, 29))], ids=str)
def test_many_channels(storage: str, c: int, size: tuple[int, int]) -> None:
    """The bare convolution, half of it: nothing is added that has no error. Sums of partial sums keep it small."""
    args, options = arguments("downsample_se", 1, c, 64, size, stride=1, activation="relu", affine=False)
    args[2].zero_()
    assert (
        error(cpu_sweep.run("downsample_se", args, options, storage), expected_of("downsample_se", args, options))
        <= 3e-6
    )


def test_taps_are_smaller() -> None:
    args, _ = arguments("repvgg_sse", c=128)
    names = ("weight", "bias", "skip_scale", "skip_shift", "gate_weight", "gate_bias")
    parameters = dict(zip(names, args[1:], strict=True))
    transformed, rows, taps = (
        cpu.pack("repvgg_sse", 1, "silu", parameters, storage).numel() for storage in ("transformed", "rows", "taps")
    )
    assert transformed > 2.4 * rows > 5.5 * taps
    assert taps < 1.1 * 4 * sum(p.numel() for p in args[1:] if p is not None)
