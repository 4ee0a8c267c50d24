"""The training benchmark: fair, repeatable, resumable, and counted right."""

import json
import subprocess
import sys
import types
from math import inf, log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import environment, optimizers, report, results
from benchmarks.training import (
    clock,
    data,
    options,
    plan,
    spaces,
    summary,
    tables,
    trial,
)
from benchmarks.training import command as train
from benchmarks.training.spaces import CONTESTANTS, MAIN, Choice, Contestant, LogUniform
from benchmarks.training.store import Store
from benchmarks.training.tasks import MADE_ON, QUICK, TASKS
from sirfshampoo import SIRFShampoo

SGD = {"lr": 0.05, "momentum": 0.9}
OWN_OR_TORCH = [
    name for name, c in CONTESTANTS.items() if c.builder not in optimizers.PACKAGE_OF
]


def spec(task: str = "digits-mlp", **changes: Any) -> dict[str, Any]:
    options = {"builder": "sgd", "settings": SGD, "seed": 1, "steps": 3} | changes
    return trial.spec_of(task, **options)


# ------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("task", MADE_ON)
def test_three_steps_of_every_task(task: str) -> None:
    record = trial.run(spec(task), curve=False)
    assert record["diverged"] is None
    assert record["data"] == TASKS[task].load().hash
    for part in summary.LOSSES:
        assert 0 < record[part] < 1.1 * record["untrained"]
    assert (record["accuracy"] is None) == (not TASKS[task].has_classes)


@pytest.mark.parametrize("name", ["text", "digits", "mnist", "regression"])
def test_the_parts_of_a_data_set_share_no_example(name: str) -> None:
    found = data.load(name)
    parts = (found.val, found.test) if name == "text" else vars(found).values()
    rows = [
        row.numpy().tobytes()
        for part in parts
        if isinstance(part, data.Part)
        for row in part.inputs
    ]
    assert len(set(rows)) > 0.99 * len(rows)  # some digits look alike
    if name == "text":  # the last training windows end before the others begin
        last = found.train.inputs[-1]
        assert not any(
            torch.equal(last[i:], part.inputs[0][: len(last) - i])
            for part in parts
            for i in range(data.CONTEXT - 8)
        )


def test_regression_is_as_ill_conditioned_as_it_says() -> None:
    inputs = data.load("regression").train.inputs.double()
    hessian = inputs.mT @ inputs / len(inputs)
    values = torch.linalg.eigvalsh(hessian)
    assert values[-1] / values[0] == pytest.approx(1e4, rel=0.5)  # a sample of it
    record = trial.run(spec("regression"), curve=False)
    assert record["untrained"] == pytest.approx(1, rel=0.1)


def test_a_rotation_changes_nothing_for_plain_gradients() -> None:
    plain = trial.run(spec("logistic", steps=20), curve=False)
    rotated = trial.run(spec("logistic-rotated", steps=20), curve=False)
    assert rotated["test"] == pytest.approx(plain["test"], rel=1e-3)
    adam = {"builder": "adamw", "settings": {"lr": 0.01, "beta2": 0.99}, "steps": 20}
    plain = trial.run(spec("logistic", **adam), curve=False)
    rotated = trial.run(spec("logistic-rotated", **adam), curve=False)
    assert rotated["test"] != pytest.approx(plain["test"], rel=0.02)


# -------------------------------------------------------------------------- runs


def test_a_run_repeats_and_has_a_curve() -> None:
    first, again = (trial.run(spec(steps=40), curve=True) for _ in range(2))
    for record in (first, again):
        record.pop("seconds")
    assert first == again
    assert list(first["curve"]) == [str(2 * i) for i in range(trial.POINTS + 1)]
    assert first["curve"]["40"] == first["test"]
    assert first["curve"]["0"] == pytest.approx(log(10), rel=0.05)
    other = trial.run(spec(steps=40, seed=2), curve=False)
    assert other["test"] != first["test"]
    assert trial.key_of(spec()) != trial.key_of(spec(lr_factor=2.0))


def test_a_factor_on_the_rate_is_a_rate() -> None:
    twice = trial.run(spec(lr_factor=2.0), curve=False)
    direct = trial.run(spec(settings=SGD | {"lr": 0.1}), curve=False)
    assert twice["test"] == direct["test"]


def test_the_schedule_warms_up_then_falls() -> None:
    factors = [trial.warmup_cosine(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    cold = [trial.warmup_cosine(step, 100, warms=False) for step in range(100)]
    assert cold[0] == 1.0
    assert cold == sorted(cold, reverse=True)
    stays = [trial.warmup_cosine(step, 100, falls=False) for step in range(100)]
    assert stays == factors[:10] + [1.0] * 90


def test_a_contestant_may_have_another_schedule() -> None:
    flat = {"schedule": {"warms": False, "falls": False}}
    usual, other = (
        trial.run(spec(settings=SGD | more), curve=False)["test"] for more in ({}, flat)
    )
    assert usual != other
    for name in ("cold", "constant", "flat", "untold"):
        settings = spaces.CONTESTANTS[f"recipe-{name}"].draw("logistic", name, 0)
        record = trial.run(spec(builder="recipe", settings=settings), curve=False)
        assert record["diverged"] is None


def test_divergence_is_told() -> None:
    record = trial.run(spec(settings={"lr": 1e4}, steps=30), curve=True)
    assert "the batch's loss is" in record["diverged"]
    assert "val" not in record
    uphill = trial.run(spec(settings={"lr": 1.0, "maximize": True}), curve=False)
    assert "began at" in uphill["diverged"]
    assert summary.winner([record, uphill]) is None


def test_a_failed_decomposition_is_a_divergence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise torch.linalg.LinAlgError("did not converge\nmore")

    monkeypatch.setitem(
        optimizers.BUILDERS,
        "fails",
        lambda model, x: [Fails(model.parameters(), lr=1.0)],
    )
    record = trial.run(spec(builder="fails", settings={}), curve=False)
    assert record["diverged"] == "step 0: did not converge"


# ------------------------------------------------------------------- contestants


@pytest.mark.parametrize("name", OWN_OR_TORCH)
def test_every_contestant_trains(name: str) -> None:
    contestant = CONTESTANTS[name]
    drawn = contestant.draw("digits-mlp", name, 0)
    described = spec(builder=contestant.builder, settings=drawn, steps=2)
    described = json.loads(json.dumps(described))  # as it comes from a file
    training = trial.Training(described)
    before = [p.clone() for p in training.model.parameters()]
    for _ in range(2):
        assert training.step().isfinite()
    moved = [
        not torch.equal(p, old)
        for p, old in zip(training.model.parameters(), before, strict=True)
    ]
    assert all(moved)


def test_settings_reach_our_optimizer() -> None:
    settings = {"T": 10, "preconditioner_dtypes": "bfloat16", "lam": 1e-5}
    settings |= {"structures": {"1": "diagonal", "2": "dense"}}
    (built,) = optimizers.build("sirfshampoo", nn.Linear(3, 2), settings)
    assert isinstance(built, SIRFShampoo)
    group = built.param_groups[0]
    assert (group["T"], group["lam"]) == (10, 1e-5)
    assert group["structures"] == ("dense", "dense")
    assert group["preconditioner_dtypes"] == (torch.bfloat16, torch.bfloat16)


def test_a_builder_is_told_what_it_wants_to_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ours(model: nn.Module, settings: dict[str, Any]) -> list[torch.optim.Optimizer]:
        return [SIRFShampoo(model, **settings)]

    monkeypatch.setitem(optimizers.BUILDERS, "told", ours)
    monkeypatch.setitem(optimizers.WANTS, "told", ("batch_size",))
    described = spec(builder="told", settings={"lr": 0.1}, batch_size=7)
    (built,) = trial.Training(described).optimizers
    assert isinstance(built, SIRFShampoo)
    assert built.batch_size == 7


def test_editions_are_named() -> None:
    assert optimizers.edition("soap") == "pytorch-optimizer==4.1.0"
    assert optimizers.edition("adamw") == f"torch=={torch.__version__}"
    assert len(optimizers.edition("sirfshampoo")) == 8


def test_muon_computes_in_what_the_processor_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    start, gradient = torch.randn(2, 24, 16).unbind(0)
    moves = {}
    for is_able in (True, False):
        monkeypatch.setattr(environment, "multiplies_bfloat16", lambda x=is_able: x)
        model = nn.Linear(16, 24, bias=False)
        model.weight.data.copy_(start)
        (muon,) = optimizers.build("muon", model, options)
        model.weight.grad = gradient.clone()
        muon.step()
        moves[is_able] = model.weight.data - start
        assert optimizers.edition("muon").endswith("in float32") == (not is_able)
        assert not optimizers.edition("adamw").endswith("in float32")
    difference = (moves[True] - moves[False]).norm() / moves[True].norm()
    assert 1e-4 < difference < 0.02  # the rounding of bfloat16, and no more
    assert gradient.bfloat16().dtype == torch.bfloat16  # as before


def test_muon_gets_hidden_matrices_alone() -> None:
    model = TASKS["transformer"].model(data.load("text"))
    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}
    muon, adamw = optimizers.build("muon", model, options)
    assert len(muon.param_groups[0]["params"]) == 2 * 4
    everyone = len(list(model.parameters()))
    assert len(adamw.param_groups[0]["params"]) == everyone - 2 * 4
    (alone,) = optimizers.build("muon", nn.Linear(2, 2, bias=False), options)
    assert isinstance(alone, torch.optim.Muon)


def test_peers_get_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Peer(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, **options: Any) -> None:
            super().__init__(params, lr)
            asked.append({"lr": lr, **options})

    peers = types.ModuleType("pytorch_optimizer")
    peers.SOAP = Peer  # type: ignore[attr-defined]
    balls, tools = types.ModuleType("heavyball"), types.ModuleType("heavyball.utils")
    balls.utils = tools  # type: ignore[attr-defined]
    balls.KLShampoo = balls.PSGDKron = Peer  # type: ignore[attr-defined]
    for module in (peers, balls, tools):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("soap", "kl-shampoo", "psgd-kron"):
        drawn = CONTESTANTS[name].draw("lstm", name, 0)
        optimizers.build(CONTESTANTS[name].builder, nn.Linear(2, 2), drawn)
        found = asked[-1]
        assert found["lr"] == drawn["lr"]
        if name == "psgd-kron":
            assert found == drawn
        else:
            assert found["betas"][1] == drawn["beta2"]
            assert found["precondition_frequency"] == 10
    assert tools.compile_mode is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_able", [True, False])
def test_normuon_gets_hidden_matrices_in_a_group_of_their_own(
    monkeypatch: pytest.MonkeyPatch, is_able: bool
) -> None:
    class NorMuon(torch.optim.SGD):
        def __init__(self, groups: Any, update_scale: str) -> None:
            super().__init__(groups, lr=9.0)
            assert update_scale == "match_rms"

    def newton_schulz(dtype: torch.dtype = torch.bfloat16) -> torch.dtype:
        return dtype

    peers = {
        name: types.ModuleType(f"pytorch_optimizer{name}")
        for name in ("", ".optimizer", ".optimizer.muon", ".optimizer.utils")
    }
    for module in peers.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    inside = types.SimpleNamespace(zero_power_via_newton_schulz_5=newton_schulz)
    base = types.SimpleNamespace(zero_power_via_newton_schulz_5=newton_schulz)
    peers[""].NorMuon = NorMuon  # type: ignore[attr-defined]
    peers[".optimizer.muon"].base = base  # type: ignore[attr-defined]
    peers[".optimizer.utils"].matrix = inside  # type: ignore[attr-defined]
    monkeypatch.setattr(environment, "multiplies_bfloat16", lambda: is_able)
    drawn = CONTESTANTS["normuon"].draw("lstm", "normuon", 0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    (built,) = optimizers.build("normuon", model, drawn)
    hidden, others = built.param_groups
    assert [p.ndim for p in hidden["params"]] == [2, 2]
    assert [p.ndim for p in others["params"]] == [1, 1]
    assert (hidden["lr"], others["lr"]) == (drawn["lr"], drawn["adamw_lr"])
    assert (hidden["use_muon"], others["use_muon"]) == (True, False)
    assert base.zero_power_via_newton_schulz_5() == (
        torch.bfloat16 if is_able else torch.float32
    )


# ------------------------------------------------------------------------ search


def test_draws_follow_from_names_alone() -> None:
    adamw = CONTESTANTS["adamw"]
    first = [adamw.draw("lstm", "adamw", i) for i in range(50)]
    assert first == [adamw.draw("lstm", "adamw", i) for i in range(50)]
    assert first[0] == {"lr": 0.00167, "beta2": 0.99, "weight_decay": 0.01}
    assert adamw.draw("digits-mlp", "adamw", 0) != first[0]
    rates = [drawn["lr"] for drawn in first]
    assert len(set(rates)) > 45
    assert all(3e-4 <= rate <= 1e-1 for rate in rates)
    # uniform in the logarithm
    assert 15 <= sum(rate < 5e-3 for rate in rates) <= 35
    assert {drawn["beta2"] for drawn in first} == {0.95, 0.99, 0.999}


def test_all_search_alike() -> None:
    args = train.parse(["--trials", "7"])
    specs = plan.search_specs("lstm", CONTESTANTS, args)
    searched = {name for name, c in CONTESTANTS.items() if c.searched}
    assert set(specs) == searched
    assert {len(found) for found in specs.values()} == {7}
    for found in specs.values():
        assert {(s["steps"], s["batch_size"], s["seed"]) for s in found} == {
            (400, 32, trial.SEARCH_SEED)
        }
        assert len({trial.key_of(s) for s in found}) == 7
    for name in searched:
        free = [
            x
            for x in CONTESTANTS[name].settings.values()
            if isinstance(x, LogUniform | Choice)
        ]
        assert len(free) == 3
    assert set(MAIN) <= set(CONTESTANTS)
    assert set(QUICK) <= set(TASKS)


def test_winners_have_other_seeds_and_fixed_settings_other_rates() -> None:
    args = train.parse(["--seeds", "2", "--lr-factors", "4", "0.25"])
    finals = plan.final_specs(
        "lstm", {"adamw": {"lr": 1}, "sirf": None, "sirf-defaults": {}}, args
    )
    assert [(s["seed"], s["lr_factor"]) for s in finals["adamw"]] == [(1, 1), (2, 1)]
    tried = [(s["seed"], s["lr_factor"]) for s in finals["sirf-defaults"]]
    assert tried == [(seed, f) for f in (0.25, 1, 4) for seed in (1, 2)]
    assert "sirf" not in finals  # all of its trials diverged


# ------------------------------------------------------------------------ resume

ARGUMENTS = ["--task", "digits-mlp", "--contestant", "sgd", "adamw", "sirf-defaults"]
ARGUMENTS += ["--trials", "3", "--seeds", "2", "--steps", "4", "--rounds", "1"]
RUNS = 2 * 3 + 2 * 2 + 3 * 2  # trials, winners, three rates of fixed settings


def arguments(folder: Path, *more: str) -> list[str]:
    places = ["--results", str(folder), "--store", str(folder / "store")]
    return [*ARGUMENTS, *places, "--jobs", "2", *more]


def measured(folder: Path) -> dict[str, Any]:
    """Load a result without what is measured: time, and where."""
    result = results.load(folder / "digits-mlp-4steps.json")
    for entry in result["entries"]:
        del entry["seconds"]
    return {key: result[key] for key in ("points", "data", "entries")}


def lines(folder: Path) -> list[str]:
    return (folder / "store" / "digits-mlp.jsonl").read_text().splitlines()


def test_a_killed_search_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train.main(arguments(whole)) == 0
    assert len(lines(whole)) == RUNS + 1  # and the time
    command = [sys.executable, "-m", "benchmarks.train", *arguments(killed)]
    with subprocess.Popen(
        command, cwd=environment.ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(4):  # a line for each run that is finished
            process.stdout.readline()
        process.kill()
    path = killed / "store" / "digits-mlp.jsonl"
    kept = path.read_text()
    assert 4 <= kept.count("\n") < RUNS
    path.write_text(kept + kept[:100])  # cut amid a line
    assert train.main(arguments(killed)) == 0
    assert measured(killed) == measured(whole)
    again = lines(killed)
    assert again[: kept.count("\n")] == kept.splitlines()
    assert len(again) == RUNS + 2  # the one that was cut, too

    assert train.main(arguments(killed)) == 0
    assert lines(killed) == again  # nothing ran twice
    check_result(results.load(whole / "digits-mlp-4steps.json"))
    assert (whole / "digits-mlp-4steps.png").read_bytes().startswith(b"\x89PNG")


def check_result(result: dict[str, Any]) -> None:
    assert result["points"][-1] == 4
    found = {e.name: e for e in summary.entries(result)}
    assert list(found) == ["sgd", "adamw", "sirf-defaults"]
    for name, e in found.items():
        assert e.diverged_trials()[1] == (3 if name != "sirf-defaults" else 0)
        assert e.diverged(1.0)[1] == 2
        assert e.seconds is not None
        assert e.seconds == sorted(e.seconds)
        assert e.seconds[-1] > 0
    assert found["sirf-defaults"].factors() == [0.5, 1, 2]
    adamw = found["adamw"].record
    trials = summary.rows(adamw["trials"])
    winner = min((t for t in trials if not t["diverged"]), key=lambda t: t["val"])
    assert winner["lr"] == adamw["settings"]["lr"]


def test_a_longer_search_and_other_contestants_join(tmp_path: Path) -> None:
    short = ["--task", "digits-mlp", "--steps", "3", "--seeds", "1", "--rounds", "0"]
    places = ["--results", str(tmp_path), "--store", str(tmp_path / "store")]
    assert train.main([*short, *places, "--trials", "1", "--contestant", "sgd"]) == 0
    assert train.main([*short, *places, "--trials", "2", "--contestant", "sgd"]) == 0
    joined = [*short, *places, "--trials", "2", "--contestant", "sirf-defaults"]
    assert train.main([*joined, "--lr-factors", "1"]) == 0
    result = results.load(tmp_path / "digits-mlp-3steps.json")
    assert [e["name"] for e in result["entries"]] == ["sgd", "sirf-defaults"]
    assert len(result["entries"][0]["trials"]["val"]) == 2
    assert all(e["seconds"] is None for e in result["entries"])
    assert len(lines(tmp_path)) <= 2 + 2 + 1  # the winner may have changed
    before = lines(tmp_path)
    assert train.main([*joined, "--lr-factors", "1", "--fresh"]) == 0
    assert len(lines(tmp_path)) == len(before) + 1


def test_an_error_is_no_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Contestant("wrong", "sgd", {"lr": 0.1, "momentous": 1})
    monkeypatch.setitem(CONTESTANTS, "sgd", wrong)
    given = ["--task", "digits-mlp", "--contestant", "sgd", "--steps", "2"]
    places = ["--results", str(tmp_path), "--store", str(tmp_path / "store")]
    assert train.main([*given, *places, "--seeds", "1"]) == 1
    assert "momentous" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json*"))


def test_runs_on_other_data_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    record = trial.run(spec(steps=1), curve=False)
    Store(path, record["data"]).add(record)
    assert Store(path, record["data"]).find(spec(steps=1)) == record
    assert Store(path, "other").find(spec(steps=1)) is None


def test_each_turn_counts_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    seconds = iter([1.0, 20.0, 3.0, 4.0, 9.0, 2.0, 1.0, 8.0])

    class Fake:
        def __init__(self, work: Any, argument: dict[str, Any]) -> None:
            self.name = argument["name"]

        def ask(self, steps: int) -> float:
            asked.append((self.name, steps))
            return next(seconds)

        def close(self) -> None:
            asked.append((self.name, 0))

    monkeypatch.setattr(clock, "Process", Fake)
    both = {name: {"steps": 15, "name": name} for name in "ab"}
    found = clock.measure(both, rounds=2)
    turns = [("a", 10), ("b", 10), ("b", 5), ("a", 5), ("b", 0), ("a", 0)]
    assert asked == turns * 2
    # a: 1 and 9, then 4 and 8; b: 20 and 2, then 3 and 1
    assert found["steps"] == [0, 10, 15]
    assert found["seconds"] == {"a": [0, 1, 5], "b": [0, 2, 3]}


# ------------------------------------------------------------------------ tables


def run_of(curve: list[float], seed: int = 1, factor: float = 1.0) -> dict[str, Any]:
    losses = {"train": curve[-1] / 2, "val": curve[-1], "test": curve[-1]}
    run = {"seed": seed, "lr_factor": factor, **losses, "accuracy": 50.0}
    return run | {"diverged": None, "curve": curve}


def columns(*runs: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: [run[key] for run in runs] for key in runs[0]}


def small_result() -> dict[str, Any]:
    """Make a result: AdamW ends at 2 after 20 steps, ours is there after 5."""
    trials = {"lr": [0.1, 0.2], "val": [2.0, None], "diverged": [None, "boom"]}
    base = {"builder": "adamw", "searched": True, "settings": {"lr": 0.1}}
    base |= {"space": {"lr": "0.1 … 1"}, "code": ["abc"]}
    base |= {"why_no_seconds": None, "trials": trials}
    adamw = {"name": "adamw", "title": "AdamW", "seconds": [0.0, 1.0, 2.0]}
    adamw["runs"] = columns(run_of([4.0, 3.0, 1.0]), run_of([4.0, 3.0, 3.0], seed=2))
    ours = {"name": "ours", "title": "Ours", "seconds": [0.0, 3.0, 6.0]}
    ours |= {"builder": "sirfshampoo", "searched": False, "trials": {}}
    lost = run_of([9.0], factor=2.0) | {"diverged": "step 1: boom", "curve": []}
    ours["runs"] = columns(run_of([3.0, 1.0, 0.5]), lost)
    env = results.load(results.RESULTS / "gpt256.json")["environment"]
    result: dict[str, Any] = {"name": "digits-mlp", "title": "a task", "steps": 20}
    result |= {"batch_size": 8, "points": [0, 10, 20], "environment": env}
    result |= {"data": {"origin": "here", "hash": "x"}, "clock": None}
    return result | {"entries": [base | adamw, base | ours]}


def test_the_table_counts_right() -> None:
    grid = tables.task(small_result())
    adamw, ours = grid.lines
    assert adamw[1:4] == ("2 ± 1.4", "2 ± 1.4", "1 ± 0.71")
    assert adamw[5:] == ("1 of 2, 0 of 2", "100.00", "20", "2.00")
    assert ours[0] == "Ours (no search)"
    assert ours[1] == "**0.5**"
    # From 3 to 1 in ten steps, or three seconds: 2 lies in the middle.
    assert ours[5:] == ("–, 0 of 1", "300.00", "5", "1.50")
    assert "2 trials of random search" in grid.notes[0]


def test_overviews_compare_tasks() -> None:
    result = small_result()
    losses = tables.all_tasks([result])
    assert losses.header == ("", "digits-mlp")
    assert losses.lines == [("AdamW", "2 ± 1.4"), ("Ours", "**0.5**")]
    soon = tables.time_to_adamw([result])
    assert soon.lines == [("AdamW", "1.00 (1.00)"), ("Ours", "0.25 (0.75)")]
    bare = tables.factors([result])
    assert bare.header[1:] == ("lr × 1", "lr × 2", "diverged")
    assert bare.lines == [("Ours: digits-mlp", "0.5", "diverged", "1 of 2")]
    assert tables.spaces([result]).lines[0] == ("AdamW", "adamw", "`lr` 0.1 … 1")


def test_unequal_searches_are_told() -> None:
    result = small_result()
    other = result["entries"][0] | {"name": "sgd", "trials": {}}
    result["entries"].append(other)
    assert any("Not all had as many trials" in x for x in tables.task(result).notes)


def test_different_code_of_ours_is_told() -> None:
    result = small_result()
    result["entries"][0]["code"] = ["torch==2.6"]
    assert not any("not the same" in x for x in tables.task(result).notes)
    result["entries"][1]["code"] = ["abc", "def"]
    assert any("not the same for all: abc, def" in x for x in tables.task(result).notes)


def test_a_loss_that_is_never_reached() -> None:
    assert summary.first_below([0, 10], [3.0, 2.0], 1.0) == inf
    assert summary.first_below([0, 10], [3.0, 2.0], 3.5) == 0
    result = small_result()
    result["entries"][0]["runs"]["diverged"][0] = "boom"  # half of AdamW's
    (adamw, _) = summary.entries(result)
    assert adamw.steps_to(3.5) == inf
    assert tables.time_to_adamw([result]).lines[1] == ("Ours", "–")


def test_the_report_fills_texts_and_draws(tmp_path: Path) -> None:
    text = tmp_path / "TEXT.md"
    names = ("test_losses", "time_to_adamw", "factors", "spaces", "tasks")
    marker = "<!-- table: {} -->\n<!-- end -->"
    text.write_text("\n\n".join(marker.format(name) for name in names))
    given = ["--readme", str(text), "--results", str(tmp_path)]
    assert report.main(given) == 1  # there are no results yet
    results.save(small_result(), tmp_path / "train" / "digits-mlp.json")
    results.save(small_result(), tmp_path / "train" / "digits-mlp-B8.json")
    assert report.main(given) == 0
    found = text.read_text()
    assert "| Ours | **0.5** |" in found
    assert "| AdamW | adamw | `lr` 0.1 … 1 |" in found
    assert "### digits-mlp: a task" in found
    assert (tmp_path / "train" / "digits-mlp.png").read_bytes()[:4] == b"\x89PNG"
    assert report.main([*given, "--check"]) == 0


def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--trials", "0"], ["--rounds", "-1"], ["--lr-factors", "0"]):
        with pytest.raises(SystemExit):
            train.parse(wrong)
    text = capsys.readouterr().err
    assert "needs a whole number >= 1, got '0'" in text
    assert "--rounds must be at least 0" in text
    assert "--lr-factors must be positive" in text
    quick, full = train.parse(["--quick"]), train.parse([])
    assert (quick.trials, full.trials) == (options.QUICK_TRIALS, options.TRIALS)
    assert quick.results != full.results
    assert train.parse(["--lr-factors", "3"]).lr_factors == [1.0, 3.0]


def test_contestants_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in MAIN)
    assert "0.0003 … 0.1" in listed
    assert str(spaces.CONTESTANTS["sgd"].settings["nesterov"]) == "False, True"
