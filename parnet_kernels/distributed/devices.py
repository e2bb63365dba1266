"""The streams of one network on several devices of one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from parnet_kernels.config import Layer
from parnet_kernels.cuda.backend import packed_of
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.distributed.agreement import adjacent
from parnet_kernels.distributed.cost import Device, Link, Model, Placement
from parnet_kernels.distributed.pieces import Packet, Pieces, Wire
from parnet_kernels.distributed.placements import Placements, require
from parnet_kernels.distributed.probe import probe_devices
from parnet_kernels.distributed.queues import QUEUES, Event, Queue, Work
from parnet_kernels.locks import Lock
from parnet_kernels.precision import current_precision
from parnet_kernels.selection import forced_backend
from parnet_kernels.whole import WholeNetwork

MAX_PLANS = 8  # that are kept, with their buffers and graphs


class DeviceParallel:
    """A deployed network whose streams run side by side on several CUDA devices of this process; the first, where the
    network is, runs the fusion. Images may have another size and number at each call; they come from the first device,
    where the result will be, in the order of its current stream.

    Each device has packed weights of its own layers only, copied there when they are first needed, and again after
    changes. A call issues each device's work on a stream of its own; maps travel by peer copies. From the second call
    with a shape on, each device replays CUDA graphs. It may be called from several threads and streams, one after the
    other.

    CPU devices, "cpu:0", "cpu:1", …, are for trying things out: they do their work one after the other, and the result
    has the bits of `network(x)`.

    Args:
        network: on the first device; may be changed between calls.
        devices: 1 to `streams`, all CUDA devices, such as ["cuda:0", "cuda:1"], or all CPU devices.
        streams: for each device, the numbers of its streams; None: whichever the cost model finds fastest.
        trunk: "recompute": every device starts from the image; "send": the others start from the first one's maps;
            "auto": whichever the cost model finds faster for these images.
        graphs: whether CUDA graphs are made, for the 8 shapes that were used last.
        costs: constants of the cost model; None: measured now, for a tenth of a second.

    Raises:
        ValueError: for arguments that cannot be, named.
    """

    def __init__(
        self,
        network: DeployedParNet,
        devices: Sequence[str | int | torch.device],
        *,
        streams: Sequence[Sequence[int]] | None = None,
        trunk: str = "auto",
        graphs: bool = True,
        costs: tuple[Device, Link] | None = None,
    ) -> None:
        require(isinstance(network, DeployedParNet), "network", "be a DeployedParNet", type(network).__name__)
        self.network, self.devices = network, _checked(devices, network.config.streams)
        self.names = [str(device) for device in self.devices]
        world = len(self.devices)
        self._placements = Placements(network.config, world, "devices", streams, trunk, image_sent=True)
        self._graphs = graphs
        self._whole(torch.is_grad_enabled())
        self.costs = costs or probe_devices(self.devices, network.head_weight.dtype)
        make = QUEUES[self.devices[0].type].new
        #: Of each other device: where its layers run, and its port on the first device, where maps leave and arrive.
        self._queues = [(make(device), make(self.devices[0])) for device in self.devices[1:]]
        self._of: WholeNetwork | None = None
        self._pieces: list[Pieces] = []
        self._plans: dict[object, _Plan] = {}
        self._lock = Lock()

    def __reduce__(self) -> NoReturn:
        raise TypeError("parnet_kernels: a DeviceParallel belongs to its process: it can be neither copied nor pickled")

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, in_chans, H, W] ([N, P] without a classifier).

        Raises:
            ValueError: wrong images; a network with hooks or replaced layers, or whose weights need gradients.
            RuntimeError: a CUDA graph cannot be made; or the call itself is being captured.
        """
        return self._run(x, "logits" if self.network.num_classes else "pooled", torch.is_grad_enabled())

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [N, P, ⌈H/32⌉, ⌈W/32⌉] in the ImageNet variants. Raises as a call does."""
        return self._run(x, "features", torch.is_grad_enabled())

    def placement(self, shape: Sequence[int]) -> Placement:
        """What runs where for images of this shape [N, in_chans, H, W]; `names` are the places."""
        itemsize = self.network.head_weight.element_size()
        sent = max(4, itemsize) if self.devices[0].type == "cpu" else itemsize
        return self._placements.best(shape, itemsize, sent, self.costs)

    # ------------------------------------------------------------------ a call

    def _whole(self, grad: bool) -> WholeNetwork:
        """The network as it is now."""
        with torch.set_grad_enabled(grad):
            found = self.network.whole()
        if isinstance(found, str):
            raise ValueError(f"parnet_kernels: `network` cannot be cut into streams: {found}")
        at, first = self.network.head_weight.device, self.devices[0]
        there = at.type == first.type and (first.type == "cpu" or at == first)
        require(there, "network", f"be on the first device, {first}", at)
        return found

    def _check(self, x: Any, grad: bool) -> None:
        self.network._check(x)
        shape = f"be a dense tensor [N, {self.network.config.in_chans}, H, W], H and W ≥ 1"
        fits = type(x) is Tensor and x.dim() == 4 and 0 not in x.shape[1:] and x.layout is torch.strided
        require(fits, "x", shape, f"{list(x.shape)}, {x.layout}")
        dtype = self.network.head_weight.dtype
        require(x.dtype == dtype, "x", f"have the network's dtype, {dtype}", x.dtype)
        require(not (grad and x.requires_grad), "x", "need no gradient: streams on several devices have none", "one")
        on = torch.is_autocast_enabled(x.device.type)
        require(not on, "x", "come without autocast: convert the network and the images instead", "autocast that is on")

    @torch.inference_mode(False)  # which turns gradients on
    def _run(self, x: Tensor, result: str, grad: bool) -> Tensor:
        with self._lock, torch.no_grad():
            found = self._whole(grad)
            self._check(x, grad)
            if len(self.devices) == 1:
                return self.network.forward_features(x) if result == "features" else self.network(x)
            if self._of is not found:
                self._forget()
                self._of = found
                self._pieces = [Pieces(self.network), *(Pieces(self.network, device) for device in self.devices[1:])]
            first = QUEUES[self.devices[0].type].current(self.devices[0])
            wire = self._pieces[0].wire(x)
            key = tuple(x.shape), adjacent(x), wire, result, forced_backend(), current_precision()
            plan = self._plans.pop(key, None)
            try:
                if plan is None:
                    if len(self._plans) >= MAX_PLANS:
                        self._plans.pop(next(iter(self._plans))).end()
                    plan = self._plan(x, wire, result)
                elif self._graphs:
                    plan.capture(first, self._queues)
                y = plan.run(x, first, self._queues)
            except BaseException:  # what was issued may be half of a call
                for queue in (first, *(queue for pair in self._queues for queue in pair)):
                    queue.record().synchronize()
                raise
            self._plans[key] = plan  # the last one
            return y

    def _forget(self) -> None:
        """All that was made of a network that has changed."""
        for plan in self._plans.values():
            plan.end()
        self._plans.clear()
        self._pieces.clear()

    def _plan(self, x: Tensor, wire: Wire, result: str) -> _Plan:
        model, placement = Model(self.network.config, x.shape), self.placement(x.shape)
        others = zip(self.devices[1:], self._pieces[1:], strict=True)
        wires = [wire, *(pieces.wire(x)._replace(device=device) for device, pieces in others)]
        for (own, _), device in zip(self._queues, self.devices[1:], strict=True):
            # The buffers' memory may be in use by what the current streams were given.
            own.wait(QUEUES[device.type].current(device).record())
        return _Plan(self._pieces, wires, model, placement, x, result)


class _Branch(NamedTuple):
    """One of the other devices' part in a call: copies there, work, copies back; each copy (from, to)."""

    there: tuple[Tensor, Tensor]
    back: list[tuple[Tensor, Tensor]]


class _Plan:
    """Buffers and work of calls on images of one shape."""

    def __init__(
        self, pieces: list[Pieces], wires: list[Wire], model: Model, placement: Placement, x: Tensor, result: str
    ) -> None:
        first, wire, cut = pieces[0], wires[0], model.cut
        as_given = [Wire(False, x.dtype, adjacent(x), each.device) for each in wires]

        def packets(names: Iterable[str], wire: Wire, made: Mapping[str, Packet] | None = None) -> dict[str, Packet]:
            """Buffers for maps; a stream without blocks ends with one that is `made` already."""
            return {name: made[name] if made and name in made else wire.packet(model.size[name]) for name in names}

        def work(i: int, given: Mapping[str, Tensor | Packet], layers: list[Layer], ends: Mapping[str, Packet]) -> Work:
            return partial(pieces[i].write, wires[i], given, layers, {n: p for n, p in ends.items() if n not in given})

        self._pieces = pieces
        self._image = as_given[0].packet(model.size["image"])
        begun, names = model.shared_trunk(placement)
        image: dict[str, Tensor | Packet] = {"image": self._image.map}
        sources = packets(names, wire)
        own_ends = packets([cut.ends[s] for s in placement.streams[0]], wire, sources)
        self._branches: list[_Branch] = []
        self._works: list[Work] = [
            work(0, image, cut.trunk_between(0, begun), sources),
            work(0, {**sources} if sources else image, model.rest(placement), own_ends),
        ]
        ends = dict(own_ends)
        for i in range(1, len(pieces)):
            start, own = placement.starts[i], placement.streams[i]
            name = "image" if start is None else cut.sources[start]
            sent, there = (self._image, as_given[i]) if start is None else (sources[name], wires[i])
            begin = there.packet(model.size[name])
            made = packets([cut.ends[s] for s in own], wires[i], {name: begin})
            self._works.append(work(i, {name: begin.map if start is None else begin}, model.chain(own, start), made))
            arriving = packets(made, wire)
            back = [(made[end].flat, arriving[end].flat) for end in made]
            self._branches.append(_Branch((sent.flat, begin.flat), back))
            ends |= arriving
        layout = torch.channels_last if wire.channels_last else torch.contiguous_format
        like = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=layout)
        n, features, h, w = model.size[cut.every()[-1].name]
        if result == "features":
            self._out = torch.empty((n, features, h, w), dtype=x.dtype, device=x.device, memory_format=layout)
        else:
            width = first.network.num_classes if result == "logits" else features
            self._out = torch.empty(n, width, dtype=x.dtype, device=x.device)

        def fusion() -> None:
            self._out.copy_(first.finish(wire, ends, cut.fusion, like, result))

        self._works.append(fusion)
        self._captured, self._done, self._held = False, None, []

    _done: Event | None
    _held: list[object]

    def capture(self, first: Queue, queues: Sequence[tuple[Queue, Queue]]) -> None:
        """Makes the work of each device a graph, once."""
        if self._captured or not self._image.map.numel():
            return
        self.end()
        on = [first, first, *(queue for queue, _ in queues), first]
        try:
            self._works = [queue.captured(work) for queue, work in zip(on, self._works, strict=True)]
        except RuntimeError as error:
            raise RuntimeError(
                f"parnet_kernels: no CUDA graph can be made (`graphs=False` does without): {error}"
            ) from error
        self._held = [kept for piece in self._pieces for kept in packed_of(piece.weights())]
        self._captured = True

    def run(self, x: Tensor, first: Queue, queues: Sequence[tuple[Queue, Queue]]) -> Tensor:
        trunk, rest, *chains, fusion = self._works
        if self._done is not None:  # its buffers are read until then, on whatever stream
            first.wait(self._done)
        first.issue(lambda: self._image.map.copy_(x))
        first.issue(trunk)
        begun = first.record()
        arrivals = []
        for (own, port), branch, chain in zip(queues, self._branches, chains, strict=True):
            port.wait(begun)
            _send(port, own, *branch.there)
            own.issue(chain)
            for source, target in branch.back:
                _send(own, port, source, target)
            arrivals.append(port.record())
        first.issue(rest)
        for arrival in arrivals:
            first.wait(arrival)
        first.issue(fusion)
        y = torch.empty_like(self._out)
        first.issue(lambda: y.copy_(self._out))
        self._done = first.record()
        return y

    def end(self) -> None:
        """Waits until the buffers are free."""
        if self._done is not None:
            self._done.synchronize()


def _send(sender: Queue, receiver: Queue, source: Tensor, target: Tensor) -> None:
    sender.issue(lambda: target.copy_(source, non_blocking=True), receiver)
    receiver.wait(sender.record())


def _checked(devices: Sequence[str | int | torch.device], streams: int) -> list[torch.device]:
    """The devices with their numbers."""
    several = isinstance(devices, Sequence) and not isinstance(devices, str) and len(devices) > 0
    require(several, "devices", 'be a list such as ["cuda:0", "cuda:1"]', repr(devices))
    found = []
    for device in devices:
        try:
            made = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"parnet_kernels: `devices` must be devices, got {device!r}: {error}") from error
        require(made.type in QUEUES, "devices", "be CUDA devices, or CPU devices", made)
        if made.type == "cuda":
            count = torch.cuda.device_count()
            here = f"be CUDA devices of this machine, which has {count} that PyTorch can use"
            require(count > (made.index or 0), "devices", here, made)
            made = torch.device("cuda", torch.cuda.current_device() if made.index is None else made.index)
        found.append(torch.device(made.type, made.index or 0))
    named = ", ".join(map(str, found))
    require(len({device.type for device in found}) == 1, "devices", "be of one kind", named)
    require(len({*found}) == len(found), "devices", "be different ones", named)
    require(len(found) <= streams, "devices", f"be at most {streams}, one a stream", named)
    return found
