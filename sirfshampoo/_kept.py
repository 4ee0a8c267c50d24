"""K Kᵀ of factors that stay for several steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Size

from sirfshampoo._costs import squaring_pays
from sirfshampoo._update import Preconditioner
from sirfshampoo.structures import StructuredMatrix


class KeptProducts:
    """Brings the factors of a stack into the form that multiplies gradients.

    Where the factors stay for several steps, that form is kept, and made anew for the
    rows whose factors have changed.
    """

    def __init__(self, K: Sequence[StructuredMatrix], dims: Size) -> None:
        """Keep nothing at first.

        Args:
            K: The factor of each axis, ``[rows, d_n, d_n]``; written in place later.
            dims: The shape of a gradient, ``[d_1, …, d_N]``.
        """
        self._K, self._dims = K, dims
        self._rows = K[0].batch_shape.numel()
        self._kept: list[Preconditioner] | None = None
        self._outdated: set[int] = set()
        self._version = -1  # of the factors when that was last noted

    def _present_version(self) -> int:
        """Return a number that changes with the numbers in the factors."""
        return sum(t._version for K_n in self._K for t in K_n.tensors())

    def look_for_writes(self) -> None:
        """Take all rows as changed if someone else has written into the factors."""
        if self._version != self._present_version():
            self.mark(slice(0, self._rows))

    def mark(self, rows: slice) -> None:
        """Take the factors of these rows as changed."""
        self._outdated.update(range(rows.start, rows.stop))
        self._version = self._present_version()

    def get(self, rows: slice, interval: int) -> list[Preconditioner]:
        """Return the form for a run of rows.

        Args:
            rows: The rows.
            interval: For how many steps the factors are expected to stay.
        """
        if interval == 1:
            return self._prepare(rows, self._squared(1))
        changed = self._outdated & set(range(rows.start, rows.stop))
        if self._kept is None or (rows.stop - rows.start == self._rows and changed):
            self._kept = None  # its memory is free before the next is made
            everything = slice(0, self._rows)
            self._kept = self._prepare(everything, self._squared(interval))
            self._outdated.clear()
        elif changed:
            fresh = self._prepare(rows, [kept.squared for kept in self._kept])
            for kept, new in zip(self._kept, fresh, strict=True):
                kept[rows].copy_(new)
            self._outdated -= changed
        return [kept[rows] for kept in self._kept]

    def _squared(self, interval: int) -> list[bool]:
        """Return, a axis, whether K Kᵀ costs less than what it saves."""
        size = self._dims.numel()
        return [
            squaring_pays(type(K_n), K_n.dim, size // max(K_n.dim, 1), interval)
            for K_n in self._K
        ]

    def _prepare(self, rows: slice, squared: Sequence[bool]) -> list[Preconditioner]:
        whole = rows.stop - rows.start == self._rows
        return [
            Preconditioner.prepare(K_n if whole else K_n[rows], squared=pays)
            for K_n, pays in zip(self._K, squared, strict=True)
        ]
