"""The package's files: no import circle, each short enough for one sitting."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "parnet_kernels"


def imports() -> dict[str, set[str]]:
    """Of each module, the modules of the package that it imports anywhere: lazily and for type checkers too."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("parnet_kernels", *path.relative_to(PACKAGE).with_suffix("").parts))
        files[name.removesuffix(".__init__")] = path
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports name the package"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else str(node.module) for name in full}
        found[module] = {name for name in names if name in files} - {module}
    return found


def test_no_import_circle() -> None:
    found = imports()
    assert "parnet_kernels.config" in found["parnet_kernels.deployed"]
    list(graphlib.TopologicalSorter(found).static_order())  # raises CycleError, which names the circle


def test_names_of_test_files_differ() -> None:
    """Two of one name in folders that are no packages abort the collection where both are collected."""
    folders = {path.parent for path in Path(__file__).parent.rglob("test_*.py")}
    names = [p.name for f in folders if not (f / "__init__.py").exists() for p in f.glob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}


def test_files_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > 450}
