"""What may be given to be trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sirfshampoo import LinearWeightBias, PerParameter

from .row import OURS, Contestant, Section
from .training import (
    SIZE,
    batches,
    gradients,
    loss_of,
    mentions,
    new_model,
    params_of,
    plain_path,
    refused,
    same,
    train,
    train_by_hand,
    vector,
)

SECTION = Section("Parameters and groups")
row = SECTION.row


def halves(model: nn.Sequential) -> list[dict[str, Any]]:
    """Split the parameters into two groups."""
    return [{"params": list(layer.parameters())} for layer in (model[0], model[2])]


def named_halves(model: nn.Sequential) -> list[dict[str, Any]]:
    """Split the parameters into two groups of (name, parameter)."""
    named = list(model.named_parameters())
    return [{"params": named[:2]}, {"params": named[2:]}]


def generator(model: nn.Module) -> Any:
    """Yield the parameters once."""
    return (p for p in model.parameters())


FORMS: dict[str, Callable[[Any], Any]] = {
    "a list": lambda model: list(model.parameters()),
    "a generator": generator,
    "`named_parameters()`": lambda model: model.named_parameters(),
    "dict groups": halves,
    "dict groups of named parameters": named_halves,
}


def add_forms() -> None:
    """Add two rows for each form that parameters may have."""
    for form, of in FORMS.items():

        @row(f"`params` as {form}, beside the model")
        def beside(make: Contestant, of: Callable[[Any], Any] = of) -> None:
            data, model = batches(4), new_model()
            found = train(model, make(model, params=of(model)), data)
            same(found, plain_path(make, data))

        @row(f"Plain parameters as first argument: {form}")
        def first(make: Contestant, of: Callable[[Any], Any] = of) -> None:
            data, model = batches(4), new_model()
            found = train(model, make(of(model), batch_size=SIZE), data)
            same(found, plain_path(make, data))


add_forms()


@row("Plain parameters without an integer `batch_size` are refused", only=OURS)
def plain_without_size(make: Contestant) -> None:
    params = list(new_model().parameters())
    with refused(ValueError, "'batch_size'", "integer"):
        make(params)
    with refused(ValueError, "'batch_size'", "integer"):
        make(params, batch_size=lambda inputs: SIZE)


@row("Plain parameters with a rule that needs the model are refused", only=OURS)
def plain_with_rule(make: Contestant) -> None:
    params = list(new_model().parameters())
    rules = (LinearWeightBias(), PerParameter())
    with refused(ValueError, "'combine_params'", "LinearWeightBias"):
        make(params, batch_size=SIZE, combine_params=rules)
    with refused(ValueError, "'combine_params'", "LinearWeightBias"):
        make([{"params": params, "combine_params": rules}], batch_size=SIZE)


def check_names(model: nn.Module, optimizer: Any) -> None:
    """Check that groups and state dict name each parameter correctly."""
    names = {id(p): name for name, p in model.named_parameters()}
    numbered = []
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        numbered += group["param_names"]
    assert sorted(numbered) == sorted(names.values())
    saved = optimizer.state_dict()["param_groups"]
    for group, present in zip(saved, optimizer.param_groups, strict=True):
        assert group["param_names"] == present["param_names"]
        for number, p in zip(group["params"], present["params"], strict=True):
            assert numbered[number] == names[id(p)]


@row("Names stay beside their parameters in groups and `state_dict`")
def names_stay(make: Contestant) -> None:
    model = new_model()
    backwards = list(model.named_parameters())[::-1]
    optimizer = make(model, params=backwards)
    check_names(model, optimizer)
    train(model, optimizer, batches(1))
    check_names(model, optimizer)


@row("Names stay also where weight and bias are joined", only=OURS)
def names_stay_joined(make: Contestant) -> None:
    model = new_model()
    backwards = list(model.named_parameters())[::-1]
    rules = (LinearWeightBias(), PerParameter())
    optimizer = make(model, params=backwards, combine_params=rules)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    check_names(model, optimizer)


#: A value that differs from the default in a visible way, for each documented option.
GROUP_OPTIONS: dict[str, dict[str, Any]] = {
    "SIRFShampoo": {
        "lr": 0.02,
        "beta2": 0.1,
        "alpha1": 0.5,
        "alpha2": 0.0,
        "lam": 0.5,
        "kappa": 0.1,
        "T": 2,
        "structures": {1: "dense", 2: ("diagonal", "dense")},
        "preconditioner_dtypes": torch.bfloat16,
        "combine_params": (LinearWeightBias(), PerParameter()),
    },
    "AdamW": {
        "lr": 0.02,
        "betas": (0.5, 0.9),
        "eps": 1e-2,
        "weight_decay": 0.1,
        "amsgrad": True,
        "maximize": True,
        "foreach": False,
    },
}


@row("A group may have any documented option of its own")
def group_options(make: Contestant) -> None:
    for option, value in GROUP_OPTIONS[make.name].items():
        paths = []
        for ours in (False, True):
            model = new_model()
            first, second = halves(model)
            everywhere = {option: value} if ours else {}
            optimizer = make(model, [first, second], batch_size=SIZE, **everywhere)
            params = list(model.parameters())
            paths.append(train_by_hand(optimizer, params, range(6)))
        model = new_model()
        first, second = halves(model)
        optimizer = make(model, [first, {**second, option: value}], batch_size=SIZE)
        found = train_by_hand(optimizer, list(model.parameters()), range(6))
        cut = vector(model[0]).numel()
        in_half = option == "preconditioner_dtypes"
        same(found[:, :cut], paths[0][:, :cut], make.rounding)
        same(found[:, cut:], paths[1][:, cut:], 5e-3 if in_half else make.rounding)
        differs = not torch.equal(paths[0], paths[1])
        assert differs or option in ("amsgrad", "foreach"), f"{option} has no effect."


@row("An unknown keyword is refused")
def unknown_keyword(make: Contestant) -> None:
    with refused(TypeError, "learning_rate"):
        make(new_model(), learning_rate=0.1)


@row("An option that has no effect is refused in a group")
def option_without_effect(make: Contestant) -> None:
    model = new_model()
    group = {"params": list(model.parameters()), "momentum": 0.5}
    with refused((TypeError, ValueError), "momentum"):
        make(model, [group])


@row("A parameter given twice is refused or warned of")
def duplicates(make: Contestant) -> None:
    model = new_model()
    twice = [*model.parameters(), model[0].weight]
    with refused((ValueError, UserWarning), "duplicate"):
        make(model, twice)
    with refused(ValueError):
        make(model, [*halves(model), {"params": [model[0].weight]}])


@row("An empty list of parameters is refused")
def empty_list(make: Contestant) -> None:
    with refused(ValueError, "empty"):
        make([], batch_size=SIZE)


@row("Frozen parameters rest, and train once thawed")
def frozen(make: Contestant) -> None:
    data, model = batches(6), new_model()
    model[0].requires_grad_(False)
    optimizer = make(model, params=list(model.parameters()))
    before = vector(model[0])
    found = [train(model, optimizer, data[:3])]
    assert torch.equal(vector(model[0]), before)
    model[0].requires_grad_(True)
    found.append(train(model, optimizer, data[3:]))
    assert not torch.equal(vector(model[0]), before)

    twin = new_model()
    other, path = make(twin, batch_size=SIZE), []
    for step, batch in enumerate(data):
        other.zero_grad()
        loss_of(twin, batch).backward()
        for p in twin[0].parameters():
            p.grad = None if step < 3 else p.grad
        other.step()
        path.append(vector(twin))
    same(torch.cat(found), torch.stack(path))


@row("All parameters of a model train, those that are thawed later, too")
def thawed(make: Contestant) -> None:
    data, model = batches(6), new_model()
    model[0].requires_grad_(False)
    optimizer = make(model)
    before = vector(model[0])
    train(model, optimizer, data[:3])
    assert torch.equal(vector(model[0]), before)
    model[0].requires_grad_(True)
    train(model, optimizer, data[3:])
    assert not torch.equal(vector(model[0]), before)


@row("A checkpoint loads although other layers were frozen when it was saved")
def frozen_otherwise(make: Contestant) -> None:
    data, model = batches(6), new_model()
    model[0].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer, data[:3])
    twin = new_model()
    twin.load_state_dict(model.state_dict())
    other = make(twin)
    with warnings.catch_warnings():  # ours says what starts anew
        warnings.filterwarnings("ignore", "The state dict holds nothing for")
        other.load_state_dict(deepcopy(optimizer.state_dict()))
    before = vector(twin[0])
    model[0].requires_grad_(True)
    found = [train(net, o, data[3:]) for net, o in ((model, optimizer), (twin, other))]
    same(*found)
    assert not torch.equal(vector(twin[0]), before)


@row("Zero-size parameters are carried along")
def zero_size(make: Contestant) -> None:
    data, model = batches(4), new_model()
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    optimizer = make(model)
    path = []
    for batch in data:
        optimizer.zero_grad()
        (loss_of(model, batch) + model.empty.sum()).backward()
        optimizer.step()
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data))


class Tied(nn.Module):
    """A net that uses one weight twice."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        with torch.no_grad():
            self.inner.weight.copy_(net[0].weight[:4])
            self.inner.bias.zero_()
            self.outer.bias.zero_()
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh())[:, :3]


@row("Tied parameters step once, with the sum of their gradients")
def tied(make: Contestant) -> None:
    model = Tied(new_model())
    optimizer = make(model)
    assert sorted(map(id, params_of(optimizer))) == sorted(map(id, model.parameters()))
    assert len(params_of(optimizer)) == 3
    found = train(model, optimizer, batches(4))

    untied = Tied(new_model())
    weight, bias, other = untied.parameters()
    twin = [nn.Parameter(p.detach().clone()) for p in (weight, bias, other)]
    reference = make(twin, batch_size=SIZE)
    path = []
    for x, y in batches(4):
        used = [twin[0].detach().clone().requires_grad_() for _ in range(2)]
        h = nn.functional.linear(x, used[0], twin[1]).tanh()
        z = nn.functional.linear(h, used[1], twin[2])[:, :3]
        reference.zero_grad()
        nn.functional.mse_loss(z, y).backward()
        twin[0].grad = used[0].grad + used[1].grad
        reference.step()
        path.append(vector(twin))
    same(found, torch.stack(path), tolerance=1e-5)


@row("`channels_last` parameters keep their layout and train alike")
def channels_last(make: Contestant) -> None:
    paths = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 2, 2))
        model.to(memory_format=layout)
        optimizer = make(model, batch_size=SIZE)
        for p in model.parameters():
            p.data = p.data.clone(memory_format=torch.preserve_format)
        params = list(model.parameters())
        path = []
        for seed in range(4):
            gradients(params, seed)
            for p in params:
                if p.ndim == 4:
                    p.grad = p.grad.contiguous(memory_format=layout)
            optimizer.step()
            path.append(vector(params))
        paths.append(torch.stack(path))
        for p in params:
            assert p.ndim < 4 or p.is_contiguous(memory_format=layout)
    same(paths[1], paths[0], tolerance=1e-5)


@row("Complex parameters are trained or refused by name")
def complex_parameters(make: Contestant) -> None:
    model = nn.Module()
    model.wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    try:
        optimizer = make(model, batch_size=SIZE)
    except ValueError as error:
        mentions(error, "wave", "complex")
        return
    model.wave.grad = torch.ones(3, dtype=torch.complex64)
    optimizer.step()
    assert model.wave.ne(1).all()


@row("Parameters outside the model are trained or refused")
def outside(make: Contestant) -> None:
    model = new_model()
    extra = nn.Parameter(torch.ones(3, 2))
    try:
        optimizer = make(model, [*model.parameters(), extra], batch_size=SIZE)
    except ValueError as error:
        mentions(error, "model")
        return
    found = train_by_hand(optimizer, [extra], range(4))
    alone = nn.Parameter(torch.ones(3, 2))
    same(found, train_by_hand(make([alone], batch_size=SIZE), [alone], range(4)))


@row("`add_param_group` later starts the new parameters afresh")
def added_later(make: Contestant) -> None:
    model = new_model()
    first, second = halves(model)
    optimizer = make(model, first["params"], batch_size=SIZE)
    train_by_hand(optimizer, first["params"], range(3))
    before = vector(model[0])
    optimizer.add_param_group(second)
    found = train_by_hand(optimizer, second["params"], range(3))
    twin = new_model()
    params = list(twin[2].parameters())
    fresh = make(twin, params, batch_size=SIZE)
    same(found, train_by_hand(fresh, params, range(3)), make.rounding)
    assert not torch.equal(vector(model[0]), before)  # still trained
    with refused(ValueError):
        optimizer.add_param_group(second)
