"""The visit to a GPU: all of it runs on the CPU, small, and is not taken for one."""

import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.ir import ComputedBuffer
from torch.fx import Graph

from benchmarks.environment import ROOT
from benchmarks.gpu import correct, driver, tables, text
from benchmarks.gpu.checks.failure import tell
from benchmarks.gpu.clock import elapsed
from benchmarks.gpu.contestants import CONTESTANTS, UNIT, groups
from benchmarks.gpu.shapes import WORKLOADS, Parameters
from benchmarks.gpu.step import wanted
from benchmarks.gpu.trace import summed
from benchmarks.gpu.train import factor, to_loss
from benchmarks.workloads import numbers

STAGES = list(driver.SHARES)
needs_text = pytest.mark.skipif(
    not text.DATA.exists(), reason="a source distribution comes without the text"
)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Go through every stage."""
    if not text.DATA.exists():
        pytest.skip("a source distribution comes without the text")
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--out", folder], cwd=ROOT, capture_output=True, text=True
    )
    found = {s: json.loads((folder / f"{s}.json").read_text()) for s in STAGES}
    return {"done": done, "folder": folder, **found}


def test_every_stage_is_ok(rehearsal: dict[str, Any]) -> None:
    done = rehearsal["done"]
    told = {s: (rehearsal[s]["status"], rehearsal[s].get("error")) for s in STAGES}
    assert told == dict.fromkeys(STAGES, ("ok", None)), done.stderr
    assert done.returncode == 0
    for stage in STAGES:
        assert f"== {stage} on cpu: ok" in done.stdout


def test_every_check_ran_and_those_of_gpus_do_not_count(
    rehearsal: dict[str, Any],
) -> None:
    checks = rehearsal["correct"]["checks"]
    assert {c["group"] for c in checks} == {*correct.GROUPS, "tests"}
    assert {c["status"] for c in checks} == {"ok", "not on this device"}
    of_gpus = [c for c in checks if c["status"] != "ok"]
    assert {c["group"] for c in of_gpus} >= {"waits", "graphs", "state", "tests"}
    files = rehearsal["correct"]["tests"]["files"]
    assert any("test_accelerator" in file for file in files)


def test_every_contestant_took_steps(rehearsal: dict[str, Any]) -> None:
    result = rehearsal["step"]
    assert result["not_reached"] == []
    every = [c for w in result["workloads"].values() for c in w["contestants"]]
    assert [(c["label"], c["error"]) for c in every if c["error"]] == []
    assert all(len(c["rounds"]) >= 2 for c in every)
    labels = {c.label for c in CONTESTANTS if c.title != "SOAP"}
    assert {c["label"] for c in every} >= labels
    seen = [c for c in every if c["worth"] == 0]
    assert all(c["launches_update"] > 0 for c in seen)
    assert all("launches_plain" in c for c in seen if c["T"] > 1)


def test_every_optimizer_learned(rehearsal: dict[str, Any]) -> None:
    result = rehearsal["train"]
    assert [run["name"] for run in result["runs"]] == ["AdamW", "recipe", "Muon"]
    for run in result["runs"]:
        assert len(run["train_losses"]) == run["steps"]
        assert run["curve"][-1]["val"] < run["train_losses"][0]
        assert 0 < run["optimizer_share"] < 1
        assert run["curve"][-1]["seconds"] >= run["seconds"]
    assert set(result["to_loss"]["reached"]) == {"AdamW", "recipe", "Muon"}


def test_a_rehearsal_is_no_result_of_a_gpu(rehearsal: dict[str, Any]) -> None:
    folder = rehearsal["folder"]
    assert tables.gpu_table(folder) == "*not measured on a GPU*"
    assert tables.gpu_details(folder) == "*not measured on a GPU*"


def test_tables_of_a_gpu_show_its_numbers(
    rehearsal: dict[str, Any], tmp_path: Path
) -> None:
    for stage in STAGES:
        result = json.loads(json.dumps(rehearsal[stage]))
        result["tiny"] = False
        result["environment"] |= {"kind": "cuda", "device": "Card", "cuda": "13.0"}
        (tmp_path / f"{stage}.json").write_text(json.dumps(result))
    short, long = tables.gpu_table(tmp_path), tables.gpu_details(tmp_path)
    for told in (short, long):
        assert "On Card, torch" in told
        assert "not measured" not in told
        for line in told.splitlines():
            if line.startswith("|"):
                assert line.endswith("|")
    assert "| dense, bfloat16, T=10 |" in short
    assert "| recipe |" in short
    assert "launches" in long


def test_what_is_committed_is_of_a_gpu() -> None:
    for stage in STAGES:
        result = tables.read(tables.RESULTS / f"{stage}.json")
        if result:
            assert tables.of_a_gpu(tables.RESULTS, stage) == result


# --- the driver -----------------------------------------------------------------------
def stage_of(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have every stage run a line of Python in place of its own."""
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        run = [sys.executable, "-c", f"import os, sys, time; {code}"]
        return real([*run, *command[3:]], **options)

    monkeypatch.setattr(driver.subprocess, "Popen", popen)


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("time.sleep(60)", "cut", None),
        ("os.kill(os.getpid(), 9)", "failed", "ended with -9"),
        ("sys.exit('no room')", "failed", "no room"),
        ("0", "ok", None),
    ],
)
def test_a_stage_that_ends_badly_does_not_touch_the_others(
    code: str,
    status: str,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    stage_of(monkeypatch, f"{code} if 'step' in sys.argv else None")
    monkeypatch.setattr(driver, "SHARES", {"machine": 3, "step": 1, "train": 3})
    found = driver.run_stages(["machine", "step", "train"], 20.0, [], tmp_path)
    assert found == {"machine": "ok", "step": status, "train": "ok"}
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["status"] == status
    assert (told or "") in result.get("error", "")
    assert "== step" in tables.screen(tmp_path)


def test_a_cut_keeps_what_was_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "train.json"
    written = '{"status": "running", "runs": [], "stage": "train"}'
    code = f"open({str(file)!r}, 'w').write({written!r}); time.sleep(60)"
    stage_of(monkeypatch, code)
    assert driver.run_stages(["train"], 2.0, [], tmp_path) == {"train": "cut"}
    assert json.loads(file.read_text())["runs"] == []


# --- the checks -----------------------------------------------------------------------
def test_a_compiler_that_fails_tells_its_line_and_node() -> None:
    def fail() -> None:
        node = Graph().placeholder("x")
        ComputedBuffer(name="buf7", layout=None, data=node).get_size()

    told = tell_of(fail)
    assert "Error at ir.py:" in told
    assert "on node buf7 (ComputedBuffer), from test_gpu.py:" in told
    assert "`ComputedBuffer(" in told


def test_an_error_without_a_compiler_tells_where_it_was() -> None:
    def fail() -> None:
        raise ValueError("too far")

    told = tell_of(fail)
    assert told.startswith("ValueError at test_gpu.py:")
    assert told.endswith("too far")
    assert "on node" not in told


def tell_of(fail: Callable[[], None]) -> str:
    with pytest.raises(Exception) as error:  # noqa: PT011 (any is to be told)
        fail()
    return tell(error.value)


# --- parts ----------------------------------------------------------------------------
def test_workloads_have_the_sizes_that_they_are_named_after() -> None:
    assert numbers(WORKLOADS["gpt2-small"]) == 124_439_808
    assert WORKLOADS["llama-4096"]["down_weight"] == (4096, 11008)
    assert list(WORKLOADS["4x2048"].values()) == 4 * [(2048, 2048)]
    assert set(WORKLOADS["100x64"].values()) == {(64, 64)}


def test_long_axes_and_vectors_beside_matrices_are_diagonal() -> None:
    shapes = {"long": (20000, 3), "square": (4, 4), "bias": (4,)}
    found = groups(Parameters(shapes, "cpu"), "dense")
    assert [list(g["structures"].values()) for g in found] == [
        [("diagonal", "dense")],
        [("dense", "dense")],
        [("diagonal",)],
    ]
    (alone,) = groups(Parameters({"bias": (4,)}, "cpu"), "dense")
    assert alone["structures"] == {1: ("dense",)}


def test_everyone_is_wanted_once_and_the_worthiest_first() -> None:
    found = wanted(WORKLOADS, ["100x64"])
    assert len(set(found)) == len(found)
    assert [c.worth for _, c in found] == sorted(c.worth for _, c in found)
    assert UNIT not in [c for _, c in found]
    assert {name for name, c in found if c.way == "compiled"} == {"100x64"}


def test_kernels_are_summed_by_name_and_overlap_is_busy_once() -> None:
    kernel = {"ph": "X", "cat": "kernel"}
    events = [
        kernel | {"name": "a", "ts": 0, "dur": 10},
        kernel | {"name": "b", "ts": 5, "dur": 10},
        kernel | {"name": "a", "ts": 30, "dur": 10},
        {"ph": "X", "cat": "cpu_op", "name": "c", "ts": 0, "dur": 99},
    ]
    seen = summed(events, ("kernel",))
    assert seen.kernels == [("a", 2, 20.0), ("b", 1, 10.0)]
    assert (seen.busy_us, seen.span_us, seen.launches) == (25.0, 40.0, 3)
    assert seen.record(1)["other_us"] == 10.0


def test_the_rate_rises_and_falls() -> None:
    assert factor(0.0) > 0
    assert factor(0.1) == pytest.approx(0.976, abs=1e-3)
    assert factor(1.0) == pytest.approx(0.0)


def test_the_loss_that_all_reach_is_that_of_the_worst() -> None:
    def run(name: str, *losses: float) -> dict[str, Any]:
        points = enumerate(losses)
        curve = [{"step": i, "seconds": i / 2, "val": loss} for i, loss in points]
        return {"name": name, "error": None, "curve": curve}

    found = to_loss([run("a", 9.0, 5.0, 4.0), run("b", 5.5, 4.9, 3.0)])
    assert found["val"] == 4.0
    assert found["reached"]["a"] == {"step": 2, "seconds": 1.0}
    assert found["reached"]["b"] == {"step": 2, "seconds": 1.0}
    assert to_loss([run("a"), run("b", 1.0)]) == {}


@needs_text
def test_the_text_is_whole_and_small() -> None:
    learnt, held_out, facts = text.load()
    assert len(learnt) + len(held_out) == facts["tokens"] >= 2_500_000
    assert len(held_out) == facts["validation_tokens"]
    assert int(learnt.min()) >= 0
    assert int(learnt.max()) < facts["vocabulary"]
    size = sum(path.stat().st_size for path in text.DATA.iterdir())
    assert size < 6_500_000
    for name in text.PACKAGES:
        assert (text.DATA / f"{name}.copyright.txt").exists()


@needs_text
def test_another_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = (text.DATA / "text.json").read_text()
    (tmp_path / "text.json").write_text(facts)
    (tmp_path / "text.xz").write_bytes(lzma.compress(b"\0\0"))
    monkeypatch.setattr(text, "DATA", tmp_path)
    with pytest.raises(ValueError, match="not the file"):
        text.load()


def test_time_is_that_of_one_call() -> None:
    calls = []
    time = elapsed(lambda: calls.append(torch.ones(3)), "cpu", 7)
    assert len(calls) == 7
    assert time.device == time.host > 0
