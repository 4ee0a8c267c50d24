"""What a visit found, as plain text for the screen and as Markdown for the texts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.step import idle, milliseconds, ratio, share
from benchmarks.gpu.visit import RESULTS, read

NOT_MEASURED = "not measured on a GPU"
Rows = list[tuple[str, ...]]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


# --- from the files -------------------------------------------------------------------
def step_rows(result: dict[str, Any]) -> Rows:
    """Return a line for each contestant: a step in fused AdamW's, share of the roof."""
    workloads = result.get("workloads", {})
    cells: dict[str, dict[str, str]] = {}
    for name, workload in workloads.items():
        for found in workload["contestants"]:
            cells.setdefault(found["label"], {})[name] = _cell(found, workload)
    rows = [(k, *(row.get(n, "–") for n in workloads)) for k, row in cells.items()]
    return [("", *workloads), *rows] if rows else []


def _cell(found: dict[str, Any], workload: dict[str, Any]) -> str:
    if found["error"] or not found["rounds"]:
        return "failed"
    roof = share(found, workload["roofs"])
    told = "" if roof is None or roof < 0.005 else f", {_percent(roof)}"
    return f"{ratio(found):.2f} ×{told}"


def detail_rows(result: dict[str, Any]) -> Rows:
    """Return a line for each contestant on each workload."""
    rows: Rows = []
    for name, workload in result.get("workloads", {}).items():
        for found in workload["contestants"]:
            if found["error"] or not found["rounds"]:
                reason = (found["error"] or "?").split("\n")[0]
                rows.append((name, found["label"], reason, *[""] * 5))
                continue
            launches = [found.get(f"launches_{k}") for k in ("update", "plain")]
            rows.append(
                (
                    name,
                    found["label"],
                    f"{milliseconds(found):.3f}",
                    f"{ratio(found):.2f} ×",
                    _percent(share(found, workload["roofs"])),
                    f"{milliseconds(found, 'host_ms'):.3f}",
                    " / ".join(str(n) for n in launches if n is not None) or "–",
                    _percent(idle(found)),
                )
            )
    return rows


DETAILS = (
    "parameters",
    "optimizer",
    "ms a step",
    "in AdamW(fused)",
    "of the roof",
    "host, ms",
    "launches",
    "idle",
)


def train_rows(result: dict[str, Any]) -> Rows:
    """Return a line for each optimizer that trained."""
    reached = result.get("to_loss", {}).get("reached", {})
    rows: Rows = [TRAIN] if result.get("runs") else []
    tokens = math.prod(result.get("size", {}).get(k, 1) for k in ("batch", "context"))
    for run in result.get("runs", []):
        if run["error"] or not run.get("curve"):
            rows.append((run["name"], (run["error"] or "?")[:60], *[""] * 6))
            continue
        last, first = run["curve"][-1], reached.get(run["name"], {})
        peak = run.get("peak_bytes")
        rows.append(
            (
                run["name"],
                f"{run['steps']:,} in {last['seconds']:.0f} s",
                f"{last['val']:.3f}",
                f"step {first['step']:,}, {first['seconds']:.1f} s" if first else "–",
                f"{run['step_ms']:.1f}",
                _percent(run["optimizer_share"]),
                f"{100 * at_half_a_million(run, tokens):.1f} %",
                f"{peak / 2**30:.1f} GiB" if peak else "–",
            )
        )
    return rows


TRAIN = (
    "optimizer",
    "steps",
    "loss",
    "reaches the worst's loss at",
    "ms a step",
    "optimizer's share",
    "at 0.5 M tokens",
    "peak",
)


def at_half_a_million(run: dict[str, Any], tokens: int) -> float:
    """Return the optimizer's share if steps saw half a million tokens, not these."""
    gradients = (run["step_ms"] - run["optimizer_ms"]) * 2**19 / tokens
    return run["optimizer_ms"] / (run["optimizer_ms"] + gradients)


def check_rows(result: dict[str, Any]) -> Rows:
    """Return a line for each group of checks, then one for each that is not right."""
    checks = result.get("checks", [])
    rows: Rows = [("checks", "outcome")] if checks else []
    for group in dict.fromkeys(c["group"] for c in checks):
        kinds = [c["status"] for c in checks if c["group"] == group]
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        told = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        rows.append((group, told))
    bad = [c for c in checks if c["status"] in ("failed", "not reached")]
    for c in bad:
        told = " ".join(c["told"].split())[:110]
        rows.append((f"{c['group']}: {c['name']}", f"{c['status']}: {told}"))
    return rows


def machine_rows(result: dict[str, Any]) -> Rows:
    """Return the roofs: products alone and in a batch, Gflop/s."""
    products = result.get("products", [])
    copy = f"{result.get('copy_GB_per_s', 0):,} GB/s"
    header = ("what", "", "rate")
    rows: Rows = [header, ("copy, read + written", "", copy)] if products else []
    for size in sorted({p["size"] for p in products}):
        for dtype in dict.fromkeys(p["dtype"] for p in products):
            rates = [
                f"{p['number']} at once: {p['Gflop_per_s']:,.0f}"
                for p in products
                if (p["size"], p["dtype"]) == (size, dtype)
            ]
            rows.append((f"{size}² products, Gflop/s", dtype, "; ".join(rates)))
    return rows


def profile_rows(result: dict[str, Any]) -> Rows:
    """Return a line for each step that was traced."""
    rows = [
        (
            case["workload"],
            case["label"],
            kind,
            f"{case[kind]['ms']:.3f}",
            str(case[kind]["launches"]),
            f"{case[kind]['busy_us'] / 1e3:.3f}",
            case[kind]["kernels"][0]["name"][:40] if case[kind]["kernels"] else "–",
        )
        for case in result.get("cases", [])
        for kind in ("update", "plain", "step")
        if kind in case
    ]
    return [PROFILE, *rows] if rows else []


PROFILE = ("parameters", "optimizer", "step", "ms", "launches", "busy, ms", "costliest")


# --- on screen ------------------------------------------------------------------------
def aligned(lines: Rows) -> str:
    """Return lines with columns of equal width."""
    widths = [
        max(len(row[i]) for row in lines if i < len(row))
        for i in range(max(len(row) for row in lines))
    ]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip()
        for row in lines
    )


TABLES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "machine": machine_rows,
    "correct": check_rows,
    "step": step_rows,
    "train": train_rows,
    "profile": profile_rows,
}
"""The rows of each stage, the header first."""


def screen(folder: Path) -> str:
    """Return a short account of a visit."""
    parts = []
    for stage, rows_of in TABLES.items():
        result = read(folder / f"{stage}.json")
        if not result:
            continue
        where = result.get("environment", {}).get("device", "?")
        title = f"== {stage} on {where}: {result.get('status')}, "
        title += f"{result.get('seconds', '?')} s"
        if result.get("error"):
            title += f"; {result['error'].splitlines()[-1][:200]}"
        if result.get("not_reached"):
            title += f"; not reached: {len(result['not_reached'])}"
        rows = rows_of(result)
        parts.append(f"{title}\n{aligned(rows)}" if rows else title)
    return "\n\n".join(parts)


# --- in texts -------------------------------------------------------------------------
def of_a_gpu(folder: Path, stage: str) -> dict[str, Any]:
    """Return what a stage found on a GPU; nothing of a rehearsal."""
    result = read(folder / f"{stage}.json")
    kind = result.get("environment", {}).get("kind")
    return result if kind == "cuda" and not result.get("tiny") else {}


def gpu_table(folder: Path = RESULTS) -> str:
    """Return a visit's short tables in Markdown; without one, that there was none."""
    return _told(folder, {"step": step_rows, "train": train_rows})


def gpu_details(folder: Path = RESULTS) -> str:
    """Return a visit's long tables in Markdown; without one, that there was none."""

    def steps(result: dict[str, Any]) -> Rows:
        rows = detail_rows(result)
        return [DETAILS, *rows] if rows else []

    return _told(folder, {**TABLES, "step": steps})


def _told(folder: Path, tables: dict[str, Callable[[dict[str, Any]], Rows]]) -> str:
    parts = []
    for stage, rows_of in tables.items():
        result = of_a_gpu(folder, stage)
        rows = rows_of(result)
        if rows:
            facts = result["environment"]
            where = f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}"
            parts.append(f"On {where}, {facts['date']}:\n\n{markdown(rows)}")
    counts = of_a_gpu(folder, "correct").get("counts")
    if counts:
        told = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        parts.append(f"Checks on the device: {told}.")
    return "\n\n".join(parts) if parts else f"*{NOT_MEASURED}*"


def markdown(rows: Rows) -> str:
    """Return a table in Markdown; the first row is the header."""
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
