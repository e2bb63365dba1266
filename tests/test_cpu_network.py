"""Whole networks as one call of the native CPU kernels, against the float64 reference."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from cases import OPERATORS, arguments
from cpu_sweep import expected_of
from oracle import error

from parnet_kernels import _native
from parnet_kernels.cpu import pack as cpu

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))


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
