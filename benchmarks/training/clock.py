"""Times the winners in turns, alone on the machine: what makes seconds comparable.

Runs of a search work at the same time and at different hours, so their own seconds
compare nothing. Here every contestant trains once more in a process of its own, a tenth
of the run at a time, in turns; only one works at a time. What slows the machine for a
while slows all alike. The whole is done several times, and of each turn the
fastest counts: the machine is shared, and nothing makes a turn faster than it is.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.processes import Process, WorkFailed, end_if_alone
from benchmarks.training.trial import Training

TURNS = 10  # in a run
PERIOD = 10  # steps: turns are whole periods of T = 10
WARM_UP = 3  # steps of another training before: first calls set things up


def measure(
    specs: Mapping[str, Mapping[str, Any]],
    rounds: int,
    after_turn: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Time whole runs, turn by turn.

    Args:
        specs: What to run, by name; all have the same number of steps.
        rounds: How often the whole is done.
        after_turn: Called with the name of who had a turn.

    Returns:
        `"steps"`, the step that each turn ends with; and for each name the seconds
        from the start until then, or why there are none.
    """
    (steps,) = {spec["steps"] for spec in specs.values()}
    length = PERIOD * math.ceil(steps / TURNS / PERIOD)
    ends = [min(start + length, steps) for start in range(0, steps, length)]
    turns: dict[str, list[list[float]]] = {name: [] for name in specs}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        _round(specs, ends, turns, failed, after_turn)
    found: dict[str, Any] = {"steps": [0, *ends], "seconds": {}, "failed": failed}
    for name, times in turns.items():
        if name not in failed:
            fastest = [min(turn) for turn in zip(*times, strict=True)]
            total = [0.0]
            for seconds in fastest:
                total.append(round(total[-1] + seconds, 5))
            found["seconds"][name] = total
    return found


def _round(
    specs: Mapping[str, Mapping[str, Any]],
    ends: list[int],
    turns: dict[str, list[list[float]]],
    failed: dict[str, str],
    after_turn: Callable[[str], None],
) -> None:
    """Let each train from start to end, in turns."""
    with ExitStack() as stack:
        processes = {}
        for name in specs:
            if name in failed:
                continue
            processes[name] = Process(_train, dict(specs[name]))
            stack.callback(processes[name].close)
            turns[name].append([])
        done = 0
        for number, end in enumerate(ends):
            # Back and forth: nobody always follows the same neighbour.
            order = list(processes) if number % 2 == 0 else list(processes)[::-1]
            for name in order:
                try:
                    turns[name][-1].append(processes[name].ask(end - done))
                except WorkFailed as error:
                    failed[name] = str(error).strip().splitlines()[-1]
                    del processes[name]
                after_turn(name)
            done = end


def _train(connection: Connection, spec: dict[str, Any]) -> None:
    """Take as many steps as asked, again and again; answer with the seconds."""
    warm = Training(spec)
    for _ in range(WARM_UP):
        warm.step()
    training = Training(spec)
    while True:
        steps = connection.recv()
        end_if_alone()
        start = time.perf_counter()
        for _ in range(steps):
            training.step()
        connection.send(("result", time.perf_counter() - start))
