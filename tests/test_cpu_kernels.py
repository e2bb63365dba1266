"""The native CPU kernels (csrc/cpu), each variant against the float64 reference."""

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import cpu_sweep
import pytest
import torch
import torch.nn.functional as F
from cases import OPERATORS, arguments, to
from oracle import error

from parnet_kernels import _native, reference
from parnet_kernels.cpu import pack as cpu

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))

STRIDES = [("repvgg_sse", 1), ("downsample_se", 1), ("downsample_se", 2), ("fusion_se", 1), ("fusion_se", 2)]
each_stride = pytest.mark.parametrize(("op", "stride"), STRIDES, ids=lambda v: str(v))
each_storage = pytest.mark.parametrize("storage", ["transformed", "rows", "taps"])
INFO = json.loads(torch.ops.parnet._cpu_info()) if _native.cpu_error is None else {"supported": []}


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def expected_of(op: str, args: list, options: dict) -> torch.Tensor:
    wide_args, wide_options = to(torch.float64, args, options)
    return getattr(reference, op)(*wide_args, **wide_options)


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
    assert f'"isa": "{level}"' in done.stdout


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


# ------------------------------------------------------------------ whole networks


class Chain:
    """A network of three levels of resolution that merge again, as the steps of `_cpu_network` and in the reference."""

    def __init__(
        self, widths: tuple[int, int, int] = (12, 20, 36), stem: int = 3, storage: str = "transformed"
    ) -> None:
        a, b, c = widths
        self.layers = [  # op, inputs (0 is the image), stride, in and out channels
            ("downsample_se", [0], 2, stem, a),
            ("downsample_se", [1], 2, a, b),
            ("repvgg_sse", [1], 1, a, a),
            ("repvgg_sse", [3], 1, a, a),
            ("repvgg_sse", [2], 1, b, b),
            ("downsample_se", [4], 2, a, b),
            ("fusion_se", [5, 6], 2, b, c),
            ("downsample_se", [7], 1, c, b),
            ("repvgg_sse", [8], 1, b, b),
        ]
        self.parameters = []
        for seed, (op, inputs, stride, c_in, c_out) in enumerate(self.layers):
            args, options = arguments(op, 1, c_in, c_out, (1, 1), stride=stride, seed=seed)
            self.parameters.append((args[len(inputs) :], options))
        names = {"repvgg_sse": ("weight", "bias", "skip_scale", "skip_shift", "gate_weight", "gate_bias")}
        other = ("weight", "bias", "gate_weight", "gate_bias")
        self.packed, self.starts = cpu.pack_layers(
            [
                cpu.OPTIONAL
                | dict(zip(names.get(op, other), args, strict=True))
                | {name: options[name] for name in ("activation", "out_scale", "out_shift")}
                | {"kind": op, "stride": stride, "storage": storage}
                for (op, _, stride, _, _), (args, options) in zip(self.layers, self.parameters, strict=True)
            ]
        )
        rows = zip(self.starts, [inputs for _, inputs, *_ in self.layers], strict=True)
        self.steps = torch.tensor(
            [[start, i[0], i[1] if len(i) == 2 else -1, layer + 1] for layer, (start, i) in enumerate(rows)]
        )

    def __call__(self, x: torch.Tensor, pooled: bool = False, channels_last: bool = False) -> torch.Tensor:
        return torch.ops.parnet._cpu_network(x, self.packed, self.steps, pooled, channels_last)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        values = [x.double()]
        for (op, inputs, *_), (args, options) in zip(self.layers, self.parameters, strict=True):
            values.append(expected_of(op, [values[i] for i in inputs] + args, options))
        return values[-1]


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (5, 3), (64, 8)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stem", [3, 8])
def test_network(size: tuple[int, int], n: int, stem: int) -> None:
    network = Chain(stem=stem)
    x = torch.randn(n, stem, *size, generator=torch.Generator().manual_seed(1))
    expected = network.expected(x)
    assert error(network(x), expected) <= 5e-6
    assert error(network(x, pooled=True), expected.mean((2, 3))) <= 5e-6
    last = network(x.contiguous(memory_format=torch.channels_last), channels_last=True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, network(x))


@pytest.mark.parametrize("stem", [3, 8])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_maps_of_a_batch_go_image_by_image(stem: int, threads: int) -> None:
    """Through buffers that the images share: none may see another one's values, nor be overwritten too early."""
    network = Chain((33, 10, 36), stem)  # the same tiles for any batch: too few outputs for 6 x 6 on small maps
    x = torch.randn(5, stem, 160, 144, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(threads)
    alone = [network(image[None]) for image in x]
    assert error(alone[4], network.expected(x[4:])) <= 5e-6
    for _ in range(3):
        assert torch.equal(network(x), torch.cat(alone))
    assert torch.equal(network(x, pooled=True), torch.cat([network(image[None], pooled=True) for image in x]))
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(network(last, channels_last=True), network(x))


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_maps_of_a_batch_go_image_by_image_through_one_layer(op: str, threads: int) -> None:
    args, options = arguments(op, 5, 20, 20, (62, 75))
    inputs = 2 if op == "fusion_se" else 1
    torch.set_num_threads(threads)
    call = functools.partial(getattr(torch.ops.parnet, op), **options)
    alone = [call(*(x[i : i + 1] for x in args[:inputs]), *args[inputs:]) for i in range(5)]
    assert error(alone[4], expected_of(op, [x[4:] for x in args[:inputs]] + args[inputs:], options)) <= 3e-6
    last = [x.contiguous(memory_format=torch.channels_last) for x in args[:inputs]]
    for _ in range(3):
        assert torch.equal(call(*args), torch.cat(alone))
        assert torch.equal(call(*last, *args[inputs:]), torch.cat(alone))


@pytest.mark.parametrize("classes", [1, 10, 67])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_network_with_classifier(classes: int, dtype: torch.dtype, bias: bool) -> None:
    network, x = Chain((12, 19, 36)), torch.randn(3, 3, 32, 40).to(dtype)
    weight = torch.randn(classes, 19).to(dtype)
    offset = torch.randn(classes).to(dtype) if bias else None
    packed = torch.ops.parnet._cpu_pack_classifier(weight, offset)
    found = torch.ops.parnet._cpu_network(x, network.packed, network.steps, True, False, packed)
    wide = offset.double() if bias else None
    expected = F.linear(network.expected(x.float()).mean((2, 3)), weight.double(), wide)
    assert found.dtype == dtype
    assert error(found, expected) <= (5e-6 if dtype == torch.float32 else 4e-3)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        again = torch.ops.parnet._cpu_network(x, network.packed, network.steps, True, False, packed)
        assert torch.equal(again, found)


def test_profile_of_a_network() -> None:
    network, x = Chain(), torch.randn(2, 3, 64, 64)
    rows = torch.ops.parnet._cpu_profile(x, network.packed, network.steps, True, False)
    assert rows.dtype == torch.float64
    assert rows[:, 1].unique().tolist() == [-1, *range(len(network.layers))]
    assert (rows[:, 2] >= 0).all()
    assert rows[:, 2].sum() > 0


def test_network_whole_blocks_are_stored_directly() -> None:
    network = Chain((16, 16, 32))
    x = torch.randn(2, 3, 40, 24)
    assert torch.equal(network(x, channels_last=True), network(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_network_in_16_bit_computes_in_float32(dtype: torch.dtype) -> None:
    network, x = Chain(), torch.randn(2, 3, 32, 32).to(dtype)
    found = network(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, network(x.float()).to(dtype), rtol=0, atol=0)


def test_network_does_not_depend_on_threads() -> None:
    network, x = Chain((64, 72, 80)), torch.randn(1, 3, 120, 96)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results += [network(x) for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)


def test_network_from_several_threads() -> None:
    network = Chain()
    inputs = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    expected = [network(x) for x in inputs]
    equal: list[bool] = []

    def call(i: int) -> None:
        equal.extend(torch.equal(network(inputs[i]), expected[i]) for _ in range(20))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(equal) == 80
    assert all(equal)


# ------------------------------------------------------------------ bad arguments


def test_bad_steps() -> None:
    network, x = Chain(), torch.randn(1, 3, 8, 8)
    first, second = network.starts[:2]
    bad: dict[str, list[int]] = {
        "has no layer at": [network.packed.numel(), 0, -1, 1],
        "made by parnet::_cpu_pack": [first + 64, 0, -1, 1],
        "64-byte aligned": [first + 1, 0, -1, 1],
        "read before it is written": [first, 4, -1, 1],
        "takes 12 channels, got 3": [second, 0, -1, 1],
        "a second input goes with fusion layers only": [first, 0, 0, 1],
        "an input is overwritten": [first, 0, -1, 0],
    }
    run = torch.ops.parnet._cpu_network
    for text, row in bad.items():
        with pytest.raises(RuntimeError, match=text):
            run(x, network.packed, torch.tensor([row]), False, False)
    with pytest.raises(RuntimeError, match="no layers"):
        run(x, network.packed, torch.empty(0, 4, dtype=torch.int64), False, False)
    for steps in (torch.zeros(4, dtype=torch.int64), network.steps.int(), network.steps[:, :3]):
        with pytest.raises(RuntimeError, match="`steps` must be"):
            run(x, network.packed, steps, False, False)
    classifier = torch.ops.parnet._cpu_pack_classifier(torch.randn(10, 21), None)
    with pytest.raises(RuntimeError, match="takes 21 channel means, got 20"):
        run(x, network.packed, network.steps, True, False, classifier)
    with pytest.raises(RuntimeError, match="classifier"):
        run(x, network.packed, network.steps, True, False, network.packed)
    with pytest.raises(RuntimeError, match="classifier"):
        run(x, classifier, torch.tensor([[0, 0, -1, 1]]), False, False)


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
