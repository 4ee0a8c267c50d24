"""Frameworks on several ranks: what they swap, save and load."""

from pathlib import Path

import pytest

from tests.distributed import framework_cases as cases
from tests.distributed.ranks import Ranks
from tests.distributed.test_distributed import OWNED, two  # noqa: F401 - a fixture


@OWNED
@pytest.mark.parametrize("options", ["joined, T=2"])
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
