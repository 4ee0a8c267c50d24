"""Who takes steps on a GPU, and how each is built and warmed up."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.contestants import BATCH_SIZE, other
from benchmarks.gpu.captured import Captured, warm_up
from benchmarks.optimizers import build
from sirfshampoo import GrowingInterval, SIRFShampoo, recipe, summary

LONGEST = 16384  # the longest axis with another factor than a diagonal one
GROWN = 900  # the step from which a growing interval of 10 is 10


@dataclass(frozen=True)
class Contestant:
    """One optimizer with its settings.

    Attributes:
        title: The structure of matrices' factors, or the name of another optimizer.
        dtype: The type of the factors; None for another optimizer.
        T: Steps from one update to the next.
        way: ``"eager"``, ``"captured"`` or ``"compiled"``.
        worth: What is of less worth (a larger number) comes later.
    """

    title: str
    dtype: str | None = None
    T: int = 1
    way: str = "eager"
    worth: int = 0

    @property
    def label(self) -> str:
        """The name, different for every contestant."""
        parts = [self.title, self.dtype, f"T={self.T}" if self.T > 1 else None]
        parts.append(None if self.way == "eager" else self.way)
        return ", ".join(part for part in parts if part)

    @property
    def is_ours(self) -> bool:
        """Whether it is of this package."""
        return self.title not in OTHERS


OTHERS = {
    "AdamW(fused)": "torch AdamW(fused=True)",
    "AdamW(foreach)": "torch AdamW(foreach=True)",
    "Muon": "torch Muon",
    "SOAP": "pytorch-optimizer SOAP",
}
"""Other optimizers, and their names where steps are timed on a CPU."""

UNIT = Contestant("AdamW(fused)")
"""One step of it is the unit."""

BF16, FP32 = "bfloat16", "float32"
CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("Muon"),
    Contestant("recipe", FP32, 10),
    Contestant("dense", BF16),
    Contestant("dense", BF16, 10),
    Contestant("SOAP", None, 10),
    # a capture that fails may take the process along: not before what is worth most
    Contestant("dense", BF16, 1, "captured", 1),
    Contestant("dense", BF16, 10, "captured", 1),
    Contestant("recipe", FP32, 10, "captured", 1),
    Contestant("dense", FP32, worth=2),
    Contestant("dense", FP32, 10, worth=2),
    Contestant("recipe", BF16, 10, worth=2),
    Contestant("diagonal", FP32, worth=2),
    Contestant("block30diagonal", BF16, worth=2),
    Contestant("AdamW(foreach)", worth=2),
    Contestant("hierarchical15_15", BF16, worth=2),
    Contestant("triltoeplitz", BF16, worth=2),
    Contestant("dense", BF16, 1, "compiled", 3),
    Contestant("recipe", FP32, 10, "compiled", 3),
    Contestant("dense", BF16, 10, "compiled", 3),
    Contestant("block30diagonal", FP32, worth=4),
    Contestant("hierarchical15_15", FP32, worth=4),
    Contestant("triltoeplitz", FP32, worth=4),
    Contestant("diagonal", BF16, worth=4),
)
"""A new contestant joins with one line."""


def groups(model: nn.Module, structure: str) -> list[dict[str, Any]]:
    """Return parameter groups: too long axes are diagonal, vectors beside matrices too.

    Of a model of vectors alone, these have the structure.
    """
    matrices = any(p.ndim > 1 for p in model.parameters())
    found: dict[tuple[str, ...], list[nn.Parameter]] = {}
    for p in model.parameters():
        names = tuple(structure if d <= LONGEST else "diagonal" for d in p.shape)
        names = ("diagonal",) if p.ndim < 2 and matrices else names
        found.setdefault(names, []).append(p)
    return [
        {"params": params, "structures": {len(names): names}}
        for names, params in found.items()
    ]


def options(contestant: Contestant, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of `SIRFShampoo`, and of `summary`."""
    dtype = {"preconditioner_dtypes": getattr(torch, contestant.dtype or FP32)}
    if contestant.title == "recipe":
        return recipe(model, batch_size=BATCH_SIZE, steps=1000) | dtype
    T = contestant.T
    return {"params": groups(model, contestant.title), "T": T, "lr": 1e-4} | dtype


def operations(contestant: Contestant, model: nn.Module) -> float:
    """Return the counted floating-point operations of a step, on average."""
    told = summary(model, **options(contestant, model)).totals
    return float(told["update_flops"] / contestant.T + told["step_flops"])


class Entry:
    """A contestant that is warm; `step` takes a step."""

    def __init__(self, contestant: Contestant, model: nn.Module, device: str) -> None:
        """Build it; take the steps of a period or two."""
        self.contestant, self.device = contestant, device
        if contestant.is_ours:
            given = options(contestant, model)
            self.optimizer = SIRFShampoo(model, batch_size=BATCH_SIZE, **given)
            self.step: Callable[[], Any] = self._way()
        else:
            spec = other(OTHERS[contestant.title], contestant.T)
            built = build(model=model, **spec)
            self.step = lambda: [optimizer.step() for optimizer in built]
        for _ in range(1 if contestant.is_ours else 2 * contestant.T):
            self.step()
        self.start_period()

    def _way(self) -> Callable[[], Any]:
        step, T, device = self.optimizer.step, self.contestant.T, self.device

        def warm() -> None:
            step()  # factors that start at the gradient have started
            self.start_period()
            for _ in range(T + 1):
                step()

        warm_up(warm, device)
        if self.contestant.way == "captured":
            captured = Captured(self.optimizer, self._is_due, device)
            for due in (True, False) if T > 1 else (True,):
                self.go_to(due=due)
                captured.step()
            return captured.step
        if self.contestant.way == "compiled":
            backend = "eager" if device == "cpu" else "inductor"
            compiled = torch.compile(step, backend=backend)
            for due in (True, False) if T > 1 else (True,):
                for _ in range(2):
                    self.go_to(due=due)
                    compiled()
            return compiled
        return step

    def _is_due(self, step: int) -> Hashable:
        T = GrowingInterval(10) if self.contestant.title == "recipe" else None
        return T(step) if T else step % self.contestant.T == 0

    def start_period(self) -> None:
        """Go to a step that updates the factors, of a period that grows no more."""
        if self.contestant.is_ours:
            self.go_to(due=True)

    def go_to(self, *, due: bool) -> None:
        """Go to a step that updates the factors, or does not."""
        step = GROWN
        while self._is_due(step) != due:
            step += 1
        self.optimizer.global_step = step
