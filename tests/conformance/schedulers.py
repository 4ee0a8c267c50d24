"""Learning rates that change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from .row import Contestant, Section
from .training import SIZE, batches, loss_of, new_model, same, train, vector

SECTION = Section("Learning rates and schedulers")
row = SECTION.row

STEPS = 6
LR = 0.05


def set_options(optimizer: Any, lr: float, momentum: float | None = None) -> None:
    """Set learning rate and momentum of all groups by hand."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if momentum is not None and "alpha1" in group:
            group["alpha1"] = momentum
        elif momentum is not None:
            group["betas"] = (momentum, group["betas"][1])


def momentum_of(group: dict[str, Any]) -> float:
    """Return the momentum of a group under either name."""
    return group["alpha1"] if "alpha1" in group else group["betas"][0]


def scheduled(
    make: Contestant,
    schedule: Callable[[Any], Any],
    metric: Sequence[float] = (),
    **options: Any,
) -> tuple[torch.Tensor, list[float], list[float]]:
    """Train with a scheduler; return path, learning rates and momenta of the steps."""
    model = new_model()
    optimizer = make(model, batch_size=SIZE, **options)
    scheduler = schedule(optimizer)
    path, lrs, momenta = [], [], []
    for t, batch in enumerate(batches(STEPS)):
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        assert len(rates) == 1, rates
        lrs.append(rates.pop())
        path.append(train(model, optimizer, [batch])[0])
        momenta.append(momentum_of(optimizer.param_groups[-1]))
        scheduler.step(*metric[t : t + 1])
    return torch.stack(path), lrs, momenta


def check(
    make: Contestant,
    schedule: Callable[[Any], Any],
    factors: Sequence[float],
    metric: Sequence[float] = (),
) -> None:
    """Check the learning rates, and that each step is taken with its own."""
    found, lrs, _ = scheduled(make, schedule, metric)
    for lr, factor in zip(lrs, factors, strict=True):
        assert abs(lr - LR * factor) < 1e-12, (lrs, factors)
    model = new_model()
    optimizer = make(model, batch_size=SIZE)
    path = []
    for lr, batch in zip(lrs, batches(STEPS), strict=True):
        set_options(optimizer, lr)
        path.append(train(model, optimizer, [batch])[0])
    same(found, torch.stack(path))


@row("`StepLR`")
def step_lr(make: Contestant) -> None:
    check(make, lambda o: lr_scheduler.StepLR(o, 2), [1, 1, 0.1, 0.1, 0.01, 0.01])


@row("`CosineAnnealingLR`")
def cosine(make: Contestant) -> None:
    factors = [(1 + math.cos(math.pi * t / 8)) / 2 for t in range(STEPS)]
    check(make, lambda o: lr_scheduler.CosineAnnealingLR(o, 8), factors)


@row("`LambdaLR`, warm-up from zero")
def lambda_lr(make: Contestant) -> None:
    check(
        make,
        lambda o: lr_scheduler.LambdaLR(o, lambda t: min(t / 4, 1)),
        [0, 0.25, 0.5, 0.75, 1, 1],
    )


@row("`ReduceLROnPlateau`")
def plateau(make: Contestant) -> None:
    check(
        make,
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
        [1, 1, 1, 0.5, 0.5, 0.25],
        metric=[1.0] * STEPS,
    )


@row("`SequentialLR` of `LinearLR` and `StepLR`")
def sequential(make: Contestant) -> None:
    def schedule(optimizer: Any) -> Any:
        parts = [
            lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2),
            lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])

    check(make, schedule, [0.1, 0.55, 1, 0.5, 0.25, 0.125])


def check_cycle(make: Contestant, schedule: Callable[[Any], Any], both: bool) -> None:
    """Check a cycle of learning rate (and momentum) beside that of SGD."""
    shadow = SGD([nn.Parameter(torch.zeros(1))], lr=LR, momentum=0.9)
    scheduler = schedule(shadow)
    expected = []
    for _ in range(STEPS):
        group = shadow.param_groups[0]
        expected.append((group["lr"], group["momentum"] if both else None))
        shadow.step()
        scheduler.step()
    rates = [lr for lr, _ in expected]
    assert max(rates) > 2 * min(rates)

    found, lrs, _ = scheduled(make, schedule)
    assert lrs == rates
    model = new_model()
    optimizer = make(model, batch_size=SIZE)
    path = []
    for (lr, momentum), batch in zip(expected, batches(STEPS), strict=True):
        set_options(optimizer, lr, momentum)
        path.append(train(model, optimizer, [batch])[0])
    same(found, torch.stack(path))


def one_cycle(optimizer: Any, cycle_momentum: bool) -> Any:
    """Reach the largest learning rate amid the steps."""
    return lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.1,
        total_steps=STEPS,
        pct_start=0.5,
        cycle_momentum=cycle_momentum,
    )


@row("`OneCycleLR(cycle_momentum=False)`")
def one_cycle_of_lr(make: Contestant) -> None:
    check_cycle(make, lambda o: one_cycle(o, False), both=False)


@row("`OneCycleLR(cycle_momentum=True)` cycles `alpha1`, in effect")
def one_cycle_of_both(make: Contestant) -> None:
    check_cycle(make, lambda o: one_cycle(o, True), both=True)


@row("A cycled momentum is seen in the group as `alpha1` (`betas[0]`)")
def cycle_seen(make: Contestant) -> None:
    _, _, momenta = scheduled(make, lambda o: one_cycle(o, True))
    for found, expected in zip(momenta[:3], (0.95, 0.9, 0.85), strict=True):
        assert abs(found - expected) < 1e-9, momenta


@row("`CyclicLR(cycle_momentum=True)` cycles `alpha1`, in effect")
def cyclic(make: Contestant) -> None:
    def schedule(optimizer: Any) -> Any:
        return lr_scheduler.CyclicLR(
            optimizer, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=True
        )

    check_cycle(make, schedule, both=True)


@row("`LambdaLR` with one function for each group as given")
def lambda_per_group(make: Contestant) -> None:
    model = new_model()
    given = [{"params": list(model[0].parameters())}]
    given += [{"params": list(model[2].parameters())}]
    optimizer = make(model, params=given, batch_size=SIZE)
    before = vector(model[0]), vector(model[2])
    lr_scheduler.LambdaLR(optimizer, [lambda t: 0.0, lambda t: 1.0])
    train(model, optimizer, batches(1))
    assert torch.equal(vector(model[0]), before[0])
    assert not torch.equal(vector(model[2]), before[1])


@row("A scheduler's `state_dict` resumes with the optimizer's")
def resumed(make: Contestant) -> None:
    def start() -> tuple[nn.Module, Any, Any]:
        model = new_model()
        optimizer = make(model, batch_size=SIZE)
        return model, optimizer, one_cycle(optimizer, True)

    def go_on(run: tuple[nn.Module, Any, Any], data: Any) -> torch.Tensor:
        path = []
        for batch in data:
            path.append(train(run[0], run[1], [batch])[0])
            run[2].step()
        return torch.stack(path)

    data = batches(STEPS - 1)
    one = start()
    go_on(one, data[:2])
    saved = copy.deepcopy([part.state_dict() for part in one])
    other = start()
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    same(go_on(other, data[2:]), go_on(one, data[2:]))


@row("`lr` as a tensor, also under a scheduler")
def tensor_lr(make: Contestant) -> None:
    def schedule(optimizer: Any) -> Any:
        return lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    found, lrs, _ = scheduled(make, schedule, lr=torch.tensor(0.0625))
    expected, wanted, _ = scheduled(make, schedule, lr=0.0625)
    assert lrs == wanted == [0.0625 * 0.5 ** (t // 2) for t in range(STEPS)]
    same(found, expected, tolerance=1e-6)


@row("`lr` set by hand counts in the next step")
def lr_by_hand(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model, batch_size=SIZE)
    train(model, optimizer, batches(3))
    other_model, other = copy.deepcopy((model, optimizer))
    set_options(other, 2 * LR)
    before = vector(model)
    batch = batches(1, seed=5)
    move = train(model, optimizer, batch)[0] - before
    other_move = train(other_model, other, batch)[0] - before
    assert move.norm() > 1e-3
    assert (other_move - 2 * move).norm() < 1e-4 * move.norm()


@row("`lr = 0` is accepted and moves nothing")
def zero_lr(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model, batch_size=SIZE, lr=0.0)
    before = vector(model)
    train(model, optimizer, batches(3))
    assert torch.equal(vector(model), before)
    set_options(optimizer, LR)
    losses = []
    for _ in range(20):
        train(model, optimizer, batches(1))
        losses.append(loss_of(model, batches(1)[0]).item())
    assert losses[-1] < 0.8 * losses[0], losses
