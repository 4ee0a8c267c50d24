"""What others write into groups and state is taken over, kept, or refused."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from sirfshampoo import SIRFShampoo


def train(model: nn.Module, optimizer: SIRFShampoo, x: Tensor | None = None) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 3) if x is None else x).square().mean().backward()
    optimizer.step()


def pair(**options: Any) -> tuple[nn.Sequential, SIRFShampoo]:
    """Return two layers of equal shapes, after a step."""
    layers = [nn.Linear(3, 3, bias=False) for _ in range(2)]
    model = nn.Sequential(*layers)
    optimizer = SIRFShampoo(model, **options)
    train(model, optimizer)
    return model, optimizer


# ------------------------------------------------------------------------- groups


def test_a_weight_decay_that_is_written_into_a_group_decays() -> None:
    model, optimizer = pair(lr=0.1)
    for group in optimizer.param_groups:
        group["weight_decay"] = 2.0
    before = model[0].weight.detach().clone()
    train(model, optimizer, torch.zeros(8, 3))  # of which all gradients are 0
    assert [group["kappa"] for group in optimizer.param_groups] == [2.0, 2.0]
    moved = model[0].weight.detach() - before
    torch.testing.assert_close(moved + 0.1 * 2.0 * before, _momentum(optimizer, before))
    for group in optimizer.param_groups:
        group["kappa"] = 0.0  # what a user writes stays until a scheduler writes again
    train(model, optimizer)
    assert optimizer.param_groups[0]["kappa"] == 0.0
    optimizer.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match="'weight_decay' must be"):
        train(model, optimizer)


def _momentum(optimizer: SIRFShampoo, before: Tensor) -> Tensor:
    """Return what the momentum of the step before still moves."""
    group = optimizer.param_groups[0]
    V = optimizer.state[group["params"][0]]["momentum_buffer"] - 2.0 * before
    return -group["lr"] * V


def test_a_run_with_a_cycled_momentum_resumes_as_it_was() -> None:
    model, optimizer = pair()
    schedule = OneCycleLR(optimizer, 0.1, total_steps=4)
    train(model, optimizer)
    schedule.step()
    train(model, optimizer)
    for group in optimizer.param_groups:
        group["alpha1"] = 0.5
    train(model, optimizer)
    resumed = SIRFShampoo(model)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed)
    assert resumed.param_groups[0]["alpha1"] == 0.5
    # groups that were rewritten can be given to a constructor again
    again = SIRFShampoo(model, optimizer.param_groups)
    assert again.param_groups[0]["alpha1"] == 0.5


def test_what_a_scheduler_writes_after_the_last_step_is_saved() -> None:
    model, optimizer = pair(lr=0.1)
    schedule = OneCycleLR(optimizer, 0.1, total_steps=4)
    train(model, optimizer)
    schedule.step()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5
    saved = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(model)
    resumed = SIRFShampoo(other)
    resumed.load_state_dict(saved)
    x = torch.randn(8, 3)
    train(model, optimizer, x)
    train(other, resumed, x)
    assert resumed.param_groups[0]["kappa"] == 0.5
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    saved["param_groups"][1]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match="'kappa' must be"):
        resumed.load_state_dict(saved)


def test_a_wrong_weight_decay_changes_no_group() -> None:
    model, optimizer = pair()
    for group, value in zip(optimizer.param_groups, (0.3, -1.0), strict=True):
        group["weight_decay"] = value
    with pytest.raises(ValueError, match="'weight_decay' must be"):
        train(model, optimizer)
    assert [group["kappa"] for group in optimizer.param_groups] == [0.0, 0.0]
    optimizer.param_groups[1]["weight_decay"] = 0.3
    train(model, optimizer)
    assert [group["kappa"] for group in optimizer.param_groups] == [0.3, 0.3]
    optimizer.given_groups[0]["weight_decay"] = 0.2
    assert optimizer.given_groups[0]["weight_decay"] == 0.2
    assert [group["kappa"] for group in optimizer.param_groups] == [0.2, 0.2]


def test_groups_that_change_places_are_refused() -> None:
    model, optimizer = pair(beta2=0.5)
    state = {p: dict(entries) for p, entries in optimizer.state.items()}
    optimizer.param_groups.reverse()
    with pytest.raises(ValueError, match="must keep its order"):
        train(model, optimizer)
    optimizer.param_groups.reverse()
    train(model, optimizer)
    for p, entries in state.items():
        assert optimizer.state[p]["K0.mat"] is entries["K0.mat"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *[("T", T, "'T' must be an integer > 0") for T in (0, -1, 2.5, True, None)],
        ("structures", "diagonal", "must keep its structures .*, got 'diagonal'"),
        ("preconditioner_dtypes", torch.float64, "must keep .*, got .*torch.float64"),
    ],
)
def test_what_cannot_be_written_into_a_group_is_refused(
    key: str, value: Any, message: str
) -> None:
    model, optimizer = pair()
    optimizer.param_groups[1][key] = value
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        train(model, optimizer)
    assert torch.equal(model[0].weight, before)


def test_a_group_cannot_be_taken_away() -> None:
    model, optimizer = pair()
    optimizer.param_groups.pop()
    with pytest.raises(ValueError, match=r"must keep its 2 groups, .* got 1"):
        train(model, optimizer)


def test_a_group_without_parameters_has_no_options() -> None:
    model = nn.Linear(3, 3)
    groups = [{"params": []}, {"params": list(model.parameters())}]
    empty, full = SIRFShampoo(model, groups, lr=0.5).given_groups
    assert full["lr"] == 0.5
    with pytest.raises(ValueError, match="must have parameters to have an option 'lr'"):
        empty["lr"]
    with pytest.raises(ValueError, match="must have parameters"):
        empty["lr"] = 0.1


def test_an_interval_beside_a_callable_one_cannot_be_read_as_one() -> None:
    _, optimizer = pair()
    optimizer.param_groups[0]["T"] = lambda step: step > 2
    with pytest.raises(ValueError, match=r"share a value of 'T' .*function.*, 1\."):
        optimizer.given_groups[0]["T"]


class Trainer:
    """Says itself when factors are updated."""

    def __init__(self, *, tensor: bool = False) -> None:
        self.model, self.due = nn.Linear(3, 3), True
        self.loss = self.model(torch.zeros(1, 3)).sum() if tensor else None
        self.optimizer = SIRFShampoo(self.model, T=self.is_due)

    def is_due(self, step: int) -> bool:
        return self.due


@pytest.mark.parametrize("tensor", [False, True])
def test_a_method_as_interval_stays_with_its_object(tensor: bool) -> None:
    trainer = Trainer(tensor=tensor)
    optimizer, model = trainer.optimizer, trainer.model
    assert all(g["T"].__self__ is trainer for g in optimizer.param_groups)
    trainer.due = False
    train(model, optimizer)
    K = optimizer.state[model.weight]["K0.mat"]
    assert torch.equal(K, torch.eye(3))


def test_an_interval_that_cannot_be_copied_is_named() -> None:
    class Uncopied:
        def __call__(self, step: int) -> bool:
            return True

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise RuntimeError("not me")

    with pytest.raises(ValueError, match="'T' must be a callable that can be copied"):
        SIRFShampoo(nn.Linear(3, 3), T=Uncopied())


# -------------------------------------------------------------------------- state


def test_what_wrappers_put_beside_the_state_is_saved_copied_and_loaded() -> None:
    model, optimizer = pair()
    for p in model.parameters():
        optimizer.state[p] |= {"slow": p.detach().clone(), "m1_ema": torch.ones(2)}
        optimizer.state[p]["age"] = 3
    optimizer.state["wrapper"] = {"a": torch.ones(1)}
    optimizer.state["k"] = 5
    train(model, optimizer)
    saved = optimizer.state_dict()
    resumed = SIRFShampoo(model)
    resumed.load_state_dict(saved)
    copied_model, copied = copy.deepcopy((model, optimizer))
    for other, net in ((resumed, model), (copied, copied_model)):
        entries = other.state[net[0].weight]
        assert torch.equal(entries["slow"], optimizer.state[model[0].weight]["slow"])
        assert entries["slow"] is not optimizer.state[model[0].weight]["slow"]
        assert entries["age"] == 3
        assert other.state["k"] == 5
        assert torch.equal(other.state["wrapper"]["a"], torch.ones(1))
        train(net, other)
    # what looks like the package's own is still checked
    saved["state"][0]["K7.mat"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"not expected \['K7.mat'\]"):
        SIRFShampoo(model).load_state_dict(saved)


def test_a_shallow_copy_takes_nothing_along() -> None:
    model, optimizer = pair()
    shallow = copy.copy(optimizer)
    del shallow
    gc.collect()
    train(model, optimizer)
    assert len(model._forward_hooks) == 1
    del optimizer
    gc.collect()
    assert not model._forward_hooks


def test_a_state_may_be_loaded_in_inference_mode() -> None:
    model, optimizer = pair()
    optimizer.state[model[0].weight]["slow"] = torch.ones(3)
    saved = optimizer.state_dict()
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    optimizer.state[model[0].weight]["slow"].mul_(2)
    train(model, optimizer)


def test_an_entry_of_others_is_no_state_of_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = SIRFShampoo(model)
    for p in model.parameters():
        optimizer.state[p]["slow"] = p.detach().clone()
    train(model, optimizer)
    assert set(optimizer.state[model[0].weight]) == {"slow"}
    resumed = SIRFShampoo(model)
    resumed.load_state_dict(optimizer.state_dict())
    assert set(resumed.state[model[0].weight]) == {"slow"}


@contextmanager
def swapped_parameters() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_model_may_swap_its_parameters_after_a_step() -> None:
    model, optimizer = pair()
    with swapped_parameters():
        model.double()
    assert model[0].weight.dtype == model[1].weight.dtype == torch.float64
    train(model, optimizer, torch.randn(8, 3, dtype=torch.float64))
