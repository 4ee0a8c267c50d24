"""Fixtures that make every test start from the same state of the world."""

import random
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


@pytest.fixture
def largest_tensor() -> LargestTensor:
    """Measure the largest tensor that comes into being inside a `with` block."""
    return LargestTensor()
