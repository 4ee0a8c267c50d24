"""A step of ranks that share pre-conditioners: rounds of sending, learning, sending."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from torch import Tensor

from sirfshampoo._distributed import Exchange, is_dtensor
from sirfshampoo._engine.joint import joined, whole_zeros
from sirfshampoo._engine.momenta import ahead, shards_of_gradients
from sirfshampoo._engine.plan import Task
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.step import Update, descend_rows
from sirfshampoo._method.descent import scale_rows
from sirfshampoo._method.rows import unless_all
from sirfshampoo.structures.base import per_matrix


class Relay:
    """The route of a step whose pre-conditioners lie on one rank each.

    Every rank walks through the same rounds. In a round, each rank treats one stack of
    those that it owns: shards of gradients come to the owners, which learn the factors
    and pre-condition; then whole parameters go from their owners to all ranks, and of
    sharded ones, the pre-conditioned gradients go to where the shards are. Gradients of
    the next round and results of the last are on their way while a round is computed.
    """

    def __init__(self, exchange: Exchange) -> None:
        """Take one step over an exchange between ranks."""
        self._exchange = exchange
        # of the round that is computed: whole gradients of sharded parameters, in the
        # order of tasks and of parameters in their units; and what became of them
        self._gradients: Iterator[Tensor] = iter(())
        self._results: list[Tensor] = []

    def in_turn(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """Yield the tasks of this rank; ranks communicate before and after each."""
        planned = _rounds_of(tasks)
        arriving = self._send_gradients(planned[0]) if planned else None
        finish: Callable[[], None] | None = None
        for i, of_round in enumerate(planned):
            self._gradients = iter(arriving() if arriving else [])
            arriving = None
            if i + 1 < len(planned):
                arriving = self._send_gradients(planned[i + 1])
            self._results = []
            yield from ([task] for task in of_round if task.stack.held)
            sent = self._send_results(of_round)
            if finish is not None:
                finish()
            finish = sent
        if finish is not None:
            finish()

    def gather(self, tasks: Sequence[Task]) -> list[tuple[Tensor, Tensor]]:
        """Return what factors learn from, and what they pre-condition."""
        return [self._joined(task) for task in tasks]

    def _joined(self, task: Task) -> tuple[Tensor, Tensor]:
        units, of_params = task.units, []
        for j, first in enumerate(units[0].params):
            if j in task.settings.absent:
                found = [whole_zeros(len(units), first)]
            elif is_dtensor(first):
                found = [next(self._gradients) for _ in range(_kinds(task))]
            else:
                found = _wanted(task, j)
            of_params.append((found[0], found[-1]))
        learned, ahead_of = zip(*of_params, strict=True)
        return joined(units, learned), joined(units, ahead_of)

    def deliver(self, updates: Sequence[Update]) -> None:
        """Have whole parameters descend; keep what is for shards until it is sent."""
        descend_rows([update for update in updates if not is_dtensor(update.first)])
        for _, _, U, scale, moves in (u for u in updates if is_dtensor(u.first)):
            if scale is not None:
                scale_rows([U], scale)
            if moves is not None:  # where shards are, this tells to rest
                U.masked_fill_(per_matrix(~moves, U), float("nan"))
            self._results.append(U)

    def _send_gradients(self, tasks: Sequence[Task]) -> Callable[[], list[Tensor]]:
        """Bring shards of gradients together; return what waits for those it owns."""
        # on every rank, whatever it has to send: the ranks may communicate for it
        return self._exchange.to_owners(
            [
                (task.stack.owner, params[0], shards)
                for task in tasks
                for j, params in _params(task, distributed=True)
                for shards in _wanted(task, j)
            ]
        )

    def _send_results(self, tasks: Sequence[Task]) -> Callable[[], None]:
        """Send what was computed to all ranks; return what waits and takes it over."""
        shards = self._exchange.from_owners(_sharded(tasks), self._results)
        moved = [
            (task.stack.owner, p)
            for task in tasks
            for _, params in _params(task, distributed=False)
            for p in params
        ]
        take_over = self._exchange.broadcast(moved)

        def finish() -> None:
            take_over()
            arrived = iter(shards())
            for task in tasks:
                for j, _ in _params(task, distributed=True):
                    U = next(arrived)
                    moves = unless_all(U.flatten(1).isfinite().all(1))
                    descend_rows([Update(task, j, U, None, moves)])

        return finish


def _params(task: Task, *, distributed: bool) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield the positions that move, and the parameters of all rows there."""
    for j, first in enumerate(task.units[0].params):
        if is_dtensor(first) == distributed and j not in task.settings.absent:
            yield j, [unit.params[j] for unit in task.units]


def _kinds(task: Task) -> int:
    """Return how many tensors an owner wants of each parameter."""
    return 2 if task.averages_gradients and task.settings.due else 1


def _wanted(task: Task, j: int) -> list[Tensor]:
    """Return what an owner wants of the j-th parameters, what of it lies here.

    The gradients, if it learns from them, then what it pre-conditions, if that is
    another.
    """
    G = shards_of_gradients(task.units, j)
    if not task.averages_gradients:
        return [G]
    alpha1, variant = task.settings.alpha1, task.settings.variant
    V = ahead([task.V[j]], [G], alpha1=alpha1, nesterov=variant.nesterov)
    return [G, *V][-_kinds(task) :]


def _sharded(tasks: Iterable[Task]) -> list[tuple[int, list[Tensor]]]:
    """Return owners, each with sharded parameters of equal shape."""
    return [
        (task.stack.owner, params)
        for task in tasks
        for _, params in _params(task, distributed=True)
    ]


def _rounds_of(tasks: Iterable[Task]) -> list[list[Task]]:
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
        of_owner[stack.owner].append(stack)

    def size(stack: Stack) -> int:
        return len(stack.units) * stack.units[0].dims.numel()

    ordered = [sorted(s, key=size, reverse=True) for s in of_owner.values()]
    for of_round in zip_longest(*ordered):
        yield [stack for stack in of_round if stack is not None]
