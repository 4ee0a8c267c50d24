"""A training loop, and the batch size as someone counts it who watches the loop."""

import io
import pickle
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from sirfshampoo import SIRFShampoo
from sirfshampoo._engine.forward_hook import ForwardHook
from tests.loop.fuzz.configurations import (
    DECAY,
    LATER,
    LAYERS,
    Case,
    build_optimizer,
    is_of,
    join,
    new_model,
)
from tests.loop.fuzz.references import Gradients, Reference


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
        if not any(has_gradient(p) for p in self.trained.values()):
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

    def zero_grad_of_model(self, set_to_none: bool) -> None:
        """Drop the gradients behind the optimizer's back."""
        self.model.zero_grad(set_to_none)

    def clip(self) -> None:
        """Limit the gradients' norm."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    def spoil(self, number: int) -> None:
        """Put a NaN into a gradient."""
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        if found:
            found[number % len(found)].view(-1)[0] = torch.nan

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
            if self.optimizer._engine.variant.follow_gradient:
                expected |= {"norm_mean", "norm_count"}
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


def has_gradient(p: Tensor) -> bool:
    """Return whether a parameter has a gradient that is not 0."""
    return p.grad is not None and bool(p.grad.any())


def is_in(p: Tensor, params: Iterable[Tensor]) -> bool:
    """Return whether a parameter is one of these."""
    return any(p is q for q in params)
