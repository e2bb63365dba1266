"""Test bodies of the Triton kernels: on CPU tensors under TRITON_INTERPRET=1 (see ../test_interpreted.py), or on a GPU.

With neither, nothing here is collected.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from parnet_kernels.triton import launch, policy

collect_ignore_glob = [] if launch.INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_tiles: keeps the tile table under the interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not launch.INTERPRETED:
        for item in items:  # of the whole session
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def where() -> torch.device:
    return torch.device("cpu" if launch.INTERPRETED else "cuda")


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs below


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty is filled with NaN, so that a value nobody wrote shows. And the reference computes in float32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = before


if launch.INTERPRETED:
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _rounded(data: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        """Triton's interpreter truncates to bfloat16; a GPU rounds to nearest even. (And this is faster.)"""
        tl = interpreter.tl
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return _convert(data, source, target, mode)

    interpreter._convert_float = _rounded
    # Half of the interpreter's time; offsets have a test of their own.
    _builder = interpreter.interpreter_builder
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)
    _patched = {"parnet_kernels"}

    def _call(self: interpreter.InterpretedFunction, *arguments: object, **options: object) -> object:
        """Without patching triton.language anew at each call: a launch has, and Triton's own modules need it once.

        The interpreter wraps what it has wrapped before, deeper at each call, and soon does little else.
        """
        module = self.fn.__module__
        if module.split(".")[0] not in _patched and module not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(module)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = _call

    @pytest.fixture(autouse=True)
    def _large_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter's time goes by steps, whatever their size; tests marked `real_tiles` keep the table."""
        if "real_tiles" not in request.keywords:
            conv, weight = policy.Tile(128, 128, 64, 4, 2), policy.Tile(128, 128, 128, 4, 2)
            table = {
                (kind, mode): (policy.Rule(0, 0, conv if kind == "conv" else weight),)
                for kind in policy.KINDS
                for mode in policy.MODES
            }
            monkeypatch.setitem(policy.TABLES, "sm_80", table)
