"""A deployed network on the CUDA kernels: a launch a level and one for the classifier, recorded once for each shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parnet_kernels import whole
from parnet_kernels.checks import is_channels_last
from parnet_kernels.config import Layer, ParNetConfig, layers, levels
from parnet_kernels.cuda.backend import tensor_missing
from parnet_kernels.cuda.pack import Layout, PackedLayer, PackedStem, fits_stem, pack, pack_stem
from parnet_kernels.cuda.plan import Gpu
from parnet_kernels.cuda.program import math_of, play
from parnet_kernels.cuda.record import RESULT, Map, Recorder, Step
from parnet_kernels.cuda.workspace import Packed, allocate, capturing, workspace
from parnet_kernels.locks import Lock
from parnet_kernels.precision import current_precision
from parnet_kernels.whole import WholeNetwork

IMAGE = RESULT + 1
MAX_SHAPES = 128  # whose programs are kept


class Weights(NamedTuple):
    """The packed layers of a network in order of execution, and all their tensors in the order of buffers."""

    layers: list[PackedLayer | PackedStem]
    first_buffer: list[int]  # of each layer, counted from the first packed tensor
    tensors: list[Tensor]
    shared: Packed | None = None  # None: packed for one call


class Lowered(NamedTuple):
    """A network for one shape."""

    program: Tensor
    labels: list[str]
    workspace_bytes: int
    shape: tuple[int, ...]  # of the result, in memory


def layouts(config: ParNetConfig, dtype: torch.dtype) -> dict[str, Layout]:
    """Where each layer's channels are stored. A fusion keeps its groups apart unless a skip reads its result (or
    the map would grow): who reads it has the shuffle in its weights.
    """
    graph = layers(config)
    found = {"image": Layout.natural(config.in_chans, dtype)}
    for layer in graph:
        skipped = any(layer.name in reader.inputs for reader in graph if reader.kind == "repvgg_sse")
        natural, grouped = (make(layer.out_channels, dtype) for make in (Layout.natural, Layout.grouped))
        apart = layer.kind == "fusion_se" and not skipped and layer.out_channels % 2 == 0
        # The two inputs of a fusion share a pitch.
        found[layer.name] = grouped if apart and grouped.pitch == natural.pitch else natural
    return found


def pack_network(network: WholeNetwork, precision: str) -> Weights:
    config, dtype = network.config, network.head[0].dtype
    place = layouts(config, dtype)
    packed: list[PackedLayer | PackedStem] = []
    first: list[int] = []
    tensors: list[Tensor] = []
    for layer, arguments in network.operators():
        parameters: dict[str, Tensor | None] = dict(arguments)
        first.append(len(tensors))
        if layer.inputs == ("image",) and fits_stem(layer.kind, layer.in_channels):
            stem = pack_stem(layer.stride, config.activation, parameters, precision)
            packed.append(stem)
            tensors += stem[:3]
        else:
            inputs = tuple(place[name] for name in layer.inputs)
            body = pack(layer.kind, layer.stride, config.activation, parameters, inputs, precision)
            packed.append(body)
            tensors += body[:4]
    return Weights(packed, first, [*tensors, *(t.contiguous() for t in network.head)])


def lower(
    config: ParNetConfig,
    weights: Weights,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    precision: str,
    gpu: Gpu,
    result: str,
    aligned: bool = True,
) -> Lowered:
    """Records the network for an image of this shape; `aligned`: at a multiple of 16 bytes. result: "logits", "pooled"
    (channel means) or "features".
    """
    recorder = Recorder(math_of(dtype, precision), dtype, gpu)
    count = len(weights.layers)
    index = {layer.name: i for i, layer in enumerate(layers(config)[:count])}
    graded = [[layer for layer in level if layer.name in index] for level in levels(config)]
    graded = [level for level in graded if level]
    last_use = {name: len(graded) for name in index}  # the classifier's step
    for step, level in reversed(list(enumerate(graded))):
        for layer in level:
            for name in layer.inputs:
                if name in last_use and last_use[name] == len(graded):
                    last_use[name] = step
    final = list(index)[-1]
    last_use[final] = len(graded)
    place = layouts(config, dtype)
    made: dict[str, Map] = {}

    def step_of(layer: Layer) -> Step:
        i = index[layer.name]
        packed = weights.layers[i]
        assert isinstance(packed, PackedLayer)
        inputs = tuple(made[name] for name in layer.inputs)
        m = inputs[0]
        label = f"{layer.name} {layer.kind} [{m.n}, {layer.in_channels}, {m.h}, {m.w}] -> {layer.out_channels}"
        layout = None if result == "features" and layer.name == final else place[layer.name]
        buffer = recorder.first_packed + weights.first_buffer[i]
        return Step(packed, buffer, inputs, label, layout, last_use[layer.name])

    for level in graded:
        if level[0].inputs == ("image",):
            packed = weights.layers[0]
            if isinstance(packed, PackedStem):
                name = level[0].name
                made[name] = recorder.stem(packed, recorder.first_packed, shape, stride, IMAGE, last_use[name])
                continue
            made["image"] = recorder.enter(shape, stride, IMAGE, recorder.step, aligned)
        for layer, m in zip(level, recorder.level([step_of(layer) for layer in level]), strict=True):
            made[layer.name] = m
    m = made[final]
    features = layers(config)[index[final]].out_channels
    size: tuple[int, ...] = (m.n, m.h, m.w, features)
    if result != "features":
        head = recorder.first_packed + len(weights.tensors) - 2
        classes = config.num_classes
        logits = result == "logits"
        recorder.classifier(m, features, classes, head if logits else None, head + 1 if logits else None)
        size = (m.n, classes if logits else features)
    program = recorder.program
    return Lowered(program.tensor(), program.labels, recorder.workspace_bytes, size)


class CudaNetwork:
    """The packed form of one `DeployedParNet`, made again for every other `WholeNetwork`.

    Not copied, pickled or saved with the network: the copy packs its own.
    """

    def __init__(self) -> None:
        self._weights: dict[str, tuple[WholeNetwork, Weights]] = {}  # by precision
        self._lowered: dict[tuple[Any, ...], Lowered] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[CudaNetwork], tuple[()]]:
        return CudaNetwork, ()

    def why_not(self, network: WholeNetwork, x: Tensor) -> str | None:
        """The reason why this call must go layer by layer, or None."""
        return tensor_missing(x) or whole.why_not("cuda", network, x)

    def forget(self) -> None:
        """Frees the packed weights; the next call makes them again."""
        self._weights.clear()

    def weights(self, network: WholeNetwork, precision: str) -> Weights:
        """The packed weights; packs them if they are not. Those packed while a graph is captured are not kept: they
        hold nothing before it is replayed.
        """
        of, weights = self._weights.get(precision, (None, None))
        if of is not network or weights is None:
            with self._lock:
                of, weights = self._weights.get(precision, (None, None))
                if of is not network or weights is None:
                    device = network.head[0].device
                    weights = pack_network(network, precision)
                    if not capturing(device):
                        weights = weights._replace(shared=Packed(weights.tensors, device))
                        self._weights[precision] = network, weights
        return weights

    def lowered(self, network: WholeNetwork, weights: Weights, x: Tensor, precision: str, result: str) -> Lowered:
        aligned = x.data_ptr() % 16 == 0
        gpu = Gpu.of(x.device)  # changes when warpgroup tiles are disabled
        key = (tuple(x.shape), x.stride(), aligned, x.dtype, x.device, gpu.wgmma, precision, result)
        found = self._lowered.get(key)
        if found is None:
            shape = tuple(x.shape)
            found = lower(network.config, weights, shape, x.stride(), x.dtype, precision, gpu, result, aligned)
            with self._lock:
                if len(self._lowered) >= MAX_SHAPES:
                    self._lowered.clear()
                self._lowered[key] = found
        return found

    def run(self, network: WholeNetwork, x: Tensor, result: str) -> Tensor:
        """result: "logits" [N, classes], "pooled" [N, P] or "features", the last map."""
        precision = "tf32" if current_precision() == "tf32" else "ieee"
        weights = self.weights(network, precision)
        if network.config.pointwise_head:
            return network.end(self._play(network, weights, x, precision, "features"), result)
        return self._play(network, weights, x, precision, result)

    def _play(self, network: WholeNetwork, weights: Weights, x: Tensor, precision: str, result: str) -> Tensor:
        lowered = self.lowered(network, weights, x, precision, result)
        y = torch.empty(lowered.shape, dtype=x.dtype, device=x.device)
        with workspace(x.device, lowered.workspace_bytes) as memory:
            play([memory, y, x, *weights.tensors], lowered.program)
        if weights.shared is not None:
            weights.shared.read(x.device)
        if result != "features":
            return y
        nchw = y.permute(0, 3, 1, 2)
        return nchw if is_channels_last(x) else nchw.contiguous()


class CapturedNetwork:
    """A network's logits ([N, P] without a classifier) as one CUDA graph, for images of one shape, dtype and layout.

    Call it with an image: copies it to the graph's input and replays. The result is overwritten by the next call. The
    weights are those of the time of capture. Calls from several threads and streams wait for each other; who reads the
    result on another stream than that of the call has to wait for it.
    """

    def __init__(self, network: WholeNetwork, runner: CudaNetwork, x: Tensor) -> None:
        if reason := runner.why_not(network, x):
            raise RuntimeError(f"parnet_kernels: the network cannot be captured: {reason}")
        precision = "tf32" if current_precision() == "tf32" else "ieee"
        config = network.config
        self._result = played = "logits" if config.num_classes else "pooled"
        weights = runner.weights(network, precision)
        # Whatever is used as it is, not packed, is copied.
        head = tuple(t.clone() for t in weights.tensors[-2:])
        self._weights = weights._replace(tensors=[*weights.tensors[:-2], *head])
        self._end: WholeNetwork | None = None  # where something follows the kernels
        if config.pointwise_head:
            last = {name: t.clone() for name, t in network.arguments[-1].items()}
            self._end = replace(network, arguments=[*network.arguments[:-1], last], head=(head[0], head[1]))
            played = "features"
        self._lock = Lock()
        with torch.cuda.device(x.device):
            self.input = x.detach().clone(memory_format=torch.preserve_format)
            self._lowered = runner.lowered(network, self._weights, self.input, precision, played)
            self._played = torch.empty(self._lowered.shape, dtype=x.dtype, device=x.device)
            classes = config.num_classes or config.planes[-1]
            self.result = (
                torch.empty(x.shape[0], classes, dtype=x.dtype, device=x.device) if self._end else self._played
            )
            self._memory = allocate(x.device, self._lowered.workspace_bytes)
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._launch()  # loads the kernels, which a capture may not
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._launch()
            self._replayed = torch.cuda.Event()

    def _launch(self) -> None:
        buffers = [self._memory, self._played, self.input, *self._weights.tensors]
        play(buffers, self._lowered.program)
        if self._end is not None:
            self.result.copy_(self._end.end(self._played.permute(0, 3, 1, 2), self._result))

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.input.shape or x.dtype != self.input.dtype or x.device != self.input.device:
            raise ValueError(
                f"parnet_kernels: `x` must be {self.input.dtype} {list(self.input.shape)} on {self.input.device} as "
                f"captured, got {x.dtype} {list(x.shape)} on {x.device}"
            )
        with self._lock, torch.cuda.device(self.input.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._replayed)  # the memory is shared with the replay before, on whatever stream
            self.input.copy_(x)
            self._graph.replay()
            self._replayed.record(stream)
        return self.result
