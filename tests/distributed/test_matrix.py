"""Every way to train on several ranks equals training in one process."""

from itertools import product
from typing import Any

import pytest

from tests.distributed import matrix_cases as cases
from tests.distributed.ranks import Ranks
from tests.distributed.test_distributed import four, three, two  # noqa: F401 - fixtures


def cells() -> list[Any]:
    """Return all combinations; `make test` has each way, with most in it."""
    found = []
    of_cells = product(("two", "three", "four"), cases.WAYS, cases.SETTINGS)
    for (ranks, way, settings), owned in product(of_cells, (False, True)):
        short = ranks == ("two" if settings == "plain" else "four")
        marks = () if short and (owned or settings == "recipe") else pytest.mark.heavy
        found.append(pytest.param(ranks, way, settings, owned, marks=marks))
    return found


@pytest.mark.parametrize(("ranks", "way", "settings", "owned"), cells())
def test_equals_one_process(
    request: pytest.FixtureRequest, ranks: str, way: str, settings: str, owned: bool
) -> None:
    group: Ranks = request.getfixturevalue(ranks)
    how = {"way": way, "settings": settings, "owned": owned}
    for difference in group.run(cases.equals_one_process, **how):
        assert difference < 1e-10
