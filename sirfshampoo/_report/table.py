"""The table of what pre-conditioners are and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sirfshampoo._engine.costs import cost_of, counter_bytes, momentum_bytes, period_of
from sirfshampoo._engine.spread import costliest_step, spread
from sirfshampoo._engine.units import Unit

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Row", "Summary", "summarize", "tell_bytes"]


@dataclass(frozen=True)
class Row:
    """What one pre-conditioner is and costs.

    Attributes:
        names: The names of its parameters.
        rule: The name of the rule that joins them.
        shape: The shape of the joint tensor.
        structures: The structure of each axis' Kronecker factor.
        dtypes: The type of each axis' Kronecker factor, such as ``'float32'``.
        device: Where all of it lies.
        parameters: How many numbers the parameters hold.
        axis_bytes: The bytes of each axis' factor with its momentum.
        momentum_bytes: The bytes of the parameters' momentum buffers.
        counter_bytes: The bytes of what is counted, such as steps.
        kept_bytes: The bytes of what is kept of K Kᵀ between updates of the factors,
            beside the state; 0 if ``T`` is 1.
        update_flops: About how many floating-point operations an update of the factors
            takes.
        step_flops: About how many it takes to pre-condition a gradient, in every step.
    """

    names: tuple[str, ...]
    rule: str
    shape: tuple[int, ...]
    structures: tuple[str, ...]
    dtypes: tuple[str, ...]
    device: str
    parameters: int
    axis_bytes: tuple[int, ...]
    momentum_bytes: int
    counter_bytes: int
    kept_bytes: int
    update_flops: int
    step_flops: int

    @property
    def factor_bytes(self) -> int:
        """The bytes of the factors and their momenta."""
        return sum(self.axis_bytes)

    @property
    def state_bytes(self) -> int:
        """The bytes of all tensors in the optimizer's state, counters included."""
        return self.factor_bytes + self.momentum_bytes + self.counter_bytes


#: What is added up over the rows.
_SUMS = (
    "parameters",
    "factor_bytes",
    "momentum_bytes",
    "kept_bytes",
    "state_bytes",
    "update_flops",
    "step_flops",
)

_HEADS = (
    "parameters",
    "units",
    "shape",
    "structures",
    "types",
    "numbers",
    "factors",
    "momentum",
    "kept",
    "update",
    "step",
)
_LEFT = ("parameters", "shape", "structures", "types")


@dataclass(frozen=True)
class Summary:
    """What an optimizer's pre-conditioners are and cost, one row each.

    ``print(summary)`` shows a table in which equal rows are folded, ``rich.print`` the
    same in rich's form, and `to_dict` gives plain data.

    Attributes:
        rows: One row for each pre-conditioner, in the order of the parameter groups.
        peak_flops: About how many floating-point operations the costliest step takes,
            where all updates that an integer ``T`` asks for fall on one step. A
            callable ``T`` is taken to ask for one then.
        spread_peak_flops: The same with ``spread_updates=True``.

    Example:
        >>> told = summary(torch.nn.Linear(30, 20), structures="diagonal")
        >>> [(row.names, row.shape) for row in told.rows]
        [(('weight',), (20, 30)), (('bias',), (20,))]
        >>> told.totals["parameters"]
        620
    """

    rows: tuple[Row, ...]
    peak_flops: int
    spread_peak_flops: int

    @property
    def totals(self) -> dict[str, int]:
        """The sums over all rows, by the name of the row's attribute."""
        return {name: sum(getattr(row, name) for row in self.rows) for name in _SUMS}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON.

        Returns:
            ``'rows'``, a list with a dictionary of each row's attributes,
            ``'totals'``, ``'peak_flops'`` and ``'spread_peak_flops'``.
        """
        rows = [
            asdict(row)
            | {name: getattr(row, name) for name in ("factor_bytes", "state_bytes")}
            for row in self.rows
        ]
        for row in rows:
            row |= {k: list(v) for k, v in row.items() if isinstance(v, tuple)}
        return {
            "rows": rows,
            "totals": self.totals,
            "peak_flops": self.peak_flops,
            "spread_peak_flops": self.spread_peak_flops,
        }

    def _title(self) -> str:
        numbers, state = (self.totals[name] for name in ("parameters", "state_bytes"))
        return (
            f"SIRFShampoo: {len(self.rows)} pre-conditioners for {numbers:,} numbers, "
            f"{tell_bytes(state)} of state"
        )

    def _note(self) -> str:
        peak, spread_peak = map(_flops, (self.peak_flops, self.spread_peak_flops))
        return (
            f"{_NOTE} The costliest step: {peak}; with spread_updates: {spread_peak}."
        )

    def _cells(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, line by line, the totals last."""
        alike: dict[Row, list[Row]] = {}
        for row in self.rows:
            alike.setdefault(replace(row, names=()), []).append(row)
        lines = []
        for rows in alike.values():
            first, number = rows[0], len(rows)
            more = f", and {number - 1} more" if number > 1 else ""
            label = (
                " + ".join(first.names) + more,
                f"{number:,}",
                " x ".join(map(str, first.shape)),
                _once(first.structures),
                _once(first.dtypes),
            )
            sums = {name: sum(getattr(row, name) for row in rows) for name in _SUMS}
            lines.append(label + _numbers(sums))
        total = ("total", f"{len(self.rows):,}", "", "", "")
        return [*lines, total + _numbers(self.totals)]

    def __str__(self) -> str:
        """Return the table as plain text."""
        lines = [_HEADS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(-1, tuple("-" * width for width in widths))
        lines.insert(1, lines[-2])
        text = [self._title(), ""]
        for line in lines:
            cells = [
                cell.ljust(width) if head in _LEFT else cell.rjust(width)
                for cell, width, head in zip(line, widths, _HEADS, strict=True)
            ]
            text.append("  ".join(cells).rstrip())
        return "\n".join([*text, "", self._note()])

    def __rich__(self) -> Table:
        """Return the table in rich's form."""
        from rich.table import Table

        table = Table(title=self._title(), caption=self._note())
        for head in _HEADS:
            table.add_column(head, justify="left" if head in _LEFT else "right")
        *lines, total = self._cells()
        for line in lines:
            table.add_row(*line)
        table.add_section()
        table.add_row(*total)
        return table


_NOTE = (
    "factors: with their momenta. kept: K K^T between updates, beside the state. "
    "update, step: operations of learning the factors, when due, and of "
    "pre-conditioning, always."
)


def _once(names: Sequence[str]) -> str:
    """Return the one name that all axes share, or the name of each."""
    return ", ".join(names if len(set(names)) > 1 else names[:1])


def _numbers(sums: Mapping[str, int]) -> tuple[str, ...]:
    """Return the cells of a line from the count of numbers on."""
    sizes = ("factor_bytes", "momentum_bytes", "kept_bytes")
    return (
        f"{sums['parameters']:,}",
        *(tell_bytes(sums[name]) for name in sizes),
        *(_flops(sums[name]) for name in ("update_flops", "step_flops")),
    )


def tell_bytes(number: int) -> str:
    """Return a number of bytes for people."""
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _flops(number: int) -> str:
    """Return a number of operations for people."""
    size = float(number)
    for unit in ("", " k", " M", " G"):
        if size < 1000:
            return f"{size:.1f}{unit}" if unit else f"{size:.0f}"
        size /= 1000
    return f"{size:,.1f} T"


def summarize(
    units: Iterable[Unit],
    groups: Sequence[Mapping[str, Any]],
    names: Iterable[Sequence[str]],
) -> Summary:
    """Return what units cost.

    Args:
        units: The units.
        groups: All parameter groups.
        names: The names of each unit's parameters.
    """
    rows, periods = [], []
    for unit, of_unit in zip(units, names, strict=True):
        group = groups[unit.group]
        cost = cost_of(unit, group)
        periods.append(period_of(group))
        rows.append(
            Row(
                names=tuple(of_unit),
                rule=type(unit.rule).__name__,
                shape=tuple(unit.dims),
                structures=unit.structures,
                dtypes=tuple(str(dtype).partition(".")[2] for dtype in unit.dtypes),
                device=str(unit.params[0].device),
                parameters=unit.dims.numel(),
                axis_bytes=cost.axis_bytes,
                momentum_bytes=momentum_bytes(unit, group),
                counter_bytes=counter_bytes(unit),
                kept_bytes=cost.kept_bytes,
                update_flops=cost.update_flops,
                step_flops=cost.step_flops,
            )
        )
    updates, always = [row.update_flops for row in rows], [0] * len(rows)
    steps = sum(row.step_flops for row in rows)
    return Summary(
        tuple(rows),
        peak_flops=steps + costliest_step(updates, periods, always),
        spread_peak_flops=steps
        + costliest_step(updates, periods, spread(updates, periods)),
    )
