"""The tables drawn from a measurement, for the screen and for the README."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import AGAINST_OFFICIAL, LIMITS, LIMITS_HOLD_ON
from benchmarks.results import Row, Spread, growth, name_of, pairs, rows


@dataclass(frozen=True)
class Grid:
    """A table of text, with what has to be known to read it."""

    header: tuple[str, ...]
    lines: list[tuple[str, ...]]
    notes: list[str]

    def markdown(self) -> str:
        """Return the table in Markdown; the first column is the only one of words."""
        align = (":--", *["--:"] * (len(self.header) - 1))
        table = [f"| {' | '.join(cells)} |" for cells in (self.header, align)]
        table += [f"| {' | '.join(cells)} |" for cells in self.lines]
        return "\n".join([*table, "", *self.notes])

    def rich(self, title: str) -> Table:
        """Return the table for the screen."""
        table = Table(title=title, caption="\n".join(self.notes))
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left")
        for cells in self.lines:
            table.add_row(*cells)
        return table


def targets(result: dict[str, Any]) -> Grid:
    """Hold what was measured against what was aimed at."""
    header = ("configuration", "measured", "aim")
    lines: list[tuple[str, ...]] = [
        (f"{row.name}: AdamW steps", spread(row.ratio()), verdict)
        for row in rows(result)
        if not row.error and row.ms and (verdict := _verdict(result, row))
    ]
    lines += [
        (
            f"{ours.name}: times faster than the official package",
            spread(ours.times_faster_than(theirs)),
            verdict,
        )
        for ours, theirs in pairs(result)
        if (verdict := _faster_verdict(result, ours, theirs))
    ]
    return Grid(header, lines, [environment_line(result)])


def workloads(found: Sequence[dict[str, Any]]) -> Grid:
    """Tell the time of a step on every workload, in steps of AdamW."""
    lines: dict[str, dict[str, str]] = {}
    for result in found:
        for row in rows(result):
            if row.ms and not row.error:
                ratio = f"{row.ratio().median:.3g}"
                lines.setdefault(row.name, {})[result["workload"]] = ratio
    names = [result["workload"] for result in found]
    notes = [
        f"{result['workload']}: {result['parameters']} parameters, "
        f"{result['numbers']:,} numbers. {where(result['environment'])}"
        for result in found
    ]
    return Grid(
        ("× AdamW step", *names),
        [(name, *(cells.get(n, "–") for n in names)) for name, cells in lines.items()],
        ["\n\n".join(notes)],
    )


def step(result: dict[str, Any]) -> Grid:
    """Tell the time and memory of every contestant but the official package."""
    header: tuple[str, ...] = ("configuration", "ms per step", "× AdamW step", "state")
    has_peak = any(row.peak is not None for row in rows(result))
    if has_peak:
        header += ("more in a step",)
    lines: list[tuple[str, ...]] = []
    for row in rows(result):
        if row.package == "official":
            continue
        cells: tuple[str, ...]
        if row.error or not row.ms:
            cells = (row.name, f"failed: {row.error}", "", "")
        else:
            time = f"{row.time().median:.2f}"
            state = _bytes(row.bytes or 0)
            cells = (row.name, time, spread(row.ratio()), state)
        if has_peak:
            cells += ("" if row.peak is None else _bytes(row.peak),)
        lines.append(cells)
    return Grid(header, lines, [environment_line(result), *_peer_notes(result)])


def _peer_notes(result: dict[str, Any]) -> list[str]:
    """Say what the other packages are, and what has to be known of them."""
    notes = []
    for package, found in result.get("peers", {}).items():
        if not isinstance(found, dict):
            notes.append(f"{package}: {found}.")
            continue
        words = f"{package} {found[package]}, in its own process, in the same run."
        if package == "heavyball" and result["environment"].get("device") == "cpu":
            words += " Its torch.compile is off: it would need a C++ compiler."
        notes.append(words)
    if any(row.title == "Muon" for row in rows(result)):
        notes.append("Muon: hidden matrices; all other parameters have AdamW.")
    if any(row.peak is not None for row in rows(result)):
        notes.append(
            "More in a step: how far memory rises above that between two steps."
        )
    return notes


def work(result: dict[str, Any]) -> Grid:
    """Tell how near each configuration comes to what the machine can do."""
    header = (
        "configuration",
        "Gflop per step",
        "Gflop/s",
        "of the product rate",
        "MB per step",
        "GB/s",
        "of the copy rate",
    )
    lines: list[tuple[str, ...]] = []
    for row in rows(result):
        if row.flops is None or row.error or not row.ms:
            continue
        product = product_rate(result, row.dtype or "")
        seconds = row.time().median / 1e3
        if row.moved is not None:
            copy = copy_rate(result)
            cells = ("–", "–", "–", *_rate(row.moved, seconds, copy, 1e6))
        else:
            cells = (*_rate(row.flops, seconds, product, 1e9), "–", "–", "–")
        lines.append((row.name, *cells))
    notes = [
        "Operations are counted from shapes, as `summary` does, and are a mean over T "
        "steps; the official package is held to the same count. Product rate: the best "
        f"of the workload's own largest, between the rounds ({_best(result)}). "
        "Diagonal factors multiply nothing: of theirs, the bytes that a step has to "
        "move stand beside the rate of a copy."
    ]
    return Grid(header, lines, notes if lines else [])


def _rate(
    amount: float, seconds: float, limit: float | None, unit: float
) -> tuple[str, str, str]:
    """Format an amount, its rate in 10⁹ a second and the share of a limit."""
    rate = amount / seconds / 1e9
    share = f"{rate / limit:.0%}" if limit else "–"
    return f"{amount / unit:.3g}", f"{rate:.3g}", share


def _product_rates(result: dict[str, Any], dtype: str) -> dict[str, float]:
    """Return the median rates of the workload's products in one type."""
    return {
        name: Spread.of(rates).median
        for name, rates in result.get("products", {}).items()
        if name.startswith(f"{dtype} ")
    }


def product_rate(result: dict[str, Any], dtype: str) -> float | None:
    """Return the Gflop/s that the machine reaches on the workload's own products."""
    return max(_product_rates(result, dtype).values(), default=None)


def copy_rate(result: dict[str, Any]) -> float | None:
    """Return the GB/s of a copy, read and written."""
    for name, rates in result["machine"].items():
        if name.startswith("copy "):
            return Spread.of(rates).median
    return None


def _best(result: dict[str, Any]) -> str:
    """Name the fastest product of each type, with its rate."""
    types = dict.fromkeys(name.split()[0] for name in result.get("products", {}))
    best = []
    for dtype in types:
        rates = _product_rates(result, dtype)
        name = max(rates, key=lambda key: rates[key])
        best.append(f"{name}: {rates[name]:.3g} Gflop/s")
    return "; ".join(best)


def scaling(result: dict[str, Any]) -> Grid:
    """Tell how the time of a step grows with the number of layers and their width."""
    grown: dict[str, list[int]] = {}
    for name, cases in result["scaling"][0]["growth"].items():
        grown[name] = [case["size"] for case in cases]
    header: tuple[str, ...] = ("configuration",)
    for name, sizes in grown.items():
        header += (f"ms, {name} {sizes[0]} → {sizes[-1]}", f"exponent of {name}")
    lines: list[tuple[str, ...]] = []
    for record in result["scaling"]:
        cells: tuple[str, ...] = (name_of(record),)
        for kind in grown:
            if record["error"]:
                cells += (f"failed: {record['error']}", "")
                continue
            _, ms = growth(record, kind)
            cells += (
                f"{ms[0]:.2f} → {ms[-1]:.2f}",
                f"{record['exponents'][kind]:.2f}",
            )
        lines.append(cells)
    notes = [
        f"{where(result['environment'])} Square linear layers with biases: their "
        "number grows at width 64, the width of four of them. Exponent: slope of log "
        f"time over log size, by least squares; medians over {result['rounds']} rounds."
    ]
    return Grid(header, lines, notes)


def official(result: dict[str, Any]) -> Grid:
    """Compare dense steps with those of the official package."""
    header = ("all dense", "ms per step", "official: ms per step", "times faster")
    lines: list[tuple[str, ...]] = [
        (
            f"{ours.dtype}, T = {ours.T}",
            f"{ours.time().median:.1f}",
            f"{theirs.time().median:.1f}",
            spread(ours.times_faster_than(theirs)),
        )
        for ours, theirs in pairs(result)
    ]
    return Grid(header, lines, _official_notes(result))


def _official_notes(result: dict[str, Any]) -> list[str]:
    """Say what was compared, how far results agree, and constructor times."""
    if not isinstance(result["official"], dict):
        return [f"Official package: {result['official'] or 'not measured'}."]
    versions = ", ".join(f"{k} {v}" for k, v in result["official"].items())
    notes = [f"Official package: {versions}, in its own process, in the same run."]
    for found in result["agreement"]:
        if found["error"]:
            notes.append(f"Agreement at T = {found['T']}: failed, {found['error']}.")
        if "moves" not in found:
            continue
        notes.append(
            f"Largest relative difference after {found['steps']} steps in float32 at "
            f"T = {found['T']}: {found['moves']:.1e} in how far a parameter moved, "
            f"{found['factors']:.1e} in a factor."
        )
    construction = result["construction"]
    seconds = ", ".join(
        f"{Spread.of(times).median:.2f} s ({'here' if name == 'ours' else name})"
        for name, times in construction["seconds"].items()
    )
    notes.append(
        f"Constructing the optimizer for {construction['parameters']:,} parameters: "
        f"{seconds}."
    )
    return notes


def environment_line(result: dict[str, Any]) -> str:
    """Say in one line where, when and on what the step was measured."""
    rounds = len(result["contestants"][0]["rounds"])
    return (
        f"{where(result['environment'])} Workload {result['workload']}: "
        f"{result['parameters']} parameters, {result['numbers']:,} numbers in float32; "
        "the type named is that of the factors. T = 1 unless said; else the mean over "
        f"whole periods. Medians over {rounds} rounds (quartiles), AdamW timed in the "
        "same round. State: all that the optimizer keeps between steps."
    )


def where(env: dict[str, Any]) -> str:
    """Say when, on what and with what a measurement was taken."""
    commit = f" at commit {env['commit']}" if env["commit"] else ""
    machine = env["cpu"]
    if env.get("device", "cpu") != "cpu":  # older files were all measured on a CPU
        machine = f"{env['device']} beside {machine}"
    threads = f"{env['threads']} thread" + ("s" if env["threads"] != 1 else "")
    lacks = ""
    if not env.get("multiplies_bfloat16", True):
        lacks = " It has no instructions for bfloat16: Muon computed in float32."
    return (
        f"Measured {env['date']}{commit} on {machine}, {threads}, "
        f"torch {env['torch']}, Python {env['python']}.{lacks}"
    )


def ranks(result: dict[str, Any]) -> Grid:
    """Tell what was counted on ranks of this machine, and what was predicted."""
    header = ("", "ranks", "MiB of state", "MFLOP a step", "MiB received a step")
    lines: list[tuple[str, ...]] = []
    for run in result["measured"]:
        name = {"ddp": "DDP", "fsdp": "FSDP2"}[run["way"]]
        name += ", sharded pre-conditioners" if run["owned"] else ""
        cells = []
        for key, unit in (("state", 2**20), ("flops", 1e6), ("received", 2**20)):
            counted, predicted = run[key]
            same = "=" if counted == predicted else f"≠ {predicted / unit:.3f}"
            cells.append(f"{counted / unit:.3f} {same}")
        lines.append((name, f"{run['ranks']}", *cells))
    lines.sort(key=lambda cells: cells[0])  # stable: ranks stay in their order
    notes = [
        f"{where(result['environment'])} Workload {result['workload']} in float32, "
        "dense matrices, T = 1: the most on any rank, counted on processes of one "
        "machine (gloo); `=`: what was predicted, to the byte or the operation. State: "
        "factors and all momenta; operations: of matrix products; received: tensors "
        "that reach a rank in a step of the optimizer, besides the gradients that DDP "
        "and FSDP2 reduce by themselves."
    ]
    return Grid(header, lines, notes)


def scale(result: dict[str, Any]) -> Grid:
    """Tell what is predicted for large models on many ranks."""
    header = (
        "GPT, factors",
        "ranks",
        "GiB on a rank",
        "TFLOP a step",
        "GiB received",
        "share of a step",
    )
    lines: list[tuple[str, ...]] = []
    pairs = zip(result["predicted"][::2], result["predicted"][1::2], strict=True)
    for whole, owned in pairs:
        cells = [
            (
                f"{r['bytes'] / 2**30:,.2f}",
                f"{r['flops'] / 1e12:,.2f}",
                f"{r['received'] / 2**30:,.2f}",
                f"{100 * r['share']:.1f}%",
            )
            for r in (whole, owned)
        ]
        both = (" → ".join(pair) for pair in zip(*cells, strict=True))
        name = f"{whole['model']}, {whole['factors']}"
        lines.append((name, f"{whole['ranks']:,}", *both))
    assumed = result["assumed"]
    notes = [
        "Predicted, not measured: every rank holds all pre-conditioners → each "
        "pre-conditioner on one rank (the most on any rank). FSDP2, all in bfloat16, "
        f"T = {assumed['T']}, {assumed['tokens']:,} tokens on each rank in a step. The "
        f"share assumes {assumed['rate'] / 1e12:,.0f} TFLOP/s in products, "
        f"{assumed['memory'] / 1e12:,.0f} TB/s of memory and "
        f"{assumed['network'] / 1e9:,.0f} GB/s to each rank, 6 operations a parameter "
        "and token for training, and nothing that overlaps."
    ]
    return Grid(header, lines, notes)


def soak(result: dict[str, Any]) -> Grid:
    """Tell what very long runs did to the loss and to memory."""
    runs, warm = result["soaks"], result["warm"]
    header = (
        "factors",
        "loss, first → last",
        "not finite, sat out",
        "MiB in use",
        "living tensors",
    )
    lines: list[tuple[str, ...]] = []
    for run in runs:
        rss = [bytes / 2**20 for bytes in run["rss"]]
        lines.append(
            (
                f"{run['structure']}, {run['dtype']}",
                f"{run['loss'][0]:.4f} → {run['loss'][-1]:.4f}",
                f"{run['finite'].count(False)}, {run['skipped']}",
                f"{rss[warm - 1]:.1f} → {rss[-1]:.1f}",
                f"{run['tensors'][warm - 1]} → {run['tensors'][-1]}",
            )
        )
    samples = len(runs[0]["loss"])
    notes = [
        f"{where(result['environment'])} {runs[0]['steps']:,} steps each at a "
        f"constant learning rate, on a net of {result['parameters']:,} numbers in "
        f"float32 and fresh noisy examples; each run was looked at {samples} times, "
        f"losses are means over the steps between. Memory (resident) and tensors: "
        f"after {warm}/{samples} of the steps → at the end."
    ]
    return Grid(header, lines, notes)


def conformance(result: dict[str, Any]) -> Grid:
    """Tell which claims about optimizers hold, section by section."""
    names = ("SIRFShampoo", "AdamW")
    lines: list[tuple[str, ...]] = []
    section = None
    for record in result["rows"]:
        if record["section"] != section:
            section = record["section"]
            lines.append((f"**{section}**", *("" for _ in names)))
        lines.append((record["title"], *(record[name] for name in names)))
    return Grid(("", *names), lines, [_conformance_note(result, names)])


def _conformance_note(result: dict[str, Any], names: tuple[str, ...]) -> str:
    """Count verdicts, and say where and when they were found."""
    env = result["environment"]
    counts = []
    for name in names:
        verdicts = [record[name] for record in result["rows"]]
        tried = len(verdicts) - verdicts.count("–")
        counts.append(f"{name} {verdicts.count('yes')} of {tried}")
    commit = f" at commit {env['commit']}" if env["commit"] else ""
    return (
        f"{', '.join(counts)} (–: does not apply). Measured {env['date']}{commit} with "
        f"torch {env['torch']}, Python {env['python']}."
    )


def machine(result: dict[str, Any]) -> Grid:
    """Tell the machine's own rates, measured between the rounds."""
    rates = {**result["machine"], **result.get("products", {})}.items()
    lines: list[tuple[str, ...]] = [(name, spread(Spread.of(v))) for name, v in rates]
    return Grid(("the machine itself", "rate"), lines, [])


def show(result: dict[str, Any], console: Console) -> None:
    """Print all tables."""
    console.print(step(result).rich("One step"))
    console.print(official(result).rich("Beside the official package"))
    for title, grid in {
        "Aims": targets(result),
        "Beside what the machine can do": work(result),
        "Rates": machine(result),
    }.items():
        if grid.lines:
            console.print(grid.rich(title))
    for row in rows(result):
        if row.error:
            console.print(f"{row.name}: {row.error}")


def spread(found: Spread) -> str:
    """Format a median with its quartiles."""
    digits = 2 if found.median < 100 else 0
    low, high = f"{found.low:.{digits}f}", f"{found.high:.{digits}f}"
    return f"{found.median:.{digits}f} ({low} to {high})"


def _bytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _verdict(result: dict[str, Any], row: Row) -> str:
    """Say which limit applies and whether it is met."""
    limit = LIMITS.get((row.title, row.dtype or "", row.T or 1))
    if limit is None or result["workload"] != LIMITS_HOLD_ON or row.error:
        return ""
    return f"≤ {limit:g} {'met' if row.ratio().median <= limit else 'MISSED'}"


def _faster_verdict(result: dict[str, Any], ours: Row, theirs: Row) -> str:
    """Say how much faster the step should be and whether it is."""
    wanted = AGAINST_OFFICIAL.get(result["workload"], {}).get(ours.T or 1)
    if wanted is None:
        return ""
    met = ours.times_faster_than(theirs).median >= wanted
    return f"≥ {wanted:g} {'met' if met else 'MISSED'}"
