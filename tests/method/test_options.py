"""The options beyond the documented ones do what they say, and resume exactly."""

import copy
import io
import pickle
from inspect import signature
from math import isqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sirfshampoo import (
    GrowingInterval,
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    recipe,
)
from sirfshampoo._method.descent import normalizing, row_norms, scale_rows

OPTIONS: dict[str, Any] = {
    "initial_factors": "gradient",
    "exponent": 0.75,
    "momentum_first": True,
    "nesterov": True,
    "normalize_update": True,
    "follow_gradient": True,
    "max_relative_update": 0.04,
    "clamp": "spectral",
    "relative_damping": True,
    "cautious_decay": True,
    "kappa": 0.1,
    "T": GrowingInterval(3),
    "beta2": 0.2,
    "lam": 1e-6,
}


def set_gradients(model: nn.Module, seed: int) -> None:
    """Set normal gradients that follow from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("T", [1, 2, 3, 10])
def test_the_interval_grows_with_the_root_of_the_step(T: int) -> None:
    rule, expected, due = GrowingInterval(T), [], 0
    for step in range(5000):
        expected.append(step == due)
        if step == due:
            due += min(max(isqrt(step // 4), 1), T)  # ⌊√step / 2⌋
    assert [rule(step) for step in range(5000)] == expected
    if T == 10:
        assert sum(expected[:400]) == 88  # as its documentation says


def test_an_interval_can_be_copied_and_told() -> None:
    rule = GrowingInterval(10)
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule
    assert repr(rule) == "GrowingInterval(T=10)"
    with pytest.raises(ValueError, match="'T' must be an integer > 0, got 0"):
        GrowingInterval(0)


def test_factors_start_in_the_first_finite_update_and_only_then() -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = SIRFShampoo(
        model, batch_size=8, initial_factors="gradient", lam=0.0, beta2=0.0
    )
    before = model.weight.detach().clone()
    for bad in (float("nan"), 0.0):  # nothing to start from
        model.weight.grad = torch.full((3, 4), bad)
        optimizer.step()
        assert all(not K.to_dense().any() for K in optimizer.preconditioner[0])
    assert torch.equal(model.weight.detach(), before)
    for size in (0.5, 7.0):  # the second does not start them again
        model.weight.grad = torch.full((3, 4), size)
        optimizer.step()
        for K in optimizer.preconditioner[0]:
            expected = (8 * 0.5**2) ** -0.25 * torch.eye(K.dim)
            torch.testing.assert_close(K.to_dense(), expected)


def test_factors_start_with_their_first_gradient_whatever_T_says() -> None:
    """Else a parameter would stand still for up to T steps, or for ever."""
    here, rare, late = (nn.Parameter(torch.ones(3)) for _ in range(3))
    arguments: dict[str, Any] = {
        "batch_size": 8,
        "initial_factors": "gradient",
        "T": 10,
    }

    def factors(optimizer: SIRFShampoo) -> list[torch.Tensor]:
        return [K.to_dense().clone() for Ks in optimizer.preconditioner for K in Ks]

    optimizer = SIRFShampoo([here, rare], **arguments)
    here.grad = torch.arange(3.0)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    learned, *others = factors(optimizer)
    assert learned.any()
    assert not any(K.any() for K in others)
    rare.grad = late.grad = torch.ones(3)
    optimizer.step()
    for p in (here, rare, late):
        assert not torch.equal(p, torch.ones(3))
    # what has started is updated when it is due
    assert torch.equal(factors(optimizer)[0], learned)
    assert all(K.any() for K in factors(optimizer))
    # so it is after a checkpoint
    again = SIRFShampoo([here, rare], **arguments)
    again.add_param_group({"params": [late]})
    again.load_state_dict(optimizer.state_dict())
    before = factors(again)
    again.step()
    assert all(map(torch.equal, factors(again), before))


@pytest.mark.parametrize("lr", [10.0, torch.tensor(10.0)])
@pytest.mark.parametrize("momentum_first", [False, True])
def test_no_parameter_moves_far_beside_its_size(
    momentum_first: bool, lr: float | torch.Tensor
) -> None:
    model = nn.Linear(3, 4)
    nn.init.constant_(model.weight, 2.0)
    nn.init.zeros_(model.bias)  # counts as if its norm were ½
    optimizer = SIRFShampoo(
        model,
        batch_size=8,
        lr=lr,
        alpha1=0.0,
        momentum_first=momentum_first,
        max_relative_update=0.01,
    )
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 0)
    for p in model.parameters():
        p.grad = 100 * p.grad if p.grad is not None else None
    told = optimizer.diagnostics()
    optimizer.step()
    after = model.parameters()
    pairs = zip(after, before, strict=True)
    moves = [float((p.detach() - q).norm()) for p, q in pairs]
    longest = [0.01 * 2.0 * 12**0.5, 0.01 * 0.5]
    assert moves == pytest.approx(longest, rel=1e-5)
    told_of = [told[f"{name}/update_norm"] for name in ("weight", "bias")]
    assert told_of == pytest.approx(longest, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "m"),
    [
        *(((8, 8), 8), ((4, 12), 4), ((12, 4), 12), ((3, 2, 5), 3), ((7,), 1), ((), 1)),
        # axes of size 1 do not count: a table of positions, the scales of channels
        *(((1, 4, 6), 4), ((7, 1, 1), 1), ((1, 7), 1), ((7, 1), 1), ((5, 1, 3, 3), 5)),
        ((1, 4, 3, 3), 1),  # a kernel of one output
    ],
)
def test_an_update_has_the_size_of_orthonormal_rows(
    shape: tuple[int, ...], m: int
) -> None:
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = SIRFShampoo([p], batch_size=1, lr=1.0, normalize_update=True)
    for size in (1e-30, 1.0, 1e30):
        before = p.detach().clone()
        p.grad = torch.randn(shape, dtype=torch.float64) * size
        optimizer.param_groups[0]["alpha1"] = 0.0
        optimizer.step()
        dims = [d for d in shape if d != 1]
        U = (before - p.detach()).reshape(dims[0] if len(dims) > 1 else 1, -1)
        r = min(U.shape)
        schatten4 = torch.linalg.svdvals(U).pow(4).sum() ** 0.25
        assert float(schatten4) == pytest.approx(m**0.5 * r**-0.25)
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)
    # a weight of 0 counts as one of half that size where steps are limited
    options = {"normalize_update": True, "max_relative_update": 0.01}
    limited = SIRFShampoo(
        [q := 0 * before], batch_size=1, lr=9.0, alpha1=0.0, **options
    )
    q.grad = torch.randn(shape, dtype=torch.float64)
    limited.step()
    assert float(q.norm()) == pytest.approx(0.01 * 0.5 * m**0.5)


def test_a_number_alone_is_limited_as_a_vector() -> None:
    p = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    options = {"lr": 1.0, "normalize_update": True, "max_relative_update": 0.01}
    optimizer = SIRFShampoo([p], batch_size=1, alpha1=0.0, **options)
    p.grad = torch.tensor(3.0, dtype=torch.float64)
    optimizer.step()
    assert p.item() == pytest.approx(2.0 * 0.99)


def normalized(U: Tensor, *, size: float) -> Tensor:
    """Return one update at a size."""
    rows = U.clone().unsqueeze(0)
    scale_rows([rows], normalizing([rows], row_norms(rows), sizes=[size]))
    return rows[0]


@pytest.mark.parametrize("shape", [(300, 200), (128, 500)])
def test_no_direction_of_an_update_is_far_longer_than_the_others(
    shape: tuple[int, int],
) -> None:
    r = min(shape)
    a, b = torch.randn(shape[0], 1), torch.randn(1, shape[1])
    size = shape[0] ** 0.5
    U = normalized(a @ b, size=size)
    # by its Schatten-4 norm alone it would be longer
    assert float(torch.linalg.matrix_norm(U, 2)) == pytest.approx(
        3 * (shape[0] / r) ** 0.5, rel=1e-4
    )
    flat = torch.linalg.qr(torch.randn(max(shape), r)).Q
    flat = flat if shape[0] > r else flat.T
    U = normalized(1e-3 * flat, size=size)
    assert torch.allclose(U, (shape[0] / r) ** 0.5 * flat, atol=1e-4)
    assert not normalized(torch.zeros(shape), size=size).any()


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_steps_shrink_with_the_gradient_beside_its_mean_so_far(size: float) -> None:
    options = {"lr": 1.0, "alpha1": 0.0, "beta2": 0.0, "normalize_update": True}
    models = [nn.Linear(2, 3, bias=False) for _ in range(2)]
    steady, following = (
        SIRFShampoo(model, batch_size=1, follow_gradient=follows, **options)
        for model, follows in zip(models, (False, True), strict=True)
    )
    counted: list[float] = []
    for norm in (1.0, 3.0, float("nan"), 0.5, 0.0, 0.01, 1.5):
        G = torch.randn(3, 2)
        before = [model.weight.detach().clone() for model in models]
        for model in models:
            model.weight.grad = G / G.norm() * norm * size
        steady.step()
        following.step()
        moves = [
            model.weight.detach() - start
            for model, start in zip(models, before, strict=True)
        ]
        if norm == norm:
            counted.append(norm)
            mean = sum(counted) / len(counted)
            shrinks = min(1.0, max(0.1, norm / mean))
            torch.testing.assert_close(moves[1], shrinks * moves[0])
            told = following.diagnostics()["weight/update_norm"]
            assert told == pytest.approx(float(moves[1].norm()), rel=1e-5)
        else:  # is sat out, and does not count
            assert not moves[1].any()
    state = following.state[models[1].weight]
    assert state["norm_count"].item() == len(counted)
    assert state["norm_mean"].item() == pytest.approx(mean * size, rel=1e-5)


def test_of_what_an_embedding_looks_up_each_entry_counts() -> None:
    tied = nn.Embedding(9, 4)
    head = nn.Linear(4, 9)
    head.weight = tied.weight
    tables = [nn.Embedding(11, 6), nn.Embedding(5, 1), nn.EmbeddingBag(4, 7), tied]
    model = nn.ModuleList([*tables, head, nn.Linear(6, 11)]).double()
    before = {p: p.detach().clone() for p in model.parameters()}
    config = {"lr": 1.0, "alpha1": 0.0, "normalize_update": True}
    optimizer = SIRFShampoo(model, batch_size=1, **config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    embedded = {id(table.weight) for table in tables}
    for p, start in before.items():
        U = start - p.detach()
        size = U.numel() if id(p) in embedded else len(U) if U.ndim > 1 else 1
        schatten4 = float(torch.linalg.svdvals(torch.atleast_2d(U)).norm(4))
        assert schatten4 == pytest.approx(
            (size / min(torch.atleast_2d(U).shape) ** 0.5) ** 0.5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [0.5, 0.75])
def test_factors_stay_symmetric_and_positive_definite(
    exponent: float, dtype: torch.dtype
) -> None:
    model = nn.Linear(12, 7, bias=False)
    optimizer = SIRFShampoo(
        model,
        batch_size=8,
        exponent=exponent,
        initial_factors="gradient",
        preconditioner_dtypes=dtype,
        beta2=0.4,
        lam=1e-4,
    )
    scales = torch.logspace(-3, 2, 12)  # ill-conditioned
    for seed in range(300):
        set_gradients(model, seed)
        assert model.weight.grad is not None
        model.weight.grad *= scales
        optimizer.step()
    for K, times in zip(
        optimizer.preconditioner[0], optimizer._engine.units[0].times, strict=True
    ):
        mat = K.to_dense().double()
        if times == 1:
            assert torch.equal(mat, mat.mT)
            assert torch.linalg.eigvalsh(mat).min() > 0


@pytest.mark.parametrize("jump", [1e10, 1e12, 1e15])
@pytest.mark.parametrize("clamp", ["spectral", "frobenius"])
def test_factors_outlive_one_gradient_whose_square_is_beyond_all_others(
    clamp: str, jump: float
) -> None:
    model = nn.Linear(48, 40, bias=False)
    arguments = recipe(model, batch_size=8) | {"clamp": clamp, "T": 1}
    optimizer = SIRFShampoo(model, **{**arguments, "batch_size": 8})
    for step in range(20):
        set_gradients(model, step)
        assert model.weight.grad is not None
        if step == 5:
            model.weight.grad *= jump
        optimizer.step()
    assert int(optimizer.state[model.weight]["skipped"]) == 0
    for K in optimizer.preconditioner[0]:
        assert K.to_dense().isfinite().all()


@pytest.mark.parametrize("jump", [1e5, 1e6, 1e12])
def test_relative_damping_of_float16_factors_saturates_with_the_gradient(
    jump: float,
) -> None:
    model = nn.Linear(48, 40, bias=False)
    arguments = recipe(model, batch_size=8) | {"T": 1, "batch_size": 8}
    optimizer = SIRFShampoo(model, **arguments, preconditioner_dtypes=torch.float16)
    norms = []
    for step in range(20):
        set_gradients(model, step)
        assert model.weight.grad is not None
        model.weight.grad *= jump if step >= 5 else 1.0
        optimizer.step()
        norms.append(float(optimizer.preconditioner[0][0].norm()))
    assert int(optimizer.state[model.weight]["skipped"]) == 0
    assert norms[-1] < 0.1 * norms[4]


@pytest.mark.parametrize("structure", ["triltoeplitz", "hierarchical15_15"])
def test_factors_that_cannot_be_symmetric_are_refused(structure: str) -> None:
    model = nn.Linear(4, 3, bias=False)
    arguments: dict[str, Any] = {"structures": {2: (structure, "dense")}}
    SIRFShampoo(model, exponent=0.75, **arguments)
    with pytest.raises(ValueError, match=f"'structures' must be .*{structure}.*axis 0"):
        SIRFShampoo(model, exponent=0.5, **arguments)


@pytest.mark.parametrize("saved", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("loaded", [1.0, 0.75, 0.5])
def test_factors_of_another_exponent_are_not_loaded(
    saved: float, loaded: float
) -> None:
    model = nn.Linear(4, 3)
    first = SIRFShampoo(model, batch_size=8, beta2=0.2, exponent=saved)
    for seed in range(2):
        set_gradients(model, seed)
        first.step()
    other = SIRFShampoo(model, batch_size=8, beta2=0.2, exponent=loaded)
    structures = [group["structures"] for group in other.param_groups]
    before, learned = (o.state[model.weight]["K0.mat"].clone() for o in (other, first))
    if saved == loaded:
        other.load_state_dict(first.state_dict())
        assert torch.equal(other.state[model.weight]["K0.mat"], learned)
    else:
        with pytest.raises(ValueError, match=rf"factors for the exponent {loaded}"):
            other.load_state_dict(first.state_dict())
        assert torch.equal(other.state[model.weight]["K0.mat"], before)
    assert [group["structures"] for group in other.param_groups] == structures


def test_cautious_decay_lets_weights_grow() -> None:
    weights = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    optimizer = SIRFShampoo(
        [weights],
        lr=0.1,
        alpha1=0.0,
        kappa=0.5,
        beta2=0.0,
        batch_size=1,
        structures="diagonal",
        cautious_decay=True,
    )
    weights.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
    optimizer.step()
    # shrunk by 0.1 · 0.5 where the gradient shrinks, too
    expected = torch.tensor([0.85, 1.1, -1.1, -0.85])
    torch.testing.assert_close(weights.detach(), expected)


def test_a_nan_leaves_the_momentum_of_gradients_as_it_is() -> None:
    model = nn.Linear(4, 3)
    optimizer = SIRFShampoo(model, batch_size=8, momentum_first=True)
    set_gradients(model, 0)
    optimizer.step()
    V = optimizer.state[model.weight]["gradient_momentum"].clone()
    weight = model.weight.detach().clone()
    model.weight.grad = torch.full((3, 4), float("nan"))
    optimizer.step()
    assert torch.equal(optimizer.state[model.weight]["gradient_momentum"], V)
    assert torch.equal(model.weight.detach(), weight)
    assert int(optimizer.state[model.weight]["skipped"]) == 1


@pytest.mark.parametrize("taken", [0, 1, 17])
def test_training_resumes_to_the_bit_with_all_options(taken: int) -> None:
    models = [nn.Linear(5, 4), nn.Linear(5, 4)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (SIRFShampoo(m, batch_size=8, **OPTIONS) for m in models)
    for step in range(taken):
        set_gradients(models[0], step)
        first.step()
    file = io.BytesIO()
    torch.save([models[0].state_dict(), first.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    models[1].load_state_dict(weights)
    second.load_state_dict(state)
    for step in range(taken, taken + 20):
        for model, optimizer in zip(models, (first, second), strict=True):
            set_gradients(model, step)
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("initial_factors", "zero"),
        ("momentum_first", 1),
        ("max_relative_update", 0.0),
        ("max_relative_update", float("inf")),
        ("clamp", "nuclear"),
        ("normalize_update", 1),
        ("follow_gradient", None),
        ("relative_damping", "yes"),
        ("exponent", 0.6),
        ("exponent", "half"),
        ("exponent", True),
        ("nesterov", None),
        ("cautious_decay", 0.1),
    ],
)
def test_wrong_options_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"'{option}' must be"):
        SIRFShampoo(nn.Linear(3, 2), **{option: value})


def test_a_group_has_an_option_or_is_told_that_it_cannot() -> None:
    weights = [nn.Parameter(torch.ones(3, 2))]
    of_group = SIRFShampoo(weights, batch_size=1).param_groups[0]
    for option in list(signature(SIRFShampoo).parameters)[2:]:
        if option in of_group or option == "weight_decay":
            continue
        with pytest.raises(ValueError, match=f"'{option}' holds for all parameters"):
            SIRFShampoo([{"params": weights, option: 1}], batch_size=1)


def test_the_rate_of_the_recipe_falls_with_the_root_of_the_number_of_weights() -> None:
    layer = nn.Linear(2, 2)
    rate = recipe(layer, batch_size=1)["lr"]
    for number in (1, 4, 9):
        layers = [nn.Linear(3, 3, bias=number > 4) for _ in range(number)]
        vectors = (nn.LayerNorm(3), nn.Conv1d(1, 1, 1))
        frozen = nn.Linear(3, 3).requires_grad_(False)
        model = nn.Sequential(*layers, *vectors, frozen, layers[0])
        told = recipe(model, batch_size=1)["lr"]
        assert told == pytest.approx(rate / number**0.5)
    assert recipe(nn.LayerNorm(3), batch_size=1)["lr"] == rate


def test_the_recipe_has_one_rate() -> None:
    model = nn.Sequential(nn.Linear(40, 5), nn.LayerNorm(5), nn.Embedding(800, 7))
    arguments = recipe(model, batch_size=32, max_dense=50)
    more = recipe(model, batch_size=128, lr=2e-3, betas=(0.8, 0.9))
    assert more["lr"] == pytest.approx(2 * arguments["lr"])
    assert more["alpha1"] == 0.8
    optimizer = SIRFShampoo(model, batch_size=32, **arguments)
    structures = {
        tuple(group["params"][0].shape): group["structures"]
        for group in optimizer.param_groups
    }
    assert structures[5, 40] == ("dense", "dense")
    assert structures[800, 7] == ("diagonal", "dense")
    assert structures[(5,)] == ("diagonal",)


@pytest.mark.parametrize(
    ("shape", "structures"),
    [
        ((1024, 1024), ("dense", "dense")),
        ((1024, 1025), ("dense", "block128diagonal")),
        ((2 * 100, 100), ("dense", "dense")),
        ((2 * 100 + 1, 100), ("block128diagonal", "dense")),
        ((100, 3 * 100), ("dense", "block128diagonal")),
        ((5, 128), ("dense", "dense")),
        ((129, 5), ("block128diagonal", "dense")),
        ((200, 10, 10), ("dense", "dense", "dense")),
        ((201, 10, 10), ("block128diagonal", "dense", "dense")),
        ((16 * 1024 - 1, 8), ("block128diagonal", "dense")),
        ((16 * 1024, 2000), ("diagonal", "block128diagonal")),
    ],
)
def test_axes_longer_than_the_others_have_blocks(
    shape: tuple[int, ...], structures: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        p = nn.Parameter(torch.empty(shape))
        optimizer = SIRFShampoo([p], structures="dense1024", batch_size=1)
    assert optimizer.param_groups[0]["structures"] == structures


def test_a_limit_below_that_of_blocks_holds_for_blocks() -> None:
    p = nn.Parameter(torch.zeros(51, 799))
    optimizer = SIRFShampoo([p], structures="dense50", batch_size=1)
    assert optimizer.param_groups[0]["structures"] == ("block50diagonal",) * 2


@pytest.mark.parametrize(
    ("arguments", "shrink"),
    [
        ({}, 0.0),
        ({"steps": 50}, 0.03),
        ({"steps": 10_000}, 3e-4),
        ({"steps": 100, "weight_decay": 0.0}, 0.0),
        ({"weight_decay": 0.1, "lr": 2e-3}, 2e-4),
    ],
)
def test_the_recipe_shrinks_matrices(arguments: dict[str, Any], shrink: float) -> None:
    model = nn.Linear(4, 3)
    found = recipe(model, batch_size=8, **arguments)
    assert found["kappa"] * found["lr"] == pytest.approx(shrink)
    # where gradients are 0, nothing but the decay moves parameters
    optimizer = SIRFShampoo(model, batch_size=8, **{**found, "cautious_decay": False})
    weight, bias = (p.detach().clone() for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), (1 - shrink) * weight)
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", 0),
        ("batch_size", True),
        ("steps", 0),
        ("max_dense", 2.0),
        ("lr", 0.0),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("weight_decay", -0.1),
    ],
)
def test_the_recipe_refuses_what_is_wrong(argument: str, value: Any) -> None:
    arguments: dict[str, Any] = {"batch_size": 8, argument: value}
    with pytest.raises(ValueError, match=f"Argument '{argument}' must be"):
        recipe(nn.Linear(3, 2), **arguments)


def test_the_recipe_wants_a_model() -> None:
    parameters: Any = nn.Linear(3, 2).parameters()
    with pytest.raises(
        ValueError, match=r"'model' must be a torch\.nn\.Module, got gen"
    ):
        recipe(parameters, batch_size=8)


def test_what_is_written_on_top_of_the_recipe_holds() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))
    given = recipe(model, batch_size=8, steps=100)
    plain = SIRFShampoo(model, **given)
    assert all(group["kappa"] == given["kappa"] > 0 for group in plain.param_groups)
    still = SIRFShampoo(model, **{**given, "kappa": 0})
    assert [group["kappa"] for group in still.param_groups] == [0, 0, 0]
    lean = SIRFShampoo(model, **{**given, "structures": "diagonal"})
    names = {n for group in lean.param_groups for n in group["structures"]}
    assert names == {"diagonal"}
    rules = (LinearWeightBias(), PerParameter())
    joint = SIRFShampoo(model, **{**given, "combine_params": rules})
    assert [len(group["params"]) for group in joint.param_groups] == [2, 1]


def test_the_recipe_serves_parameters_without_their_model() -> None:
    model = nn.Linear(6, 5)
    given = recipe(model, batch_size=8)
    optimizer = SIRFShampoo(model.parameters(), batch_size=8, **given)
    assert len(optimizer.param_groups) == 2
    assert SIRFShampoo(model.parameters(), **given).batch_size == 8
    with pytest.raises(ValueError, match="or the model itself as the first"):
        SIRFShampoo(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Pass the model itself"):
        SIRFShampoo(model.parameters(), list(model.parameters()), batch_size=8)


def test_parameters_of_another_model_are_told() -> None:
    model, other = nn.Linear(6, 5), nn.Linear(6, 5)
    with pytest.raises(ValueError, match="belong to another model than 'model'"):
        SIRFShampoo(model, list(other.parameters()))


def test_factors_start_with_the_first_finite_gradient() -> None:
    model = nn.Linear(4, 3)
    options = {"batch_size": 2, "T": 10, "initial_factors": "gradient"}
    optimizer = SIRFShampoo(model, **options)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert all(not K.max_abs() for factors in optimizer.preconditioner for K in factors)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = model.weight.detach().clone()
    optimizer.step()  # T does not say so
    assert all(K.max_abs() > 0 for factors in optimizer.preconditioner for K in factors)
    assert not torch.equal(model.weight, before)
    factors = [K.to_dense() for factors in optimizer.preconditioner for K in factors]
    optimizer.step()
    now = [K.to_dense() for factors in optimizer.preconditioner for K in factors]
    assert all(torch.equal(a, b) for a, b in zip(factors, now, strict=True))


def test_a_run_resumes_exactly_after_a_start_that_failed() -> None:
    options = {"batch_size": 2, "T": 4, "initial_factors": "gradient"}
    found = []
    for resumes in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = SIRFShampoo(model, **options)
        for step in range(8):
            if resumes and step in (1, 2):
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = SIRFShampoo(model, **options)
                optimizer.load_state_dict(saved)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
                if step < 2:
                    p.grad[0] = float("inf")
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*found)


@pytest.mark.parametrize("first", [False, True])
def test_momenta_of_another_kind_are_not_loaded(first: bool) -> None:
    model = nn.Linear(4, 3)
    optimizer = SIRFShampoo(model, batch_size=2, momentum_first=first)
    other = SIRFShampoo(model, batch_size=2, momentum_first=not first)
    with pytest.raises(ValueError, match=f"it was saved with momentum_first={first}"):
        other.load_state_dict(optimizer.state_dict())
