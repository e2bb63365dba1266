"""Quantisation: calibration of a deployed network on pictures, and rounding of its weights.

What re-parameterised networks lose by quantisation elsewhere comes from outliers: the folded centre tap carries three
branches, and a BatchNorm's affine makes single channels large. Scales an output channel take care of the former; the
range of a map is the one of least squared error, not the widest; and what rounding weights shifts a layer's mean by is
taken back in its bias (Nagel et al. 2019, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from parnet_kernels.config import Layer, ParNetConfig, layers
from parnet_kernels.cpu import direct
from parnet_kernels.deployed_layer import module_name
from parnet_kernels.preprocessing import Preprocessing
from parnet_kernels.quantized import QuantizedParNet
from parnet_kernels.whole import WholeNetwork

RANGES = ("mse", "minmax", "percentile")
_BINS = 2048
_PERCENTILE = 0.9999  # of values on each side


class Deployed(Protocol):
    """What is quantised: `DeployedParNet`."""

    config: ParNetConfig
    layers: nn.ModuleDict
    head_weight: nn.Parameter
    head_bias: nn.Parameter
    preprocessing: Preprocessing | None
    class_names: tuple[str, ...] | None

    def whole(self) -> WholeNetwork | str: ...


class _Histogram:
    """Of the values of one map over all pictures; the range may grow."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0  # zero is always a value: it is the padding
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        low, high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        if (low, high) != (self.low, self.high):
            counts = torch.zeros(_BINS, dtype=torch.float64)
            if self.counts.any():
                at = ((self._centres() - low) / (high - low) * _BINS).long().clamp(0, _BINS - 1)
                counts.index_add_(0, at, self.counts)
            self.low, self.high, self.counts = low, high, counts
        if self.high > self.low:
            self.counts += torch.histc(x.float(), _BINS, self.low, self.high).double()

    def _centres(self) -> Tensor:
        return self.low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self.high - self.low) / _BINS

    def range(self, method: str) -> tuple[float, int]:
        """(scale, zero) of bytes for these values."""
        low, high = self.low, self.high
        if high <= low:
            return 1.0, 0
        if method == "percentile":
            below = self.counts.cumsum(0) / self.counts.sum()
            centres = self._centres()
            low = min(0.0, float(centres[int((below < 1 - _PERCENTILE).sum())]))
            high = max(0.0, float(centres[min(int((below < _PERCENTILE).sum()), _BINS - 1)]))
        elif method == "mse":
            low, high = self._least_error()
        scale = max((high - low) / 255, torch.finfo(torch.float32).tiny)
        scale = float(torch.tensor(scale, dtype=torch.float32))
        return scale, min(255, max(0, round(-low / scale)))

    def _least_error(self) -> tuple[float, float]:
        low, high, centres = self.low, self.high, self._centres()
        shares = torch.linspace(0.2, 1, 81, dtype=torch.float64)
        for _ in range(2):  # one end, then the other
            for end in ("high", "low"):
                lows = low if end == "high" else self.low * shares
                highs = self.high * shares if end == "high" else high
                lows, highs = torch.broadcast_tensors(torch.as_tensor(lows), torch.as_tensor(highs))
                scale = ((highs - lows) / 255).clamp_min(1e-38)[:, None]
                zero = (-lows[:, None] / scale).round()
                values = ((centres / scale + zero).round().clamp(0, 255) - zero) * scale
                best = int(((values - centres) ** 2 @ self.counts).argmin())
                low, high = float(lows[best]), float(highs[best])
        return low, high


class _Maps:
    """What calibration knows of each map: a histogram, and the channels' means."""

    def __init__(self, names: Iterable[str]) -> None:
        self.histograms = {name: _Histogram() for name in names}
        self.sums: dict[str, Tensor] = {}
        self.images = 0

    def add(self, name: str, x: Tensor) -> None:
        self.histograms[name].add(x)
        total = x.double().mean((2, 3)).sum(0)
        self.sums[name] = self.sums.get(name, torch.zeros_like(total)) + total

    def means(self, name: str) -> Tensor:
        return self.sums[name] / self.images


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [K, …] → int8 and scales [K] of least squared error, −127 … 127."""
    flat = weight.double().flatten(1)
    largest = flat.abs().amax(1)
    best = torch.full_like(largest, math.inf)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    for share in torch.linspace(0.5, 1, 26, dtype=torch.float64):
        tried = torch.where(largest > 0, largest * share / 127, scale)
        error = ((flat / tried[:, None]).round().clamp(-127, 127) * tried[:, None] - flat).square().sum(1)
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    scale = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (flat / scale.double()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return rounded.view(weight.shape), scale


@torch.inference_mode(False)
@torch.no_grad()
def quantize(
    network: Deployed, images: Tensor | Iterable[Tensor], dtype: str = "int8", range: str = "mse"
) -> QuantizedParNet:
    """`network` in int8, calibrated on `images`.

    Args:
        network: a deployed network in float32 on the CPU, unchanged in structure.
        images: pictures as the network will see them, preprocessed: float32 [N, in_chans, H, W], or an iterable of such
            batches (sizes may differ). A few hundred are enough: they only set the maps' ranges.
        dtype: "int8".
        range: of a map's values, "mse": the one of least squared error (which clips rare outliers); "minmax": all;
            "percentile": all but one value in 10,000 at each end.

    Raises:
        TypeError: `images` are no tensors.
        ValueError: another dtype or range; no images, or of another channel count, with NaN or infinity, or all of
            one value; a network that is not plain (`DeployedParNet.whole`), not float32 on the CPU, or with too many
            channels.
    """
    if dtype != "int8":
        raise ValueError(
            f"quantize: `dtype` must be 'int8', got {dtype!r}; 16-bit networks are `network.half()` and "
            "`network.bfloat16()`, which need no pictures"
        )
    if range not in RANGES:
        raise ValueError(f"quantize: `range` must be one of {RANGES}, got {range!r}")
    config = network.config
    whole = network.whole()
    if isinstance(whole, str):
        raise ValueError(f"quantize: `network` must be as `deploy` made it: {whole}")
    if (w := network.head_weight).dtype != torch.float32 or w.device.type != "cpu":
        raise ValueError(f"quantize: `network` must be float32 on the CPU, got {w.dtype} on {w.device}")
    if not all(bool(t.isfinite().all()) for t in (*whole.head, *(t for a in whole.arguments for t in a.values()))):
        raise ValueError("quantize: `network` must have finite weights")
    graph = [layer for layer in layers(config) if layer.kind != "pointwise"]
    if (widest := max(layer.in_channels for layer in graph)) > direct.MAX_CHANNELS:
        raise ValueError(f"quantize: `network` must have at most {direct.MAX_CHANNELS} channels a map, got {widest}")
    if len(graph) < 2:
        raise ValueError("quantize: `network` must have more than one layer")

    maps = _calibrate(network, graph, images)
    ranges = _ranges(maps, graph, range)
    arguments = {layer.name: a for layer, a in whole.operators()}
    made = QuantizedParNet(config)
    made.first.load_state_dict(network.layers[module_name(graph[0].name)].state_dict())
    for layer in graph[1:]:
        m = made.layers[module_name(layer.name)]
        m.load_state_dict(_round(layer, arguments[layer.name], maps, ranges))
    if made.pointwise is not None:
        made.pointwise.load_state_dict(network.layers[module_name(layers(config)[-1].name)].state_dict())
    made.head_weight.copy_(network.head_weight)
    made.head_bias.copy_(network.head_bias)
    made.preprocessing, made.class_names = network.preprocessing, network.class_names
    return made


def _batches(images: Tensor | Iterable[Tensor], config: ParNetConfig) -> Iterable[Tensor]:
    for batch in images.split(16) if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor):
            raise TypeError(f"quantize: `images` must be tensors, got a {type(batch).__name__}")
        if (
            batch.dim() != 4
            or batch.shape[1] != config.in_chans
            or 0 in batch.shape[2:]
            or not batch.is_floating_point()
        ):
            requirement = f"must be floating-point [N, {config.in_chans}, H, W]"
            raise ValueError(f"quantize: `images` {requirement}, got {batch.dtype} {list(batch.shape)}")
        if not bool(batch.isfinite().all()):
            raise ValueError("quantize: `images` must be finite, got NaN or infinity")
        if len(batch):
            yield batch.to("cpu", torch.float32)


def _calibrate(network: Deployed, graph: list[Layer], images: Tensor | Iterable[Tensor]) -> _Maps:
    """The float network on all pictures, layer by layer."""
    maps = _Maps(layer.name for layer in graph[:-1])
    constant = True
    for batch in _batches(images, network.config):
        constant &= bool((batch == batch.flatten()[0]).all())
        maps.images += len(batch)
        made = {"image": batch}
        for layer in graph[:-1]:
            made[layer.name] = network.layers[module_name(layer.name)](*(made[name] for name in layer.inputs))
            maps.add(layer.name, made[layer.name])
    if not maps.images:
        raise ValueError("quantize: `images` must hold at least one picture")
    if constant:
        raise ValueError("quantize: `images` must be pictures, got batches of one value")
    return maps


def _ranges(maps: _Maps, graph: list[Layer], method: str) -> dict[str, tuple[float, int]]:
    """(scale, zero) of each map. The two maps that a fusion adds up have one range: their products are one sum."""
    ranges = {}
    fused = [layer.inputs for layer in graph if layer.kind == "fusion_se"]
    for a, b in fused:
        both = _Histogram()
        for name in (a, b):
            h = maps.histograms[name]
            both.low, both.high = min(both.low, h.low), max(both.high, h.high)
        for name in (a, b):
            h = maps.histograms[name]
            if both.high > both.low and h.high > h.low:
                at = ((h._centres() - both.low) / (both.high - both.low) * _BINS).long().clamp(0, _BINS - 1)
                both.counts.index_add_(0, at, h.counts)
        ranges[a] = ranges[b] = both.range(method)
    for name, histogram in maps.histograms.items():
        if name not in ranges:
            ranges[name] = histogram.range(method)
    return ranges


def _round(
    layer: Layer, arguments: dict[str, Tensor], maps: _Maps, ranges: dict[str, tuple[float, int]]
) -> dict[str, Tensor]:
    """The buffers of a `QuantizedLayer`."""
    a = {name: t.detach() for name, t in arguments.items()}
    k = layer.out_channels
    weight, weight_scale = round_weight(a["weight"])
    # What rounding shifts the mean by: Σ (W − W') · E[x], borders aside.
    lost = a["weight"].double() - weight.double() * weight_scale.double()[:, None, None, None]
    means = [maps.means(name) for name in layer.inputs]
    mean = torch.stack(means, 1).flatten() if len(means) == 2 else means[0]
    groups = len(means)
    by_group = lost.sum((2, 3)).view(groups, k // groups, -1) @ mean.view(groups, -1, 1)
    bias = (a["bias"].double() + by_group.flatten()).float()
    gate_weight, gate_bias = a["gate_weight"].double(), a.get("gate_bias")
    gate_bias = torch.zeros(k, dtype=torch.float64) if gate_bias is None else gate_bias.double()
    state: dict[str, Tensor] = {}
    if layer.kind == "repvgg_sse":  # the gate there is of skip_scale·x + skip_shift
        gate_bias = gate_bias + gate_weight @ a["skip_shift"].double()
        gate_weight = gate_weight * a["skip_scale"].double()
        state |= {"skip_scale": a["skip_scale"], "skip_shift": a["skip_shift"]}
    rounded_gate, gate_scale = round_weight(gate_weight)
    lost_gate = gate_weight - rounded_gate.double() * gate_scale.double()[:, None]
    lost_by_group = lost_gate.view(groups, k // groups, -1) @ mean.view(groups, -1, 1)
    scale_in, zero_in = ranges[layer.inputs[0]]
    scale_out, zero_out = ranges.get(layer.name, (1.0, 0))
    return state | {
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": bias,
        "gate_weight": rounded_gate,
        "gate_scale": gate_scale,
        "gate_bias": (gate_bias + lost_by_group.flatten()).float(),
        "out_scale": a.get("out_scale", torch.ones(k)),
        "out_shift": a.get("out_shift", torch.zeros(k)),
        "scale_in": torch.tensor(scale_in),
        "zero_in": torch.tensor(zero_in, dtype=torch.uint8),
        "scale_out": torch.tensor(scale_out),
        "zero_out": torch.tensor(zero_out, dtype=torch.uint8),
    }


@torch.no_grad()
def layer_errors(network: Deployed, quantized: QuantizedParNet, images: Tensor) -> dict[str, float]:
    """Of each int8 layer, by its name: the error of its output on `images` (as `quantize` takes them), which errors of
    the layers before it are part of: ‖int8 − float‖ / ‖float‖.
    """
    made = {"image": images}
    for layer in layers(network.config):
        if layer.kind != "pointwise":
            inputs = [made[name] for name in layer.inputs]
            made[layer.name] = network.layers[module_name(layer.name)](*inputs)
    found = {}
    for name, value in quantized.maps(images).items():
        found[name] = float((value - made[name]).norm() / made[name].norm().clamp_min(1e-30))
    return found
