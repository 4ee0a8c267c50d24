"""The optimizer computes what the twin computes, and has the method's symmetries."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sirfshampoo import (
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SIRFShampoo,
)
from tests.cases import CONFIGS, FAST, SHAPES, STRUCTURES, Tensors, dtypes_of, mixture
from tests.conftest import LargestTensor
from tests.twin import Twin, assert_agree, find_units

STEPS = 12
BATCH = 5

Gradients = dict[nn.Parameter, Tensor | None]
Place = AbstractContextManager[Any]
AT_HAND: Place = nullcontext()


def draw_gradients(params: Iterable[nn.Parameter]) -> Gradients:
    """Set normal gradients, and return copies of them."""
    gradients: Gradients = {}
    for p in params:
        p.grad = torch.randn_like(p)
        gradients[p] = p.grad.clone()
    return gradients


def twin_of(
    model: nn.Module, config: dict[str, Any], rules: tuple[str, ...] = ("PerParameter",)
) -> Twin:
    """Set up the twin: factor dtypes mean nothing to it."""
    settings = {k: v for k, v in config.items() if k != "preconditioner_dtypes"}
    return Twin(find_units(model, rules), **settings)


def follow(
    model: nn.Module,
    config: dict[str, Any],
    rules: tuple[PreconditionerGroup, ...] = (PerParameter(),),
    steps: int = STEPS,
    place: Place = AT_HAND,
) -> tuple[Twin, SIRFShampoo]:
    """Let optimizer and twin take the same steps with random gradients."""
    optimizer = SIRFShampoo(model, batch_size=BATCH, combine_params=rules, **config)
    twin = twin_of(model, config, tuple(type(rule).__name__ for rule in rules))
    for _ in range(steps):
        gradients = draw_gradients(model.parameters())
        with place:
            optimizer.step()
        twin.step(gradients, BATCH)
    return twin, optimizer


# relative to how far a tensor has moved; below float64 about 5 times what was measured
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def tolerance(config: dict[str, Any], dtype: torch.dtype) -> float:
    """Return the tolerance of the coarsest dtype that takes part."""
    return max(TOLERANCES[d] for d in (dtype, *dtypes_of(config, dtype)))


each_choice = pytest.mark.parametrize(
    "structures", [*STRUCTURES, mixture(2)], ids=[*STRUCTURES, "mixture"]
)
dense_and_mixture = pytest.mark.parametrize(
    "structures", ["dense", mixture(1)], ids=["dense", "mixture"]
)


# --- the twin -------------------------------------------------------------------------
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_follows_the_twin_over_12_steps(
    name: str, dtype: torch.dtype, place: Place
) -> None:
    twin, optimizer = follow(Tensors(SHAPES, dtype), CONFIGS[name], place=place)
    assert_agree(twin, optimizer, tolerance(CONFIGS[name], dtype))


@pytest.mark.parametrize("left", STRUCTURES)
@pytest.mark.parametrize("right", STRUCTURES)
def test_every_pair_of_structures_follows_the_twin(left: str, right: str) -> None:
    config = {**FAST, "kappa": 0.01, "structures": {2: (left, right)}}
    twin, optimizer = follow(Tensors([(61, 33), (16, 31)], torch.float64), config)
    assert_agree(twin, optimizer, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factors", [None, torch.float32, torch.float64], ids=str)
@dense_and_mixture
def test_half_precision_parameters_follow_the_twin(
    dtype: torch.dtype, factors: torch.dtype | None, structures: Any, place: Place
) -> None:
    config = {**FAST, "structures": structures, "preconditioner_dtypes": factors}
    twin, optimizer = follow(Tensors(SHAPES, dtype), config, place=place)
    assert_agree(twin, optimizer, tolerance(config, dtype))


def layers() -> nn.Module:
    """Return what rules find."""
    return nn.Sequential(
        nn.Embedding(7, 5),
        nn.Linear(5, 3),
        nn.Linear(3, 1),
        nn.Linear(1, 4),
        nn.Linear(1, 1),
        nn.Linear(3, 2, bias=False),
        nn.LayerNorm(3),
    ).double()


@pytest.mark.parametrize("rule", [LinearWeightBias, FlattenEmbedding])
@each_choice
def test_grouping_rules_follow_the_twin(
    rule: type[PreconditionerGroup], structures: Any, place: Place
) -> None:
    config = {**FAST, "structures": structures}
    twin, optimizer = follow(layers(), config, (rule(), PerParameter()), place=place)
    assert_agree(twin, optimizer, 1e-12)


@pytest.mark.parametrize("rule", [LinearWeightBias, FlattenEmbedding, PerParameter])
def test_updates_of_a_size_follow_the_twin_under_any_rule(
    rule: type[PreconditionerGroup],
) -> None:
    config = CONFIGS["all-options"]
    twin, optimizer = follow(layers(), config, (rule(), PerParameter()))
    assert_agree(twin, optimizer, 1e-10)


@pytest.mark.parametrize("structures", STRUCTURES)
def test_after_two_updates_no_factor_is_symmetric(structures: str) -> None:
    # otherwise K and its transpose could be mistaken for each other unnoticed
    config = {**FAST, "structures": structures}
    model = Tensors([s for s in SHAPES if max(s, default=1) > 1], torch.float64)
    _, optimizer = follow(model, config, steps=2)
    for factors in optimizer.preconditioner:
        for factor in factors:
            K = factor.to_dense()
            asymmetry = (K - K.mT).abs().max().item()
            assert (asymmetry > 1e-4) == (structures != "diagonal"), K


class EveryOtherCall:
    """A schedule with a memory: it says yes in every second call."""

    def __init__(self) -> None:
        """Start with a yes."""
        self.calls = 0

    def __call__(self, step: int) -> bool:
        """Ignore the step, count the calls."""
        self.calls += 1
        return self.calls % 2 == 1


def test_each_group_asks_its_own_copy_of_a_stateful_schedule_once_a_step() -> None:
    schedule = EveryOtherCall()
    config = {**FAST, "T": schedule, "structures": mixture(0)}
    twin, optimizer = follow(Tensors(SHAPES, torch.float64), config)
    assert_agree(twin, optimizer, 1e-12)
    assert schedule.calls == 0
    copies = [group["T"] for group in optimizer.param_groups]
    assert len({id(T) for T in copies}) == len(copies) == len(SHAPES)
    assert {T.calls for T in copies} == {STEPS}


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_the_batch_size_scales_the_curvature(batch_size: int) -> None:
    model = Tensors(SHAPES, torch.float64)
    config = {**FAST, "structures": mixture(0)}
    optimizer = SIRFShampoo(model, batch_size=batch_size, **config)
    twin = twin_of(model, config)
    for _ in range(STEPS):
        gradients = draw_gradients(model.parameters())
        optimizer.step()
        twin.step(gradients, batch_size)
    assert_agree(twin, optimizer, 1e-12)


# --- settings that change, gradients that lack ----------------------------------------
CHANGES: dict[str, Any] = {
    "lr": 0.01,
    "beta2": 0.05,
    "alpha1": 0.5,
    "alpha2": 0.8,
    "lam": 0.5,
    "kappa": 0.2,
    "T": 2,
}


@pytest.mark.parametrize("setting", CHANGES)
def test_settings_changed_by_group_during_training_take_effect(setting: str) -> None:
    model = Tensors(SHAPES, torch.float64)
    config = {**FAST, "structures": mixture(0)}
    optimizer = SIRFShampoo(model, batch_size=BATCH, **config)
    twin = twin_of(model, config)
    number = {
        id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]
    }
    for step in range(STEPS):
        if step in (3, 8):
            # every third unit, from another one on; members of one stack differ
            for unit in twin.units[step % 5 :: 3]:
                group = optimizer.param_groups[number[id(unit.params[0])]]
                old = group[setting]
                group[setting] = unit.settings[setting] = CHANGES[setting]
                assert old != CHANGES[setting] or step == 8
        gradients = draw_gradients(model.parameters())
        optimizer.step()
        twin.step(gradients, BATCH)
    assert_agree(twin, optimizer, 1e-12)


@pytest.mark.parametrize("setting", ["alpha1", "alpha2", "kappa", "lam"])
@pytest.mark.parametrize("starts", ["on", "off"])
def test_settings_can_be_switched_off_and_on_during_training(
    setting: str, starts: str
) -> None:
    model = Tensors(SHAPES, torch.float64)
    config = {**FAST, "kappa": 0.1, "structures": mixture(0)}
    values = [0.0, CHANGES[setting]] if starts == "off" else [CHANGES[setting], 0.0]
    config[setting] = values[0]
    optimizer = SIRFShampoo(model, batch_size=BATCH, **config)
    twin = twin_of(model, config)
    for step in range(9):
        for group, unit in zip(optimizer.param_groups, twin.units, strict=True):
            group[setting] = unit.settings[setting] = values[step // 3 % 2]
            if starts == "off" and step == 3:
                # a momentum is not kept before it is first used, hence starts at 0
                kept = {"alpha1": unit.V, "alpha2": unit.m}.get(setting, [])
                kept[:] = [torch.zeros_like(X) for X in kept]
        gradients = draw_gradients(model.parameters())
        optimizer.step()
        twin.step(gradients, BATCH)
    assert_agree(twin, optimizer, 1e-12)


PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "none-in-some-steps": lambda step, i: step in (0, 4, 5),
    "alternately": lambda step, i: (step + i) % 2 == 0,
    "one-in-three": lambda step, i: (step + i) % 3 == 0,
    "used-late": lambda step, i: i % 4 == 1 and step < 7,
    "frozen-later": lambda step, i: i % 4 == 2 and step > 3,
    "never-used": lambda step, i: i % 4 == 3,
    "half-a-unit": lambda step, i: i == step,
}


@pytest.mark.filterwarnings("ignore:No parameter of the optimizer has a gradient")
@pytest.mark.parametrize("momentum_first", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("T", [1, 3])
def test_parameters_without_gradient_rest(
    pattern: str, T: int, momentum_first: bool, place: Place
) -> None:
    model = nn.Sequential(
        Tensors(SHAPES, torch.float64),
        *(nn.Linear(7, 5) for _ in range(3)),
    ).double()
    config = {**FAST, "T": T, "kappa": 0.1, "structures": mixture(2)}
    config["momentum_first"] = momentum_first
    rules = (LinearWeightBias(), PerParameter())
    optimizer = SIRFShampoo(model, batch_size=BATCH, combine_params=rules, **config)
    twin = twin_of(model, config, ("LinearWeightBias", "PerParameter"))
    for step in range(STEPS):
        gradients = draw_gradients(model.parameters())
        for i, p in enumerate(gradients):
            if PATTERNS[pattern](step, i):
                p.grad = gradients[p] = None
        with place:
            optimizer.step()
        twin.step(gradients, BATCH)
    assert_agree(twin, optimizer, 1e-12)


def snapshot(optimizer: SIRFShampoo, i: int) -> list[Tensor]:
    """Copy everything that one unit owns, but not its counters."""
    tensors = []
    for p in optimizer.param_groups[i]["params"]:
        tensors.append(p.detach().clone())
        state = optimizer.state[p]
        keys = sorted(set(state) - {"step", "skipped"})
        tensors += [state[key].clone() for key in keys]
    for matrix in optimizer.preconditioner[i] + optimizer.preconditioner_momenta[i]:
        tensors += [t.clone() for _, t in matrix.named_tensors()]
    return tensors


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Compare bit by bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("T", [1, 3])
@each_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_non_finite_gradient_lets_its_unit_rest_and_no_other(
    bad: float, T: int, structures: Any, dtype: torch.dtype, place: Place
) -> None:
    # of the three (5, 7), which may share a stack, only the middle one is struck
    model = Tensors([(5, 7), (5, 7), (5, 7), (33,), (4, 3, 5)], dtype)
    optimizer = SIRFShampoo(
        model, batch_size=BATCH, T=T, kappa=0.1, structures=structures, **FAST
    )
    params = list(model.parameters())
    (struck,) = (
        i
        for i, group in enumerate(optimizer.param_groups)
        if group["params"][0] is params[1]
    )
    for step in range(5):
        draw_gradients(params)
        if step in (0, 2, 3):
            params[1].grad[2, 3] = bad
        units = range(len(optimizer.param_groups))
        before = [snapshot(optimizer, i) for i in units]
        with place:
            optimizer.step()
        for i in units:
            rested = same(before[i], snapshot(optimizer, i))
            assert rested == (i == struck and step in (0, 2, 3))
    counts = [int(optimizer.state[p]["skipped"]) for p in params]
    assert counts == [0, 3, 0, 0, 0]
    assert all(p.isfinite().all() for p in params)


def test_a_non_finite_bias_gradient_lets_the_joint_weight_rest_too() -> None:
    model = nn.Linear(4, 3)
    optimizer = SIRFShampoo(
        model, batch_size=BATCH, combine_params=(LinearWeightBias(),), **FAST
    )
    draw_gradients(model.parameters())
    model.bias.grad[1] = float("nan")
    before = snapshot(optimizer, 0)
    optimizer.step()
    assert same(before, snapshot(optimizer, 0))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_finite_gradient_moves_its_unit_however_large_its_sum(
    dtype: torch.dtype,
) -> None:
    # the entries of the float16 update are in range, their sum is not
    model = Tensors([(2000,), (2000,)], dtype)
    optimizer = SIRFShampoo(model, batch_size=1, T=never, structures="diagonal")
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    optimizer.step()
    for p, W in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, W)
        assert int(optimizer.state[p]["skipped"]) == 0


def test_a_rested_unit_continues_as_if_the_step_had_not_been() -> None:
    struck, spared = (Tensors([(5, 7)], torch.float64) for _ in range(2))
    struck.load_state_dict(spared.state_dict())
    optimizers = [SIRFShampoo(m, batch_size=BATCH, **FAST) for m in (struck, spared)]
    for step in range(6):
        draw_gradients(spared.parameters())
        for p, q in zip(struck.parameters(), spared.parameters(), strict=True):
            p.grad = q.grad.clone()
        if step == 2:
            struck.tensors[0].grad.mul_(float("nan"))
            optimizers[0].step()
        else:
            for optimizer in optimizers:
                optimizer.step()
    assert torch.equal(struck.tensors[0], spared.tensors[0])


# --- invariants -----------------------------------------------------------------------
def change_after(
    transform: Callable[[Tensor], Tensor], shapes: list[tuple[int, ...]], **config: Any
) -> list[Tensor]:
    """Train on transformed parameters and gradients; return how far they moved.

    Two calls with the same seed see the same numbers before the transformation.
    """
    torch.manual_seed(1)
    model = Tensors(shapes, torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(transform(p))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = SIRFShampoo(model, batch_size=BATCH, **config)
    for _ in range(STEPS):
        for p in model.parameters():
            p.grad = transform(torch.randn_like(p)).contiguous()
        optimizer.step()
    pairs = zip(model.parameters(), start, strict=True)
    return [p.detach() - W for p, W in pairs]


def assert_same_change(
    ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12
) -> None:
    """Compare how far tensors moved, relative to the largest entry."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def same_tensor(X: Tensor) -> Tensor:
    """Leave it."""
    return X


def reverse(X: Tensor) -> Tensor:
    """Reverse the order along all axes."""
    return X.flip(tuple(range(X.ndim)))


def rotation(d: int) -> Tensor:
    """Return a random orthogonal matrix, the same in each call."""
    generator = torch.Generator().manual_seed(d)
    noise = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def rotate(X: Tensor) -> Tensor:
    """Rotate along every axis."""
    for n, d in enumerate(X.shape):
        X = torch.tensordot(rotation(d), X, dims=([1], [n])).movedim(0, n)
    return X


CLOSE_TO_ALL_SETTINGS = {**FAST, "kappa": 0.1, "T": 2}


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("block30diagonal", 30),
        ("block64diagonal", 64),
        ("hierarchical15_15", 15),
        ("hierarchical20_3", 20),
    ],
)
def test_small_axes_make_a_structure_dense(name: str, largest: int) -> None:
    shapes = [(largest,), (largest, 7), (7, largest), (3, largest, 2), (1, 5)]
    settings = CLOSE_TO_ALL_SETTINGS
    structured = change_after(same_tensor, shapes, structures=name, **settings)
    dense = change_after(same_tensor, shapes, structures="dense", **settings)
    assert_same_change(structured, dense)


@pytest.mark.parametrize(
    ("name", "beyond"),
    [
        ("block30diagonal", 31),
        ("block64diagonal", 65),
        ("hierarchical15_15", 16),
        ("hierarchical20_3", 21),
    ],
)
def test_a_larger_axis_makes_the_structure_differ_from_dense(
    name: str, beyond: int
) -> None:
    structured = change_after(same_tensor, [(beyond, 7)], structures=name, **FAST)
    dense = change_after(same_tensor, [(beyond, 7)], structures="dense", **FAST)
    with pytest.raises(AssertionError):
        assert_same_change(structured, dense, tolerance=1e-3)


def test_reversing_all_axes_turns_triltoeplitz_into_triutoeplitz() -> None:
    settings = CLOSE_TO_ALL_SETTINGS
    lower = change_after(same_tensor, SHAPES, structures="triltoeplitz", **settings)
    upper = change_after(reverse, SHAPES, structures="triutoeplitz", **settings)
    assert_same_change([reverse(X) for X in upper], lower)
    again = change_after(same_tensor, [(33, 61)], structures="triutoeplitz", **FAST)
    with pytest.raises(AssertionError):  # without the reversal they differ
        assert_same_change(again, lower[5:6], tolerance=1e-3)


def test_rotating_the_gradients_rotates_the_dense_update() -> None:
    plain = change_after(same_tensor, SHAPES, **CLOSE_TO_ALL_SETTINGS)
    rotated = change_after(rotate, SHAPES, **CLOSE_TO_ALL_SETTINGS)
    assert_same_change(rotated, [rotate(X) for X in plain], tolerance=1e-11)


def never(step: int) -> bool:
    """Never update the pre-conditioner."""
    return False


@each_choice
@pytest.mark.parametrize(("alpha1", "kappa"), list(product([0.0, 0.9], [0.0, 0.1])))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_T_that_never_fires_makes_it_SGD(
    structures: Any, alpha1: float, kappa: float, dtype: torch.dtype
) -> None:
    ours, theirs = Tensors(SHAPES, dtype), Tensors(SHAPES, dtype)
    theirs.load_state_dict(ours.state_dict())
    optimizer = SIRFShampoo(
        ours,
        lr=0.1,
        alpha1=alpha1,
        kappa=kappa,
        T=never,
        structures=structures,
        batch_size=BATCH,
    )
    sgd = torch.optim.SGD(
        theirs.parameters(), lr=0.1, momentum=alpha1, weight_decay=kappa
    )
    for _ in range(STEPS):
        draw_gradients(ours.parameters())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        sgd.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)


# --- grouping and stacking ------------------------------------------------------------
@pytest.mark.parametrize(("d_out", "d_in"), [(4, 3), (4, 1), (1, 3), (1, 1), (31, 60)])
@each_choice
def test_LinearWeightBias_is_one_matrix_with_the_bias_as_last_column(
    d_out: int, d_in: int, structures: Any
) -> None:
    layer = nn.Linear(d_in, d_out).double()
    joint = nn.Linear(d_in + 1, d_out, bias=False).double()
    with torch.no_grad():
        joint.weight.copy_(torch.cat([layer.weight, layer.bias[:, None]], dim=1))
    config = {**FAST, "kappa": 0.1, "structures": structures, "batch_size": BATCH}
    rules = (LinearWeightBias(),)
    optimizers = [
        SIRFShampoo(layer, combine_params=rules, **config),
        SIRFShampoo(joint, **config),
    ]
    for _ in range(STEPS):
        draw_gradients(joint.parameters())
        layer.weight.grad = joint.weight.grad[:, :-1].clone()
        layer.bias.grad = joint.weight.grad[:, -1].clone()
        for optimizer in optimizers:
            optimizer.step()
    together = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
    assert_same_change([together], [joint.weight.detach()])
    (ours,), (theirs,) = (o.preconditioner for o in optimizers)
    assert [K.dim for K in ours] == [K.dim for K in theirs]


@pytest.mark.parametrize("structures", STRUCTURES)
def test_FlattenEmbedding_is_one_long_vector(structures: str) -> None:
    layer, vector = nn.Embedding(7, 5).double(), Tensors([(35,)], torch.float64)
    with torch.no_grad():
        vector.tensors[0].copy_(layer.weight.flatten())
    config = {**FAST, "kappa": 0.1, "structures": structures, "batch_size": BATCH}
    optimizers = [
        SIRFShampoo(layer, combine_params=(FlattenEmbedding(),), **config),
        SIRFShampoo(vector, **config),
    ]
    assert [K.dim for K in optimizers[0].preconditioner[0]] == [35]
    for _ in range(STEPS):
        draw_gradients(vector.parameters())
        layer.weight.grad = vector.tensors[0].grad.view(7, 5).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_change([layer.weight.detach().flatten()], [vector.tensors[0].detach()])


@dense_and_mixture
def test_the_order_of_the_parameters_does_not_matter(structures: Any) -> None:
    forward, backward = (Tensors(SHAPES, torch.float64) for _ in range(2))
    backward.load_state_dict(forward.state_dict())
    config = {**FAST, "structures": structures, "batch_size": BATCH}
    optimizers = [
        SIRFShampoo(forward, list(forward.parameters()), **config),
        SIRFShampoo(backward, list(backward.parameters())[::-1], **config),
    ]
    for _ in range(STEPS):
        draw_gradients(forward.parameters())
        for p, q in zip(forward.parameters(), backward.parameters(), strict=True):
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    ours, theirs = (
        [p.detach() for p in model.parameters()] for model in (forward, backward)
    )
    assert_same_change(ours, theirs)


@each_choice
@pytest.mark.parametrize("T", [1, 3])
def test_many_equal_layers_at_once_equal_one_by_one(structures: Any, T: int) -> None:
    # of the last ones, too large for one stack of all, some lie in a stack
    shapes = 9 * [(17, 33)] + 5 * [(33,)] + 7 * [(150, 100)]
    together = Tensors(shapes, torch.float64)
    alone = [Tensors([shape], torch.float64) for shape in shapes]
    config = {**FAST, "T": T, "structures": structures, "batch_size": BATCH}
    pairs = list(zip(together.tensors, (m.tensors[0] for m in alone), strict=True))
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p)
    optimizers = [SIRFShampoo(model, **config) for model in (together, *alone)]
    for _ in range(6):
        draw_gradients(together.parameters())
        for p, q in pairs:
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_change([p.detach() for p, _ in pairs], [q.detach() for _, q in pairs])


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels-last"])
def test_memory_layout_of_parameters_and_gradients_does_not_matter(layout: str) -> None:
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda X: X.mT.contiguous().mT,
        "strided": lambda X: X.repeat_interleave(2, dim=-1)[..., ::2],
        "channels-last": lambda X: X.contiguous(memory_format=torch.channels_last),
    }
    shape, arrange = (4, 3, 5, 2), layouts[layout]
    plain, model = (Tensors([shape], torch.float64) for _ in range(2))
    model.tensors[0] = nn.Parameter(arrange(plain.tensors[0].detach().clone()))
    assert not model.tensors[0].is_contiguous()
    config = {**FAST, "structures": mixture(0), "batch_size": BATCH}
    optimizers = [SIRFShampoo(m, **config) for m in (plain, model)]
    for _ in range(STEPS):
        draw_gradients(plain.parameters())
        model.tensors[0].grad = arrange(plain.tensors[0].grad)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_change([model.tensors[0].detach()], [plain.tensors[0].detach()])


@each_choice
def test_gradients_and_other_tensors_are_left_alone(structures: Any) -> None:
    model = Tensors(SHAPES, torch.float32)
    config = {**FAST, "kappa": 0.1, "structures": structures}
    optimizer = SIRFShampoo(model, batch_size=BATCH, **config)
    for _ in range(3):
        gradients = draw_gradients(model.parameters())
        identities = [id(p.grad) for p in model.parameters()]
        optimizer.step()
        for p, identity in zip(model.parameters(), identities, strict=True):
            assert id(p.grad) == identity
            assert torch.equal(p.grad, gradients[p])
            assert p.dtype == torch.float32
            assert p.requires_grad


# --- cost -----------------------------------------------------------------------------
@pytest.mark.parametrize("structures", [s for s in STRUCTURES if s != "dense"])
@pytest.mark.parametrize("T", [1, 3])
def test_a_step_on_a_long_vector_needs_no_dense_matrix(
    structures: str, T: int, largest_tensor: LargestTensor
) -> None:
    d = 6000
    model = Tensors([(d,)], torch.float32)
    with largest_tensor:
        optimizer = SIRFShampoo(
            model, batch_size=BATCH, T=T, structures=structures, **FAST
        )
        for _ in range(2):
            draw_gradients(model.parameters())
            optimizer.step()
    assert largest_tensor.numbers <= 100 * d


@pytest.mark.parametrize("structures", ["triltoeplitz", "triutoeplitz"])
def test_a_step_on_a_long_vector_with_toeplitz_factors_takes_no_second(
    structures: str,
) -> None:
    model = Tensors([(6000,)], torch.float32)
    optimizer = SIRFShampoo(model, batch_size=BATCH, structures=structures, **FAST)
    times = []
    for _ in range(7):
        draw_gradients(model.parameters())
        start = perf_counter()
        optimizer.step()
        times.append(perf_counter() - start)
    assert min(times) < 0.5, times
