"""What a state dict keeps, and what it takes for one to fit an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Size, Tensor

from sirfshampoo._config.axes import dtypes_of_axes
from sirfshampoo._config.groups import (
    CYCLED_MOMENTUM,
    OPTIONS,
    check_options,
    plain_numbers,
)
from sirfshampoo._engine.entries import OF_GRADIENTS, OF_UPDATES, is_own
from sirfshampoo._engine.units import Unit
from sirfshampoo._engine.warn import tell
from sirfshampoo.structures import structure_class

Group = Mapping[str, Any]


def _is_stateful(T: Any) -> bool:
    """Return whether a callable ``T`` can be saved and restored, as schedulers can."""
    return callable(T) and all(
        callable(getattr(T, name, None)) for name in ("state_dict", "load_state_dict")
    )


def _kinds(unit: Unit) -> tuple[str, ...]:
    """Return what the factors of a unit are, so that a checkpoint tells its exponent.

    One that is multiplied on once, as smaller exponents have it, is another matrix.
    torch.distributed.checkpoint keeps no key that a group does not have, but all that
    stands under one.
    """
    pairs = zip(unit.structures, unit.times, strict=True)
    return tuple(name if times == 2 else f"root {name}" for name, times in pairs)


def without_code(group: Group, unit: Unit) -> dict[str, Any]:
    """Return the parameter group of a unit as plain values.

    None stands for options that are code: torch.distributed.checkpoint looks for every
    key of the group; its state dict stands for a callable ``T`` that has one. Types go
    by name, because it refuses them; a learning rate that is a tensor, as a number;
    structures with what they are of.
    """
    plain = {
        key: None if key == "combine_params" or callable(value) else value
        for key, value in {**group, **plain_numbers(group)}.items()
    }
    if _is_stateful(group["T"]):
        plain["T"] = deepcopy(group["T"].state_dict())
    types = group["preconditioner_dtypes"]
    plain["preconditioner_dtypes"] = tuple(str(t).removeprefix("torch.") for t in types)
    plain["structures"] = _kinds(unit)
    return plain


def _with_types(group: Group) -> dict[str, Any]:
    """Return a saved group in which types are no names."""
    types = group["preconditioner_dtypes"]
    found = [getattr(torch, t, t) if isinstance(t, str) else t for t in types]
    return {**group, "preconditioner_dtypes": tuple(found)}


def with_code(saved: Group, present: Group) -> dict[str, Any]:
    """Return a copy of a saved group that fits, with the present parameters and code.

    What a saved group may lack is taken from the present one: a callable ``T`` and
    the names of parameters.
    """
    code = {key: present[key] for key in ("params", "combine_params", "structures")}
    absent = {key: present[key] for key in ("T", "param_names") if key in present}
    known = {key: value for key, value in saved.items() if key not in code}
    T = known.get("T")
    if isinstance(T, Mapping):
        known["T"] = deepcopy(present["T"])
        known["T"].load_state_dict(deepcopy(dict(T)))
    elif T is None:
        known.pop("T", None)
    known = {**_with_types(deepcopy(known)), **plain_numbers(saved)}
    return {**code, **absent, **known}


def check_fit(
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    units: Sequence[Unit],
    names: Sequence[Sequence[str]],
    momentum: str,
) -> tuple[dict[Tensor, dict[str, Tensor]], int | None]:
    """Check that a state dict fits an optimizer.

    Args:
        state_dict: The state dict.
        groups: The optimizer's parameter groups.
        units: Its units.
        names: The names of each unit's parameters.
        momentum: What the state calls the momenta of parameters.

    Returns:
        The saved tensors of each parameter, not copied, none for those whose state
        starts anew, and the saved global step (None if nothing could tell it).

    Raises:
        ValueError: If the state dict is of another model, or of other structures.
    """
    for key in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            given = type(state_dict).__name__
            if isinstance(state_dict, Mapping):
                given += f" with {list(state_dict)[:8]}"
            raise ValueError(
                f"Argument 'state_dict' must be a dict with the key '{key}', got "
                f"{given}: give what the optimizer's state_dict() returned."
            )
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"Argument 'state_dict' must have {len(groups)} parameter groups, one for "
            f"each pre-conditioner, got {len(saved_groups)}: it is of another model, "
            "or rules join other parameters, as when part of what they join is frozen "
            "before the optimizer is built."
        )
    by_parameter: dict[Tensor, dict[str, Tensor]] = {}
    anew: list[str] = []
    for i, (saved, present) in enumerate(zip(saved_groups, groups, strict=True)):
        _check_group(f"group {i}", saved, present, units[i])
        pairs = list(zip(saved["params"], present["params"], strict=True))
        found = {p: dict(state_dict["state"].get(key, {})) for key, p in pairs}
        by_parameter |= found
        first = present["params"][0]
        has_state = {p: any(map(is_own, entries)) for p, entries in found.items()}
        # it was frozen then, or torch.distributed.checkpoint leaves out what is now
        if not any(has_state.values()) or not (has_state[first] or first.requires_grad):
            anew += [n for n, p in zip(names[i], found, strict=True) if p.requires_grad]
            continue
        shapes = _shapes(units[i])
        for key, p in pairs:
            if has_state[p] or p.requires_grad:  # else it is left out
                owner, optional = f"parameter {key}", {momentum: p.shape}
                _check_momentum(owner, found[p], momentum)
                _check_entries(owner, found[p], optional, shapes[p])
    if anew:
        tell(
            f"The state dict holds nothing for {anew}, as if they were frozen when it "
            "was saved: their pre-conditioners start anew."
        )

    # of what is frozen, torch.distributed.checkpoint may leave the present state
    trained = [e for p, e in by_parameter.items() if p.requires_grad]
    told = [e for e in trained or by_parameter.values() if "step" in e]
    steps = {int(e["step"]) for e in told}
    steps |= {state_dict["global_step"]} if "global_step" in state_dict else set()
    if len(steps) > 1 or any(not isinstance(s, int) or s < 0 for s in steps):
        raise ValueError(
            f"Argument 'state_dict' must hold one global step >= 0, got {steps}."
        )
    return by_parameter, next(iter(steps), None)


def _check_group(owner: str, saved: Group, present: Group, unit: Unit) -> None:
    """Check the options of one group, and how many parameters it has."""
    missing = {"params", *OPTIONS} - {"T", "combine_params"} - set(saved)
    if missing:
        raise ValueError(
            f"Argument 'state_dict' must have the keys {sorted(missing)} in {owner}: "
            "it is not of this optimizer."
        )
    if len(saved["params"]) != len(present["params"]):
        raise ValueError(
            f"Argument 'state_dict' must have {len(present['params'])} parameters in "
            f"{owner}, got {len(saved['params'])}."
        )
    kinds, structures = tuple(saved["structures"]), present["structures"]
    if tuple(kind.removeprefix("root ") for kind in kinds) != structures:
        raise ValueError(
            f"Argument 'state_dict' must have the structures {structures} in {owner}, "
            f"got {kinds}."
        )
    if kinds != _kinds(unit):
        raise ValueError(
            "Argument 'state_dict' must have factors for the exponent "
            f"{unit.variant.exponent} in {owner}, which are {_kinds(unit)}, got "
            f"{kinds}: they were learned with another exponent."
        )
    saved = {**_with_types(saved), "structures": structures}
    given = {key: value for key, value in saved.items() if value is not None}
    given.pop("combine_params", None)
    if isinstance(given.get("T"), Mapping):
        if not _is_stateful(present["T"]):
            raise ValueError(
                f"Argument 'state_dict' must fit a 'T' without state in {owner}, got "
                f"the state of a callable: {given['T']!r}."
            )
        del given["T"]
    given["alpha1"] = given.pop(CYCLED_MOMENTUM, given["alpha1"])
    given["kappa"] = given.pop("weight_decay", given["kappa"])
    check_options(given)
    ndim = len(present["structures"])
    dtypes_of_axes(saved["preconditioner_dtypes"], ndim, present["params"][0].dtype)


def _shapes(unit: Unit) -> dict[Tensor, dict[str, Size]]:
    """Return the shapes that a unit's state must have, but for momenta."""
    first: dict[str, Size] = {"step": Size(), "skipped": Size()}
    if unit.variant.follow_gradient:
        first |= {"norm_mean": Size(), "norm_count": Size()}
    axes = zip(unit.structures, unit.dims, strict=True)
    for n, (name, dim) in enumerate(axes):
        for field, shape in structure_class(name).layout(dim).items():
            first[f"K{n}.{field}"] = Size(shape)
    return {p: first if p is unit.params[0] else {} for p in unit.params}


def _check_momentum(owner: str, saved: Mapping[str, Any], momentum: str) -> None:
    """Check that a momentum is of what this optimizer averages."""
    for name in {OF_UPDATES, OF_GRADIENTS} - {momentum}:
        if name in saved:
            first = name == OF_GRADIENTS
            raise ValueError(
                f"Argument 'state_dict' must hold {momentum!r} in {owner}, got "
                f"{name!r}: it was saved with momentum_first={first}."
            )


def _check_entries(
    owner: str,
    saved: Mapping[str, Any],
    optional: Mapping[str, Size],
    required: Mapping[str, Size],
) -> None:
    """Check the keys and shapes of one parameter's entries.

    Momenta may be there or not: that follows from the hyperparameters, which a state
    dict brings along.
    """
    momenta = {f"m{k[1:]}": shape for k, shape in required.items() if k[0] == "K"}
    shapes = {**required, **momenta, **optional}
    missing = required.keys() - saved.keys()
    if momenta.keys() & saved.keys():
        missing |= momenta.keys() - saved.keys()
    unknown = {key for key in saved.keys() - shapes.keys() if is_own(key)}
    if missing or unknown:
        raise ValueError(
            f"Argument 'state_dict' must hold the state of this optimizer for {owner}: "
            f"missing {sorted(missing)}, not expected {sorted(unknown)}."
        )
    for key in saved.keys() & shapes.keys():
        tensor = saved[key]
        found = tensor.shape if isinstance(tensor, Tensor) else type(tensor).__name__
        if found != shapes[key]:
            raise ValueError(
                f"Argument 'state_dict' must hold a tensor of shape "
                f"{tuple(shapes[key])} as '{key}' of {owner}, got {found}."
            )
