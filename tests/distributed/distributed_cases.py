"""What the distributed tests run on every rank: each compares with one process."""

import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from benchmarks import scale
from benchmarks.workloads import WORKLOADS, gpt
from sirfshampoo import (
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
)
from sirfshampoo._distributed import groups as our_groups
from sirfshampoo._engine.assignment import with_owners, work_of
from sirfshampoo._engine.costs import cost_of
from tests.cases import FAST, STRUCTURES, Tensors, mixture
from tests.distributed.as_nccl import AsNccl

STEPS = 10
ROWS = 11
"""Examples of a batch; no number of ranks divides it."""

JOIN = (LinearWeightBias(), FlattenEmbedding(), PerParameter())
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"structures": name} for name in STRUCTURES},
    "T=3": {"T": 3, "structures": mixture(2), "kappa": 0.01},
    "joined": {"combine_params": JOIN, "structures": {1: "diagonal", 2: "dense"}},
    "joined, T=2": {"combine_params": JOIN, "T": 2, "structures": mixture(3)},
    "no momenta": {"alpha1": 0.0, "alpha2": 0.0, "kappa": 0.1},
    "float32 factors": {"preconditioner_dtypes": torch.float32},
    "momentum first": {
        "combine_params": JOIN,
        "initial_factors": "gradient",
        "momentum_first": True,
        "nesterov": True,
        "normalize_update": True,
        "follow_gradient": True,
        "max_relative_update": 0.01,
        "clamp": "spectral",
        "relative_damping": True,
        "structures": {1: "diagonal", 2: "dense"},
    },
    "started by the first gradient": {
        "initial_factors": "gradient",
        "T": lambda step: step % 3 == 2,
        "structures": {1: "diagonal", 2: "dense"},
    },
    "exponent": {
        "combine_params": JOIN,
        "exponent": 0.75,
        "nesterov": True,
        "kappa": 0.1,
        "cautious_decay": True,
        "follow_gradient": True,
        "T": 2,
        "structures": {1: "diagonal", 2: "dense"},
    },
}
"""What is said to the optimizer beside `FAST`."""


class Words(nn.Module):
    """Layers of odd sizes, equal ones among them, on top of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.first = nn.Linear(15, 7)
        self.equal = nn.Sequential(*(nn.Linear(7, 7) for _ in range(3)))
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 3)

    def forward(self, words: Tensor) -> Tensor:
        """Read sequences of three words."""
        x = self.first(self.embed(words).flatten(1))
        for layer in self.equal:
            x = x + layer(x).tanh()
        return self.last(self.norm(x))


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and targets of the first steps, of all ranks."""
    draw = torch.Generator().manual_seed(7)
    words = torch.randint(9, (STEPS, ROWS, 3), generator=draw)
    targets = torch.randn(STEPS, ROWS, 3, generator=draw, dtype=torch.float64)
    return list(zip(words, 1 + targets, strict=True))[:steps]


def share(tensor: Tensor, parts: int = 1, part: int = 0) -> Tensor:
    """Return this rank's rows of a batch: the first rank has the most."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cuts = [ROWS - ROWS * (world - r) ** 2 // world**2 for r in range(world + 1)]
    return tensor[cuts[rank] : cuts[rank + 1]].chunk(parts)[part]


def mean_loss(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    """Return a sum over the rows given that is their part in the mean of all."""
    dtype = next(model.parameters()).dtype
    return weight * (model(x) - y.to(dtype)).square().sum() / (ROWS * 3)


def alone(
    model: nn.Module, make: Callable[..., SIRFShampoo], steps: int = STEPS
) -> SIRFShampoo:
    """Train in this process by itself, on whole batches."""
    optimizer = make(model, process_group=False)
    for x, y in batches(steps):
        optimizer.zero_grad()
        mean_loss(model, x, y).backward()
        optimizer.step()
    return optimizer


def together(
    model: nn.Module,
    optimizer: SIRFShampoo,
    steps: int = STEPS,
    start: int = 0,
    before_step: Callable[[], Any] = lambda: None,
) -> None:
    """Train on this rank's share of the same batches."""
    world, checker = dist.get_world_size(), AsNccl()
    for x, y in batches(steps)[start:]:
        optimizer.zero_grad()
        # gradients are averaged over the ranks
        mean_loss(model, share(x), share(y), world).backward()
        before_step()
        with checker:
            optimizer.step()
        assert optimizer.batch_size == ROWS
    checker.compare()


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor, whether it is distributed or not."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal_parameters(
    model: nn.Module, expected: nn.Module, factors: torch.dtype | None = None
) -> None:
    """Compare parameters, and make sure that they have moved and that ranks agree.

    Up to rounding, which depends on which factors learn together: that of `factors` in
    place of the parameters', where their type is another.
    """
    dtype = factors or next(expected.parameters()).dtype
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    start = dict(make_model(next(expected.parameters()).dtype).named_parameters())
    for name, p in expected.named_parameters():
        prefix = "module." if isinstance(model, DistributedDataParallel) else ""
        found = whole(model.get_parameter(prefix + name))
        error = (found - p).abs().max().item()
        assert error <= tolerance * max(1.0, p.abs().max().item()), (name, error)
        assert (p - start[name]).abs().max() > 1e-3, f"{name} has not moved."
        of_first = found.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(found, of_first), f"{name} differs between ranks."


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build the model that every rank starts from."""
    torch.manual_seed(1)
    return Words().to(dtype)


def maker(options: str) -> Callable[..., SIRFShampoo]:
    """Return how the optimizer is built."""
    return partial(SIRFShampoo, **{**FAST, **OPTIONS[options]})


# --- DistributedDataParallel ----------------------------------------------------------
def ddp(options: str, dtype: torch.dtype = torch.float64, owned: bool = False) -> None:
    """Unequal shares of a batch, averaged by DDP."""
    model, make = make_model(dtype), maker(options)
    expected = deepcopy(model)
    twin = alone(expected, make)
    wrapped = DistributedDataParallel(model)
    optimizer = make(wrapped, shard_preconditioners=owned)
    together(wrapped, optimizer)
    factors = OPTIONS[options].get("preconditioner_dtypes")
    assert_equal_parameters(wrapped, expected, factors)
    assert_shared(optimizer, twin, owned)


def assert_shared(optimizer: SIRFShampoo, twin: SIRFShampoo, owned: bool) -> None:
    """Compare factors, each of which one rank holds, or all of them."""
    pairs = list(zip(optimizer.preconditioner, twin.preconditioner, strict=True))
    held = torch.tensor([len(factors) == len(twins) for factors, twins in pairs])
    for factors, twins in pairs:
        for K, expected in zip(factors, twins, strict=bool(factors)):
            error = (K.to_dense() - expected.to_dense()).abs().max().item()
            assert error <= 1e-9 if K.dtype == torch.float64 else 1e-5
    number = held.long()
    dist.all_reduce(number)
    assert (number == (1 if owned else dist.get_world_size())).all()
    if owned:
        assert 0 < held.sum() < len(held)


def two_trainings() -> None:
    """Two pairs of ranks, each with a training of its own: True means the pair."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    draw = torch.Generator().manual_seed(rank // 2)
    words = torch.randint(9, (STEPS, 6, 3), generator=draw)
    model, make = make_model(), maker("joined, T=2")
    expected = deepcopy(model)
    twin = make(expected, process_group=False)
    model = DistributedDataParallel(model, process_group=pairs[rank // 2])
    optimizer = make(model, shard_preconditioners=True)
    assert optimizer._engine.owners.exchange.size == 2
    own = slice(0, 3) if rank % 2 == 0 else slice(3, 6)
    for x in words:
        for net, made, part in ((expected, twin, x), (model, optimizer, x[own])):
            made.zero_grad()
            (net(part) - 1).square().mean().backward()
            made.step()
            assert made.batch_size == 6
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-10
    with pytest.raises(ValueError, match=r"shard_preconditioners' must name the ranks"):
        make(model, process_group=False, shard_preconditioners=True)


# --- fully_shard ----------------------------------------------------------------------
def meshes() -> dict[str, Any]:
    """Return the meshes that there are for this number of ranks."""
    world = dist.get_world_size()
    found = {"1-d": init_device_mesh("cpu", (world,))}
    if world == 4:
        names = ("replicate", "shard")
        found["2-d"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    return found


def shard(model: nn.Module, mesh: Any, plain: tuple[str, ...] = ()) -> nn.Module:
    """Shard a model, less the parameters whose names are given."""
    options: dict[str, Any] = {"mesh": mesh}
    if plain:  # torch 2.6 knows no such option
        options["ignored_params"] = {model.get_parameter(name) for name in plain}
    for layer in (model.first, *model.equal):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp(
    options: str,
    dtype: torch.dtype = torch.float64,
    mesh: str = "1-d",
    owned: bool = False,
) -> None:
    """Unequal shares of a batch, sharded parameters."""
    model, make = make_model(dtype), maker(options)
    expected = deepcopy(model)
    twin = alone(expected, make)
    shard(model, meshes()[mesh])
    optimizer = make(model, shard_preconditioners=owned)
    together(model, optimizer)
    factors = OPTIONS[options].get("preconditioner_dtypes")
    assert_equal_parameters(model, expected, factors)
    assert_shared(optimizer, twin, owned)
    for p in model.parameters():
        if optimizer.param_groups[0]["alpha1"]:
            momentum = optimizer.state[p][optimizer._engine.momentum]
            assert isinstance(momentum, DTensor)
            assert momentum.placements == p.placements
            assert momentum.shape == p.shape


def plain_and_distributed() -> None:
    """Some parameters are left whole on every rank, as are their units' partners."""
    plain = ("embed.weight", "first.bias", "norm.weight")
    model, make = make_model(), maker("joined")
    expected = deepcopy(model)
    alone(expected, make)
    shard(model, meshes()["1-d"], plain)

    def average() -> None:
        for name in plain:  # FSDP does not, of what it ignores
            grad = model.get_parameter(name).grad
            dist.all_reduce(grad)
            grad.div_(dist.get_world_size())

    together(model, make(model), before_step=average)
    assert not isinstance(model.embed.weight, DTensor)
    assert_equal_parameters(model, expected)


def built_on_meta(before: bool) -> None:
    """The model has no memory at first; the optimizer comes before that, or after."""
    expected, make = make_model(), maker("T=3")
    numbers = deepcopy(expected.state_dict())
    alone(expected, make)
    with torch.device("meta"):
        model = Words().double()
    shard(model, meshes()["1-d"])
    optimizer = make(model) if before else None
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            mesh, placements = p.device_mesh, p.placements
            p.copy_(distribute_tensor(numbers[name], mesh, placements))
    optimizer = optimizer or make(model)
    together(model, optimizer)
    assert_equal_parameters(model, expected)


def gradients_placed_otherwise(momentum_first: bool, owned: bool) -> None:
    """Gradients that are yet to be summed, or cut, where parameters are whole."""
    mesh = init_device_mesh("cpu", (2,))
    W, G = torch.eye(4).double(), torch.arange(16.0).double().view(4, 4) / 16
    half = G[2 * dist.get_rank() :][:2]
    share = (0.25, 0.75)[dist.get_rank()] * G
    options = {**FAST, "batch_size": 8, "momentum_first": momentum_first, "T": 2}
    make = partial(SIRFShampoo, **options)
    expected = nn.Parameter(W.clone())
    twin = make([expected], process_group=False)
    for _ in range(3):
        expected.grad = G.clone()
        twin.step()
    for shard_of_G, how in ((share, Partial()), (half, Shard(0))):
        p = nn.Parameter(distribute_tensor(W.clone(), mesh, [Replicate()]))
        optimizer = make([p], shard_preconditioners=owned)
        for _ in range(3):
            p.grad = DTensor.from_local(shard_of_G.clone(), mesh, [how])
            optimizer.step()
        assert (whole(p) - expected).abs().max() < 1e-10


def shards_that_cannot_be_owned() -> None:
    """They are refused when the optimizer is built, by name."""
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(4, 4, bias=False)
    summed = DTensor.from_local(model.weight.detach(), mesh, [Partial()])
    model.weight = nn.Parameter(summed)
    with pytest.raises(ValueError, match=r"must be False.*Partial.* of weight\."):
        SIRFShampoo(model, batch_size=1, shard_preconditioners=True)
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model = fully_shard(nn.Linear(4, 4, bias=False), mesh=mesh)
    with pytest.raises(ValueError, match=r"together hold.*for weight on .*pass the m"):
        SIRFShampoo(model, batch_size=1, shard_preconditioners=alone)


def strided_shards(owned: bool, width: int) -> None:
    """Tensor parallelism within sharded data parallelism, on the same axis."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
    model = model.append(nn.Tanh()).double()
    expected = deepcopy(model)
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    options = {**FAST, "structures": "dense"}
    twin = SIRFShampoo(expected, **options, process_group=False)
    # Local outputs do not tell that 7 is 4 and 3.
    plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    options["shard_preconditioners"] = owned and dist.group.WORLD
    optimizer = SIRFShampoo(model, **options, process_group=mesh["data"])
    rows = slice(0, 4) if mesh.get_coordinate()[0] == 0 else slice(4, 6)
    for _ in range(STEPS):
        for net, take, made, weight in (
            (expected, slice(None), twin, 1.0),
            (model, rows, optimizer, 2.0),
        ):
            made.zero_grad()
            (weight * (net(x[take]) - y[take]).square().sum() / 18).backward()
            made.step()
            assert made.batch_size == 6
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert (whole(p) - q).abs().max() < 1e-10


def pipeline() -> None:
    """Stages of equal shapes: which ranks see other examples cannot be known."""
    torch.manual_seed(dist.get_rank())
    stage = nn.Linear(4, 4).double()
    optimizer = SIRFShampoo(stage)
    stage(torch.randn(3, 4).double()).sum().backward()
    with pytest.raises(ValueError, match=r"process_group' must name the ranks"):
        optimizer.step()
    optimizer = SIRFShampoo(stage, process_group=False)
    stage(torch.randn(3, 4).double()).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 3


# --- training loops -------------------------------------------------------------------
def wrapped(way: str, model: nn.Module) -> nn.Module:
    """Make a model one of many ranks."""
    if way == "ddp":
        return DistributedDataParallel(model)
    return shard(model, meshes()["1-d"])


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without communication."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def accumulation(way: str, sync: bool, training: bool, owned: bool = False) -> None:
    """Two micro-batches, the first of them with communication or without; clipped."""
    model, make = make_model(), maker("joined, T=2")
    expected = deepcopy(model)
    twin = make(expected, process_group=False)
    model = wrapped(way, model)
    optimizer = make(model, shard_preconditioners=owned)
    model.train(training)  # training is possible in evaluation mode
    for x, y in batches():
        twin.zero_grad()
        mean_loss(expected, x, y).backward()
        norm = nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        assert norm > 0.5
        twin.step()

        optimizer.zero_grad()
        pairs = [(share(x, 2, part), share(y, 2, part)) for part in range(2)]
        with nullcontext() if sync else without_sync(model):
            mean_loss(model, *pairs[0], dist.get_world_size()).backward()
        mean_loss(model, *pairs[1], dist.get_world_size()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert optimizer.batch_size == ROWS
    assert_equal_parameters(model, expected)


def grad_scaler(way: str, owned: bool = False) -> None:
    """One step overflows on one rank; all ranks skip it."""
    model, make = make_model(torch.float32), maker("dense")
    expected = deepcopy(model)
    twin = make(expected, process_group=False)
    model = wrapped(way, model)
    optimizer = make(model, shard_preconditioners=owned)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step, (x, y) in enumerate(batches()):
        if step != 3:
            twin.zero_grad()
            mean_loss(expected, x, y).backward()
            nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            twin.step()
        optimizer.zero_grad()
        weight: float = dist.get_world_size()
        if step == 3 and dist.get_rank() == 0:
            weight = float("inf")
        scaler.scale(mean_loss(model, share(x), share(y), weight)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 128.0
    assert optimizer.global_step == STEPS - 1
    assert_equal_parameters(model, expected)


def missing_on_one_rank(way: str, owned: bool = False) -> None:
    """A gradient that one rank lacks: the unit rests on all, the others move."""
    model = wrapped(way, make_model())
    optimizer = maker("joined")(model, shard_preconditioners=owned)
    (x, y), *_ = batches()
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    mean_loss(model, share(x), share(y)).backward()
    found = dict(model.named_parameters())
    if dist.get_rank() == 1:
        for name in ("norm.bias", "first.weight", "first.bias"):
            found[name if name in found else f"module.{name}"].grad = None
    checker = AsNccl()
    with checker:
        optimizer.step()
    checker.compare()
    for name, p in found.items():
        rests = name.removeprefix("module.").startswith(("norm.bias", "first."))
        assert torch.equal(whole(p), before[name]) == rests, name
    # and a rank without any gradient takes part
    optimizer.zero_grad()
    if dist.get_rank() != 1:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="No parameter of the optimizer has a grad"):
        optimizer.step()
    optimizer.step()  # says so once
    assert optimizer.global_step == 3


def stray_gradient_of_what_is_frozen(way: str, owned: bool) -> None:
    """One rank has a gradient of what is frozen: no rank trains it, nor waits for it.

    Once all have one, all do.
    """
    model = make_model()
    for p in (model.norm.weight, model.equal[0].weight):
        p.requires_grad_(False)
    model = wrapped(way, model)
    optimizer = maker("dense")(model, shard_preconditioners=owned)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    before = [whole(p).clone() for p in frozen]

    def stray(ranks: int) -> None:
        for p in frozen if dist.get_rank() < ranks else ():
            p.grad = torch.ones_like(p)

    def rest() -> list[bool]:
        pairs = zip(frozen, before, strict=True)
        return [torch.equal(whole(p), q) for p, q in pairs]

    for step in range(2):
        together(model, optimizer, step + 1, step, before_step=partial(stray, 1))
        stray(1)
        optimizer.load_state_dict(optimizer.state_dict())  # builds stacks anew
        assert not any(optimizer.state.get(p) for p in frozen)
    assert rest() == [True, True]
    together(model, optimizer, 3, 2, before_step=partial(stray, 2))
    optimizer.state_dict()
    assert rest() == [False, False]


def own_training() -> None:
    """Each rank trains a model of its own on batches of its own."""
    rank = dist.get_rank()
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model, process_group=False)
    for _ in range(rank + 1):  # not as often as others do
        optimizer.zero_grad()
        model(torch.randn(4 + rank, 3)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 4 + rank
    # an integer is the size of all ranks' batches, and needs no communication
    optimizer = SIRFShampoo(model, batch_size=32)
    if rank == 0:
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 32
    dist.barrier()
    # a group of some ranks
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    optimizer = SIRFShampoo(model, process_group=groups[rank])
    model(torch.randn(5 + rank, 3)).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 5 + rank
    dist.barrier()


def told_by_diagnostics(owned: bool) -> None:
    """Diagnostics of shards are those of the whole."""
    for options in ("joined", "no momenta"):
        model, make = make_model(), maker(options)
        expected = deepcopy(model)
        twin = alone(expected, make, steps=2)
        shard(model, meshes()["1-d"])
        optimizer = make(model, shard_preconditioners=owned)
        together(model, optimizer, steps=2)
        told, wanted = optimizer.diagnostics(), twin.diagnostics()
        assert told.keys() == wanted.keys()
        for key, value in wanted.items():
            assert abs(told[key] - value) <= 1e-9 * max(1.0, abs(value)), key


def told_where_a_gradient_is_missing() -> None:
    """Whether a gradient is missing on one rank alone, diagnostics end, and agree."""
    model = make_model()
    shard(model, meshes()["1-d"])
    optimizer = maker("no momenta")(model)
    together(model, optimizer, steps=1)
    first = next(model.parameters())
    if dist.get_rank() == 0:
        first.grad = None
    told = optimizer.diagnostics()
    of_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_rank, [str(value) for value in told.values()])
    assert all(other == of_rank[0] for other in of_rank)


def in_a_chain_of_groups() -> None:
    """The first rank would never hear what the last one tells the second."""

    def alone(times: int) -> list[Any]:
        # torch names a group by how many a rank is in: those of one have to be equal
        here = [dist.get_rank()]
        return [
            dist.new_group(here, use_local_synchronization=True) for _ in range(times)
        ]

    first, last = dist.new_group([0, 1]), dist.new_group([1, 2])
    rank = dist.get_rank()
    (single, *_) = alone((1, 0, 2)[rank]) or [None]
    optimizer = SIRFShampoo(
        make_model(),
        process_group=(first, first, single)[rank],
        shard_preconditioners=(single, last, last)[rank],
        batch_size=1,
    )
    with pytest.raises(ValueError, match=r"form a grid.* would not agree"):
        optimizer.step()
    alone((1, 0, 0)[rank])


def in_unequally_many_groups() -> None:
    """Ranks meet that are in more groups than others, by which torch names groups."""
    our_groups._TWINS.clear()  # others have met here before
    dist.new_group([0])
    model = DistributedDataParallel(make_model())
    optimizer = maker("dense")(model)
    together(model, optimizer, steps=1)
    assert optimizer.global_step == 1


def offloaded() -> None:
    """Shards that do not lie where their mesh is are refused by name."""
    model = make_model()
    shard(model, meshes()["1-d"])
    mesh = next(model.parameters()).device_mesh  # type: ignore[attr-defined]
    elsewhere = patch.object(type(mesh), "device_type", "cuda")
    with elsewhere, pytest.raises(ValueError, match="CPUOffloadPolicy"):
        maker("dense")(model)


# --- checkpoints ----------------------------------------------------------------------
class WordsWithMore(Words):
    """With a parameter that is frozen later, and one that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(3))
        self.unused = nn.Parameter(torch.randn(4, 3))

    def forward(self, words: Tensor) -> Tensor:
        """Shift the output by the frozen parameter."""
        return super().forward(words) + self.frozen


def trained(way: str, owned: bool, options: str) -> tuple[nn.Module, SIRFShampoo]:
    """Return a model of many ranks, or of one, and its optimizer."""
    torch.manual_seed(1)
    model = WordsWithMore().double()
    make = maker(options)
    if way == "alone":
        optimizer = make(model, process_group=False)
    elif way == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = make(model, shard_preconditioners=owned)
    else:
        shard(model, meshes()[way])
        optimizer = make(model, shard_preconditioners=owned)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("frozen"))
    return model, optimizer


def resumed_equally(model: nn.Module, optimizer: SIRFShampoo, options: str) -> None:
    """Train to the end and compare with a run of one process."""
    assert optimizer.global_step == STEPS // 2
    together(model, optimizer, start=STEPS // 2)
    expected, twin = trained("alone", False, options)
    for x, y in batches():
        twin.zero_grad()
        mean_loss(expected, x, y).backward()
        twin.step()
    for (name, p), (other, q) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name.removeprefix("module.") == other
        assert (whole(p) - q).abs().max() <= 1e-10, name
        # also of what rests, but of what is frozen: torch leaves that out
        if "step" in twin.state[q] and p.requires_grad:
            assert optimizer.state[p]["step"] == twin.state[q]["step"]


KINDS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "sharded on the CPU": {"cpu_offload": True},
    "full": {"full_state_dict": True},
    "full on the CPU": {"full_state_dict": True, "cpu_offload": True},
}


def save(kind: str, way: str, owned: bool, options: str, folder: str) -> set[str]:
    """Train half of the way and save; return the keys on this rank."""
    model, optimizer = trained(way, owned, options)
    together(model, optimizer, steps=STEPS // 2)
    settings = StateDictOptions(**KINDS[kind])
    of_model, of_optimizer = get_state_dict(model, optimizer, options=settings)
    Path(folder).mkdir(exist_ok=True)
    if kind.startswith("full"):
        if dist.get_rank() == 0:
            torch.save((of_model, of_optimizer), f"{folder}/full.pt")
        dist.barrier()
    else:
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    state = of_optimizer.get("state", of_optimizer)
    return {
        f"{name}.{key}"
        for name, entries in state.items()
        for key in (entries if isinstance(entries, dict) else [""])
    }


def resume(kind: str, way: str, owned: bool, options: str, folder: str) -> None:
    """Go on from a checkpoint of any number of ranks."""
    model, optimizer = trained(way, owned, options)
    if kind.startswith("full"):
        of_model, of_optimizer = {}, {}
        if dist.get_rank() == 0:
            path = f"{folder}/full.pt"
            of_model, of_optimizer = torch.load(path, weights_only=True)
        settings = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    else:
        settings = StateDictOptions(**KINDS[kind])
        of_model, of_optimizer = get_state_dict(model, optimizer, options=settings)
        found = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(found, checkpoint_id=folder)
        of_model, of_optimizer = found["model"], found["optimizer"]
    set_model_state_dict(model, of_model, options=settings)
    set_optimizer_state_dict(model, optimizer, of_optimizer, options=settings)
    resumed_equally(model, optimizer, options)


def saved_by_one(rank: int, folder: str) -> None:
    """All call `state_dict`, one saves it with `torch.save`: it has all."""
    model, optimizer = trained("ddp", True, "T=3")
    together(model, optimizer, steps=STEPS // 2)
    found = (model.module.state_dict(), optimizer.state_dict())
    if dist.get_rank() == rank:
        torch.save(found, f"{folder}/one.pt")
    dist.barrier()


def resumed_from_one(way: str, owned: bool, folder: str) -> None:
    """Go on from what one rank has saved."""
    model, optimizer = trained(way, owned, "T=3")
    of_model, of_optimizer = torch.load(f"{folder}/one.pt", weights_only=True)
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    plain.load_state_dict(of_model)
    optimizer.load_state_dict(of_optimizer)
    resumed_equally(model, optimizer, "T=3")


def entries_of_others(way: str, owned: bool) -> None:
    """What a wrapper puts beside the state stays on the rank that put it there."""
    model, optimizer = trained(way, owned, "T=3")
    together(model, optimizer, steps=1)
    own = torch.full((2,), float(dist.get_rank()))
    for p in model.parameters():
        optimizer.state[p]["slow"] = own
    optimizer.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["slow"], own)
        assert optimizer.state[p]["slow"] is not own
    together(model, optimizer, steps=1)


def loaded_by_a_pair(way: str) -> None:
    """One pair of ranks of four loads into what it owns; the other does not wait."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("run", "pair"))["pair"]
    groups = {"process_group": mesh, "shard_preconditioners": mesh}

    def build(**options: Any) -> tuple[nn.Module, SIRFShampoo]:
        model = make_model()
        if way == "fsdp":
            shard(model, mesh)
        else:
            model = DistributedDataParallel(model, process_group=mesh.get_group())
        return model, SIRFShampoo(model, **{**FAST, **options}, **groups)

    recent, older = (build(exponent=0.75) for _ in range(2))
    different, _ = build(), dist.barrier()
    if dist.get_rank() < 2:
        x, y = batches(1)[0]
        for model, optimizer in (recent, older):
            mean_loss(model, x, y, 2).backward()
            optimizer.step()
        mean_loss(recent[0], x, y, 2).backward()
        recent[1].step()
        saved = recent[1].state_dict()
        older[1].load_state_dict(saved)
        twins = zip(recent[1].preconditioner, older[1].preconditioner, strict=True)
        held = [(K, L) for fs, gs in twins for K, L in zip(fs, gs, strict=True)]
        assert held
        assert all(torch.equal(K.to_dense(), L.to_dense()) for K, L in held)
        with pytest.raises(ValueError, match=r"factors for the exponent 1\.0"):
            different[1].load_state_dict(saved)
    dist.barrier()


def loaded_at_once() -> None:
    """What is sharded comes to its owner alone, by one collective for each type."""
    model, optimizer = trained("1-d", True, "T=3")
    together(model, optimizer, steps=2)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)  # where shards lie is asked once
    with Traffic() as traffic:
        optimizer.load_state_dict(saved)
    parts = {
        (number, key): t.to_local()
        for number, entries in saved["state"].items()
        for key, t in entries.items()
        if isinstance(t, DTensor) and key != optimizer._engine.momentum
    }
    assert len({t.dtype for t in parts.values()}) == traffic.calls == 1
    # at most what this rank owns: all its factors, and less what it had of them
    params = [p for group in optimizer.param_groups for p in group["params"]]
    mine = {i for i, p in enumerate(params) for k in optimizer.state[p] if "K0" in k}
    units = {id(u.params[0]): u.owner for u in optimizer._engine.units}
    own = [i for i in mine if units[id(params[i])] == dist.get_rank()]
    expected = sum(
        (saved["state"][i][key].numel() - t.numel()) * t.element_size()
        for (i, key), t in parts.items()
        if i in own
    )
    assert traffic.received == expected > 0


def other_settings(kind: str, folder: str) -> None:
    """What torch.distributed.checkpoint has read does not fit: told by name."""

    def build(**options: Any) -> tuple[nn.Module, SIRFShampoo]:
        model = shard(make_model(), meshes()["1-d"])
        return model, SIRFShampoo(model, **{**FAST, "structures": "dense", **options})

    model, optimizer = build(exponent=0.75)
    together(model, optimizer, steps=2)
    how = StateDictOptions(**KINDS[kind])
    saved = get_optimizer_state_dict(model, optimizer, options=how)
    dcp.save(saved, checkpoint_id=folder)
    for options, told in (
        ({}, r"factors for the exponent 1\.0 in group 0"),
        (
            {"structures": "diagonal"},
            r"structures \('diagonal', 'diagonal'\) in group 0",
        ),
    ):
        model, optimizer = build(**options)
        found = get_optimizer_state_dict(model, optimizer, options=how)
        if options:  # torch looks before we can
            with pytest.raises(CheckpointException, match=r"Missing key.*K0\.diag"):
                dcp.load(found, checkpoint_id=folder)
        planner = DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(found, checkpoint_id=folder, planner=planner)
        with pytest.raises(ValueError, match=told):
            set_optimizer_state_dict(model, optimizer, found, options=how)


# --- what goes wrong ------------------------------------------------------------------
def non_finite(options: str, way: str, owned: bool) -> None:
    """A unit whose gradient is not finite rests, with all of its state."""
    model, make = make_model(), maker(options)
    expected = deepcopy(model)
    twin = make(expected, process_group=False)
    model = wrapped(way, model)
    optimizer, checker = make(model, shard_preconditioners=owned), AsNccl()
    for step, (x, y) in enumerate(batches()):
        for net, made in ((expected, twin), (model, optimizer)):
            made.zero_grad()
            if net is expected:
                mean_loss(net, x, y).backward()
            else:
                mean_loss(net, share(x), share(y), dist.get_world_size()).backward()
            prefix = "module." if isinstance(net, DistributedDataParallel) else ""
            sick = net.get_parameter(f"{prefix}first.weight").grad
            if step in (2, 5):
                # one number of one shard
                shards = sick.to_local() if isinstance(sick, DTensor) else sick
                if net is expected or way == "ddp" or dist.get_rank() == 0:
                    shards[0, 0] = float("nan")
            with checker if made is optimizer else nullcontext():
                made.step()
    checker.compare()
    assert_equal_parameters(model, expected)
    entries = optimizer.state_dict()["state"]
    assert sum(int(e["skipped"]) for e in entries.values() if "skipped" in e) == 2


def balanced(layers: int) -> list[tuple[int, float]]:
    """Return this rank's bytes of state and operations for equal blocks."""
    shapes = gpt(layers=layers, width=32, vocabulary=20, context=8)
    model = nn.ParameterDict({k: torch.zeros(s) for k, s in shapes.items()})
    options = {"structures": {1: "diagonal", 2: "dense"}, "batch_size": 1}
    optimizer = SIRFShampoo(model, **options, shard_preconditioners=True)
    rank = dist.get_rank()
    held = [u for u in optimizer._engine.units if u.owner == rank]
    found = sum(
        t.numel() * t.element_size()
        for entries in optimizer.state.values()
        for key, t in entries.items()
        if key not in ("step", "skipped")
    )
    work = sum(work_of(u, optimizer.param_groups[u.group]) for u in held)
    return found, work


def one_fails(where: str, how: str, pipe: Any) -> str:
    """Train until the last rank fails; return what the others are told."""
    model = DistributedDataParallel(make_model())
    optimizer = maker("dense")(model, shard_preconditioners=True)
    last = dist.get_rank() == dist.get_world_size() - 1

    def fail(*_: Any, **__: Any) -> None:
        if how == "dies":
            os._exit(1)
        pipe.recv()  # until the test ends it

    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mean_loss(model, share(x), share(y)).backward()
        if last and step == 2 and where == "before the step":
            fail()
        if last and step == 2 and where == "within the step":
            optimizer._engine.owners.exchange.broadcast = fail
        try:
            optimizer.step()
        except RuntimeError as error:
            assert step == 2
            return str(error)
    return "Nothing."


def one_skips(way: str, owned: bool, pipe: Any) -> str:
    """Train until the last rank leaves a step out; return what the others are told."""
    model = wrapped(way, make_model())
    optimizer = maker("dense")(model, shard_preconditioners=owned)
    last = dist.get_rank() == dist.get_world_size() - 1
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        mean_loss(model, share(x), share(y)).backward()
        if last and step == 2:
            continue
        try:
            optimizer.step()
        except RuntimeError as error:
            assert step == 2
            return str(error)
    return "Nothing."


# --- the example ----------------------------------------------------------------------
def example(folder: str, *options: str) -> float:
    """Train as `examples/many_devices.py` does; return the loss it ends with."""
    from examples import many_devices

    small = ["--width", "16", "--layers", "1", "--every", "3", "--folder", folder]
    return many_devices.train(many_devices.read_arguments([*small, *options]), "cpu")


def crash_amid_a_save(folder: str, way: str) -> None:
    """A save that fails after the numbers were written leaves the last one whole."""
    options = ["--way", way, "--shard-preconditioners"]
    example(folder, *options, "--steps", "3")
    finish = FileSystemWriter.finish

    def crash(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device.")

    FileSystemWriter.finish = crash  # type: ignore[method-assign]
    try:
        with pytest.raises(CheckpointException, match="No space left"):
            example(folder, *options, "--steps", "6")
    finally:
        FileSystemWriter.finish = finish  # type: ignore[method-assign]
    assert (Path(folder) / "latest").read_text() == "step-3"
    resumed = example(folder, *options, "--steps", "6")
    assert resumed == example(f"{folder}-b", *options, "--steps", "6")


def copies() -> None:
    """A deep copy and a pickle of an optimizer go on like the original."""
    model = wrapped("ddp", make_model())  # FSDP forbids copies
    optimizer = maker("dense")(model)
    together(model, optimizer, steps=2)
    deep = deepcopy(optimizer)
    assert deep.global_step == 2
    read = pickle.loads(pickle.dumps(optimizer))
    # a group cannot travel: these are on all ranks now
    (x, y), *_ = batches(1)
    for copy in (deep, read):
        copy.zero_grad()
        mean_loss(copy._model.module, share(x), share(y)).backward()
        copy.step()
        assert copy.global_step == 3
        assert copy.batch_size == ROWS


def zero_redundancy() -> None:
    """Torch's wrapper that deals out parameters is refused by name."""
    with warnings.catch_warnings():  # of torch's own scripted functions
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer.*shard_precond"):
        ZeroRedundancyOptimizer(model.parameters(), SIRFShampoo, batch_size=ROWS)


def ranks_that_join() -> None:
    """Torch's `Join` goes with an integer batch size; else it is refused by name."""
    from torch.distributed.algorithms.join import Join

    def train(**options: Any) -> nn.Module:
        model = DistributedDataParallel(make_model())
        optimizer = SIRFShampoo(model, **FAST, **options)
        with Join([model]):
            for x, y in batches(2 + dist.get_rank()):
                optimizer.zero_grad()
                mean_loss(model, share(x), share(y)).backward()
                optimizer.step()
        return model

    model = train(batch_size=ROWS)
    found = torch.cat([p.detach().flatten() for p in model.parameters()])
    of_first = found.clone()
    dist.broadcast(of_first, 0)
    assert torch.equal(found, of_first)  # torch sends the model of who went furthest
    assert all(
        (p - q).abs().max() > 0
        for p, q in zip(model.parameters(), make_model().parameters(), strict=True)
    )
    for options in ({}, {"batch_size": ROWS, "shard_preconditioners": True}):
        model = DistributedDataParallel(make_model())
        optimizer = SIRFShampoo(model, **FAST, **options)
        Join([model])
        mean_loss(model, *batches(1)[0]).backward()
        with pytest.raises(
            RuntimeError, match=r"Join lets ranks.*'batch_size' as an i"
        ):
            optimizer.step()


def pickles_of_shared() -> None:
    """An optimizer that is one of several is not pickled without the others."""
    optimizer = SIRFShampoo(make_model(), shard_preconditioners=True)
    with pytest.raises(TypeError, match=r"cannot be pickled: save its state_dict"):
        pickle.dumps(optimizer)


# --- costs ----------------------------------------------------------------------------
class Traffic(TorchDispatchMode):
    """Counts the bytes that reach this rank from others, in collectives of tensors."""

    received = calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look at collectives; all else passes."""
        result = func(*args, **(kwargs or {}))
        name = str(func)
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        sizes = [t.numel() * t.element_size() for t in tensors]
        self.calls += "c10d" in name and "wait" not in name
        if "c10d_functional.all_gather" in name:
            self.received += sizes[0] * (args[1] - 1)
        elif "c10d" in name and "broadcast" in name and args[2] != dist.get_rank():
            self.received += sum(sizes)
        elif "c10d" in name and "alltoall" in name:
            come = next(
                a for a in args if isinstance(a, list) and isinstance(a[0], int)
            )
            own = come[dist.get_rank()] * tensors[0].element_size()
            self.received += sizes[0] - own
        return result


class UnderWay:
    """Counts the bytes of tensors that are sent or awaited, and keeps the most."""

    most = now = 0

    def __enter__(self) -> None:
        """Count from now on."""
        self._patches = ExitStack()
        for name in ("all_to_all_single", "broadcast"):
            send = partial(self._counted, getattr(dist, name))
            self._patches.enter_context(patch.object(dist, name, send))

    def __exit__(self, *_: Any) -> None:
        """Count no more; all has arrived."""
        self._patches.close()
        assert self.now == 0

    def _counted(self, send: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in args if isinstance(t, Tensor)]
        work = send(*args, **kwargs)
        number = sum(t.numel() * t.element_size() for t in tensors)
        self.now += number
        self.most = max(self.most, self.now)

        def wait() -> None:
            work.wait()
            self.now -= number

        return SimpleNamespace(wait=wait)


def costs(
    way: str, owned: bool, workload: str = "odd", momentum_first: bool = False
) -> dict[str, list[int]]:
    """Return bytes, operations and traffic of this rank: measured, and predicted."""
    odd = gpt(layers=3, width=12, vocabulary=21, context=7)
    shapes = odd if workload == "odd" else WORKLOADS[workload]()
    model = Tensors(list(shapes.values()), torch.float32)
    options = {"structures": {1: "diagonal", 2: "dense"}, "batch_size": 1}
    options |= {"momentum_first": momentum_first, "T": 1 + momentum_first}
    planned = SIRFShampoo(model, **options)
    units, groups = planned._engine.units, planned.param_groups
    world, rank = dist.get_world_size(), dist.get_rank()
    sharded = way == "fsdp"
    # momenta become whole, and gradients in steps that update factors
    learning, other = (
        scale.predict(
            units, groups, world, sharded=sharded, owned=owned, gathered=number
        )[rank]
        for number in (1 + momentum_first, 1)
    )
    flops = 0
    for unit in with_owners(units, groups, [], world):
        # torch counts matrix products only
        if unit.structures[0] == "dense" and (not owned or unit.owner == rank):
            cost = cost_of(unit, groups[unit.group])
            flops += cost.step_flops + cost.update_flops
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = SIRFShampoo(model, **options, shard_preconditioners=owned)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    received = []
    under_way = UnderWay()
    for _ in range(2):
        with Traffic() as traffic, under_way:
            optimizer.step()
        received.append(traffic.received)
    mapping = {torch.ops.aten.baddbmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        optimizer.step()
    kept = [t for entries in optimizer.state.values() for t in entries.values()]
    shards = [t.to_local() if isinstance(t, DTensor) else t for t in kept]
    state = sum(t.numel() * t.element_size() for t in shards)
    if owned and not sharded:
        whole_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        assert max(received) <= whole_bytes
    return {
        "state": [state, learning.state],
        "flops": [counter.get_total_flops(), flops],
        "received": [received[0], learning.received],
        "buffers": [under_way.most, learning.buffers],
        "received without an update": [received[1], other.received],
    }


def in_place(self: Any, A: Any, B: Any, out_shape: Any = None, **_: Any) -> int:
    """Count the product of the in-place form, which torch's counter leaves out."""
    return bmm_flop(A, B)


def spread_updates(way: str) -> None:
    """Each rank spreads what it owns; without owners, it is as in one process."""
    options = {**FAST, "T": 3, "structures": "dense", "spread_updates": True}
    model = make_model()
    expected = deepcopy(model)
    alone(expected, partial(SIRFShampoo, **options))
    replicated = wrapped(way, deepcopy(model))
    together(replicated, SIRFShampoo(replicated, **options))
    assert_equal_parameters(replicated, expected)

    model = wrapped(way, model)
    optimizer = SIRFShampoo(model, **options, shard_preconditioners=True)
    phases, rank = optimizer._engine.phases(optimizer.param_groups), dist.get_rank()
    own = [phases[u.group] for u in optimizer._engine.units if u.owner == rank]
    assert set(own) == ({0, 1, 2} if len(own) > 2 else set(range(len(own))))
    together(model, optimizer)
    for p in model.parameters():
        found = whole(p)
        of_first = found.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(found, of_first)


# --- GPUs -----------------------------------------------------------------------------
def on_gpus(way: str, owned: bool) -> None:
    """Train on a GPU a rank, as one process does on a CPU."""
    model, make = make_model(), maker("joined, T=2")
    expected = deepcopy(model)
    alone(expected, make)
    model = model.cuda()
    if way == "ddp":
        model = DistributedDataParallel(model)
    else:
        model = shard(model, init_device_mesh("cuda", (dist.get_world_size(),)))
    optimizer = make(model, shard_preconditioners=owned)
    for x, y in batches():
        optimizer.zero_grad()
        x, y = share(x).cuda(), share(y).cuda()
        mean_loss(model, x, y, dist.get_world_size()).backward()
        optimizer.step()
        assert optimizer.batch_size == ROWS
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert (whole(p).cpu() - q).abs().max() <= 1e-9
    optimizer.load_state_dict(optimizer.state_dict())
