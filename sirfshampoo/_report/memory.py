"""Whether the memory that is free holds what pre-conditioners need."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sirfshampoo._engine.costs import cost_of, counter_bytes, momentum_bytes
from sirfshampoo._engine.units import Unit
from sirfshampoo._report.table import Row, Summary, summarize, tell_bytes
from sirfshampoo.structures import structure_class

#: How many of the largest axes an error names.
_NAMED = 3


def check_memory(
    units: Sequence[Unit],
    groups: Sequence[Mapping[str, Any]],
    *,
    names_of: Callable[[Sequence[Tensor]], Sequence[str]],
    holds: Callable[[Unit], bool] = lambda unit: True,
) -> None:
    """Check that what units need fits into the free memory of their devices.

    Args:
        units: The units that memory is about to be allocated for.
        groups: All parameter groups.
        names_of: Returns the names of parameters.
        holds: Returns whether the factors of a unit lie on this rank. Where they do
            not, the momenta of sharded parameters do all the same.

    Raises:
        MemoryError: If it does not fit.
    """
    needed: dict[torch.device, int] = {}
    for unit in units:
        group, device = groups[unit.group], unit.params[0].device
        own = momentum_bytes(unit, group, held=holds(unit))
        if holds(unit):
            cost = cost_of(unit, group)
            own += sum(cost.axis_bytes) + cost.kept_bytes + counter_bytes(unit)
        needed[device] = needed.get(device, 0) + own
    for device, number in needed.items():
        free = free_bytes(device)
        if free is not None and number > free:
            here = [u for u in units if u.params[0].device == device and holds(u)]
            known = iter(names_of([p for unit in here for p in unit.params]))
            found = [[next(known) for _ in unit.params] for unit in here]
            names = [
                groups[unit.group].get("param_names") or of_unit
                for unit, of_unit in zip(here, found, strict=True)
            ]
            raise MemoryError(_refusal(summarize(here, groups, names), device, free))


def _refusal(summary: Summary, device: torch.device, free: int) -> str:
    """Return why there is no memory for these rows, and what to write instead."""
    totals = summary.totals
    needed = totals["state_bytes"] + totals["kept_bytes"]
    axes = [(b, row, n) for row in summary.rows for n, b in enumerate(row.axis_bytes)]
    axes.sort(key=lambda axis: -axis[0])
    largest = "; ".join(
        f"axis {n} of {_label(row)}, {row.shape[n]:,} long, {row.structures[n]!r}, "
        f"{tell_bytes(number)}"
        for number, row, n in axes[:_NAMED]
    )
    _, row, n = axes[0]
    return (
        f"SIRFShampoo needs {tell_bytes(needed)} ({needed:,} bytes) on {device}, where "
        f"{tell_bytes(free)} ({free:,} bytes) are free. The largest axes: {largest}. "
        f"{_advice(row, n)} sirfshampoo.summary tells what each parameter needs."
    )


def _label(row: Row) -> str:
    return " + ".join(repr(name) for name in row.names)


def _advice(row: Row, n: int) -> str:
    """Return what to write where the n-th axis of a unit is too large."""
    dim = row.shape[n]
    if structure_class(row.structures[n]).num_stored(dim) <= dim:
        return "Write preconditioner_dtypes=torch.bfloat16, or alpha2=0."
    axes = zip(row.shape, row.structures, strict=True)
    lean = tuple("diagonal" if d == dim else name for d, name in axes)
    return (
        f"Write structures={{{len(lean)}: {lean!r}}} in a parameter group for "
        f"{_label(row)}, or let sirfshampoo.choose_structures(model) write the groups."
    )


# --- what is free ---------------------------------------------------------------------
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes can be allocated on a device; None if that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    if device.type == "cpu":
        return min(_free_on_the_host(), default=None)
    return None


def _free_on_the_host() -> Iterator[int]:
    """Yield what the system, and each control group of this process, leaves free."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", _text(_PROC / "meminfo"))
    if available:
        yield int(available[1]) * 1024
    # lines such as `0::/a/b` (version 2) or `4:memory:/a/b` (version 1)
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, usage = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit = _CGROUPS / "memory", "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        # what holds for a group holds for those in it
        for level in (group, *group.parents):
            if not level.is_relative_to(root):
                break
            yield from _left_by(level, limit, usage)


def _left_by(group: Path, limit: str, usage: str) -> Iterator[int]:
    """Yield what a control group's limit leaves free, if it has one."""
    most, used = _text(group / limit).strip(), _text(group / usage).strip()
    if most.isdigit() and used.isdigit():
        statistics = _text(group / "memory.stat")
        # cached files count as used, but make room
        cached = re.findall(r"^(?:in)?active_file (\d+)$", statistics, re.MULTILINE)
        yield max(int(most) - int(used) + sum(map(int, cached)), 0)


def _text(path: Path) -> str:
    """Return the text of a file of the system; nothing if there is none."""
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""
