"""How the optimizers of drawn loops are set up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from sirfshampoo import LinearWeightBias, PerParameter, SIRFShampoo, recipe
from tests.cases import FAST, mixture

DECAY = 0.9  # of the learning rate, whenever the scheduler steps
LAYERS, LATER = ("0", "2", "4", "6"), "6"  # the last one may join the optimizer later


def new_model() -> nn.Sequential:
    """Four layers, two of which share a stack."""
    widths = [3, 4, 4, 4, 2]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


@dataclass(frozen=True)
class Case:
    """How an optimizer is set up."""

    options: Callable[[nn.Module], dict[str, Any]]
    rules: tuple[str, ...] = ("PerParameter",)

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return the constructor's arguments."""
        known = {"LinearWeightBias": LinearWeightBias, "PerParameter": PerParameter}
        rules = tuple(known[name]() for name in self.rules)
        return {
            **self.options(model),
            "combine_params": rules,
            "allow_closure": True,
        }


JOINED = ("LinearWeightBias", "PerParameter")
SMALL = {**FAST, "lr": 0.01, "kappa": 0.1}

CASES: dict[str, Case] = {
    "plain": Case(lambda model: SMALL),
    "joined": Case(lambda model: {**SMALL, "structures": mixture(1)}, JOINED),
    "recipe": Case(lambda model: recipe(model, batch_size=4, steps=40)),
    "recipe-joined": Case(lambda model: recipe(model, batch_size=4), JOINED),
    "following": Case(lambda model: {**SMALL, "follow_gradient": True}, JOINED),
    "T=3": Case(lambda model: {**SMALL, "T": 3, "alpha2": 0.0}, JOINED),
    "spread": Case(lambda model: {**SMALL, "T": 3, "spread_updates": True}),
    "from-the-gradient": Case(
        lambda model: {**SMALL, "T": 3, "initial_factors": "gradient"}
    ),
    "without-momentum": Case(lambda model: {**SMALL, "alpha1": 0.0, "alpha2": 0.0}),
}


def is_of(name: str, layers: Iterable[str]) -> bool:
    """Return whether a parameter is one of these layers'."""
    return name.partition(".")[0] in layers


def build_optimizer(
    arguments: dict[str, Any], model: nn.Module, *, late: bool, has_joined: bool
) -> SIRFShampoo:
    """Set up the optimizer as a script does, in every run in the same way.

    Args:
        arguments: The constructor's.
        model: The model.
        late: Whether the last layer is left out at first.
        has_joined: Whether it has joined by now.
    """
    named = dict(model.named_parameters())
    params = [p for name, p in named.items() if not (late and is_of(name, LATER))]
    optimizer = SIRFShampoo(model, params, **arguments)
    if late and has_joined:
        join(optimizer, model)
    return optimizer


def join(optimizer: SIRFShampoo, model: nn.Module) -> None:
    """Have the last layer trained, too."""
    params = [p for n, p in model.named_parameters() if is_of(n, LATER)]
    optimizer.add_param_group({"params": params})
