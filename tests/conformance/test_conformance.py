"""Every claim of the compatibility table holds, or fails, as it is recorded."""

from pathlib import Path

import pytest

from benchmarks import results, tables
from tests.conformance import CONTESTANTS, OURS, ROWS, Contestant, Row
from tests.versions import TORCH

RECORDED = results.load(results.RESULTS / "conformance.json")
VERDICTS = {(r["section"], r["title"]): r for r in RECORDED["rows"]}
#: Since which torch 2 a row holds, of AdamW as well or of models with a hook.
SINCE = {
    "`SequentialLR` of `LinearLR` and `StepLR`": 9,
    "`torch.export` while the optimizer lives": 9,
    "`torch.compile`: `nn.Sequential`, compiled after construction": 13,
    "`torch.compile`: `nn.Sequential`, compiled, the optimizer gets the original": 13,
    "`torch.compile(dynamic=True)`, training and evaluation in turn": 13,
}
TRIED = [(row, c) for row in ROWS for c in CONTESTANTS if c.name in row.applies_to]


@pytest.mark.parametrize(
    ("row", "contestant"),
    TRIED,
    ids=[f"{c.name}: {row.section}: {row.title}" for row, c in TRIED],
)
def test_row_is_as_recorded(row: Row, contestant: Contestant) -> None:
    if (2, SINCE.get(row.title, 0)) > TORCH:
        pytest.skip(f"torch before 2.{SINCE[row.title]} does it otherwise")
    recorded = VERDICTS[row.section, row.title][contestant.name]
    if recorded == "yes":
        row.check(contestant)
        return
    verdict, _ = row.measure(contestant)
    assert (recorded, verdict) == ("no", "no"), "Measure anew: the row holds by now."


def test_recorded_are_exactly_the_rows_of_the_suite() -> None:
    titles = [(row.section, row.title) for row in ROWS]
    assert len(set(titles)) == len(titles)
    assert [(r["section"], r["title"]) for r in RECORDED["rows"]] == titles
    for row, record in zip(ROWS, RECORDED["rows"], strict=True):
        for contestant in CONTESTANTS:
            applies = contestant.name in row.applies_to
            assert (record[contestant.name] != "–") == applies
        assert OURS.name in row.applies_to


def test_the_page_shows_every_recorded_row() -> None:
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    table = (
        page.read_text("utf-8")
        .split("<!-- table: conformance -->\n")[1]
        .split("<!-- end -->")[0]
    )
    assert table == tables.conformance(RECORDED).markdown() + "\n"
    for record in RECORDED["rows"]:
        cells = (record["title"], *(record[c.name] for c in CONTESTANTS))
        assert f"| {' | '.join(cells)} |" in table


def test_a_row_that_fails_is_found_out() -> None:
    def run(make: Contestant) -> None:
        assert make is OURS, "not ours\nsecond line"

    row = Row("section", "title", run, (OURS.name, "AdamW"))
    measured = {c.name: row.measure(c) for c in CONTESTANTS}
    no = ("no", "AssertionError: not ours")
    assert measured == {"SIRFShampoo": ("yes", None), "AdamW": no}
    alone = Row("section", "title", run, (OURS.name,))
    assert alone.measure(CONTESTANTS[1]) == ("–", None)
