"""The README is short; its snippets, and those of all pages, run as written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import report, results
from benchmarks.training.spaces import ON_HELD_OUT
from benchmarks.training.summary import entries, lowest
from benchmarks.training.tasks import HELD_OUT
from sirfshampoo import SIRFShampoo

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LINES = 200
"""The most that the README may have."""

PAGES = {page.stem: page for page in sorted((ROOT / "docs").glob("*.md"))}
FRAMEWORKS = {
    page.stem: page for page in sorted((ROOT / "docs" / "frameworks").glob("*.md"))
}


def snippets_of(path: Path) -> list[str]:
    """Return the Python snippets of a page."""
    return re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


def supplied() -> dict[str, Any]:
    """Return what a reader has: a model, and data."""
    # an embedding and linear layers: what the snippets talk about
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3))
    data = [(torch.randint(7, (8,)), torch.randint(3, (8,))) for _ in range(3)]
    return {"model": model, "data": data}


def alone(snippet: str) -> dict[str, Any]:
    """Run a snippet with nothing but a model and data; return its names."""
    names = supplied()
    exec(compile(snippet, "snippet", "exec"), names)
    return names


def test_the_readme_fits_three_screens() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= LINES


def test_the_readme_has_one_picture_and_one_short_table() -> None:
    text = README.read_text("utf-8")
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert (ROOT / picture).exists()
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(table.splitlines()) - 2 <= 8


def test_the_readme_counts_the_tasks_on_which_the_recipe_is_the_best() -> None:
    numbers = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    numbers += ["nine", "ten", "eleven", "twelve", "thirteen", "fourteen"]
    best = []
    for result in report.loaded(results.RESULTS / "train", HELD_OUT):
        means = {e.name: e.mean("test") for e in entries(result)}
        if {"adamw", "muon-tuned", "soap"} <= set(means):
            best.append(lowest({who: means.get(who) for who in ON_HELD_OUT}))
    told = "Of (\\w+) tasks that it was not made on, it is the best on (\\w+);"
    (counts,) = re.findall(told, README.read_text("utf-8"))
    assert counts == (numbers[len(best)], numbers[best.count("sirf-recipe")])


@pytest.mark.parametrize("number", range(3))
def test_each_snippet_of_the_readme_runs_alone(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = snippets_of(README)
    assert len(snippets) == 3
    alone(snippets[number])


def test_the_first_snippet_of_the_readme_trains() -> None:
    names = alone(snippets_of(README)[0])
    assert names["optimizer"].global_step == len(names["data"])
    assert names["schedule"].last_epoch == len(names["data"])
    moved = names["optimizer"].diagnostics()
    assert all(x > 0 for name, x in moved.items() if name.endswith("/update_norm"))


@pytest.mark.parametrize("name", PAGES)
def test_the_snippets_of_a_page_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "loss_function": nn.functional.cross_entropy} | supplied()
    for snippet in snippets_of(PAGES[name]):
        exec(compile(snippet, name, "exec"), names)
    if name == "checkpoints":
        assert (tmp_path / "optimizer.pt").exists()
        assert (tmp_path / "optimizer.safetensors").exists()
    if name == "from_adamw":
        assert len(snippets_of(PAGES[name])) == 4
        SIRFShampoo(names["model"], **names["arguments"])


def test_the_first_training_prints_what_the_page_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (snippet,) = snippets_of(PAGES["start"])
    told = re.findall(
        r"^    step +(\d+)  loss (\S+)$", PAGES["start"].read_text(), re.M
    )
    exec(compile(snippet, "start", "exec"), {})
    printed = re.findall(r"step +(\d+)  loss (\S+)", capsys.readouterr().out)
    assert [step for step, _ in told] == [step for step, _ in printed]
    losses = [[float(loss) for _, loss in lines] for lines in (told, printed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec:FutureWarning")
# peft 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
@pytest.mark.parametrize(
    ("name", "number"),
    [(n, i) for n, page in FRAMEWORKS.items() for i in range(len(snippets_of(page)))],
)
def test_each_script_for_a_framework_runs_alone(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "timm":
        pytest.importorskip("timm", reason="timm wants a torchvision of torch's build")
    monkeypatch.chdir(tmp_path)
    snippet = snippets_of(FRAMEWORKS[name])[number]
    assert "adamw" in snippet.lower() if number % 2 else "recipe(" in snippet
    exec(compile(snippet, f"{name} {number}", "exec"), {"__name__": name})
