"""The README's table and picture, from committed results and from fewer."""

from pathlib import Path

from benchmarks import front, report, results

TRAINED = report.trained(results.RESULTS / "train")


def test_the_table_has_at_most_eight_lines_and_the_cost_of_the_recipes_step() -> None:
    grid = front.table(TRAINED, results.RESULTS / "gpu")
    assert len(grid.lines) <= 8
    assert all(len(line) == len(grid.header) for line in grid.lines)
    (line,) = [line for line in grid.lines if line[0] == "SIRFShampoo, the recipe"]
    cells = dict(zip(grid.header, line, strict=True))
    assert cells["step, GPU"].endswith(" ×")
    (unit,) = [line for line in grid.lines if line[0] == "AdamW"]
    cells = dict(zip(grid.header, unit, strict=True))
    assert cells["step, CPU"] == "1.00 ×"
    assert cells["steps to AdamW's best"] == "100 %"


def test_the_lowest_loss_of_each_task_is_bold() -> None:
    grid = front.table(TRAINED, results.RESULTS / "gpu")
    for column in range(1, 1 + len(front.TASKS)):
        cells = [line[column] for line in grid.lines]
        (bold,) = [cell for cell in cells if cell.startswith("**")]
        numbers = [float(cell.strip("*")) for cell in cells if cell != "–"]  # not run
        assert float(bold.strip("*")) == min(numbers)


def test_without_a_visit_to_a_gpu_there_is_no_column_of_it(tmp_path: Path) -> None:
    grid = front.table(TRAINED, tmp_path)
    assert "step, GPU" not in grid.header
    assert "GPU" not in grid.notes[0]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    (result,) = [r for r in TRAINED if r["name"] == front.PICTURE_TASK]
    front.picture(result, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_that_are_there_are_not_drawn_again(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    name = f"{front.PICTURE_TASK}.json"
    (folder / name).write_bytes((results.RESULTS / "train" / name).read_bytes())
    assert sorted(report.draw(tmp_path, missing=True)) == [
        "front.png",
        f"train/{front.PICTURE_TASK}.png",
    ]
    assert list(report.draw(tmp_path, missing=True)) == []
