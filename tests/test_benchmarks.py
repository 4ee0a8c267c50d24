"""The benchmark: what it steps on, what it counts, what it writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, report, results, step
from benchmarks.agreement import difference
from benchmarks.contestants import CONTESTANTS, LIMITS, UNIT
from benchmarks.process import Worker, WorkerError
from benchmarks.worker import BATCH_SIZE, Entry, Model, gradients, held_bytes
from benchmarks.workloads import CONSTRUCTION, WORKLOADS, numbers

TINY = WORKLOADS["tiny"]()

LAZY = """
from torch.optim import SGD

class SIRFShampoo(SGD):
    def __init__(self, model, **settings):
        super().__init__(model.parameters(), lr=0.1)

    def step(self):
        print("this must not disturb the answers")
"""


def test_gpt_workload_has_the_shapes_of_a_gpt() -> None:
    shapes = WORKLOADS["gpt256"]()
    assert len(shapes) == 2 + 4 * 12 + 3
    block = 12 * 256**2 + (3 + 1 + 4 + 1 + 4) * 256
    assert numbers(shapes) == (96 + 64 + 96) * 256 + 4 * block + 2 * 256
    assert shapes["block3_qkv_weight"] == (768, 256)
    assert shapes["block0_fc2_weight"] == (256, 1024)
    assert shapes["head_weight"] == (96, 256)


def test_mlp_workloads() -> None:
    shapes = WORKLOADS["mlp100"]()
    assert len(shapes) == 200
    assert numbers(shapes) == 100 * (64 * 64 + 64)
    assert len(CONSTRUCTION) == 2400


def test_contestants_cover_structures_dtypes_and_periods() -> None:
    labels = [c.label for c in (UNIT, *CONTESTANTS)]
    assert len(set(labels)) == len(labels)
    found = {
        (c.structures, c.dtype, c.T)
        for c in CONTESTANTS
        if isinstance(c.structures, str) and c.package == "ours"
    }
    for dtype in ("float32", "bfloat16"):
        assert {(name, dtype, 1) for name in (*LIMITS, "dense")} <= found
    ours = [c.spec() for c in CONTESTANTS if c.package == "ours"]
    official = [c.spec() for c in CONTESTANTS if c.package == "official"]
    assert len(official) == 4
    assert all(spec in ours for spec in official)


def test_gradients_are_fresh_and_repeatable() -> None:
    model = Model(TINY)
    first, again, other = (gradients(model, seed) for seed in (1, 1, 2))
    for p, a, b, c in zip(model.parameters(), first, again, other, strict=True):
        assert a.shape == p.shape
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    scale = torch.cat([g.flatten() for g in first]).std()
    assert scale == pytest.approx(BATCH_SIZE**-0.5, rel=0.1)


def test_state_counts_each_storage_once() -> None:
    entry = Entry(UNIT.spec(), TINY)
    assert held_bytes(entry.optimizer, entry.model) == 0
    assert entry.step() > 0
    state = 2 * 4 * numbers(TINY) + 4 * len(TINY)  # two moments, a step count
    assert held_bytes(entry.optimizer, entry.model) == state
    cache = torch.zeros(10)
    entry.optimizer.cache = {"rows": [cache[:5], cache[5:]]}  # type: ignore[attr-defined]
    assert held_bytes(entry.optimizer, entry.model) == state + 40


def test_times_are_means_of_whole_periods() -> None:
    assert results.period_means([5.0, 1.0, 1.0, 1.0, 5.0, 1.0], T=3) == [7 / 3, 7 / 3]
    assert results.period_means([3.0, 4.0], T=1) == [3.0, 4.0]
    with pytest.raises(ValueError, match="5 steps are not whole periods of T=3"):
        results.period_means([1.0] * 5, T=3)


def test_ratios_are_taken_within_a_round() -> None:
    record: dict[str, Any] = {"package": "ours", "title": "x", "dtype": "float32"}
    record |= {"T": 1, "bytes": 0, "error": None}
    record["rounds"] = [
        {"ms": [4.0, 6.0, 5.0], "unit_ms": [1.0, 1.0, 9.0]},
        {"ms": [40.0, 60.0, 50.0], "unit_ms": [10.0, 10.0, 90.0]},
        {"ms": [70.0], "unit_ms": [10.0]},
    ]
    row = results.Row.of(record)
    assert row.ratio() == results.Spread(median=5.0, low=5.0, high=6.0, min=5.0)
    assert row.time().median == 40.0
    assert row.time().min == 4.0
    half = [{"ms": [x / 2 for x in r["ms"]], "unit_ms": [1]} for r in record["rounds"]]
    faster = results.Row.of(record | {"rounds": half})
    assert faster.times_faster_than(row).median == 2.0


def test_difference_is_relative_and_the_largest() -> None:
    ones = torch.ones(4)
    found = difference([ones, ones + 0.02, ones * 3], [ones, ones, ones * 3])
    assert found == pytest.approx(0.02, rel=1e-5)


def test_a_package_that_moves_nothing_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "sirfshampoo.py").write_text(LAZY)
    worker = Worker(tmp_path, threads=1)
    try:
        spec = {"structures": "dense", "dtype": "float32", "T": 1}
        with pytest.raises(WorkerError, match="did not move"):
            worker.ask("add", key="lazy", spec=spec, shapes=TINY, warmup=1)
        with pytest.raises(WorkerError, match="nobody"):
            worker.ask("turn", key="nobody", steps=1)
    finally:
        worker.close()


def test_a_run_is_measured_saved_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_tiny(tmp_path)
    check_result(results.load(tmp_path / "gpt256.json"))
    check_report(tmp_path, capsys)


def measure_tiny(folder: Path) -> None:
    """Measure a tiny workload, with a copy of this package as the official one."""
    shutil.copytree(environment.ROOT / "sirfshampoo", folder / "other" / "sirfshampoo")
    chosen = "ours diagonal float32|all dense float32"
    arguments = ["--workload", "tiny", "--only", chosen, "--threads", "1"]
    arguments += ["--rounds", "2", "--turn-seconds", "0", "--name", "gpt256"]
    arguments += ["--official-folder", str(folder / "other")]
    assert step.main([*arguments, "--results", str(folder)]) == 0


def check_result(result: dict[str, Any]) -> None:
    assert result["environment"]["threads"] == 1
    assert result["environment"]["torch"] == torch.__version__
    assert result["numbers"] == numbers(TINY)
    rows = results.rows(result)
    assert [(r.package, r.title, r.T) for r in rows] == [
        ("torch", "AdamW(foreach=True)", None),
        ("ours", "diagonal", 1),
        ("ours", "all dense", 1),
        ("official", "all dense", 1),
        ("ours", "all dense", 10),
        ("official", "all dense", 10),
    ]
    for record, row in zip(result["contestants"], rows, strict=True):
        assert row.error is None
        assert len(row.ms) == len(row.unit) == 2
        assert all(ms > 0 for one_round in row.ms for ms in one_round)
        steps = {None: step.UNIT_STEPS, 1: 2, 10: 10}[row.T]
        assert [len(r["ms"]) for r in record["rounds"]] == [steps, steps]
        assert (row.bytes or 0) > 4 * numbers(TINY)
    assert rows[0].ratio().median == 1.0
    by_kind = {r.title: r.bytes or 0 for r in rows if r.T == 1}
    assert by_kind["all dense"] > by_kind["diagonal"]
    assert set(result["construction"]["seconds"]) == {"ours", "official"}
    assert all(len(rates) == 2 for rates in result["machine"].values())
    for found in result["agreement"]:
        # The same code from the same start: not a rounding apart.
        assert found["moves"] == found["factors"] == 0.0
        assert found["error"] is None
        assert found["factors_from_identity"] > 1e-3


def check_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = folder / "README.md"
    marker = "<!-- table: {} -->\nold\n<!-- end -->"
    tables = [marker.format(t) for t in ("step", "official gpt256", "machine")]
    readme.write_text("\n\n".join(["# Title", *tables, "tail"]))
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- table: step -->\n| configuration |")
    assert text.endswith("<!-- end -->\n\ntail")
    assert "old" not in text
    row = results.rows(results.load(folder / "gpt256.json"))[1]
    assert f"| diagonal, float32 | {row.time().median:.2f} | " in text
    assert "| float32, T = 10 | " in text
    assert (folder / "gpt256.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([*arguments, "--check"]) == 0

    readme.write_text(text.replace("| diagonal, float32 | ", "| diagonal, float32 | 0"))
    assert report.main([*arguments, "--check"]) == 1
    readme.write_text("# No place for a table")
    capsys.readouterr()
    assert report.main(arguments) == 1
    assert "has no marker" in capsys.readouterr().out


def test_report_names_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    readme.write_text("<!-- table: speed -->\n<!-- end -->")
    assert report.main(arguments) == 1
    assert "table 'speed'" in capsys.readouterr().out
    readme.write_text("<!-- table: step nowhere -->\n<!-- end -->")
    assert report.main(arguments) == 1
    assert "nowhere.json" in capsys.readouterr().out


def test_saved_json_reads_back(tmp_path: Path) -> None:
    result = {"a": [], "b": [{"c": [1.5, 2], "d": None}], "e": {}}
    results.save(result, tmp_path / "x" / "y.json")
    text = (tmp_path / "x" / "y.json").read_text()
    assert json.loads(text) == result
    assert '"c": [1.5, 2]' in text


def test_the_readme_shows_the_committed_results() -> None:
    """The tables are generated: nobody types a number."""
    names = [path.stem for path in results.RESULTS.glob("*.json")]
    readme = (environment.ROOT / "README.md").read_text(encoding="utf-8")
    wanted = {report.result_name(m) for m in report.MARKER.finditer(readme)}
    assert wanted <= set(names)
    assert report.render(readme, results.RESULTS)[0] == readme
