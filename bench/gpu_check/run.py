"""Steps one after the other, each in its time box with a log of its own; a table; one tar file of everything."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_check.facts import ROOT
from bench.gpu_check.steps import Step

MOST = 540.0  # seconds, all steps together
LOG_BYTES = 20 << 20  # of a step's log, after which it is stopped


@dataclass
class Outcome:
    step: Step
    verdict: str  # passed, failed, over time, skipped
    seconds: float
    said: str  # the last line, or why


def run(steps: list[Step], folder: Path, environment: dict[str, str], most: float = MOST) -> list[Outcome]:
    """No step ends later than all boxes up to its own, or than `most`: what one leaves the next ones have."""
    outcomes: list[Outcome] = []
    start, planned = time.monotonic(), 0.0
    for number, step in enumerate(steps, 1):
        planned = min(planned + step.seconds, most)
        broken = next((o for o in outcomes if o.step.name == step.needs and o.verdict in ("failed", "over time")), None)
        reason = step.skipped or (f"{step.needs} {broken.verdict}" if broken else "")
        left = planned - (time.monotonic() - start)
        if not reason and left < 1:
            reason = "no time left"
        print(f"{step.name}: {reason or f'up to {left:.0f} s'}", flush=True)
        if reason:
            outcomes.append(Outcome(step, "skipped", 0.0, reason))
            continue
        log = folder / f"{number:02}-{step.name.replace(' ', '-')}.log"
        outcomes.append(one(step, log, environment | step.environment, left))
    return outcomes


def one(step: Step, log: Path, environment: dict[str, str], seconds: float) -> Outcome:
    start = time.monotonic()
    try:
        with log.open("wb") as file:
            file.write((" ".join(step.command) + "\n\n").encode())
            file.flush()
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
            stopped = _wait(process, log, start + seconds)
    except OSError as error:  # no such program, or no room for a log
        return Outcome(step, "failed", time.monotonic() - start, f"{error.strerror}: {error.filename or log}")
    spent = time.monotonic() - start
    text = log.read_text(errors="replace")
    last = next((line.strip() for line in reversed(text.splitlines()[2:]) if line.strip()), "nothing was said")
    if stopped:
        return Outcome(step, "over time" if "s" in stopped else "failed", spent, f"stopped {stopped}; last: {last}")
    status, needed = step.accepts
    well = process.returncode == status and needed in text
    return Outcome(
        step, "passed" if well else "failed", spent, last if well else f"status {process.returncode}: {last}"
    )


def _wait(process: subprocess.Popen[bytes], log: Path, until: float) -> str:
    """Until the process ends; why it was stopped, with all that it started, or an empty string."""
    start = time.monotonic()
    while process.poll() is None:
        over = time.monotonic() > until
        if over or log.stat().st_size > LOG_BYTES:
            for kind in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, kind)
                    process.wait(3)
                except ProcessLookupError:
                    break
                except subprocess.TimeoutExpired:
                    continue
            return f"after {time.monotonic() - start:.0f} s" if over else "at 20 MB"
        time.sleep(0.1)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left running
    return ""


def table(outcomes: list[Outcome], title: str) -> str:
    rows = [(o.step.name, o.verdict, f"{o.seconds:.0f} s", o.said) for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d[:120]}" for a, b, c, d in rows]
    return "\n".join([title, *lines, f"{sum(o.seconds for o in outcomes):.0f} s in all"])


def pack(folder: Path) -> Path:
    """All of the folder as one file beside it."""
    target = folder.with_suffix(".tar.gz")
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, folder.name)
    return target
