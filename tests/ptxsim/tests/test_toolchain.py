"""The build of the native core, and what happens where something is missing."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ptxsim import Unavailable, compile_cuda, native, toolchain

from .helpers import KERNELS

TESTS = Path(native.__file__).parents[1]


def test_core_is_outside_the_repository():
    cache = native.cache_directory().resolve()
    assert not cache.is_relative_to(TESTS.parent)
    assert Path(native.core().__file__).parent == cache


def test_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        native._compiler()


def test_compiler_behind_a_cache(monkeypatch):
    monkeypatch.setenv("CXX", "env g++")
    assert native._compiler()[0] == ["env", "g++"]


def test_key_depends_on_sources_and_flags(monkeypatch, tmp_path):
    command = native._compiler()
    key = native._key(*command)
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-DX"])
    assert native._key(*command) != key
    monkeypatch.undo()
    (tmp_path / "one.cpp").write_text("int x;")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    before = native._key(*command)
    (tmp_path / "one.cpp").write_text("int y;")
    assert len({before, native._key(*command), key}) == 3


@pytest.fixture
def small_module(monkeypatch, tmp_path):
    """A core of one line, to watch it being built."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    text = '#include <pybind11/pybind11.h>\nPYBIND11_MODULE(PTXSIM_MODULE, m) { m.attr("answer") = 42; }\n'
    (sources / "bindings.cpp").write_text(text)
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setenv("PTXSIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_concurrent_builds(small_module, monkeypatch):
    builds, build = [], native._build
    monkeypatch.setattr(native, "_build", lambda *args: (builds.append(args), build(*args)))
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(native.core.__wrapped__().answer)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 3
    assert len(builds) == 1
    assert [path.suffix for path in sorted(small_module.iterdir())] == [".lock", ".so"]  # nothing else is left behind


def test_broken_source_says_so(small_module):
    (native.SOURCES / "bindings.cpp").write_text("this is not C++\n")
    with pytest.raises(RuntimeError, match=r"(?s)building the PTX simulator failed.*bindings.cpp"):
        native.core.__wrapped__()


def test_missing_nvcc(monkeypatch):
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None)
    with pytest.raises(Unavailable, match="no nvcc on this machine"):
        compile_cuda(KERNELS / "basic.cu")
    assert toolchain.why_no_nvcc() == "no nvcc on this machine"


def test_tests_skip_without_a_compiler(tmp_path):
    """The reason is printed."""
    environment = {"CXX": "no-such-compiler", "PATH": "/usr/bin:/bin", "PTXSIM_CACHE": str(tmp_path)}
    test = TESTS / "ptxsim" / "tests" / "test_integer.py"
    command = [sys.executable, "-m", "pytest", "-rs", "-q", "-p", "no:cacheprovider", str(test), "-k", "test_128"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no C++ compiler (no-such-compiler)" in run.stdout
