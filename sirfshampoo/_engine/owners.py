"""Which rank holds which pre-conditioner, and steps of several ranks that share them.

Every rank walks through the same rounds. In a round, each rank treats one stack of
those that it owns: shards of gradients come to the owners, which learn the factors and
pre-condition; then whole parameters go from their owners to all ranks, and of sharded
ones, the pre-conditioned gradients go to where the shards are. Gradients of the next
round and results of the last are on their way while a round is computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from sirfshampoo._distributed import Exchange, is_dtensor, whole
from sirfshampoo._engine.costs import cost_of, interval_of
from sirfshampoo._engine.stacks import Stack, Task
from sirfshampoo._engine.units import Unit, joined, stacked
from sirfshampoo._method.factors import Workspace
from sirfshampoo._method.rows import unless_all
from sirfshampoo.structures.base import per_matrix

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


def _params(task: Task, *, distributed: bool) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield the position and the parameters of all rows there."""
    units = task.stack.units[task.rows]
    for j, first in enumerate(units[0].params):
        if is_dtensor(first) == distributed:
            yield j, [unit.params[j] for unit in units]


def _owner(stack: Stack) -> int:
    """Return who owns a stack."""
    return stack.units[0].owner or 0


class Owners:
    """Shares the pre-conditioners of an optimizer among ranks.

    Attributes:
        exchange: Moves tensors between them.
    """

    def __init__(self, group: Any) -> None:
        """Own among the ranks of a process group, or of a mesh of one dimension."""
        self.exchange = Exchange(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Owners:
        """Return this: a copy of an optimizer is on the same ranks."""
        return self

    @property
    def rank(self) -> int:
        """This rank."""
        return self.exchange.rank

    def assign(
        self, units: Sequence[Unit], groups: Sequence[Group], present: Sequence[Unit]
    ) -> list[Unit]:
        """Return units with owners.

        Args:
            units: The units.
            groups: The parameter groups of all units.
            present: Units that have owners already.
        """
        for unit in units:
            self.exchange.check(unit.params)
        return with_owners(units, groups, present, self.exchange.size)

    # ------------------------------------------------------------------------- step

    def take_steps(
        self, tasks: Sequence[Task], batch_size: int, workspace: Workspace
    ) -> None:
        """Do what is planned, of all ranks.

        Args:
            tasks: What a step does with the stacks of all owners.
            batch_size: The number of examples that the gradients average over.
            workspace: Memory for what is needed within the call.
        """
        planned = _rounds(tasks)
        arriving = self._send_gradients(planned[0]) if planned else None
        finish: Callable[[], None] | None = None
        for i, of_round in enumerate(planned):
            gradients = iter(arriving() if arriving else [])
            arriving = None
            if i + 1 < len(planned):
                arriving = self._send_gradients(planned[i + 1])
            mine: list[Tensor] = []
            for task in of_round:
                if task.stack.held:
                    mine += _learn(task, gradients, batch_size, workspace)
            sent = self._send_results(of_round, mine)
            if finish is not None:
                finish()
            finish = sent
        if finish is not None:
            finish()

    def _send_gradients(self, tasks: Sequence[Task]) -> Callable[[], list[Tensor]]:
        """Bring shards of gradients together; return what waits for those it owns.

        These are whole gradients, ``[rows, *shape]``, in the order of tasks and of
        parameters in their units.
        """
        return self.exchange.to_owners(_sharded(tasks))

    def _send_results(
        self, tasks: Sequence[Task], mine: list[Tensor]
    ) -> Callable[[], None]:
        """Send what was computed to all ranks; return what waits and takes it over.

        Args:
            tasks: The tasks of the round.
            mine: The pre-conditioned gradients of sharded parameters that this rank
                owns, ``[rows, *shape]``.
        """
        shards = self.exchange.from_owners(_sharded(tasks), mine)
        moved = [
            (_owner(task.stack), p)
            for task in tasks
            for _, params in _params(task, distributed=False)
            for p in params
        ]
        take_over = self.exchange.broadcast(moved)

        def finish() -> None:
            take_over()
            arrived = iter(shards())
            for task in tasks:
                for j, _ in _params(task, distributed=True):
                    U = next(arrived)
                    moves = unless_all(U.flatten(1).isfinite().all(1))
                    task.stack.descend(task, j, U, moves)

        return finish

    # ------------------------------------------------------------------- checkpoints

    def template(self, stacks: Iterable[Stack]) -> dict[Tensor, dict[str, Tensor]]:
        """Return tensors without numbers of the shapes that a state dict must have."""
        shapes: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for stack in stacks:
            for p, key, tensor, held in stack.entries():
                shape = tensor.shape if held else tensor.shape[1:]
                shapes[p][key] = torch.empty(shape, device="meta")
        return shapes

    def spread(self, stacks: Iterable[Stack]) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Yield parameter, key and tensor of a state that all ranks hold a share of.

        What one rank holds becomes a tensor that is sharded over all of them, so that
        checkpoints know nothing of owners. All ranks must call it.
        """
        owned = [
            (_owner(stack), entry)
            for stack in stacks
            for entry in stack.entries()
            if not (entry[3] and (entry[1] == "step" or is_dtensor(entry[2])))
        ]
        matrices = [(o, e) for o, e in owned if e[1] != "skipped"]
        shards = self.exchange.shared(
            [(owner, tensor, held) for owner, (_, _, tensor, held) in matrices]
        )
        for (_, (p, key, _, _)), shard in zip(matrices, shards, strict=True):
            yield p, key, shard
        counters = [e for _, e in owned if e[1] == "skipped"]
        counts = self.exchange.summed(
            [int(t) if held else 0 for _, _, t, held in counters]
        )
        for (p, key, tensor, _), count in zip(counters, counts, strict=True):
            yield p, key, torch.tensor(count, dtype=tensor.dtype, device=tensor.device)

    def collect(
        self, unit: Unit, saved: Mapping[Tensor, Mapping[str, Tensor]]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """Return what this rank holds of the saved tensors of a unit.

        All ranks must call it, for the same units in the same order.
        """
        mine: dict[Tensor, dict[str, Tensor]] = {}
        for p in unit.params:
            if p not in saved:
                continue
            mine[p] = {}
            for key in sorted(saved[p]):
                tensor = saved[p][key]
                if key == "momentum_buffer" and is_dtensor(p):
                    mine[p][key] = tensor
                    continue
                tensor = whole(tensor)
                if key == "step" or unit.owner == self.rank:
                    mine[p][key] = tensor
        return mine


def _rounds(tasks: Iterable[Task]) -> list[list[Task]]:
    """Return what is done in each round."""
    of_stack: dict[Stack, list[Task]] = defaultdict(list)
    for task in tasks:
        of_stack[task.stack].append(task)
    return [
        [task for stack in of_round for task in of_stack[stack]]
        for of_round in rounds(of_stack)
    ]


def rounds(stacks: Iterable[Stack]) -> Iterator[list[Stack]]:
    """Yield one stack of each owner at a time, the largest first."""
    of_owner: dict[int, list[Stack]] = defaultdict(list)
    for stack in stacks:
        of_owner[_owner(stack)].append(stack)

    def size(stack: Stack) -> int:
        return len(stack.units) * stack.units[0].dims.numel()

    ordered = [sorted(s, key=size, reverse=True) for s in of_owner.values()]
    for of_round in zip_longest(*ordered):
        yield [stack for stack in of_round if stack is not None]


def _sharded(tasks: Iterable[Task]) -> list[tuple[int, list[Tensor]]]:
    """Return owners, each with sharded parameters of equal shape."""
    return [
        (_owner(task.stack), params)
        for task in tasks
        for _, params in _params(task, distributed=True)
    ]


def _learn(
    task: Task, gradients: Iterator[Tensor], batch_size: int, workspace: Workspace
) -> list[Tensor]:
    """Learn the factors of a run; move what is whole, return what is not.

    Args:
        task: What a step does with the run.
        gradients: Yields the whole gradients of its sharded parameters, in turn.
        batch_size: The number of examples that the gradients average over.
        workspace: Memory for what is needed within the call.
    """
    units = task.stack.units[task.rows]
    wholes = [
        next(gradients)
        if is_dtensor(first)
        else stacked([unit.params[j].grad for unit in units])  # type: ignore[misc]
        for j, first in enumerate(units[0].params)
    ]
    G = joined(units, wholes)
    U, moves = task.stack.learn(task, G, batch_size, workspace)
    for j, _ in _params(task, distributed=False):
        task.stack.descend(task, j, U[j], moves)
    results = [U[j] for j, _ in _params(task, distributed=True)]
    if moves is not None:  # where shards are, this tells to rest
        for U_j in results:
            U_j.masked_fill_(per_matrix(~moves, U_j), float("nan"))
    return results
