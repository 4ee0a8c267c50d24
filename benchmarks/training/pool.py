"""Runs work in processes of its own: each is fresh, and has one thread.

A fresh process for each run keeps what one optimizer's package does to torch away from
the others. They are forked from a server that has imported torch and the packages
already, so that a start takes milliseconds instead of seconds, and that all runs of a
command have the same code, whatever happens to the files meanwhile.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver, parent_process
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.environment import IMPORT_NAMES, ROOT

_METHODS = multiprocessing.get_all_start_methods()
_FORKS = "forkserver" in _METHODS
_CONTEXT = multiprocessing.get_context("forkserver" if _FORKS else "spawn")

Work = Callable[[connection.Connection, Any], None]
"""What a process does: it talks through the connection, and gets one argument."""


class WorkFailed(RuntimeError):
    """A process raised, or ended without a word."""


def prepare(folders: Mapping[str, Path]) -> None:
    """Let processes find packages, and start the server that they are forked from.

    Args:
        folders: Where each package of `environment.PACKAGES` is.
    """
    for folder in folders.values():
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # processes inherit the path
    if not _FORKS:
        return
    peers = [IMPORT_NAMES[package] for package in folders]
    # torch imports its compiler when the first optimizer is built: a second each time
    ours = "benchmarks.training.command"
    modules = ["torch._dynamo", ours, "sklearn.datasets", *peers]
    _CONTEXT.set_forkserver_preload(modules)
    places = os.pathsep.join(map(str, (ROOT, *folders.values())))
    variables = {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with patch.dict(os.environ, variables):
        forkserver.ensure_running()


class Process:
    """A process at work, and the connection to it."""

    def __init__(self, work: Work, argument: Any) -> None:
        """Start it."""
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_begin, args=(theirs, work, argument), daemon=True
        )
        self._process.start()
        theirs.close()

    def receive(self) -> Any:
        """Wait for what it says next.

        Raises:
            WorkFailed: If it raised, or ended without a word.
        """
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise WorkFailed(f"The process ended with exit code {code}.") from None
        if kind == "error":
            raise WorkFailed(value)
        return value

    def ask(self, question: Any) -> Any:
        """Say something, and wait for the answer."""
        with suppress(BrokenPipeError):  # what it said last may tell why it is gone
            self.connection.send(question)
        return self.receive()

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _begin(theirs: connection.Connection, work: Work, argument: Any) -> None:
    """Do the work in the new process; say what goes wrong."""
    torch.set_num_threads(1)
    try:
        work(theirs, argument)
    except KeyboardInterrupt:
        pass  # the driver tells
    except Exception:
        with suppress(BrokenPipeError):
            theirs.send(("error", traceback.format_exc()))


def end_if_alone() -> None:
    """End this process if the one that started it is gone, killed perhaps."""
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


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
    active: dict[connection.Connection, tuple[int, Process]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                position, argument = waiting.pop()
                process = Process(work, argument)
                active[process.connection] = (position, process)
            for ready in _ready(list(active)):
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


def _ready(connections: Sequence[connection.Connection]) -> list[Any]:
    """Wait until at least one has something to say."""
    return connection.wait(connections)
