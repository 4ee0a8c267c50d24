"""A measurement as it is written to JSON, with the statistics drawn from it."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import fmean, linear_regression, median, quantiles
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and minimum of some numbers."""

    median: float
    low: float
    high: float
    min: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize at least one number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0])
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high, min(values))


def name_of(record: dict[str, Any]) -> str:
    """Name what was measured, in words."""
    name: str = record["title"]
    if record["package"] == "official":
        name = f"official: {name}"
    elif record["package"] not in ("torch", "ours"):
        name += f" of {record['package']}"
    if record["dtype"] is not None:
        name += f", {record['dtype']}"
    return name + (f", T = {record['T']}" if record["T"] not in (None, 1) else "")


@dataclass(frozen=True)
class Row:
    """What was measured of one contestant.

    Attributes:
        name: In words, different for every contestant.
        package, title, dtype, T: As of a `Contestant`; `None` where it has no factors,
            or where all steps are alike.
        ms: Milliseconds a step, one list for each round. With `T > 1` every number
            is the mean over one period.
        unit: Milliseconds of AdamW in each round, taken right before.
        bytes: What the optimizer keeps between steps.
        error: Why there is no (further) measurement, if so.
        peak: How much more memory a step takes at most, if that was measured.
        flops: Floating-point operations of a step, if they were counted.
        moved: The bytes a step has to move; `None` unless all factors are diagonal.
    """

    name: str
    package: str
    title: str
    dtype: str | None
    T: int | None
    ms: list[list[float]]
    unit: list[float]
    bytes: int | None
    error: str | None
    peak: int | None
    flops: float | None
    moved: float | None

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Row":
        """Read one entry of `"contestants"`."""
        work = record.get("work") or {}
        as_they_are = ("package", "title", "dtype", "T", "bytes", "error")
        return cls(
            **{key: record[key] for key in as_they_are},
            name=name_of(record),
            ms=[period_means(r["ms"], record["T"] or 1) for r in record["rounds"]],
            unit=[median(r["unit_ms"]) for r in record["rounds"]],
            peak=record.get("peak"),  # older files lack it, and the work
            flops=work.get("flops"),
            moved=work.get("bytes"),
        )

    def time(self) -> Spread:
        """Summarize the milliseconds of a step over all rounds."""
        return Spread.of([ms for one_round in self.ms for ms in one_round])

    def ratio(self) -> Spread:
        """Summarize the time in units of the AdamW steps of the same round."""
        pairs = zip(self.ms, self.unit, strict=True)
        return Spread.of([median(ms) / unit for ms, unit in pairs])

    def times_faster_than(self, other: "Row") -> Spread:
        """Divide the other's time by this one's in the same round."""
        pairs = zip(other.ms, self.ms, strict=True)
        return Spread.of([median(a) / median(b) for a, b in pairs])


def period_means(ms: Sequence[float], T: int) -> list[float]:
    """Return the mean over each `T` consecutive steps; each holds one update.

    Raises:
        ValueError: If the steps are not whole periods.
    """
    if len(ms) % T:
        raise ValueError(f"{len(ms)} steps are not whole periods of T={T}.")
    return [fmean(ms[i : i + T]) for i in range(0, len(ms), T)]


def growth(record: dict[str, Any], grown: str) -> tuple[list[int], list[float]]:
    """Return the sizes of growing networks, and the milliseconds a step took."""
    cases = record["growth"][grown]
    return [case["size"] for case in cases], [
        median(
            ms
            for one_round in case["rounds"]
            for ms in period_means(one_round["ms"], record["T"] or 1)
        )
        for case in cases
    ]


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Fit `time = constant · size^exponent` by least squares of the logarithms."""
    slope, _ = linear_regression([log(x) for x in sizes], [log(y) for y in times])
    return slope


def rows(result: dict[str, Any]) -> list[Row]:
    """Return a row for each contestant."""
    return [Row.of(record) for record in result["contestants"]]


def pairs(result: dict[str, Any]) -> Iterator[tuple[Row, Row]]:
    """Yield each row of ours that the official package has a measured partner for."""
    official = {
        (row.title, row.dtype, row.T): row
        for row in rows(result)
        if row.package == "official" and not row.error
    }
    for row in rows(result):
        partner = official.get((row.title, row.dtype, row.T))
        if row.package == "ours" and not row.error and partner is not None:
            yield row, partner


def save(result: dict[str, Any], path: Path) -> None:
    """Write a measurement, whole or not at all; a list of numbers takes one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(_pretty(result) + "\n")
    partial.replace(path)


def _pretty(value: Any, indent: str = "") -> str:
    """Format as JSON with one line for each thing that holds no dictionary."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        body = [f"{json.dumps(k)}: {_pretty(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner + line for line in body) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        body = [_pretty(v, inner) for v in value]
        return "[\n" + ",\n".join(inner + line for line in body) + f"\n{indent}]"
    return json.dumps(value)


def load(path: Path) -> dict[str, Any]:
    """Read a measurement."""
    result: dict[str, Any] = json.loads(path.read_text())
    return result
