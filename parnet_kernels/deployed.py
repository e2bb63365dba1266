"""ParNet for inference: one operator a layer, BatchNorms and branches folded away, in levels of independent layers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from parnet_kernels import _native, evaluated
from parnet_kernels.config import Layer, ParNetConfig, layers, levels
from parnet_kernels.cpu.backend import DTYPES as CPU_DTYPES
from parnet_kernels.cpu.network import CpuNetwork
from parnet_kernels.cuda.network import CapturedNetwork, CudaNetwork
from parnet_kernels.deployed_layer import (
    AS_MADE,
    AffineLayer,
    DeployedLayer,
    module_name,
    parameter,
    shapes_of,
    why_not_layer,
)
from parnet_kernels.preprocessing import Described
from parnet_kernels.quantize import quantize
from parnet_kernels.quantized import QuantizedParNet
from parnet_kernels.unchanged import Remembered, Watch
from parnet_kernels.whole import WholeNetwork, classify, why_not_now, why_not_tensors

_requires_grad = operator.attrgetter("requires_grad")


class TrainingForm(Protocol):
    """What is folded: `ParNet`."""

    config: ParNetConfig
    head: Any

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def block(self, name: str) -> Any: ...
    def fusion_norm(self, name: str) -> Any: ...


def _fused(config: ParNetConfig) -> dict[str, bool]:
    """The outputs that fusions read, and whether their producer takes over the BatchNorm: nothing else reads them."""
    graph = layers(config)
    uses = [name for layer in graph for name in layer.inputs]
    return {name: uses.count(name) == 1 for layer in graph if layer.kind == "fusion_se" for name in layer.inputs}


def _schedule(config: ParNetConfig) -> list[tuple[Layer, list[str]]]:
    """The layers in order of execution, each with the maps that no later one reads."""
    left: set[str] = set()
    found: list[tuple[Layer, list[str]]] = []
    for layer in reversed(layers(config)):
        last = [name for name in dict.fromkeys(layer.inputs) if name not in left]
        left.update(last)
        found.append((layer, last))
    return found[::-1]


def _label(name: str) -> AbstractContextManager[object]:
    """Names a span for a profiler, if one is running."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else nullcontext()


class DeployedParNet(Described):
    """ParNet for inference. Make one with `ParNet.deploy()` or `load_deployed`.

    Input [N, in_chans, H, W], H, W ≥ 1; output logits [N, num_classes] ([N, P] without a classifier).

    The BatchNorms before a fusion are the output affine of the layer that produces their input: exact at the border
    too, where the zero padding comes after them. On the CPU and on CUDA devices the whole network is one call of the
    native kernels where they can take it, with packed weights that are made by `prepare` or at the first call and are
    not part of the state dict; else, and wherever something was done to a layer that those kernels would not see
    (`why_layer_by_layer`), each layer is one operator.

    Weights are Parameters that ask for no gradient. Those that do (after `network.head_weight.requires_grad_()`, or
    `requires_grad_()` of the network or a layer; parametrizations) get it; a call that records gradients goes layer by
    layer.
    """

    # Weights are never inference tensors, whose changes could not be seen by the packed weights.
    @torch.inference_mode(False)
    def __init__(self, config: ParNetConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.planes[-1]
        graph, fused = layers(config), _fused(config)
        self.layers = nn.ModuleDict(
            {module_name(m.name): DeployedLayer(m, config.activation, fused.get(m.name, False)) for m in graph}
        )
        width = {layer.name: layer.out_channels for layer in graph}
        self.affines = nn.ModuleDict(
            {module_name(name): AffineLayer(width[name]) for name, in_producer in fused.items() if not in_producer}
        )
        self.head_weight = parameter(torch.zeros(config.num_classes, self.num_features))
        self.head_bias = parameter(torch.zeros(config.num_classes))
        self._schedule = _schedule(config)
        self._whole: Remembered[WholeNetwork] = Remembered()
        self._native = CpuNetwork()
        self._cuda_network = CudaNetwork()
        self.eval()

    @classmethod
    @torch.no_grad()
    def from_training(cls, model: TrainingForm) -> DeployedParNet:
        """Folds `model` (in float64, stored in its dtype, on its device), with its running statistics.

        Raises:
            FoldError: see `ParNet.deploy`.
        """
        evaluated.refuse_hooks(model.named_modules())
        reference = next(model.parameters())
        with reference.device:  # whatever the default device is
            deployed = cls(model.config).to(reference.dtype)

        def assign(module: nn.Module, values: dict[str, Tensor]) -> None:
            for name, value in values.items():
                module.get_parameter(name).copy_(value)

        for layer in layers(model.config):
            values, where = model.block(layer.name).fold(f"{layer.name}.block"), f"{layer.name}.block"
            found, expected = {name: tuple(t.shape) for name, t in values.items()}, shapes_of(layer, False)
            if found != expected:
                evaluated.refuse(where, f"folds to {found}, not to {expected} as the configuration says")
            assign(deployed.layers[module_name(layer.name)], values)
            if layer.kind == "fusion_se":
                norm = model.fusion_norm(layer.name)
                norms = layer.name.rpartition(".")[0] + ".0"
                for name, bn, which in zip(layer.inputs, (norm.b1, norm.b2), ("b1", "b2"), strict=True):
                    like = values["bias"].new_empty(layer.in_channels)
                    scale, shift = evaluated.norm(bn, f"{norms}.{which}", like)
                    if module_name(name) in deployed.affines:
                        assign(deployed.affines[module_name(name)], {"scale": scale, "shift": shift})
                    else:
                        assign(deployed.layers[module_name(name)], {"out_scale": scale, "out_shift": shift})
        if model.config.num_classes:
            sizes = deployed.num_features, model.config.num_classes
            weight, bias = evaluated.linear(model.head.fc, "head.fc", sizes)
            assign(deployed, {"head_weight": weight, "head_bias": bias})
        return deployed.described_as(model)

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeployedParNet:
        self._forget()  # what was packed is of the old weights
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        self._whole.forget()
        self._native.forget()
        self._cuda_network.forget()

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def operators(self) -> list[DeployedLayer]:
        """The layers that are operators of `ops`, in order of execution."""
        return [m for m in self.layers.values() if isinstance(m, DeployedLayer) and m.kind != "pointwise"]

    def levels(self) -> list[list[Layer]]:
        """The layers by depth; those of one level are independent of each other."""
        return levels(self.config)

    def whole(self) -> WholeNetwork | str:
        """The network as the runners of whole networks take it, the same object as long as nothing has changed; or
        what was done to it, or is active now, that one call of the native kernels would ignore.
        """
        if reason := why_not_now() or AS_MADE.why_not_class():
            return reason
        known = self._whole.get()
        if known is None:
            with self._whole.lock:
                known = self._whole.get()
                if known is None:
                    if reason := self._why_not_whole():
                        return reason
                    # Watched before anything is packed, and checked again: another thread's change must not slip by.
                    watched = [self, self.layers, *self.layers.values()]
                    settings = [("config",), (), *[("kind", "stride", "activation", "names")] * len(self.layers)]
                    watch = Watch(watched, settings)
                    if reason := self._why_not_whole():
                        return reason
                    arguments = [m.arguments() for m in self.layers.values() if isinstance(m, DeployedLayer)]
                    head = self.head_weight, self.head_bias
                    known = self._whole.put(watch, WholeNetwork(self.config, arguments, head))
        watch, found = known
        if torch.is_grad_enabled() and any(map(_requires_grad, watch.tensors)):
            return "weights need gradients"
        return found

    def _why_not_whole(self) -> str | None:
        blocks = all(_fused(self.config).values())
        return self.why_not_as_configured() if blocks else "a stream without blocks feeds a fusion"

    def why_not_as_configured(self) -> str | None:
        """Why the modules are not those that the configuration says, as they were made; or None."""
        config, graph, fused = self.config, layers(self.config), _fused(self.config)
        modules = self._modules.get("layers")
        if type(modules) is not nn.ModuleDict or [*modules] != [module_name(layer.name) for layer in graph]:
            return "layers were added, removed or reordered"
        shapes = {"head_weight": (config.num_classes, self.num_features), "head_bias": (config.num_classes,)}
        head: Any = self._buffers.get("head_weight", self._parameters.get("head_weight"))
        if reason := why_not_tensors(self, shapes, head):
            return reason
        for layer, (name, m) in zip(graph, modules.items(), strict=True):
            shapes = shapes_of(layer, fused.get(layer.name, False))
            reason = why_not_layer(m, (layer.kind, layer.stride, config.activation, tuple(shapes)))
            if reason := reason or why_not_tensors(m, shapes, head):
                return f"layers.{name}: {reason}"
        return None

    def why_layer_by_layer(self, x: Tensor | None = None) -> str | None:
        """The reason why a call (on images like x) goes layer by layer, not in one call of the native kernels; or None:
        layers replaced, wrapped, patched or hooked, weights that need a gradient, a transform of torch.func, …
        """
        found = self.whole()
        if isinstance(found, str):
            return found
        if x is None:
            return None
        runner = self._runner(x)
        return f"x is on {x.device}" if runner is None else runner.why_not(found, x)

    def _runner(self, x: Tensor) -> CpuNetwork | CudaNetwork | None:
        return self._native if x.is_cpu else self._cuda_network if x.is_cuda else None

    def _run(self, x: Tensor, result: str) -> Tensor:
        """result: "logits" [N, classes], "pooled" [N, P] or "features", the last map."""
        if torch.compiler.is_compiling():
            return self._layer_by_layer(x, result)
        with _label("parnet::network"):
            found = self.whole() if type(x) is Tensor else "not a plain tensor"
            if isinstance(found, WholeNetwork) and (runner := self._runner(x)) and runner.why_not(found, x) is None:
                made = runner.run(found, x, result)
                if made is not None:
                    return made
            self._check(x)
            return self._layer_by_layer(x, result, _label)

    def _layer_by_layer(
        self, x: Tensor, result: str, label: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> Tensor:
        made = {"image": x}
        for layer, last in self._schedule:
            inputs = [made[name] for name in layer.inputs]
            if layer.kind == "fusion_se":
                names = map(module_name, layer.inputs)
                inputs = [self.affines[n](t) if n in self.affines else t for n, t in zip(names, inputs, strict=True)]
            for name in last:
                del made[name]
            with label(layer.name):
                made[layer.name] = self.layers[module_name(layer.name)](*inputs)
        (features,) = made.values()
        if result == "features":
            return features
        with label("head"):
            return classify(features, (self.head_weight, self.head_bias) if result == "logits" else None)

    def _check(self, x: Any) -> None:
        """Says what is wrong with x in terms of the network, not of its first layer.

        Raises:
            TypeError: x is no tensor.
            ValueError: x has other channels, another dtype or device than the weights.
        """
        if not hasattr(type(x), "__torch_function__"):  # tensors, and what stands for them
            raise TypeError(
                f"parnet_kernels: `x` must be a tensor [N, {self.config.in_chans}, H, W], "
                f"got a {type(x).__module__}.{type(x).__name__}"
            )
        first = self.layers._modules.get(module_name(layers(self.config)[0].name))
        if not isinstance(x, Tensor) or type(first) is not DeployedLayer or first._forward_pre_hooks or x.dim() != 4:
            return
        weight, c = first.weight, first.weight.shape[1]
        if x.shape[1] != c:
            hint = ""
            if x.shape[3] == c:
                hint = ": it looks channels-last [N, H, W, C]; `x.permute(0, 3, 1, 2)` is [N, C, H, W]"
            raise ValueError(
                f"parnet_kernels: `x` of shape {list(x.shape)} has {x.shape[1]} channels, the network takes {c}{hint}"
            )
        if x.device != weight.device:
            raise ValueError(f"parnet_kernels: `x` is on {x.device}, the network on {weight.device}")
        if x.is_floating_point() and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"parnet_kernels: `x` is {x.dtype}, the network {weight.dtype}: convert one of them with `.to(…)`"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [N, P, ⌈H/32⌉, ⌈W/32⌉] in the ImageNet variants."""
        return self._run(x, "features")

    def forward(self, x: Tensor) -> Tensor:
        if any(name in self.__dict__ or getattr(type(self), name) is not method for name, method in _PARTS.items()):
            return self.forward_head(self.forward_features(x))  # one of them is someone's own
        return self._run(x, "logits" if self.num_classes else "pooled")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map → logits [N, num_classes], or pooled features [N, P] if `pre_logits` or without a classifier."""
        return classify(x, None if pre_logits or not self.num_classes else (self.head_weight, self.head_bias))

    def capture(self, x: Tensor) -> CapturedNetwork:
        """The whole network as one CUDA graph for images like `x`: see `CapturedNetwork`. It calls no forward hooks.

        Raises:
            RuntimeError: with the reason, where the CUDA kernels cannot run this network on `x`.
        """
        found = self.whole()
        if isinstance(found, str):
            raise RuntimeError(f"parnet_kernels: the network cannot be captured: {found}")
        return CapturedNetwork(found, self._cuda_network, x)

    def profile(self, x: Tensor) -> list[tuple[int, int, float]]:
        """Where the time of one call of the native CPU kernels goes: see `CpuNetwork.profile`.

        Raises:
            RuntimeError: with the reason, where they cannot run this network on `x`.
        """
        found = self.whole()
        if isinstance(found, str):
            raise RuntimeError(f"parnet_kernels: no profile without the native CPU kernels: {found}")
        return self._native.profile(found, x)

    def quantize(self, images: Tensor | Iterable[Tensor], dtype: str = "int8", range: str = "mse") -> QuantizedParNet:
        """The network in int8, calibrated on `images`: see `quantize.quantize`."""
        return quantize(self, images, dtype, range)

    def prepare(self, storage: str | None = None, products: str | None = None) -> DeployedParNet:
        """Packs the weights for the native CPU kernels now, not at the first call; returns itself.

        Without these kernels, with weights elsewhere, or with a reason to go layer by layer (`why_layer_by_layer`),
        nothing happens. Later changes of weights are seen: those that autograd's version counter tells, and of those
        that bypass it (collectives, `weight.data.mul_(2)`, NumPy views) all that change any of 64 values spread over
        each tensor, or any value of a vector. After others call it again: it always packs anew.

        storage: what memory holds of the nine taps of a filter: "transformed", the 64 values that are multiplied;
        "rows", the 24 of a transform along rows; "taps", the 9 themselves (with more than 512 input channels or a
        stride of 2: 36, 18, 9). The rest is made at each call. Less memory takes more time, but for large layers, which
        are bound by reading it. "auto", the start: by size of layer and map, and by processor (csrc/cpu/policy.h).
        None: as before.

        products: what is multiplied, "float32" (the start) or "bfloat16": a bfloat16 network then rounds every map to
        bfloat16 as well, takes less time where the processor has AMX (`parnet info`), and multiplies in float32
        elsewhere. None: as before.

        Raises:
            ValueError: for another storage or other products, and for products in bfloat16 of a network that is not.
        """
        if products == "bfloat16" and self.head_weight.dtype != torch.bfloat16:
            got = f"{self.head_weight.dtype}; convert it with `.bfloat16()`"
            raise ValueError(f"parnet_kernels: `products` in bfloat16 need a bfloat16 network, got {got}")
        self._native.use(storage, products)
        self._forget()
        found = None if _native.cpu_error else self.whole()
        if isinstance(found, WholeNetwork) and found.head[0].is_cpu and found.head[0].dtype in CPU_DTYPES:
            self._native.ready(found)
        return self


_PARTS = {"forward_features": DeployedParNet.forward_features, "forward_head": DeployedParNet.forward_head}
