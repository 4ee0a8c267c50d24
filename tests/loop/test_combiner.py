"""Rules: what they take, how they join tensors, who wins."""

from typing import Any

import pytest
import torch
from torch import Size, Tensor, nn

from sirfshampoo import (
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SIRFShampoo,
)
from sirfshampoo.combiner import FlattenAndConcatenate

ROUND_TRIPS: list[
    tuple[PreconditionerGroup, list[tuple[int, ...]], tuple[int, ...]]
] = [
    (PerParameter(), [()], (1,)),
    (PerParameter(), [(1,)], (1,)),
    (PerParameter(), [(1, 1, 1)], (1,)),
    (PerParameter(), [(4,)], (4,)),
    (PerParameter(), [(3, 1, 2)], (3, 2)),
    (PerParameter(), [(0, 3)], (0, 3)),
    (LinearWeightBias(), [(3, 2), (3,)], (3, 3)),
    (LinearWeightBias(), [(1, 2), (1,)], (3,)),
    (LinearWeightBias(), [(3, 1), (3,)], (3, 2)),
    (LinearWeightBias(), [(1, 1), (1,)], (2,)),
    (FlattenEmbedding(), [(5, 2)], (10,)),
    (FlattenEmbedding(), [(1, 1)], (1,)),
    (FlattenEmbedding(), [()], (1,)),
    (FlattenEmbedding(), [(5, 2), (3,), ()], (14,)),
]


@pytest.mark.parametrize(("rule", "shapes", "joint"), ROUND_TRIPS)
def test_ungroup_undoes_group(
    rule: PreconditionerGroup, shapes: list[tuple[int, ...]], joint: tuple[int, ...]
) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    grouped = rule.group(tensors)
    assert grouped.shape == joint
    back = rule.ungroup(grouped, [t.shape for t in tensors])
    assert len(back) == len(tensors)
    assert all(torch.equal(b, t) for b, t in zip(back, tensors, strict=True))


def test_linear_weight_bias_stacks_the_bias_as_last_column() -> None:
    weight, bias = torch.randn(3, 2), torch.randn(3)
    joint = LinearWeightBias().group([weight, bias])
    assert torch.equal(joint[:, :2], weight)
    assert torch.equal(joint[:, 2], bias)


def test_the_base_class_is_abstract() -> None:
    for missing in ("identify", "group", "ungroup"):
        members = {
            name: lambda self, *args: [] for name in ("identify", "group", "ungroup")
        }
        del members[missing]
        with pytest.raises(TypeError, match=missing):
            type("Rule", (PreconditionerGroup,), members)()
    assert issubclass(FlattenEmbedding, FlattenAndConcatenate)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.plain = nn.Linear(4, 3, bias=False)
        self.norm = nn.LayerNorm(3)


ALL = (LinearWeightBias(), FlattenEmbedding(), PerParameter())


def units(optimizer: SIRFShampoo, net: nn.Module) -> list[tuple[str, list[str]]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [
        (
            type(group["combine_params"][0]).__name__,
            [names[id(p)] for p in group["params"]],
        )
        for group in optimizer.param_groups
    ]


def test_rules_are_tried_in_order_and_groups_follow_the_rules() -> None:
    net = Net()
    assert units(SIRFShampoo(net, combine_params=ALL), net) == [
        ("LinearWeightBias", ["hidden.weight", "hidden.bias"]),
        ("FlattenEmbedding", ["embed.weight"]),
        ("PerParameter", ["plain.weight"]),
        ("PerParameter", ["norm.weight"]),
        ("PerParameter", ["norm.bias"]),
    ]
    first = SIRFShampoo(net, combine_params=(PerParameter(), *ALL))
    assert {rule for rule, _ in units(first, net)} == {"PerParameter"}


def test_joint_units_come_before_single_ones_in_the_groups() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4),
        nn.Sequential(nn.Linear(4, 4, bias=False)),
        nn.Linear(4, 2),
    )
    optimizer = SIRFShampoo(net, combine_params=(LinearWeightBias(), PerParameter()))
    assert units(optimizer, net) == [
        ("LinearWeightBias", ["0.weight", "0.bias"]),
        ("LinearWeightBias", ["2.weight", "2.bias"]),
        ("PerParameter", ["1.0.weight"]),
    ]


def test_groups_of_a_rule_follow_what_it_identifies() -> None:
    net = Net()
    backwards = list(net.parameters())[::-1]
    assert units(SIRFShampoo(net, backwards), net) == units(SIRFShampoo(net), net)


def test_default_treats_each_parameter_alone() -> None:
    net = Net()
    assert units(SIRFShampoo(net), net) == [
        ("PerParameter", [name]) for name, _ in net.named_parameters()
    ]


def test_unit_in_different_groups_falls_to_the_next_rule() -> None:
    net = Net()
    params = [
        {"params": [net.hidden.weight], "lr": 0.1},
        {"params": [net.hidden.bias], "lr": 0.2},
    ]
    optimizer = SIRFShampoo(net, params=params, combine_params=ALL)
    assert units(optimizer, net) == [
        ("PerParameter", ["hidden.weight"]),
        ("PerParameter", ["hidden.bias"]),
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_unit_partly_frozen_falls_to_the_next_rule() -> None:
    net = Net()
    net.hidden.bias.requires_grad_(False)
    optimizer = SIRFShampoo(net, combine_params=ALL)
    assert ("PerParameter", ["hidden.weight"]) in units(optimizer, net)
    # also if the frozen parameter is handed over
    optimizer = SIRFShampoo(net, params=list(net.parameters()), combine_params=ALL)
    assert ("PerParameter", ["hidden.bias"]) in units(optimizer, net)


def test_parameter_without_a_rule_is_named() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"'plain\.weight'.*'norm\.weight'"):
        SIRFShampoo(net, combine_params=(LinearWeightBias(), FlattenEmbedding()))
    stranger = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) outside the model"):
        SIRFShampoo(net, params=[*net.parameters(), stranger])


def test_tied_weight_belongs_to_the_first_unit() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    optimizer = SIRFShampoo(net, combine_params=ALL)
    assert units(optimizer, net) == [
        ("LinearWeightBias", ["0.weight", "0.bias"]),
        ("PerParameter", ["1.bias"]),
    ]


class MyLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Parameter(torch.randn(3))


class MyLinearRule(LinearWeightBias):
    LINEAR_CLS = (*LinearWeightBias.LINEAR_CLS, MyLinear)


class MyEmbeddingRule(FlattenEmbedding):
    EMBEDDING_CLS = (*FlattenEmbedding.EMBEDDING_CLS, MyLinear)


def test_layer_classes_can_be_extended_by_subclassing() -> None:
    net = nn.Sequential(nn.Linear(2, 3), MyLinear(), nn.Embedding(4, 2))
    linear = SIRFShampoo(net, combine_params=(MyLinearRule(), PerParameter()))
    assert [len(group["params"]) for group in linear.param_groups] == [2, 2, 1]
    flat = SIRFShampoo(net, combine_params=(MyEmbeddingRule(), PerParameter()))
    dims = [[K.dim for K in factors] for factors in flat.preconditioner]
    assert dims == [[6], [8], [3, 2], [3], [3]]


class Broken(PerParameter):
    def __init__(self, joint: Any) -> None:
        self.joint = joint

    def group(self, tensors: list[Tensor]) -> Tensor:
        return self.joint(tensors[0])

    def ungroup(
        self, grouped_tensor: Tensor, tensor_shapes: list[Size]
    ) -> list[Tensor]:
        return [grouped_tensor]


@pytest.mark.parametrize("joint", [torch.sum, lambda t: t.unsqueeze(-1)])
def test_rule_that_does_not_round_trip_is_refused(joint: Any) -> None:
    with pytest.raises(ValueError, match=r"Argument 'combine_params'.*Broken"):
        SIRFShampoo(nn.Linear(3, 2), combine_params=(Broken(joint),))


class Qkv(FlattenAndConcatenate):
    """A user's rule: any number of parameters in one vector."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [
            [p for n, p in model.named_parameters() if n.startswith(("q", "k", "v"))]
        ]


def test_a_users_rule_trains_as_the_equations_say() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (
                nn.Linear(2, n, dtype=torch.float64) for n in (1, 2, 3)
            )

    net, vector = Net(), nn.Module()
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    vector.p = nn.Parameter(flat.clone())
    options: Any = {"batch_size": 3, "beta2": 0.3, "kappa": 0.1}
    joint = SIRFShampoo(net, combine_params=(Qkv(),), **options)
    alone = SIRFShampoo(vector, **options)
    for _ in range(4):
        vector.p.grad = torch.randn_like(vector.p)
        parts = vector.p.grad.split([p.numel() for p in net.parameters()])
        for p, part in zip(net.parameters(), parts, strict=True):
            p.grad = part.reshape(p.shape).clone()
        joint.step()
        alone.step()
    moved = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.allclose(moved, vector.p, rtol=1e-12, atol=0)
    assert not torch.allclose(moved, flat)
