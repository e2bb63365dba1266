"""ParNet for inference: one operator a layer, BatchNorms and branches folded away, in levels of independent layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parnet_kernels import _native, ops
from parnet_kernels.config import Layer, ParNetConfig, layers, levels
from parnet_kernels.cpu.network import CpuNetwork
from parnet_kernels.cuda.network import CapturedNetwork, CudaNetwork
from parnet_kernels.reference import ACTIVATIONS, per_channel
from parnet_kernels.reparam import affine_of

if TYPE_CHECKING:
    from parnet_kernels.model import ParNet


class DeployedLayer(nn.Module):
    """One layer as one operator; its buffers are the operator's arguments. See `ops` for their shapes."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Layer, activation: str, with_affine: bool) -> None:
        super().__init__()
        self.kind = layer.kind
        self.stride = layer.stride
        self.activation = activation
        c, k = layer.in_channels, layer.out_channels
        shapes: dict[str, tuple[int, ...]] = {"weight": (k, c, 3, 3), "bias": (k,), "gate_weight": (k, c)}
        if layer.kind == "pointwise":
            shapes = {"weight": (k, c, 1, 1), "bias": (k,)}
        if layer.kind == "repvgg_sse":
            shapes |= {"skip_scale": (c,), "skip_shift": (c,)}
        if with_affine:
            shapes |= {"out_scale": (k,), "out_shift": (k,)}
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def extra_repr(self) -> str:
        k, c = self.weight.shape[:2]
        return f"{self.kind}, {c} → {k} channels, stride {self.stride}, {self.activation}"

    def arguments(self) -> dict[str, Tensor]:
        """The operator's tensors by name, whatever they are now: buffers, Parameters, parametrized."""
        return {name: getattr(self, name) for name in self.names}

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.kind == "pointwise":
            return ACTIVATIONS[self.activation](F.conv2d(inputs[0], self.weight, self.bias))
        options: dict[str, Any] = {} if self.kind == "repvgg_sse" else {"stride": self.stride}
        return getattr(ops, self.kind)(*inputs, **self.arguments(), activation=self.activation, **options)


class AffineLayer(nn.Module):
    """scale·x + shift: a fusion's BatchNorm where no producer can take it over (a stream without blocks)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, c: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(c))
        self.register_buffer("shift", torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        return x * per_channel(self.scale) + per_channel(self.shift)


def _slot(name: str) -> str:
    """A layer's name as a module name."""
    return name.replace(".", "_")


def _global_hooks() -> bool:
    g = torch.nn.modules.module
    return bool(
        g._global_forward_hooks
        or g._global_forward_pre_hooks
        or g._global_backward_hooks
        or g._global_backward_pre_hooks
    )


class DeployedParNet(nn.Module):
    """ParNet for inference. Make one with `ParNet.deploy()` or `load_deployed`.

    Input [N, in_chans, H, W], H, W ≥ 1; output logits [N, num_classes] ([N, P] without a classifier).

    The BatchNorms before a fusion are the output affine of the layer that produces their input: exact at the border
    too, where the zero padding comes after them. On the CPU and on CUDA devices the whole network is one call of the
    native kernels where they can take it, with packed weights that are made by `prepare` or at the first call and are
    not part of the state dict; else, and wherever something was done to a layer that those kernels would not see
    (`why_layer_by_layer`), each layer is one operator.

    Weights are buffers. One that asks for a gradient (`network.head_weight.requires_grad_()`), or is replaced by a
    Parameter, gets it; then each layer is one operator.
    """

    head_weight: Tensor
    head_bias: Tensor

    # Buffers are never inference tensors, whose changes could not be seen by the packed weights.
    @torch.inference_mode(False)
    def __init__(self, config: ParNetConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.planes[-1]
        graph = layers(config)
        uses = [name for layer in graph for name in layer.inputs]
        fused = [name for layer in graph if layer.kind == "fusion_se" for name in layer.inputs]
        in_producer = {name for name in fused if uses.count(name) == 1}
        self.layers = nn.ModuleDict(
            {_slot(layer.name): DeployedLayer(layer, config.activation, layer.name in in_producer) for layer in graph}
        )
        width = {layer.name: layer.out_channels for layer in graph}
        self.affines = nn.ModuleDict({_slot(n): AffineLayer(width[n]) for n in fused if n not in in_producer})
        self.has_affines = len(self.affines) > 0
        self.register_buffer("head_weight", torch.zeros(config.num_classes, self.num_features))
        self.register_buffer("head_bias", torch.zeros(config.num_classes))
        self._built = {name: (m.kind, m.stride, m.activation) for name, m in self.layers.items()}
        self._native = CpuNetwork()
        self._cuda_network = CudaNetwork()
        self.eval()

    @classmethod
    @torch.no_grad()
    def from_training(cls, model: ParNet) -> DeployedParNet:
        """Folds `model` (in float64, stored in its dtype, on its device), with its running statistics."""
        reference = next(model.parameters())
        deployed = cls(model.config).to(reference.device, reference.dtype)

        def assign(module: nn.Module, values: dict[str, Tensor]) -> None:
            for name, value in values.items():
                module.get_buffer(name).copy_(value)

        for layer in layers(model.config):
            assign(deployed.layers[_slot(layer.name)], model.block(layer.name).fold())
            if layer.kind == "fusion_se":
                norm = model.fusion_norm(layer.name)
                for name, bn in zip(layer.inputs, (norm.b1, norm.b2), strict=True):
                    scale, shift = affine_of(bn)
                    if _slot(name) in deployed.affines:
                        assign(deployed.affines[_slot(name)], {"scale": scale, "shift": shift})
                    else:
                        assign(deployed.layers[_slot(name)], {"out_scale": scale, "out_shift": shift})
        if model.config.num_classes:
            assign(deployed, {"head_weight": model.head.fc.weight, "head_bias": model.head.fc.bias})
        return deployed

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeployedParNet:
        # What was packed is of the old buffers.
        self._native.forget()
        self._cuda_network.forget()
        return super()._apply(fn, recurse)

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def operators(self) -> list[DeployedLayer]:
        """The layers that are operators of `ops`, in order of execution."""
        return [m for m in self.layers.values() if isinstance(m, DeployedLayer) and m.kind != "pointwise"]

    def levels(self) -> list[list[Layer]]:
        """The layers by depth; those of one level are independent of each other."""
        return levels(self.config)

    def why_layer_by_layer(self) -> str | None:
        """What was done to the network that a single call of the native kernels would ignore, or None: layers replaced,
        wrapped, patched or hooked, weights that are Parameters or need a gradient, a transform of torch.func.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a transform of torch.func is active"
        if _global_hooks():
            return "there are global module hooks"
        if self._parameters:
            return f"{', '.join(self._parameters)} is a Parameter"
        layers = self.layers._modules
        if [*layers] != [*self._built]:
            return "layers were added, removed or reordered"
        for name, built in self._built.items():
            m: Any = layers[name]
            d = m.__dict__  # asked at every call, with cold caches: no attribute look-ups
            if type(m) is not DeployedLayer or d["_modules"] or d["_parameters"] or "forward" in d:
                return f"layers.{name} was replaced or changed"
            if (d["kind"], d["stride"], d["activation"]) != built:
                return f"layers.{name} has other settings than it was built with"
            if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
                return f"layers.{name} has hooks"
        if torch.is_grad_enabled() and any(b.requires_grad for b in self.buffers()):
            return "weights need gradients"
        return None

    def _run(self, x: Tensor, result: str) -> Tensor:
        """result: "logits" [N, classes], "pooled" [N, P] or "features", the last map."""
        whole_network = () if self.why_layer_by_layer() else (self._native, self._cuda_network)
        for whole in whole_network:
            if whole.why_not(self, x) is None and (found := whole.run(self, x, result)) is not None:
                return found
        made = {"image": x}
        graph = layers(self.config)
        for index, layer in enumerate(graph):
            inputs: Iterable[Tensor] = (made[name] for name in layer.inputs)
            if layer.kind == "fusion_se":
                inputs = (
                    self.affines[_slot(name)](made[name]) if _slot(name) in self.affines else made[name]
                    for name in layer.inputs
                )
            made[layer.name] = self.layers[_slot(layer.name)](*inputs)
            needed = {name for later in graph[index + 1 :] for name in later.inputs} | {layer.name}
            made = {name: value for name, value in made.items() if name in needed}
        features = made[graph[-1].name]
        if result == "features":
            return features
        pooled = features.mean((2, 3))
        return pooled if result == "pooled" else F.linear(pooled, self.head_weight, self.head_bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [N, P, ⌈H/32⌉, ⌈W/32⌉] in the ImageNet variants."""
        return self._run(x, "features")

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, "logits" if self.num_classes else "pooled")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map → logits [N, num_classes], or pooled features [N, P] if `pre_logits` or without a classifier."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits or not self.num_classes else F.linear(pooled, self.head_weight, self.head_bias)

    def capture(self, x: Tensor) -> CapturedNetwork:
        """The whole network as one CUDA graph for images like `x`: see `CapturedNetwork`. It calls no forward hooks.

        Raises:
            RuntimeError: with the reason, where the CUDA kernels cannot run this network on `x`.
        """
        return CapturedNetwork(self, x)

    def prepare(self, storage: str | None = None) -> DeployedParNet:
        """Packs the weights for the native CPU kernels now, not at the first call; returns itself.

        Without these kernels, with weights elsewhere, or with a reason to go layer by layer (`why_layer_by_layer`),
        nothing happens. Later changes of weights are seen: those that autograd's version counter tells, and of those
        that bypass it (collectives, `weight.data.mul_(2)`, NumPy views) all that change any of 64 values spread over
        each tensor, or any value of a vector. After others call it again: it always packs anew.

        storage: of the 9 values of a kernel, "wide" keeps the 64 transformed ones of tiles of 6 × 6, "full" the 36 of
        4 × 4, "rows" 24, "compact" 9; the rest is made at each call (more than 512 input channels, strides of 2: 36,
        36, 18, 9). Less memory takes more time, but for large layers bound by reading it; "full" takes more for batches
        and large maps only. "auto", the start: "wide"; but "compact" from 1200 × 1200 channels on and, with AVX-512,
        where maps are smaller than an eighth of the image, "rows" from 270 × 270 channels on. None: as before.

        Raises:
            ValueError: for another storage.
        """
        self._native.use(storage)
        self._cuda_network.forget()
        if not _native.cpu_error and self.why_layer_by_layer() is None:
            self._native.prepare(self)
        return self
