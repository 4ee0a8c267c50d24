"""Which gradients a count of examples belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from sirfshampoo._distributed import local


def gradients_of(params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return what lies in ``.grad``; of shards, what is here."""
    # what is added to a shard does not show in the version of the whole
    return [None if p.grad is None else local(p.grad) for p in params]


class Mark:
    """Gradients as they were at a time, told from others and from later changes.

    It keeps none of them alive. A copy is a mark of nothing.
    """

    def __init__(self, gradients: Sequence[Tensor | None] = ()) -> None:
        """Mark gradients."""
        self._refs = [None if g is None else TensorWeakRef(g) for g in gradients]
        self._versions = [None if g is None else g._version for g in gradients]

    def __reduce__(self) -> tuple[type[Mark], tuple[()]]:
        """Return how to make a copy."""
        return type(self), ()

    def lives(self) -> bool:
        """Return whether someone holds one of the gradients."""
        return any(ref is not None and ref() is not None for ref in self._refs)

    def are(self, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether gradients are the same tensors, whatever was added to them."""
        if len(gradients) != len(self._refs):
            return False
        return all(
            now is None if ref is None else now is not None and now is ref()
            for ref, now in zip(self._refs, gradients, strict=True)
        )

    def holds(self, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether gradients are the same tensors, and nobody changed them."""
        versions = [None if g is None else g._version for g in gradients]
        return self.are(gradients) and versions == self._versions


def are_zero(gradients: Sequence[Tensor | None]) -> bool:
    """Return whether all entries are 0, which the host waits for.

    Where that cannot be told, they are not.
    """
    present = [g for g in gradients if g is not None]
    if any(g.is_meta or g.layout is not torch.strided for g in present):
        return False
    return not any(bool(g.any()) for g in present)  # mostly the first tells
