"""How many examples the gradients average over."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import unserializable_hook

from sirfshampoo._distributed import is_dtensor
from sirfshampoo._engine.examples import (
    Count,
    count_examples,
    takes_keywords,
    tensors_in,
)
from sirfshampoo._engine.forward_hook import ForwardHook
from sirfshampoo._engine.gradients import Mark, gradients_of
from sirfshampoo._engine.tally import Tally
from sirfshampoo._engine.transforms import (
    is_transforming,
    is_vmapped,
    reaches_parameters,
)
from sirfshampoo._engine.warn import warn_of_batch_size, warn_of_gradients_kept

#: After how many steps on end with another batch size than expected to warn.
_PATIENCE = 5


@dataclass
class _ForwardPass:
    """A forward pass whose gradients may arrive.

    Attributes:
        size: Its examples.
        announced: How many of them are still announced.
        period: When they were counted last.
    """

    size: int
    announced: int
    period: int = -1


class BatchSizeCounter:
    """Counts the examples whose gradients accumulate between two optimizer steps.

    With a callable, a forward hook on the model announces the examples of each forward
    pass; they count once a backward pass from its outputs has changed gradients. So a
    batch that was discarded does not count, and recomputed activations do not count
    twice. With an integer it always returns that.

    Attributes:
        groups: The parameter groups of the optimizer.
    """

    def __init__(self, batch_size: int | Count, expected: int | None = None) -> None:
        self.groups: Sequence[Mapping[str, Any]] = ()
        self._expected = expected
        self._unexpected: list[int] = []  # batch sizes of the last steps on end
        self._count: Count | None = None
        self._last = 0  # the batch size of the last step, or the integer
        self._tally = Tally()  # examples whose gradients are there
        self._announced = 0  # examples of training mode that await their gradients
        # those that a transform of torch.func saw: no gradient tells when it arrives
        self._transformed = 0
        self._is_unknown = False  # `vmap` hid how many there are
        # what gradients flow back from, in each backward pass that is under way
        self._arriving: dict[int, list[_ForwardPass]] = {}
        self._held_back: list[_ForwardPass] = []  # their gradients, by FSDP
        if callable(batch_size):
            self._count = batch_size
            self._takes_keywords = takes_keywords(batch_size)
        else:
            self._last = batch_size

    @property
    def value(self) -> int:
        """The number of examples counted for the present gradients, or the last."""
        counted = self._tally.of(self._gradients()) + self._transformed
        return counted or self._announced or self._last

    # ----------------------------------------------------------------- forward pass

    def watch(self, model: Module) -> ForwardHook | None:
        """Have the model's forward passes noted, if there is a callable."""
        for hook in list(model._forward_hooks.values()):
            if isinstance(hook, ForwardHook) and hook.is_dead:
                hook.remove_from(model)  # it came with a copy of a model
        if self._count is None:
            return None
        forward_hook = ForwardHook()
        forward_hook.attach(self)
        model.register_forward_hook(forward_hook, with_kwargs=True)
        return forward_hook

    def note(
        self, training: bool, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Announce the examples of a forward pass that gradients can come from."""
        if self._count is None or not torch.is_grad_enabled():
            return
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return
        transforms = is_transforming()
        if transforms:
            if not any(map(reaches_parameters, tensors_in(output))):
                return
            if any(map(is_vmapped, tensors_in((args, kwargs)))):
                self._is_unknown |= training
                return
        try:
            size = count_examples(
                self._count, args, kwargs, with_keywords=self._takes_keywords
            )
        except Exception:
            if training:
                raise
            return  # evaluation need not fit what training needs
        forward = _ForwardPass(size, announced=size if training else 0)
        if transforms:
            self._transformed += forward.announced
            return
        self._announced += forward.announced
        counter = weakref.ref(self)
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                hook = unserializable_hook(partial(_arrive, counter, forward))
                tensor.register_hook(hook)

    def arrive(self, forward: _ForwardPass) -> None:
        """Note that gradients flow back from the outputs of a forward pass."""
        task = torch._C._current_graph_task_id()  # one may run within another
        if task not in self._arriving:  # the first output in this backward pass
            before = self._gradients()
            self._tally.look(before)
            self._arriving[task] = []
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(_end, weakref.ref(self), task, Mark(before)))
        self._arriving[task].append(forward)

    def end(self, task: int, before: Mark) -> None:
        """Count what arrived, if the backward pass has changed ``.grad``."""
        arrived = self._arriving.pop(task, [])
        gradients = self._gradients()
        if before.holds(gradients):
            # gradients with respect to something else; or, of shards, ones that come
            # into ``.grad`` when the ranks communicate next, whatever is reset before
            if any(is_dtensor(p) for group in self.groups for p in group["params"]):
                self._held_back += arrived
            return
        arrived, self._held_back = self._held_back + arrived, []
        for forward in arrived:
            self._announced = max(self._announced - forward.announced, 0)
            forward.announced = 0
            if forward.period != self._tally.period:
                forward.period = self._tally.period
                self._tally.add(forward.size)
        self._tally.mark(gradients)

    def _gradients(self) -> list[Tensor | None]:
        return gradients_of([p for group in self.groups for p in group["params"]])

    # ------------------------------------------------------------------------- step

    def counted(self) -> int | None:
        """Return the number of examples counted here; None if it is not counted."""
        if self._count is None:
            return None
        gradients = self._gradients()
        examples = self._tally.of(gradients)
        if missing := self._tally.kept_aside(gradients):
            warn_of_gradients_kept(missing, examples)
        if self._is_unknown:
            return 0
        # gradients may be computed without a backward pass, then the forward counts
        return (examples + self._transformed) or self._announced

    def read(self, counted: int) -> int:
        """Return the batch size of the present gradients.

        Args:
            counted: What `counted` returned, summed over the ranks.

        Raises:
            RuntimeError: If nothing was counted since the last step.
        """
        if self._count is None:
            return self._last
        if counted == 0:
            raise RuntimeError(
                "No examples were counted since the last step, so the batch size is "
                "unknown. They count if the model given to the optimizer is called "
                "itself, with gradients enabled and not within torch.func.vmap, and "
                "gradients flow back from what it returns. Otherwise, pass "
                "'batch_size' as an integer."
            )
        return counted

    def forget(self) -> None:
        """Note that the gradients are gone."""
        self._tally.forget(self._gradients())

    def close(self, size: int) -> None:
        """Note that a step has used the gradients of `size` examples."""
        if size and self._expected is not None:
            self._look_for_disagreement(size, self._expected)
        if self._count is not None:
            self._last = size or self._last
            self._announced = self._transformed = 0
            self._is_unknown = False
            self._arriving.clear()  # of backward passes that failed
            self._tally.close()

    def _look_for_disagreement(self, size: int, expected: int) -> None:
        """Warn once if what is counted is not what the settings are made for."""
        self._unexpected = [*self._unexpected[1 - _PATIENCE :], size]
        if size == expected:
            self._unexpected.clear()
        last = set(self._unexpected)
        far = all(not expected / 1.5 <= n <= 1.5 * expected for n in last)
        # a number that stays is a mistake; one that varies may be buckets of a loader
        if len(self._unexpected) >= _PATIENCE and (len(last) == 1 or far):
            self._expected = None  # once is enough
            warn_of_batch_size(sorted(last), expected)


def _end(counter: weakref.ref[BatchSizeCounter], task: int, before: Mark) -> None:
    """End a backward pass for a counter that may be gone."""
    present = counter()
    if present is not None:
        present.end(task, before)


def _arrive(
    counter: weakref.ref[BatchSizeCounter], forward: _ForwardPass, gradient: Tensor
) -> None:
    """Count a forward pass for a counter that may be gone."""
    present = counter()
    if present is not None:
        present.arrive(forward)
