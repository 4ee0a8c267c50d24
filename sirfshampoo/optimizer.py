"""The optimizer: parameters in, pre-conditioned steps out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from sirfshampoo._batch_size import BatchSizeCounter, get_batch_size
from sirfshampoo._checkpoint import check_fit, with_code, without_code
from sirfshampoo._config import check_batch_size, check_model, check_options
from sirfshampoo._memory import check_memory
from sirfshampoo._precision import full_precision
from sirfshampoo._stack import Settings, Stack, stack_units
from sirfshampoo._summary import Summary, summarize
from sirfshampoo._units import Unit, form_units
from sirfshampoo._update import Workspace
from sirfshampoo.combiner import PerParameter, PreconditionerGroup
from sirfshampoo.structures import SUPPORTED_STRUCTURES, StructuredMatrix

__all__ = ["DEFAULT_COMBINE_PARAMS", "SIRFShampoo", "get_batch_size"]

#: Each parameter has a pre-conditioner of its own.
DEFAULT_COMBINE_PARAMS: tuple[PreconditionerGroup, ...] = (PerParameter(),)


class SIRFShampoo(Optimizer):
    """Structured inverse-free and root-free Shampoo.

    Pre-conditions the gradient of every unit of parameters with one structured
    Kronecker factor for each axis of its tensor. The factors are learned by matrix
    products alone, without inverse, root or decomposition. Notation and method are
    those of "Can We Remove the Square-Root in Adaptive Gradient Methods? A
    Second-Order Perspective" (arXiv 2402.03496), Figure 3.

    Parameters that share a pre-conditioner form a group of their own: the optimizer
    rewrites the parameter groups that it is given, one for each pre-conditioner.

    All state is tensors in ``state``: under the first parameter of a group ``step``,
    ``skipped`` (steps sat out because of a non-finite gradient), ``K{n}.{field}`` and
    ``m{n}.{field}``; under every parameter ``momentum_buffer``.

    Attributes:
        SUPPORTED_STRUCTURES: Maps the name of a structure to the class of structured
            matrices that the pre-conditioner uses for it.
        STATE_ATTRIBUTES: Attributes outside ``state`` that a state dict holds and
            brings back.
        global_step: The number of steps taken.
    """

    SUPPORTED_STRUCTURES: dict[str, type[StructuredMatrix]] = SUPPORTED_STRUCTURES
    STATE_ATTRIBUTES: list[str] = ["global_step"]  # noqa: RUF012 - documented type

    def __init__(
        self,
        model: Module,
        params: Iterable[Parameter] | Iterable[dict[str, Any]] | None = None,
        lr: float = 0.001,
        beta2: float = 0.01,
        alpha1: float = 0.9,
        alpha2: float = 0.5,
        lam: float = 0.001,
        kappa: float = 0.0,
        batch_size: int | Callable[[tuple[Tensor, ...]], int] = get_batch_size,
        T: int | Callable[[int], bool] = 1,
        structures: str | dict[int, str | tuple[str, ...]] = "dense",
        preconditioner_dtypes: torch.dtype
        | dict[int, torch.dtype | tuple[torch.dtype | None, ...] | None]
        | None = None,
        combine_params: tuple[PreconditionerGroup, ...] = DEFAULT_COMBINE_PARAMS,
        verbose_init: bool = False,
    ) -> None:
        """Set up the optimizer.

        Args:
            model: The neural network. Rules that join parameters look at its layers,
                and its forward passes are watched to learn the batch size.
            params: The parameters to train, or dictionaries with the key ``'params'``
                and any of the options from ``lr`` to ``combine_params`` (but not
                ``batch_size``). Default: all parameters of the model that require a
                gradient.
            lr: Learning rate of the parameters (β₁ in the paper).
            beta2: Learning rate of the pre-conditioner.
            alpha1: Momentum of the parameter update.
            alpha2: Riemannian momentum of the pre-conditioner.
            lam: Damping λ of the pre-conditioner update.
            kappa: Weight decay κ, added to the pre-conditioned gradient.
            batch_size: The number of examples that the loss averages over: an integer,
                or a callable from the tuple of the model's positional inputs to it,
                which is called before each forward pass in training mode; counts add
                up until the next step. Default: the first input tensor's first axis.
            T: How many steps lie between two updates of the pre-conditioner, or a
                callable from the global step to whether to update it. Each group gets
                a copy of its own of a callable.
            structures: The structure of the Kronecker factors: one name for all; or a
                dictionary that maps the number of axes of a tensor to a name, or to a
                tuple of names, one for each axis, such as
                ``{1: 'dense', 2: ('dense', 'diagonal'), 3: 'diagonal'}``. Names are
                ``'dense'``, ``'diagonal'``, ``'block30diagonal'``,
                ``'hierarchical15_15'``, ``'triltoeplitz'``, ``'triutoeplitz'``, and
                those with other sizes, such as ``'block64diagonal'`` and
                ``'hierarchical8_8'``.
            preconditioner_dtypes: The data type of the Kronecker factors, in the same
                format: float16, bfloat16, float32, float64, or None for the type of
                the parameter.
            combine_params: Rules that say which parameters share a pre-conditioner.
                They are tried in order, an earlier one wins. Default: every parameter
                has its own.
            verbose_init: Whether to print how parameters are grouped and which
                pre-conditioners they get.

        Raises:
            ValueError: If an argument is wrong, or if no rule takes a parameter.
            MemoryError: If the state would not fit into the free memory of a device.
        """
        check_model(model)
        check_batch_size(batch_size)
        defaults = {
            "lr": lr,
            "beta2": beta2,
            "alpha1": alpha1,
            "alpha2": alpha2,
            "lam": lam,
            "kappa": kappa,
            "T": T,
            "structures": structures,
            "preconditioner_dtypes": preconditioner_dtypes,
            "combine_params": combine_params,
        }
        check_options(defaults)
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]

        self.global_step = 0
        self._model = model
        self._units: list[Unit] = []
        self._stacks: list[Stack] | None = None
        self._workspace = Workspace()
        # what rules find in the model; remembered while groups are being added
        self._identified: dict[int, list[list[Parameter]]] = {}
        super().__init__(params, defaults)
        self._identified.clear()
        self._check_memory(self._units, self.param_groups)
        self._restack()

        self._batch_size = BatchSizeCounter(batch_size)
        if self._batch_size.is_hook:
            handle = model.register_forward_pre_hook(self._batch_size, with_kwargs=True)
            weakref.finalize(self, handle.remove).atexit = False
        if verbose_init:
            print(self._summary())

    # ----------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train; they are split into one group a pre-conditioner.

        Args:
            param_group: ``'params'`` and any of the constructor's options from ``lr``
                to ``combine_params``.

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
            names = given.get("param_names") or self._names_of(given["params"])
            units, groups = form_units(
                given, names=names, identify=self._identify, start=len(self._units)
            )
        finally:
            self.param_groups = before
        if self._stacks is not None:  # else the constructor does it once for all
            self._identified.clear()
            self._check_memory([*self._units, *units], [*before, *groups])
        self.param_groups += groups
        self._units += units
        if self._stacks is not None:
            self._restack()

    def _check_memory(
        self, units: Sequence[Unit], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Check that there is memory for what `_restack` allocates."""
        check_memory(units, groups, self._names_of)

    def _identify(self, rule: PreconditionerGroup) -> list[list[Parameter]]:
        if id(rule) not in self._identified:
            self._identified[id(rule)] = rule.identify(self._model)
        return self._identified[id(rule)]

    def _names_of(self, params: Iterable[Tensor]) -> list[str]:
        """Return the parameters' names in the model."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        return [
            names.get(id(p), f"a tensor of shape {tuple(p.shape)} outside the model")
            for p in params
        ]

    # ------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Perform a single optimization step.

        A pre-conditioner whose parameters lack a gradient rests, and so does one whose
        gradient is not finite (``skipped`` in its state counts these).

        Args:
            closure: Not supported.

        Raises:
            NotImplementedError: If a closure is given.
            RuntimeError: If the batch size is unknown or a gradient is sparse.
        """
        if closure is not None:
            raise NotImplementedError(
                "SIRFShampoo.step takes no closure: compute the loss and its gradients "
                "before the step."
            )
        present = [unit.has_gradients() for unit in self._units]
        batch_size = self._batch_size.read() if any(present) else 0
        settings = [
            Settings.of_group(group, due=due) if has_gradients else None
            for group, due, has_gradients in zip(
                self.param_groups, self._due(), present, strict=True
            )
        ]
        stacks = self._current_stacks()
        with full_precision({stack.skipped.device.type for stack in stacks}):
            for stack in stacks:
                for rows, shared in stack.runs(settings):
                    stack.take_step(rows, shared, batch_size, self._workspace)
                stack.step.add_(1)
        self.global_step += 1
        self._batch_size.close()

    def _due(self) -> list[bool]:
        """Return, a group, whether its pre-conditioner is to be updated."""
        intervals = [group["T"] for group in self.param_groups]
        return [
            bool(T(self.global_step)) if callable(T) else self.global_step % T == 0
            for T in intervals
        ]

    def _restack(self) -> list[Stack]:
        """Build the stacks from the state."""
        self._stacks = stack_units(
            self._units, self.param_groups, self.state, step=self.global_step
        )
        return self._stacks

    def _current_stacks(self) -> list[Stack]:
        """Return the stacks, rebuilt if the state or a momentum asks for it."""
        stacks = self._stacks
        if stacks is None or not all(
            stack.is_current(self.state, self.param_groups) for stack in stacks
        ):
            return self._restack()
        return stacks

    # ------------------------------------------------------------------ what is seen

    @property
    def batch_size(self) -> int:
        """The number of examples counted for the present (or last) step."""
        return self._batch_size.value

    @property
    def preconditioner(self) -> list[list[StructuredMatrix]]:
        """The Kronecker factors K_n of each group, as views of the state."""
        factors: dict[int, list[StructuredMatrix]] = {}
        for stack in self._current_stacks():
            for row, unit in enumerate(stack.units):
                factors[unit.group] = [K_n[row] for K_n in stack.K]
        return [factors[i] for i in range(len(self._units))]

    @property
    def preconditioner_momenta(self) -> list[list[StructuredMatrix | None]]:
        """The momenta m_n of each group, as views of the state; None without any."""
        momenta: dict[int, list[StructuredMatrix | None]] = {}
        for stack in self._current_stacks():
            for row, unit in enumerate(stack.units):
                momenta[unit.group] = (
                    [None] * len(stack.K)
                    if stack.m is None
                    else [m_n[row] for m_n in stack.m]
                )
        return [momenta[i] for i in range(len(self._units))]

    def _unit_names(self) -> list[list[str]]:
        """Return, a unit, the names of its parameters."""
        found = iter(self._names_of([p for unit in self._units for p in unit.params]))
        return [
            group.get("param_names") or known
            for group, known in zip(
                self.param_groups,
                [[next(found) for _ in unit.params] for unit in self._units],
                strict=True,
            )
        ]

    def _summary(self) -> Summary:
        """Return what the pre-conditioners are and cost."""
        return summarize(self._units, self.param_groups, self._unit_names())

    # ------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, ready for ``torch.save``.

        Returns:
            ``'state'``, ``'param_groups'`` and the attributes in `STATE_ATTRIBUTES`:
            tensors and plain values only, so that ``torch.load(weights_only=True)``
            reads it. Options that are code (``combine_params``, a callable ``T``) are
            left out.
        """
        self._current_stacks()  # a state that was put in by hand takes its place first
        state_dict = super().state_dict()
        groups = [without_code(group) for group in state_dict["param_groups"]]
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
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        saved, step = check_fit(state_dict, self.param_groups, self.state)

        pairs = zip(state_dict["param_groups"], self.param_groups, strict=True)
        self.param_groups = [with_code(group, present) for group, present in pairs]
        self._units = [
            replace(unit, dtypes=group["preconditioner_dtypes"])
            for unit, group in zip(self._units, self.param_groups, strict=True)
        ]
        self.global_step = self.global_step if step is None else step
        for p, entries in saved.items():
            self.state[p] = entries
        self._restack()

        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; stacks are rebuilt from the state."""
        # a patched `step` (by a scheduler, by profiling) is bound to this instance
        kept = {k: v for k, v in vars(self).items() if k != "step"}
        return {**kept, "_stacks": None, "_workspace": Workspace()}
