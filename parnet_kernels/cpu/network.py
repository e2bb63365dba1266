"""A deployed network as one call of the native CPU kernels: packed weights, layouts and workspace stay inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from parnet_kernels import _native, selection
from parnet_kernels.checks import is_channels_last
from parnet_kernels.config import layers
from parnet_kernels.cpu import backend as cpu
from parnet_kernels.locks import Lock
from parnet_kernels.unchanged import Watch

if TYPE_CHECKING:
    from parnet_kernels.deployed import DeployedParNet

STORAGES = cpu.CODES["storage"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Packed(NamedTuple):
    watch: Watch
    weights: Tensor | None  # of all layers; None if a buffer is not finite: the kernels' tiles would spread it
    program: Tensor | None  # see schemas.inc
    classifier: Tensor | None


class CpuNetwork:
    """The packed form of one `DeployedParNet`, made again whenever one of its buffers was replaced or changed in place.

    Not copied, pickled or saved with the network: the copy packs its own.
    """

    def __init__(self, storage: str = "auto") -> None:
        self.storage = storage
        self._packed: _Packed | None = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[CpuNetwork], tuple[str]]:
        return CpuNetwork, (self.storage,)

    def why_not(self, network: DeployedParNet, x: Tensor) -> str | None:
        """The reason why this call must go layer by layer, or None."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "the network is being traced"
        if _native.cpu_error:
            return _native.cpu_error
        if (forced := selection.forced_backend()) not in (None, "cpu"):
            return f"the backend {forced!r} is asked for"
        if type(x) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return f"x is a {type(x).__name__}"
        head = network.head_weight
        if not (x.is_cpu and head.is_cpu):
            return "not on the CPU"
        if x.dtype not in _DTYPES or head.dtype != x.dtype:
            return f"x is {x.dtype} and the weights are {head.dtype}, not both one of {_DTYPES}"
        shape = x.shape
        if len(shape) != 4 or shape[1] != network.config.in_chans or 0 in shape[1:]:
            return f"x has shape {list(shape)}"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if torch.is_grad_enabled() and x.requires_grad:
            return "x needs a gradient"
        if unpack_dual(x).tangent is not None:
            return "x has a tangent"
        if network.has_affines:
            return "a stream without blocks feeds a fusion"
        return None

    def use(self, storage: str | None) -> None:
        """Packs anew at the next use, with `storage` from now on (None: as before)."""
        if storage not in (None, *STORAGES):
            raise ValueError(f"parnet_kernels: `storage` must be one of {STORAGES}, got {storage!r}")
        with self._lock:
            self.storage, self._packed = storage or self.storage, None

    def forget(self) -> None:
        """Frees the packed weights; the next call makes them again."""
        self._packed = None

    def prepare(self, network: DeployedParNet) -> _Packed | None:
        """Packs the weights if they are not, or have changed since; None if they cannot be watched, are
        elsewhere or not finite.
        """
        packed = self._packed
        if packed is None or not packed.watch.unchanged():
            with self._lock:
                packed = self._packed
                if packed is None or not packed.watch.unchanged():
                    # The watch first: a change while packing must be seen at the next call.
                    watch = Watch.of(network, "cpu")
                    self._packed = packed = self._pack(network, watch) if watch else None
        return packed if packed is not None and packed.weights is not None else None

    def _storages(self, network: DeployedParNet) -> list[str]:
        """Of each layer; "auto" is chosen for images of 224 × 224 pixels."""
        storages, reduced = [], {"image": 1}
        for m, layer in zip(network.operators(), layers(network.config), strict=False):
            reduced[layer.name] = reduced[layer.inputs[0]] * m.stride
            automatic = cpu.storage_of((224 // reduced[layer.name]) ** 2, m.weight)
            storages.append(automatic if self.storage == "auto" else self.storage)
        return storages

    def _pack(self, network: DeployedParNet, watch: Watch) -> _Packed:
        if not cpu.are_finite(list(network.buffers())):
            return _Packed(watch, None, None, None)
        modules = network.operators()
        names = ("kind", "stride", "activation")
        weights, starts = cpu.pack_layers(
            [
                cpu.OPTIONAL | m.arguments() | {name: getattr(m, name) for name in names} | {"storage": storage}
                for m, storage in zip(modules, self._storages(network), strict=True)
            ]
        )
        slots, program = {"image": 0}, []
        for start, layer in zip(starts, layers(network.config), strict=False):  # a pointwise head is not packed
            inputs = [slots[name] for name in layer.inputs]
            slots[layer.name] = len(slots)
            program.append([start, inputs[0], inputs[1] if len(inputs) == 2 else -1, slots[layer.name]])
        classifier = None
        if network.num_classes and not network.config.pointwise_head:
            classifier = torch.ops.parnet._cpu_pack_classifier(network.head_weight, network.head_bias)
        return _Packed(watch, weights, torch.tensor(program, dtype=torch.int64, device="cpu"), classifier)

    def run(self, network: DeployedParNet, x: Tensor, result: str) -> Tensor | None:
        """result: "logits" [N, classes], "pooled" [N, P] or "features", the last map. None: not with these weights."""
        packed = self.prepare(network)
        if packed is None:
            return None
        arguments = x, packed.weights, packed.program
        last = is_channels_last(x)
        if not network.config.pointwise_head:
            classifier = packed.classifier if result == "logits" else None
            return torch.ops.parnet._cpu_network.default(*arguments, result != "features", last, classifier)
        features = network.layers["combine_3"](torch.ops.parnet._cpu_network.default(*arguments, False, last))
        if result == "features":
            return features
        pooled = features.mean((2, 3))
        return pooled if result == "pooled" else F.linear(pooled, network.head_weight, network.head_bias)

    def profile(self, network: DeployedParNet, x: Tensor) -> list[tuple[int, int, float]]:
        """Where the time of one run to the logits goes: for each stage the kind of work (`Work` in csrc/cpu/network.h),
        the layer (−1: none) and seconds of all threads.

        Raises:
            RuntimeError: with the reason, where the native kernels cannot run this network on `x`.
        """
        if (reason := self.why_not(network, x)) is not None:
            raise RuntimeError(f"parnet_kernels: no profile without the native CPU kernels: {reason}")
        packed = self.prepare(network)
        if packed is None:
            raise RuntimeError("parnet_kernels: no profile without the native CPU kernels: not with these weights")
        stages = torch.ops.parnet._cpu_profile(
            x, packed.weights, packed.program, True, is_channels_last(x), packed.classifier
        )
        return [(int(work), int(layer), seconds) for work, layer, seconds in stages.tolist()]
