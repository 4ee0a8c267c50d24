"""What the optimizer of a drawn loop is held against."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sirfshampoo import SIRFShampoo
from tests.loop.fuzz.configurations import (
    DECAY,
    LATER,
    Case,
    build_optimizer,
    is_of,
    join,
)
from tests.twin import Twin, assert_agree, find_units

Gradients = dict[str, Tensor | None]
#: What changes nothing of what is computed, or has to be found out (the phases).
NOT_OF_TWIN = (
    "combine_params",
    "allow_closure",
    "expected_batch_size",
    "spread_updates",
)


class Reference(Protocol):
    """What takes a step when it is told gradients and batch size."""

    def step(self, gradients: Gradients, size: int) -> None:
        """Move what has a gradient."""

    def decay(self) -> None:
        """Lower the learning rates."""

    def join(self) -> None:
        """Train the last layer, too."""

    def change(self, change: Callable[[nn.Module], Any]) -> None:
        """Freeze, thaw or cast what the model has."""

    def assert_agrees(self, model: nn.Module, optimizer: SIRFShampoo) -> None:
        """Compare."""


class OfTheTwin:
    """The method as the paper states it, in float64; it knows no loop at all."""

    def __init__(self, case: Case, model: nn.Module, late: bool) -> None:
        """Copy the parameters of a model."""
        self.model = deepcopy(model)
        names = {p: name for name, p in self.model.named_parameters()}
        units = [
            ([names[p] for p in unit[0]], unit)
            for unit in find_units(self.model, case.rules)
        ]
        held_back = (LATER,) if late else ()
        now = [unit for ns, unit in units if not is_of(ns[0], held_back)]
        self.later = [unit for ns, unit in units if is_of(ns[0], held_back)]
        self.given = case.arguments(model)
        self.arguments = {k: v for k, v in self.given.items() if k not in NOT_OF_TWIN}
        structures = self.arguments.get("structures", "dense")
        if isinstance(structures, dict):  # axes are short here
            self.arguments["structures"] = {
                axes: "dense" if names == "dense1024" else names
                for axes, names in structures.items()
            }
        self.twin = Twin(now, **self.arguments)
        self.find_phases(late, has_joined=False)

    def find_phases(self, late: bool, has_joined: bool) -> None:
        """Ask an optimizer that has done nothing yet when units are updated."""
        if "spread_updates" not in self.given:
            return
        how = {"late": late, "has_joined": has_joined}
        optimizer = build_optimizer(self.given, self.model, **how)
        phases = optimizer._engine.phases(optimizer.param_groups)
        of = {
            id(group["params"][0]): phase
            for group, phase in zip(optimizer.param_groups, phases, strict=True)
        }
        for unit in self.twin.units:
            phase = of[id(unit.params[0])]
            unit.settings["T"] = partial(is_due, self.arguments["T"], phase)

    def step(self, gradients: Gradients, size: int) -> None:
        """Take the step of the paper."""
        named = dict(self.model.named_parameters())
        self.twin.step({named[n]: G for n, G in gradients.items()}, size)

    def decay(self) -> None:
        """Lower the learning rates."""
        for unit in self.twin.units:
            unit.settings["lr"] *= DECAY

    def join(self) -> None:
        """Train the last layer, too."""
        self.twin.units += Twin(self.later, **self.arguments).units
        self.find_phases(True, has_joined=True)

    def change(self, change: Callable[[nn.Module], Any]) -> None:
        """Do nothing: what has no gradient rests."""

    def assert_agrees(self, model: nn.Module, optimizer: SIRFShampoo) -> None:
        """Compare; what was never trained may lack state, and must not have moved."""
        assert optimizer.global_step == self.twin.global_step
        names = {p: name for name, p in self.model.named_parameters()}
        named = dict(model.named_parameters())
        by_first = {id(g["params"][0]): i for i, g in enumerate(optimizer.param_groups)}
        kept, units = [], []
        for unit in self.twin.units:
            params = [named[names[p]] for p in unit.params]
            if optimizer.state.get(params[0]):
                kept.append(by_first[id(params[0])])
                view = {**vars(unit), "params": params}
                units.append(SimpleNamespace(**view))
            else:
                for p, W, start in zip(params, unit.W, unit.start, strict=True):
                    assert torch.equal(p, W)
                    assert torch.equal(W, start)
        assert len(self.twin.units) == len(optimizer.param_groups)
        attributes = ("param_groups", "preconditioner", "preconditioner_momenta")
        every = {name: getattr(optimizer, name) for name in attributes}
        part = {name: [found[i] for i in kept] for name, found in every.items()}
        twin: Any = SimpleNamespace(units=units, global_step=self.twin.global_step + 1)
        assert_agree(twin, SimpleNamespace(**part), 1e-9)


def is_due(T: int, phase: int, step: int) -> bool:
    """Return whether factors are updated in a step."""
    return step % T == phase


class OfAPlainLoop:
    """The optimizer itself, without forward passes, copies and checkpoints.

    What a change of the parameters' dtype does is not in the paper.
    """

    def __init__(self, case: Case, model: nn.Module, late: bool) -> None:
        """Copy the model, and never call it."""
        self.model = deepcopy(model)
        params = [p for n, p in self.model.named_parameters() if not is_of(n, LATER)]
        params = params if late else list(self.model.parameters())
        arguments = case.arguments(self.model)
        self.optimizer = SIRFShampoo(self.model, params, batch_size=1, **arguments)

    def step(self, gradients: Gradients, size: int) -> None:
        """Set gradients and batch size by hand."""
        for name, p in self.model.named_parameters():
            p.grad = gradients.get(name)
        self.optimizer._batch_size._last = size
        self.optimizer.step()

    def decay(self) -> None:
        """Lower the learning rates."""
        for group in self.optimizer.param_groups:
            group["lr"] *= DECAY

    def join(self) -> None:
        """Train the last layer, too."""
        join(self.optimizer, self.model)

    def change(self, change: Callable[[nn.Module], Any]) -> None:
        """Freeze, thaw or cast, too."""
        self.model.zero_grad()
        change(self.model)

    def assert_agrees(self, model: nn.Module, optimizer: SIRFShampoo) -> None:
        """Compare every bit."""
        own = self.optimizer
        assert optimizer.global_step == own.global_step
        # whoever looks has the state cast to the parameters' types
        assert len(optimizer.preconditioner) == len(own.preconditioner)
        pairs = zip(model.named_parameters(), self.model.parameters(), strict=True)
        for (name, p), q in pairs:
            assert torch.equal(p, q), name
            found, expected = optimizer.state.get(p, {}), own.state.get(q, {})
            if not (found and expected):  # as long as it is frozen, it needs none
                continue
            assert found.keys() == expected.keys(), name
            for key, tensor in found.items():
                assert tensor.dtype == expected[key].dtype, (name, key)
                assert torch.equal(tensor, expected[key]), (name, key)
