"""Kills training runs at random moments: `python -m tests.checkpoints.kills N FOLDER`.

A process of its own with a single thread: it may fork, and a fork is a run of the
example `checkpoints.py` that has imported and warmed up all it needs.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.checkpoints import Settings, Training, finish, resume

SETTINGS = Settings(steps=20, every=1, width=8)


def same(a: Any, b: Any) -> bool:
    """Compare what checkpoints hold, to the bit and the type."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def killed_after(
    seconds: float, run: Callable[[], Any], *, in_the_midst_of: Path | None = None
) -> bool:
    """Fork, run, and kill the fork; return whether it was still running.

    Args:
        seconds: How long it runs.
        run: What it runs.
        in_the_midst_of: Wait until this file is there: it is being written.

    Raises:
        RuntimeError: If it failed before.
    """
    if in_the_midst_of is not None:
        in_the_midst_of.unlink(missing_ok=True)  # that of a run before
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # nothing that hangs is left behind
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    ended = status = 0
    if in_the_midst_of is not None:
        while not ended and not in_the_midst_of.exists():
            ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("A run failed by itself.")
    return os.WIFSIGNALED(status)


def examine(path: Path, whole: Training) -> dict[str, Any]:
    """Say what a killed run left, and whether that leads to the same end."""
    left = {"writing": path.with_name(f"{path.name}.partial").exists(), "step": 0}
    copy = path.with_name("copy.pt")
    copy.unlink(missing_ok=True)
    if path.exists():
        shutil.copy(path, copy)
    resumed = resume(SETTINGS, copy)
    left["step"] = resumed.step
    finish(resumed, copy)
    return {**left, "same": same(resumed.state_dict(), whole.state_dict())}


def main(kills: int, folder: Path) -> None:
    """Kill so often; print as JSON what each kill left."""
    generator = random.Random(0)
    for name in ("warm-up.pt", "whole.pt"):
        start = time.perf_counter()
        whole = finish(resume(SETTINGS, folder / name), folder / name)
        seconds = time.perf_counter() - start

    path, found = folder / "checkpoint.pt", []
    while len(found) < kills:
        # what a killed run left is where the next one starts, until one finishes
        delay = generator.uniform(0, seconds)
        partial = path.with_name(f"{path.name}.partial")
        if killed_after(
            delay,
            lambda: finish(resume(SETTINGS, path), path),
            in_the_midst_of=partial if len(found) % 2 else None,
        ):
            found.append(examine(path, whole))
        else:
            path.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
