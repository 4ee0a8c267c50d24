"""Groups as they were given: one place to read and to write for many groups."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sirfshampoo import LinearWeightBias, PerParameter, SIRFShampoo


def new_optimizer(**options: Any) -> SIRFShampoo:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    groups = [
        {"params": [*net[0].parameters(), *net[1].parameters()]},
        {"params": net[2].parameters(), "lr": 0.5},
    ]
    return SIRFShampoo(net, groups, lr=0.1, batch_size=2, **options)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_a_rate_written_into_a_given_group_reaches_all_of_its_parameters(
    lr: Any,
) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = SIRFShampoo(net, lr=lr)
    kept = [group["lr"] for group in optimizer.param_groups]
    (given,) = optimizer.given_groups
    given["lr"] = 0.25
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25] * 6
    assert float(given["lr"]) == 0.25
    for group, tensor in zip(optimizer.param_groups, kept, strict=True):
        assert group["lr"] is tensor or not isinstance(lr, torch.Tensor)


def test_given_groups_are_told_apart() -> None:
    optimizer = new_optimizer(combine_params=(LinearWeightBias(), PerParameter()))
    first, second = optimizer.given_groups
    assert (first["lr"], second["lr"]) == (0.1, 0.5)
    assert len(first["params"]) == 4
    assert len(second["params"]) == 2
    second["kappa"] = 0.01
    assert [group["kappa"] for group in optimizer.param_groups] == [0.0, 0.0, 0.01]
    assert dict(first)["T"] == 1
    assert len(first) == len(dict(first))


def test_views_survive_loading_and_copies() -> None:
    optimizer = new_optimizer()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.given_groups[0]["lr"] = 0.3
    optimizer.load_state_dict(saved)
    assert optimizer.given_groups[0]["lr"] == 0.1
    other = copy.deepcopy(optimizer)
    other.given_groups[0]["lr"] = 0.9
    assert optimizer.given_groups[0]["lr"] == 0.1
    assert {group["lr"] for group in other.param_groups} == {0.9, 0.5}


def test_what_differs_or_cannot_be_set_is_told() -> None:
    optimizer = new_optimizer()
    first, _ = optimizer.given_groups
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(ValueError, match=r"share a value of 'lr'.* got 0\.2, 0\.1\."):
        first["lr"]
    with pytest.raises(ValueError, match="'lr' must be a finite number >= 0"):
        first["lr"] = -1.0
    for name in ("structures", "params", "nothing"):
        with pytest.raises(ValueError, match=f"'{name}' must be in"):
            first[name] = "dense"
    with pytest.raises(KeyError):
        first["structures"]
    with pytest.raises(TypeError, match="can be set, not deleted"):
        del first["lr"]
