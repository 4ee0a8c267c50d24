"""The plan of a step: which rows are treated alike, and how; all decided in Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sirfshampoo._config.variant import Variant
from sirfshampoo._engine.costs import interval_of
from sirfshampoo._engine.joint import stacked
from sirfshampoo._engine.kept import Preparation
from sirfshampoo._engine.momenta import ahead
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.units import Unit
from sirfshampoo.structures import StructuredMatrix


class Settings(NamedTuple):
    """What the rows of one run have in common during a step."""

    lr: float | None  # None: each row has a tensor
    beta2: float
    alpha1: float
    alpha2: float
    lam: float
    kappa: float
    absent: tuple[int, ...]  # positions of parameters that lack a gradient, and rest
    due: bool  # whether the factors are to be updated
    interval: int  # how many steps the factors are expected to stay
    variant: Variant

    @classmethod
    def of_group(
        cls,
        group: Mapping[str, Any],
        *,
        absent: tuple[int, ...],
        due: bool,
        variant: Variant,
    ) -> Settings:
        """Read the settings of a parameter group."""
        return cls(
            lr=None if isinstance(group["lr"], Tensor) else float(group["lr"]),
            beta2=float(group["beta2"]),
            alpha1=float(group["alpha1"]),
            alpha2=float(group["alpha2"]),
            lam=float(group["lam"]),
            kappa=float(group["kappa"]),
            absent=absent,
            due=due,
            interval=interval_of(group),
            variant=variant,
        )


@dataclass(eq=False)
class Task:
    """A run of rows of a stack, and what a step does with it."""

    stack: Stack
    rows: slice
    settings: Settings
    preparation: Preparation
    lrs: list[Tensor]  # of the rows, where learning rates are tensors
    skipped: Tensor  # of the rows

    @property
    def units(self) -> Sequence[Unit]:
        """The units, one a row."""
        return self.stack.units[self.rows]

    @property
    def K(self) -> list[StructuredMatrix]:
        """The factor of each axis, ``[rows, d_n, d_n]``."""
        return self.stack.part(self.stack.K, self.rows)

    @property
    def m(self) -> list[StructuredMatrix] | None:
        """Their Riemannian momenta; None if there are none."""
        m = self.stack.m
        return None if m is None else self.stack.part(m, self.rows)

    @property
    def V(self) -> list[Tensor]:
        """The momentum of each of a unit's parameters; none if there are none."""
        return [V_j[self.rows] for V_j in self.stack.V or []]

    @property
    def averages_gradients(self) -> bool:
        """Whether momenta average gradients, which are then pre-conditioned."""
        return self.settings.variant.momentum_first and self.stack.V is not None

    def ahead(self, j: int, G: Tensor) -> Tensor:
        """Return what is pre-conditioned of the j-th parameters, where they lie."""
        how = self.settings.variant.nesterov
        return ahead(self.V[j], G, alpha1=self.settings.alpha1, nesterov=how)

    def rate(self, device: torch.device) -> float | Tensor:
        """Return the learning rate, or those of the rows, ``[rows]``."""
        if self.settings.lr is not None:
            return self.settings.lr
        return stacked([lr.reshape(()).to(device) for lr in self.lrs])


def plan_stack(
    stack: Stack,
    settings: Sequence[Settings | None],
    groups: Sequence[Mapping[str, Any]],
) -> list[Task]:
    """Return what a step does with the rows of a stack.

    Args:
        stack: The stack.
        settings: The settings of each parameter group; None: the unit rests.
        groups: The parameter groups.
    """
    stack.products.look_for_writes()
    tasks = []
    for rows, shared in _runs(stack, settings):
        interval = 1 if stack.elementwise else shared.interval
        preparation = stack.products.for_once()
        if stack.held:
            preparation = stack.products.plan(rows, interval, due=shared.due)
        lrs = []
        if shared.lr is None:
            lrs = [groups[unit.group]["lr"] for unit in stack.units[rows]]
        tasks.append(Task(stack, rows, shared, preparation, lrs, stack.skipped[rows]))
    return tasks


def _runs(
    stack: Stack, settings: Sequence[Settings | None]
) -> Iterator[tuple[slice, Settings]]:
    """Yield runs of neighbouring rows that are treated alike."""
    start, of_row = 0, [settings[unit.group] for unit in stack.units]
    for row in stack.starting:  # whatever T says: until then, nothing would move
        shared = of_row[row]
        of_row[row] = None if shared is None else shared._replace(due=True)
    for stop in range(1, len(of_row) + 1):
        current = of_row[start]
        if stop == len(of_row) or of_row[stop] != current:
            if current is not None:
                yield slice(start, stop), current
            start = stop
