"""DeviceParallel on CPU devices: bits, errors, the order of work; and, with a GPU machine, the real thing."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import error
from scenarios import CONFIGS, COSTS, IMAGES, images, network, same_bits
from torch import Tensor

from parnet_kernels import DeployedParNet, ParNetConfig
from parnet_kernels.distributed import DeviceParallel, devices, pieces, queues
from parnet_kernels.selection import use_backend

CONFIG = CONFIGS["imagenet"]
WITH_BLOCKS = [name for name in CONFIGS if name != "streams without blocks"]


def on_cpus(net: DeployedParNet, count: int = 3, **options: Any) -> DeviceParallel:
    return DeviceParallel(net, [f"cpu:{i}" for i in range(count)], **{"costs": COSTS} | options)


@pytest.mark.parametrize("trunk", ["auto", "recompute", "send"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_bits_are_those_of_the_network(name: str, count: int, trunk: str) -> None:
    config = CONFIGS[name]
    dtype = torch.bfloat16 if (count + len(name)) % 2 else torch.float32
    net = network(config).to(dtype)
    parallel = on_cpus(net, count, trunk=trunk)
    shapes = IMAGES if name in ("imagenet", "cifar") else IMAGES[count - 1 : count + 1]
    for i, (n, h, w) in enumerate(shapes):
        x = images(config, i, n, h, w).to(dtype)
        if (i + count) % 2:
            x = x.contiguous(memory_format=torch.channels_last)
        assert same_bits(parallel(x), net(x))
        assert same_bits(parallel.forward_features(x), net.forward_features(x))
        assert same_bits(parallel(x + 1), net(x + 1))


@pytest.mark.parametrize("trunk", ["recompute", "send"])
@pytest.mark.parametrize("way", ["native", "reference", "float64", "not finite", "taps"])
def test_changes_are_seen(way: str, trunk: str) -> None:
    net, x = network(CONFIG), torch.randn(4, 5, 60, 90)[::2, 1:4, 3:, ::2]
    if way == "float64":
        net, x = net.double(), x.double()
    if way == "not finite":
        net.layers["streams_1_0"].bias[0] = 1e38
        net.head_bias[0] = torch.inf
    if way == "taps":
        net.prepare("taps")
    with use_backend("reference") if way == "reference" else contextlib.nullcontext():
        parallel = on_cpus(net, trunk=trunk)
        assert same_bits(parallel(x), net(x))
        with torch.no_grad():
            net.head_bias.add_(1)
            net.layers["streams_2_0"].weight.mul_(0.5)
        for _ in range(2):
            assert same_bits(parallel(x), net(x))
        net.half()
        assert same_bits(parallel(x.half()), net(x.half()))
    net.float()
    assert same_bits(parallel(x.float()), net(x.float()))


def test_each_device_has_its_own_layers_only() -> None:
    net, x = network(CONFIG), images(CONFIG)
    parallel = on_cpus(net, streams=[[2], [0], [1]], trunk="send")
    parallel(x)
    with use_backend("reference"):
        parallel(x)
    for stream, own in enumerate(parallel._pieces[1:]):
        names = {name for packed in own._packed for name in packed}
        assert names == {*own.copies}
        assert names
        assert all(name.startswith((f"streams.{stream}.", "downsamples_2.0", "inits.")) for name in names)
    assert not parallel._pieces[0].copies
    assert not any("streams.0." in name for packed in parallel._pieces[0]._packed for name in packed)


def test_many_shapes_keep_few_plans() -> None:
    net = network(CONFIG)
    parallel = on_cpus(net, 2)
    for side in (*range(20, 30), 20, 29):
        x = images(CONFIG, side, 1, side, 25)
        assert same_bits(parallel(x), net(x))
    assert len(parallel._plans) == devices.MAX_PLANS


def test_measured_costs_and_words() -> None:
    parallel = on_cpus(network(CONFIG), costs=None)
    assert min(*parallel.costs[0].__dict__.values(), *parallel.costs[1].__dict__.values()) >= 0
    told = on_cpus(network(CONFIG), streams=[[0], [2], [1]], trunk="recompute").placement((1, 3, 32, 32))
    text = "cpu:0: stream 0, from the image, fusion; cpu:1: stream 2, from the image; cpu:2: stream 1, from the image"
    assert told.describe(["cpu:0", "cpu:1", "cpu:2"]) == text


# ------------------------------------------------------------------ bad input

DEVICES = {
    "no list": ("cuda:0", "`devices` must be a list such as"),
    "none": ([], "`devices` must be a list such as"),
    "no device": (["cpu:0", "gpu 1"], "`devices` must be devices, got 'gpu 1'"),
    "another kind": (["meta"], "`devices` must be CUDA devices, or CPU devices, got meta"),
    "twice": (["cpu:0", "cpu:1", "cpu:1"], "`devices` must be different ones, got cpu:0, cpu:1, cpu:1"),
    "twice, unnumbered": (["cpu", "cpu:0"], "`devices` must be different ones, got cpu:0, cpu:0"),
    "too many": (["cpu:0", "cpu:1", "cpu:2", "cpu:3"], "`devices` must be at most 3, one a stream, got cpu:0, cpu:1"),
    "not here": (["cuda:0", "cuda:77"], "`devices` must be CUDA devices of this machine, which has"),
}


@pytest.mark.parametrize(("given", "text"), DEVICES.values(), ids=DEVICES)
def test_wrong_devices(given: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"^parnet_kernels: ") as caught:
        DeviceParallel(network(CONFIG), given, costs=COSTS)
    assert text in str(caught.value)


def test_devices_of_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given in (["cpu:0", "cuda:1"], ["cuda:0", "cpu:0"]):
        with pytest.raises(ValueError, match=r"`devices` must be of one kind, got \w+:0, \w+:\d"):
            DeviceParallel(network(CONFIG), given, costs=COSTS)
    with pytest.raises(ValueError, match="`network` must be on the first device, cuda:1, got cpu"):
        DeviceParallel(network(CONFIG), ["cuda:1", "cuda:0"], costs=COSTS)


def test_wrong_options() -> None:
    net = network(CONFIG)
    for options, text in {
        "`trunk` must be one of": {"trunk": "never"},
        "`streams` must give each of 3 devices at least one of the streams 0 to 2": {"streams": [[0], [1], [1]]},
    }.items():
        with pytest.raises(ValueError, match=options):
            on_cpus(net, **text)
    with pytest.raises(ValueError, match="`network` must be a DeployedParNet, got Linear"):
        on_cpus(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be cut into streams: a stream without blocks"):
        on_cpus(network(CONFIGS["streams without blocks"]))
    with pytest.raises(TypeError, match="can be neither copied nor pickled"):
        copy.copy(on_cpus(net))


def test_bad_calls_leave_it_usable() -> None:
    net, x = network(CONFIG), images(CONFIG)
    parallel = on_cpus(net)
    expected = net(x)
    wrong: dict[str, Any] = {
        r"`x` must be a dense tensor \[N, 3, H, W\], H and W ≥ 1, got \[3, 32, 32\]": x[0],
        r"H and W ≥ 1, got \[1, 3, 0, 5\]": torch.zeros(1, 3, 0, 5),
        "has 4 channels, the network takes 3": torch.zeros(1, 4, 8, 8),
        "`x` is torch.float64, the network torch.float32": x.double(),
        "`x` must have the network's dtype, torch.float32, got torch.uint8": x.to(torch.uint8),
        "`x` must need no gradient": x.clone().requires_grad_(),
        "`x` is on meta": x.to("meta"),
    }
    for text, given in wrong.items():
        with pytest.raises(ValueError, match=text):
            parallel(given)
    with pytest.raises(TypeError, match="`x` must be a tensor"):
        parallel([1, 2])  # type: ignore[arg-type]
    with torch.autocast("cpu"), pytest.raises(ValueError, match="`x` must come without autocast"):
        parallel(x)
    hook = net.layers["streams_0_0"].register_forward_hook(print)
    with pytest.raises(ValueError, match=r"streams: layers\.streams_0_0: has hooks"):
        parallel(x)
    with pytest.raises(ValueError, match=r"streams: layers\.streams_0_0: has hooks"):
        on_cpus(net)
    hook.remove()
    net.head_weight.requires_grad_()
    with pytest.raises(ValueError, match="cannot be cut into streams: weights need gradients"):
        parallel(x)
    with torch.no_grad():
        assert same_bits(parallel(x), expected)
    net.head_weight.requires_grad_(False)
    assert same_bits(parallel(x), expected)


def test_an_error_while_computing_leaves_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(CONFIG), images(CONFIG)
    parallel = on_cpus(net)
    expected = net(x)

    def fail(*_: object) -> None:
        raise MemoryError("no memory left")

    for _ in range(2):  # with a plan, and without
        with monkeypatch.context() as patch:
            patch.setattr(pieces.Pieces, "finish", fail)
            with pytest.raises(MemoryError):
                parallel(x)
        assert same_bits(parallel(x), expected)


# ------------------------------------------------------------------ the order of work


class _Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.happened = machine, False

    def happen(self) -> None:
        self.happened = True

    def synchronize(self) -> None:
        self.machine.run(until=self)


class Machine:
    """Devices whose work runs late, in the order of their queues' priority (first those that it does not name) as far
    as events allow it: so what an event should have ordered runs in the wrong order with some priority. The wait
    numbered `ignored` does nothing.
    """

    def __init__(self, priority: tuple[int, ...] = (), ignored: int | None = None) -> None:
        self.queues: list[deque[Callable[[], object] | _Event]] = []
        self.priority, self.ignored = priority, ignored
        self.waits = self.captures = 0
        self.current: Any = None

    def queue(self) -> type:
        machine = self

        class Queue:
            def __init__(self, idle: bool = False) -> None:
                self.work: deque[Callable[[], object] | _Event] = deque()
                self.idle = idle
                if not idle:
                    machine.queues.append(self.work)

            @classmethod
            def new(cls, device: torch.device) -> Queue:
                return cls()

            @classmethod
            def current(cls, device: torch.device) -> Queue:
                if device.index != 0:
                    return cls(idle=True)
                if machine.current is None:
                    machine.current = cls()
                return machine.current  # type: ignore[no-any-return]

            def issue(self, work: Callable[[], object], receiver: Any = None) -> None:
                self.work.append(work)

            def record(self) -> _Event:
                event = _Event(machine)
                event.happened = self.idle
                self.work.append(event.happen)
                return event

            def wait(self, event: _Event) -> None:
                if machine.waits != machine.ignored:
                    self.work.append(event)
                machine.waits += 1

            def captured(self, work: Callable[[], object]) -> Callable[[], object]:
                machine.captures += 1
                work()
                return work

        return Queue

    def run(self, until: _Event | None = None) -> None:
        """All work, or that before an event."""
        listed = [self.queues[i] for i in self.priority if i < len(self.queues)]
        order = [queue for i, queue in enumerate(self.queues) if i not in self.priority] + listed
        while any(order) and not (until and until.happened):
            ready = [q for q in order if q and not (isinstance(q[0], _Event) and not q[0].happened)]
            assert ready, "queues wait for each other"
            first = ready[0].popleft()
            if not isinstance(first, _Event):
                first()


@pytest.fixture
def made_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are NaN until they are written."""
    packet = pieces.Wire.packet

    def filled(self: pieces.Wire, size: tuple[int, ...]) -> pieces.Packet:
        made = packet(self, size)
        made.flat.fill_(torch.nan)
        return made

    monkeypatch.setattr(pieces.Wire, "packet", filled)


def run_late(machine: Machine, net: DeployedParNet, monkeypatch: pytest.MonkeyPatch, trunk: str) -> list[Tensor]:
    """Results of three calls from three streams, issued one right behind the other."""
    monkeypatch.setitem(queues.QUEUES, "cpu", machine.queue())
    parallel = on_cpus(net, trunk=trunk, streams=[[0], [1], [2]])
    results = []
    for seed in range(3):
        machine.current = None  # another stream of the caller's
        results.append(parallel(images(CONFIG, seed, 1, 8, 8)))
    machine.run()
    return results


@pytest.mark.usefixtures("made_of_nan")
@pytest.mark.parametrize("trunk", ["recompute", "send"])
def test_late_work_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, trunk: str) -> None:
    net = network(CONFIG)
    expected = [net(images(CONFIG, seed, 1, 8, 8)) for seed in range(3)]
    for priority in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0)):
        machine = Machine(priority)
        assert all(map(same_bits, run_late(machine, net, monkeypatch, trunk), expected))
        assert machine.captures == 5  # at the second call: trunk, rest and fusion, and each other device's


@pytest.mark.usefixtures("made_of_nan")
@pytest.mark.parametrize("trunk", ["recompute", "send"])
def test_events_order_all_that_crosses_devices(monkeypatch: pytest.MonkeyPatch, trunk: str) -> None:
    """Whatever the queues' priority; and each wait is needed. With little sums in the place of layers."""

    def write(self: Any, wire: Any, given: Any, layers: Any, results: Any) -> None:
        read = [getattr(m, "map", m).double().mean() for m in given.values()]
        for i, (name, packet) in enumerate(results.items()):
            packet.flat.fill_(float(sum(read)) + i + sum(map(ord, name)))

    def finish(self: Any, wire: Any, ends: Any, layers: Any, like: Tensor, result: str) -> Tensor:
        values = [weight * packet.flat.double().mean() for weight, packet in enumerate(ends.values(), 1)]
        return torch.stack(values).sum().expand(1, 5)

    monkeypatch.setattr(pieces.Pieces, "write", write)
    monkeypatch.setattr(pieces.Pieces, "finish", finish)
    net = network(CONFIG)
    expected = run_late(Machine(), net, monkeypatch, trunk)
    assert len({float(y[0, 0]) for y in expected}) == 3
    priorities = [*itertools.permutations(range(5))]  # device 1 and its port, 2 and its port, the first caller

    def right(priority: tuple[int, ...], ignored: int | None = None) -> bool:
        return all(map(same_bits, run_late(Machine(priority, ignored), net, monkeypatch, trunk), expected))

    assert all(map(right, priorities))
    before = 2  # waits for the buffers' memory, which nobody else uses here
    # Each of the first call, and what the third waits for first: the end of the second.
    for ignored in (*range(before, before + 8), before + 8 + 1 + 8):
        assert not all(right(priority, ignored) for priority in priorities), ignored


def test_cuda_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch.cuda, in order."""
    log: list[str] = []

    class Stream:
        def __init__(self, device: object) -> None:
            self.device = device

        def __repr__(self) -> str:
            return f"stream on {self.device}"

        def wait_stream(self, other: object) -> None:
            log.append(f"{self} waits for {other}")

    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        log.append(f"({name}")
        yield
        log.append(")")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: context(str(s)))
    monkeypatch.setattr(torch.cuda, "device", lambda d: context(str(d)))
    monkeypatch.setattr(torch.cuda, "graph", lambda g, stream: context(f"graph on {stream}"))
    a, b = (queues.CudaQueue.new(torch.device("cuda", i)) for i in range(2))
    a.issue(lambda: log.append("copy"), b)
    # The sender's device is the current one while it copies, and both current streams are those of the queues.
    assert log == ["(stream on cuda:1", "(stream on cuda:0", "copy", ")", ")"]
    log.clear()
    replay = b.captured(lambda: log.append("work"))
    side = "stream on cuda:1"
    warm = [f"{side} waits for {side}", f"({side}", "work", ")"]
    assert log == [*warm, "(cuda:1", f"(graph on {side}", "work", ")", ")"]
    log.clear()
    b.issue(replay)
    assert log == ["(None", f"({side}", "replay", ")", ")"]

    monkeypatch.setattr(queues, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="a DeviceParallel has graphs of its own: it cannot be captured into one"):
        queues.CudaQueue.current(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("trunk", ["recompute", "send"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_on_gpus(dtype: torch.dtype, trunk: str) -> None:
    net = network(ParNetConfig((32, 64, 96, 128), (3, 3, 3), num_classes=10))
    names = [f"cuda:{i}" for i in range(min(3, torch.cuda.device_count()))]
    parallel = DeviceParallel(copy.deepcopy(net).to(names[0], dtype), names, trunk=trunk)
    allowed = 5e-3 if dtype == torch.float16 else 1e-4
    for n, h, w in ((1, 64, 64), (3, 65, 97), (1, 64, 64), (9, 32, 40)):
        for seed in range(4):  # eager, captured, replayed twice; the host does not wait in between
            x = images(net.config, seed, n, h, w)
            with torch.cuda.stream(torch.cuda.Stream(names[0])):
                y = parallel(x.to(names[0], dtype))
                assert error(y.cpu(), net.double()(x.double())) <= allowed
