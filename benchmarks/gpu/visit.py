"""What a stage is told: where it computes, how long it may, where its results go."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from benchmarks import environment, results

RESULTS = results.RESULTS / "gpu"
OPTIONAL = ("triton", "transformers", "pytorch_optimizer", "heavyball", "numpy")


@dataclass
class Visit:
    """One stage under way.

    Attributes:
        stage: Its name.
        device: ``"cuda"`` or ``"cpu"``.
        tiny: Whether all is small, to rehearse.
        folder: Where its file is written.
        end: When it has to be done, on the monotonic clock.
        result: What its file holds so far.
    """

    stage: str
    device: str
    tiny: bool
    folder: Path
    end: float
    result: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - monotonic()

    def save(self, **found: Any) -> None:
        """Write what has been found: a cut loses what came after."""
        self.result |= found
        write(self.result, self.folder / f"{self.stage}.json")


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}")
    results.save(dict(result), partial)
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return what a stage has written; nothing if it has not."""
    try:
        return results.load(path)
    except (OSError, json.JSONDecodeError):
        return {}


def surroundings(device: str) -> dict[str, Any]:
    """Return the facts that every number of a visit depends on."""
    facts = environment.describe(torch.get_num_threads(), device)
    facts |= {"kind": device, "cuda": torch.version.cuda, "host": platform.platform()}
    facts["packages"] = [name for name in OPTIONAL if find_spec(name)]
    return facts
