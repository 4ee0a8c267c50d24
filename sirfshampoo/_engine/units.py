"""Which parameters share a pre-conditioner: units, and a parameter group for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import Parameter

from sirfshampoo._config.arguments import check_parameter
from sirfshampoo._config.axes import dtypes_of_axes, structures_of_axes
from sirfshampoo._config.groups import own_interval, own_numbers
from sirfshampoo._config.variant import Variant
from sirfshampoo._distributed import whole_rows
from sirfshampoo._engine.entries import is_own
from sirfshampoo._method.descent import size_of
from sirfshampoo.combiner import PreconditionerGroup
from sirfshampoo.structures import structure_class

#: How the name ends of a parameter that is not the model's.
OUTSIDE = "outside the model"


@dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that share a pre-conditioner.

    Attributes:
        group: The index of the unit's parameter group.
        params: The parameters, in the order in which `rule` joins them.
        rule: Joins them into one tensor.
        dims: The shape of that tensor.
        structures: The structure of each axis' Kronecker factor.
        dtypes: The type of each axis' Kronecker factor.
        variant: The optimizer's options for all parameters.
        embeds: Whether the parameters are weights of embeddings.
        owner: The rank that holds the factors; None: every rank.
    """

    group: int
    params: tuple[Tensor, ...]
    rule: PreconditionerGroup
    dims: Size
    structures: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    variant: Variant
    embeds: bool = False
    owner: int | None = None

    @property
    def powers(self) -> tuple[float, ...]:
        """Which power of each factor's size is multiplied on beside the factor."""
        if self.variant.normalize_update:
            return (0.0,) * len(self.dims)  # what size there is, goes
        return tuple(2 * self.variant.exponent - times for times in self.times)

    @property
    def times(self) -> tuple[int, ...]:
        """How often each axis' factor K is multiplied onto a gradient.

        Twice (K Kᵀ) is the inverse, once (K, which is symmetric then) its square root;
        what lies between is in the first axis the one, in the others the other.
        """
        twice = {0.5: 0, 0.75: 1 if len(self.dims) > 1 else 0}
        number = twice.get(self.variant.exponent, len(self.dims))
        return tuple(2 if n < number else 1 for n in range(len(self.dims)))

    @property
    def size(self) -> float:
        """The Frobenius norm of an update of size 1."""
        first, *others = self.params
        is_kernel = not others and first.ndim > 3 and len(self.dims) > 1
        return size_of(first.shape if is_kernel else self.dims, embeds=self.embeds)

    @property
    def num_stored(self) -> int:
        """How many numbers the factors of the unit store."""
        return sum(
            structure_class(name).num_stored(dim)
            for name, dim in zip(self.structures, self.dims, strict=True)
        )

    @property
    def working_set(self) -> int:
        """How many numbers a step works on: of the gradient and of the factors."""
        needed = (structure_class(name).WORKSPACE for name in self.structures)
        return self.dims.numel() * max(needed) + self.num_stored

    def check_gradients(self) -> None:
        """Check that gradients are not sparse.

        Raises:
            RuntimeError: If one is.
        """
        for p in self.params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(
                    "SIRFShampoo does not support sparse gradients, got one of layout "
                    f"{p.grad.layout} for a parameter of shape {tuple(p.shape)}. Build "
                    "embedding layers with sparse=False."
                )

    def is_wanted(
        self, state: Mapping[Tensor, Any], woken: Container[int] = ()
    ) -> bool:
        """Return whether the unit needs state: it trains, or has state already.

        Args:
            state: The optimizer's state.
            woken: The numbers of frozen units that have gradients all the same. Who
                asks knows it of all ranks, which have to answer alike.
        """
        trains = any(p.requires_grad for p in self.params) or self.group in woken
        return trains or any(map(is_own, state.get(self.params[0], ())))


@torch.no_grad()
def form_units(
    group: Mapping[str, Any],
    *,
    names: Sequence[str],
    identify: Callable[[PreconditionerGroup], list[list[Parameter]]],
    start: int,
    variant: Variant,
    embeddings: Collection[int] = (),
) -> tuple[list[Unit], list[dict[str, Any]]]:
    """Split what the user calls a parameter group into units with a group each.

    Args:
        group: The user's group, with all options.
        names: The names of its parameters.
        identify: What a rule finds in the model.
        start: The index of the first of the new groups.
        variant: The optimizer's options for all parameters.
        embeddings: The identities of the weights of embeddings.

    Returns:
        The units, and their groups.

    Raises:
        ValueError: If an option does not fit, or no rule takes a parameter.
    """
    for name, p in zip(names, group["params"], strict=True):
        check_parameter(name, p)
    position = {id(p): i for i, p in enumerate(group["params"])}
    units: list[Unit] = []
    groups: list[dict[str, Any]] = []
    # a rule sees tensors, not parameters: it treats those of equal shapes alike
    joint: dict[Any, tuple[Size, torch.dtype]] = {}
    for members, rule in _claims(group, names, identify):
        key = (id(rule), *((p.shape, p.dtype) for p in members))
        if key not in joint:
            joint[key] = _joint_tensor(members, rule)
        dims, dtype = joint[key]
        structures = structures_of_axes(group["structures"], dims)
        dtypes = dtypes_of_axes(group["preconditioner_dtypes"], len(dims), dtype)
        new = {
            **group,
            **own_numbers(group),
            "params": list(members),
            "T": own_interval(group["T"]),
            "structures": structures,
            "preconditioner_dtypes": dtypes,
            "combine_params": (rule,),
        }
        if "param_names" in group:
            new["param_names"] = [names[position[id(p)]] for p in members]
        index = start + len(units)
        fields = (index, tuple(members), rule, dims, structures, dtypes, variant)
        unit = Unit(*fields, embeds=all(id(p) in embeddings for p in members))
        _check_symmetric(unit)
        units.append(unit)
        groups.append(new)
    return units, groups


def substituted(
    units: Sequence[Unit], groups: Sequence[Mapping[str, Any]]
) -> list[tuple[Unit, Unit]]:
    """Return units whose groups hold other parameters by now, with new ones of these.

    Args:
        units: The units.
        groups: Their parameter groups.

    Raises:
        ValueError: If they have other shapes, or what is fixed was changed.
    """
    unit_of = {id(p): unit for unit in units for p in unit.params}
    if len(groups) != len(units):
        raise ValueError(
            f"'param_groups' must keep its {len(units)} groups, one for each "
            f"pre-conditioner, got {len(groups)}: freeze what is to rest, or build "
            "a new optimizer."
        )
    replaced = []
    for unit, group in zip(units, groups, strict=True):
        found = group["structures"], group["preconditioner_dtypes"]
        fixed = tuple(tuple(x) if isinstance(x, list) else x for x in found)
        if fixed != (unit.structures, unit.dtypes):
            raise ValueError(
                f"Group {unit.group} must keep its structures {unit.structures} "
                f"and preconditioner_dtypes {unit.dtypes}, got {fixed[0]!r} and "
                f"{fixed[1]!r}: build a new optimizer to change them."
            )
        params = tuple(group["params"])
        if len(params) == len(unit.params) and all(map(is_, params, unit.params)):
            continue
        if any(unit_of.get(id(p), unit) is not unit for p in params):
            raise ValueError(
                "'param_groups' must keep its order, one for each pre-conditioner, got "
                f"parameters of another group in group {unit.group}."
            )
        shapes = [[tuple(p.shape) for p in ps] for ps in (unit.params, params)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The parameters of group {unit.group} must keep the shapes "
                f"{shapes[0]} where others take their place, got {shapes[1]}."
            )
        replaced.append((unit, replace(unit, params=params)))
    return replaced


def _check_symmetric(unit: Unit) -> None:
    """Check that factors which must be symmetric can be."""
    for n, (name, times) in enumerate(zip(unit.structures, unit.times, strict=True)):
        if times == 1 and not structure_class(name).HAS_SYMMETRIC:
            raise ValueError(
                "Argument 'structures' must be dense, diagonal or block-diagonal where "
                f"the exponent {unit.variant.exponent} takes the square root of a "
                f"factor, got {name!r} for axis {n} of {tuple(unit.dims)}."
            )


def _claims(
    group: Mapping[str, Any],
    names: Sequence[str],
    identify: Callable[[PreconditionerGroup], list[list[Parameter]]],
) -> list[tuple[list[Parameter], PreconditionerGroup]]:
    """Return which rule takes which parameters.

    Earlier rules come first, and what a rule finds in the order in which it lists it:
    code and checkpoints of the official package count groups so.
    """
    position = {id(p): i for i, p in enumerate(group["params"])}
    free = set(position)
    claims: list[tuple[list[Parameter], PreconditionerGroup]] = []
    for rule in group["combine_params"]:
        for candidate in identify(rule):
            ids = {id(p) for p in candidate}
            partly_frozen = len({p.requires_grad for p in candidate}) != 1
            if ids <= free and len(ids) == len(candidate) and not partly_frozen:
                claims.append((candidate, rule))
                free -= ids
    if free:
        orphans = [names[i] for i in sorted(position[key] for key in free)]
        raise ValueError(
            "Argument 'combine_params' must have a rule for every parameter, got none "
            f"for {orphans}. "
            + (
                "They belong to another model than 'model'."
                if all(name.endswith(OUTSIDE) for name in orphans)
                else "Append PerParameter(), which takes any parameter of the model."
            )
        )
    return claims


def _joint_tensor(
    params: list[Parameter], rule: PreconditionerGroup
) -> tuple[Size, torch.dtype]:
    """Return shape and type of the tensor that a rule makes of parameters.

    Raises:
        ValueError: If the rule makes something that cannot be pre-conditioned.
    """
    shapes = [p.shape for p in params]

    def join(tensors: list[Tensor]) -> tuple[Tensor, list[Size]]:
        joint = rule.group(tensors)
        return joint, [part.shape for part in rule.ungroup(joint, list(shapes))]

    try:  # without numbers, joining takes no memory
        joint, parts = join(
            [
                torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
                for p in params
            ]
        )
    except Exception:  # a user's rule may need them; if it is wrong, it fails again
        joint, parts = join([whole_rows([p], p).squeeze(0) for p in params])
    if joint.ndim == 0 or parts != shapes:
        raise ValueError(
            f"Argument 'combine_params' must hold rules whose 'group' returns a tensor "
            f"with at least one axis that 'ungroup' splits into the shapes {shapes}, "
            f"got {parts} from {tuple(joint.shape)} by {type(rule).__name__}."
        )
    return joint.shape, joint.dtype
