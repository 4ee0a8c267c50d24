"""What a stage is told: where it computes, how long it may, where its results go."""

import json
import platform
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
    """One stage under way."""

    stage: str
    device: str  # "cuda" or "cpu"
    tiny: bool  # all is small, to rehearse
    folder: Path  # where its file is written
    end: float  # when it has to be done, on the monotonic clock
    result: dict[str, Any] = field(default_factory=dict)  # its file so far

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - monotonic()

    def save(self, **found: Any) -> None:
        """Write what has been found: a cut loses what came after."""
        self.result |= found
        results.save(self.result, self.folder / f"{self.stage}.json")


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
