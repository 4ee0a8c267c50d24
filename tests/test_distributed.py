"""Training on several ranks equals training in one process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import distributed_cases as cases
from tests.ranks import Ranks


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
def four() -> Iterator[Ranks]:
    """Four ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_ddp(two: Ranks, options: str, owned: bool) -> None:
    two.run(cases.ddp, options=options, owned=owned)


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("options", cases.OPTIONS)
def test_fsdp(two: Ranks, options: str, owned: bool) -> None:
    two.run(cases.fsdp, options=options, owned=owned)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_accumulation(two: Ranks, way: str, sync: bool, training: bool) -> None:
    two.run(cases.accumulation, way=way, sync=sync, training=training)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_grad_scaler(two: Ranks, way: str) -> None:
    two.run(cases.grad_scaler, way=way)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_gradient_missing_on_one_rank(two: Ranks, way: str) -> None:
    two.run(cases.missing_on_one_rank, way=way)


@pytest.mark.parametrize("before", [True, False])
def test_model_built_on_meta(two: Ranks, before: bool) -> None:
    two.run(cases.built_on_meta, before=before)


@pytest.mark.parametrize(
    "case", [cases.plain_and_distributed, cases.own_training, cases.told_by_diagnostics]
)
def test_case(two: Ranks, case: Callable[[], None]) -> None:
    two.run(case)


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("mesh", ["1-d", "2-d"])
@pytest.mark.parametrize("options", ["T=3", "joined"])
def test_fsdp_on_four(four: Ranks, mesh: str, options: str, owned: bool) -> None:
    four.run(cases.fsdp, mesh=mesh, options=options, owned=owned)


def test_strided_shards(four: Ranks) -> None:
    four.run(cases.strided_shards)


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
