"""The documented surface, and the door: what is wrong is refused, unchanged."""

import inspect
import re
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sirfshampoo
from sirfshampoo import (
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    choose_structures,
    recipe,
    summary,
)
from sirfshampoo._config.variant import Variant
from sirfshampoo.optimizer import DEFAULT_COMBINE_PARAMS, get_batch_size

DOCUMENTED = {
    "params": None,
    "lr": 0.001,
    "beta2": 0.01,
    "alpha1": 0.9,
    "alpha2": 0.5,
    "lam": 0.001,
    "kappa": 0.0,
    "batch_size": get_batch_size,
    "T": 1,
    "structures": "dense",
    "preconditioner_dtypes": None,
    "combine_params": DEFAULT_COMBINE_PARAMS,
    "verbose_init": False,
}
GROUP_KEYS = ["params", *list(DOCUMENTED)[1:7], *list(DOCUMENTED)[8:12]]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Conv1d(2, 2, 2))


def snapshot(optimizer: SIRFShampoo) -> Any:
    return deepcopy((optimizer.state_dict(), len(optimizer.param_groups)))


def test_constructor_has_the_documented_arguments_in_order() -> None:
    parameters = inspect.signature(SIRFShampoo).parameters
    others = {"process_group": None, "shard_preconditioners": False}
    others["weight_decay"] = None  # another name of kappa
    beyond = others | {option.name: option.default for option in fields(Variant)}
    names = list(parameters)
    assert names[: 1 + len(DOCUMENTED)] == ["model", *DOCUMENTED]
    assert sorted(names[1 + len(DOCUMENTED) :]) == sorted(beyond)
    for name, default in beyond.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default
    assert {name: parameters[name].default for name in DOCUMENTED} == DOCUMENTED


@pytest.mark.parametrize("option", fields(Variant), ids=lambda option: option.name)
def test_options_for_all_parameters_arrive(option: Any) -> None:
    values = {"initial_factors": "gradient", "exponent": 0.5}
    values |= {"max_relative_update": 0.1, "clamp": "spectral"}
    values |= {"expected_batch_size": 3}
    value = values.get(option.name, not option.default)
    assert value != option.default
    optimizer = SIRFShampoo(model(), **{option.name: value})
    assert optimizer._engine.variant == replace(Variant(), **{option.name: value})


def test_public_names() -> None:
    assert sorted(sirfshampoo.__all__) == [
        "FlattenEmbedding",
        "FlattenKernel",
        "GrowingInterval",
        "LinearWeightBias",
        "PerParameter",
        "PreconditionerGroup",
        "SIRFShampoo",
        "Summary",
        "choose_structures",
        "recipe",
        "summary",
    ]
    assert len(DEFAULT_COMBINE_PARAMS) == 1
    assert type(DEFAULT_COMBINE_PARAMS[0]) is PerParameter
    assert set(SIRFShampoo.SUPPORTED_STRUCTURES) == {
        "dense",
        "diagonal",
        "block30diagonal",
        "hierarchical15_15",
        "triltoeplitz",
        "triutoeplitz",
    }


def test_groups_have_the_documented_keys_and_tuples() -> None:
    structures = {1: "dense", 2: ("dense", "diagonal"), 3: "diagonal"}
    dtypes = {1: torch.bfloat16, 2: (torch.float32, torch.float16), 3: None}
    net = nn.Sequential(nn.Linear(3, 2), nn.Conv1d(2, 2, 3))
    optimizer = SIRFShampoo(net, structures=structures, preconditioner_dtypes=dtypes)
    assert all(list(group) == GROUP_KEYS for group in optimizer.param_groups)
    assert [group["structures"] for group in optimizer.param_groups] == [
        ("dense", "diagonal"),
        ("dense",),
        ("diagonal",) * 3,
        ("dense",),
    ]
    assert [group["preconditioner_dtypes"] for group in optimizer.param_groups] == [
        (torch.float32, torch.float16),
        (torch.bfloat16,),
        (torch.float32,) * 3,
        (torch.bfloat16,),
    ]
    for factors, group in zip(
        optimizer.preconditioner, optimizer.param_groups, strict=True
    ):
        for K, name, dtype in zip(
            factors, group["structures"], group["preconditioner_dtypes"], strict=True
        ):
            assert type(K) is SIRFShampoo.SUPPORTED_STRUCTURES[name]
            assert all(tensor.dtype == dtype for _, tensor in K.named_tensors())
            assert torch.equal(K.to_dense().float(), torch.eye(K.dim))


NUMBERS = ["lr", "beta2", "alpha1", "alpha2", "lam", "kappa"]
BAD_NUMBERS = [-1e-3, -1, float("nan"), float("inf"), "0.1", None, True, 1j, [0.1]]
BAD_OPTIONS: list[tuple[str, Any]] = [
    *((name, value) for name in NUMBERS for value in BAD_NUMBERS),
    *((name, torch.tensor(-1.0)) for name in NUMBERS),
    *((name, torch.ones(2)) for name in NUMBERS),
    ("alpha1", 1.0),
    ("alpha2", 1),
    *(("T", value) for value in (0, -1, 1.5, True, None, "1", float("nan"))),
    *(
        ("structures", value)
        for value in (
            "sparse",
            "Dense",
            None,
            3,
            ("dense",),
            {2: "dense"},
            {1: "dense", 2: "sparse"},
            {1: "dense", 2: ("dense",), 3: "dense"},
            {1: "dense", 2: ("dense", None), 3: "dense"},
            {1: "dense", 2: "dense", 3: "dense", 7: "sparse"},
            {1: "dense", 2: "dense", "3": "dense"},
            "block0diagonal",
            {1: "dense", 2: ("dense", "blockdiagonal"), 3: "hierarchical8"},
            {},
        )
    ),
    *(
        ("preconditioner_dtypes", value)
        for value in (
            torch.int32,
            torch.complex64,
            torch.float8_e4m3fn,
            "float32",
            float,
            (torch.float32,),
            {1: torch.float32},
            {1: None, 2: (None,)},
            {1: None, 2: torch.int8},
            {0: None, 1: None, 2: None},
        )
    ),
    *(
        ("combine_params", value)
        for value in (None, (), PerParameter(), (PerParameter,), ("PerParameter",))
    ),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_bad_option_is_refused_everywhere(name: str, value: Any) -> None:
    net = model()
    hooks = len(net._forward_pre_hooks)
    with pytest.raises(ValueError, match=f"Argument '{name}'"):
        SIRFShampoo(net, **{name: value})
    with pytest.raises(ValueError, match=f"Argument '{name}'"):
        SIRFShampoo(net, params=[{"params": list(net.parameters()), name: value}])
    assert len(net._forward_pre_hooks) == hooks

    optimizer = SIRFShampoo(net, params=list(net[0].parameters()))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"Argument '{name}'"):
        optimizer.add_param_group({"params": list(net[1].parameters()), name: value})
    assert str(snapshot(optimizer)) == str(before)
    assert set(optimizer.state) == set(net[0].parameters())


@pytest.mark.parametrize(("name", "value"), [("lr", -0.1), ("T", 0), ("lam", "x")])
def test_message_names_argument_rule_and_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        SIRFShampoo(model(), **{name: value})
    message = str(caught.value)
    assert f"'{name}'" in message
    assert "must be" in message
    assert repr(value) in message


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "32"])
def test_bad_batch_size_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Argument 'batch_size'"):
        SIRFShampoo(model(), batch_size=value)


@pytest.mark.parametrize("value", [None, 3, nn.Linear])
def test_bad_model_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Argument 'model'"):
        SIRFShampoo(value)


@pytest.mark.parametrize("value", [0.01, {"lr": 0.01}, 3])
def test_options_in_the_place_of_parameters_are_told_how_to_be_given(
    value: Any,
) -> None:
    with pytest.raises(ValueError, match=r"'params' .* \*\*recipe\(\.\.\.\)"):
        SIRFShampoo(model(), value)


def test_parameters_without_a_batch_size_are_told_both_ways_out() -> None:
    with pytest.raises(ValueError, match=r"number of examples .* model itself") as told:
        SIRFShampoo(model().parameters())
    assert "function" not in str(told.value)  # the default, which nobody gave


@pytest.mark.parametrize("name", ["momentum", "betas", "eps", "damping"])
def test_option_of_another_optimizer_is_refused_not_ignored(name: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=f"'{name}' is not an option"):
        SIRFShampoo(net, params=[{"params": list(net.parameters()), name: 0.1}])


@pytest.mark.parametrize("name", NUMBERS)
def test_edge_values_are_accepted(name: str) -> None:
    for value in (0, 0.0, 0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        net = model()
        optimizer = SIRFShampoo(net, batch_size=3, **{name: value})
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in net.parameters())


def test_rewritten_group_can_be_given_again() -> None:
    net = model()
    first = SIRFShampoo(net, structures={1: "diagonal", 2: "dense", 3: "diagonal"})
    second = SIRFShampoo(net, params=first.param_groups)
    for old, new in zip(first.param_groups, second.param_groups, strict=True):
        assert {**old, "params": None} == {**new, "params": None}


def test_the_users_dictionaries_stay_as_they_are() -> None:
    net = model()
    group = {"params": list(net.parameters()), "lr": 0.1}
    SIRFShampoo(net, params=[group])
    assert set(group) == {"params", "lr"}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_parameter_of_unsupported_type_is_refused_by_name(dtype: torch.dtype) -> None:
    net = nn.Module()
    net.odd = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=True)
    with pytest.raises(ValueError, match=r"Argument 'params' .*'odd'"):
        SIRFShampoo(net)


def test_duplicates_and_empty_lists_are_refused() -> None:
    net = model()
    p = net[0].weight
    with pytest.raises(ValueError, match="duplicates"):
        SIRFShampoo(net, params=[p, p])
    with pytest.raises(ValueError, match="empty parameter list"):
        SIRFShampoo(net, params=[])
    with pytest.raises(ValueError, match="more than one parameter group"):
        SIRFShampoo(net, params=[{"params": [p]}, {"params": [p]}])


def test_verbose_init_prints_the_summary(capsys: Any) -> None:
    structures = {1: "diagonal", 2: "dense", 3: "dense"}
    SIRFShampoo(model(), structures=structures)
    assert capsys.readouterr().out == ""
    SIRFShampoo(model(), structures=structures, verbose_init=True)
    told = str(sirfshampoo.summary(model(), structures=structures))
    assert capsys.readouterr().out == told + "\n"


def test_weight_decay_in_a_group_is_kappa() -> None:
    net = model()
    weights, rest = [net[0].weight], [net[0].bias]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest}]
    optimizer = SIRFShampoo(net, groups, kappa=0.3)
    assert [group["kappa"] for group in optimizer.param_groups] == [0.1, 0.3]
    assert all("weight_decay" not in group for group in optimizer.param_groups)
    with pytest.raises(ValueError, match=r"'weight_decay'.*0.1 and 0.2"):
        SIRFShampoo(net, [{"params": weights, "weight_decay": 0.1, "kappa": 0.2}])
    with pytest.raises(ValueError, match=r"'kappa'.*-1"):
        SIRFShampoo(net, [{"params": weights, "weight_decay": -1}])


def test_the_text_of_an_optimizer_folds_equal_groups() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    net = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    for rules in [(PerParameter(),), (LinearWeightBias(), PerParameter())]:
        optimizer = SIRFShampoo(net, lr=0.25, combine_params=rules)
        text = repr(optimizer)
        assert text.startswith("SIRFShampoo (\nParameter Groups 0")
        assert len(text.splitlines()) < 45
        assert "lr: 0.25" in text
        told = sum(map(int, re.findall(r"\((\d+) parameters\)", text)))
        assert told == len(list(net.parameters()))
    optimizer.param_groups[1]["lr"] = 0.5
    assert "Parameter Group 1 (2 parameters)" in repr(optimizer)
    assert "Parameter Groups 0, 2-" in repr(optimizer)


def test_a_group_that_was_refused_does_not_hide_layers_added_since() -> None:
    net = model()
    optimizer = SIRFShampoo(net, list(net[0].parameters()))
    wrong = {"params": list(net[1].parameters()), "structures": {3: "dense"}}
    with pytest.raises(ValueError, match="must have an entry for tensors with 1 axes"):
        optimizer.add_param_group(wrong)
    net.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": list(net[2].parameters())})
    assert len(optimizer.param_groups) == 4


@pytest.mark.parametrize("value", [None, "yes", 7])
def test_ranks_that_share_are_checked_without_ranks_too(value: Any) -> None:
    with pytest.raises(ValueError, match="'shard_preconditioners' must be True"):
        SIRFShampoo(model(), shard_preconditioners=value)
    with pytest.raises(ValueError, match="'verbose_init' must be True or False"):
        SIRFShampoo(model(), verbose_init=value)


@pytest.mark.parametrize("value", [None, [], {"state": {}}])
def test_what_is_no_state_dict_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="'state_dict' must be a dict with the key"):
        SIRFShampoo(model()).load_state_dict(value)


def test_a_momentum_written_by_hand_holds_until_a_scheduler_writes_again() -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    for group in optimizer.param_groups:
        group["momentum"] = 0.8  # as CyclicLR and OneCycleLR do
    optimizer.step()
    assert {group["alpha1"] for group in optimizer.param_groups} == {0.8}
    for group in optimizer.param_groups:
        group["alpha1"] = 0.5
    optimizer.step()
    assert {group["alpha1"] for group in optimizer.param_groups} == {0.5}
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    optimizer.step()
    assert {group["alpha1"] for group in optimizer.param_groups} == {0.9}


def test_weight_decay_is_another_name_of_kappa() -> None:
    net = model()
    for given in [{"weight_decay": 0.1}, {"kappa": 0.1}]:
        for weight_decay in [{}, {"weight_decay": 0.0}]:
            optimizer = SIRFShampoo(net, **{**weight_decay, **given})
            assert {group["kappa"] for group in optimizer.param_groups} == {0.1}
    with pytest.raises(ValueError, match="'weight_decay' is another name of 'kappa'"):
        SIRFShampoo(net, kappa=0.1, weight_decay=0.2)
    with pytest.raises(ValueError, match="must be a finite number >= 0"):
        SIRFShampoo(net, weight_decay=-0.2)


def test_a_decay_that_no_group_takes_is_told() -> None:
    net = model()
    groups = [{"params": [p], "weight_decay": 0.0} for p in net.parameters()]
    with pytest.warns(UserWarning, match="kappa=0.1 has no effect"):
        SIRFShampoo(net, groups, kappa=0.1)
    groups[0]["weight_decay"] = 0.2
    SIRFShampoo(net, groups, kappa=0.1)


def test_the_recipe_tells_the_batch_size_where_there_is_no_model() -> None:
    net = model()
    optimizer = SIRFShampoo(net.parameters(), **recipe(net, batch_size=6))
    assert optimizer.batch_size == 6


@pytest.mark.parametrize(
    "use",
    [
        SIRFShampoo,
        summary,
        choose_structures,
        lambda net: recipe(net, batch_size=4),
    ],
)
def test_lazy_layers_have_to_see_a_batch_first(use: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"lazy layers with .*'1.weight'.* one batch"):
        use(net)
    net(torch.randn(2, 3))
    use(net)


def test_lazy_parameters_alone_have_to_be_shaped_first() -> None:
    with pytest.raises(ValueError, match="with shapes, got one of a lazy layer"):
        SIRFShampoo(nn.LazyLinear(3).parameters(), batch_size=2)
