"""Several processes on this machine that talk to each other by gloo.

They are kept for many cases, because starting them takes seconds. A case is a function
of a module; it runs on every rank and compares numbers by itself.
"""

import contextlib
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.versions import allow_own_warnings

TIMEOUT = 30.0
"""Seconds after which a collective fails, and so does the test."""


def context() -> Any:
    """Return the way in which processes start: from one that knows torch already."""
    found = mp.get_context("forkserver")
    preload = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
    found.set_forkserver_preload(preload)
    return found


def join_ranks(
    rank: int, world: int, store: str, timeout: float = TIMEOUT, backend: str = "gloo"
) -> None:
    """Make this process one of several ranks."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    allow_own_warnings()
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )


def _serve(rank: int, world: int, store: str, backend: str, cases: Connection) -> None:
    """Run cases until there are no more."""
    join_ranks(rank, world, store, backend=backend)
    with contextlib.suppress(EOFError):
        while True:
            case, arguments = cases.recv()
            torch.manual_seed(0)
            try:
                result = case(**arguments)
            except BaseException:
                cases.send(
                    (False, f"Rank {rank} of {world}:\n{traceback.format_exc()}")
                )
            else:
                cases.send((True, result))


class Ranks:
    """Processes that run cases, one after the other."""

    def __init__(self, world: int, backend: str = "gloo") -> None:
        """Set up nothing before the first case."""
        self.world, self.backend = world, backend
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        folder = tempfile.mkdtemp(prefix="ranks-")
        ctx = context()
        for rank in range(self.world):
            here, there = ctx.Pipe()
            store = str(Path(folder) / "store")
            arguments = (rank, self.world, store, self.backend, there)
            process = ctx.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join(TIMEOUT)
        self._processes, self._pipes = [], []

    def run(self, case: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Run a case on all ranks and return what it returned on each.

        Raises:
            AssertionError: If it failed on any, or has not ended in time.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, arguments))
        answers: dict[Connection, tuple[bool, Any]] = {}
        end = monotonic() + 3 * TIMEOUT
        while len(answers) < self.world:
            left = [pipe for pipe in self._pipes if pipe not in answers]
            ready = wait(left, timeout=max(end - monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[pipe] = pipe.recv()  # type: ignore[union-attr, index]
                except EOFError:
                    answers[pipe] = (False, "A rank has died.")  # type: ignore[index]
        told = [answers.get(pipe, (False, "It hangs.")) for pipe in self._pipes]
        failures = [what for fine, what in told if not fine]
        if failures:
            self.stop()  # they may wait for each other
            raise AssertionError(f"{len(failures)} ranks failed. {failures[0]}")
        return [what for _, what in told]


def _run_once(
    rank: int, world: int, store: str, timeout: float, case: Any, pipe: Connection
) -> None:
    join_ranks(rank, world, store, timeout)
    pipe.send(case(pipe=pipe))
    pipe.recv()  # until the others have seen what there is to see


def until_one_fails(
    case: Callable[..., str], world: int, timeout: float, end: float, folder: Path
) -> tuple[list[str], float]:
    """Run a case in which the last rank fails, on processes of its own.

    Returns:
        What the other ranks say, and after how many seconds they all did.

    Raises:
        AssertionError: If one of them says nothing until `end`.
    """
    ctx, pipes, processes = context(), [], []
    for rank in range(world):
        here, there = ctx.Pipe()
        arguments = (rank, world, str(folder / "store"), timeout, case, there)
        processes.append(ctx.Process(target=_run_once, args=arguments, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    start, told = monotonic(), []
    try:
        for pipe in pipes[:-1]:
            assert pipe.poll(max(end - (monotonic() - start), 0)), "A rank hangs."
            told.append(pipe.recv())
        return told, monotonic() - start
    finally:
        for process in processes:
            process.kill()
            process.join(TIMEOUT)
