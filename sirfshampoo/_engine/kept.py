"""K Kᵀ of factors that stay for several steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from sirfshampoo._engine.costs import squaring_pays
from sirfshampoo._engine.units import Unit
from sirfshampoo._method.preconditioner import Form, Preconditioner
from sirfshampoo.structures import StructuredMatrix

Matrix = TypeVar("Matrix", StructuredMatrix, Preconditioner)


class Preparation(NamedTuple):
    """How the factors of a run of rows are brought into the form for gradients."""

    form: list[Form]  # of each axis
    fresh: tuple[slice, ...] | None  # the rows to be made anew; None: nothing is kept


class KeptProducts:
    """Brings the factors of a stack into the form that multiplies gradients.

    Where the factors stay for several steps, that form is kept, and made anew for the
    rows whose factors have changed. It stays at its place in memory, where a captured
    CUDA graph looks for it.
    """

    def __init__(self, K: Sequence[StructuredMatrix], unit: Unit) -> None:
        """Keep nothing at first.

        Args:
            K: The factor of each axis, ``[rows, d_n, d_n]``; written in place later.
            unit: A unit of those that the rows stand for; they are alike.
        """
        self._K, self._unit = K, unit
        self._rows = K[0].batch_shape.numel()
        self._kept: list[Preconditioner] | None = None
        self._outdated: set[int] = set()
        self._version = -1  # of the factors when that was last noted
        self._fields = [t for K_n in K for t in K_n.tensors()]
        self._forms_of: dict[int, list[Form]] = {}

    def _present_version(self) -> int:
        """Return a number that changes with the numbers in the factors."""
        return sum([t._version for t in self._fields])

    def look_for_writes(self) -> None:
        """Take all rows as changed if someone else has written into the factors.

        So it is after a step that failed, too: call `note_writes` after each.
        """
        if self._version != self._present_version():
            self._outdated.update(range(self._rows))
        self._version = -1

    def note_writes(self) -> None:
        """Take what has been written into the factors as known."""
        self._version = self._present_version()

    def for_once(self) -> Preparation:
        """Return how rows are to be prepared where nothing is kept."""
        return Preparation(self._forms(1), None)

    def plan(self, rows: slice, interval: int, *, due: bool) -> Preparation:
        """Return how a run of rows is to be prepared in this step.

        Here all is decided; `get` only computes.

        Args:
            rows: The rows.
            interval: For how many steps the factors are expected to stay.
            due: Whether their factors are about to change.
        """
        numbers = set(range(rows.start, rows.stop))
        if due:
            self._outdated |= numbers
        if interval == 1:
            return self.for_once()
        form = self._forms(interval)
        if self._kept is None or (
            # T has changed
            len(self._outdated) == self._rows
            and form != [kept.form for kept in self._kept]
        ):
            self._kept = None  # its memory is free before the next is taken
            self._kept = [
                Preconditioner.allocate(K_n, form_n)
                for K_n, form_n in zip(self._K, form, strict=True)
            ]
            self._outdated.update(range(self._rows))
        fresh = tuple(_runs(self._outdated & numbers))
        self._outdated -= numbers
        return Preparation(form, fresh)

    def get(self, rows: slice, preparation: Preparation) -> list[Preconditioner]:
        """Return the form for a run of rows, prepared as planned."""
        if preparation.fresh is None or self._kept is None:
            return self._prepare(rows, preparation.form)
        for run in preparation.fresh:
            for K_n, kept in zip(self._K, self._kept, strict=True):
                if kept.is_copy:  # axis by axis: little memory is needed beside it
                    fresh = Preconditioner.prepare(K_n[run], kept.form)
                    kept[run].copy_(fresh)
        return [self._part(kept, rows) for kept in self._kept]

    def _forms(self, interval: int) -> list[Form]:
        """Return the form of each axis; K Kᵀ is formed where that pays."""
        if interval not in self._forms_of:
            self._forms_of[interval] = self._forms_for(interval)
        return self._forms_of[interval]

    def _forms_for(self, interval: int) -> list[Form]:
        size, unit = self._unit.dims.numel(), self._unit
        return [
            Form(
                times,
                times == 2
                and squaring_pays(
                    type(K_n), K_n.dtype, K_n.dim, size // max(K_n.dim, 1), interval
                ),
                power,
            )
            for K_n, times, power in zip(self._K, unit.times, unit.powers, strict=True)
        ]

    def _prepare(self, rows: slice, forms: Sequence[Form]) -> list[Preconditioner]:
        return [
            Preconditioner.prepare(self._part(K_n, rows), form)
            for K_n, form in zip(self._K, forms, strict=True)
        ]

    def _part(self, matrix: Matrix, rows: slice) -> Matrix:
        """Return a run of rows; of all rows: the matrix as it is."""
        return matrix if rows.stop - rows.start == self._rows else matrix[rows]


def _runs(numbers: set[int]) -> Iterator[slice]:
    """Yield the runs of neighbouring numbers."""
    for start in sorted(numbers - {i + 1 for i in numbers}):
        stop = start
        while stop in numbers:
            stop += 1
        yield slice(start, stop)
