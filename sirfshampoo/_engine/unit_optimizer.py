"""An optimizer as torch knows it, with a parameter group for each unit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from sirfshampoo._config.groups import (
    CYCLED_MOMENTUM,
    adopt_aliases,
    aliases_in,
    are_aliases_in,
    check_options,
    with_kappa,
)
from sirfshampoo._engine.batch_size import BatchSizeCounter
from sirfshampoo._engine.checkpoint import check_fit, with_code, without_code
from sirfshampoo._engine.engine import Engine
from sirfshampoo._engine.entries import (
    foreign_copied,
    of_no_parameter,
    with_own_memory,
)
from sirfshampoo._engine.forward_hook import ForwardHook
from sirfshampoo._engine.given import GivenGroup
from sirfshampoo._engine.model import KnownModel
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.units import Unit, form_units
from sirfshampoo._engine.warn import warn_of_callable_interval, warn_of_void_decay
from sirfshampoo.structures import StructuredMatrix


class UnitOptimizer(Optimizer):
    """Rewrites parameter groups into one a unit; saves, loads and copies their state.

    Attributes:
        STATE_ATTRIBUTES: Attributes outside ``state`` that a state dict holds and
            brings back.
        global_step: The number of steps taken. Add to it where steps pass the optimizer
            by, as those of a replayed CUDA graph do.
    """

    STATE_ATTRIBUTES: list[str] = ["global_step"]  # noqa: RUF012 - documented type
    _ALLOCATES: ClassVar[bool] = True
    _MEMORY_CHECK: ClassVar[Callable[..., None]]

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        model: KnownModel,
        engine: Engine,
        batch_size: BatchSizeCounter,
    ) -> None:
        """Form units of all parameters, and allocate their state.

        Args:
            params: The parameters, as torch's optimizers take them.
            defaults: The options of a group that says nothing else.
            model: What is known of the model.
            engine: Computes with the units.
            batch_size: Counts the examples.
        """
        self._model, self._engine, self._batch_size = model, engine, batch_size
        self._hook: ForwardHook | None = None
        self._given: list[range] = []  # the numbers of the groups that each became
        self._adopted: list[dict[str, Any]] = []  # what schedulers wrote last
        self._global_step = 0
        self._is_set_up = False
        super().__init__(params, defaults)
        # schedulers that cycle the momentum look here, and put it into the groups
        self.defaults[CYCLED_MOMENTUM] = defaults["alpha1"]
        self._model.forget()
        self._allocate()
        self._is_set_up = True
        if defaults["kappa"] and not any(g["kappa"] for g in self.param_groups):
            warn_of_void_decay(defaults["kappa"])
        if model.module is not None:
            self._hook = batch_size.watch(model.module)
        self._unwatch_at_the_end()

    # ----------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train; they are split into one group a pre-conditioner.

        Args:
            param_group: ``'params'`` and any of the constructor's options from ``lr``
                to ``combine_params``. Frameworks write ``weight_decay`` into groups:
                it is taken as ``kappa``.

        Raises:
            ValueError: If an option is wrong, a parameter is trained already, or no
                rule takes a parameter.
            MemoryError: If the state would not fit into the free memory of a device.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise ValueError(
                "Argument 'param_group' must be a dictionary with the key 'params', "
                f"got {param_group!r}."
            )
        param_group = with_kappa(param_group)
        check_options(param_group)
        params = param_group["params"]
        if not isinstance(params, (Tensor, set)):  # these two are the base class'
            params = list(params)
            tensors = [
                entry[1] if isinstance(entry, tuple) else entry for entry in params
            ]
            if len({id(tensor) for tensor in tensors}) < len(tensors):
                raise ValueError(
                    "Argument 'params' must hold each parameter once, got duplicates "
                    f"among {len(tensors)} parameters."
                )
        before = list(self.param_groups)
        try:
            super().add_param_group({**param_group, "params": params})
            given = self.param_groups[-1]
            given.pop(CYCLED_MOMENTUM, None)  # of the defaults
            names = given.get("param_names") or self._model.names_of(given["params"])
            units, groups = form_units(
                given,
                names=names,
                identify=lambda rule: self._model.identify(rule, given["params"]),
                start=len(self._engine.units),
                variant=self._engine.variant,
                embeddings=self._model.embeddings(),
            )
        finally:
            self.param_groups = before
            if self._is_set_up:  # the constructor has more to add
                self._model.forget()
        if self._engine.variant.spread_updates and callable(given["T"]):
            warn_of_callable_interval(names)
        named = dict(zip(map(id, given["params"]), names, strict=True))
        units = self._engine.with_owners(units, [*before, *groups], named)
        if self._is_set_up:  # else the constructor does it once for all
            every = [*self._engine.units, *units]
            self._check_memory(every, [*before, *groups])
        self._given.append(range(len(before), len(before) + len(groups)))
        self.param_groups = [*before, *groups]
        self._engine.units = [*self._engine.units, *units]
        self._batch_size.groups = self.param_groups
        if self._is_set_up:
            self._restack()

    def _allocate(self, woken: Container[int] = ()) -> None:
        """Take memory for the state of all units that need some."""
        self._check_memory(self._engine.units, self.param_groups, woken)
        self._restack(woken)

    def _check_memory(
        self,
        units: Sequence[Unit],
        groups: Sequence[Mapping[str, Any]],
        woken: Container[int] = (),
    ) -> None:
        """Check that there is memory for what units need; raise `MemoryError`."""
        if self._ALLOCATES:
            wanted = [u for u in units if u.is_wanted(self.state, woken)]
            self._MEMORY_CHECK(
                wanted,
                groups,
                names_of=self._model.names_of,
                holds=self._engine.holds,
            )

    def _restack(self, woken: Container[int] = ()) -> list[Stack]:
        """Build the stacks from the state."""
        groups, step = self.param_groups, self.global_step
        return self._engine.restack(groups, self.state, step, woken)

    def _stacks(self) -> list[Stack]:
        """Return the stacks, rebuilt if the state or a momentum asks for it."""
        self._units()
        return self._engine.stacks(self.param_groups, self.state, self.global_step)

    def _units(self) -> list[Unit]:
        """Return the units, of the parameters that stand in the groups by now."""
        return self._engine.follow(self.param_groups, self.state)

    def _adopt(self) -> None:
        """Take over what schedulers have written into groups under other names."""
        if are_aliases_in(self.param_groups):
            self._adopted = adopt_aliases(self.param_groups, self._adopted)

    def _unit_names(self) -> list[list[str]]:
        """Return, a unit, the names of its parameters; without any: their numbers."""
        return self._model.names_of_units(self._units(), self.param_groups)

    @property
    def given_groups(self) -> list[GivenGroup]:
        """The groups as they were given: ``given_groups[0]["lr"] = x`` sets all.

        Each is a view of those in ``param_groups`` that it was split into.
        """
        return [
            GivenGroup([self.param_groups[i] for i in numbers])
            for numbers in self._given
        ]

    @property
    def global_step(self) -> int:
        """The number of steps taken. Set it where steps pass this object by."""
        return self._global_step

    @global_step.setter
    def global_step(self, value: int) -> None:
        self._engine.count(value - self._global_step)
        self._global_step = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget how many examples they averaged over.

        Args:
            set_to_none: Whether to set them to None, and not to zero. Default: True.
        """
        super().zero_grad(set_to_none)
        self._batch_size.forget()

    @property
    def batch_size(self) -> int:
        """The number of examples counted for the present (or last) step.

        Of several ranks, this one's before the step, that of all after it.
        """
        return self._batch_size.value

    @property
    def spread_updates(self) -> bool:
        """Whether updates of pre-conditioners are spread over the steps."""
        return self._engine.variant.spread_updates

    @property
    def preconditioner(self) -> list[list[StructuredMatrix]]:
        """The Kronecker factors K_n of each group, as views of the state.

        An empty list stands for what another rank holds, or what is frozen.
        """
        return self._engine.factors(self._stacks())

    @property
    def preconditioner_momenta(self) -> list[list[StructuredMatrix | None]]:
        """The momenta m_n of each group, as views of the state; None without any.

        An empty list stands for what another rank holds, or what is frozen.
        """
        return self._engine.momenta(self._stacks())

    # ------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, ready for ``torch.save``.

        Returns:
            ``'state'``, ``'param_groups'`` and the attributes in `STATE_ATTRIBUTES`:
            tensors and plain values only, so that ``torch.load(weights_only=True)``
            reads it. In place of options that are code (``combine_params``, a callable
            ``T``) stands None.
        """
        self._adopt()  # what a scheduler wrote after the last step belongs to this
        # a state put in by hand takes its place first
        stacks, owners = self._stacks(), self._engine.owners
        state_dict = super().state_dict()
        if owners is not None:
            params = (p for group in self.param_groups for p in group["params"])
            number = {id(p): i for i, p in enumerate(params)}
            state = dict(state_dict["state"])
            state |= {i: dict(state[i]) for i in number.values() if i in state}
            for p, key, tensor in owners.spread(stacks):
                state[number[id(p)]][key] = tensor
            state_dict["state"] = state
        pairs = zip(state_dict["param_groups"], self._engine.units, strict=True)
        groups = [without_code(group, unit) for group, unit in pairs]
        attributes = {name: getattr(self, name) for name in self.STATE_ATTRIBUTES}
        return {**state_dict, "param_groups": groups, **attributes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state and the hyperparameters of a state dict.

        Tensors are copied. Options that are code stay as the constructor got them.

        Args:
            state_dict: What `state_dict` returned for an optimizer of the same
                parameters and structures.

        Raises:
            ValueError: If the state dict does not fit; nothing is changed then.
        """
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        engine = self._engine
        saved, step = check_fit(
            state_dict,
            self.param_groups,
            self._units(),
            self._unit_names(),
            engine.momentum,
        )
        if engine.owners is not None:
            saved = engine.owners.collect(engine.units, saved)
        pairs = list(zip(state_dict["param_groups"], self.param_groups, strict=True))
        loaded = [with_code(group, present) for group, present in pairs]
        for group, (_, present) in zip(loaded, pairs, strict=True):
            if isinstance(present["lr"], Tensor):  # where a captured CUDA graph looks
                group["lr"] = present["lr"].fill_(group["lr"])
        self.param_groups = self._batch_size.groups = loaded
        self._adopted = list(map(aliases_in, loaded))
        engine.units = [
            replace(unit, dtypes=group["preconditioner_dtypes"])
            for unit, group in zip(engine.units, self.param_groups, strict=True)
        ]
        self._global_step = self.global_step if step is None else step
        for p, entries in saved.items():
            if entries:
                self.state[p] = foreign_copied(entries, p)
            else:
                self.state.pop(p, None)
        self.state.update(of_no_parameter(state_dict))
        for stack in self._restack():
            stack.step.fill_(self._global_step)  # also of what was not saved

        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # ------------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; stacks are rebuilt from the state.

        Hooks of users stay behind, as with every optimizer of torch.
        """
        left = {key for key in vars(self) if key.startswith("_optimizer_")}
        # a patched `step` (by a scheduler, by profiling) is bound to this instance
        left |= {"step"}
        kept = {key: value for key, value in vars(self).items() if key not in left}
        # rows of stacks would bring the whole stack along
        state = {p: with_own_memory(entries) for p, entries in self.state.items()}
        return {**kept, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` returned."""
        super().__setstate__(state)
        self.state = defaultdict(dict, self.state)
        if self._hook is not None:
            # the copied model has it already, or will when it is complete
            self._hook.attach(self._batch_size)
        self._unwatch_at_the_end()

    def _unwatch_at_the_end(self) -> None:
        """Take the hook along when this is no more."""
        if self._hook is not None and self._model.module is not None:
            self._hook.remove_with(self._batch_size, self._model.module)
