"""Fixtures that make every test start from the same state of the world."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sirfshampoo._engine import stacks
from sirfshampoo._method import device

# The same examples in every run, however slow the machine; `make test-all` asks for
# the profile with many.
hypothesis.settings.register_profile(
    "few",
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    # every example seeds the generators by itself
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "heavy", hypothesis.settings.get_profile("few"), max_examples=300
)
hypothesis.settings.load_profile("few")


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    """Seed all generators, use one thread, and hand the default dtype back."""
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # pytest-xdist already uses every core
    dtype = torch.get_default_dtype()
    yield
    changed = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    assert changed is dtype, f"The test left the default dtype at {changed}."


class LargestTensor(TorchDispatchMode):
    """Record the most numbers that any operation's result keeps in memory."""

    numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at the memory behind its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:  # which take no memory
                # not `numel`: a broadcast view of d x d costs nothing
                numbers = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.numbers = max(self.numbers, numbers)
        return result


class NoLooking(TorchDispatchMode):
    """Refuse what would make the host wait for an accelerator, on any device."""

    LOOKS = frozenset(
        f"aten::{name}"
        for name in (
            "_local_scalar_dense",  # item, bool, float, int, tolist
            "is_nonzero",
            "equal",
            "allclose",
            "nonzero",
            "nonzero_numpy",
            "masked_select",
            "_unique2",
            "unique_consecutive",
            "repeat_interleave.Tensor",
            "lift_fresh",  # a tensor made of Python's numbers: the host sends it
            "_pin_memory",
        )
    )
    MASKS = (torch.bool, torch.uint8)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation unless it looks at numbers or sends them."""
        name = func._schema.name
        by_mask = name.startswith("aten::index") and any(
            isinstance(leaf, Tensor) and leaf.dtype in self.MASKS
            for leaf in tree_leaves(args[1])
        )
        if name in self.LOOKS or by_mask:
            raise AssertionError(f"{func} makes the host wait for the device.")
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        ]
        result = func(*args, **(kwargs or {}))
        tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        devices = {t.device for t in tensors}
        if len(devices) > 1:
            raise AssertionError(f"{func} mixes {devices}: the host sends numbers.")
        return result


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> NoLooking:
    """Have the CPU treated as an accelerator; a `with` block refuses to look."""
    monkeypatch.setattr(device, "is_at_hand", lambda tensor: False)
    monkeypatch.setattr(stacks, "_STACK_LIMIT", {})
    return NoLooking()


@pytest.fixture(params=["at hand", "far away"])
def place(request: pytest.FixtureRequest) -> AbstractContextManager[Any]:
    """Enclose a step on a CPU, or on what passes for an accelerator."""
    if request.param == "at hand":
        return nullcontext()
    return request.getfixturevalue("far_away")


@pytest.fixture
def largest_tensor() -> LargestTensor:
    """Measure the largest tensor that comes into being inside a `with` block."""
    return LargestTensor()
