"""Training on several ranks equals training in one process."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import distributed_cases as cases
from tests.distributed.ranks import Ranks, until_one_fails
from tests.versions import needs_torch

AGREES_IN_FLOAT32 = needs_torch(
    9, "FSDP2 over gloo ends elsewhere in float32, though not in float64"
)
OWNED = pytest.mark.parametrize("owned", [False, True])
WAYS = pytest.mark.parametrize("way", ["ddp", "fsdp"])


@pytest.fixture(scope="session")
def one() -> Iterator[Ranks]:
    """One rank."""
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def three() -> Iterator[Ranks]:
    """Three ranks."""
    ranks = Ranks(3)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


def some(options: str) -> Any:
    """Leave to `make test` what has most in it."""
    short = "joined, T=2", "T=3", "momentum first"
    marks = () if options in short else (pytest.mark.heavy,)
    return pytest.param(options, marks=marks)


ALL_OPTIONS = pytest.mark.parametrize("options", [some(name) for name in cases.OPTIONS])


@OWNED
@ALL_OPTIONS
def test_ddp(two: Ranks, options: str, owned: bool) -> None:
    two.run(cases.ddp, options=options, owned=owned)


@OWNED
@ALL_OPTIONS
def test_fsdp(two: Ranks, options: str, owned: bool) -> None:
    two.run(cases.fsdp, options=options, owned=owned)


@pytest.mark.heavy
@WAYS
@OWNED
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_accumulation(
    two: Ranks, way: str, owned: bool, sync: bool, training: bool
) -> None:
    two.run(cases.accumulation, way=way, owned=owned, sync=sync, training=training)


@WAYS
@OWNED
def test_grad_scaler(two: Ranks, way: str, owned: bool) -> None:
    two.run(cases.grad_scaler, way=way, owned=owned)


@OWNED
@pytest.mark.parametrize("way", ["ddp", "1-d"])
def test_entries_of_others(two: Ranks, way: str, owned: bool) -> None:
    two.run(cases.entries_of_others, way=way, owned=owned)


@WAYS
@OWNED
def test_gradient_missing_on_one_rank(two: Ranks, way: str, owned: bool) -> None:
    two.run(cases.missing_on_one_rank, way=way, owned=owned)


@WAYS
@OWNED
def test_stray_gradient_of_what_is_frozen(two: Ranks, way: str, owned: bool) -> None:
    two.run(cases.stray_gradient_of_what_is_frozen, way=way, owned=owned)


@WAYS
@OWNED
@pytest.mark.parametrize("options", ["joined, T=2", "momentum first"])
def test_gradient_that_is_not_finite(
    two: Ranks, options: str, way: str, owned: bool
) -> None:
    two.run(cases.non_finite, options=options, way=way, owned=owned)


@OWNED
def test_diagnostics(two: Ranks, owned: bool) -> None:
    two.run(cases.told_by_diagnostics, owned=owned)


@pytest.mark.parametrize("layers", [4, 8])
def test_memory_and_work_are_balanced(two: Ranks, four: Ranks, layers: int) -> None:
    for ranks in (two, four):
        found = ranks.run(cases.balanced, layers=layers)
        for of_rank in zip(*found, strict=True):
            assert max(of_rank) <= 1.25 * sum(of_rank) / ranks.world


@WAYS
@OWNED
@pytest.mark.parametrize(
    "number", ["one", "two", pytest.param("three", marks=pytest.mark.heavy), "four"]
)
@pytest.mark.parametrize("momentum_first", [False, True])
def test_costs_are_those_predicted(
    request: pytest.FixtureRequest,
    number: str,
    way: str,
    owned: bool,
    momentum_first: bool,
) -> None:
    ranks = request.getfixturevalue(number)
    how = {"way": way, "owned": owned, "momentum_first": momentum_first}
    for found in ranks.run(cases.costs, **how):
        for measured, predicted in found.values():
            assert measured == predicted
        communicates = ranks.world > 1 and (owned or way == "fsdp")
        assert (found["received"][0] > 0) == communicates
        assert found["flops"][0] > 0


@pytest.mark.parametrize("how", ["dies", "hangs"])
@pytest.mark.parametrize(
    ("where", "awaited"),
    [
        ("before the step", "gradients"),
        ("within the step", "parameters"),
    ],
)
def test_a_rank_that_fails_ends_the_others(
    tmp_path: Path, where: str, awaited: str, how: str
) -> None:
    case = partial(cases.one_fails, where, how)
    told, seconds = until_one_fails(case, 2, 4.0, 60.0, tmp_path)
    assert all("awaited" in text and awaited in text for text in told), told
    assert seconds < 60


@OWNED
@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.heavy)])
def test_a_rank_that_leaves_a_step_out_is_told_of(
    tmp_path: Path, way: str, owned: bool
) -> None:
    case = partial(cases.one_skips, way, owned)
    (told,), seconds = until_one_fails(case, 2, 4.0, 60.0, tmp_path)
    assert "awaited batch size and missing gradients" in told
    assert seconds < 60


@pytest.mark.parametrize("before", [True, False])
def test_model_built_on_meta(two: Ranks, before: bool) -> None:
    two.run(cases.built_on_meta, before=before)


@OWNED
@pytest.mark.parametrize("momentum_first", [False, True])
def test_gradients_placed_otherwise(
    two: Ranks, momentum_first: bool, owned: bool
) -> None:
    two.run(
        cases.gradients_placed_otherwise, momentum_first=momentum_first, owned=owned
    )


@pytest.mark.parametrize(
    "case",
    [
        cases.plain_and_distributed,
        cases.pipeline,
        cases.own_training,
        cases.copies,
        cases.loaded_at_once,
        cases.zero_redundancy,
        cases.pickles_of_shared,
        cases.ranks_that_join,
        cases.shards_that_cannot_be_owned,
        cases.told_where_a_gradient_is_missing,
        cases.in_unequally_many_groups,
        cases.offloaded,
    ],
)
def test_case(two: Ranks, case: Callable[[], None]) -> None:
    two.run(case)


@pytest.mark.heavy
@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("mesh", ["1-d", "2-d"])
@pytest.mark.parametrize("options", ["T=3", "joined"])
def test_fsdp_on_four(four: Ranks, mesh: str, options: str, owned: bool) -> None:
    four.run(cases.fsdp, mesh=mesh, options=options, owned=owned)


def test_ranks_that_would_not_hear_of_all_are_refused(three: Ranks) -> None:
    three.run(cases.in_a_chain_of_groups)


def test_two_trainings_on_two_pairs_of_ranks(four: Ranks) -> None:
    four.run(cases.two_trainings)


@pytest.mark.heavy
@OWNED
@pytest.mark.parametrize("width", [7, 8])
def test_strided_shards(four: Ranks, owned: bool, width: int) -> None:
    four.run(cases.strided_shards, owned=owned, width=width)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("way", ["ddp", "1-d"])
def test_checkpoint(
    two: Ranks, one: Ranks, tmp_path: Path, kind: str, owned: bool, way: str
) -> None:
    shared = {"kind": kind, "options": "T=3", "folder": str(tmp_path)}
    keys = two.run(cases.save, way=way, owned=owned, **shared)
    if "CPU" not in kind:  # there, one rank alone gets what is full
        assert keys[0] == keys[1]
    two.run(cases.resume, way=way, owned=owned, **shared)
    two.run(cases.resume, way=way, owned=not owned, **shared)
    one.run(cases.resume, way="alone", owned=False, **shared)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_crash_amid_a_save_leaves_the_last_checkpoint(
    two: Ranks, tmp_path: Path, way: str
) -> None:
    two.run(cases.crash_amid_a_save, folder=str(tmp_path / "a"), way=way)


@AGREES_IN_FLOAT32
def test_example_goes_on_in_another_way_with_other_ranks(
    one: Ranks, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "examples/many_devices.py", "--width", "16"]
    command += ["--layers", "1", "--every", "3", "--folder", str(tmp_path / "a")]
    command += ["--steps", "5", "--way", "fsdp", "--shard-preconditioners"]
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks, fsdp, from step 0" in done.stdout
    assert "5/5" in done.stdout
    (resumed,) = one.run(example_case, folder=str(tmp_path / "a"))
    (expected,) = one.run(example_case, folder=str(tmp_path / "b"))
    assert abs(resumed - expected) < 1e-5 * expected


def example_case(folder: str) -> float:
    """Train to step 8, by DDP."""
    return cases.example(folder, "--steps", "8")


@AGREES_IN_FLOAT32
@OWNED
@ALL_OPTIONS
def test_float32(two: Ranks, options: str, owned: bool) -> None:
    two.run(cases.fsdp, options=options, dtype=torch.float32, owned=owned)
    two.run(cases.ddp, options=options, dtype=torch.float32, owned=owned)


def test_a_short_way_through_checkpoints(
    two: Ranks, one: Ranks, tmp_path: Path
) -> None:
    for kind, way in (("flattened", "1-d"), ("full on the CPU", "ddp")):
        shared = {"kind": kind, "options": "T=3", "folder": str(tmp_path / kind)}
        (tmp_path / kind).mkdir()
        two.run(cases.save, way=way, owned=True, **shared)
        two.run(cases.resume, way=way, owned=False, **shared)
        one.run(cases.resume, way="alone", owned=False, **shared)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_of_one_rank_has_what_all_own(
    two: Ranks, one: Ranks, tmp_path: Path, rank: int
) -> None:
    two.run(cases.saved_by_one, rank=rank, folder=str(tmp_path))
    two.run(cases.resumed_from_one, way="ddp", owned=True, folder=str(tmp_path))
    two.run(cases.resumed_from_one, way="ddp", owned=False, folder=str(tmp_path))
    one.run(cases.resumed_from_one, way="alone", owned=False, folder=str(tmp_path))


@WAYS
def test_a_pair_of_owners_loads_without_the_others(four: Ranks, way: str) -> None:
    four.run(cases.loaded_by_a_pair, way=way)


@pytest.mark.parametrize("kind", ["sharded", "flattened"])
def test_a_checkpoint_of_other_settings_is_refused(
    two: Ranks, tmp_path: Path, kind: str
) -> None:
    two.run(cases.other_settings, kind=kind, folder=str(tmp_path))


@pytest.mark.heavy
@OWNED
@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("way", ["1-d", "2-d"])
def test_checkpoints_of_four(
    one: Ranks,
    two: Ranks,
    four: Ranks,
    tmp_path: Path,
    kind: str,
    owned: bool,
    way: str,
) -> None:
    shared = {"kind": kind, "options": "T=3", "folder": str(tmp_path / "a")}
    four.run(cases.save, way=way, owned=owned, **shared)
    four.run(cases.resume, way="ddp", owned=owned, **shared)
    two.run(cases.resume, way="1-d", owned=owned, **shared)
    one.run(cases.resume, way="alone", owned=False, **shared)
    shared["folder"] = str(tmp_path / "b")
    one.run(cases.save, way="alone", owned=False, **shared)
    two.run(cases.resume, way="ddp", owned=owned, **shared)
    four.run(cases.resume, way=way, owned=owned, **shared)


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_owners_spread_their_own_updates(
    request: pytest.FixtureRequest, ranks: str, way: str
) -> None:
    request.getfixturevalue(ranks).run(cases.spread_updates, way=way)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_gpus(backend: str) -> None:
    ranks = Ranks(2, backend)
    try:
        for way in ("ddp", "fsdp"):
            for owned in (False, True):
                ranks.run(cases.on_gpus, way=way, owned=owned)
    finally:
        ranks.stop()
