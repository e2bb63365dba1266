"""The int8 network: its layers' exact definition in PyTorch, and the call of the native kernels that equals it.

Scheme (Jacob et al. 2018; Nagel et al. 2021, "A White Paper on Neural Network Quantization"): activations are bytes
with one scale and zero a map, weights 8-bit integers with one scale an output channel, sums of products exact 32-bit
integers; gates, φ, skip and the affine after φ are float32. The first layer reads the image in float32, the last map
and the classifier are float32. A layer stays one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parnet_kernels import _native
from parnet_kernels.config import Layer, ParNetConfig, layers
from parnet_kernels.cpu import direct
from parnet_kernels.cpu.direct import DirectLayer, Packed
from parnet_kernels.deployed_layer import DeployedLayer, module_name, shapes_of, why_not_layer
from parnet_kernels.preprocessing import Described
from parnet_kernels.reference import ACTIVATIONS, gate, interleave, per_channel, shuffle
from parnet_kernels.unchanged import AsMade, Remembered, Watch
from parnet_kernels.whole import classify, why_not_now, why_not_tensors


class QuantizedLayer(nn.Module):
    """One layer in int8: its buffers are what `cpu.direct.DirectLayer` explains. `forward` is the definition."""

    def __init__(self, layer: Layer, activation: str, last: bool) -> None:
        super().__init__()
        self.kind, self.stride, self.activation, self.last = layer.kind, layer.stride, activation, last
        c, k = layer.in_channels, layer.out_channels
        self.register_buffer("weight", torch.zeros(k, c, 3, 3, dtype=torch.int8))
        self.register_buffer("gate_weight", torch.zeros(k, c, dtype=torch.int8))
        names = ["weight_scale", "bias", "gate_scale", "gate_bias", "out_scale", "out_shift"]
        for name in names + ["skip_scale", "skip_shift"] * (layer.kind == "repvgg_sse"):
            self.register_buffer(name, torch.zeros(k))
        for name in ("scale_in", "scale_out"):
            self.register_buffer(name, torch.ones(()))
        for name in ("zero_in", "zero_out"):
            self.register_buffer(name, torch.zeros((), dtype=torch.uint8))

    def extra_repr(self) -> str:
        k, c = self.get_buffer("weight").shape[:2]
        return f"{self.kind}, {c} → {k} channels, stride {self.stride}, {self.activation}, int8"

    def plain(self) -> DirectLayer:
        """The layer as plain values."""
        b: dict[str, Any] = dict(self.named_buffers())
        scalars = {name: b.pop(name).item() for name in ("scale_in", "zero_in", "scale_out", "zero_out")}
        skip = {name: b.pop(name, None) for name in ("skip_scale", "skip_shift")}
        return DirectLayer(kind=self.kind, stride=self.stride, last=self.last, **b, **scalars, **skip)

    def forward(self, *inputs: Tensor) -> Tensor:
        """bytes [N, C, H, W] (two of a fusion) → bytes, or floats of the last layer."""
        a = self.plain()
        x = interleave(*inputs) if a.kind == "fusion_se" else inputs[0]
        groups = 2 if a.kind == "fusion_se" else 1
        centred = x.double() - a.zero_in  # zero padding stands for the byte `zero_in`
        products = F.conv2d(centred, a.weight.double(), None, a.stride, 1, groups=groups).float()
        means = a.scale_in * (x.double().mean((2, 3), keepdim=True).float() - a.zero_in)
        gate_weight = a.gate_weight.float() * a.gate_scale[:, None]
        g = gate(means, gate_weight, a.gate_bias, groups)
        t = products * per_channel(a.weight_scale * a.scale_in) + per_channel(a.bias)
        if a.skip_scale is not None and a.skip_shift is not None:
            value = a.scale_in * centred.float()
            t = t + g * (per_channel(a.skip_scale) * value + per_channel(a.skip_shift))
        else:
            t = 2 * g * t
        t = shuffle(t) if groups == 2 else t
        y = ACTIVATIONS[self.activation](t) * per_channel(a.out_scale) + per_channel(a.out_shift)
        return y.float() if a.last else to_bytes(y, a.scale_out, a.zero_out)


def to_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    """The nearest bytes q, with x ≈ scale · (q − zero)."""
    return (x / scale + zero).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------ the network


AS_MADE = AsMade(QuantizedLayer, "plain")


class QuantizedParNet(Described, nn.Module):
    """A ParNet whose layers, but the first, run in int8. Make one with `quantize`; `save` and `load_quantized` keep it.

    Input [N, in_chans, H, W], float32 on the CPU; output float32 logits [N, num_classes], or [N, P] without a
    classifier. An image with NaN or infinity gives NaN. The results are the same on every processor but for the first
    layer and the classifier, which are float32: where there are no instructions for 8-bit products, the same sums are
    made by plain ones, and the float32 network is faster (`why_not`). It cannot be trained.
    """

    head_weight: Tensor
    head_bias: Tensor

    # Buffers are never inference tensors, whose changes could not be seen.
    @torch.inference_mode(False)
    def __init__(self, config: ParNetConfig) -> None:
        super().__init__()
        self.config, self.num_features = config, config.planes[-1]
        graph = layers(config)
        first, *rest = [layer for layer in graph if layer.kind != "pointwise"]
        self.first = DeployedLayer(first, config.activation, False)
        self.layers = nn.ModuleDict(
            {module_name(m.name): QuantizedLayer(m, config.activation, m is rest[-1]) for m in rest}
        )
        self.pointwise = DeployedLayer(graph[-1], config.activation, False) if config.pointwise_head else None
        self.register_buffer("head_weight", torch.zeros(config.num_classes, self.num_features))
        self.register_buffer("head_bias", torch.zeros(config.num_classes))
        self._kernels: str | None = None
        self._known: Remembered[Packed | str] = Remembered()
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedParNet:
        """
        Raises:
            TypeError: for another dtype or device: the scales would lose their meaning, and no kernels run there.
        """
        there = fn(torch.zeros(1, device="cpu"))
        if there.dtype != torch.float32 or there.device.type not in ("cpu", "meta"):
            got = f"{there.dtype} on {there.device}"
            raise TypeError(f"parnet_kernels: an int8 network stays float32 and int8 on the CPU, got {got}")
        self._known.forget()
        return super()._apply(fn, recurse)

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @staticmethod
    def why_not() -> str | None:
        """Why int8 is not faster than float32 on this processor, or None."""
        return direct.why_not()

    def why_layer_by_layer(self, x: Tensor | None = None) -> str | None:
        """The reason why a call is not one call of the native kernels, but goes through the layers' definitions, which
        is slow; or None: layers replaced, wrapped, patched or hooked, a tool that wants to see them, …
        """
        found = self._packed()
        return found if isinstance(found, str) else None

    def prepare(self, kernels: str | None = None) -> QuantizedParNet:
        """Packs the weights now, not at the first call, for `kernels` (None: the best of this processor, see
        `cpu.direct.supported`); returns itself. Later changes of weights are seen as `DeployedParNet.prepare` says.

        Raises:
            ValueError: this processor cannot run `kernels`.
        """
        direct.choose(kernels)
        self._kernels = kernels
        self._known.forget()
        self._packed()
        return self

    def _packed(self) -> Packed | str:
        """What the native kernels run, the same object as long as nothing has changed; or why they cannot."""
        if reason := _native.cpu_error or why_not_now() or AS_MADE.why_not_class():
            return reason
        known = self._known.get()
        if known is None:
            with self._known.lock:
                known = self._known.get()
                if known is None:
                    if any(t.is_inference() for t in self.buffers()):
                        return "weights are inference tensors, whose changes cannot be seen"
                    if reason := self._why_not_layers():
                        return reason
                    # Watched before it is packed: another thread's change must not slip by.
                    modules = [m for _, m in self._quantized()]
                    settings = [("config",), (), *[("kind", "stride", "activation", "last")] * len(modules)]
                    watch = Watch([self, self.layers, *modules], settings)
                    known = self._known.put(watch, self._pack())
        return known[1]

    def _why_not_layers(self) -> str | None:
        """Why the layers are not those that the configuration says, as they were made; or None."""
        for layer, m in self._quantized():
            reason = AS_MADE.why_not(m)
            if reason is None and (m.kind, m.stride) != (layer.kind, layer.stride):
                reason = "has other settings than the configuration says"
            if reason:
                return f"layers.{module_name(layer.name)}: {reason}"
        return None

    def _why_not_values(self) -> str | None:
        """Why the kernels cannot take the layers' values, or None."""
        for layer, m in self._quantized():
            if reason := m.plain().why_not():
                return f"layers.{module_name(layer.name)}: {reason}"
        return None

    def _pack(self) -> Packed | str:
        return self._why_not_values() or direct.pack(
            self._program(), self.config.activation, direct.choose(self._kernels)
        )

    def _program(self) -> list[tuple[DirectLayer, tuple[int, int, int]]]:
        """The int8 layers as plain values, each with the numbers of its inputs (−1: no second one) and its output."""
        values: dict[str, int] = {"first": 0}
        found = []
        for layer, m in self._quantized():
            inputs = [values[name] for name in layer.inputs]
            values[layer.name] = len(values)
            found.append((m.plain(), (inputs[0], inputs[1] if len(inputs) == 2 else -1, values[layer.name])))
        return found

    def _quantized(self) -> list[tuple[Layer, QuantizedLayer]]:
        """The int8 layers, in order of execution; the first layer's output is called "first"."""
        graph = [layer for layer in layers(self.config) if layer.kind != "pointwise"]
        named = [
            layer._replace(inputs=tuple("first" if n == graph[0].name else n for n in layer.inputs))
            for layer in graph[1:]
        ]
        return [(layer, self.layers[module_name(layer.name)]) for layer in named]  # type: ignore[misc]

    def plain_layers(self) -> dict[str, DirectLayer]:
        """The int8 layers as plain values, by their names, in order of execution."""
        return {layer.name: m.plain() for layer, m in self._quantized()}

    def why_not_as_configured(self) -> str | None:
        """Why the modules are not those that the configuration says, as they were made; or None."""
        graph = layers(self.config)
        modules = self._modules.get("layers")
        names = [module_name(layer.name) for layer in graph[1:] if layer.kind != "pointwise"]
        if type(modules) is not nn.ModuleDict or [*modules] != names:
            return "layers were added, removed or reordered"
        shapes = {"head_weight": (self.num_classes, self.num_features), "head_bias": (self.num_classes,)}
        if reason := why_not_tensors(self, shapes, torch.empty(0, device="cpu")):
            return reason
        for layer, name in ((graph[0], "first"), (graph[-1], "pointwise")):
            m, needed = self._modules.get(name), name == "first" or self.config.pointwise_head
            if m is None or not needed:
                if needed or m is not None:
                    return f"{name} was {'removed' if needed else 'added'}"
                continue
            shapes = shapes_of(layer, False)
            reason = why_not_layer(m, (layer.kind, layer.stride, self.config.activation, tuple(shapes)))
            if reason := reason or why_not_tensors(m, shapes, self.head_weight):
                return f"{name}: {reason}"
        return AS_MADE.why_not_class() or self._why_not_layers() or self._why_not_values()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, float32 [N, P, ⌈H/32⌉, ⌈W/32⌉] in the ImageNet variants."""
        self._check(x)
        with torch.autocast("cpu", enabled=False):
            y = self.first(x.contiguous(memory_format=torch.channels_last))
            packed = self._packed()
            y = direct.run(packed, y) if isinstance(packed, Packed) and len(y) else self._emulate(y)
            return y if self.pointwise is None else self.pointwise(y)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map → logits [N, num_classes], or pooled features [N, P] if `pre_logits` or without a classifier."""
        return classify(x, None if pre_logits or not self.num_classes else (self.head_weight, self.head_bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def emulate(self, x: Tensor) -> Tensor:
        """As `forward`, layer by layer by their definitions in PyTorch: slow, for tests and reports."""
        self._check(x)
        y = self._emulate(self.first(x))
        return self.forward_head(y if self.pointwise is None else self.pointwise(y))

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The values of each int8 layer's output, by the layers' names, from their definitions."""
        self._check(x)
        return {
            layer.name: y if m.last else m.get_buffer("scale_out") * (y.float() - m.get_buffer("zero_out"))
            for (layer, m), y in zip(self._quantized(), self._defined(self.first(x)), strict=True)
        }

    def _emulate(self, y: Tensor) -> Tensor:
        return self._defined(y)[-1]

    def _defined(self, y: Tensor) -> list[Tensor]:
        """The int8 layers' outputs: bytes, of the last one floats."""
        # Strings and modules: torch.compile, which divides this function, cannot keep a `Layer` in torch 2.11.
        graph = [(layer.name, layer.inputs, m) for layer, m in self._quantized()]
        made = {"first": to_bytes(y, *self._entry(graph[0][2]))}
        for name, inputs, m in graph:
            made[name] = m(*(made[of] for of in inputs))
        return [made[name] for name, _, _ in graph]

    @staticmethod
    def _entry(m: nn.Module) -> tuple[float, int]:
        """Scale and zero of the bytes that the first int8 layer, perhaps wrapped, reads."""
        inner = next((part for part in m.modules() if isinstance(part, QuantizedLayer)), None)
        if inner is None:
            raise TypeError(f"parnet_kernels: a {type(m).__name__} in place of the first int8 layer has no input range")
        a = inner.plain()
        return a.scale_in, a.zero_in

    def _check(self, x: Tensor) -> None:
        c = self.config.in_chans
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != c or 0 in x.shape[2:]:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"parnet_kernels: `x` must be a tensor [N, {c}, H, W], got {got}")
        for name, t in (("x", x), ("head_weight", self.head_weight)):
            if t.dtype != torch.float32 or t.device.type != "cpu":
                raise ValueError(f"parnet_kernels: `{name}` must be float32 on the CPU, got {t.dtype} on {t.device}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "parnet_kernels: an int8 network has no gradients; use the float network, or torch.no_grad()"
            )
