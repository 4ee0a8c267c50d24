"""In which step of its period each pre-conditioner updates its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace
from math import gcd
from typing import Any

from sirfshampoo._engine.costs import cost_of, period_of
from sirfshampoo._engine.units import Unit

#: The work in each step of a period, by the length of the period.
Loads = dict[int, list[int]]


class Phases:
    """The phase of each unit; found anew when what it follows from has changed."""

    def __init__(self) -> None:
        """Know nothing at first."""
        self._reason: Any = None
        self._found: list[int] = []

    def of(
        self, units: Sequence[Unit], groups: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """Return the phases of units, one a group; each owner's work is balanced."""
        pairs = zip(units, groups, strict=True)
        reason = [(g["T"], bool(g["lam"]), unit.dtypes) for unit, g in pairs]
        if reason != self._reason:
            updates = [cost_of(unit, groups[unit.group]).update_flops for unit in units]
            phases = [0] * len(groups)
            for owner in {unit.owner for unit in units}:
                own = [i for i, unit in enumerate(units) if unit.owner == owner]
                periods = [period_of(groups[i]) for i in own]
                found = spread([updates[i] for i in own], periods)
                for i, phase in zip(own, found, strict=True):
                    phases[i] = phase
            self._reason, self._found = reason, phases
        return self._found


def spread(costs: Sequence[int], periods: Sequence[int]) -> list[int]:
    """Spread work that recurs over the steps of its period.

    Longest processing time first: the costliest goes where least is to be done, equal
    ones in their order. What recurs with another period counts by the most that it
    ever brings to such a step.

    Args:
        costs: What each piece of work costs.
        periods: In how many steps it is to be done once.

    Returns:
        The phase of each: it is done in step s if ``s % period == phase``. Where all
        periods are T, the costliest step is at most 4/3 − 1/(3T) times as costly as
        with the best phases.
    """
    phases = [0] * len(costs)
    loads: Loads = {}
    for period in sorted(set(periods)):
        members = [i for i, other in enumerate(periods) if other == period]
        own = [0] * period
        heap = [(_load(loads, period, phase), phase) for phase in range(period)]
        heapify(heap)
        for i in sorted(members, key=lambda i: -costs[i]):
            load, phases[i] = heap[0]
            own[phases[i]] += costs[i]
            heapreplace(heap, (load + costs[i], phases[i]))
        loads[period] = own
    return phases


def costliest_step(
    costs: Sequence[int], periods: Sequence[int], phases: Sequence[int]
) -> int:
    """Return the most that any one step costs.

    With more than two periods above 1, it may be a little less.
    """
    loads: Loads = {1: [0]}
    for cost, period, phase in zip(costs, periods, phases, strict=True):
        loads.setdefault(period, [0] * period)[phase] += cost
    longest = max(loads)
    return max(_load(loads, longest, phase) for phase in range(longest))


def _load(loads: Loads, period: int, phase: int) -> int:
    """Return the most that the steps phase, phase + period, … have to do."""
    return sum(
        # steps of two periods meet where their phases agree modulo what both share
        max(load[phase % gcd(period, other) :: gcd(period, other)])
        for other, load in loads.items()
    )
