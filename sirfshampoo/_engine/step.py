"""One step, from gradients to parameters, as it was planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from sirfshampoo._distributed import local, shard_rows, sum_over_shards, whole_stack
from sirfshampoo._engine.joint import joined, joint_gradients, scattered, whole_zeros
from sirfshampoo._engine.kept import Preparation
from sirfshampoo._engine.momenta import shards_of_gradients
from sirfshampoo._engine.plan import Task
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.units import Unit, is_matrix
from sirfshampoo._method import elementwise
from sirfshampoo._method.descent import (
    accumulate,
    descend,
    limit_update,
    normalize_update,
    size_of,
    squared_norms,
)
from sirfshampoo._method.factors import (
    Workspace,
    mean_square,
    start_factors,
    update_factors,
)
from sirfshampoo._method.preconditioner import precondition
from sirfshampoo._method.rows import both, finite_rows, unless_all
from sirfshampoo.structures.base import accumulation_dtype


class Route(Protocol):
    """How gradients come to where they are pre-conditioned, and updates from there."""

    def in_turn(self, tasks: Sequence[Task]) -> Iterable[Task]:
        """Yield the tasks of this rank."""

    def gather(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return what factors learn from, and what they pre-condition.

        Both are whole and joined, ``[rows, *dims]``: the gradients; and these or, where
        momenta come first, those. The gradients only where factors are to be updated.
        """

    def deliver(self, task: Task, U: Sequence[Tensor], moves: Tensor | None) -> None:
        """Have parameters descend, wherever they lie.

        Args:
            task: A task of this rank.
            U: The pre-conditioned gradients of each of a unit's parameters, whole,
                ``[rows, *shape]``.
            moves: Which rows move; None: all.
        """


def take_steps(
    tasks: Sequence[Task],
    batch_size: int,
    workspace: Workspace,
    route: Route,
    counters: Sequence[Tensor],
) -> None:
    """Do what is planned.

    Args:
        tasks: What a step does with the stacks.
        batch_size: The number of examples that the gradients average over.
        workspace: Memory for what is needed within the call.
        route: Between the parameters and where their factors lie.
        counters: The tasks' `skipped`: Dynamo passes over calls that get no tensor.
    """
    for task in route.in_turn(tasks):
        settings, variant = task.settings, task.settings.variant
        G, ahead_of = route.gather(task)
        moves: Tensor | None = None  # which rows do; None: all
        if settings.due:
            moves = _update_factors(task, G, batch_size, workspace)
        U = precondition_rows(task.stack, task.rows, ahead_of, task.preparation)
        moves = _and_finite(moves, U)
        if moves is not None:
            task.skipped.add_(~moves)
        if variant.normalize_update:
            first = task.units[0]
            U = normalize_update(U, size=size_of(first.dims, embeds=first.embeds))
        route.deliver(task, scattered(task.units, U), moves)


def _update_factors(
    task: Task, G: Tensor, batch_size: int, workspace: Workspace
) -> Tensor | None:
    """Update the factors of a task; return which rows moved (None: all)."""
    settings, variant = task.settings, task.settings.variant
    lam: float | Tensor = settings.lam
    learns: Tensor | None = None
    if variant.relative_damping:
        power = mean_square(G, batch_size)
        lam, learns = lam * power, unless_all(power > 0)
    if variant.initial_factors == "gradient":
        start_factors(task.K, G, batch_size=batch_size, lam=lam)
    update = partial(update_factors, workspace=workspace)
    if task.stack.elementwise:
        update = elementwise.update_factors  # type: ignore[assignment]
    return update(
        task.K,
        task.m,
        G,
        times=task.units[0].times,
        batch_size=batch_size,
        beta2=settings.beta2,
        alpha2=settings.alpha2,
        lam=lam,
        clamp=variant.clamp,
        learns=learns,
    )


def precondition_rows(
    stack: Stack, rows: slice, G: Tensor, preparation: Preparation | None = None
) -> Tensor:
    """Return the pre-conditioned gradients ``[rows, *dims]`` of a run of rows.

    Args:
        stack: The stack.
        rows: The rows.
        G: Their gradients.
        preparation: How the factors are prepared. Default: for this once.
    """
    if preparation is None:
        preparation = stack.products.for_once()
    if stack.elementwise:
        K = stack.part(stack.K, rows)
        return elementwise.precondition(K, G, forms=preparation.form)  # type: ignore[arg-type]
    return precondition(stack.products.get(rows, preparation), G)


def limit_rows(
    units: Sequence[Unit],
    j: int,
    U: Tensor,
    W: Sequence[Tensor],
    *,
    lr: float | Tensor,
    limit: float | None,
) -> Tensor:
    """Limit how far the j-th parameters of units go, beside their size.

    Args:
        units: The units, one a row.
        j: The position of the parameters in their units.
        U: Their pre-conditioned gradients, ``[rows, *shape]``; shards where they are.
        W: What of them lies on this rank.
        lr: Learning rate; a tensor ``[rows]`` has one value a row.
        limit: The longest step, relative to the parameter; None: no limit.
    """
    if limit is None:
        return U
    like = units[0].params[j]
    squares = sum_over_shards(squared_norms(U, W), like)
    size = size_of(like.shape, embeds=units[0].embeds)
    return limit_update(U, squares, limit=limit, lr=lr, size=size)


def descend_rows(task: Task, j: int, U: Tensor, moves: Tensor | None) -> None:
    """Move the j-th parameters of a task's units, and their momentum.

    Args:
        task: What a step does with them.
        j: The position of the parameters in their units.
        U: Their pre-conditioned gradients, ``[rows, *shape]``, of what is distributed
            the shards on this rank; overwritten.
        moves: Which rows move; None: all.
    """
    settings, variant = task.settings, task.settings.variant
    decays = variant.decay_vectors or is_matrix(task.units[0].params[j])
    V = None
    if task.stack.V is not None and not variant.momentum_first:
        V = task.stack.V[j][task.rows]
    if task.averages_gradients:
        accumulate(
            task.V[j],
            shards_of_gradients(task.units, j),
            alpha1=settings.alpha1,
            moves=moves,
        )
    lr = task.rate(U.device)
    W = [local(unit.params[j]) for unit in task.units]
    U = limit_rows(task.units, j, U, W, lr=lr, limit=variant.max_relative_update)
    descend(
        W,
        V,
        U,
        moves=moves,
        lr=lr,
        alpha1=settings.alpha1,
        kappa=settings.kappa if decays else 0.0,
        nesterov=variant.nesterov,
        cautious=variant.cautious_decay,
    )


class Everywhere:
    """Every rank pre-conditions all: gradients are gathered, updates cut into shards.

    Where nothing is distributed, both are views.
    """

    def in_turn(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return all tasks."""
        return tasks

    def gather(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return what factors learn from, and what they pre-condition."""
        units, absent = task.units, task.settings.absent
        if not task.averages_gradients:
            G = joint_gradients(units, absent)
            return G, G
        learned, ahead_of = [], []
        for j, like in enumerate(units[0].params):
            if j in absent:
                G = V = whole_zeros(len(units), like)
            else:
                shards = shards_of_gradients(units, j)
                V = whole_stack(task.ahead(j, shards), like)
                G = whole_stack(shards, like) if task.settings.due else V
            learned.append(G)
            ahead_of.append(V)
        return joined(units, learned), joined(units, ahead_of)

    def deliver(self, task: Task, U: Sequence[Tensor], moves: Tensor | None) -> None:
        """Have the parameters on this rank descend."""
        for j, U_j in enumerate(U):
            if j not in task.settings.absent:
                shards = shard_rows(U_j, task.units[0].params[j])
                descend_rows(task, j, shards, moves)


def _and_finite(moves: Tensor | None, X: Tensor) -> Tensor | None:
    """Return a mask less the rows of X that are not finite; None: it holds for all."""
    # one entry that is not finite makes the sum so
    finite = finite_rows(X.flatten(1).sum(1, dtype=accumulation_dtype(X.dtype)))
    return both(moves, finite)
