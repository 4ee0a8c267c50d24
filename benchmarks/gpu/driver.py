"""Runs the stages, each in a process and a time of its own."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks import results
from benchmarks.environment import ROOT
from benchmarks.gpu.visit import read

SHARES = {"machine": 25, "correct": 120, "step": 145, "train": 160, "profile": 30}
"""The stages in order of worth, with the seconds of each of the default budget."""

GRACE = 6.0  # seconds to come to an end before a stage is killed


def start(*command: str) -> subprocess.Popen[str]:
    """Start Python at the head of a group of processes, which `kill` ends."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End a process with all that it started, which may have stayed behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_stage(stage: str, seconds: float, command: list[str], folder: Path) -> str:
    """Run a stage; return how it went, which its file says, too."""
    path = folder / f"{stage}.json"
    path.unlink(missing_ok=True)  # of an earlier visit
    own = max(seconds - GRACE, 1.0)
    command = [*command, "--run", stage, "--budget", f"{own:.1f}"]
    begin, status = monotonic(), "cut"
    process = start("-m", "benchmarks.gpu", *command)
    try:
        process.communicate(timeout=seconds)
        status = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        pass
    finally:
        kill(process)
        _, printed = process.communicate()
    result = read(path)
    facts: dict[str, Any] = {"stage": stage, "status": status}
    facts["seconds"] = round(monotonic() - begin, 1)
    if status == "failed" and not result.get("error"):
        last = f"the process ended with {process.returncode}: {printed[-1500:]}"
        facts["error"] = last
    results.save(result | facts, path)
    return status


def run_stages(
    stages: list[str], budget: float, command: list[str], folder: Path
) -> dict[str, str]:
    """Run stages within some seconds; what one leaves of its time is the others'.

    The command is the options that each is given. Returns how each went.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = monotonic() + budget, {}
    for number, stage in enumerate(stages):
        left = end - monotonic()
        rest = sum(SHARES[name] for name in stages[number:])
        # a rehearsal is done when it is done
        seconds = left / 2 if "--tiny" in command else left * SHARES[stage] / rest
        print(f"{stage}: at most {seconds:.0f} s", flush=True)
        outcomes[stage] = run_stage(stage, seconds, command, folder)
        print(f"{stage}: {outcomes[stage]}", flush=True)
    return outcomes
