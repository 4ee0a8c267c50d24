"""Which rank owns which pre-conditioner: the work is shared out evenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sirfshampoo._engine.costs import cost_of, interval_of
from sirfshampoo._engine.units import Unit

Group = Mapping[str, Any]


def work_of(unit: Unit, group: Group) -> float:
    """Return how many operations a unit takes in a step, on average."""
    cost = cost_of(unit, group)
    return cost.step_flops + cost.update_flops / interval_of(group)


def shared_out(
    costs: Sequence[tuple[float, ...]], loads: Sequence[tuple[float, ...]]
) -> list[int]:
    """Return who gets which piece of work: the longest first, to who has the least.

    Args:
        costs: What each piece costs. Of equal first numbers, the next ones decide.
        loads: What each has to do already.
    """
    present = [list(load) for load in loads]
    owners = [0] * len(costs)
    # sorted() is stable: all ranks come to the same end
    for i in sorted(range(len(costs)), key=lambda i: costs[i], reverse=True):
        owner = min(range(len(present)), key=lambda r: present[r])
        present[owner] = [a + b for a, b in zip(present[owner], costs[i], strict=True)]
        owners[i] = owner
    return owners


def with_owners(
    units: Sequence[Unit], groups: Sequence[Group], present: Sequence[Unit], ranks: int
) -> list[Unit]:
    """Return units with owners among a number of ranks; see `Owners.assign`."""

    def cost(unit: Unit) -> tuple[float, float]:
        return work_of(unit, groups[unit.group]), float(unit.num_stored)

    loads = [(0.0, 0.0)] * ranks
    for unit in present:
        (work, stored), owner = cost(unit), unit.owner or 0
        loads[owner] = loads[owner][0] + work, loads[owner][1] + stored
    owners = shared_out([cost(unit) for unit in units], loads)
    return [replace(u, owner=o) for u, o in zip(units, owners, strict=True)]
