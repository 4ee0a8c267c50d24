"""Runs work on many arguments, each in a process of its own that has one thread.

Processes are forked from a server that has imported torch and the packages already, so
that all runs of a command have the same code, whatever happens to the files meanwhile.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.environment import IMPORT_NAMES, ROOT
from benchmarks.processes import FORKED, FORKS, Process, Work, WorkFailed


def prepare(folders: Mapping[str, Path]) -> None:
    """Let processes find packages, and start the server that they are forked from.

    Args:
        folders: Where each package of `environment.PACKAGES` is.
    """
    for folder in folders.values():
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # processes inherit the path
    if not FORKS:
        return
    peers = [IMPORT_NAMES[package] for package in folders]
    # torch imports its compiler when the first optimizer is built: a second each time
    ours = "benchmarks.training.command"
    modules = ["torch._dynamo", ours, "sklearn.datasets", *peers]
    FORKED.set_forkserver_preload(modules)
    places = os.pathsep.join(map(str, (ROOT, *folders.values())))
    variables = {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with patch.dict(os.environ, variables):
        forkserver.ensure_running()


def each(
    work: Work, arguments: Iterable[Any], jobs: int
) -> Iterator[tuple[int, Any, WorkFailed | None]]:
    """Do the same work on each argument, several at once.

    Args:
        work: Sends one result as `("result", value)`.
        arguments: Taken in order.
        jobs: How many processes work at once.

    Yields:
        As they finish: the argument's position, the result, and what went wrong.
    """
    waiting = list(enumerate(arguments))[::-1]
    active: dict[Any, tuple[int, Process]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                position, argument = waiting.pop()
                process = Process(work, argument)
                active[process.connection] = (position, process)
            for ready in connection.wait(list(active)):
                position, process = active[ready]
                try:
                    result, failure = process.receive(), None
                except WorkFailed as error:
                    result, failure = None, error
                del active[ready]
                process.close()
                yield position, result, failure
    finally:
        for _, process in active.values():
            process.close()
