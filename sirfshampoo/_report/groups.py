"""What parameter groups look like to people: equal ones are told once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def tell_groups(title: str, groups: Sequence[Mapping[str, Any]]) -> str:
    """Return a text in the form of torch's optimizers, equal groups folded.

    Args:
        title: The name of the optimizer.
        groups: Its parameter groups.
    """
    alike: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        options = "".join(
            f"    {key}: {_tell(group[key])}\n"
            for key in sorted(group)
            if key not in ("params", "param_names")
        )
        alike.setdefault(options, []).append(i)
    text = f"{title} (\n"
    for options, numbers in alike.items():
        params = sum(len(groups[i]["params"]) for i in numbers)
        several = "s" if len(numbers) > 1 else ""
        text += f"Parameter Group{several} {_runs(numbers)} ({params} parameters)\n"
        text += options + "\n"
    return text.rstrip("\n") + "\n)"


def _tell(value: Any) -> str:
    """Return a value of an option; of rules, their names."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_tell, value))}{',' if len(value) == 1 else ''})"
    text = repr(value)
    # the address of an object tells nothing, and would keep equal groups apart
    return f"{type(value).__name__}()" if " object at 0x" in text else text


def _runs(numbers: Sequence[int]) -> str:
    """Return numbers in ascending order as runs, such as "0-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
