"""The benchmark: what it steps on, what it counts, what it writes."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    environment,
    memory,
    networks,
    optimizers,
    report,
    results,
    step,
    tables,
)
from benchmarks.agreement import difference
from benchmarks.contestants import (
    BATCH_SIZE,
    CONTESTANTS,
    LIMITS,
    MIXED,
    UNIT,
    Contestant,
    choose,
    other,
    ours,
)
from benchmarks.memory import Peak, held_bytes
from benchmarks.optimizers import build
from benchmarks.processes import WorkFailed
from benchmarks.training import spaces
from benchmarks.worker import Answers, Entry, Model, Worker, gradients
from benchmarks.workloads import (
    CONSTRUCTION,
    MOST_NUMBERS,
    WORKLOADS,
    largest_products,
    mlp,
    numbers,
    vectors,
)
from sirfshampoo.structures import SUPPORTED_STRUCTURES

TINY = WORKLOADS["tiny"]()

LAZY = """
from torch.optim import SGD

class SIRFShampoo(SGD):
    def __init__(self, model, **settings):
        super().__init__(model.parameters(), lr=0.1)

    def step(self):
        print("this must not disturb the answers")
"""

LATE = """
from torch.optim import SGD

class SIRFShampoo(SGD):
    def __init__(self, model, **settings):
        super().__init__(model.parameters(), lr=0.1)
        self.waited = 0

    def step(self):
        self.waited += 1
        if self.waited > 2:
            super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
"""

PEER = """
from torch.optim import SGD

class SOAP(SGD):
    def __init__(self, params, lr, precondition_frequency):
        super().__init__(params, lr)
        self.param_groups[0]["asked"] = precondition_frequency
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


def test_other_workloads() -> None:
    assert WORKLOADS["matrix2048"]() == {"weight": (2048, 2048)}
    assert WORKLOADS["matrix4096"]() == {"weight": (4096, 1024)}
    assert set(WORKLOADS["vectors"]().values()) == {(256,)}
    for width in (64, 768):
        assert WORKLOADS[f"gpt{width}"]()["block3_fc_weight"] == (4 * width, width)


def test_the_roof_is_made_of_the_largest_products() -> None:
    # Both sides of 8 large matrices in 4 layers: (1024, 256) and (256, 1024).
    assert largest_products(WORKLOADS["gpt256"]())[0] == (8, 1024, 256)
    assert largest_products(WORKLOADS["mlp100"]()) == [(200, 64, 64)]
    assert largest_products(vectors(number=3, width=5)) == [(6, 5, 5)]
    conv = {"weight": (4, 3, 2, 2), "bias": (99,)}
    assert largest_products(conv, most=2) == [(1, 4, 12), (2, 2, 24)]
    for make in WORKLOADS.values():
        for number, d, columns in largest_products(make()):
            assert number == 1 or number * d * max(d, columns) <= MOST_NUMBERS


def test_contestants_cover_structures_dtypes_and_periods() -> None:
    labels = [c.label for c in (UNIT, *CONTESTANTS)]
    assert len(set(labels)) == len(labels)
    found = {
        (c.structures, c.dtype, c.T)
        for c in CONTESTANTS
        if isinstance(c.structures, str) and c.package == "ours"
    }
    for dtype in ("float32", "bfloat16"):
        assert {(name, dtype, 1) for name in (*SUPPORTED_STRUCTURES,)} <= found
    assert set(LIMITS) <= {(c.title, c.dtype, c.T) for c in CONTESTANTS}
    here = [c.spec() for c in CONTESTANTS if c.package == "ours"]
    official = [c.spec() for c in CONTESTANTS if c.package == "official"]
    assert len(official) == 4
    assert all(spec in here for spec in official)


def test_every_contestant_can_be_built_and_pinned() -> None:
    packages = {c.package for c in CONTESTANTS}
    assert packages == {"torch", "ours", *environment.PACKAGES}
    timed = {c.spec()["builder"] for c in (UNIT, *CONTESTANTS)}
    trained = {c.builder for c in spaces.CONTESTANTS.values()}
    assert timed | trained == set(optimizers.BUILDERS)
    periods = {(c.package, c.title, c.T) for c in CONTESTANTS if c.structures is None}
    for package in ("pytorch-optimizer", "heavyball"):
        assert {(package, "SOAP", 1), (package, "SOAP", 10)} <= periods
    assert ("pytorch-optimizer", "Shampoo", 10) in periods
    pins = [pin for pins in environment.PACKAGES.values() for pin in pins]
    assert all("==" in pin and not pin.startswith("torch=") for pin in pins)


def test_the_command_line_chooses() -> None:
    assert choose() == list(CONTESTANTS)
    assert {c.T for c in choose(periods=[10])} == {1, 10}  # torch's have no period
    assert {c.T for c in choose("ours|SOAP", periods=[10])} == {10}
    half = choose("ours", dtypes=["bfloat16"])
    assert {c.dtype for c in half} == {"bfloat16"}
    assert len(half) == len(choose("ours")) / 2
    assert choose(structures=["block7diagonal", "mixed"], periods=[3]) == [
        Contestant("ours", "block7diagonal", "block7diagonal", "float32", 3),
        Contestant("ours", "dense matrices, diagonal vectors", MIXED, "float32", 3),
    ]


def test_muon_gets_hidden_matrices_alone() -> None:
    model = Model(TINY)
    muon, adamw = build(model=model, **other("torch Muon"))
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert found == {f"block0_{part}_weight" for part in ("qkv", "proj", "fc", "fc2")}
    assert len(adamw.param_groups[0]["params"]) == len(TINY) - len(found)
    entry = Entry(model, [muon, adamw])
    assert entry.checked_step() > 0
    rest = [shape for name, shape in TINY.items() if name not in found]
    adam_bytes = 2 * 4 * numbers(dict(enumerate(rest))) + 4 * len(rest)  # type: ignore[arg-type]
    muon_bytes = 4 * numbers({name: TINY[name] for name in found})
    assert held_bytes(entry.optimizers, model) == adam_bytes + muon_bytes


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
    model = Model(TINY)
    (adamw,) = build(model=model, **UNIT.spec())
    entry = Entry(model, [adamw])
    assert held_bytes(adamw, model) == 0
    assert entry.checked_step() > 0
    state = 2 * 4 * numbers(TINY) + 4 * len(TINY)  # two moments, a step count
    assert held_bytes(adamw, model) == state
    cache = torch.zeros(10)
    adamw.cache = {"rows": [cache[:5], cache[5:]]}  # type: ignore[attr-defined]
    assert held_bytes([adamw], model) == state + 40


def test_peak_is_what_a_step_takes_beside_what_it_keeps() -> None:
    size = 2**25
    with Peak() as peak:
        torch.ones(size // 4).sum()
    if memory._forget_resident_peak():  # the system may not allow it
        assert peak.bytes is not None
        # Linux counts pages in batches, and the first call takes some of its own.
        assert peak.bytes == pytest.approx(size, rel=0.25)
    else:
        assert peak.bytes is None


def test_operations_are_a_mean_over_a_period() -> None:
    def flops(T: int) -> float:
        spec = ours("hierarchical2_1", T=T)
        return float(Answers().work(spec, {"w": (6, 4)})["flops"])

    # Two updates weigh in at T = 1, one at T = 2: the rest is the step's.
    update = 2 * (flops(1) - flops(2))
    assert update > 0
    assert flops(4) == pytest.approx(flops(1) - 0.75 * update)


def test_products_of_a_dense_step_are_counted() -> None:
    found = Answers().work(ours("dense"), {"w": (2048, 2048)})
    assert found["bytes"] is None
    products = found["flops"] / (2 * 2048**3)
    assert 6 <= products <= 12


def test_bytes_of_a_diagonal_step_are_counted() -> None:
    moved = {}
    for T in (1, 10):
        moved[T] = Answers().work(ours("diagonal", T=T), {"w": (6, 4)})["bytes"]
    gradient, factors = 4 * 24, 2 * 4 * (6 + 4)
    update = gradient + 2 * factors
    always = gradient + factors + 2 * gradient + 2 * gradient  # parameter, momentum
    assert moved == {1: update + always, 10: update / 10 + always}


def test_exponents_are_slopes_of_logarithms() -> None:
    sizes = [1, 2, 4, 8]
    assert results.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    rounds = [{"ms": [4.0, 2.0], "unit_ms": [1.0]}, {"ms": [9.0, 7.0], "unit_ms": [1]}]
    record = {"T": 2, "growth": {"width": [{"size": 5, "rounds": rounds}]}}
    assert results.growth(record, "width") == ([5], [5.5])


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
    ones = np.ones(4)
    found = difference([ones, ones + 0.02, ones * 3], [ones, ones, ones * 3])
    assert found == pytest.approx(0.02, rel=1e-5)


def test_a_package_that_moves_nothing_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "sirfshampoo.py").write_text(LAZY)
    worker = Worker(tmp_path, threads=1)
    try:
        with pytest.raises(WorkFailed, match="did not move"):
            worker.call("add", key="lazy", spec=ours("dense"), shapes=TINY, warmup=1)
        with pytest.raises(WorkFailed, match="nobody"):
            worker.call("turn", key="nobody", steps=1)
    finally:
        worker.close()


def test_torch_finds_what_lies_in_the_folder_of_a_package(tmp_path: Path) -> None:
    # without opt_einsum, steps of PSGD-Kron take hundreds of times as long
    (tmp_path / "opt_einsum.py").write_text("")
    available = "torch.backends.opt_einsum.is_available()"
    (tmp_path / "sirfshampoo.py").write_text(f"import torch\nassert {available}")
    Worker(tmp_path, threads=1).close()


def test_an_optimizer_may_start_late_and_drop_gradients(tmp_path: Path) -> None:
    (tmp_path / "sirfshampoo.py").write_text(LATE)
    worker = Worker(tmp_path, threads=1)
    try:
        request = {"key": "late", "spec": ours("dense"), "shapes": TINY}
        with pytest.raises(WorkFailed, match="did not move"):
            worker.call("add", **request, warmup=2)
        assert len(worker.call("add", **request, warmup=3, peak=1)["ms"]) == 3
        assert len(worker.call("turn", key="late", steps=2)) == 2
    finally:
        worker.close()


def test_one_number_that_rests_by_chance_is_no_failure() -> None:
    entry = Entry(Model({"w": (8,)}), [])
    entry.takes = [lambda: entry.params[0].data[-1].add_(1.0)]
    assert entry.checked_step() > 0
    entry.takes = []
    with pytest.raises(RuntimeError, match="did not move"):
        entry.checked_step()


def test_packages_are_installed_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        Path(command[command.index("--target") + 1]).mkdir(parents=True)
        code = int(len(commands) == 1)
        return subprocess.CompletedProcess(command, code, "", "no network")

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(RuntimeError, match="pip: no network"):
        environment.folder_of("heavyball")
    assert list((tmp_path / "build").iterdir()) == []
    folder = environment.folder_of("heavyball")
    assert folder.parent == tmp_path / "build"
    assert folder.is_dir()
    assert environment.folder_of("heavyball") == folder
    assert len(commands) == 2
    assert "--no-deps" in commands[1]
    assert set(environment.PACKAGES["heavyball"]) <= set(commands[1])


def test_peers_have_their_own_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = tmp_path / "peer"
    about = peer / "pytorch_optimizer-9.8.dist-info"
    about.mkdir(parents=True)
    text = "Metadata-Version: 2.1\nName: pytorch-optimizer\nVersion: 9.8\n"
    (about / "METADATA").write_text(text)
    (peer / "pytorch_optimizer.py").write_text(PEER)

    def folder_of(package: str) -> Path:
        if package == "pytorch-optimizer":
            return peer
        raise RuntimeError("pip: no network")

    monkeypatch.setattr(environment, "folder_of", folder_of)
    monkeypatch.setattr(step, "TURN_SECONDS", 0.0)
    arguments = ["--workload", "tiny", "--only", "SOAP", "--T", "10", "--rounds", "1"]
    arguments += ["--threads", "1", "--results", str(tmp_path)]
    assert step.main(arguments) == 0
    result = results.load(tmp_path / "tiny.json")
    assert result["official"] is None
    assert result["peers"] == {
        "pytorch-optimizer": {"pytorch-optimizer": "9.8"},
        "heavyball": "not measured: pip: no network",
    }
    _, soap = results.rows(result)
    assert (soap.package, soap.title, soap.dtype, soap.T) == (
        "pytorch-optimizer",
        "SOAP",
        None,
        10,
    )
    assert len(result["contestants"][1]["rounds"][0]["ms"]) == 10
    grid = tables.step(result)
    assert grid.lines[1][0] == "SOAP of pytorch-optimizer, T = 10"
    assert any("pytorch-optimizer 9.8" in note for note in grid.notes)
    assert "heavyball package not measured" in capsys.readouterr().out


def test_growth_is_measured_and_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = {"layers": {n: mlp(layers=n, width=4) for n in (1, 2)}}
    monkeypatch.setattr(step, "GROWTH", growing)
    monkeypatch.setattr(step, "TURN_SECONDS", 0.0)
    arguments = ["--scaling", "--structure", "diagonal", "--T", "1", "3"]
    arguments += ["--rounds", "2", "--threads", "1"]
    assert step.main([*arguments, "--results", str(tmp_path)]) == 0
    result = results.load(tmp_path / "scaling.json")
    assert [(r["title"], r["T"]) for r in result["scaling"]] == [
        ("AdamW(foreach=True)", None),
        ("diagonal", 1),
        ("diagonal", 3),
    ]
    for record in result["scaling"]:
        assert record["error"] is None
        (one, two) = record["growth"]["layers"]
        assert (one["size"], two["size"]) == (1, 2)
        assert len(one["rounds"]) == len(two["rounds"]) == 2
        _, (first, second) = results.growth(record, "layers")
        assert 2 ** record["exponents"]["layers"] == pytest.approx(second / first)
    grid = tables.scaling(result)
    assert grid.header == ("configuration", "ms, layers 1 → 2", "exponent of layers")
    assert grid.lines[2][0] == "diagonal, float32, T = 3"


def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--T", "0"])
    assert "--T must be at least 1" in capsys.readouterr().err
    assert "tiny" not in step.parse(["--workload", "all"]).workload


def test_a_run_is_measured_saved_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a copy of this package passes for the official one
    copy = tmp_path / "other"
    shutil.copytree(environment.ROOT / "sirfshampoo", copy / "sirfshampoo")
    monkeypatch.setattr(environment, "folder_of", {"official": copy}.__getitem__)
    monkeypatch.setattr(step, "TURN_SECONDS", 0.0)
    chosen = "ours diagonal float32|all dense float32"
    arguments = ["--workload", "tiny", "--only", chosen, "--threads", "1"]
    arguments += ["--rounds", "2", "--results", str(tmp_path)]
    assert step.main(arguments) == 0
    check_result(results.load(tmp_path / "tiny.json"))
    check_report(tmp_path, capsys)


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
    check_limits_of_the_machine(result)
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


def check_limits_of_the_machine(result: dict[str, Any]) -> None:
    assert all(len(rates) == 2 for rates in result["products"].values())
    rows = results.rows(result)
    diagonal, dense = rows[1], rows[2]
    assert rows[0].flops is None
    assert dense.flops == rows[3].flops  # the official package has the same count
    assert (dense.flops or 0) > (rows[4].flops or 0) > 0
    assert dense.moved is None
    grid = tables.work(result)
    assert len(grid.lines) == len(rows) - 1
    seconds = diagonal.time().median / 1e3
    rate = (diagonal.moved or 0) / seconds / 1e9
    assert grid.lines[0][5] == f"{rate:.3g}"
    rate = (dense.flops or 0) / (dense.time().median / 1e3) / 1e9
    share = rate / (tables.product_rate(result, "float32") or 0)
    assert grid.lines[1][2:4] == (f"{rate:.3g}", f"{share:.0%}")
    has_peak = any(row.peak is not None for row in rows)
    assert ("more in a step" in tables.step(result).header) == has_peak


def test_older_results_have_no_peaks_and_no_work() -> None:
    record: dict[str, Any] = {"package": "torch", "title": "x", "dtype": None}
    record |= {"T": None, "bytes": 1, "error": None}
    record["rounds"] = [{"ms": [1.0], "unit_ms": [1.0]}]
    path = results.RESULTS / "gpt256.json"
    result = {"workload": "tiny", "parameters": 1, "numbers": 1, "machine": {}}
    result |= {"environment": results.load(path)["environment"], "official": None}
    result["contestants"] = [record]
    assert tables.step(result).header[-1] == "state"
    assert len(tables.step(result).notes) == 1
    assert tables.work(result).lines == []


def check_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = folder / "README.md"
    marker = "<!-- table: {} -->\nold\n<!-- end -->"
    tables = [marker.format(f"{t} tiny") for t in ("step", "official", "machine")]
    readme.write_text("\n\n".join(["# Title", *tables, "tail"]))
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- table: step tiny -->\n| configuration |")
    assert text.endswith("<!-- end -->\n\ntail")
    assert "old" not in text
    row = results.rows(results.load(folder / "tiny.json"))[1]
    assert f"| diagonal, float32 | {row.time().median:.2f} | " in text
    assert "| float32, T = 10 | " in text
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


@pytest.mark.parametrize("text", report.TEXTS, ids=lambda path: path.name)
def test_the_texts_show_the_committed_results(text: Path) -> None:
    """The tables are generated: nobody types a number."""
    old = text.read_text(encoding="utf-8")
    assert report.render(old, results.RESULTS)[0] == old


def test_contestants_take_turns_on_a_network() -> None:
    name = "CNN, 8 tensors"
    chosen = {k: networks.CONTESTANTS[k] for k in ("Muon + AdamW", "recipe")}
    turns: list[None] = []
    case = networks.measure(name, chosen, 2, lambda: turns.append(None))
    assert len(turns) == 2
    assert {k: sorted(ms) for k, ms in case["ms"].items()} == {
        "Muon + AdamW": ["late"],
        "recipe": ["early", "late"],
    }
    assert all(len(x) == 2 for ms in case["ms"].values() for x in ms.values())
    ms = {"a": {"late": [2.0, 6.0, 4.0]}, "b": {"late": [1.0, 2.0, 4.0]}}
    assert networks.ratio(ms, "a", "b") == "2.00 (1.50 to 2.50)"


def test_a_table_tells_that_muon_computed_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for is_able in (True, False):
        monkeypatch.setattr(environment, "multiplies_bfloat16", lambda x=is_able: x)
        told = tables.where(environment.describe(1))
        assert ("Muon computed in float32" in told) == (not is_able)
