"""What a step costs on many ranks, counted from shapes: `python -m benchmarks.scale`.

The same counts balance the owners of pre-conditioners. Bytes and operations are held
against measured ones by the tests, on 1, 2 and 4 ranks; times are predictions for a
machine that is assumed.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, results
from benchmarks.workloads import Shapes, gpt
from sirfshampoo import recipe
from sirfshampoo._engine.assignment import with_owners, work_of
from sirfshampoo._engine.costs import cost_of, counter_bytes
from sirfshampoo._engine.relay import rounds
from sirfshampoo._engine.stacks import stack_units
from sirfshampoo._engine.units import Unit
from sirfshampoo.summary import _Plan

MODELS: dict[str, Shapes] = {
    "GPT-2 small, 0.16 billion": gpt(12, 768, 50257, 1024),
    "GPT-2 XL, 1.6 billion": gpt(48, 1600, 50257, 1024),
    "32 layers of width 4096, 6.9 billion": gpt(32, 4096, 50257, 2048),
    "86 layers of width 8192, 70 billion": gpt(86, 8192, 50257, 4096),
}
RANKS = (8, 64, 1024)
FACTORS = {
    "dense": {1: "diagonal", 2: "dense"},
    "block-diagonal": {1: "diagonal", 2: "block256diagonal"},
    "the recipe": None,
}
"""Of all but vocabularies, which are diagonal; None: as the recipe chooses them."""
T = 10

MEASURED = "gpt64"
"""The workload that is counted on this machine."""

TOKENS = 8192  # on each rank in a step
RATE = 4e14  # operations a second, in products of bfloat16
MEMORY = 3e12  # bytes a second, of the rank's own memory
NETWORK = 5e10  # bytes a second that reach a rank


@dataclass
class Costs:
    """What falls on one rank."""

    state: int = 0  # bytes that are kept between steps, without copies of K Kᵀ
    kept: int = 0  # bytes of these copies
    step: int = 0  # operations of pre-conditioning, in every step
    update: int = 0  # operations of an update of all factors
    received: int = 0  # bytes from other ranks in a step
    buffers: int = 0  # bytes on their way between owners and all others at once
    work: float = 0.0  # operations of a step on average


def planned(shapes: Shapes, structures: Any) -> _Plan:
    """Plan an optimizer, all in bfloat16; what it does late, of the recipe.

    Args:
        shapes: Those of the parameters.
        structures: A value of `FACTORS`.
    """
    if structures is not None:
        return _Plan(parameter_groups(shapes, structures, torch.bfloat16), batch_size=1)
    own = recipe(nn.Linear(1, 1), batch_size=1) | {"T": T}
    tensors = [
        nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        for shape in shapes.values()
    ]
    return _Plan(tensors, **own | {"batch_size": 1})


def parameter_groups(shapes: Shapes, structures: Any, dtype: torch.dtype) -> list[dict]:
    """Return groups: vocabularies are pre-conditioned by diagonals."""
    tensors = {
        name: nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        for name, shape in shapes.items()
    }
    long = [name for name in shapes if "embedding" in name or "head" in name]
    rest = [tensors[name] for name in shapes if name not in long]
    return [
        {"params": [tensors[name] for name in long], "structures": "diagonal", "T": T},
        {"params": rest, "structures": structures, "T": T},
    ]


def predict(
    units: Sequence[Unit],
    groups: Sequence[dict[str, Any]],
    ranks: int,
    *,
    sharded: bool,
    owned: bool,
    gathered: float = 1,
) -> list[Costs]:
    """Return what falls on each rank.

    Args:
        units: The units, whose parameters are plain tensors.
        groups: Their parameter groups.
        ranks: The number of ranks.
        sharded: Whether parameters are sharded along their first axes (FSDP2), or
            whole on every rank (DDP).
        owned: Whether each pre-conditioner lies on one rank alone.
        gathered: How many tensors of each sharded parameter become whole: the gradient;
            where momenta come first, they, and the gradient in steps that update
            factors, which is 1 + 1 / T on average.
    """
    if owned:
        units = with_owners(units, groups, [], ranks)
    every = [Costs() for _ in range(ranks)]
    for unit in units:
        cost, group = cost_of(unit, groups[unit.group]), groups[unit.group]
        for rank, costs in enumerate(every):
            held = unit.owner in (None, rank)
            costs.state += counter_bytes(unit, held=held)
            for p in unit.params:
                numbers = _shard(p, rank, ranks) if sharded else p.numel() * held
                costs.state += numbers * p.element_size() * bool(group["alpha1"])
            if held:
                costs.state += sum(cost.axis_bytes)
                costs.kept += cost.kept_bytes
                costs.step += cost.step_flops
                costs.update += cost.update_flops
                costs.work += work_of(unit, group)
    for rank, costs in enumerate(every):
        costs.received = sum(
            _received(unit, p, rank, ranks, gathered if sharded else 0)
            for unit in units
            for p in unit.params
        )
    if owned:
        stacks = stack_units(units, groups, defaultdict(dict), step=0)
        of_rounds = [
            [(unit, p) for stack in stacks for unit in stack.units for p in unit.params]
            for stacks in rounds(stacks)
        ]
        for rank, costs in enumerate(every):
            sent = [
                sum(_sent(unit, p, rank, ranks, sharded) for unit, p in of_round)
                for of_round in of_rounds
            ]
            costs.buffers = _at_once(sent, ceil(gathered) if sharded else 0)
    return every


def _sent(unit: Unit, p: Tensor, rank: int, ranks: int, sharded: bool) -> int:
    """Return the bytes of a rank's buffers for a parameter, on its way once."""
    numbers = p.numel() * (ranks > 1)  # whole, on every rank
    if sharded:
        numbers = p.numel() * (unit.owner == rank) + _shard(p, rank, ranks)
    return numbers * p.element_size()


def _at_once(sent: Sequence[int], gathered: int) -> int:
    """Return the bytes that are on their way at once, of what each round sends.

    These are the results of a round and of the one before, and what the next gathers.
    """
    padded = [0, 0, *sent, 0]
    return max(
        before + now + gathered * after
        for before, now, after in zip(padded, padded[1:], padded[2:], strict=False)
    )


def _shard(p: Tensor, rank: int, ranks: int) -> int:
    """Return how many numbers of a parameter lie on a rank."""
    rows = p.shape[0]
    chunk = -(-rows // ranks)
    return max(min(chunk, rows - rank * chunk), 0) * (p.numel() // rows)


def _received(unit: Unit, p: Tensor, rank: int, ranks: int, gathered: float) -> int:
    """Return the bytes that reach a rank for a parameter."""
    if not gathered:  # as it has become, from its owner
        numbers = p.numel() * (unit.owner not in (None, rank))
    elif unit.owner is None:  # gathered, with shards of the size of the first
        numbers = gathered * (ranks - 1) * _shard(p, 0, ranks)
    else:  # gradients to the owner, updates from it
        own = _shard(p, rank, ranks)
        numbers = gathered * (p.numel() - own) if unit.owner == rank else own
    return round(numbers * p.element_size())


# --- the table ------------------------------------------------------------------------
def records() -> Iterator[dict[str, Any]]:
    """Yield what is predicted for each model, number of ranks and kind of factors."""
    for model, shapes in MODELS.items():
        numbers = sum(map(prod, shapes.values()))
        training = 6 * numbers * TOKENS / RATE
        for name, structures in FACTORS.items():
            plan = planned(shapes, structures)
            first = plan._engine.variant.momentum_first
            for ranks in RANKS:
                for owned in (False, True):
                    costs = predict(
                        plan._engine.units,
                        plan.param_groups,
                        ranks,
                        sharded=True,
                        owned=owned,
                        gathered=1 + 1 / T if first else 1,
                    )
                    state = max(c.state + c.kept for c in costs)
                    work = max(c.work for c in costs)
                    received = max(c.received for c in costs)
                    # moved: what is kept is read and written, more or less
                    seconds = work / RATE + 2 * state / MEMORY + received / NETWORK
                    yield {
                        "model": model,
                        "ranks": ranks,
                        "factors": name,
                        "owned": owned,
                        "bytes": state,
                        "flops": round(work),
                        "balance": round(work * ranks / sum(c.work for c in costs), 3),
                        "received": received,
                        "seconds": round(seconds, 6),
                        "share": round(seconds / (seconds + training), 4),
                    }


def measured() -> Iterator[dict[str, Any]]:
    """Yield what is counted on ranks of this machine, beside what is predicted."""
    from tests.distributed import distributed_cases
    from tests.distributed.ranks import Ranks

    for world in (1, 2, 4):
        ranks = Ranks(world)
        for way in ("ddp", "fsdp"):
            for owned in (False, True):
                case = {"way": way, "owned": owned, "workload": MEASURED}
                found = ranks.run(distributed_cases.costs, **case)
                most = {
                    key: [max(rank[key][i] for rank in found) for i in range(2)]
                    for key in found[0]
                }
                yield {"ranks": world, "way": way, "owned": owned, **most}
        ranks.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__
    )
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    assumed = {"T": T, "tokens": TOKENS, "rate": RATE}
    assumed |= {"memory": MEMORY, "network": NETWORK}
    result = {
        "environment": environment.describe(1),
        "workload": MEASURED,
        "measured": list(measured()),
        "assumed": assumed,
        "predicted": list(records()),
    }
    results.save(result, args.results / "scale.json")
    print("Saved scale.json; now `python -m benchmarks.report`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
