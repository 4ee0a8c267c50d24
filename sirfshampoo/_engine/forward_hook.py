"""The hook by which a counter sees the forward passes of a model."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch.nn import Module

from sirfshampoo._method import device


class Counter(Protocol):
    """What forward passes are noted by."""

    def note(
        self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note a forward pass."""


class ForwardHook:
    """Lets a counter note the forward passes of a model.

    It does not keep the counter alive. A copy, which comes into being with a copy of
    the model, counts for nobody, unless the optimizer was copied with it: that attaches
    its own counter.
    """

    def __init__(self) -> None:
        self._counter: weakref.ref[Counter] | None = None

    def attach(self, counter: Counter) -> None:
        """Count for a counter from now on."""
        self._counter = weakref.ref(counter)
        # traced, the count would become a constant, or a reason to compile anew
        self._note = torch.compiler.disable(self._note_untraced)

    @property
    def __name__(self) -> str:
        """Say to `torch.jit.script`, which asks for it, why there is none."""
        raise AttributeError(
            "torch.jit.script cannot compile the hook by which SIRFShampoo counts "
            "examples: script the model once the optimizer is gone (del optimizer), "
            "or pass 'batch_size' to SIRFShampoo as an integer, then there is no hook."
        )

    @property
    def is_dead(self) -> bool:
        """Whether it counts for nobody."""
        return self._counter is None or self._counter() is None

    def __call__(
        self,
        module: Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Note a forward pass."""
        if self._counter is not None and not device.is_exporting():
            self._note(module.training, args, kwargs, output)

    def _note_untraced(self, *forward_pass: Any) -> None:
        counter = None if self._counter is None else self._counter()
        if counter is not None:
            counter.note(*forward_pass)

    def remove_from(self, model: Module) -> None:
        """Remove this hook from a model."""
        for key, hook in list(model._forward_hooks.items()):
            if hook is self:
                del model._forward_hooks[key]
                model._forward_hooks_with_kwargs.pop(key, None)

    def remove_with(self, counter: Counter, model: Module) -> None:
        """Remove this hook from a model, if that is still there, with its counter.

        Copies of an optimizer may share both.
        """
        present = weakref.ref(model)
        weakref.finalize(counter, _remove, self, present).atexit = False

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[()]]:
        """Return how to make a copy, which counts for nobody at first."""
        return type(self), ()


def _remove(hook: ForwardHook, model: weakref.ref[Module]) -> None:
    """Remove a hook from a model that may be gone."""
    present = model()
    if present is not None:
        hook.remove_from(present)
