"""Arguments that are no options: a model, parameters, a batch size, rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module
from torch.nn.parameter import is_lazy

from sirfshampoo._config.axes import SUPPORTED_DTYPES
from sirfshampoo._config.checks import (
    check_fractions,
    check_non_negative,
    check_positive,
)
from sirfshampoo.combiner import PreconditionerGroup


def check_module(model: Any) -> None:
    """Check a model that settings are made for."""
    if not isinstance(model, Module):
        raise ValueError(
            f"Argument 'model' must be a torch.nn.Module, got {type(model).__name__}: "
            "settings follow from its layers. Give the model itself here, also where "
            "the optimizer is given parameters."
        )
    _check_initialized(model)


def _check_initialized(model: Module) -> None:
    """Check that all parameters have shapes, those of lazy layers, too."""
    lazy = [n for n, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(
            "Argument 'model' must have parameters with shapes, got lazy layers with "
            f"{lazy}: let it see one batch first, model(inputs)."
        )


def check_model(model: Any, params: Any) -> None:
    """Check the constructor's `model` and `params`."""
    if isinstance(params, Mapping) or not isinstance(params, Iterable | None):
        raise ValueError(
            "Argument 'params' must hold parameters or groups of them, got "
            f"{_shortened(params)}. Options are given by name: SIRFShampoo(model, "
            "lr=0.01), or SIRFShampoo(model, **recipe(...))."
        )
    if isinstance(model, Module):
        _check_initialized(model)
        return
    if isinstance(model, Tensor | Mapping) or not isinstance(model, Iterable):
        raise ValueError(
            "Argument 'model' must be a torch.nn.Module, or parameters in its place, "
            f"got {type(model).__name__}."
        )
    if params is not None:
        raise ValueError(
            "Argument 'params' must be None if parameters stand in the place of "
            f"'model', got {type(params).__name__}. Pass the model itself as the first "
            "argument."
        )


def _shortened(value: Any) -> str:
    """Return what a message shows of a value, which may be long."""
    return f"a {type(value).__name__}, {repr(value)[:40]}"


def check_batch_size(batch_size: Any, model: Any) -> None:
    """Check the constructor's `batch_size`."""
    positive = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not (positive and batch_size > 0) and not callable(batch_size):
        raise ValueError(
            "Argument 'batch_size' must be an integer > 0 or a callable from the "
            f"model's inputs to one, got {batch_size!r}."
        )
    if callable(batch_size) and not isinstance(model, Module):
        raise ValueError(
            "Argument 'batch_size' must be an integer > 0 if parameters stand in the "
            "place of 'model': there are no forward passes to count examples in. Pass "
            "the number of examples in a step, or the model itself as the first "
            "argument."
        )
    if callable(batch_size) and isinstance(model, ScriptModule):
        raise ValueError(
            "Argument 'batch_size' must be an integer > 0 for a model of "
            "torch.jit.script, which lets no hook count its examples. Got "
            f"{batch_size!r}."
        )


def check_adamw(*, lr: Any, betas: Any, weight_decay: Any) -> None:
    """Check what one gives AdamW."""
    check_positive("lr", lr)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Argument 'betas' must be two numbers, got {betas!r}.")
    for beta in betas:
        check_fractions("betas", beta)
    if weight_decay is not None:
        check_non_negative("weight_decay", weight_decay)


def check_rule(rule: PreconditionerGroup) -> None:
    """Check that a rule can do without a model."""
    if rule.NEEDS_MODEL:
        raise ValueError(
            "Argument 'combine_params' must hold rules that need no model, such as "
            "PerParameter, if parameters stand in the place of 'model', got "
            f"{type(rule).__name__}."
        )


def check_parameter(name: str, parameter: Tensor) -> None:
    """Check that a parameter has a shape, and a type that can be trained."""
    if is_lazy(parameter):
        raise ValueError(
            f"Argument 'params' must hold parameters with shapes, got one of a lazy "
            f"layer for {name!r}: let the model see one batch first, model(inputs)."
        )
    if parameter.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"Argument 'params' must hold parameters of types "
            f"{list(SUPPORTED_DTYPES)}, got {parameter.dtype} for {name!r}."
        )
