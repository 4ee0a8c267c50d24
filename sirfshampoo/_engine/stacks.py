"""Units of equal shape, structure, dtype and device as the rows of stacked tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sirfshampoo._distributed import (
    distributed_like,
    fill,
    is_dtensor,
    local,
    local_like,
    placement,
    shard_rows,
    whole_rows,
)
from sirfshampoo._engine.costs import interval_of
from sirfshampoo._engine.kept import KeptProducts, Preparation
from sirfshampoo._engine.units import Unit, joined, joint_gradients, stacked
from sirfshampoo._method import elementwise
from sirfshampoo._method.descent import Variant, accumulate, descend, limit_update
from sirfshampoo._method.factors import Workspace, start_factors, update_factors
from sirfshampoo._method.preconditioner import precondition
from sirfshampoo._method.rows import finite_rows
from sirfshampoo.combiner import PerParameter
from sirfshampoo.structures import StructuredMatrix, structure_class
from sirfshampoo.structures.base import accumulation_dtype
from sirfshampoo.structures.diagonal import DiagonalMatrix

State = dict[str, Tensor]

#: How many numbers a stack of several units may work on. Many small products are faster
#: as one batched product; large ones gain nothing on a CPU, but lose the copy of their
#: gradients into the stack, a working set that fits the caches, and, from 4 MiB a
#: temporary on, more time to page faults than to arithmetic.
_STACK_LIMIT = {"cpu": 1 << 19}
_STACK_LIMIT_ELSEWHERE = 1 << 27


class Settings(NamedTuple):
    """What the rows of one run have in common during a step."""

    lr: float | None  # None: each row has a tensor
    beta2: float
    alpha1: float
    alpha2: float
    lam: float
    kappa: float
    due: bool  # whether the factors are to be updated
    interval: int  # how many steps the factors are expected to stay
    variant: Variant

    @classmethod
    def of_group(
        cls, group: Mapping[str, Any], *, due: bool, variant: Variant
    ) -> Settings:
        """Read the settings of a parameter group."""
        return cls(
            lr=None if isinstance(group["lr"], Tensor) else float(group["lr"]),
            beta2=float(group["beta2"]),
            alpha1=float(group["alpha1"]),
            alpha2=float(group["alpha2"]),
            lam=float(group["lam"]),
            kappa=float(group["kappa"]),
            due=due,
            interval=interval_of(group),
            variant=variant,
        )


class Task(NamedTuple):
    """A run of rows of a stack, and what a step does with it."""

    stack: Stack
    rows: slice
    settings: Settings
    products: Preparation
    lrs: list[Tensor]  # of the rows, where learning rates are tensors
    skipped: Tensor  # of the rows; Dynamo passes over calls that get no tensor

    def rate(self, device: torch.device) -> float | Tensor:
        """Return the learning rate, or those of the rows, ``[rows]``."""
        if self.settings.lr is not None:
            return self.settings.lr
        return stacked([lr.reshape(()).to(device) for lr in self.lrs])


class Stack:
    """Units that are treated by the same batched operations.

    The rows of its tensors stand in the optimizer's state; `is_current` tells whether
    someone has put others in their place.

    Attributes:
        units: The units, one a row.
        held: Whether the factors lie on this rank.
        K: The Kronecker factor of each axis, ``[rows, d_n, d_n]``.
        m: Their Riemannian momenta; None if there are none.
        V: The momentum of each of a unit's parameters, ``[rows, *shape]``, of what is
            distributed the shard on this rank; None if there is none.
        step: The number of steps taken, ``[rows]``, on the CPU.
        skipped: The number of steps sat out for a non-finite gradient, ``[rows]``.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        has_m: bool,
        has_V: bool,
        step: int,
        held: bool = True,
        initial_factors: str = "identity",
    ) -> None:
        """Set up the stack as at the start of training, at a global step.

        Args:
            units: The units, one a row.
            has_m: Whether the factors have momenta.
            has_V: Whether the parameters have momenta.
            step: The global step.
            held: Whether the factors lie on this rank. If not, their tensors and the
                momenta of whole parameters have no rows.
            initial_factors: Where factors start, as the constructor's argument says.
        """
        self.units, self.held = units, held
        first = units[0]
        batch = (len(units) if held else 0,)
        device = first.params[0].device
        axes = list(zip(first.structures, first.dims, first.dtypes, strict=True))
        self.K = [
            structure_class(name).zeros(d, batch=batch, dtype=dtype, device=device)
            for name, d, dtype in axes
        ]
        # rows whose factors start when a gradient comes, if it is finite
        self._starting: set[int] = set()
        if initial_factors == "identity":
            for K_n in self.K:
                K_n.shift_(1.0)
        elif first.owner is None:  # else ranks could not tell alike which have started
            self._starting.update(range(len(units)))
        self.m = None
        if has_m:
            self.m = [
                structure_class(name).zeros(d, batch=batch, dtype=dtype, device=device)
                for name, d, dtype in axes
            ]
        self.V = None
        if has_V:
            self.V = [self._momentum(p) for p in first.params]
        self.step = torch.full((len(units),), step, dtype=torch.int64)
        self.skipped = torch.zeros(batch, dtype=torch.int64, device=device)

        self._kinds = [(p.device, p.dtype) for p in first.params]
        self._elementwise = all(isinstance(K_n, DiagonalMatrix) for K_n in self.K)
        self._placed: list[tuple[Tensor, str, Tensor]] = []
        self._products = KeptProducts(self.K, first)

    def _momentum(self, p: Tensor) -> Tensor:
        """Return a momentum of zeros for parameters like p, ``[rows, *shape]``."""
        shard, rows = local(p.detach()), len(self.units)
        if not self.held and not is_dtensor(p):
            rows = 0  # shards of a momentum lie with those of its parameter
        if rows == 1:  # one parameter keeps its memory format
            return torch.zeros_like(shard).unsqueeze(0)
        return shard.new_zeros(rows, *shard.shape)

    # ------------------------------------------------------------------------ state

    def _rows(self) -> Iterator[tuple[int, int, str, Tensor, bool]]:
        """Yield row, position of the parameter in its unit, key, tensor, if held here.

        What is not held here is stood in for by a tensor without rows, so that every
        rank has the same keys.
        """
        matrices = {f"K{n}": K_n for n, K_n in enumerate(self.K)}
        matrices |= {f"m{n}": m_n for n, m_n in enumerate(self.m or [])}
        fields = {
            f"{name}.{field}": tensor
            for name, matrix in matrices.items()
            for field, tensor in matrix.named_tensors()
        }
        entries = [(0, "step", self.step), (0, "skipped", self.skipped)]
        entries += [(0, key, tensor) for key, tensor in fields.items()]
        entries += [(j, "momentum_buffer", V_j) for j, V_j in enumerate(self.V or [])]
        for position, key, tensor in entries:
            held = len(tensor) == len(self.units)
            for row, unit in enumerate(self.units):
                view = tensor[row] if held else tensor
                if key == "momentum_buffer":
                    view = distributed_like(view, unit.params[position])
                yield row, position, key, view, held

    def place(self, state: dict[Tensor, State]) -> None:
        """Take over the numbers in the optimizer's state and leave the rows there."""
        self._placed = []
        for row, position, key, view, held in self._rows():
            p = self.units[row].params[position]
            # without numbers there is nothing to take over
            if held and key in state[p] and not state[p][key].is_meta:
                fill(view, state[p][key])
            state[p][key] = view
            self._placed.append((p, key, view))
        if self._starting and not self.skipped.is_meta:
            has_started = (self.K[0].max_abs() != 0).tolist()
            self._starting -= {row for row, has in enumerate(has_started) if has}

    def entries(self) -> Iterator[tuple[Tensor, str, Tensor, bool]]:
        """Yield parameter, key and tensor of all that the state holds for this stack.

        The last entry tells whether it is held here, or stood in for by a tensor
        without rows, ``[0, *shape]``.
        """
        for row, position, key, view, held in self._rows():
            yield self.units[row].params[position], key, view, held

    def is_current(
        self, state: Mapping[Tensor, State], groups: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Return whether the state holds these rows, and all that is needed.

        A model may have been moved, or its type changed; a momentum, switched on.
        """
        for unit in self.units:
            group = groups[unit.group]
            if [(p.device, p.dtype) for p in unit.params] != self._kinds:
                return False
            if (self.m is None and group["alpha2"]) or (
                self.V is None and group["alpha1"]
            ):
                return False
        return all(
            p in state and state[p].get(key) is view for p, key, view in self._placed
        )

    # ------------------------------------------------------------------------- step

    def runs(
        self, settings: Sequence[Settings | None]
    ) -> Iterator[tuple[slice, Settings]]:
        """Yield runs of neighbouring rows that are treated alike.

        Args:
            settings: The settings of each parameter group; None: the unit rests.
        """
        start, of_row = 0, [settings[unit.group] for unit in self.units]
        for row in self._starting:  # whatever T says: until then, nothing would move
            shared = of_row[row]
            of_row[row] = None if shared is None else shared._replace(due=True)
        for stop in range(1, len(of_row) + 1):
            current = of_row[start]
            if stop == len(of_row) or of_row[stop] != current:
                if current is not None:
                    yield slice(start, stop), current
                start = stop

    def plan(
        self,
        settings: Sequence[Settings | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> list[Task]:
        """Return what a step does with the rows; all that is not arithmetic.

        Args:
            settings: The settings of each parameter group; None: the unit rests.
            groups: The parameter groups.
        """
        self._products.look_for_writes()
        tasks = []
        for rows, shared in self.runs(settings):
            interval = 1 if self._elementwise else shared.interval
            products = self._products.for_once()
            if self.held:
                products = self._products.plan(rows, interval, due=shared.due)
            lrs = []
            if shared.lr is None:
                lrs = [groups[unit.group]["lr"] for unit in self.units[rows]]
            skipped = self.skipped[rows]
            self._starting -= set(range(rows.start, rows.stop))
            tasks.append(Task(self, rows, shared, products, lrs, skipped))
        return tasks

    def note_writes(self) -> None:
        """Take what has been written into the factors as known."""
        self._products.note_writes()

    def take_step(self, task: Task, batch_size: int, workspace: Workspace) -> None:
        """Update factors (if due), momenta and parameters of a run of rows."""
        units = self.units[task.rows]
        U, moves = self.learn(task, joint_gradients(units), batch_size, workspace)
        for j, U_j in enumerate(U):
            self.descend(task, j, shard_rows(U_j, units[0].params[j]), moves)

    def learn(
        self, task: Task, G: Tensor, batch_size: int, workspace: Workspace
    ) -> tuple[list[Tensor], Tensor | None]:
        """Update the factors of a run of rows (if due) and pre-condition.

        Returns:
            The pre-conditioned gradients of each of a unit's parameters,
            ``[rows, *shape]``, and which rows may move (None: all).
        """
        _, rows, settings, products, _, skipped = task
        moves: Tensor | None = None
        if settings.due:
            moves = self._update(rows, settings, G, batch_size, workspace)
        variant = settings.variant
        if variant.momentum_first and self.V is not None:
            moves = _and_finite(moves, G)
            self._accumulate(rows, moves, settings.alpha1)
            V = joined(self.units[rows], self.whole_momenta(rows))
            G = torch.add(G, V, alpha=settings.alpha1) if variant.nesterov else V
        U = self.precondition(rows, G, products)
        moves = _and_finite(moves, U)
        if moves is not None:
            skipped.add_(~moves)
        U = limit_update(U, variant)
        return _scattered(self.units[rows], U), moves

    def descend(self, task: Task, j: int, U: Tensor, moves: Tensor | None) -> None:
        """Move the j-th parameters of a run of rows, and their momentum.

        Args:
            task: What a step does with them.
            j: The position of the parameters in their units.
            U: Their pre-conditioned gradients, ``[rows, *shape]``, of what is
                distributed the shards on this rank; overwritten.
            moves: Which rows move; None: all.
        """
        settings = task.settings
        V = None
        if self.V is not None and not settings.variant.momentum_first:
            V = self.V[j][task.rows]
        descend(
            [local(unit.params[j]) for unit in self.units[task.rows]],
            V,
            U,
            moves=moves,
            lr=task.rate(U.device),
            alpha1=settings.alpha1,
            kappa=settings.kappa,
            variant=settings.variant,
        )

    def _update(
        self,
        rows: slice,
        settings: Settings,
        G: Tensor,
        batch_size: int,
        workspace: Workspace,
    ) -> Tensor | None:
        """Update the factors of a run of rows; return which rows moved (None: all)."""
        if settings.variant.initial_factors == "gradient":
            start_factors(
                self._part(self.K, rows), G, batch_size=batch_size, lam=settings.lam
            )
        update = partial(update_factors, workspace=workspace)
        if self._elementwise:
            update = elementwise.update_factors  # type: ignore[assignment]
        return update(
            self._part(self.K, rows),
            None if self.m is None else self._part(self.m, rows),
            G,
            times=self.units[0].times,
            batch_size=batch_size,
            beta2=settings.beta2,
            alpha2=settings.alpha2,
            lam=settings.lam,
        )

    def _accumulate(self, rows: slice, moves: Tensor | None, alpha1: float) -> None:
        """Add the gradients of a run of rows to their momentum."""
        for j, V_j in enumerate(self.V or []):
            params = [unit.params[j] for unit in self.units[rows]]
            grads = [local_like(p.grad, p) for p in params]  # type: ignore[arg-type]
            accumulate(V_j[rows], stacked(grads), alpha1=alpha1, moves=moves)

    def whole_momenta(self, rows: slice) -> list[Tensor]:
        """Return whole momenta of each of a unit's parameters, ``[rows, *shape]``.

        Nothing if there are none, or they lie on another rank. Ranks communicate if
        parameters are distributed.
        """
        units = self.units[rows]
        return [
            whole_rows([distributed_like(v, p) for v in V_j[rows].unbind(0)], p)
            if is_dtensor(p)
            else V_j[rows]
            for V_j, p in zip(self.V or [], units[0].params, strict=False)
            if len(V_j)
        ]

    def precondition(
        self, rows: slice, G: Tensor, preparation: Preparation | None = None
    ) -> Tensor:
        """Return the pre-conditioned gradients ``[rows, *dims]`` of a run of rows.

        Args:
            rows: The rows.
            G: Their gradients.
            preparation: How the factors are prepared. Default: for this once.
        """
        if preparation is None:
            preparation = self._products.for_once()
        if self._elementwise:
            factors = self._part(self.K, rows)
            return elementwise.precondition(factors, G, forms=preparation.form)  # type: ignore[arg-type]
        return precondition(self._products.get(rows, preparation), G)

    def _part(
        self, matrices: list[StructuredMatrix], rows: slice
    ) -> list[StructuredMatrix]:
        """Return a run of rows of a matrix a axis; of all rows: the matrices."""
        whole = rows.stop - rows.start == len(self.units)
        return matrices if whole else [matrix[rows] for matrix in matrices]


def _and_finite(moves: Tensor | None, X: Tensor) -> Tensor | None:
    """Return a mask less the rows of X that are not finite; None: it holds for all."""
    # one entry that is not finite makes the sum so
    finite = finite_rows(X.flatten(1).sum(1, dtype=accumulation_dtype(X.dtype)))
    return finite if moves is None else moves if finite is None else moves & finite


def _scattered(units: Sequence[Unit], U: Tensor) -> list[Tensor]:
    """Cut ``[rows, *dims]`` back into ``[rows, *shape]`` of each of the parameters."""
    shapes, rule = [p.shape for p in units[0].params], units[0].rule
    if type(rule).ungroup is PerParameter.ungroup:
        return [U.reshape(len(units), *shapes[0])]
    rows = [rule.ungroup(row, shapes) for row in U.unbind(0)]
    return [stacked(list(pieces)) for pieces in zip(*rows, strict=True)]


def stack_units(
    units: Iterable[Unit],
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, State],
    *,
    step: int,
    rank: int | None = None,
    initial_factors: str = "identity",
) -> list[Stack]:
    """Stack units that are alike, with the numbers that the state holds for them.

    Args:
        units: The units.
        groups: Their parameter groups.
        state: The optimizer's state; the rows of the stacks are left there.
        step: The optimizer's global step, for units that have no state yet.
        rank: This rank; it holds the factors of its units and of those without owner.
        initial_factors: Where factors start, for those units.
    """
    alike: dict[Any, list[Unit]] = {}
    for unit in units:
        group = groups[unit.group]
        has_m = group["alpha2"] != 0 or "m0" in _prefixes(state, unit)
        has_V = group["alpha1"] != 0 or "momentum_buffer" in _prefixes(state, unit)
        key = (
            has_m,
            has_V,
            unit.owner,
            id(unit.rule),
            unit.dims,
            unit.structures,
            unit.dtypes,
            *((p.shape, p.dtype, p.device, placement(p)) for p in unit.params),
        )
        alike.setdefault(key, []).append(unit)

    stacks = []
    for (has_m, has_V, owner, *_), members in alike.items():
        device = members[0].params[0].device.type
        limit = _STACK_LIMIT.get(device, _STACK_LIMIT_ELSEWHERE)
        rows = max(limit // max(members[0].working_set, 1), 1)
        for start in range(0, len(members), rows):
            chunk = members[start : start + rows]
            held = owner is None or owner == rank
            stack = Stack(
                chunk,
                has_m=has_m,
                has_V=has_V,
                step=step,
                held=held,
                initial_factors=initial_factors,
            )
            stack.place(state)
            stacks.append(stack)
    return stacks


def _prefixes(state: dict[Tensor, State], unit: Unit) -> set[str]:
    """Return what the state holds for the unit's first parameter, less the fields."""
    return {key.partition(".")[0] for key in state[unit.params[0]]}
