"""Whether dense steps of both packages give the same numbers."""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.process import Worker, WorkerError
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
    request: dict[str, Any] = {"shapes": shapes, "steps": STEPS, "settings": SETTINGS}
    request["spec"] = {"structures": "dense", "dtype": "float32", "T": T}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in workers.items():
            path = f"{folder}/{name}.pt"
            try:
                worker.ask("follow", **request, path=path)
            except WorkerError as error:
                return {"T": T, "error": f"{name}: {error}"}
            found[name] = torch.load(path)
    ours, official = found["ours"], found["official"]
    identity = [torch.eye(len(K)) for K in official["factors"]]
    moves = difference(ours["moves"], official["moves"])
    factors = difference(ours["factors"], official["factors"])
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


def difference(ours: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Return the largest relative difference of two lists of tensors, in norm."""
    norm = torch.linalg.vector_norm
    return max(
        float(norm(a.double() - b.double()) / norm(b.double()))
        for a, b in zip(ours, other, strict=True)
    )
