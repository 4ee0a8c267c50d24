"""A row of the compatibility table: what it says, and the code that tries it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from sirfshampoo import SIRFShampoo


@dataclass(frozen=True)
class Contestant:
    """An optimizer that rows are run against; calling it builds one.

    Attributes:
        name: The column of the table.
        cls: The class of the optimizer.
        settings: Options that make parameters visibly move within a few steps.
        rounding: How far parameters that are trained with others may be from those
            trained alone: where many are treated at once, sums have another order.
    """

    name: str
    cls: type[Optimizer]
    settings: dict[str, Any]
    rounding: float = 0.0

    def __call__(self, model: Any, params: Any = None, **options: Any) -> Any:
        """Build the optimizer.

        Args:
            model: A model, or plain parameters.
            params: Some of the model's parameters, or groups of them.
            options: Further options. `batch_size` means nothing to AdamW.
        """
        options = {**self.settings, **options}
        if self.cls is SIRFShampoo:
            return self.cls(model, **options, **({"params": params} if params else {}))
        options.pop("batch_size", None)
        if params is None:
            params = model.parameters() if isinstance(model, nn.Module) else model
        return self.cls(params, **options)


OURS = Contestant(
    "SIRFShampoo", SIRFShampoo, {"lr": 0.05, "beta2": 0.2, "lam": 0.01}, rounding=1e-5
)
# weight decay would move parameters that have no gradient, and ours has none
ORACLE = Contestant("AdamW", AdamW, {"lr": 0.05, "weight_decay": 0.0})
CONTESTANTS = (OURS, ORACLE)


@dataclass(frozen=True)
class Row:
    """One claim about an optimizer.

    Attributes:
        section: The part of the table.
        title: The claim.
        run: Tries it for a contestant; whatever it raises, refutes it.
        applies_to: The names of the contestants for which the claim makes sense.
    """

    section: str
    title: str
    run: Callable[[Contestant], None]
    applies_to: tuple[str, ...]

    def check(self, contestant: Contestant) -> None:
        """Try the claim from the same start every time; warnings are errors."""
        random.seed(0)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.run(contestant)

    def measure(self, contestant: Contestant) -> tuple[str, str | None]:
        """Return "yes", "no" or "–" (does not apply); for "no" the reason, too."""
        if contestant.name not in self.applies_to:
            return "–", None
        try:
            self.check(contestant)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            return "no", text.splitlines()[0][:200]
        return "yes", None


@dataclass
class Section:
    """Rows that belong together; `row` adds one."""

    title: str
    rows: list[Row] = field(default_factory=list)

    def row(
        self, title: str, *, only: Contestant | None = None
    ) -> Callable[[Callable[[Contestant], None]], Callable[[Contestant], None]]:
        """Make a row of the decorated function."""
        names = tuple(c.name for c in CONTESTANTS if only in (None, c))

        def add(run: Callable[[Contestant], None]) -> Callable[[Contestant], None]:
            self.rows.append(Row(self.title, title, run, names))
            return run

        return add
