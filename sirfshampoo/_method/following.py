"""Steps that shrink with the gradient, beside what it has been so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sirfshampoo._method.descent import add_each_

#: Steps go on at so much of their size: an exact solution, whose gradients vanish too,
#: would not be reached otherwise.
_SHORTEST = 0.1


@dataclass(frozen=True, eq=False)  # hashed by older compilers, half-built
class Past:
    """What the norms of rows have been so far.

    Attributes:
        mean: Their mean, ``[rows]``.
        count: How many there were, ``[rows]``.
    """

    mean: Tensor
    count: Tensor

    @classmethod
    def none(cls, rows: int, **kind: Any) -> Self:
        """Return that there were none."""
        return cls(torch.zeros(rows, **kind), torch.zeros(rows, **kind))

    def __getitem__(self, rows: slice) -> Self:
        """Return a view of a run of rows."""
        return type(self)(self.mean[rows], self.count[rows])


def take_in(
    pasts: Sequence[Past], norms: Tensor, moves: Sequence[Tensor | None]
) -> Tensor:
    """Take norms into their means, in place; return what `shrinking` says of them.

    Args:
        pasts: The means, of some rows each.
        norms: The norms of all rows, one after the other.
        moves: A mask ``[rows]`` of each; where it is False, nothing is taken in. None:
            all rows are.
    """
    means, counts = [past.mean for past in pasts], [past.count for past in pasts]
    mean, count = torch.cat(means), torch.cat(counts)
    taken = torch.ones_like(count)
    if any(mask is not None for mask in moves):
        pairs = zip(counts, moves, strict=True)
        taken = torch.cat(
            [
                torch.ones_like(c) if mask is None else mask.to(c.dtype)
                for c, mask in pairs
            ]
        )
    change = ((norms - mean) / (count + taken)).masked_fill_(taken == 0, 0.0)
    rows = [len(part) for part in means]
    add_each_([*means, *counts], [*change.split(rows), *taken.split(rows)])
    return shrinking(mean + change, norms)


def shrinking(mean: Tensor, norms: Tensor) -> Tensor:
    """Return norm / mean, ``[rows]``, at least 0.1 and at most 1; 1 for 0 / 0."""
    # which is what tiny numbers are: their squares leave float32's range
    return (norms / mean).nan_to_num_(nan=1.0).clamp_(_SHORTEST, 1.0)
