"""Layers that are frozen at first and thawed later train as with AdamW."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sirfshampoo import (
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    choose_structures,
    recipe,
    summary,
)

BATCH = 6
RULES = (LinearWeightBias(), PerParameter())
DATA = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(0)).double()


def new_model() -> nn.Sequential:
    """Two layers, of which the first is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].requires_grad_(False)
    return model


def train(model: nn.Module, optimizer: SIRFShampoo, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(DATA).square().mean().backward()
        optimizer.step()


def vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


OPTIONS = {
    "plain": lambda model: {},
    "joined": lambda model: {"combine_params": RULES},
    "spread": lambda model: {"spread_updates": True, "T": 3},
    "recipe": lambda model: recipe(model, batch_size=BATCH),
    "chosen": lambda model: {"params": choose_structures(model)},
    "listed": lambda model: {"params": list(model.parameters())},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_thawed_later_train(options: object) -> None:
    model = new_model()
    optimizer = SIRFShampoo(model, **options(model))
    before = vector(model[0])
    train(model, optimizer, 3)
    assert torch.equal(vector(model[0]), before)
    assert not any(optimizer.state.get(p) for p in model[0].parameters())
    model[0].requires_grad_(True)
    train(model, optimizer, 2)
    assert (vector(model[0]) != before).all()
    state, key = optimizer.state, optimizer._engine.momentum
    assert all(state[p][key].any() for p in model.parameters())


def test_what_was_thawed_trains_as_if_its_gradients_had_been_missing() -> None:
    found = []
    for frozen in (True, False):
        model = new_model()
        model[0].requires_grad_(not frozen)
        optimizer = SIRFShampoo(model, T=2, beta2=0.1)
        for step in range(5):
            model[0].requires_grad_(not frozen or step > 2)
            optimizer.zero_grad()
            model(DATA).square().mean().backward()
            if step <= 2:
                for p in model[0].parameters():
                    p.grad = None
            optimizer.step()
        found.append(vector(model))
    assert torch.equal(*found)


def test_what_is_frozen_takes_no_memory() -> None:
    model = new_model()
    optimizer = SIRFShampoo(model)
    assert len(optimizer.param_groups) == 4
    assert [len(factors) for factors in optimizer.preconditioner] == [0, 0, 2, 1]
    assert sum(len(entries) > 0 for entries in optimizer.state.values()) == 2
    assert [row.names for row in summary(model).rows] == [("2.weight",), ("2.bias",)]


def test_types_that_cannot_be_trained_may_be_frozen() -> None:
    model = new_model()
    quantised = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model.register_parameter("quantised", quantised)
    assert len(SIRFShampoo(model).param_groups) == 4
    arguments = recipe(model, batch_size=BATCH)
    assert len(SIRFShampoo(model, **arguments).param_groups) == 4


def test_a_checkpoint_with_frozen_layers_loads_where_they_are_thawed() -> None:
    frozen = new_model()
    optimizer = SIRFShampoo(frozen)
    train(frozen, optimizer, 3)
    thawed = new_model()
    thawed[0].requires_grad_(True)
    other = SIRFShampoo(thawed)
    train(thawed, other, 2)
    with pytest.warns(UserWarning, match=r"holds nothing for .*'0.weight', '0.bias'"):
        other.load_state_dict(optimizer.state_dict())
    assert other.global_step == 3
    fresh = SIRFShampoo(new_model().requires_grad_(True))
    for i in (0, 1):
        (found, expected) = (o.param_groups[i]["params"][0] for o in (other, fresh))
        for key, tensor in other.state[found].items():
            if key != "step":
                assert torch.equal(tensor, fresh.state[expected][key]), key
    for a, b in zip(frozen[2].parameters(), thawed[2].parameters(), strict=True):
        for key, tensor in other.state[b].items():
            assert torch.equal(tensor, optimizer.state[a][key]), key


def test_a_checkpoint_with_thawed_layers_loads_where_they_are_frozen() -> None:
    thawed = new_model().requires_grad_(True)
    optimizer = SIRFShampoo(thawed)
    train(thawed, optimizer, 3)
    model = new_model()
    model.load_state_dict(thawed.state_dict())
    other = SIRFShampoo(model)
    other.load_state_dict(optimizer.state_dict())
    model[0].requires_grad_(True)
    train(thawed, optimizer, 2)
    train(model, other, 2)
    assert torch.equal(vector(model), vector(thawed))


def test_a_checkpoint_of_what_was_frozen_throughout_loads() -> None:
    saved = SIRFShampoo(new_model().requires_grad_(False)).state_dict()
    assert saved["state"] == {}
    model = new_model().requires_grad_(True)
    optimizer = SIRFShampoo(model)
    with pytest.warns(UserWarning, match=r"holds nothing for .*'0.weight'.*'2.bias'"):
        optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    assert optimizer.global_step == 1


@pytest.mark.parametrize(
    ("make", "momentum"),
    [(SIRFShampoo, "momentum_buffer"), (torch.optim.AdamW, "exp_avg")],
)
def test_no_newer_state_stays_where_an_older_one_is_loaded(
    make: Any, momentum: str
) -> None:
    """Torch leaves out what is frozen: that starts anew, as with AdamW."""
    model = new_model().requires_grad_(True)
    optimizer = make(model if make is SIRFShampoo else model.parameters())
    train(model, optimizer, 2)
    saved = deepcopy(get_optimizer_state_dict(model, optimizer))
    train(model, optimizer, 3)
    model[0].requires_grad_(False)
    set_optimizer_state_dict(model, optimizer, saved)
    for layer, is_kept in ((model[0], False), (model[2], True)):
        for p in layer.parameters():
            V = optimizer.state[p].get(momentum, torch.zeros(1))
            assert bool(V.any()) == is_kept
    model[0].requires_grad_(True)
    before = vector(model[0])
    train(model, optimizer, 1)
    assert (vector(model[0]) != before).all()


def test_half_a_joint_unit_that_torch_leaves_out_is_told() -> None:
    model = new_model().requires_grad_(True)
    optimizer = SIRFShampoo(model, combine_params=RULES)
    train(model, optimizer, 2)
    saved = deepcopy(get_optimizer_state_dict(model, optimizer))
    train(model, optimizer, 3)
    model[0].weight.requires_grad_(False)  # what the joint state lies under
    with pytest.warns(UserWarning, match=r"holds nothing for \['0.bias'\]"):
        set_optimizer_state_dict(model, optimizer, saved)
    assert optimizer.global_step == 2
    joint, _ = optimizer.preconditioner
    assert all(torch.equal(K.to_dense(), torch.eye(K.dim).double()) for K in joint)
    train(model, optimizer, 1)


def test_half_a_joint_unit_frozen_before_is_told_when_loading() -> None:
    whole = SIRFShampoo(new_model().requires_grad_(True), combine_params=RULES)
    model = new_model().requires_grad_(True)
    model[0].bias.requires_grad_(False)
    other = SIRFShampoo(model, combine_params=RULES)
    with pytest.raises(ValueError, match=r"3 parameter groups.* got 2: .*is frozen"):
        other.load_state_dict(whole.state_dict())
