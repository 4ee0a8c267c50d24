"""Frameworks on several ranks: what they swap, save and load."""

from pathlib import Path

import pytest

from tests.distributed import framework_cases as cases
from tests.distributed.ranks import Ranks
from tests.distributed.test_distributed import OWNED, one, two  # noqa: F401 - fixtures


@OWNED
@pytest.mark.parametrize("options", ["joined, T=2", "momentum first"])
@pytest.mark.parametrize("way", ["ddp", "SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_accelerate(
    two: Ranks,  # noqa: F811
    tmp_path: Path,
    way: str,
    options: str,
    owned: bool,
) -> None:
    folder = str(tmp_path / "state")
    two.run(cases.accelerate, way=way, options=options, owned=owned, folder=folder)


@pytest.mark.parametrize(
    ("way", "owned"),
    [
        ("ddp", False),
        ("SHARDED_STATE_DICT", False),
        ("SHARDED_STATE_DICT", True),
        ("FULL_STATE_DICT", True),
    ],
)
def test_trainer(
    one: Ranks,  # noqa: F811
    two: Ranks,  # noqa: F811
    tmp_path: Path,
    way: str,
    owned: bool,
) -> None:
    shared = {"options": "joined, T=2"}
    case, alone = cases.train_by_trainer, {"way": "ddp", "owned": False}
    folder = str(tmp_path / "one")
    ((expected, _),) = one.run(case, **shared, **alone, folder=folder, resume=False)
    shared |= {"way": way, "owned": owned, "folder": str(tmp_path / "two")}
    for resume in (False, True):
        for found, sizes in two.run(case, **shared, resume=resume):
            assert sizes == [4] * (5 if resume else 10)
            for p, q in zip(found, expected, strict=True):
                assert (p - q).abs().max() <= 1e-10


def test_trainer_that_saves_by_one_rank_is_refused(
    two: Ranks,  # noqa: F811
    tmp_path: Path,
) -> None:
    two.run(cases.refused_in_trainer, folder=str(tmp_path))
