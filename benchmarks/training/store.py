"""Finished runs, one a line in a file for each task: none is ever run twice."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.training.trial import SPEC, key_of


class Store:
    """The runs of one task.

    A line is written at once when its run is finished, so that a kill loses only what
    was under way. A line that was cut by a kill is left out when the file is read.
    """

    def __init__(self, path: Path, data_hash: str) -> None:
        """Read what is there.

        Args:
            path: The file; it need not exist.
            data_hash: Runs on other data are left out.
        """
        self.path = path
        self._runs: dict[str, dict[str, Any]] = {}
        self._clocks: dict[str, dict[str, Any]] = {}
        for record in _lines(path):
            if "clock" in record:
                self._clocks[record["clock"]] = record
            elif record["data"] == data_hash:
                self._runs[_key(record)] = record

    def find(self, spec: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the record of a run, if it is finished."""
        return self._runs.get(key_of(spec))

    def add(self, record: dict[str, Any]) -> None:
        """Keep the record of a run."""
        self._runs[_key(record)] = record
        _append(record, self.path)

    def forget(self, specs: list[dict[str, Any]]) -> None:
        """Leave out runs, for them to be run anew; the file keeps both."""
        for spec in specs:
            self._runs.pop(key_of(spec), None)

    def find_clock(self, key: str) -> dict[str, Any] | None:
        """Return a measurement of time, if it is finished."""
        return self._clocks.get(key)

    def add_clock(self, key: str, record: dict[str, Any]) -> None:
        """Keep a measurement of time."""
        self._clocks[key] = {"clock": key, **record}
        _append(self._clocks[key], self.path)


def _key(record: Mapping[str, Any]) -> str:
    return key_of({field: record[field] for field in SPEC})


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut by a kill
    return found


def _append(record: Mapping[str, Any], path: Path) -> None:
    """Add a line, on a line of its own even after one that was cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut = file.read(1) != b"\n"
        else:
            cut = False
        file.write(b"\n" * cut + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
