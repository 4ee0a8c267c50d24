"""Owners: each pre-conditioner lies on one rank, in training and in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sirfshampoo._distributed import Exchange, is_dtensor, local, refuse_trainer
from sirfshampoo._engine.assignment import with_owners
from sirfshampoo._engine.entries import OF_GRADIENTS, OF_UPDATES, is_own
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
        self._is_called = False

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
        names: Mapping[int, str],
    ) -> list[Unit]:
        """Return units with owners.

        Args:
            units: The units.
            groups: The parameter groups of all units.
            present: Units that have owners already.
            names: The names of parameters, by their identities.
        """
        params = [p for unit in units for p in unit.params]
        self.exchange.check((names[id(p)], p) for p in params)
        return with_owners(units, groups, present, self.exchange.size)

    def check_caller(self, units: Iterable[Unit]) -> None:
        """Check, in the first step, that who calls it will save with all ranks."""
        if self._is_called or any(is_dtensor(p) for unit in units for p in unit.params):
            return
        self._is_called = True
        refuse_trainer()

    # ------------------------------------------------------------------- checkpoints

    def spread(self, stacks: Iterable[Stack]) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Yield parameter, key and tensor of a state of which one rank each holds all.

        For whole parameters it comes whole to every rank, so that a file of any one of
        them has all; for sharded ones, sharded over the ranks. So checkpoints know
        nothing of owners. All ranks must call it.
        """
        for stack in stacks:  # one at a time: that bounds what is in flight
            owned = [
                (p, key, tensor, held)
                for p, key, tensor, held in stack.entries()
                if not (held and (key == "step" or is_dtensor(tensor)))
            ]
            is_sharded = any(is_dtensor(p) for p in stack.units[0].params)
            give = self.exchange.shared if is_sharded else self.exchange.copied
            given = give([(stack.owner, tensor, held) for _, _, tensor, held in owned])
            for (p, key, _, _), tensor in zip(owned, given, strict=True):
                yield p, key, tensor

    def collect(
        self, units: Sequence[Unit], saved: Mapping[Tensor, Mapping[str, Tensor]]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """Return what this rank holds of the saved tensors of units.

        What is sharded comes to its owner alone, by one collective for all. All ranks
        must call it, for the same units in the same order.
        """
        mine: dict[Tensor, dict[str, Tensor]] = {}
        sent: list[tuple[int, Tensor, Tensor]] = []
        coming: list[tuple[Tensor, str]] = []
        for unit in units:
            held = unit.owner == self.rank
            for p in unit.params:
                mine[p] = {}
                for key, tensor in sorted(saved.get(p, {}).items()):
                    is_momentum = key in (OF_UPDATES, OF_GRADIENTS)
                    if (is_momentum and is_dtensor(p)) or not is_own(key):
                        mine[p][key] = tensor
                    elif is_dtensor(tensor):
                        shards = local(tensor).to(p.device).unsqueeze(0)
                        sent.append((unit.owner or 0, tensor, shards))
                        coming += [(p, key)] * held
                    elif held or key == "step":
                        mine[p][key] = tensor
        arrived = self.exchange.to_owners(sent, "the state")()
        for (p, key), tensor in zip(coming, arrived, strict=True):
            mine[p][key] = tensor.squeeze(0)
        return mine
