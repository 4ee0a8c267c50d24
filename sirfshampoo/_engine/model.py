"""The model as far as an optimizer knows it: what rules find in it, and names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from sirfshampoo._config.arguments import check_rule
from sirfshampoo._config.axes import SUPPORTED_DTYPES
from sirfshampoo._config.weights import embedded
from sirfshampoo._engine.units import OUTSIDE, Unit
from sirfshampoo.combiner import PreconditionerGroup


class _NoModel(Module):
    """Stands in for a model of which nothing but parameters is known."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self._given = params

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Return the parameters."""
        return iter(self._given)  # type: ignore[arg-type]


def _described(p: Tensor) -> str:
    """Return what to call a parameter that the model does not have."""
    shape = "unknown shape" if is_lazy(p) else f"shape {tuple(p.shape)}"
    return f"a tensor of {shape} {OUTSIDE}"


class KnownModel:
    """What an optimizer knows of its model.

    Attributes:
        module: The model; None if only parameters were given.
    """

    def __init__(self, module: Module | None) -> None:
        """Know a model, or none."""
        self.module = module
        # what rules find in it; remembered while groups are being added
        self._identified: dict[int, list[list[Parameter]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs."""
        return {**vars(self), "_identified": {}}

    def trainable(self) -> list[Parameter]:
        """Return the model's parameters, but those that can never be trained.

        What is frozen may be thawed, unless its type allows no gradient, as that of
        quantised weights.
        """
        params = () if self.module is None else self.module.parameters()
        return [p for p in params if p.requires_grad or p.dtype in SUPPORTED_DTYPES]

    def embeddings(self) -> set[int]:
        """Return the identities of the weights that embeddings look up."""
        return set() if self.module is None else embedded(self.module)

    def identify(
        self, rule: PreconditionerGroup, params: Sequence[Tensor]
    ) -> list[list[Parameter]]:
        """Return what a rule finds in the model, or in parameters without one."""
        if self.module is None:
            check_rule(rule)
            return rule.identify(_NoModel(params))
        if id(rule) not in self._identified:
            self._identified[id(rule)] = rule.identify(self.module)
        return self._identified[id(rule)]

    def forget(self) -> None:
        """Forget what rules found: the model may change."""
        self._identified.clear()

    def names_of(self, params: Iterable[Tensor]) -> list[str]:
        """Return the parameters' names in the model."""
        known = () if self.module is None else self.module.named_parameters()
        names = {id(p): name for name, p in known}
        return [names.get(id(p)) or _described(p) for p in params]

    def names_of_units(
        self, units: Sequence[Unit], groups: Sequence[Mapping[str, Any]]
    ) -> list[list[str]]:
        """Return, a unit, the names of its parameters; without any: their numbers."""
        params = [p for unit in units for p in unit.params]
        # all at once: a walk through the model for each unit would take long
        known = iter(
            [str(i) for i in range(len(params))]
            if self.module is None
            else self.names_of(params)
        )
        names = [[next(known) for _ in unit.params] for unit in units]
        return [
            group.get("param_names") or found
            for group, found in zip(groups, names, strict=True)
        ]
