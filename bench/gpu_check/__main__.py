"""`python -m bench.gpu_check`; see the package's text."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.gpu_check import facts as found_facts
from bench.gpu_check import run as running
from bench.gpu_check import steps as all_steps

DOC = (__import__("bench.gpu_check", fromlist=["x"]).__doc__ or "").splitlines()


def describe(facts: found_facts.Facts) -> str:
    """Machine and versions, for the folder."""
    told = {"python": platform.python_version(), "machine": platform.platform(), **asdict(facts)}
    for name, command in {
        "commit": ["git", "describe", "--always", "--dirty"],
        "gpu": ["nvidia-smi", "-q", "-d", "CLOCK,POWER,MEMORY,ECC"],
        "nvcc version": [facts.nvcc or "nvcc", "--version"],
    }.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=found_facts.ROOT)
            told[name] = done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            told[name] = str(error)
    return json.dumps(told, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=DOC[0] if DOC else None)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: every step as far as it can go")
    parser.add_argument("--gpu", type=int, help="which GPU, where there are several")
    parser.add_argument("--out", type=Path, help="folder of logs and results; default out/gpu-check-<time>")
    asked = parser.parse_args(arguments)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = (asked.out or found_facts.ROOT / "out" / f"gpu-check-{stamp}").resolve()
    facts = found_facts.gather(asked.gpu)
    reason = found_facts.why_not(facts, folder, asked.rehearse)
    if reason:
        print(f"gpu-check: {reason}: build, self-test, benchmark, tests and profile were skipped", file=sys.stderr)
        return 2
    make = all_steps.rehearsed if asked.rehearse else all_steps.on_gpu
    try:
        (folder / "machine.json").write_text(describe(facts))
        outcomes = running.run(make(facts, folder), folder, all_steps.environment(facts, asked.rehearse))
        card = "rehearsal" if asked.rehearse else facts.card[0]
        summary = running.table(outcomes, f"gpu-check on {card}, torch {facts.torch}, {stamp}")
        (folder / "summary.txt").write_text(summary + "\n")
        print(f"\n{summary}\n{running.pack(folder)}")
    except OSError as error:  # of this program's own files: the steps' are theirs
        print(f"gpu-check: {error.strerror}: {error.filename or folder}: the table and the tar file", file=sys.stderr)
        return 2
    return int(any(o.verdict in ("failed", "over time") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
