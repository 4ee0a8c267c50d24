"""The chooser gives every parameter the structure that suits it, once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from sirfshampoo import (
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    choose_structures,
    recipe,
    summary,
)
from tests.cases import MODELS, TiedLanguageModel, build


def structures_by_name(
    model: nn.Module, groups: list[dict[str, Any]], **options: Any
) -> dict[str, tuple[str, ...]]:
    """Return what the optimizer makes of groups: the structures of each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = SIRFShampoo(model, groups, batch_size=4, **options)
    return {
        names[id(p)]: group["structures"]
        for group in optimizer.param_groups
        for p in group["params"]
    }


def choices(model: nn.Module, **options: Any) -> dict[str, tuple[str, ...]]:
    return structures_by_name(model, choose_structures(model, **options))


# --- every model ----------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_dense", [0, 5, 2048])
def test_every_parameter_is_there_once_and_in_order(name: str, max_dense: int) -> None:
    model = MODELS[name].make()
    next(iter(model.parameters())).requires_grad_(False)  # it may be thawed later
    groups = choose_structures(model, max_dense=max_dense)
    order = {id(p): i for i, p in enumerate(model.parameters())}
    found = [[order[id(p)] for p in group["params"]] for group in groups]
    assert sorted(i for numbers in found for i in numbers) == sorted(order.values())
    assert all(numbers == sorted(numbers) for numbers in found)
    assert [numbers[0] for numbers in found] == sorted(n[0] for n in found)
    assert all(set(group) == {"params", "structures"} for group in groups)
    again = choose_structures(model, max_dense=max_dense)
    assert [g["structures"] for g in again] == [g["structures"] for g in groups]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rules", [(), (LinearWeightBias(),)], ids=["each", "joint"])
def test_every_model_trains_with_what_is_chosen(name: str, rules: Any) -> None:
    model, x, y = build(name, 6, torch.float32)
    groups = choose_structures(model, max_dense=6, beyond="block4diagonal")
    options = {"lr": 0.01, "combine_params": (*rules, PerParameter())}
    optimizer = SIRFShampoo(model, groups, **options)
    if rules and any(m.bias is not None for m in linear_layers(model)):
        joint = [g for g in optimizer.param_groups if len(g["params"]) == 2]
        assert joint, "no weight shares a group with its bias"
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


# --- a GPT ----------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.narrow(self.widen(x).relu())


class GPT(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        # registered first: the head is found by what it is, not by where it stands
        self.head = nn.Linear(8, 40, bias=not tied)
        self.tokens, self.positions = nn.Embedding(40, 8), nn.Embedding(5, 8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.norm = nn.LayerNorm(8)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        return self.head(self.norm(self.blocks(x)))


class HuggingFaceLike(GPT):
    def get_output_embeddings(self) -> nn.Module | None:
        return self.head


GPT_MATRICES = {
    f"blocks.{i}.{name}": axes
    for i in range(2)
    for name, axes in {
        "attention.in_proj_weight": ("beyond", "dense"),
        "attention.out_proj.weight": ("dense", "dense"),
        "widen.weight": ("beyond", "dense"),
        "narrow.weight": ("dense", "beyond"),
    }.items()
}


@pytest.mark.parametrize("beyond", ["block30diagonal", "diagonal", "hierarchical2_2"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT(tied=True),
        HuggingFaceLike,
    ],
    ids=["tied", "get_output_embeddings"],
)
def test_a_gpt_gets_dense_factors_for_its_short_matrix_axes_alone(
    beyond: str, make: Any
) -> None:
    found = choices(make(), max_dense=8, beyond=beyond)
    for name, structures in found.items():
        expected = GPT_MATRICES.get(name, ("diagonal",) * len(structures))
        assert structures == tuple(beyond if s == "beyond" else s for s in expected)
    assert found.keys() >= GPT_MATRICES.keys()


def test_heads_can_be_named_and_denied() -> None:
    model = GPT()
    # without a sign, the last linear layer is taken for the head
    assert choices(model)["head.weight"] == ("dense", "dense")
    assert choices(model)["blocks.1.narrow.weight"] == ("diagonal", "diagonal")
    named = choices(model, heads=["head"])
    assert named["head.weight"] == ("diagonal", "diagonal")
    assert named["blocks.1.narrow.weight"] == ("dense", "dense")
    assert choices(model, heads="head") == named
    denied = choices(model, heads=())
    assert denied["head.weight"] == denied["blocks.1.narrow.weight"]
    assert denied["head.weight"] == ("dense", "dense")
    whole = choices(model, heads=["blocks.0", "blocks.1"])
    assert whole["blocks.1.widen.weight"] == ("diagonal", "diagonal")


def test_a_model_that_says_it_has_no_output_embedding_has_a_last_layer() -> None:
    model = HuggingFaceLike()
    model.get_output_embeddings = lambda: None  # a classifier
    assert choices(model)["blocks.1.narrow.weight"] == ("diagonal", "diagonal")


def test_the_bias_of_a_tied_head_is_diagonal_and_joins_no_matrix() -> None:
    model = TiedLanguageModel(13, 6)
    (lean, rest) = choose_structures(model)
    assert lean["structures"] == "diagonal"
    assert [id(p) for p in lean["params"]] == [id(model.out.weight), id(model.out.bias)]
    assert rest["structures"] == {1: "diagonal", 2: ("dense", "dense")}
    assert [id(p) for p in rest["params"]] == [id(p) for p in model.mix.parameters()]


# --- a ResNet -------------------------------------------------------------------------
class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 7, padding=3),
        nn.BatchNorm2d(6),
        Residual(6),
        nn.Conv2d(6, 12, 1, bias=False),
        nn.Conv2d(12, 12, 3, groups=12, padding=1),
        Residual(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def test_a_resnet_gets_its_convolutions_axis_by_axis() -> None:
    assert choices(resnet(), max_dense=7) == {
        "0.weight": ("dense",) * 4,
        "0.bias": ("diagonal",),
        "1.weight": ("diagonal",),
        "1.bias": ("diagonal",),
        "2.conv.weight": ("dense",) * 4,
        "2.norm.weight": ("diagonal",),
        "2.norm.bias": ("diagonal",),
        "3.weight": ("block30diagonal", "dense"),  # 1 x 1: these axes do not count
        "4.weight": ("block30diagonal", "dense", "dense"),
        "4.bias": ("diagonal",),
        "5.conv.weight": ("block30diagonal", "block30diagonal", "dense", "dense"),
        "5.norm.weight": ("diagonal",),
        "5.norm.bias": ("diagonal",),
        "8.weight": ("diagonal", "diagonal"),
        "8.bias": ("diagonal",),
    }


# --- what is wrong --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_dense": -1}, "Argument 'max_dense' must be .* got -1"),
        ({"max_dense": 1.5}, "Argument 'max_dense' must be .* got 1.5"),
        ({"max_dense": True}, "Argument 'max_dense' must be .* got True"),
        ({"beyond": "sparse"}, "Argument 'beyond' must name .* got 'sparse'"),
        ({"beyond": None}, "Argument 'beyond' must name .* got None"),
        ({"heads": ["haed"]}, r"Argument 'heads' must hold .* got \['haed'\]"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_structures(GPT(), **options)
    with pytest.raises(ValueError, match="Argument 'model' must be"):
        choose_structures([nn.Parameter(torch.zeros(3))])  # type: ignore[arg-type]


# --- with other things around ---------------------------------------------------------
@pytest.mark.parametrize("max_dense", [8, 4096])
def test_choices_go_with_the_recipe_on_kernels(max_dense: int) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3, groups=8), nn.Conv2d(8, 1, 3)),
        *(nn.Flatten(), nn.Linear(4, 6), nn.Linear(6, 2)),
    )
    arguments = recipe(model, batch_size=4, steps=100)
    structures = {
        name: structures_by_name(
            model, choose_structures(model, max_dense=max_dense), **options
        )
        for name, options in (("recipe", arguments), ("plain", {}))
    }
    lone = choose_structures(nn.Conv2d(1, 1, 3))[0]["structures"]
    assert lone == {1: "diagonal", 2: ("dense", "dense")}
    beyond = "dense" if max_dense > 8 else "block30diagonal"
    assert structures["recipe"]["0.weight"] == (beyond, "dense", beyond)
    assert structures["plain"]["0.weight"] == (beyond, *["dense"] * 3)


@pytest.mark.parametrize("around", [parametrizations.spectral_norm, None])
def test_parametrized_weights_are_known_and_left_alone(around: Any) -> None:
    def wrapped(layer: nn.Module) -> Any:
        if around is None:
            return prune.random_unstructured(layer, "weight", amount=0.1)
        return around(layer)

    hidden = [wrapped(nn.Linear(8, 8, bias=False)) for _ in range(4)]
    model = nn.Sequential(
        wrapped(nn.Embedding(50, 8)), *hidden, wrapped(nn.Linear(8, 2, bias=False))
    )
    before = [b.clone() for b in model.buffers()]
    found = choices(model)
    assert [found[name] for name in sorted(found)] == [
        ("diagonal",) * 2,
        *[("dense", "dense")] * 4,
        ("diagonal",) * 2,
    ]
    summary(model)
    for old, buffer in zip(before, model.buffers(), strict=True):
        assert torch.equal(old, buffer)  # looking at a weight would have changed some
    # an entry of what an embedding looks up moves by 1, whatever stands before it
    arguments = recipe(model, batch_size=4) | {"lr": 1.0, "max_relative_update": None}
    optimizer = SIRFShampoo(model, **arguments)
    table = next(iter(model.parameters()))
    start = table.detach().clone()
    model(torch.arange(50)).square().mean().backward()
    optimizer.step()
    assert float((table.detach() - start).norm()) > 2 * 50**0.5


def test_layers_without_a_weight_of_their_own_are_no_heads() -> None:
    class Computed(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(5, 3)
            del self.weight
            self.own = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.embedding(x, 2 * self.own)

    model = nn.Sequential(Computed(), nn.Linear(3, 3), nn.Linear(3, 2))
    assert choices(model)["1.weight"] == ("dense", "dense")
