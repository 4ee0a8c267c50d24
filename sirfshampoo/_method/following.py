"""Steps that shrink with the gradient, beside what it has been so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


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
    if all(mask is None for mask in moves):
        count += 1
        mean += (norms - mean) / count
    else:
        masks = [
            torch.ones_like(part, dtype=torch.bool) if mask is None else mask
            for part, mask in zip(counts, moves, strict=True)
        ]
        taken = torch.cat(masks)
        count += taken
        change = (norms - mean) / count
        mean += change.masked_fill_(~taken, 0.0)
    rows = [len(part) for part in means]
    torch._foreach_copy_(means + counts, [*mean.split(rows), *count.split(rows)])
    return shrinking(mean, norms)


def shrinking(mean: Tensor, norms: Tensor) -> Tensor:
    """Return min(1, norm / mean), ``[rows]``; 1 where all norms so far are 0."""
    # a square may have left float32's range
    return (norms / mean).nan_to_num_(nan=1.0).clamp_(max=1.0)
