"""What a runner of whole networks (`cpu/network.py`, `cuda/network.py`) is given, and what these have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from parnet_kernels import selection
from parnet_kernels.config import Layer, ParNetConfig, layers
from parnet_kernels.reference import ACTIVATIONS


@dataclass(frozen=True, eq=False)
class WholeNetwork:
    """A deployed network as plain values, all tensors on one device and of one dtype. `DeployedParNet.whole` gives the
    same object as long as nothing has changed: what was packed for an object is good for that object, and no other.
    """

    config: ParNetConfig
    arguments: list[dict[str, Tensor]]  # of each of `layers(config)`: see `DeployedLayer.arguments`
    head: tuple[Tensor, Tensor]  # the classifier's weight [classes, P] and bias [classes]

    def operators(self) -> list[tuple[Layer, dict[str, Tensor]]]:
        """The layers that are operators of `ops`, in order of execution, with their arguments."""
        pairs = zip(layers(self.config), self.arguments, strict=True)
        return [(layer, arguments) for layer, arguments in pairs if layer.kind != "pointwise"]

    def end(self, features: Tensor, result: str) -> Tensor:
        """What follows the operators in the CIFAR form, whose last layer is a 1×1 convolution, by PyTorch."""
        last = self.arguments[-1]
        y = ACTIVATIONS[self.config.activation](F.conv2d(features, last["weight"], last["bias"]))
        return y if result == "features" else classify(y, None if result == "pooled" else self.head)


def classify(features: Tensor, head: tuple[Tensor, Tensor] | None) -> Tensor:
    """The last map [N, P, h, w] → logits [N, classes], or channel means [N, P] without a head."""
    pooled = features.mean((2, 3))
    return pooled if head is None else F.linear(pooled, *head)


def why_not_now() -> str | None:
    """What is active around this call and would see, or change, single operators, but not one call for all; or None."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the network is being traced"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if (count := torch._C._len_torch_function_stack()) and any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count)
    ):
        return "a TorchFunctionMode is active"
    return None


def why_not_tensors(m: nn.Module, shapes: dict[str, tuple[int, ...]], like: Tensor) -> str | None:
    """Why a module's tensors are not what the native kernels need, or None."""
    for name, shape in shapes.items():
        t = m._buffers.get(name, m._parameters.get(name))
        if type(t) not in (Tensor, nn.Parameter):
            return f"{name} is neither a buffer nor a Parameter, or of another class"
        assert t is not None
        if t.shape != shape or t.layout is not torch.strided:
            return f"{name} has another shape or layout"
        if t.dtype != like.dtype or t.device != like.device:
            return "weights are of several dtypes or devices"
        if t.is_inference():
            return "weights are inference tensors, whose changes cannot be seen"
    return None


def why_not(backend: str, network: WholeNetwork, x: Tensor) -> str | None:
    """The reason, common to all runners, why the one of `backend` cannot take the network for x, or None."""
    if (forced := selection.forced_backend()) not in (None, backend):
        return f"the backend {forced!r} is asked for"
    if type(x) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return f"x is a {type(x).__name__}"
    weight, shape = network.head[0], x.shape
    if x.dtype != weight.dtype or x.device != weight.device:
        return f"x is {x.dtype} on {x.device}, the weights {weight.dtype} on {weight.device}"
    if x.layout is not torch.strided or len(shape) != 4 or shape[1] != network.config.in_chans or 0 in shape[1:]:
        return f"x is {x.layout} of shape {list(shape)}"
    if torch.is_autocast_enabled(backend):
        return "autocast is on"
    if torch.is_grad_enabled() and x.requires_grad:
        return "x needs a gradient"
    return None
