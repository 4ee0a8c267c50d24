"""Owners: each pre-conditioner lies on one rank, in training and in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sirfshampoo._distributed import Exchange, is_dtensor, whole
from sirfshampoo._engine.assignment import with_owners
from sirfshampoo._engine.momenta import OF_GRADIENTS, OF_UPDATES
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.units import Unit


class Owners:
    """Shares the pre-conditioners of an optimizer among ranks.

    Attributes:
        exchange: Moves tensors between them.
    """

    def __init__(self, group: Any) -> None:
        """Own among the ranks of a process group, or of a mesh of one dimension."""
        self.exchange = Exchange(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Owners:
        """Return this: a copy of an optimizer is on the same ranks."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled: another process is not one of these ranks."""
        raise TypeError(
            "An optimizer that shares pre-conditioners among ranks cannot be pickled: "
            "save its state_dict(), which all ranks must call, or build it with "
            "shard_preconditioners=False."
        )

    @property
    def rank(self) -> int:
        """This rank."""
        return self.exchange.rank

    def assign(
        self,
        units: Sequence[Unit],
        groups: Sequence[Mapping[str, Any]],
        present: Sequence[Unit],
    ) -> list[Unit]:
        """Return units with owners.

        Args:
            units: The units.
            groups: The parameter groups of all units.
            present: Units that have owners already.
        """
        for unit in units:
            self.exchange.check(unit.params)
        return with_owners(units, groups, present, self.exchange.size)

    # ------------------------------------------------------------------- checkpoints

    def spread(self, stacks: Iterable[Stack]) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Yield parameter, key and tensor of a state that all ranks hold a share of.

        What one rank holds becomes a tensor that is sharded over all of them, so that
        checkpoints know nothing of owners. All ranks must call it.
        """
        owned = [
            (stack.owner, entry)
            for stack in stacks
            for entry in stack.entries()
            if not (entry[3] and (entry[1] == "step" or is_dtensor(entry[2])))
        ]
        matrices = [(o, e) for o, e in owned if e[1] != "skipped"]
        shards = self.exchange.shared(
            [(owner, tensor, held) for owner, (_, _, tensor, held) in matrices]
        )
        for (_, (p, key, _, _)), shard in zip(matrices, shards, strict=True):
            yield p, key, shard
        counters = [e for _, e in owned if e[1] == "skipped"]
        counts = self.exchange.summed(
            [int(t) if held else 0 for _, _, t, held in counters]
        )
        for (p, key, tensor, _), count in zip(counters, counts, strict=True):
            yield p, key, torch.tensor(count, dtype=tensor.dtype, device=tensor.device)

    def collect(
        self, unit: Unit, saved: Mapping[Tensor, Mapping[str, Tensor]]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """Return what this rank holds of the saved tensors of a unit.

        All ranks must call it, for the same units in the same order.
        """
        mine: dict[Tensor, dict[str, Tensor]] = {}
        for p in unit.params:
            if p not in saved:
                continue
            mine[p] = {}
            for key in sorted(saved[p]):
                tensor = saved[p][key]
                if key in (OF_UPDATES, OF_GRADIENTS) and is_dtensor(p):
                    mine[p][key] = tensor
                    continue
                tensor = whole(tensor)
                if key == "step" or unit.owner == self.rank:
                    mine[p][key] = tensor
        return mine
