"""What happens around a step: gradients missing, late or wrong; other modes."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sirfshampoo import LinearWeightBias, PerParameter, SIRFShampoo
from sirfshampoo._engine.step import precondition_rows
from tests.cases import FAST, STRUCTURES


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 2))


def draw_gradients(net: nn.Module) -> None:
    for p in net.parameters():
        p.grad = torch.randn_like(p)


def numbers(optimizer: SIRFShampoo, p: Tensor, *without: str) -> list[Tensor]:
    state = optimizer.state[p]
    kept = [state[key] for key in sorted(state) if key not in ("step", *without)]
    return [t.clone() for t in (p.detach(), *kept)]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_a_closure_is_refused_before_anything_happens() -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=3)
    draw_gradients(net)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(NotImplementedError, match="closure"):
        optimizer.step(lambda: 1.0)
    assert all_equal([p.detach() for p in net.parameters()], before)
    assert optimizer.global_step == 0


@pytest.mark.parametrize("T", [1, 2])
def test_parameters_without_gradient_rest_and_join_late(T: int) -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=3, T=T, **FAST)
    late = net[2].weight
    for _ in range(3):
        draw_gradients(net)
        late.grad = None
        before = numbers(optimizer, late)
        optimizer.step()
        assert all_equal(numbers(optimizer, late), before)
    assert optimizer.state[late]["step"] == optimizer.global_step == 3
    draw_gradients(net)
    optimizer.step()
    assert not torch.equal(late, before[0])
    for p in net.parameters():  # frozen later
        p.requires_grad_(False).grad = None
    before = [n for p in net.parameters() for n in numbers(optimizer, p)]
    with pytest.warns(UserWarning, match="No parameter of the optimizer has a grad"):
        optimizer.step()
    assert all_equal(
        [n for p in net.parameters() for n in numbers(optimizer, p)], before
    )


def test_a_step_without_any_gradient_needs_no_batch_size() -> None:
    optimizer = SIRFShampoo(model())
    with pytest.warns(UserWarning, match="No parameter of the optimizer has a grad"):
        optimizer.step()
    optimizer.step()  # says so once
    assert optimizer.global_step == 2


def test_parameters_that_others_replace_in_the_groups_are_trained() -> None:
    net, twin = model(), model()
    twin.load_state_dict(net.state_dict())
    trained = [SIRFShampoo(n, batch_size=3, **FAST) for n in (net, twin)]
    for step in range(6):
        if step == 3:  # as accelerate does
            others = {p: nn.Parameter(p.detach().clone()) for p in net.parameters()}
            for group in trained[0].param_groups:
                group["params"] = [others[p] for p in group["params"]]
        params = [p for g in trained[0].param_groups for p in g["params"]]
        draw_gradients(twin)
        pairs = list(zip(params, twin.parameters(), strict=True))
        for p, q in pairs:
            p.grad = q.grad.clone()
        for optimizer in trained:
            optimizer.step()
        assert all_equal([p for p, _ in pairs], [q for _, q in pairs])
    assert set(trained[0].state) == set(params)
    trained[0].param_groups[0]["params"] = [nn.Parameter(torch.zeros(2, 9))]
    with pytest.raises(ValueError, match=r"group 0 must keep the shapes .* got"):
        trained[0].step()


def test_sparse_gradient_is_an_error_that_says_so() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = SIRFShampoo(net)
    net(torch.tensor([1, 2])).sum().backward()
    before = [n for p in net.parameters() for n in numbers(optimizer, p)]
    with pytest.raises(RuntimeError, match=r"sparse gradients.*sparse=False"):
        optimizer.step()
    assert all_equal(
        [n for p in net.parameters() for n in numbers(optimizer, p)], before
    )
    assert optimizer.global_step == 0


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("options", [{}, {"alpha1": 0.0, "alpha2": 0.0, "kappa": 0.1}])
def test_non_finite_gradient_makes_its_unit_rest(
    structure: str, poison: float, T: int, options: dict[str, Any]
) -> None:
    net = model()
    settings = {**FAST, **options}
    optimizer = SIRFShampoo(net, batch_size=3, structures=structure, T=T, **settings)
    sick, healthy = net[2].weight, net[0].weight
    for step in range(5):
        draw_gradients(net)
        poisoned = step in (2, 3)  # with T = 2: an update is due, and not
        if poisoned:
            sick.grad[1, 2] = poison
        before = numbers(optimizer, sick, "skipped"), numbers(optimizer, healthy)
        optimizer.step()
        assert all_equal(numbers(optimizer, sick, "skipped"), before[0]) == poisoned
        assert not torch.equal(healthy, before[1][0])
        assert all(t.isfinite().all() for t in numbers(optimizer, sick))
    assert optimizer.state[sick]["skipped"] == 2
    assert optimizer.state[healthy]["skipped"] == 0


def test_add_param_group_later_trains_with_its_own_options() -> None:
    net = model()
    optimizer = SIRFShampoo(net, params=list(net[0].parameters()), batch_size=3)
    draw_gradients(net)
    optimizer.step()
    kept = numbers(optimizer, net[0].weight)
    optimizer.add_param_group(
        {
            "params": net[2].parameters(),
            "lr": 0.5,
            "structures": "diagonal",
            "combine_params": (LinearWeightBias(), PerParameter()),
        }
    )
    assert all_equal(numbers(optimizer, net[0].weight), kept)
    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.001, 0.5]
    assert [K.dim for K in optimizer.preconditioner[2]] == [5, 6]
    assert optimizer.state[net[2].weight]["step"] == 1
    before = [p.detach().clone() for p in net[2].parameters()]
    optimizer.step()
    after = [p.detach() for p in net[2].parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [net[0].weight]})
    with pytest.raises(ValueError, match="'params'"):
        optimizer.add_param_group({"lr": 0.1})
    assert len(optimizer.param_groups) == 3


def test_momentum_switched_on_later_is_allocated_and_used() -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=3, alpha1=0.0, alpha2=0.0, beta2=0.2)
    draw_gradients(net)
    optimizer.step()
    factor = optimizer.preconditioner[0][0].to_dense()
    for group in optimizer.param_groups:
        group["alpha1"], group["alpha2"] = 0.9, 0.5
    optimizer.step()
    assert not torch.equal(optimizer.preconditioner[0][0].to_dense(), factor)
    assert optimizer.state[net[0].weight]["momentum_buffer"].abs().sum() > 0
    assert optimizer.preconditioner_momenta[0][0].norm() > 0


class Countdown:
    """A callable T with a state of its own."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, step: int) -> bool:
        self.calls.append(step)
        return len(self.calls) % 2 == 1


def test_each_group_has_its_own_copy_of_a_callable_interval() -> None:
    net, T = model(), Countdown()
    optimizer = SIRFShampoo(net, batch_size=3, T=T, **FAST)
    other = model()
    other.load_state_dict(net.state_dict())
    by_number = SIRFShampoo(other, batch_size=3, T=2, **FAST)
    for _ in range(5):
        draw_gradients(net)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        by_number.step()
    assert T.calls == []
    for group in optimizer.param_groups:
        assert group["T"] is not T
        assert group["T"].calls == [0, 1, 2, 3, 4]
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_copy_steps_its_own_parameters() -> None:
    net = model()
    optimizer = SIRFShampoo(net, **FAST)
    LambdaLR(optimizer, lambda step: 1.0)  # patches `step` on the instance
    x = torch.randn(3, 4)

    def train(net: nn.Module, optimizer: SIRFShampoo) -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    train(net, optimizer)
    net_copy, optimizer_copy = deepcopy((net, optimizer))
    kept = [p.detach().clone() for p in net.parameters()]
    losses = [train(net_copy, optimizer_copy) for _ in range(3)]
    assert all_equal([p.detach() for p in net.parameters()], kept)
    assert optimizer.global_step == 1
    assert [train(net, optimizer) for _ in range(3)] == losses


@contextmanager
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_low_precision_modes_around_a_step_do_not_reach_the_factors() -> None:
    results = []
    for mode in (torch.no_grad, low_precision):
        torch.manual_seed(1)
        net = nn.Linear(64, 64)
        optimizer = SIRFShampoo(net, batch_size=3, beta2=0.5)
        for _ in range(3):
            draw_gradients(net)
            with mode():
                optimizer.step()
        results.append(numbers(optimizer, net.weight))
    assert all_equal(*results)


def test_zero_size_parameters_are_carried_along() -> None:
    net = nn.Module()
    net.empty = nn.Parameter(torch.zeros(0, 3))
    net.full = nn.Parameter(torch.ones(2, 3))
    optimizer = SIRFShampoo(net, batch_size=3)
    draw_gradients(net)
    optimizer.step()
    assert net.full.ne(1).all()
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))


def test_learning_rate_set_by_hand_or_zero_counts_at_once() -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=3, **{**FAST, "lr": 0.0})
    draw_gradients(net)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all_equal([p.detach() for p in net.parameters()], before)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.1)
    optimizer.step()
    assert not torch.equal(net[0].weight, before[0])


def test_constructing_for_2400_parameters_costs_little_more_than_their_model() -> None:
    building, constructing = [], []
    for _ in range(5):
        start = perf_counter()
        net = nn.ModuleList(nn.Linear(8, 8) for _ in range(1200))
        built = perf_counter()
        optimizer = SIRFShampoo(net)
        constructing.append(perf_counter() - built)
        building.append(built - start)
        del optimizer
    # about twice as long; in seconds, a machine that others use has no limit
    assert min(constructing) < 4 * min(building), (constructing, building)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_sums_of_half_precision_updates_do_not_look_infinite(
    dtype: torch.dtype,
) -> None:
    net = nn.Linear(64, 64, dtype=dtype)
    optimizer = SIRFShampoo(net, batch_size=3, T=2, beta2=0.0, lr=1e-6)
    net.weight.grad = torch.full_like(net.weight, 100.0)  # they sum up to 409,600
    net.bias.grad = torch.zeros_like(net.bias)
    optimizer.step()
    assert optimizer.state[net.weight]["skipped"] == 0
    assert optimizer.state[net.weight]["momentum_buffer"].eq(100.0).all()


@pytest.mark.parametrize("size", [1e6, 1e20, 1e-9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lam", [1e-3, 0.0])
def test_gradients_of_any_size_leave_all_finite(
    size: float, dtype: torch.dtype, lam: float
) -> None:
    nets = {name: nn.Linear(33, 20) for name in STRUCTURES}
    optimizers = [
        SIRFShampoo(
            net,
            batch_size=8,
            beta2=0.2,
            lam=lam,
            structures=name,
            preconditioner_dtypes=dtype,
        )
        for name, net in nets.items()
    ]
    steps = 200 if size == 0.0 else 30
    for (name, net), optimizer in zip(nets.items(), optimizers, strict=True):
        before = net.weight.detach().clone()
        for _ in range(steps):
            for p in net.parameters():
                p.grad = torch.randn_like(p) * size
            optimizer.step()
        for p in net.parameters():
            assert all(t.isfinite().all() for t in numbers(optimizer, p))
            # beyond the square root of float32's range, a step is sat out and counted
            float16 = dtype == torch.float16 and name != "diagonal"
            overflows = size == 1e20 and not float16
            assert optimizer.state[p]["skipped"] == (steps if overflows else 0)
        if size >= 1e6:
            assert torch.equal(net.weight, before) == overflows
        for p in net.parameters():  # ordinary gradients again
            p.grad = torch.randn_like(p)
        before = net.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(net.weight, before)


def test_half_precision_factors_stay_when_their_learning_rate_is_zero() -> None:
    net = nn.Linear(64, 64)
    for name in STRUCTURES:
        optimizer = SIRFShampoo(
            net,
            batch_size=3,
            beta2=0.0,
            structures=name,
            preconditioner_dtypes=torch.bfloat16,
        )
        draw_gradients(net)
        optimizer.step()
        for K in optimizer.preconditioner[0]:
            assert K.to_dense().float().equal(torch.eye(64))


@pytest.mark.parametrize("momentum_first", [False, True])
def test_what_is_left_of_a_joint_unit_trains_when_half_is_frozen(
    momentum_first: bool,
) -> None:
    net = model()
    optimizer = SIRFShampoo(
        net,
        batch_size=3,
        kappa=0.1,
        momentum_first=momentum_first,
        combine_params=(LinearWeightBias(), PerParameter()),
    )
    draw_gradients(net)
    optimizer.step()
    net[2].bias.requires_grad_(False).grad = None
    weight, bias = net[2].weight.detach().clone(), net[2].bias.detach().clone()
    of_bias, key = optimizer.state[net[2].bias], optimizer._engine.momentum
    momentum = of_bias[key].clone()
    optimizer.step()
    assert torch.equal(net[2].bias, bias)
    assert torch.equal(of_bias[key], momentum)
    assert (net[2].weight != weight).all()
    assert optimizer.diagnostics()["2.weight+2.bias/update_norm"] > 0
    net[2].weight.grad = None  # now nothing is left
    weight.copy_(net[2].weight.detach())
    optimizer.step()
    assert torch.equal(net[2].weight, weight)


def test_debugging_names_parameters_whose_gradients_are_not_finite() -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=3)
    draw_gradients(net)
    net[2].bias.grad[0] = float("inf")
    optimizer.step()
    optimizer.debug = True
    with pytest.warns(UserWarning, match=r"gradients of \['2.bias'\] are not finite"):
        optimizer.step()
    assert optimizer.state[net[2].bias]["skipped"] == 2


@pytest.mark.parametrize("alpha1", [0.0, 0.9])
def test_diagnostics_tell_what_a_step_did(alpha1: float) -> None:
    net = model()
    optimizer = SIRFShampoo(
        net,
        batch_size=3,
        alpha1=alpha1,
        lr=0.1,
        beta2=0.2,
        combine_params=(LinearWeightBias(), PerParameter()),
    )
    for _ in range(3):
        draw_gradients(net)
        before = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
        optimizer.step()
    moved = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach() - before
    told = optimizer.diagnostics()
    assert set(map(type, told.values())) == {float}
    assert list(told)[:5] == [
        f"0.weight+0.bias/{key}"
        for key in ("update_norm", "update_rms", "momentum_norm", "K0_norm", "K1_norm")
    ]
    rms = moved.square().mean().sqrt().item()
    assert told["0.weight+0.bias/update_rms"] == pytest.approx(rms, rel=1e-5)
    norm = moved.norm().item()
    assert told["0.weight+0.bias/update_norm"] == pytest.approx(norm, rel=1e-5)
    momentum = (moved.norm() / 0.1).item() if alpha1 else 0.0
    assert told["0.weight+0.bias/momentum_norm"] == pytest.approx(momentum, rel=1e-5)
    factor = optimizer.preconditioner[0][1].to_dense().norm().item()
    assert told["0.weight+0.bias/K1_norm"] == pytest.approx(factor, rel=1e-5)
    assert told["3.weight+3.bias/skipped"] == 0.0
    optimizer.zero_grad()
    rms = optimizer.diagnostics()["0.weight+0.bias/update_rms"]
    assert (rms != rms) == (alpha1 == 0.0)  # NaN: nothing tells of the last update


@pytest.mark.parametrize("structures", ["diagonal", "dense"])
def test_the_state_follows_a_model_whose_type_changes(structures: str) -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=3, structures=structures, **FAST)
    draw_gradients(net)
    optimizer.step()
    kept = optimizer.state[net[0].weight]["momentum_buffer"].clone()
    net.double()
    draw_gradients(net)
    optimizer.state_dict()
    buffer = optimizer.state[net[0].weight]["momentum_buffer"]
    assert buffer.dtype == torch.float64
    assert torch.equal(buffer, kept.double())
    optimizer.step()
    assert optimizer.state[net[0].weight]["step"] == 2


@pytest.mark.parametrize("structures", ["dense", "block30diagonal", "diagonal"])
def test_factors_that_are_written_in_place_count_at_once(structures: str) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(4, 5))
    optimizer = SIRFShampoo(
        net, batch_size=3, T=10, alpha1=0.0, lr=0.1, structures=structures
    )
    for _ in range(3):
        draw_gradients(net)
        optimizer.step()
    for matrix in optimizer.preconditioner[2]:  # as a distributed checkpoint does
        for tensor in matrix.tensors():
            tensor.mul_(2.0)
    factors = [K.to_dense() for K in optimizer.preconditioner[2]]
    # its neighbour in the stack is updated in this step, it is not
    optimizer.param_groups[0]["T"] = 3
    draw_gradients(net)
    before, G = net[1].weight.detach().clone(), net[1].weight.grad.clone()
    optimizer.step()
    A, B = (K @ K.mT for K in factors)
    torch.testing.assert_close(net[1].weight, before - 0.1 * A @ G @ B)


def test_a_step_that_is_interrupted_leaves_a_state_that_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=3)
    draw_gradients(net)
    optimizer.step()
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return precondition_rows(*arguments)

    monkeypatch.setattr("sirfshampoo._engine.step.precondition_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert optimizer.global_step == 2
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_a_sick_row_does_not_cost_its_neighbours_precision() -> None:
    momenta = []
    for poison in (0.0, float("nan")):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 5), nn.Linear(4, 5)).double()
        optimizer = SIRFShampoo(net, batch_size=3, alpha2=0.9, structures="diagonal")
        draw_gradients(net)
        net[1].weight.grad[0, 0] += poison
        optimizer.step()
        momenta.append(optimizer.preconditioner_momenta[0][0].to_dense())
    assert torch.equal(*momenta)


def test_a_copy_takes_further_groups() -> None:
    net, optimizer = deepcopy((net := model(), SIRFShampoo(net, batch_size=3)))
    for _ in range(2):
        net.append(nn.Linear(2, 2))
        optimizer.add_param_group({"params": net[-1].parameters()})
    assert len(optimizer.param_groups) == 10


def test_diagnostics_of_float64_and_of_names_that_coincide() -> None:
    a, b = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(3).double())
    groups = [{"params": [("w", a)]}, {"params": [("w", b)]}]
    optimizer = SIRFShampoo(groups, batch_size=3)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    told = optimizer.diagnostics()
    assert told["w#0/update_rms"] == told["w#1/update_rms"] > 0


def test_what_others_put_into_the_state_stays_and_costs_no_rebuilding() -> None:
    net = model()
    optimizer = SIRFShampoo(net, batch_size=3)
    draw_gradients(net)
    optimizer.step()
    stacks = optimizer._stacks()
    for step in range(3):
        mine = torch.full((1,), float(step))
        optimizer.state[net[0].weight]["mine"] = mine
        draw_gradients(net)
        optimizer.step()
        assert optimizer._stacks() is stacks
        assert optimizer.state[net[0].weight]["mine"] is mine
