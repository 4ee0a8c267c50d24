"""Very long runs stay finite, keep their memory and learn; a shorter one does, too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, results, soak
from tests.cases import STRUCTURES

#: `make soak` takes 20,000 steps; in the tests that would be most of their time.
LONG = 4_000


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", soak.DTYPES)
@pytest.mark.parametrize(
    "steps", [200, pytest.param(LONG, marks=pytest.mark.heavy)], ids=str
)
def test_long_runs_have_no_problems(structure: str, dtype: str, steps: int) -> None:
    record = soak.soak(structure, dtype, steps)
    limit = soak.LOSS_LIMIT if steps == LONG else record["loss"][0] / 3
    assert soak.problems(record, loss_limit=limit) == []
    assert record["loss"][0] > 2 * soak.LOSS_LIMIT
    for what in ("loss", "rss", "tensors", "finite"):
        assert len(record[what]) == soak.SAMPLES


GOOD: dict[str, Any] = {
    "structure": "dense",
    "dtype": "float32",
    "steps": 20,
    "seconds": 1.0,
    "skipped": 0,
    "loss": [0.7] + 19 * [0.01],
    "rss": 20 * [2**28],
    "tensors": [70] + 19 * [54],
    "finite": 20 * [True],
}


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        ({"finite": 19 * [True] + [False]}, "something was not finite"),
        ({"loss": 19 * [0.01] + [float("nan")]}, "something was not finite"),
        ({"skipped": 3}, "3 steps were sat out"),
        ({"tensors": [*range(20)]}, "18 tensors piled up"),
        ({"rss": [2**22 * i for i in range(20)]}, "memory grew by 75497472 bytes"),
        ({"loss": 20 * [0.7]}, "the loss ended at 0.7000"),
    ],
)
def test_problems_are_named(spoilt: dict[str, Any], problem: str) -> None:
    assert soak.problems(GOOD) == []
    assert problem in " and ".join(soak.problems(GOOD | spoilt))


def test_tensors_that_pile_up_are_counted() -> None:
    with soak.only_new_objects():
        before = soak.living_tensors()
        kept = [torch.zeros(1) for _ in range(7)]
        assert soak.living_tensors() == before + len(kept)
        del kept
        assert soak.living_tensors() == before


def test_the_command_writes_what_the_report_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--steps", "20", "--only", "^(dense|diagonal) bfloat16"]
    assert soak.main([*arguments, "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "diagonal, bfloat16: the loss ended at" in printed  # 20 steps are too few
    result = results.load(tmp_path / "soak.json")
    runs = [(run["structure"], run["dtype"]) for run in result["soaks"]]
    assert runs == [("dense", "bfloat16"), ("diagonal", "bfloat16")]
    assert result["environment"]["threads"] == 1

    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: soak soak -->\n<!-- end -->")
    files = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main(files) == 0
    first = result["soaks"][0]["loss"][0]
    assert f"| dense, bfloat16 | {first:.4f} → " in readme.read_text()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("wrong", ["0", "30", "many"])
def test_steps_that_are_not_whole_samples_are_refused(
    wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--steps", wrong])
    assert f"a positive multiple of 20, got '{wrong}'" in capsys.readouterr().err
