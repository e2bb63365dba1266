"""Floating-point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

Counted as PyTorch counts: two for each product of a convolution (the gate is one), nothing for elementwise work. What
is counted is the operation, as for PyTorch's own: Winograd kernels need fewer products.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from parnet_kernels.call import OPERATORS, SIGNATURES

_COUNTER = "torch.utils.flop_counter"


def _convolution(weight: Sequence[int], result: Sequence[int]) -> int:
    """Of one 3×3 convolution, from shapes."""
    return 2 * math.prod(result) * math.prod(weight[1:])


def _gate(x: Sequence[int], gate_weight: Sequence[int]) -> int:
    return 2 * x[0] * math.prod(gate_weight)


def _forward(op: str) -> Any:
    signature = SIGNATURES[op]

    def formula(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        given = {**dict(zip(signature.tensors[: signature.positional], args, strict=False)), **kwargs}
        return _convolution(given["weight"], out_shape) + _gate(given["x"], given["gate_weight"])

    return formula


def _backward(op: str, g: Any, tensors: Any, stride: int, activation: str, need: Any, **_: Any) -> int:
    """The convolution and its gate once more, then one as large for the maps, one for the weight, two for the gate."""
    names = SIGNATURES[op].tensors
    shapes, needed = dict(zip(names, tensors, strict=True)), dict(zip(names, need, strict=True))
    convolution, gate = _convolution(shapes["weight"], g), _gate(shapes["x"], shapes["gate_weight"])
    maps = [needed[name] for name in SIGNATURES[op].maps]
    return convolution + gate + convolution * sum(maps) // len(maps) + convolution * needed["weight"] + 2 * gate


def _train_forward(maps: int) -> Any:
    def formula(*tensors: Any, out_shape: Any, **_: Any) -> int:
        convolutions = [_convolution(weight, out_shape[0]) for weight in tensors[maps : maps + 2]]
        return sum(convolutions) + _gate(tensors[0], tensors[-1])

    return formula


def _train_backward(g: Any, maps: Any, results: Any, parameters: Any, *, need: Any, **_: Any) -> int:
    both = [_convolution(weight, g) for weight in parameters[:2]]
    weights = sum(c for c, needed in zip(both, need[1:], strict=True) if needed)
    return weights + sum(both) * need[0] + 3 * _gate(maps[0], parameters[-1])  # the gate, and its two gradients


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for op in OPERATORS:
        register_flop_formula(getattr(torch.ops.parnet, op))(_forward(op))
    register_flop_formula(torch.ops.parnet.triton_backward)(_backward)
    register_flop_formula(torch.ops.parnet.repvgg_sse_train)(_train_forward(1))
    register_flop_formula(torch.ops.parnet.downsample_se_train)(_train_forward(1))
    register_flop_formula(torch.ops.parnet.fusion_se_train)(_train_forward(2))
    register_flop_formula(torch.ops.parnet._train_backward)(_train_backward)


class _WhenImported:
    """A finder that registers the formulas as soon as someone imports the counter: it imports triton, which takes
    longer than this package.
    """

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenImported)
