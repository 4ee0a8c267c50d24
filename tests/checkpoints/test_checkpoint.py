"""A run that is interrupted goes on as if it never had been."""

import io
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint

from sirfshampoo import FlattenEmbedding, LinearWeightBias, PerParameter, SIRFShampoo
from sirfshampoo.structures import structure_class
from tests.cases import CONFIGS, FAST, MODELS, STRUCTURES, build, mixture

RULES = (LinearWeightBias(), FlattenEmbedding(), PerParameter())


class Run:
    """A training run of a model of the list with a scheduler."""

    def __init__(
        self, config: dict[str, Any], model: str = "tied-weights", dtype: Any = None
    ) -> None:
        torch.manual_seed(3)
        self.model, self.x, self.y = build(model, batch=4, dtype=dtype or torch.float32)
        self.optimizer = SIRFShampoo(self.model, **config)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=9)

    def steps(self, number: int) -> list[float]:
        """Train; return the loss of each step."""
        losses = []
        for _ in range(number):
            self.optimizer.zero_grad()
            loss = (self.model(self.x) - self.y).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self) -> bytes:
        """Return a checkpoint."""
        parts = (self.model, self.optimizer, self.scheduler)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        """Go back to a checkpoint."""
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        parts = (self.model, self.optimizer, self.scheduler)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)

    def numbers(self) -> list[Tensor]:
        """Return all parameters and state tensors."""
        entries = [self.optimizer.state[p] for p in self.model.parameters()]
        state = [entry[key] for entry in entries for key in sorted(entry)]
        return [*(p.detach() for p in self.model.parameters()), *state]


def assert_same(a: Run, b: Run) -> None:
    """Assert that two runs are in the same state, to the bit and the type."""
    for s, t in zip(a.numbers(), b.numbers(), strict=True):
        assert s.dtype == t.dtype
        assert torch.equal(s, t)
    for g, h in zip(a.optimizer.param_groups, b.optimizer.param_groups, strict=True):
        assert g.keys() == h.keys()
        code = ("params", "combine_params", "T")
        assert all(g[key] == h[key] for key in g if key not in code)


def assert_resumes(make: Callable[[], Run], before: int, after: int) -> None:
    """Assert that interrupted equals uninterrupted."""
    whole, first, second = make(), make(), make()
    losses = whole.steps(before + after)
    assert first.steps(before) == losses[:before]
    second.load(first.save())
    assert second.optimizer.global_step == before
    assert second.steps(after) == losses[before:]
    assert_same(whole, second)
    assert len(set(losses)) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_resumed_equals_uninterrupted(name: str) -> None:
    assert_resumes(lambda: Run(CONFIGS[name]), before=4, after=4)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_resumes(model: str) -> None:
    config = {**FAST, "structures": mixture(1), "T": 2, "combine_params": RULES}
    if "embedding" in model or "tied" in model:
        config["structures"] = "diagonal"
    assert_resumes(lambda: Run(config, model), before=3, after=3)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_mixed_types_resume(
    structure: str, factors: torch.dtype, weights: torch.dtype
) -> None:
    config = {
        "lr": 0.01,
        "beta2": 0.2,
        "structures": structure,
        "preconditioner_dtypes": factors,
    }
    make = lambda: Run(config, "mlp-axes-61-and-33", weights)  # noqa: E731
    assert_resumes(make, before=3, after=3)
    state = make().optimizer.state
    types = {t.dtype for entry in state.values() for k, t in entry.items() if "." in k}
    assert types == {factors}


@pytest.mark.parametrize("T", [1, 3, lambda step: step in (0, 1, 3, 4)])
@pytest.mark.parametrize("before", [0, 1, 2, 3, 4])
def test_resumes_between_updates_of_the_factors(T: Any, before: int) -> None:
    config = {**FAST, "T": T, "combine_params": RULES}
    assert_resumes(lambda: Run(config, "mlp-equal-layers"), before=before, after=4)


def test_going_back_in_the_same_process_repeats_the_steps() -> None:
    run = Run({**FAST, "T": 3})
    run.steps(2)
    checkpoint = run.save()
    losses = run.steps(5)
    run.load(checkpoint)
    assert run.steps(5) == losses


def test_what_is_loaded_is_neither_changed_nor_shared() -> None:
    run, other = Run(FAST), Run(FAST)
    run.steps(3)
    given = run.optimizer.state_dict()
    copy = deepcopy(given)
    other.optimizer.load_state_dict(given)

    def addresses(state: dict[Any, dict[str, Tensor]]) -> set[int]:
        entries = [t for entry in state.values() for t in entry.values()]
        return {t.untyped_storage().data_ptr() for t in entries}

    assert not addresses(given["state"]) & addresses(other.optimizer.state)
    other.steps(2)
    assert given.keys() == copy.keys()
    assert given["param_groups"] == copy["param_groups"]
    for key, entry in copy["state"].items():
        assert given["state"][key].keys() == entry.keys()
        assert all(torch.equal(given["state"][key][k], entry[k]) for k in entry)


def test_state_dict_holds_tensors_and_plain_values_only() -> None:
    run = Run({**FAST, "T": lambda step: True})
    run.steps(1)
    state_dict = run.optimizer.state_dict()
    assert set(state_dict) == {
        "state",
        "param_groups",
        *SIRFShampoo.STATE_ATTRIBUTES,
    }
    for name in SIRFShampoo.STATE_ATTRIBUTES:
        assert state_dict[name] == getattr(run.optimizer, name)
    for entry in state_dict["state"].values():
        assert all(isinstance(value, Tensor) for value in entry.values())
    for group in state_dict["param_groups"]:
        assert group["combine_params"] is None
        assert group["T"] is None


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_needs_no_code_but_that_of_torch(name: str, tmp_path: Path) -> None:
    run, path = Run(CONFIGS[name]), tmp_path / "optimizer.pt"
    run.steps(1)
    torch.save(run.optimizer.state_dict(), path)
    # nothing that `weights_only=True` refuses, and nothing that we had to allow
    assert get_unsafe_globals_in_checkpoint(path) == []
    assert "sirfshampoo" not in repr(get_safe_globals())
    state_dict = torch.load(path, weights_only=True)
    assert state_dict.keys() == run.optimizer.state_dict().keys()


def test_every_parameter_has_its_state_from_the_start() -> None:
    run = Run({**FAST, "combine_params": RULES})
    keys = {p: set(entry) for p, entry in run.optimizer.state.items()}
    run.steps(2)
    assert keys == {p: set(entry) for p, entry in run.optimizer.state.items()}
    for group in run.optimizer.param_groups:
        first, *others = group["params"]
        factors = {
            f"{kind}{n}.mat" for kind in "Km" for n in range(len(group["structures"]))
        }
        assert keys[first] == {"step", "skipped", "momentum_buffer"} | factors
        assert all(keys[p] == {"momentum_buffer"} for p in others)


def test_no_momenta_are_allocated_that_are_not_used() -> None:
    run = Run({**FAST, "alpha1": 0.0, "alpha2": 0.0})
    run.steps(2)
    keys = {key for entry in run.optimizer.state.values() for key in entry}
    assert keys == {"step", "skipped", "K0.mat", "K1.mat"}
    assert run.optimizer.preconditioner_momenta[0] == [None, None]


def test_state_and_groups_alone_suffice() -> None:
    # this is what torch.distributed.checkpoint keeps
    whole, first, second = (Run({**FAST, "T": 3}) for _ in range(3))
    losses = whole.steps(6)
    first.steps(4)
    full = first.optimizer.state_dict()
    second.load(first.save())
    second.optimizer.global_step = 0
    second.optimizer.load_state_dict({k: full[k] for k in ("state", "param_groups")})
    assert second.optimizer.global_step == 4
    assert second.steps(2) == losses[4:]


def test_tensors_put_into_the_state_by_hand_are_taken_over() -> None:
    run, other = (Run(FAST, "mlp-equal-layers") for _ in range(2))
    run.steps(3)
    other.model.load_state_dict(run.model.state_dict())
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    for group, like in zip(
        other.optimizer.param_groups, run.optimizer.param_groups, strict=True
    ):
        group["lr"] = like["lr"]
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        entries = run.optimizer.state[p]
        other.optimizer.state[q] = {key: t.clone() for key, t in entries.items()}
    assert run.steps(3) == other.steps(3)
    assert_same(run, other)


# --------------------------------------------------------------------- what is refused


def drop_group(state_dict: Any) -> None:
    del state_dict["param_groups"][-1]


def add_parameter(state_dict: Any) -> None:
    state_dict["param_groups"][0]["params"].append(99)


def drop_tensor(state_dict: Any) -> None:
    del state_dict["state"][1]["K0.mat"]


def unknown_tensor(state_dict: Any) -> None:
    state_dict["state"][0]["K7.mat"] = torch.zeros(3)


def other_shape(state_dict: Any) -> None:
    state_dict["state"][0]["K0.mat"] = torch.zeros(2, 2)


def other_momentum(state_dict: Any) -> None:
    state_dict["state"][0]["momentum_buffer"] = torch.zeros(2, 2)


def no_tensor(state_dict: Any) -> None:
    state_dict["state"][0]["K0.mat"] = [1.0]


def other_structure(state_dict: Any) -> None:
    state_dict["param_groups"][0]["structures"] = ("diagonal", "dense")


def bad_option(state_dict: Any) -> None:
    state_dict["param_groups"][0]["beta2"] = float("nan")


def missing_option(state_dict: Any) -> None:
    del state_dict["param_groups"][0]["lam"]


def two_steps(state_dict: Any) -> None:
    state_dict["global_step"] = 77


def no_groups(state_dict: Any) -> None:
    del state_dict["param_groups"]


@pytest.mark.parametrize(
    "spoil",
    [
        drop_group,
        add_parameter,
        drop_tensor,
        unknown_tensor,
        other_shape,
        other_momentum,
        no_tensor,
        other_structure,
        bad_option,
        missing_option,
        two_steps,
        no_groups,
    ],
)
def test_misfit_is_refused_and_changes_nothing(spoil: Callable[[Any], None]) -> None:
    run, other = Run(FAST), Run(FAST)
    run.steps(2)
    other.steps(1)
    state_dict = deepcopy(run.optimizer.state_dict())
    spoil(state_dict)
    before, groups = deepcopy(other.numbers()), str(other.optimizer.param_groups)
    with pytest.raises(ValueError, match="must"):
        other.optimizer.load_state_dict(state_dict)
    assert all(torch.equal(a, b) for a, b in zip(other.numbers(), before, strict=True))
    assert str(other.optimizer.param_groups) == groups
    assert other.optimizer.global_step == 1


def test_state_dict_of_another_optimizer_is_refused() -> None:
    run = Run(FAST)
    adamw = torch.optim.AdamW([{"params": [p]} for p in run.model.parameters()])
    with pytest.raises(ValueError, match="not of this optimizer"):
        run.optimizer.load_state_dict(adamw.state_dict())


def test_toeplitz_triangles_are_not_taken_for_each_other() -> None:
    lower, upper = (Run({"structures": f"tri{x}toeplitz"}) for x in "lu")
    with pytest.raises(ValueError, match="structures"):
        upper.optimizer.load_state_dict(lower.optimizer.state_dict())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("block64diagonal", "block65diagonal"),
        ("block30diagonal", "block64diagonal"),
        ("hierarchical8_4", "hierarchical4_8"),
    ],
)
def test_sizes_are_not_taken_for_each_other_where_shapes_agree(
    one: str, other: str
) -> None:
    first, second = Run({"structures": one}), Run({"structures": other})
    first.steps(1)
    state_dict = first.optimizer.state_dict()
    with pytest.raises(ValueError, match=rf"structures \('{other}'"):
        second.optimizer.load_state_dict(state_dict)
    again = Run({"structures": one})
    again.optimizer.load_state_dict(state_dict)
    kinds = {type(K) for factors in again.optimizer.preconditioner for K in factors}
    assert kinds == {structure_class(one)}


def test_hooks_on_loading_run_and_may_replace_the_dict() -> None:
    run, other = Run(FAST), Run(FAST)
    run.steps(2)
    seen: list[str] = []
    good = run.optimizer.state_dict()
    other.optimizer.register_load_state_dict_pre_hook(
        lambda optimizer, given: seen.append("pre") or good
    )
    other.optimizer.register_load_state_dict_post_hook(
        lambda optimizer: seen.append(f"post {optimizer.global_step}")
    )
    other.optimizer.load_state_dict({})
    assert seen == ["pre", "post 2"]


def test_hyperparameters_come_from_the_checkpoint_and_code_from_the_program() -> None:
    every_third = lambda step: step % 3 == 0  # noqa: E731
    run, other = Run({**FAST, "lr": 0.02}), Run({**FAST, "lr": 0.5, "T": every_third})
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert {group["lr"] for group in other.optimizer.param_groups} == {0.02}
    assert {group["T"] for group in other.optimizer.param_groups} == {1}
    callable_T = Run({**FAST, "T": every_third})
    callable_T.optimizer.load_state_dict(callable_T.optimizer.state_dict())
    assert {group["T"] for group in callable_T.optimizer.param_groups} == {every_third}


def test_a_module_that_is_saved_needs_no_optimizer() -> None:
    run = Run(FAST)
    run.steps(1)
    copy: nn.Module = deepcopy(run.model)
    copy(run.x)
    assert run.optimizer.batch_size == 4
