"""The held-out tasks: they train, are run together, and stand in a table."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import optimizers, report, results
from benchmarks.training import command as train
from benchmarks.training import data, held_out_models, parts, trial
from benchmarks.training.spaces import CONTESTANTS, ON_HELD_OUT
from benchmarks.training.tasks import HELD_OUT, MADE_ON, TASKS

CHEAP = ("factorization", "deep-plain", "deep-residual", "vae", "friedman-raw")
CHEAP += ("fine-tuning", "adapters", "actor-critic")
MUON = {"lr": 3e-3, "adamw_lr": 3e-3, "momentum": 0.95, "weight_decay": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {"recipe": {}, "muon": MUON}


def training(task: str, builder: str, steps: int) -> trial.Training:
    settings = SETTINGS[builder]
    return trial.Training(trial.spec_of(task, builder, settings, seed=1, steps=steps))


# ------------------------------------------------------------------------- tasks


def test_the_tasks_are_told_apart() -> None:
    assert len(MADE_ON) == 11
    assert {*MADE_ON, *HELD_OUT} == set(TASKS)
    assert not set(MADE_ON) & set(HELD_OUT)
    assert len({task.title for task in TASKS.values()}) == len(TASKS)


@pytest.mark.parametrize("builder", SETTINGS)
@pytest.mark.parametrize("task", HELD_OUT)
def test_three_steps_of_every_task(task: str, builder: str) -> None:
    run = training(task, builder, steps=3)
    before = [p.clone() for p in run.model.parameters()]
    losses = [run.step() for _ in range(3)]
    assert torch.stack(losses).isfinite().all()
    moved = [
        not torch.equal(p, old)
        for p, old in zip(run.model.parameters(), before, strict=True)
    ]
    assert moved == [p.requires_grad for p in run.model.parameters()]


@pytest.mark.parametrize("builder", SETTINGS)
@pytest.mark.parametrize("task", CHEAP)
def test_a_short_run_learns(task: str, builder: str) -> None:
    spec = trial.spec_of(task, builder, SETTINGS[builder], seed=1, steps=40)
    record = trial.run(spec, curve=False)
    assert record["diverged"] is None
    assert 0 < record["test"] < 0.97 * record["untrained"]
    assert (record["accuracy"] is None) == (not TASKS[task].has_classes)


@pytest.mark.parametrize(
    "name",
    ["friedman", "ratings", "boundary problem", "adding", "low digits", "starts"],
)
def test_the_parts_of_a_data_set_share_no_example(name: str) -> None:
    found = data.load(name)
    rows = [
        row.numpy().tobytes()
        for part in (found.train, found.val, found.test)
        for row in part.inputs
    ]
    assert len(set(rows)) > 0.99 * len(rows)


@pytest.mark.parametrize(("name", "context"), [("source", 64), ("long source", 128)])
def test_source_code_is_cut_into_windows(name: str, context: int) -> None:
    found = data.load(name)
    assert found.train.inputs.shape[1] == context
    assert 64 <= len(found.test) <= parts.WINDOWS
    assert torch.equal(found.val.inputs[:, 1:], found.val.targets[:, :-1])
    assert 90 < found.classes < 130  # ASCII


def test_targets_come_as_they_are() -> None:
    assert data.load("ratings").train.targets.mean() == pytest.approx(3.5, abs=0.15)
    assert data.load("friedman").train.targets.mean() == pytest.approx(14.4, abs=0.3)


# ---------------------------------------------------------------------- networks


def test_the_exact_solution_leaves_no_residual() -> None:
    class Exact(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (math.pi * x).sin()

    points = torch.rand(9, 1)
    wrong = held_out_models.residual_of_boundary_problem(Exact(), points)
    assert wrong < 1e-8


@pytest.mark.parametrize("builder", SETTINGS)
def test_the_residual_falls_and_the_error_is_told(builder: str) -> None:
    run = training("pinn", builder, steps=150)
    residuals = [run.step().item() for _ in range(150)]
    assert max(residuals[-5:]) < 0.95 * residuals[0]
    error, _ = run.score(run.data.test)  # of the solution
    assert 0 < error < 2


def test_layers_are_pretrained_alike_and_frozen() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    body = held_out_models._pretrained()
    assert torch.equal(torch.random.get_rng_state(), state)
    models = [TASKS["adapters"].model(data.load("high digits")) for _ in range(2)]
    frozen = [[p for p in m.parameters() if not p.requires_grad] for m in models]
    for p, q, r in zip(*frozen, body.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    assert not torch.equal(models[0].head.weight, models[1].head.weight)
    images = data.load("high digits").val.inputs
    assert torch.equal(models[0].body(images), body(images))  # adapters add 0 at first


def test_rotated_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 8).unsqueeze(1).expand(-1, 6, -1)  # the same everywhere
    products = held_out_models._rotated(q) @ held_out_models._rotated(k).mT
    for distance in range(-5, 6):
        found = products.diagonal(distance)
        torch.testing.assert_close(found, found[:1].expand_as(found))
    assert products[0, 0] == pytest.approx((q[0] @ k[0]).item(), rel=1e-4)


def test_adamw_beside_muon_may_have_its_own_rate() -> None:
    model = TASKS["vit"].model(data.load("digits"))
    muon, adamw = optimizers.build("muon", model, MUON | {"adamw_lr": 0.5})
    assert muon.param_groups[0]["lr"] == MUON["lr"]
    assert adamw.param_groups[0]["lr"] == 0.5
    assert CONTESTANTS["muon-tuned"].builder == "muon"


# ----------------------------------------------------------------------- command


def test_one_option_asks_for_all(tmp_path: Path) -> None:
    args = train.parse(["--held-out", "--workers", "32"])
    assert (args.task, args.contestant) == (HELD_OUT, ON_HELD_OUT)
    assert (args.trials, args.seeds, args.rounds, args.jobs) == (12, 3, 0, 32)
    assert args.lr_factors == [1.0]
    fewer = train.parse(["--held-out", "--task", "vae", "--trials", "2"])
    assert (fewer.task, fewer.trials) == (["vae"], 2)


def test_tasks_are_run_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--held-out", "--task", "adapters", "pinn", "--trials", "2"]
    given += ["--contestant", "adamw", "sirf-recipe", "--seeds", "1", "--steps", "3"]
    given += ["--results", str(tmp_path), "--store", str(tmp_path / "store")]
    assert train.main([*given, "--workers", "2"]) == 0
    shown = capsys.readouterr().out
    # All searches come before the winners' runs: neither task waits for the other.
    searches = [shown.index(f"{task}: adamw: ") for task in ("adapters", "pinn")]
    assert max(searches) < shown.index("sirf-recipe: ")
    names = ("adapters", "pinn")
    for name in names:
        result = results.load(tmp_path / f"{name}-3steps.json")
        assert [e["name"] for e in result["entries"]] == ["adamw", "sirf-recipe"]
        assert result["clock"] is None
    lines = [(tmp_path / "store" / f"{n}.jsonl").read_text() for n in names]
    assert [text.count("\n") for text in lines] == [2 + 1 + 1] * 2
    assert train.main([*given, "--workers", "2"]) == 0
    again = [(tmp_path / "store" / f"{n}.jsonl").read_text() for n in names]
    assert again == lines  # nothing ran twice


# ------------------------------------------------------------------------- table


def columns(losses: list[float], diverged: str | None = None) -> dict[str, list[Any]]:
    n = len(losses)
    found: dict[str, list[Any]] = {
        "seed": list(range(1, n + 1)),
        "lr_factor": [1.0] * n,
    }
    found |= {key: list(losses) for key in ("train", "val", "test")}
    found |= {"accuracy": [None] * n, "curve": [[2.0, loss] for loss in losses]}
    return found | {"diverged": [diverged, *[None] * (n - 1)]}


def result(name: str, **losses: dict[str, list[Any]]) -> dict[str, Any]:
    env = results.load(results.RESULTS / "gpt256.json")["environment"]
    base = {"builder": "adamw", "searched": True, "settings": {"lr": 0.1}}
    base |= {"space": {"lr": "0.1 … 1"}, "code": ["abc"]}
    base |= {"seconds": None, "why_no_seconds": None}
    base |= {"trials": {"lr": [0.1], "val": [2.0], "diverged": [None]}}
    entries = [base | {"name": n, "title": n, "runs": x} for n, x in losses.items()]
    whole = {"name": name, "title": TASKS[name].title, "steps": 9, "batch_size": 8}
    whole |= {"points": [0, 9], "environment": env, "clock": None}
    return whole | {"data": {"origin": "here", "hash": "x"}, "entries": entries}


def test_the_table_tells_what_was_not_run(tmp_path: Path) -> None:
    text = tmp_path / "TEXT.md"
    text.write_text("<!-- table: train_held_out -->\n<!-- end -->\n")
    given = ["--readme", str(text), "--results", str(tmp_path)]
    assert report.main(given) == 0
    bare = text.read_text()
    assert bare.count("not run") == len(HELD_OUT) * len(ON_HELD_OUT)
    found = result("vae", adamw=columns([1.0, 3.0, 5.0]), soap=columns([2.0, 4.0], "x"))
    found["entries"].append(found["entries"][0] | {"name": "muon-tuned", "runs": {}})
    results.save(found, tmp_path / "train" / "vae.json")
    assert report.main(given) == 0
    (line,) = (x for x in text.read_text().splitlines() if x.startswith("| vae"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    lost = "4 (1 of 2 diverged)"
    assert cells == ["**3 ± 1.2**", "diverged", "not run", lost, "not run"]
    assert "2 or 3 seeds" in text.read_text()


def test_other_tables_leave_held_out_tasks_out(tmp_path: Path) -> None:
    for name in ("vae", "lstm"):
        one = result(name, adamw=columns([1.0]))
        results.save(one, tmp_path / f"{name}.json")
    assert [found["name"] for found in report.trained(tmp_path)] == ["lstm"]
