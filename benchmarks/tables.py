"""The tables drawn from a measurement, for the screen and for the README."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import AGAINST_OFFICIAL, LIMITS, LIMITS_HOLD_ON
from benchmarks.results import Row, Spread, pairs, rows


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


def configuration(row: Row) -> str:
    """Name what was measured, in words."""
    if row.dtype is None:
        return row.title
    return f"{row.title}, {row.dtype}" + (f", T = {row.T}" if row.T != 1 else "")


def step(result: dict[str, Any], limits: bool = False) -> Grid:
    """Tell the time and memory of every contestant but the official package.

    Args:
        result: A measurement.
        limits: Whether to add the fastest step, and the limits that apply.

    Returns:
        One line for each contestant.
    """
    header: tuple[str, ...] = ("configuration", "ms per step", "× AdamW step", "state")
    lines: list[tuple[str, ...]] = []
    for row in rows(result):
        if row.package == "official":
            continue
        cells: tuple[str, ...]
        if row.error or not row.ms:
            cells = (configuration(row), f"failed: {row.error}", "", "")
        else:
            time = f"{row.time().median:.2f}"
            state = _bytes(row.bytes or 0)
            cells = (configuration(row), time, _spread(row.ratio()), state)
        if limits:
            fastest = f"{row.time().min:.2f}" if row.ms else ""
            wanted = _verdict(row) if result["workload"] == LIMITS_HOLD_ON else ""
            cells += (fastest, wanted)
        lines.append(cells)
    if limits:
        header += ("fastest ms", "limit")
    return Grid(header, lines, [environment_line(result)])


def official(result: dict[str, Any]) -> Grid:
    """Compare dense steps with those of the official package."""
    header = ("all dense", "ms per step", "official: ms per step", "times faster")
    lines: list[tuple[str, ...]] = [
        (
            f"{ours.dtype}, T = {ours.T}",
            f"{ours.time().median:.1f}",
            f"{theirs.time().median:.1f}",
            _spread(ours.times_faster_than(theirs)),
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
        f"{_where(result['environment'])} Workload {result['workload']}: "
        f"{result['parameters']} parameters, {result['numbers']:,} numbers in float32; "
        "the type named is that of the factors. T = 1 unless said; else the mean over "
        f"whole periods. Medians over {rounds} rounds (quartiles), AdamW timed in the "
        "same round. State: all that the optimizer keeps between steps."
    )


def _where(env: dict[str, Any]) -> str:
    """Say when, on what and with what a measurement was taken."""
    commit = f" at commit {env['commit']}" if env["commit"] else ""
    threads = f"{env['threads']} thread" + ("s" if env["threads"] != 1 else "")
    return (
        f"Measured {env['date']}{commit} on {env['cpu']}, {threads}, "
        f"torch {env['torch']}, Python {env['python']}."
    )


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
        f"{_where(result['environment'])} {runs[0]['steps']:,} steps each at a "
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
    rates = result["machine"].items()
    lines: list[tuple[str, ...]] = [(name, _spread(Spread.of(v))) for name, v in rates]
    return Grid(("the machine itself", "rate"), lines, [])


def show(result: dict[str, Any], console: Console) -> None:
    """Print all tables."""
    console.print(step(result, limits=True).rich("One step"))
    grid = official(result)
    if grid.lines and result["workload"] == LIMITS_HOLD_ON:
        verdicts = [_faster_verdict(*pair) for pair in pairs(result)]
        lines = [(*x, y) for x, y in zip(grid.lines, verdicts, strict=True)]
        grid = Grid((*grid.header, "wanted"), lines, grid.notes)
    console.print(grid.rich("Beside the official package"))
    console.print(machine(result).rich("Rates"))
    for row in rows(result):
        if row.error:
            console.print(f"{row.package} {configuration(row)}: {row.error}")


def _spread(spread: Spread) -> str:
    """Format a median with its quartiles."""
    digits = 2 if spread.median < 100 else 0
    low, high = f"{spread.low:.{digits}f}", f"{spread.high:.{digits}f}"
    return f"{spread.median:.{digits}f} ({low} to {high})"


def _bytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _verdict(row: Row) -> str:
    """Say which limit applies and whether it is met."""
    limit = LIMITS.get(row.title)
    if limit is None or row.dtype != "float32" or row.error:
        return ""
    met = row.ratio().median <= limit
    return f"≤ {limit:g} {'met' if met else 'MISSED'}"


def _faster_verdict(ours: Row, theirs: Row) -> str:
    """Say how much faster the step should be and whether it is."""
    wanted = AGAINST_OFFICIAL[ours.T or 1]
    met = ours.times_faster_than(theirs).median >= wanted
    return f"≥ {wanted:g} {'met' if met else 'MISSED'}"
