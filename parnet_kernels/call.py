"""One call of a public operator: the signatures, read from the schemas, and the arguments of a call by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parnet_kernels import _native  # noqa: F401  defines the schemas

OPERATORS = ("repvgg_sse", "downsample_se", "fusion_se")


class Signature(NamedTuple):
    """An operator's arguments, in the order of its schema."""

    positional: int
    options: dict[str, Any]  # the keyword-only arguments with their defaults; out_scale and out_shift are the tensors
    maps: tuple[str, ...]  # names of the tensors that hold images: "x", or "x" and "y"
    parameters: tuple[str, ...]  # names of the other tensors, out_scale and out_shift last

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.maps + self.parameters


def _signature(op: str) -> Signature:
    arguments = getattr(torch.ops.parnet, op).default._schema.arguments
    tensors = [a.name for a in arguments if "Tensor" in str(a.type)]
    first = tensors.index("weight")
    return Signature(
        positional=sum(not a.kwarg_only for a in arguments),
        options={a.name: a.default_value for a in arguments if a.kwarg_only},
        maps=tuple(tensors[:first]),
        parameters=tuple(tensors[first:]),
    )


SIGNATURES = {op: _signature(op) for op in OPERATORS}


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of `op`, defaults filled in."""

    op: str
    maps: tuple[Tensor, ...]
    parameters: dict[str, Tensor | None]  # every parameter of the signature, in its order; None where not given
    stride: int
    activation: str

    @classmethod
    def of(cls, op: str, positional: Sequence[Tensor | None], options: dict[str, Any]) -> Call:
        """From all positional arguments and the keyword ones that are given."""
        signature = SIGNATURES[op]
        options = {**signature.options, **options}
        tensors = [*positional, *(options[name] for name in signature.parameters if name in options)]
        return cls.of_tensors(op, tensors, options.get("stride", 1), options["activation"])

    @classmethod
    def of_tensors(cls, op: str, tensors: Sequence[Tensor | None], stride: int, activation: str) -> Call:
        """From all tensors of the signature, in its order."""
        signature, maps = SIGNATURES[op], len(SIGNATURES[op].maps)
        parameters = dict(zip(signature.parameters, tensors[maps:], strict=True))
        return cls(op, tuple(tensors[:maps]), parameters, stride, activation)  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> Tensor:
        """A parameter that was given."""
        parameter = self.parameters[name]
        assert parameter is not None, name
        return parameter

    @property
    def x(self) -> Tensor:
        return self.maps[0]

    @property
    def present(self) -> list[Tensor]:
        """The parameters that were given."""
        return [p for p in self.parameters.values() if p is not None]

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """All tensors by name, in the order of the signature."""
        return {**dict(zip(SIGNATURES[self.op].maps, self.maps, strict=True)), **self.parameters}

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, as the operator, `reference.py` and `ops.py` take them."""
        settings = {"stride": self.stride, "activation": self.activation}
        return {**self.tensors, **{k: v for k, v in settings.items() if k in SIGNATURES[self.op].options}}

    @property
    def result_shape(self) -> tuple[int, int, int, int]:
        n, _, h, w = self.x.shape
        return n, self["weight"].shape[0], (h - 1) // self.stride + 1, (w - 1) // self.stride + 1

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with every tensor changed."""
        parameters = {name: None if p is None else change(p) for name, p in self.parameters.items()}
        return replace(self, maps=tuple(map(change, self.maps)), parameters=parameters)

    def widened(self) -> Call:
        """The call in float32 if it is in 16-bit, else itself."""
        return self.map(Tensor.float) if self.x.dtype in (torch.float16, torch.bfloat16) else self
