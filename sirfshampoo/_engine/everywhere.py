"""A step of ranks of which each pre-conditions all, or of one rank alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from sirfshampoo._distributed import shard_rows, whole_stack
from sirfshampoo._engine.joint import joined, joint_gradients, whole_zeros
from sirfshampoo._engine.momenta import ahead, shards_of_gradients
from sirfshampoo._engine.plan import Task, batches
from sirfshampoo._engine.step import Update, descend_rows


class Everywhere:
    """Every rank pre-conditions all: gradients are gathered, updates cut into shards.

    Where nothing is distributed, both are views.
    """

    def __init__(self) -> None:
        """Take one step."""
        self._gradients: list[Tensor] = []  # of the batch that is treated

    def in_turn(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Return all tasks."""
        return batches(tasks)

    def gather(self, tasks: Sequence[Task]) -> list[tuple[Tensor, Tensor]]:
        """Return what factors learn from, and what they pre-condition."""
        if not tasks[0].averages_gradients:
            wholes = [joint_gradients(t.units, t.settings.absent) for t in tasks]
            return [(G, G) for G in wholes]
        places = [(task, j) for task in tasks for j in task.present]
        self._gradients = [shards_of_gradients(task.units, j) for task, j in places]
        settings = tasks[0].settings
        shards = ahead(
            [task.V[j] for task, j in places],
            self._gradients,
            alpha1=settings.alpha1,
            nesterov=settings.variant.nesterov,
        )
        found = iter(zip(self._gradients, shards, strict=True))
        return [self._joined(task, found) for task in tasks]

    def _joined(
        self, task: Task, shards: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return whole gradients, and whole ones ahead, of a task's units."""
        units, absent = task.units, task.settings.absent
        learned, ahead_of = [], []
        for j, like in enumerate(units[0].params):
            if j in absent:
                G = V = whole_zeros(len(units), like)
            else:
                G, V = next(shards)
                V = whole_stack(V, like)
                G = whole_stack(G, like) if task.settings.due else V
            learned.append(G)
            ahead_of.append(V)
        return joined(units, learned), joined(units, ahead_of)

    def deliver(self, updates: Sequence[Update]) -> None:
        """Have the parameters on this rank descend."""
        shards = [u._replace(U=shard_rows(u.U, u.first)) for u in updates]
        descend_rows(shards, self._gradients or None)
        self._gradients = []
