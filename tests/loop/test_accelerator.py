"""Where the host runs ahead of the device: no wait, a learning rate on it, graphs.

The tests that need a GPU skip themselves. `far_away` has the CPU pass for one, and
refuses every operation that would make the host wait; `method/test_method.py` and
`test_spread.py` hold that path against the twin.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from sirfshampoo import SIRFShampoo
from tests.cases import FAST, SHAPES, STRUCTURES, Tensors, mixture
from tests.conftest import NoLooking
from tests.twin import Twin, assert_agree, find_units

BATCH = 4
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_choice = pytest.mark.parametrize(
    "structures", [*STRUCTURES, mixture(3)], ids=[*STRUCTURES, "mixture"]
)


def draw_gradients(model: nn.Module, seed: int) -> dict[nn.Parameter, Tensor]:
    """Write gradients to where they were; return copies."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        G = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        if p.grad is None:
            p.grad = G
        else:
            p.grad.copy_(G)
    return {p: p.grad.clone() for p in model.parameters()}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- the test's own tool --------------------------------------------------------------
LOOKS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "a mask as index": lambda x: x[x > 0],
    "writing by a mask": lambda x: x.__setitem__(x > 0, x.new_ones(())),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x.clone()),
    "a number sent": lambda x: x + torch.tensor(1.0),
    "a number as item": lambda x: x.__setitem__(slice(1, 2), 0.0),
    "alpha": lambda x: x.add(x, alpha=x.sum()),
    "moved": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_looking_is_refused(name: str, far_away: NoLooking) -> None:
    x = torch.randn(5)
    with far_away:
        x.mul_(2).masked_fill_(x > 0, 0.0)
    with far_away, pytest.raises(AssertionError, match="the host"):
        LOOKS[name](x)


# --- a learning rate that is a tensor -------------------------------------------------
@each_choice
@pytest.mark.parametrize("T", [1, 3])
def test_a_step_reads_the_rate_where_it_lies_and_follows_the_twin(
    structures: Any, T: int, far_away: NoLooking
) -> None:
    model = Tensors(SHAPES, torch.float64)
    config = {**FAST, "structures": structures, "T": T, "kappa": 0.1}
    lr = torch.tensor(FAST["lr"], dtype=torch.float64)
    optimizer = SIRFShampoo(model, batch_size=BATCH, **{**config, "lr": lr})
    # one rate for each of two layers that share a stack, too
    rates = [lambda step, i=i: 0.9**step / (1 + i) for i in range(len(SHAPES))]
    scheduler = LambdaLR(optimizer, rates)
    twin = Twin(find_units(model), **config)
    order = {id(g["params"][0]): i for i, g in enumerate(optimizer.param_groups)}
    for step in range(8):
        for unit in twin.units:
            rate = rates[order[id(unit.params[0])]]
            unit.settings["lr"] = FAST["lr"] * rate(step)
        gradients = draw_gradients(model, step)
        with far_away:
            optimizer.step()
        twin.step(gradients, BATCH)
        scheduler.step()
    assert_agree(twin, optimizer, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha1", [0.0, 0.9])
def test_it_is_the_same_as_a_number(dtype: torch.dtype, alpha1: float) -> None:
    paths = []
    for lr in (0.05, torch.tensor(0.05), torch.tensor([0.05])):
        torch.manual_seed(0)
        model = Tensors(SHAPES, dtype)
        optimizer = SIRFShampoo(model, lr=lr, alpha1=alpha1, batch_size=BATCH)
        for step in range(4):
            draw_gradients(model, step)
            optimizer.step()
        paths.append(flat(model).float())
    assert torch.equal(paths[1], paths[2])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(paths[0], paths[1], rtol=4 * eps, atol=4 * eps)


def test_each_group_has_a_rate_of_its_own() -> None:
    model, lr = nn.Linear(3, 2), torch.tensor(0.1)
    optimizer = SIRFShampoo(model, batch_size=BATCH, lr=lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, Tensor) for rate in rates)
    assert len({rate.data_ptr() for rate in [*rates, lr]}) == 3
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        plateau.step(loss)  # a shared one would be halved once a group
    # some versions of torch put a number in the place of the tensor
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([0.05, 0.05])
    assert lr.item() == pytest.approx(0.1)


SCHEDULERS: dict[str, Any] = {
    "ExponentialLR": lambda o: ExponentialLR(o, 0.5),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.3, total_steps=20),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_write_into_it(name: str) -> None:
    paths, told = [], []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        torch.manual_seed(0)
        model = Tensors([(5, 7), (5, 7), (3,)], torch.float64)
        optimizer = SIRFShampoo(model, batch_size=BATCH, lr=lr)
        rates = [group["lr"] for group in optimizer.param_groups]
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(6):
            draw_gradients(model, step)
            optimizer.step()
            scheduler.step()
        paths.append(flat(model))
        told.append([float(group["lr"]) for group in optimizer.param_groups])
    assert all(g["lr"] is r for g, r in zip(optimizer.param_groups, rates, strict=True))
    assert told[0] == pytest.approx(told[1])
    torch.testing.assert_close(*paths)


def test_a_state_dict_holds_a_number_and_loading_writes_into_the_tensor() -> None:
    model = Tensors([(5, 7), (3,)], torch.float32)
    optimizer = SIRFShampoo(model, batch_size=BATCH, lr=torch.tensor(0.25))
    optimizer.param_groups[1]["lr"].fill_(0.5)
    saved = deepcopy(optimizer.state_dict())
    assert [group["lr"] for group in saved["param_groups"]] == [0.25, 0.5]
    assert all(type(group["lr"]) is float for group in saved["param_groups"])
    other = SIRFShampoo(model, batch_size=BATCH, lr=torch.tensor(1.0))
    rates = [group["lr"] for group in other.param_groups]
    other.load_state_dict(saved)
    assert all(g["lr"] is r for g, r in zip(other.param_groups, rates, strict=True))
    assert [rate.item() for rate in rates] == [0.25, 0.5]
    plain = SIRFShampoo(model, batch_size=BATCH)
    plain.load_state_dict(saved)
    assert [group["lr"] for group in plain.param_groups] == [0.25, 0.5]
    copy = deepcopy(other)
    assert all(isinstance(group["lr"], Tensor) for group in copy.param_groups)
    assert other.diagnostics()["tensors.0/momentum_norm"] == 0.0


@pytest.mark.parametrize("name", ["beta2", "alpha1", "alpha2", "lam", "kappa"])
def test_other_tensors_become_numbers(name: str) -> None:
    optimizer = SIRFShampoo(nn.Linear(3, 2), **{name: torch.tensor(0.25)})
    assert all(type(group[name]) is float for group in optimizer.param_groups)
    assert all(group[name] == 0.25 for group in optimizer.param_groups)


@pytest.mark.parametrize("lr", [torch.tensor(-1.0), torch.tensor([0.1, 0.2])])
def test_a_bad_rate_is_refused(lr: Tensor) -> None:
    with pytest.raises(ValueError, match="'lr' must be a finite number >= 0"):
        SIRFShampoo(nn.Linear(3, 2), lr=lr)


# --- steps that pass the optimizer by -------------------------------------------------
def test_setting_global_step_sets_the_counters() -> None:
    model = Tensors([(5, 7), (5, 7), (3,)], torch.float32)
    optimizer = SIRFShampoo(model, batch_size=BATCH, T=3)
    optimizer.global_step += 5
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {5}
    draw_gradients(model, 0)
    optimizer.step()  # 5 % 3 != 0
    assert all(
        torch.equal(K[0].to_dense(), torch.eye(K[0].dim))
        for K in optimizer.preconditioner
    )
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {6}
    other = SIRFShampoo(model, batch_size=BATCH, T=3)
    other.load_state_dict(optimizer.state_dict())
    assert other.global_step == 6


# --- on a GPU -------------------------------------------------------------------------
@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@each_choice
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_does_not_wait_for_the_gpu(
    structures: Any, T: int, dtype: torch.dtype
) -> None:
    model = Tensors(SHAPES, dtype).to("cuda")
    lr = torch.tensor(0.01, device="cuda")
    optimizer = SIRFShampoo(
        model, batch_size=BATCH, structures=structures, T=T, kappa=0.1, lr=lr
    )
    draw_gradients(model, 0)
    optimizer.step()  # libraries set themselves up
    start = flat(model)
    for step in range(1, 4):
        draw_gradients(model, step)
        if step == 2:
            model.tensors[7].grad = None  # one of three in a stack
        with waiting_is_an_error():
            optimizer.step()
    assert not torch.equal(flat(model), start)


@needs_gpu
@each_choice
@pytest.mark.parametrize("spread_updates", [False, True])
def test_captured_steps_equal_plain_ones(structures: Any, spread_updates: bool) -> None:
    T, paths = 3, []
    config = {"structures": structures, "T": T, "spread_updates": spread_updates}
    for captures in (False, True):
        torch.manual_seed(0)
        model = Tensors(SHAPES, torch.float32).to("cuda")
        lr = torch.tensor(0.05, device="cuda")
        optimizer = SIRFShampoo(
            model, batch_size=BATCH, beta2=0.2, lam=0.01, lr=lr, **config
        )
        scheduler = ExponentialLR(optimizer, 0.9)
        step = Captured(optimizer, T) if captures else optimizer.step
        draw_gradients(model, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up
            for i in range(2 * T):
                draw_gradients(model, i)
                optimizer.step()
                scheduler.step()
        torch.cuda.current_stream().wait_stream(side)
        for i in range(4 * T):
            draw_gradients(model, i)
            step()
            scheduler.step()
        paths.append(flat(model).cpu())
        assert optimizer.global_step == 6 * T
        assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {6 * T}
    torch.testing.assert_close(*paths, rtol=1e-5, atol=1e-6)


class Captured:
    """Replays the steps of an optimizer, one CUDA graph for each of a period."""

    def __init__(self, optimizer: SIRFShampoo, T: int) -> None:
        """Capture nothing at first."""
        self.optimizer, self.T = optimizer, T
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self) -> None:
        """Take a step."""
        phase = self.optimizer.global_step % self.T
        if phase not in self.graphs:
            self.graphs[phase] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[phase]):  # notes, but runs nothing
                self.optimizer.step()
            self.optimizer.global_step -= 1
        self.graphs[phase].replay()
        self.optimizer.global_step += 1


@pytest.mark.parametrize("options", [{}, {"alpha2": 0.0}, {"structures": "diagonal"}])
def test_the_default_device_is_not_where_a_step_computes(options: Any) -> None:
    """A user's default device is for the user's tensors, not for ours."""
    found = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.device(default):  # which no version of torch fails to take back
            optimizer = SIRFShampoo(model, batch_size=2, **options)
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                optimizer.step()
        devices = {t.device.type for s in optimizer.state.values() for t in s.values()}
        assert devices == {"cpu"}
        assert {int(s["step"]) for s in optimizer.state.values()} == {3}
        found.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*found)
