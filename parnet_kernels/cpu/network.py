"""A deployed network as one call of the native CPU kernels: packed weights, layouts and workspace stay inside."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parnet_kernels import _native, whole
from parnet_kernels.checks import is_channels_last
from parnet_kernels.cpu import bfloat16, direct
from parnet_kernels.cpu import pack as cpu
from parnet_kernels.cpu.backend import DTYPES
from parnet_kernels.cpu.bfloat16 import Bfloat16
from parnet_kernels.locks import Lock
from parnet_kernels.whole import WholeNetwork

STORAGES = ("auto", *cpu.CODES["storage"])
PRODUCTS = ("float32", "bfloat16")


def storages(network: WholeNetwork, storage: str) -> list[str]:
    """The storage of each operator; "auto" is what suits images of 224 × 224 pixels."""
    if storage != "auto":
        return [storage] * len(network.operators())
    found, reduced = [], {"image": 1}
    for layer, arguments in network.operators():
        reduced[layer.name] = reduced[layer.inputs[0]] * layer.stride
        found.append(cpu.storage_of((224 // reduced[layer.name]) ** 2, arguments["weight"]))
    return found


def products_of_16_bits() -> str:
    """How 16-bit networks multiply on this processor (docs/cpu.md, "16-bit networks")."""
    if reason := direct.why_not(torch.bfloat16):
        return f"float32: {reason}"
    return "float32; bfloat16 networks after prepare(products='bfloat16') in AMX tiles"


def _tensors(network: WholeNetwork) -> list[Tensor]:
    return [*network.head, *(t for arguments in network.arguments for t in arguments.values())]


class _Packed(NamedTuple):
    of: WholeNetwork
    weights: Tensor | None  # of all layers; None if a weight is not finite: the kernels' tiles would spread it
    steps: Tensor | None  # see schemas.inc
    classifier: Tensor | None


class CpuNetwork:
    """The packed form of one `DeployedParNet`, made again for every other `WholeNetwork`.

    Not copied, pickled or saved with the network: the copy packs its own.
    """

    def __init__(self, storage: str = "auto", products: str = "float32") -> None:
        self.storage, self.products = storage, products
        self._packed: _Packed | None = None
        self._bfloat16: tuple[WholeNetwork, Bfloat16 | None] | None = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[CpuNetwork], tuple[str, str]]:
        return CpuNetwork, (self.storage, self.products)

    def why_not(self, network: WholeNetwork, x: Tensor) -> str | None:
        """The reason why this call must go layer by layer, or None."""
        if _native.cpu_error:
            return _native.cpu_error
        if x.dtype not in DTYPES:
            return f"x is {x.dtype}, not one of {DTYPES}"
        return whole.why_not("cpu", network, x)

    def use(self, storage: str | None, products: str | None = None) -> None:
        """Packs anew at the next use, with `storage` and `products` from now on (None: as before)."""
        for name, value, known in (("storage", storage, STORAGES), ("products", products, PRODUCTS)):
            if value not in (None, *known):
                raise ValueError(f"parnet_kernels: `{name}` must be one of {known}, got {value!r}")
        with self._lock:
            self.storage, self.products = storage or self.storage, products or self.products
            self.forget()

    def forget(self) -> None:
        """Frees the packed weights; the next call makes them again."""
        self._packed = self._bfloat16 = None

    def prepare(self, network: WholeNetwork) -> _Packed | None:
        """Packs the weights if they are not; None if they are not finite."""
        packed = self._packed
        if packed is None or packed.of is not network:
            with self._lock:
                packed = self._packed
                if packed is None or packed.of is not network:
                    self._packed = packed = self._pack(network)
        return packed if packed.weights is not None else None

    def ready(self, network: WholeNetwork) -> None:
        """Packs what calls will use."""
        if self._in_bfloat16(network) is None:
            self.prepare(network)

    def _in_bfloat16(self, network: WholeNetwork) -> Bfloat16 | None:
        """The weights for products in bfloat16, if those are asked for and this processor and network can have them."""
        if self.products != "bfloat16":
            return None
        known = self._bfloat16
        if known is None or known[0] is not network:
            with self._lock:
                known = self._bfloat16
                if known is None or known[0] is not network:
                    able = bfloat16.why_not(network) is None and cpu.are_finite(_tensors(network))
                    packed = bfloat16.pack(network, direct.choose(None, torch.bfloat16)) if able else None
                    self._bfloat16 = known = network, packed
        return known[1]

    def _pack(self, network: WholeNetwork) -> _Packed:
        if not cpu.are_finite(_tensors(network)):
            return _Packed(network, None, None, None)
        operators, activation = network.operators(), network.config.activation
        weights, starts = cpu.pack_layers(
            [
                {**cpu.OPTIONAL, **arguments, "kind": layer.kind, "stride": layer.stride}
                | {"activation": activation, "storage": storage}
                for (layer, arguments), storage in zip(operators, storages(network, self.storage), strict=True)
            ]
        )
        variables, steps = {"image": 0}, []
        for start, (layer, _) in zip(starts, operators, strict=True):
            inputs = [variables[name] for name in layer.inputs]
            variables[layer.name] = len(variables)
            steps.append([start, inputs[0], inputs[1] if len(inputs) == 2 else -1, variables[layer.name]])
        classifier = None
        if network.config.num_classes and not network.config.pointwise_head:
            classifier = torch.ops.parnet._cpu_pack_classifier(*network.head)
        return _Packed(network, weights, torch.tensor(steps, dtype=torch.int64, device="cpu"), classifier)

    def run(self, network: WholeNetwork, x: Tensor, result: str) -> Tensor | None:
        """result: "logits" [N, classes], "pooled" [N, P] or "features", the last map. None: not with these weights."""
        if len(x) and (narrow := self._in_bfloat16(network)):
            made = bfloat16.run(narrow, network, x, result)
            if made is not None:
                return made
        packed = self.prepare(network)
        if packed is None:
            return None
        arguments = x, packed.weights, packed.steps
        last = is_channels_last(x)
        if network.config.pointwise_head:
            return network.end(torch.ops.parnet._cpu_network.default(*arguments, False, last), result)
        classifier = packed.classifier if result == "logits" else None
        return torch.ops.parnet._cpu_network.default(*arguments, result != "features", last, classifier)

    def profile(self, network: WholeNetwork, x: Tensor) -> list[tuple[int, int, float]]:
        """Where the time of one run to the logits goes: for each stage the task (`Task` in
        csrc/cpu/schedule/stages.h), the layer (−1: none) and seconds of all threads.

        Raises:
            RuntimeError: with the reason, where the native kernels cannot run this network on `x`.
        """
        packed, reason = None, self.why_not(network, x)
        if reason is None and self._in_bfloat16(network):
            reason = "products are bfloat16, whose layers are one stage"
        if reason is None and (packed := self.prepare(network)) is None:
            reason = "a weight is not finite"
        if packed is None:
            raise RuntimeError(f"parnet_kernels: no profile without the native CPU kernels: {reason}")
        stages = torch.ops.parnet._cpu_profile(
            x, packed.weights, packed.steps, True, is_channels_last(x), packed.classifier
        )
        return [(int(work), int(layer), seconds) for work, layer, seconds in stages.tolist()]
