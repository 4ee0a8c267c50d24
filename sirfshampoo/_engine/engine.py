"""The engine: the units of an optimizer, stacked, and what a step does with them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from sirfshampoo._config.groups import NUMBERS, check_options
from sirfshampoo._config.variant import Variant
from sirfshampoo._distributed import Ranks, is_dtensor, local
from sirfshampoo._engine.costs import interval_of
from sirfshampoo._engine.entries import OF_GRADIENTS, OF_UPDATES
from sirfshampoo._engine.everywhere import Everywhere
from sirfshampoo._engine.owners import Owners
from sirfshampoo._engine.plan import Settings, Task, plan_stack
from sirfshampoo._engine.relay import Relay
from sirfshampoo._engine.snapshot import Snapshot
from sirfshampoo._engine.spread import Phases
from sirfshampoo._engine.stacks import Stack, State, stack_units
from sirfshampoo._engine.step import Route
from sirfshampoo._engine.units import Unit, substituted
from sirfshampoo._engine.warn import warn_of_rest
from sirfshampoo._method.factors import Workspace
from sirfshampoo.structures import StructuredMatrix

Group = Mapping[str, Any]
Entry = TypeVar("Entry")


class Engine:
    """Plans the steps of an optimizer.

    Parameter groups, state and global step are the optimizer's, and are told anew in
    each call; what is kept here follows from them.

    Attributes:
        variant: The options that hold for all parameters.
        ranks: The ranks that see other examples.
        owners: Which rank holds which pre-conditioner; None: each rank holds all.
        units: The units, one a parameter group.
        workspace: Memory for what is needed within a step.
        at_rest: The numbers of the units that have no state yet, as they are frozen.
    """

    def __init__(
        self,
        variant: Variant,
        ranks: Ranks,
        owners: Owners | None,
        *,
        allocates: bool = True,
    ) -> None:
        """Have no units at first.

        Args:
            variant: The options that hold for all parameters.
            ranks: The ranks that see other examples.
            owners: Which rank holds which pre-conditioner.
            allocates: Whether to stack units, which takes memory.
        """
        self.variant, self.ranks, self.owners = variant, ranks, owners
        self.units: list[Unit] = []
        self.workspace = Workspace()
        self.at_rest: list[int] = []
        self._allocates = allocates
        self._stacks: list[Stack] | None = None
        self._snapshot: Snapshot | None = None  # of what these were built from
        self._phases = Phases()
        self._told_of_rest = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; stacks are rebuilt from the state."""
        rebuilt = {"_stacks": None, "_snapshot": None, "workspace": Workspace()}
        return vars(self) | rebuilt

    @property
    def momentum(self) -> str:
        """What the state calls the momenta of parameters."""
        return OF_GRADIENTS if self.variant.momentum_first else OF_UPDATES

    def holds(self, unit: Unit) -> bool:
        """Return whether this rank holds the factors of a unit."""
        return self.owners is None or unit.owner == self.owners.rank

    def with_owners(
        self, units: list[Unit], groups: Sequence[Group], names: Mapping[int, str]
    ) -> list[Unit]:
        """Return new units with owners, if ranks share pre-conditioners.

        Args:
            units: The units.
            groups: The parameter groups of all units.
            names: The names of their parameters, by their identities.

        Raises:
            ValueError: If they cannot be shared.
        """
        if self.owners is None:
            return units
        return self.owners.assign(units, groups, self.units, names)

    def follow(self, groups: Sequence[Group], state: dict[Tensor, State]) -> list[Unit]:
        """Return the units, of the parameters that stand in the groups by now.

        A framework may have put others in the place of those that were given, as
        accelerate puts the shards: they take the state over.

        Args:
            groups: The parameter groups.
            state: The optimizer's state.

        Raises:
            ValueError: If they have other shapes, or what is fixed was changed.
        """
        if self._snapshot is not None and self._snapshot.are_in(groups):
            return self.units
        for unit, new in substituted(self.units, groups):
            self.units[unit.group] = new
            self._hand_over(unit, new, state)
        return self.units

    def _hand_over(self, old: Unit, new: Unit, state: dict[Tensor, State]) -> None:
        """Put the state of a unit under other parameters of the same shapes."""
        for p, q in zip(old.params, new.params, strict=True):
            entries = state.pop(p, {})
            if self.owners is not None and is_dtensor(q) and self.momentum in entries:
                self.owners.exchange.check([(f"one of group {new.group}", q)])
                if not is_dtensor(p):  # from where it was whole to where shards are
                    whole = local(q).new_zeros(q.shape)
                    if self.holds(old):  # may have been elsewhere
                        whole.copy_(entries[self.momentum])
                    self.owners.exchange.broadcast([(old.owner or 0, whole)])()
                    entries[self.momentum] = whole
            state[q] = entries

    # ----------------------------------------------------------------------- stacks

    @torch.inference_mode(mode=False)  # a state is loaded there, too
    @torch.no_grad()
    def restack(
        self,
        groups: Sequence[Group],
        state: dict[Tensor, State],
        step: int,
        woken: Container[int] = (),
    ) -> list[Stack]:
        """Build the stacks from the state; see `Unit.is_wanted` for `woken`."""
        self.ranks.depend(
            (p for unit in self.units for p in unit.params),
            None if self.owners is None else self.owners.exchange,
        )
        self._stacks = []
        wanted = {u.group: u for u in self.units if u.is_wanted(state, woken)}
        self.at_rest = [u.group for u in self.units if u.group not in wanted]
        if self._allocates:
            phases = self.phases(groups)
            self._stacks = stack_units(
                # rows that are updated in the same steps are neighbours
                sorted(wanted.values(), key=lambda unit: phases[unit.group]),
                groups,
                state,
                step=step,
                rank=None if self.owners is None else self.owners.rank,
                initial_factors=self.variant.initial_factors,
                momentum=self.momentum,
            )
        self._snapshot = Snapshot(self.units, state)
        return self._stacks

    def stacks(
        self, groups: Sequence[Group], state: dict[Tensor, State], step: int
    ) -> list[Stack]:
        """Return the stacks, rebuilt if the state or a momentum asks for it."""
        known, snapshot = self._stacks, self._snapshot
        if known is None or snapshot is None:
            return self.restack(groups, state, step)
        stands = snapshot.is_of(state)
        doubtful = [s for s in known if s.lacks_momenta] if stands else known
        if not all(stack.is_current(state, groups) for stack in doubtful):
            return self.restack(groups, state, step)
        if not stands:  # someone has put something beside
            self._snapshot = Snapshot(self.units, state)
        return known

    def count(self, steps: int) -> None:
        """Add steps to the counters in the state."""
        if self._stacks:
            torch._foreach_add_([stack.step for stack in self._stacks], steps)

    def factors(self, stacks: Sequence[Stack]) -> list[list[StructuredMatrix]]:
        """Return the factors of each unit, as views; none of what lies elsewhere."""
        return self._of_units(stacks, lambda stack, n, row: stack.K[n][row])

    def momenta(self, stacks: Sequence[Stack]) -> list[list[StructuredMatrix | None]]:
        """Return the momenta of each unit's factors, as views; None without any."""
        return self._of_units(
            stacks, lambda stack, n, row: stack.m[n][row] if stack.m else None
        )

    def _of_units(
        self, stacks: Sequence[Stack], of_row: Callable[[Stack, int, int], Entry]
    ) -> list[list[Entry]]:
        """Return, a unit, what each axis has; nothing of what lies elsewhere."""
        found: list[list[Entry]] = [[] for _ in self.units]
        for stack in stacks:
            for row, unit in enumerate(stack.units if stack.held else ()):
                found[unit.group] = [of_row(stack, n, row) for n in range(len(stack.K))]
        return found

    # ------------------------------------------------------------------------- step

    def phases(self, groups: Sequence[Group]) -> list[int]:
        """Return, a group, in which step of its period its factors are updated."""
        if not self.variant.spread_updates:
            return [0] * len(groups)
        return self._phases.of(self.units, groups)

    def _due(self, groups: Sequence[Group], step: int) -> list[bool]:
        """Return, a group, whether its factors are to be updated."""
        intervals = [group["T"] for group in groups]
        if not all([callable(T) or (type(T) is int and T > 0) for T in intervals]):
            for T in intervals:  # someone has written into a group
                check_options({"T": T})
        return [
            bool(T(step)) if callable(T) else step % T == phase
            for T, phase in zip(intervals, self.phases(groups), strict=True)
        ]

    def agree(self, counted: int | None) -> tuple[list[tuple[bool, ...]], int]:
        """Return what all ranks know alike before a step.

        Args:
            counted: The examples counted on this rank; None if none are counted.

        Returns:
            Whether each parameter of each unit has a gradient on every rank, and how
            many examples there are.
        """
        if self.owners is not None:
            self.owners.check_caller(self.units)
        gradients = [p.grad for unit in self.units for p in unit.params]
        if any([G.layout is not torch.strided for G in gradients if G is not None]):
            for unit in self.units:
                unit.check_gradients()
        everywhere, total = self.look_for_gradients(counted)
        rests = bool(everywhere) and not any([any(of_unit) for of_unit in everywhere])
        if rests and not self._told_of_rest:
            self._told_of_rest = True  # once is enough
            warn_of_rest()
        return everywhere, total

    def look_for_gradients(
        self, counted: int | None = None
    ) -> tuple[list[tuple[bool, ...]], int]:
        """Return what `agree` does, without its checks and its warning."""
        params = [p for unit in self.units for p in unit.params]
        flags = [p.grad is not None for p in params]
        everywhere, total = self.ranks.agree(flags, counted, params)
        if all(everywhere):
            return [(True,) * len(unit.params) for unit in self.units], total
        known = iter(everywhere)
        return [tuple([next(known) for _ in u.params]) for u in self.units], total

    def plan(
        self,
        groups: Sequence[Group],
        state: dict[Tensor, State],
        step: int,
        present: Sequence[tuple[bool, ...]],
    ) -> list[Task]:
        """Return what a step does.

        Args:
            groups: The parameter groups.
            state: The optimizer's state.
            step: The global step.
            present: Whether each parameter of each unit has a gradient, on every rank.
        """
        known: dict[Any, Settings] = {}  # groups mostly differ in nothing
        settings: list[Settings | None] = []
        numbers = map(itemgetter(*NUMBERS), groups)
        due_of = self._due(groups, step)
        for unit, group, of_group, due, has in zip(
            self.units, groups, numbers, due_of, present, strict=True
        ):
            if True not in has or 0 in unit.dims:
                settings.append(None)
                continue
            key = (*of_group, interval_of(group), has, due)
            found = None if isinstance(of_group[0], Tensor) else known.get(key)
            if found is None:
                absent = tuple(j for j, has_one in enumerate(has) if not has_one)
                found = Settings.of_group(
                    group, absent=absent, due=due, variant=self.variant
                )
                known[key] = found
            settings.append(found)
        stacks = self.stacks(groups, state, step)
        return [task for s in stacks for task in plan_stack(s, settings, groups)]

    def route(self) -> Route:
        """Return how a step's gradients come to where they are pre-conditioned."""
        return Everywhere() if self.owners is None else Relay(self.owners.exchange)

    def close(self, tasks: Sequence[Task]) -> None:
        """Take note of what a step has done."""
        for task in tasks:
            task.stack.note_start(task.rows)
        for stack in self._stacks or []:
            stack.products.note_writes()
