"""Whatever a training loop does, in whatever order, the optimizer computes the same.

A sequence of operations is drawn and run twice: with the optimizer as users have it,
which counts examples by itself, is saved, loaded and copied; and with a reference that
is told each step's gradients and batch size. The batch size is counted here, from the
operations alone.
"""

import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from sirfshampoo import LinearWeightBias, PerParameter, SIRFShampoo, recipe
from sirfshampoo._engine import step, unit_optimizer
from sirfshampoo._engine.batch_size import BatchSizeCounter, ForwardHook
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.unit_optimizer import UnitOptimizer
from sirfshampoo._method import elementwise, factors
from tests.cases import FAST, mixture
from tests.twin import Twin, assert_agree, find_units

Gradients = dict[str, Tensor | None]
DECAY = 0.9  # of the learning rate, whenever the scheduler steps
LAYERS, LATER = ("0", "2", "4", "6"), "6"  # the last one may join the optimizer later


def new_model() -> nn.Sequential:
    """Four layers, two of which share a stack."""
    widths = [3, 4, 4, 4, 2]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


# --- configurations -------------------------------------------------------------------
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


# --- what the optimizer is held against -----------------------------------------------
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
            ([names[p] for p in params], (params, group))
            for params, group in find_units(self.model, case.rules)
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


# --- the loop -------------------------------------------------------------------------
@dataclass(eq=False)
class Forward:
    """A forward pass, as someone notes it who watches the loop."""

    loss: Tensor
    x: Tensor
    trains: set[str]  # the parameters that gradients may flow to
    announces: bool  # whether it is part of training
    has_counted: bool = False  # since the last step, at some time
    counts: bool = False  # its gradient is in what is there


@dataclass
class Loop:
    """A training loop: each method is something that users do."""

    case: Case
    late: bool
    reference_type: Callable[[Case, nn.Module, bool], Reference]
    frozen: tuple[str, ...] = ()
    has_joined: bool = False
    forwards: list[Forward] = field(default_factory=list)  # since the last step
    skipped: dict[str, int] = field(default_factory=dict)
    saved: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        """Set up model, optimizer and scheduler."""
        self.model = new_model()
        for layer in self.frozen:
            self.model[int(layer)].requires_grad_(False)
        self.reference = self.reference_type(self.case, self.model, self.late)
        self.arguments = self.case.arguments(self.model)
        self.set_up()

    def set_up(self) -> None:
        """Set up the optimizer and the scheduler of the present model."""
        how = {"late": self.late, "has_joined": self.has_joined}
        self.optimizer = build_optimizer(self.arguments, self.model, **how)
        self.scheduler = ExponentialLR(self.optimizer, DECAY)

    # -------------------------------------------------------------- what is known

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters in the optimizer."""
        absent = LATER if self.late and not self.has_joined else ""
        named = self.model.named_parameters()
        return {n: p for n, p in named if not is_of(n, absent)}

    @property
    def size(self) -> int:
        """The examples whose gradients are there; failing these, those seen."""
        counted = sum(len(f.x) for f in self.forwards if f.counts)
        seen = sum(len(f.x) for f in self.forwards if f.announces and not f.has_counted)
        return counted or seen

    def forget(self) -> None:
        """Note that gradients are gone."""
        for forward in self.forwards:
            forward.counts = False

    def drop_graphs(self) -> None:
        """Let nobody go back through a model that has changed or is gone."""
        for forward in self.forwards:
            forward.loss = forward.loss.detach()

    # ------------------------------------------------------------------ gradients

    def forward(self, size: int) -> None:
        """Compute a loss."""
        dtype = next(self.model.parameters()).dtype
        x = torch.randn(size, 3, dtype=dtype, requires_grad=True)
        loss = (self.model(x) - 1).square().mean()
        trains = {n for n, p in self.model.named_parameters() if p.requires_grad}
        self.forwards.append(Forward(loss, x, trains, self.model.training))

    def backward(self, last: int = 1, retain: bool = False) -> None:
        """Go back from the last losses, or from as many as there are."""
        found = [f for f in self.forwards if f.loss.requires_grad][-last:]
        if not found:
            return
        if all(p.grad is None for p in self.trained.values()):
            self.forget()
        sum(f.loss for f in found).backward(retain_graph=retain)
        for f in found:
            if any(n in f.trains and p.requires_grad for n, p in self.trained.items()):
                f.counts = f.has_counted = True
            if not retain:
                f.loss = f.loss.detach()

    def train_on(self, size: int) -> None:
        """Add a batch's gradients."""
        self.forward(size)
        self.backward()

    def ask_for_gradient_of_inputs(self) -> None:
        """Go back, but not to parameters."""
        for f in self.forwards[-1:]:
            if f.loss.requires_grad:
                torch.autograd.grad(f.loss, f.x, retain_graph=True)

    def evaluate(self, size: int) -> None:
        """Call the model for its outputs alone."""
        x = torch.randn(size, 3, dtype=next(self.model.parameters()).dtype)
        with torch.no_grad():
            self.model(x)

    def set_mode(self, training: bool) -> None:
        """Say what the model is called for."""
        self.model.train(training)

    def zero_grad(self, set_to_none: bool) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none)
        for p in self.trained.values():
            assert p.grad is None or not (set_to_none or p.grad.any())
        self.forget()

    def zero_grad_of_model(self) -> None:
        """Drop the gradients behind the optimizer's back."""
        self.model.zero_grad()

    def clip(self) -> None:
        """Limit the gradients' norm."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    def spoil(self, number: int) -> None:
        """Put a NaN into a gradient."""
        params = list(self.model.parameters())
        gradient = params[number % len(params)].grad
        if gradient is not None:
            gradient.view(-1)[0] = torch.nan

    def put_back(self) -> None:
        """Replace gradients by equal ones."""
        for p in self.model.parameters():
            p.grad = None if p.grad is None else p.grad.clone()

    # ----------------------------------------------------------------------- steps

    def step(self) -> None:
        """Take a step, or be told that nothing was counted."""
        before = self.gradients()
        kept = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        moves = any(G is not None for G in before.values())
        if moves and not self.size:
            with pytest.raises(RuntimeError, match="No examples were counted"):
                self.optimizer.step()
        else:
            self.optimizer.step()
            self.note_step(before)
        after = self.gradients()
        for name, G in before.items():
            rests = G is None or not self.size
            if G is not None:  # a step changes no gradient
                assert torch.equal(G.nan_to_num(7), after[name].nan_to_num(7))
            if rests and not moves:
                assert torch.equal(kept[name], self.trained[name])
        for name, p in self.model.named_parameters():
            if before.get(name) is None:
                assert torch.equal(p, kept[name]), name

    def step_with_closure(self, size: int) -> None:
        """Have the step compute the gradients."""
        found: Gradients = {}

        def closure() -> Tensor:
            self.zero_grad(set_to_none=True)
            self.train_on(size)
            found.update(self.gradients())
            return self.forwards[-1].loss

        loss = self.optimizer.step(closure)
        assert loss is self.forwards[-1].loss
        self.note_step(found)

    def gradients(self) -> Gradients:
        """Return copies of the gradients of what is trained."""
        return {
            n: None if p.grad is None else p.grad.clone()
            for n, p in self.trained.items()
        }

    def note_step(self, gradients: Gradients) -> None:
        """Take the same step elsewhere, and compare what was counted."""
        if any(G is not None for G in gradients.values()):
            assert self.optimizer.batch_size == self.size
        self.reference.step(gradients, self.size)
        for group in self.optimizer.param_groups:
            names = [n for n, p in self.trained.items() if is_in(p, group["params"])]
            found = [G for n in names if (G := gradients[n]) is not None]
            if not all(G.isfinite().all() for G in found):
                first = self.name_of(group["params"][0])
                self.skipped[first] = self.skipped.get(first, 0) + 1
        self.forwards.clear()

    def name_of(self, p: Tensor) -> str:
        """Return the name of a parameter."""
        return next(n for n, q in self.trained.items() if q is p)

    def schedule(self) -> None:
        """Have the scheduler lower the learning rate."""
        self.scheduler.step()
        self.reference.decay()

    # ----------------------------------------------------------------------- model

    def set_trainable(self, layer: int, part: str, trainable: bool) -> None:
        """Freeze or thaw a layer, or part of it."""

        def change(model: nn.Module) -> None:
            module = model[int(LAYERS[layer])]
            chosen = module if part == "both" else getattr(module, part)
            chosen.requires_grad_(trainable)

        change(self.model)
        self.reference.change(change)

    def join(self) -> None:
        """Train the last layer, too."""
        layer = self.model[int(LATER)]
        half = layer.weight.requires_grad is not layer.bias.requires_grad
        if self.late and not self.has_joined and not half:
            join(self.optimizer, self.model)
            self.has_joined = True
            self.reference.join()

    def cast(self, dtype: torch.dtype) -> None:
        """Change the type of parameters and gradients."""
        self.model.to(dtype)
        self.reference.change(lambda model: model.to(dtype))
        self.drop_graphs()

    # ---------------------------------------------------------- copies, checkpoints

    def resume(self, thawed: bool) -> None:
        """Go on from a checkpoint, in what could be another process.

        Args:
            thawed: Whether the optimizer is set up before layers are frozen.
        """
        parts = (self.model, self.optimizer, self.scheduler)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        trains = {n: p.requires_grad for n, p in self.model.named_parameters()}
        training, dtype = self.model.training, next(self.model.parameters()).dtype
        self.model = new_model().to(dtype).train(training)

        def freeze() -> None:
            for name, p in self.model.named_parameters():
                p.requires_grad_(trains[name])

        # a unit that is half frozen at the start is none
        halves = {trains[f"{n}.weight"] is trains[f"{n}.bias"] for n in LAYERS}
        if not thawed and all(halves):
            freeze()
        self.set_up()
        freeze()
        parts = (self.model, self.optimizer, self.scheduler)
        for part, state_dict in zip(parts, saved, strict=True):
            part.load_state_dict(state_dict)
        self.forwards.clear()

    def save(self) -> None:
        """Note where training is, to come back later."""
        parts = (self.model, self.optimizer, self.scheduler)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        numbers = deepcopy((self.reference, self.skipped))
        self.saved = (self.kind, file.getvalue(), *numbers)

    def roll_back(self) -> None:
        """Return to what was saved last; gradients and their count stay."""
        if self.saved is None or self.saved[0] != self.kind:
            return
        _, file, *numbers = self.saved
        self.reference, self.skipped = deepcopy(numbers)
        saved = torch.load(io.BytesIO(file), weights_only=True)
        parts = (self.model, self.optimizer, self.scheduler)
        for part, state_dict in zip(parts, saved, strict=True):
            part.load_state_dict(state_dict)
        self.drop_graphs()

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same where a checkpoint is loaded."""
        trains = [p.requires_grad for p in self.model.parameters()]
        return next(self.model.parameters()).dtype, self.has_joined, trains

    def load_own(self) -> None:
        """Load what was just saved into what saved it."""
        self.optimizer.load_state_dict(deepcopy(self.optimizer.state_dict()))

    def copy(self, how: str) -> None:
        """Go on with a copy."""
        self.model, self.optimizer, self.scheduler = self.copied(how)
        self.drop_graphs()

    def copy_and_go_on(self, how: str) -> None:
        """Train a copy, and leave it."""
        model, optimizer, _ = self.copied(how)
        model.requires_grad_(True)
        x = torch.randn(7, 3, dtype=next(model.parameters()).dtype)
        model.train()(x).square().sum().backward()
        optimizer.step()

    def copied(self, how: str) -> tuple[nn.Module, SIRFShampoo, ExponentialLR]:
        """Copy all there is."""
        parts = [self.model, self.optimizer, self.scheduler]
        if how == "pickle":
            model, optimizer, scheduler = pickle.loads(pickle.dumps(parts))
        elif how == "optimizer first":
            optimizer, scheduler, model = deepcopy([*parts[1:], parts[0]])
        else:
            model, optimizer, scheduler = deepcopy(parts)
        return model, optimizer, scheduler

    # ---------------------------------------------------------------- what must hold

    def check(self) -> None:
        """Compare with the reference, and look at the state."""
        self.reference.assert_agrees(self.model, self.optimizer)
        hooks = self.model._forward_hooks.values()
        alive = [h for h in hooks if isinstance(h, ForwardHook) and not h.is_dead]
        assert len(alive) == 1
        groups = self.optimizer.param_groups
        assert sorted(map(id, self.trained.values())) == sorted(
            id(p) for group in groups for p in group["params"]
        )
        momentum = self.optimizer._engine.momentum
        for group, K in zip(groups, self.optimizer.preconditioner, strict=True):
            first = group["params"][0]
            if not self.optimizer.state.get(first):
                continue
            expected = {"step", "skipped"}
            for n, K_n in enumerate(K):
                for kind in "Km" if group["alpha2"] else "K":
                    expected |= {f"{kind}{n}.{key}" for key, _ in K_n.named_tensors()}
            for p in group["params"]:
                found = self.optimizer.state[p]
                own = expected if p is first else set()
                assert found.keys() == own | ({momentum} if group["alpha1"] else set())
                assert all(tensor.isfinite().all() for tensor in found.values())
                assert p.isfinite().all()
            entries = self.optimizer.state[first]
            assert int(entries["step"]) == self.optimizer.global_step
            skipped = self.skipped.get(self.name_of(first), 0)
            assert int(entries["skipped"]) == skipped


def is_in(p: Tensor, params: Iterable[Tensor]) -> bool:
    """Return whether a parameter is one of these."""
    return any(p is q for q in params)


# --- sequences ------------------------------------------------------------------------
Operation = tuple[Any, ...]


def operation(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw an operation with its arguments."""
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


sizes, flags = st.integers(1, 5), st.booleans()
ways = st.sampled_from(["model first", "optimizer first", "pickle"])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])

OF_A_LOOP = [
    operation("train_on", size=sizes),
    operation("train_on", size=sizes),
    operation("step"),
    operation("step"),
    operation("zero_grad", set_to_none=flags),
]
OPERATIONS = [
    *OF_A_LOOP,
    operation("step_with_closure", size=sizes),
    operation("schedule"),
    operation("forward", size=sizes),
    operation("backward", last=st.integers(1, 3), retain=flags),
    operation("ask_for_gradient_of_inputs"),
    operation("evaluate", size=sizes),
    operation("set_mode", training=flags),
    operation("zero_grad_of_model"),
    operation("clip"),
    operation("spoil", number=st.integers(0, 7)),
    operation("put_back"),
    operation(
        "set_trainable",
        layer=st.integers(0, 3),
        part=st.sampled_from(["both", "weight", "bias"]),
        trainable=flags,
    ),
    operation("join"),
    operation("resume", thawed=flags),
    operation("save"),
    operation("roll_back"),
    operation("load_own"),
    operation("copy", how=ways),
    operation("copy_and_go_on", how=ways),
]


@dataclass(frozen=True)
class Sequence:
    """What a training loop does."""

    case: str
    late: bool  # whether the last layer joins later, if at all
    frozen: tuple[str, ...]  # at the start
    operations: list[Operation]


def sequences(
    operations: list[st.SearchStrategy[Operation]], longest: int
) -> st.SearchStrategy[Sequence]:
    """Draw sequences of operations."""
    every = st.sampled_from(operations).flatmap(lambda drawn: drawn)
    layers = st.sets(st.sampled_from(LAYERS), max_size=2)
    return st.builds(
        Sequence,
        case=st.sampled_from(list(CASES)),
        late=flags,
        frozen=st.one_of(st.just(()), layers.map(sorted).map(tuple)),
        operations=st.lists(every, min_size=longest // 2, max_size=longest),
    )


#: Warnings that are right, and no concern of these tests.
EXPECTED = (
    "The optimizer counts",  # another batch size than the recipe was told
    "Detected call of `lr_scheduler.step",  # a scheduler stepped first
    "Seems like `optimizer.step",  # a copy has no wrapper around its step
    "The state dict holds nothing for",  # layers that were frozen all the time
    "No parameter of the optimizer has a gradient",
)


@contextmanager
def expected_warnings_ignored() -> Iterator[None]:
    """Let warnings pass that come from what was drawn."""
    with warnings.catch_warnings():
        for start in EXPECTED:
            warnings.filterwarnings("ignore", message=start)
        yield


def run(
    sequence: Sequence,
    reference: Callable[[Case, nn.Module, bool], Reference] = OfTheTwin,
) -> None:
    """Run a sequence, and compare after each operation."""
    torch.manual_seed(0)
    with expected_warnings_ignored():
        loop = Loop(CASES[sequence.case], sequence.late, reference, sequence.frozen)
        for name, arguments in sequence.operations:
            getattr(loop, name)(**arguments)
            loop.check()


WITH_CASTS = [*OPERATIONS, operation("cast", dtype=dtypes)]


@given(sequences(OPERATIONS, longest=30))
def test_any_loop_computes_what_the_twin_computes(sequence: Sequence) -> None:
    run(sequence)


@given(sequences(WITH_CASTS, longest=30))
def test_any_loop_computes_what_a_plain_loop_computes(sequence: Sequence) -> None:
    run(sequence, OfAPlainLoop)


@pytest.mark.heavy
@settings(max_examples=300)
@given(sequences(OPERATIONS, longest=60))
def test_300_long_loops_compute_what_the_twin_computes(sequence: Sequence) -> None:
    run(sequence)


# --- the fuzz itself ------------------------------------------------------------------
def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def count_at_once(
    self: BatchSizeCounter, training: bool, args: Any, kwargs: Any, output: Any
) -> None:
    """Count a forward pass without waiting for its gradients."""
    self._counted += len(args[0]) if training and torch.is_grad_enabled() else 0


def lose_global_step(*args: Any) -> Any:
    """Check a state dict, and lose one number."""
    return CHECK_FIT(*args)[0], None


def lose_momenta(self: Stack, state: dict[Tensor, dict[str, Tensor]]) -> None:
    """Start with momenta of 0 wherever stacks are built anew."""
    for unit in self.units:
        for p in unit.params:
            state[p].pop(self.momentum, None)
    PLACE(self, state)


def leave_out_late_groups(self: Any, param_group: dict[str, Any]) -> None:
    """Take no parameters once there are some."""
    if not self.param_groups:
        ADD_PARAM_GROUP(self, param_group)


CHECK_FIT, PLACE = unit_optimizer.check_fit, Stack.place
ADD_PARAM_GROUP = UnitOptimizer.add_param_group

#: What is patched: an object, its attribute, what stands there.
BUGS: dict[str, list[tuple[Any, str, Any]]] = {
    "counts are never forgotten": [(BatchSizeCounter, "forget", nothing)],
    "discarded batches count": [(BatchSizeCounter, "note", count_at_once)],
    "a copy counts for nobody": [(ForwardHook, "attach", nothing)],
    "the global step is not loaded": [(unit_optimizer, "check_fit", lose_global_step)],
    "a checkpoint is not loaded": [(UnitOptimizer, "load_state_dict", nothing)],
    "momenta are lost on the way": [(Stack, "place", lose_momenta)],
    "what is not finite moves": [
        (module, "finite_rows", nothing) for module in (step, factors, elementwise)
    ],
    "late groups do not train": [
        (UnitOptimizer, "add_param_group", leave_out_late_groups)
    ],
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_within_the_examples_of_a_quick_run(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patch in BUGS[bug]:
        monkeypatch.setattr(*patch)
    found: list[BaseException] = []

    @settings(max_examples=15, phases=[Phase.generate])
    @given(sequences(OPERATIONS, longest=30))
    def search(sequence: Sequence) -> None:
        if not found:
            try:
                run(sequence)
            except (Exception, pytest.fail.Exception) as failure:
                found.append(failure)

    search()
    assert found
