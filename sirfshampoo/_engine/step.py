"""One step, from gradients to parameters, as it was planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sirfshampoo._config.weights import is_matrix
from sirfshampoo._distributed import (
    is_dtensor,
    local,
    sum_over_shards,
)
from sirfshampoo._engine.joint import (
    scattered,
    stacked,
)
from sirfshampoo._engine.kept import Preparation
from sirfshampoo._engine.momenta import shards_of_gradients
from sirfshampoo._engine.plan import Task
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._method import elementwise
from sirfshampoo._method.descent import (
    accumulate,
    decay,
    descend,
    length_of,
    limiting,
    normalizing,
    row_norms,
    row_sums,
    scale_rows,
    size_of,
)
from sirfshampoo._method.factors import (
    Workspace,
    mean_square,
    start_factors,
    update_factors,
)
from sirfshampoo._method.following import take_in
from sirfshampoo._method.lessons import Lesson, learn_together
from sirfshampoo._method.preconditioner import precondition
from sirfshampoo._method.rows import both, finite_rows, unless_all


class Update(NamedTuple):
    """What the j-th parameters of a task's units are to move along, and whether.

    Attributes:
        task: What a step does with the units.
        j: The position of the parameters in them.
        U: Their pre-conditioned gradients, ``[rows, *shape]``, of what is distributed
            the shards on this rank; overwritten.
        scale: What is yet to be multiplied on, ``[rows]``; None: nothing.
        moves: Which rows move, ``[rows]``; None: all.
    """

    task: Task
    j: int
    U: Tensor
    scale: Tensor | None
    moves: Tensor | None

    @property
    def first(self) -> Tensor:
        """One of the parameters; they are alike."""
        return self.task.units[0].params[self.j]

    @property
    def params(self) -> list[Tensor]:
        """What lies on this rank of each parameter."""
        params = [unit.params[self.j] for unit in self.task.units]
        return [local(p) for p in params] if is_dtensor(self.first) else params


class Route(Protocol):
    """How gradients come to where they are pre-conditioned, and updates from there."""

    def in_turn(self, tasks: Sequence[Task]) -> Iterable[list[Task]]:
        """Yield the tasks of this rank, those together that `batches` says."""

    def gather(self, tasks: Sequence[Task]) -> list[tuple[Tensor, Tensor]]:
        """Return, a task, what factors learn from, and what they pre-condition.

        Both are whole and joined, ``[rows, *dims]``: the gradients; and these or, where
        momenta come first, those. The gradients only where factors are to be updated.
        """

    def deliver(self, updates: Sequence[Update]) -> None:
        """Have parameters descend, wherever they lie.

        Args:
            updates: For each parameter with a gradient of a task, as gathered, in
                order. Their U are whole.
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
    for batch in route.in_turn(tasks):
        gathered = route.gather(batch)
        learned: list[Tensor | None] = []  # which rows did; None: all
        lessons: list[Lesson] = []
        for task, (G, _) in zip(batch, gathered, strict=True):
            moves = None
            if task.settings.due:
                moves = _update_factors(task, G, batch_size, workspace, lessons)
            learned.append(moves)
        learn_together(lessons)
        U = [
            precondition_rows(task.stack, task.rows, ahead_of, task.preparation)
            for task, (_, ahead_of) in zip(batch, gathered, strict=True)
        ]
        sources = [ahead_of for _, ahead_of in gathered]
        route.deliver(_updates(batch, sources, U, learned))


def _updates(
    batch: Sequence[Task],
    sources: Sequence[Tensor],
    U: Sequence[Tensor],
    learned: Sequence[Tensor | None],
) -> list[Update]:
    """Return what the parameters of a batch are to move along.

    Args:
        batch: The tasks.
        sources: What was pre-conditioned of each, ``[rows, *dims]``.
        U: What became of it; overwritten.
        learned: Which rows of each may move, ``[rows]``; None: all.
    """
    units, variant = [task.units[0] for task in batch], batch[0].settings.variant
    rows = [len(task.units) for task in batch]
    pasts = [task.past for task in batch if task.past is not None]
    norms = torch.cat([row_norms(X) for X in sources]) if pasts else None
    probe = row_norms if variant.normalize_update else row_sums
    probes = torch.cat([probe(U_i) for U_i in U])
    finite = finite_rows(probes)
    if finite is not None:
        pairs = zip(learned, finite.split(rows), strict=True)
        learned = [both(mask, other) for mask, other in pairs]
    whole: Tensor | None = None
    if variant.normalize_update:
        whole = normalizing(U, probes, sizes=[unit.size for unit in units])
    if norms is not None:
        shrinks = take_in(pasts, norms, learned)
        whole = shrinks if whole is None else whole.mul_(shrinks)
    scales = [None] * len(batch) if whole is None else whole.split(rows)
    updates = []
    for task, U_i, scale, moves in zip(batch, U, scales, learned, strict=True):
        if moves is not None:
            task.skipped.add_(~moves)
        pieces = scattered(task.units, U_i)
        updates += [Update(task, j, pieces[j], scale, moves) for j in task.present]
    return updates


def _update_factors(
    task: Task,
    G: Tensor,
    batch_size: int,
    workspace: Workspace,
    lessons: list[Lesson],
) -> Tensor | None:
    """Update the factors of a task; return which rows moved (None: all).

    What small ones have yet to learn is put into `lessons`.
    """
    settings, variant = task.settings, task.settings.variant
    lam: float | Tensor = settings.lam
    learns: Tensor | None = None
    if variant.relative_damping:
        power = mean_square(G, batch_size)
        lam, learns = lam * power, unless_all(power > 0)
    if variant.initial_factors == "gradient" and task.stack.may_start:
        start_factors(task.K, G, batch_size=batch_size, lam=lam)
    update = partial(update_factors, workspace=workspace, lessons=lessons)
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


def descend_rows(
    updates: Sequence[Update], gradients: Sequence[Tensor] | None = None
) -> None:
    """Move parameters and their momenta.

    Args:
        updates: Their settings are those of one batch.
        gradients: The gradients, where momenta average them: ``[rows, *shape]`` for
            each, of what is distributed the shards on this rank. Default: are fetched.
    """
    if not updates:
        return
    first, moves = updates[0].task, [update.moves for update in updates]
    settings, variant = first.settings, first.settings.variant
    V = None
    if first.stack.V is not None:
        V = [task.V[j] for task, j, *_ in updates]
    if V is not None and variant.momentum_first:
        if gradients is None:
            gradients = [shards_of_gradients(task.units, j) for task, j, *_ in updates]
        accumulate(V, gradients, alpha1=settings.alpha1, moves=moves)
        V = None
    lr: float | list[Tensor] | None = settings.lr
    if lr is None:
        lr = [update.task.rates(update.U.device) for update in updates]
    params, U = [update.params for update in updates], [u.U for u in updates]
    limit, decays = variant.max_relative_update, [_decays(u) for u in updates]
    W = []
    if limit is not None or any(decays):
        W = [stacked(of_update) for of_update in params]
    scales = [update.scale for update in updates if update.scale is not None]
    scale = torch.cat(scales) if scales else None
    if limit is not None:
        scale = _limited(updates, W, scale, limit=limit, lr=lr)
    if scale is not None:
        scale_rows(U, scale)
    for i, decaying in enumerate(decays):
        if decaying:
            decay(U[i], W[i], kappa=settings.kappa, cautious=variant.cautious_decay)
    descend(
        [p for of_update in params for p in of_update],
        V,
        U,
        moves=moves,
        lr=lr,
        alpha1=settings.alpha1,
        nesterov=variant.nesterov,
    )


def _decays(update: Update) -> bool:
    """Return whether parameters shrink."""
    settings = update.task.settings
    exempt = not settings.variant.decay_vectors and not is_matrix(update.first)
    return settings.kappa != 0 and not exempt


def _limited(
    updates: Sequence[Update],
    W: Sequence[Tensor],
    scale: Tensor | None,
    *,
    limit: float,
    lr: float | Sequence[Tensor],
) -> Tensor:
    """Return what to multiply on U so that no step is too long beside its parameter.

    Args:
        updates: What parameters are to move along.
        W: The parameters, ``[rows, *shape]``, of what is distributed the shards here.
        scale: What is to be multiplied on anyway, ``[rows]`` of all.
        limit: The longest step, relative to the parameter.
        lr: Learning rate, or those of the rows of each.
    """
    norms, lengths = [], []
    for update, W_i in zip(updates, W, strict=True):
        like, of_U, of_W = update.first, row_norms(update.U), row_norms(W_i)
        if is_dtensor(like):
            squares = torch.stack([of_U, of_W]).square_()
            of_U, of_W = sum_over_shards(squares, like).sqrt_().unbind(0)
        norms.append(of_U)
        size = size_of(like.shape, embeds=update.task.units[0].embeds)
        lengths.append(length_of(of_W, size=size))
    rates = lr if isinstance(lr, float) else torch.cat(list(lr))
    whole = torch.cat(norms) if scale is None else torch.cat(norms).mul_(scale)
    limits = limiting(whole, torch.cat(lengths), limit=limit, lr=rates)
    return limits if scale is None else limits.mul_(scale)
