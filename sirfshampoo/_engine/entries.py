"""Entries of an optimizer's state: its own, and those that others put beside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

#: What the state calls a momentum: of pre-conditioned gradients, as torch's optimizers
#: do; and of gradients, which is another thing in another size.
OF_UPDATES, OF_GRADIENTS = "momentum_buffer", "gradient_momentum"


def is_own(key: Any) -> bool:
    """Return whether an entry of a parameter's state is this package's.

    Wrappers put their own beside; these are kept.
    """
    names = {OF_UPDATES, OF_GRADIENTS, "step", "skipped", "norm_mean", "norm_count"}
    return key in names or re.fullmatch(r"[Km]\d+\.\w+", str(key)) is not None


@torch.inference_mode(mode=False)  # a state may be loaded within it
def foreign_copied(entries: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """Return a parameter's entries, of which those of others are copies."""
    return {
        key: entry if is_own(key) else _copied(entry, p)
        for key, entry in entries.items()
    }


def _copied(entry: Any, p: Tensor) -> Any:
    if isinstance(entry, Tensor):
        return entry.detach().to(p.device, copy=True)
    return deepcopy(entry)


def with_own_memory(entries: Any) -> Any:
    """Return entries of the state whose tensors are no rows of a stack."""
    if not isinstance(entries, Mapping):
        return entries  # another's
    return {k: e.clone() if isinstance(e, Tensor) else e for k, e in entries.items()}


@torch.inference_mode(mode=False)
def of_no_parameter(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """Return copies of what the saved state holds beside that of parameters."""
    state, groups = state_dict["state"], state_dict["param_groups"]
    known = {key for group in groups for key in group["params"]}
    others = {k for k in state if k not in known and not isinstance(k, int)}
    return {key: deepcopy(state[key]) for key in others}
