"""Units of equal shape, structure, dtype and device as the rows of stacked tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor

from sirfshampoo._distributed import distributed_like, fill, placement
from sirfshampoo._engine.entries import OF_UPDATES
from sirfshampoo._engine.kept import KeptProducts
from sirfshampoo._engine.momenta import zero_momenta
from sirfshampoo._engine.units import Unit
from sirfshampoo._method import device
from sirfshampoo._method.following import Past
from sirfshampoo.structures import StructuredMatrix, structure_class
from sirfshampoo.structures.base import accumulation_dtype
from sirfshampoo.structures.diagonal import DiagonalMatrix

State = dict[str, Tensor]
Rows = TypeVar("Rows", Tensor, StructuredMatrix)

#: How many numbers a stack of several units may work on. Many small products are faster
#: as one batched product; large ones gain nothing on a CPU, but lose the copy of their
#: gradients into the stack, a working set that fits the caches, and, from 4 MiB a
#: temporary on, more time to page faults than to arithmetic.
_STACK_LIMIT = {"cpu": 1 << 19}
_STACK_LIMIT_ELSEWHERE = 1 << 27


class Stack:
    """Units that are treated by the same batched operations.

    The rows of its tensors stand in the optimizer's state; `is_current` tells whether
    someone has put others in their place.

    Attributes:
        units: The units, one a row.
        held: Whether the factors lie on this rank.
        momentum: What the state calls V.
        K: The Kronecker factor of each axis, ``[rows, d_n, d_n]``.
        m: Their Riemannian momenta; None if there are none.
        V: The momentum of each of a unit's parameters, ``[rows, *shape]``, of what is
            distributed the shard on this rank; None if there is none.
        step: The number of steps taken, ``[rows]``, on the CPU.
        skipped: The number of steps sat out for a non-finite gradient, ``[rows]``.
        past: How large what is pre-conditioned has been; None if nobody asks.
        starting: The rows whose factors are 0, and start when a finite gradient comes.
        elementwise: Whether all factors are diagonal.
        products: The factors in the form that multiplies gradients.
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
        momentum: str = OF_UPDATES,
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
            momentum: What the state calls the momenta of parameters.
        """
        self.units, self.held, self.momentum = units, held, momentum
        first = units[0]
        batch = (len(units) if held else 0,)
        place = first.params[0].device
        axes = list(zip(first.structures, first.dims, first.dtypes, strict=True))
        self.K = [
            structure_class(name).zeros(d, batch=batch, dtype=dtype, device=place)
            for name, d, dtype in axes
        ]
        self.starting: set[int] = set()
        if initial_factors == "identity":
            for K_n in self.K:
                K_n.shift_(1.0)
        else:
            self.starting.update(range(len(units)))
        self.m = None
        if has_m:
            self.m = [
                structure_class(name).zeros(d, batch=batch, dtype=dtype, device=place)
                for name, d, dtype in axes
            ]
        self.V = None
        if has_V:
            self.V = zero_momenta(units, held=held)
        self.step = torch.full((len(units),), step, dtype=torch.int64, device="cpu")
        self.skipped = torch.zeros(batch, dtype=torch.int64, device=place)
        self.past: Past | None = None
        if first.variant.follow_gradient:
            dtype = accumulation_dtype(first.params[0].dtype)
            self.past = Past.none(*batch, dtype=dtype, device=place)

        self._kinds = [(p.device, p.dtype) for p in first.params]
        self.elementwise = all(isinstance(K_n, DiagonalMatrix) for K_n in self.K)
        self._placed: list[tuple[Tensor, State]] = []
        self.products = KeptProducts(self.K, first)

    @property
    def _are_shared(self) -> bool:
        """Whether the factors lie on one of several ranks."""
        return self.units[0].owner is not None

    @property
    def owner(self) -> int:
        """The rank that owns the factors, where ranks share them."""
        return self.units[0].owner or 0

    @property
    def may_start(self) -> bool:
        """Whether factors of some rows may be 0 yet, as far as is known here."""
        is_told = device.is_at_hand(self.skipped) and not self._are_shared
        return not is_told or bool(self.starting)  # so, compiled steps are all alike

    @property
    def lacks_momenta(self) -> bool:
        """Whether factors or parameters have no momenta, for which a group may ask."""
        return self.m is None or self.V is None

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
        if self.past is not None:
            entries.append((0, "norm_mean", self.past.mean))
            entries.append((0, "norm_count", self.past.count))
        entries += [(0, key, tensor) for key, tensor in fields.items()]
        entries += [(j, self.momentum, V_j) for j, V_j in enumerate(self.V or [])]
        for position, key, tensor in entries:
            held = len(tensor) == len(self.units)
            for row, unit in enumerate(self.units):
                view = tensor[row] if held else tensor
                if key == self.momentum:
                    view = distributed_like(view, unit.params[position])
                yield row, position, key, view, held

    def place(self, state: dict[Tensor, State]) -> None:
        """Take over the numbers in the optimizer's state and leave the rows there."""
        placed: dict[Tensor, State] = {}
        if self._are_shared and any("K0" in _prefixes(state, u) for u in self.units):
            self.starting.clear()  # what has started is known to the owner alone
        for row, position, key, view, held in self._rows():
            p = self.units[row].params[position]
            # put in anew, keys stand in the same order on every rank, as it is saved
            known = state[p].pop(key, None)
            # without numbers there is nothing to take over
            if held and known is not None and not known.is_meta:
                fill(view, known)
            state[p][key] = view
            placed.setdefault(p, {})[key] = view
        self._placed = list(placed.items())
        if self.starting and not self._are_shared and not self.skipped.is_meta:
            self._look_for_started()

    def note_start(self, rows: slice) -> None:
        """Take note that rows had a gradient to start from, if it was finite.

        Whether it was can be seen on a CPU; elsewhere the host would have to wait, and
        of owners, the others could not tell alike: there it counts as a start.
        """
        if self._are_shared or not device.is_at_hand(self.skipped):
            self.starting -= set(range(rows.start, rows.stop))
        elif self.starting:
            self._look_for_started()

    def _look_for_started(self) -> None:
        """Find the rows whose factors have started."""
        has_started = (self.K[0].max_abs() != 0).tolist()
        self.starting -= {row for row, has in enumerate(has_started) if has}

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
        return all([_holds(state.get(p), placed) for p, placed in self._placed])

    def part(self, stacked: list[Rows], rows: slice) -> list[Rows]:
        """Return a run of rows of what has a row a unit; of all rows: as it is."""
        whole = rows.stop - rows.start == len(self.units)
        return stacked if whole else [each[rows] for each in stacked]


def stack_units(
    units: Iterable[Unit],
    groups: Sequence[Mapping[str, Any]],
    state: dict[Tensor, State],
    *,
    step: int,
    rank: int | None = None,
    initial_factors: str = "identity",
    momentum: str = OF_UPDATES,
) -> list[Stack]:
    """Stack units that are alike, with the numbers that the state holds for them.

    Args:
        units: The units.
        groups: Their parameter groups.
        state: The optimizer's state; the rows of the stacks are left there.
        step: The optimizer's global step, for units that have no state yet.
        rank: This rank; it holds the factors of its units and of those without owner.
        initial_factors: Where factors start, for those units.
        momentum: What the state calls the momenta of parameters.
    """
    alike: dict[Any, list[Unit]] = {}
    for unit in units:
        group = groups[unit.group]
        has_m = group["alpha2"] != 0 or "m0" in _prefixes(state, unit)
        has_V = group["alpha1"] != 0 or momentum in _prefixes(state, unit)
        key = (
            has_m,
            has_V,
            unit.owner,
            unit.embeds,
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
                momentum=momentum,
            )
            stack.place(state)
            stacks.append(stack)
    return stacks


def _holds(entries: State | None, placed: State) -> bool:
    """Return whether entries of the state are the tensors that were placed there."""
    if entries is None:
        return False
    return all(map(is_, map(entries.get, placed), placed.values()))


def _prefixes(state: dict[Tensor, State], unit: Unit) -> set[str]:
    """Return what the state holds for the unit's first parameter, less the fields."""
    return {key.partition(".")[0] for key in state[unit.params[0]]}
