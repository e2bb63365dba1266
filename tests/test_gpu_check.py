"""`make gpu-check`: time boxes, what is missing, and a rehearsal."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check import facts, run, steps
from bench.gpu_check.__main__ import main
from bench.gpu_check.facts import Facts, why_not
from bench.gpu_check.steps import Step

H200 = ("NVIDIA H200", (9, 0))


def there(**changes: Any) -> Facts:
    tools = dict.fromkeys(("ninja", "pytest", "xdist", "ncu", "compute-sanitizer"), "/usr/bin/true")
    found = {"torch": "2.11.0+cu130", "cuda": "13.0", "gpus": [H200], "nvcc": "/cuda/bin/nvcc", "tools": tools}
    return Facts(**{**found, **changes})


# ------------------------------------------------------------------ what is missing


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpus": []}, "no GPU: torch finds none"),
        ({"gpus": [], "error": "The NVIDIA driver on your system is too old (found 12040)"}, "no GPU: .* too old"),
        ({"torch": "", "error": "ModuleNotFoundError: No module named 'torch'"}, "no torch in .*: ModuleNotFoundError"),
        ({"nvcc": ""}, "no nvcc"),
        ({"gpus": [("Tesla T4", (7, 5))]}, "Tesla T4 has compute capability 7.5, 8.0 is needed"),
        ({"gpus": [H200] * 4}, "4 GPUs: choose one with --gpu 0 to 3"),
        ({"gpus": [H200] * 2, "gpu": 2}, "no GPU 2, there are 2"),
        ({"tools": {}}, "no ninja"),
        ({"missing": ["safetensors"]}, "no Python module safetensors"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_missing(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(facts, "gather", lambda gpu: there(**changes))
    monkeypatch.setattr(facts, "why_no_room", lambda folder: "")
    assert main(["--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()

    assert re.match(f"gpu-check: {reason}", line)
    assert line.endswith("build, self-test, benchmark, tests and profile were skipped")


def test_one_of_several_gpus() -> None:
    chosen = there(gpus=[("Tesla T4", (7, 5)), H200], gpu=1)
    assert why_not(chosen, Path("/tmp"), False) == ""
    assert chosen.card == H200
    assert steps.environment(chosen, False)["CUDA_VISIBLE_DEVICES"] == "1"


def test_one_of_several_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert steps.environment(there(gpus=[H200] * 2, gpu=1), False)["CUDA_VISIBLE_DEVICES"] == "6"


def test_a_checkout_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(facts.tempfile, "NamedTemporaryFile", refuse)
    assert why_not(there(), tmp_path, False) == f"{tmp_path} cannot be written (Read-only file system)"


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(facts.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 29}))
    assert why_not(there(), tmp_path, False) == f"{tmp_path} has 0.5 GB free, 2 are needed"


def test_a_disk_that_fills_up_under_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "summary.txt"))

    monkeypatch.setattr(facts, "gather", lambda gpu: there())
    monkeypatch.setattr(steps, "on_gpu", lambda *_: [])
    monkeypatch.setattr(run, "run", full)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("gpu-check: No space left on device: ")


def test_a_driver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_ASK", "import time; time.sleep(60)")
    assert facts.ask_torch(0.5)["error"] == "torch did not answer within 0.5 s"


# ------------------------------------------------------------------ time boxes


def python(name: str, code: str, seconds: float = 30, **options: Any) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds, **options)


def test_steps_fail_alone(tmp_path: Path) -> None:
    """One that hangs, with a process of its own, one that crashes, one that is not there."""
    hangs = "import subprocess, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); subprocess.run(['sleep', '600'])"
    found = run.run(
        [
            python("hangs", hangs, 2),
            python("crashes", "import os; print('on the way', flush=True); os.abort()"),
            Step("absent", ["/no/such/program"], 30),
            python("fails", "raise SystemExit('no good')"),
            python("after the failed one", "print('never')", needs="fails"),
            python("left out", "print('never')", skipped="ncu is not installed"),
            python("ends", "print('fine')"),
            python(
                "stops where it may", "print('there is no CUDA device'); raise SystemExit(1)", accepts=(1, "no CUDA")
            ),
            python("stops elsewhere", "print('usage'); raise SystemExit(2)", accepts=(1, "no CUDA")),
        ],
        tmp_path,
        dict(os.environ),
    )
    assert [(o.step.name, o.verdict) for o in found] == [
        ("hangs", "over time"), ("crashes", "failed"), ("absent", "failed"), ("fails", "failed"),
        ("after the failed one", "skipped"), ("left out", "skipped"), ("ends", "passed"),
        ("stops where it may", "passed"), ("stops elsewhere", "failed"),
    ]  # fmt: skip
    said = {o.step.name: o.said for o in found}
    assert said["crashes"] == "status -6: on the way"
    assert said["absent"] == "No such file or directory: /no/such/program"
    assert said["after the failed one"] == "fails failed"
    assert said["ends"] == "fine"
    text = run.table(found, "title")
    assert len(text.splitlines()) == 11
    assert "passed" in text


def test_a_log_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOG_BYTES", 100_000)
    (found,) = run.run([python("talks", "while True: print('x' * 1000)")], tmp_path, dict(os.environ))
    assert found.verdict == "failed"
    assert found.said.startswith("stopped at")


def test_no_step_runs_past_the_end(tmp_path: Path) -> None:
    """Boxes are cut where all of the time is over, and what one step leaves is the next one's."""
    start = time.monotonic()
    found = run.run(
        [python("first", "pass", 4), python("second", "import time; time.sleep(60)", 1), python("third", "pass", 60)],
        tmp_path,
        dict(os.environ),
        most=5,
    )
    assert time.monotonic() - start < 15
    assert found[0].verdict == "passed"
    assert found[1].verdict == "over time"
    assert found[1].seconds > 2  # it had what the first one left
    assert (found[2].verdict, found[2].said) == ("skipped", "no time left")


# ------------------------------------------------------------------ the steps


def test_boxes_end_within_nine_minutes() -> None:
    assert sum(step.seconds for step in steps.on_gpu(there(), Path("/tmp/out"))) <= run.MOST == 540


def test_steps_on_a_gpu() -> None:
    found = {step.name: step for step in steps.on_gpu(there(), Path("/tmp/out"))}
    assert list(found)[:3] == ["build", "self-test", "levels"]
    assert not any(step.skipped for step in found.values())
    assert found["build"].environment["PARNET_CUDA_ARCHS"] == "90 90a"
    assert found["tests"].command[-4:-2] == ["gpu and not slow", "-n"]
    assert {step.needs for step in found.values()} == {"", "build"}
    other = {s.name: s for s in steps.on_gpu(there(gpus=[("L4", (8, 9))], tools={"ninja": "n"}), Path("/tmp/out"))}
    assert other["build"].environment["PARNET_CUDA_ARCHS"] == "89"
    skipped = {name for name, step in other.items() if step.skipped}
    assert skipped == {"tests", "profile", "memcheck", "racecheck"}
    built = {s.name: s for s in steps.on_gpu(there(nvcc="", library=True), Path("/tmp/out"))}
    assert "as it was built before" in built["build"].skipped


def test_a_rehearsal(tmp_path: Path) -> None:
    """The real program: every step ends, the table is complete, everything is in the tar file."""
    out = tmp_path / "check"
    command = [sys.executable, "-m", "bench.gpu_check", "--rehearse", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=facts.ROOT, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (out / "summary.txt").read_text()
    assert summary in done.stdout
    names = [step.name for step in steps.rehearsed(there(), out)]
    assert [name for name in names if f"\n{name}" not in summary] == []
    assert not {line for line in summary.splitlines() if "failed" in line or "over time" in line}
    assert json.loads((out / "machine.json").read_text())["python"].count(".") == 2
    with tarfile.open(done.stdout.splitlines()[-1]) as tar:
        packed = {Path(name).name for name in tar.getnames()}
    assert {"summary.txt", "machine.json"} <= packed
    assert sum(name.endswith(".log") for name in packed) == sum(
        "skipped" not in line for line in summary.splitlines()[1:-1]
    )
