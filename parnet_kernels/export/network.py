"""The network that is exported: folded, and exactly what its configuration and its weights say."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from torch import nn

from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.deployed_layer import AffineLayer
from parnet_kernels.model import ParNet
from parnet_kernels.quantized import QuantizedParNet
from parnet_kernels.unchanged import HOOKS
from parnet_kernels.whole import why_not_now, why_not_tensors

_METHODS = ("forward", "forward_features", "forward_head")


def deployed_form(network: Any, what: str, forms: str = "a ParNet or DeployedParNet") -> DeployedParNet:
    """`network` if it is deployed, else folded. `what` is being done, and takes `forms`, for the messages.

    Raises:
        TypeError: it is no ParNet.
        ValueError: something was done to it that a file of its configuration and weights would not hold.
    """
    if not isinstance(network, ParNet | DeployedParNet):
        raise TypeError(f"{what}: `network` must be {forms}, got a {type(network).__name__}")
    reason = why_not_now() or _why_not_methods(network) or _why_not_hooks(network)
    if reason is None and isinstance(network, ParNet):
        network = network.deploy()
    if reason := reason or _why_not_plain(network):
        raise ValueError(f"{what}: `network` cannot be exported as it is: {reason}")
    return network


def int8_form(network: QuantizedParNet, what: str) -> QuantizedParNet:
    """`network`, as `quantize` made it.

    Raises:
        ValueError: something was done to it that a file of its configuration and weights would not hold.
    """
    reason = why_not_now() or _why_not_methods(network) or _why_not_hooks(network) or network.why_not_as_configured()
    if reason:
        raise ValueError(f"{what}: `network` cannot be exported as it is: {reason}")
    return network


def metadata(network: DeployedParNet | QuantizedParNet) -> dict[str, str]:
    """What an exported file tells about a network besides its function: JSON texts, named as in our own files."""
    return {"parnet_config": json.dumps(asdict(network.config)), **network.description()}


def _why_not_methods(network: nn.Module) -> str | None:
    base = next(form for form in (ParNet, DeployedParNet, QuantizedParNet) if isinstance(network, form))
    for name in _METHODS:
        if name in network.__dict__ or getattr(type(network), name) is not getattr(base, name):
            return f"it has a `{name}` of its own"
    return None


def _why_not_hooks(network: nn.Module) -> str | None:
    for name, module in network.named_modules():
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"{name or 'it'} has hooks"
    return None


def _why_not_plain(network: DeployedParNet) -> str | None:
    if reason := network.why_not_as_configured():
        return reason
    for name, m in network.affines.items():
        if type(m) is not AffineLayer:
            return f"affines.{name} is a {type(m).__name__}"
        shapes = dict.fromkeys(("scale", "shift"), tuple(m.scale.shape))
        if reason := why_not_tensors(m, shapes, network.head_weight):
            return f"affines.{name}: {reason}"
    return None
