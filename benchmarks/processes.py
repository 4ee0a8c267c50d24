"""Work in another process: it is given one argument, and is talked to.

What an optimizer's package does to torch ends with its process, and two packages of one
name share none. A fork of a server that has imported torch starts within milliseconds.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
FORKED: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
FRESH: Any = multiprocessing.get_context("spawn")

Work = Callable[[Connection, Any], None]
"""What a process does: it talks through the connection, and gets one argument."""


class WorkFailed(RuntimeError):
    """A process raised, or ended without a word."""


class Process:
    """A process at work, and the connection to it."""

    def __init__(
        self, work: Work, argument: Any, *, threads: int = 1, context: Any = FORKED
    ) -> None:
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_begin, args=(theirs, work, argument, threads), daemon=True
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
        except (EOFError, ConnectionResetError):
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


def _begin(theirs: Connection, work: Work, argument: Any, threads: int) -> None:
    """Do the work in the new process; say what goes wrong."""
    torch.set_num_threads(threads)
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
