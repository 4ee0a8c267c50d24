"""The plan of a step: which rows are treated alike, and how; all decided in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sirfshampoo._config.variant import Variant
from sirfshampoo._engine.costs import interval_of
from sirfshampoo._engine.joint import stacked
from sirfshampoo._engine.kept import Preparation
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.units import Unit
from sirfshampoo._method.following import Past
from sirfshampoo.structures import StructuredMatrix

#: How many numbers the gradients of stacks that are treated together have: with more,
#: the arithmetic takes longer than the calls, and leaves a CPU's caches.
_MOST_NUMBERS = 1 << 19


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
    units: Sequence[Unit]  # one a row
    settings: Settings
    preparation: Preparation
    lrs: list[Tensor]  # of the rows, where learning rates are tensors
    skipped: Tensor  # of the rows
    past: Past | None  # of the rows

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
    def V(self) -> Sequence[Tensor]:
        """The momentum of each of a unit's parameters; none if there are none."""
        return self.stack.part(self.stack.V or [], self.rows)

    @property
    def averages_gradients(self) -> bool:
        """Whether momenta average gradients, which are then pre-conditioned."""
        return self.settings.variant.momentum_first and self.stack.V is not None

    @property
    def present(self) -> list[int]:
        """The positions of the parameters that have a gradient, and move."""
        positions = range(len(self.units[0].params))
        return [j for j in positions if j not in self.settings.absent]

    def rates(self, device: torch.device) -> Tensor:
        """Return the learning rates of the rows, ``[rows]``, where they are tensors."""
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
        if stack.held:
            preparation = stack.products.plan(rows, interval, due=shared.due)
        else:
            preparation = stack.products.for_once()
        units = stack.units[rows]
        lrs = []
        if shared.lr is None:
            lrs = [groups[unit.group]["lr"] for unit in units]
        (skipped,) = stack.part([stack.skipped], rows)
        past = None if stack.past is None else stack.past[rows]
        tasks.append(Task(stack, rows, units, shared, preparation, lrs, skipped, past))
    return tasks


def batches(tasks: Iterable[Task]) -> list[list[Task]]:
    """Return tasks that are treated together: calls cost more than small tensors.

    They have settings and types in common, and gradients of a few MiB in all.
    """
    found: list[list[Task]] = []
    open_ones: dict[Any, tuple[list[Task], int]] = {}
    for task in tasks:
        first = task.units[0].params[0]
        settings = task.settings
        key = (
            settings.lr,
            settings.alpha1,
            settings.kappa,
            task.stack.V is None,
            first.device,
            first.dtype,
        )
        size = len(task.units) * task.units[0].dims.numel()
        batch, numbers = open_ones.get(key, ([], 0))
        if not batch or numbers + size > _MOST_NUMBERS:
            batch, numbers = [], 0
            found.append(batch)
        batch.append(task)
        open_ones[key] = batch, numbers + size
    return found


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
