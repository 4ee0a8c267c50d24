"""Measures every row and writes the results: `python -m tests.conformance`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.environment import describe

from . import CONTESTANTS, ROWS, Row

PATH = results.RESULTS / "conformance.json"


def measure(row: Row) -> dict[str, Any]:
    """Return the record of one row: a verdict for each contestant, and reasons."""
    record: dict[str, Any] = {"section": row.section, "title": row.title}
    reasons = {}
    for contestant in CONTESTANTS:
        record[contestant.name], reason = row.measure(contestant)
        if reason is not None:
            reasons[contestant.name] = reason
    return {**record, "reasons": reasons} if reasons else record


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every row for every optimizer, and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, default=PATH, help="the JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    records = []
    for row in ROWS:
        record = measure(row)
        for name, reason in record.get("reasons", {}).items():
            print(f"{name}: no: {row.section}: {row.title}\n    {reason}")
        records.append(record)
    environment = describe(threads=1)
    kept = ("date", "commit", "python", "torch", "system")
    result = {"environment": {key: environment[key] for key in kept}, "rows": records}
    results.save(result, args.output)
    print(f"{len(records)} rows, written to {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
