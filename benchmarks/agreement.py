"""Whether dense steps of both packages give the same numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.contestants import ours
from benchmarks.processes import WorkFailed
from benchmarks.worker import Worker
from benchmarks.workloads import Shapes

STEPS = 10
WITHIN = 1e-5
# Larger than the defaults: the factors have to leave identity within 10 steps.
SETTINGS = {"lr": 1e-3, "beta2": 0.1, "lam": 1e-2, "kappa": 1e-2}


def compare(workers: Mapping[str, Worker], shapes: Shapes, T: int) -> dict[str, Any]:
    """Step both packages from the same start on the same gradients, in float32.

    Args:
        workers: The processes, named `"ours"` and `"official"`.
        shapes: What to step on.
        T: Steps from one update of the factors to the next.

    Returns:
        The largest relative difference in how far a parameter moved, and in a factor;
        how far the factors went from identity; `"error"` if something failed or
        differs by more than `WITHIN`.
    """
    spec = ours("dense", T=T)
    spec["settings"] |= SETTINGS
    found = {}
    for name, worker in workers.items():
        try:
            found[name] = worker.call("follow", spec=spec, shapes=shapes, steps=STEPS)
        except WorkFailed as error:
            return {"T": T, "error": f"{name}: {error}"}
    here, official = found["ours"], found["official"]
    identity = [np.eye(len(K)) for K in official["factors"]]
    moves = difference(here["moves"], official["moves"])
    factors = difference(here["factors"], official["factors"])
    within = max(moves, factors) <= WITHIN
    return {
        "T": T,
        "steps": STEPS,
        "settings": SETTINGS,
        "moves": moves,
        "factors": factors,
        "factors_from_identity": difference(official["factors"], identity),
        "error": None if within else f"differs by more than {WITHIN:g}",
    }


def difference(first: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Return the largest relative difference of two lists of arrays, in norm."""
    return max(
        float(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(b.astype(float)))
        for a, b in zip(first, other, strict=True)
    )
