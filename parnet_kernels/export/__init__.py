"""Networks for other runtimes; each needs an optional package, and says so."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parnet_kernels.export.onnx_file import onnx as onnx
    from parnet_kernels.export.pt2_file import package as package

_MODULES = {
    "onnx": "onnx_file",
    "package": "pt2_file",
}  # loaded when they are asked for: `import parnet_kernels` stays quick


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
