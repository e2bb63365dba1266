"""The streams of one network on several ranks of torch.distributed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from math import prod
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from parnet_kernels.checks import is_channels_last
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.distributed.agreement import Agreement, adjacent, flat, packet_of
from parnet_kernels.distributed.cost import Device, Link, Model, Placement
from parnet_kernels.distributed.peers import BESIDE_BYTES, GRACE, MESSAGE_BYTES, Broken, DistributedError, Peers, Posted
from parnet_kernels.distributed.pieces import Packet, Pieces, Wire
from parnet_kernels.distributed.placements import Placements, require
from parnet_kernels.distributed.probe import probe
from parnet_kernels.locks import Lock

RESULT = ("every", "first")
GRACE_AFTER = 0.1  # for the other ranks when one was lost: a share of the time-out


class StreamParallel:
    """A deployed network whose streams run side by side on the ranks of a process group; rank 0 runs the fusion.

    Every rank makes one of the same network at the same time, and calls it as often: `parallel(x)`. On CPUs the result
    has the bits of `network(x)` in one process. Images may have another size and number at each call.

    Args:
        network: with the same weights on every rank; may be changed between calls, on all ranks alike.
        group: of 1 to `streams` ranks; None: all.
        streams: for each rank, the numbers of its streams; None: whichever the cost model finds fastest.
        trunk: "recompute": every rank starts from the image; "send": the others start from rank 0's maps; "auto":
            whichever the cost model finds faster for these images.
        source: None: every rank has the images; 0: rank 0 has, and sends them (the others call with None).
        result: which ranks get it, "every" or "first" (rank 0; the others get None).
        costs: constants of the cost model; None: measured now, on all ranks, for a tenth of a second.
        timeout: seconds until a rank that does not answer is an error on all ranks.

    Raises:
        ValueError: for arguments that cannot be.
        DistributedError: for a rank that does not come, or has other weights, settings or another version.
    """

    def __init__(
        self,
        network: DeployedParNet,
        group: dist.ProcessGroup | None = None,
        *,
        streams: Sequence[Sequence[int]] | None = None,
        trunk: str = "auto",
        source: int | None = None,
        result: str = "every",
        costs: tuple[Device, Link] | None = None,
        timeout: float = 10.0,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "parnet_kernels: StreamParallel needs a process group: start the program by `torchrun` and call "
                "torch.distributed.init_process_group first"
            )
        world = dist.get_world_size(group)
        if dist.get_rank(group) < 0:
            raise ValueError("parnet_kernels: `group` must contain this rank")
        require(isinstance(network, DeployedParNet), "network", "be a DeployedParNet", type(network).__name__)
        count = network.config.streams
        require(world <= count, "group", f"have at most {count} ranks, one a stream", f"{world} ranks")
        require(result in RESULT, "result", f"be one of {RESULT}", repr(result))
        require(source in (None, 0), "source", "be None or 0", repr(source))
        require(timeout > 0, "timeout", "be > 0 seconds", timeout)
        self._placements = Placements(network.config, world, "ranks", streams, trunk, source is not None)
        streams = self._placements.streams
        self.network, self.timeout = network, timeout
        self._group, self._streams, self._trunk, self._source, self._result = group, streams, trunk, source, result
        self._given_costs = costs
        self._pieces = Pieces(network)
        self._agreement = Agreement(self._pieces, source)
        self._pending: list[Posted] = []
        self._broken: str | None = None
        self._lock, self._pid = Lock(), os.getpid()
        self._connect()

    def _connect(self) -> None:
        reason = self._pieces.why_not()
        hello: dict[str, object] = {"network": f"cannot be cut into streams: {reason}" if reason else "can be cut"}
        hello |= self._agreement.hello()
        hello |= {name: getattr(self, f"_{name}") for name in ("streams", "trunk", "source", "result")}
        hello |= {"timeout": self.timeout, "costs": repr(self._given_costs)}
        self._peers = Peers(self._group, self.timeout, hello, self.network.head_weight.device)
        if reason:
            self._peers.close()
            raise ValueError(f"parnet_kernels: `network` cannot be cut into streams: {reason}")
        self.rank, self.world = self._peers.rank, self._peers.world
        self._broken = None
        try:
            self.costs = self._given_costs or probe(self._peers, self._device, self.network.head_weight.dtype)
        except Broken as error:
            self._break(error)

    # ------------------------------------------------------------------ life

    def close(self) -> None:
        """Ends the connections of this rank. The process group stays."""
        if os.getpid() == self._pid:
            self._peers.close()
        self._broken = "it was closed"

    def reconnect(self) -> None:
        """Connects the ranks anew, all at the same time: after an error that broke the connections.

        Raises:
            DistributedError: as when it was made.
        """
        with self._lock:
            self.close()
            self._pending.clear()
            self._connect()

    def __enter__(self) -> StreamParallel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("parnet_kernels: a StreamParallel belongs to its process: it can be neither copied nor pickled")

    def _break(self, error: DistributedError) -> NoReturn:
        self._peers.close()
        self._broken = str(error).removeprefix("parnet_kernels: ")
        raise error

    # ------------------------------------------------------------------ calls

    def __call__(self, x: Tensor | None) -> Tensor | None:
        """Logits [N, classes] of images [N, in_chans, H, W] ([N, P] without a classifier); None on ranks without a
        result.

        Raises:
            DistributedError: on every rank: images that are wrong, missing or not the same on all ranks, changed
                weights, a rank that broke off or does not answer. After the last two `reconnect` is needed.
            RuntimeError: after one that was not reconnected, or in a forked process.
        """
        return self._run(x, "logits" if self.network.num_classes else "pooled", torch.is_grad_enabled())

    def forward_features(self, x: Tensor | None) -> Tensor | None:
        """The last map, [N, P, ⌈H/32⌉, ⌈W/32⌉] in the ImageNet variants. Raises as a call does."""
        return self._run(x, "features", torch.is_grad_enabled())

    def placement(self, shape: Sequence[int]) -> Placement:
        """What runs where for images of this shape [N, in_chans, H, W]."""
        itemsize = self.network.head_weight.element_size()
        return self._placements.best(shape, itemsize, max(4, itemsize), self.costs)

    @torch.inference_mode(False)  # which turns gradients on
    def _run(self, x: Tensor | None, result: str, grad: bool) -> Tensor | None:
        if os.getpid() != self._pid:
            raise RuntimeError("parnet_kernels: a StreamParallel cannot be used in a forked process: make one there")
        with self._lock:
            if self._broken:
                raise RuntimeError(f"parnet_kernels: StreamParallel needs `reconnect()`: {self._broken}")
            with torch.no_grad():
                if self.world == 1:
                    return self._alone(x, result, grad)
                try:
                    return (self._first if self.rank == 0 else self._other)(x, result, grad)
                except Broken as error:
                    self._break(error)
                except DistributedError:
                    raise
                except BaseException as error:
                    # What the other ranks wait for will not come: for them this rank broke off.
                    self._peers.close()
                    self._broken = f"a call was interrupted by {type(error).__name__}: {error}"
                    raise

    def _alone(self, x: Tensor | None, result: str, grad: bool) -> Tensor:
        if reason := self._agreement.why_not(x, grad):
            raise DistributedError(0, reason)
        assert x is not None
        return self.network.forward_features(x) if result == "features" else self.network(x)

    def _deadline(self, share: float = 1.0) -> float:
        return time.monotonic() + share * self.timeout

    # ------------------------------------------------------------------ rank 0
    # Both ranks of a pair post their messages in one order: the plan of a call and what it sends; what the other rank
    # says and its maps; the verdict and the result.

    def _first(self, x: Tensor | None, result: str, grad: bool) -> Tensor:
        lost: list[Broken] = []
        for posted in self._pending:  # of the call before
            try:
                posted.wait(self._deadline())
            except Broken as error:
                lost.append(error)
        self._pending.clear()
        return self._lead(x, result, grad, lost)

    def _tell_error(self, other: int, error: DistributedError, broken: bool = False) -> Posted:
        verdict = {"error": error.reason, "rank": error.rank, "broken": broken}
        return self._peers.tell(other, verdict, "the verdict", _beside(None))

    def _lead(self, x: Tensor | None, result: str, grad: bool, lost: list[Broken]) -> Tensor:
        peers, others, deadline = self._peers, self._peers.others, self._deadline(GRACE)
        errors: dict[int, str] = {}
        made: dict[str, Packet] = {}
        listening: dict[int, Posted] = {}
        about: dict[str, Any] = {}
        if reason := lost[0].reason if lost else self._agreement.why_not(x, grad):
            errors[0] = reason
            for rank in others:
                self._post(peers.tell(rank, {"error": reason}, "the plan"))
                listening[rank] = peers.listen(rank, "its streams")
        else:
            assert x is not None
            x, wire = x.detach(), self._pieces.wire(x)
            model, placement = Model(self.network.config, x.shape), self.placement(x.shape)
            about = self._agreement.about(x, wire, result)
            image = packet_of(x) if self._source is not None else None
            for rank in others:
                start = placement.starts[rank]
                plan = {"about": about, "start": start, "streams": placement.streams[rank], "adjacent": adjacent(x)}
                self._post(peers.tell(rank, plan, "the plan"))
                if start is None and image is not None:
                    self._post(peers.send(rank, image.flat, "the images"))
            given = self._trunk_for_others(x, wire, placement, model, errors)
            for rank in others:
                listening[rank] = peers.listen(rank, "its streams")
            if not errors:
                try:
                    ends = {model.cut.ends[s]: model.size[model.cut.ends[s]] for s in placement.streams[0]}
                    made = self._pieces.run(wire, given, model.rest(placement), ends)
                except Exception as error:  # told to the others, and raised with theirs
                    errors[0] = _failure(error)
        for rank, posted in listening.items():
            try:
                heard = peers.heard(posted, deadline)
                sent = self._receive_maps(rank, heard, deadline)
            except Broken as error:  # the others are heard all the same: the order of messages stays
                lost.append(error)
                deadline = max(deadline, self._deadline(GRACE_AFTER))
                continue
            if "error" in heard:
                errors[rank] = heard["error"]
                continue
            there = heard["about"]
            if not errors and there != about:
                name = next(name for name in about if about[name] != there[name])
                errors[rank] = f"has another {name} than rank 0: {there[name]}, not {about[name]}"
            made |= sent
        if lost:
            self._end_without(lost[0])
        if not errors:
            assert x is not None
            try:
                ends_of_all = {name: made[name] for name in model.cut.ends}
                y = self._pieces.finish(wire, ends_of_all, model.cut.fusion, x, result)
            except Exception as error:
                errors[0] = _failure(error)
        if errors:
            first = DistributedError(*min(errors.items()))
            for other in others:
                self._post(self._tell_error(other, first))
            raise first
        last = y.dim() == 4 and is_channels_last(y)
        values = flat(y, last)
        small = y.is_cpu and values.numel() * values.element_size() <= BESIDE_BYTES
        beside = values.view(torch.uint8) if small else None
        verdict = {"shape": [*y.shape], "stride": y.stride(), "beside": beside is not None}
        for other in others:
            self._post(peers.tell(other, verdict, "the verdict", _beside(beside)))
            if self._result == "every" and beside is None:
                self._post(peers.send(other, values, "the result"))
        return y

    def _receive_maps(self, rank: int, heard: dict[str, Any], deadline: float) -> dict[str, Packet]:
        if "error" in heard:
            return {}
        theirs = Wire(heard["native"], getattr(torch, heard["dtype"]), heard["last"], self._device)
        sent = {name: theirs.packet(tuple(size)) for name, size in heard["maps"]}
        for each in [self._peers.receive(rank, packet.flat, "its maps") for packet in sent.values()]:
            each.wait(deadline)
        return sent

    def _end_without(self, error: Broken) -> NoReturn:
        """Tells the ranks that are left which one was lost, as long as they may be waiting for a verdict."""
        last = self._deadline(1 - GRACE)
        told = [self._tell_error(other, error, broken=True) for other in self._peers.others if other != error.rank]
        for posted in told:
            with contextlib.suppress(Broken):
                posted.wait(last)
        raise error

    def _trunk_for_others(
        self, x: Tensor, wire: Wire, placement: Placement, model: Model, errors: dict[int, str]
    ) -> dict[str, Tensor | Packet]:
        """Runs the trunk as far as others start from its maps, and sends these. Returns the maps that this rank goes on
        from.
        """
        begun, names = model.shared_trunk(placement)
        if begun < 0:
            return {"image": x}
        cut, wanted = model.cut, {name: model.size[name] for name in names}
        try:
            sources = self._pieces.run(wire, {"image": x}, cut.trunk_between(0, begun), wanted)
        except Exception as error:  # the others wait for the maps all the same: the order of messages stays
            errors[0] = _failure(error)
            sources = {name: wire.packet(size) for name, size in wanted.items()}
        for rank, start in enumerate(placement.starts):
            if start is not None:
                self._post(self._peers.send(rank, sources[cut.sources[start]].flat, "a map of the trunk"))
        return {**sources}

    @property
    def _device(self) -> torch.device:
        return self.network.head_weight.device

    def _post(self, posted: Posted) -> None:
        """Under way; waited for at the next call."""
        self._pending.append(posted)

    # ------------------------------------------------------------------ the others

    def _other(self, x: Tensor | None, result: str, grad: bool) -> Tensor | None:
        peers, deadline = self._peers, self._deadline()
        listening = peers.listen(0, "the plan")
        made: dict[str, Packet] = {}
        reason = self._agreement.why_not(x, grad) if self._source is None or x is not None else None
        early = None
        if self._source is None and reason is None:
            assert x is not None
            own = self.placement(x.shape)
            if own.starts[self.rank] is None:  # as the plan will say, if rank 0 has images of this shape
                early = own.streams[self.rank]
                made, reason = self._try_streams(x.detach(), self._pieces.wire(x), early, None)
        plan = peers.heard(listening, deadline)
        if "error" not in plan:
            about, start = plan["about"], plan["start"]
            model = Model(self.network.config, about["shape of the images"])
            dtype = getattr(torch, about["dtype of the images"].removeprefix("torch."))
            last, native = about["layout of the images"][0], about["way to run layers"] == "native kernels"
            theirs = Wire(native, dtype, last, self._device)
            image = Wire(False, dtype, plan["adjacent"], self._device).packet(model.size["image"])
            packet = None
            if start is not None:
                packet = theirs.packet(model.size[model.cut.sources[start]])
                peers.receive(0, packet.flat, "a map of the trunk").wait(deadline)
            elif self._source is not None:
                peers.receive(0, image.flat, "the images").wait(deadline)
            if self._source is not None and reason is None:
                if x is not None and x.shape != image.map.shape:
                    reason = f"has images of shape {[*x.shape]}, rank 0 sent {[*image.map.shape]}"
                x = image.map  # where the streams start from maps, what it stands for is shape and layout
                reason = reason or self._agreement.why_not(x, grad)
            if reason is None:
                assert x is not None
                wire = self._pieces.wire(x)
                if self._source is not None:
                    wire = wire._replace(channels_last=last)
                own_about = self._agreement.about(x, wire, result)
                if about != own_about:
                    made = {}  # rank 0 compares too, and names what differs
                elif early != tuple(plan["streams"]):
                    made, reason = self._try_streams(x.detach(), wire, plan["streams"], start, packet)
        else:
            made, reason = {}, reason or "was told of an error"
        if reason is None:
            maps = [(name, [*packet.map.shape]) for name, packet in made.items()]
            told: dict[str, Any] = {"about": own_about, "native": wire.native, "last": wire.channels_last, "maps": maps}
            told["dtype"] = str(wire.dtype).removeprefix("torch.")
        else:
            told, made = {"error": reason}, {}
        posted = [peers.tell(0, told, "the plan"), *(peers.send(0, p.flat, "its fusion") for p in made.values())]
        hearing = peers.listen(0, "the verdict", BESIDE_BYTES)
        verdict = peers.heard(hearing, self._deadline())
        if "error" in verdict:
            kind = Broken if verdict["broken"] else DistributedError
            raise kind(verdict["rank"], verdict["error"])
        for each in posted:
            each.wait(self._deadline())
        if self._result == "first":
            return None
        y = torch.empty(prod(verdict["shape"]), dtype=self.network.head_weight.dtype, device=self._device)
        if verdict["beside"]:
            beside = hearing.wait(self._deadline())[MESSAGE_BYTES:]
            y.view(torch.uint8).copy_(beside[: y.numel() * y.element_size()])
        else:
            peers.receive(0, y, "the result").wait(self._deadline())
        return y.as_strided(verdict["shape"], verdict["stride"])

    def _try_streams(
        self, x: Tensor, wire: Wire, own: Sequence[int], start: int | None, packet: Packet | None = None
    ) -> tuple[dict[str, Packet], str | None]:
        """The maps where these streams end, or what went wrong."""
        try:
            model = Model(self.network.config, x.shape)
            given: dict[str, Tensor | Packet] = {"image": x}
            if start is not None:
                assert packet is not None
                given = {model.cut.sources[start]: packet}
            wanted = {model.cut.ends[s]: model.size[model.cut.ends[s]] for s in own}
            return self._pieces.run(wire, given, model.chain(own, start), wanted), None
        except Exception as error:  # told to all ranks
            return {}, _failure(error)


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error)[:300]}"


def _beside(data: Tensor | None) -> Tensor:
    """What travels beside a verdict, filled up."""
    room = torch.zeros(BESIDE_BYTES, dtype=torch.uint8, device="cpu")
    if data is not None:
        room[: data.numel()] = data
    return room
