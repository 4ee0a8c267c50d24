"""The optimizer: parameters in, pre-conditioned steps out."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from sirfshampoo._config import (
    CYCLED_MOMENTUM,
    adopt_cycled_momentum,
    check_batch_size,
    check_exponent,
    check_flag,
    check_initial_factors,
    check_limit,
    check_model,
    check_options,
    check_rule,
    with_kappa,
)
from sirfshampoo._distributed import Ranks, is_dtensor, is_initialized
from sirfshampoo._engine.batch_size import BatchSizeCounter, ForwardHook, get_batch_size
from sirfshampoo._engine.checkpoint import (
    check_fit,
    check_symmetric,
    with_code,
    without_code,
)
from sirfshampoo._engine.costs import cost_of, period_of
from sirfshampoo._engine.owners import Owners
from sirfshampoo._engine.spread import spread
from sirfshampoo._engine.stacks import Settings, Stack, Task, stack_units
from sirfshampoo._engine.units import Unit, form_units
from sirfshampoo._method.descent import Variant
from sirfshampoo._method.device import untraced
from sirfshampoo._method.factors import Workspace
from sirfshampoo._method.precision import full_precision
from sirfshampoo._report.diagnostics import (
    diagnostics,
    partly_missing_gradients,
    warn_of_callable_interval,
    warn_of_missing_gradients,
    warn_of_non_finite_gradients,
)
from sirfshampoo._report.memory import check_memory
from sirfshampoo._report.table import Summary, summarize
from sirfshampoo.combiner import PerParameter, PreconditionerGroup
from sirfshampoo.structures import SUPPORTED_STRUCTURES, StructuredMatrix

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DEFAULT_COMBINE_PARAMS", "SIRFShampoo", "get_batch_size"]

#: Each parameter has a pre-conditioner of its own.
DEFAULT_COMBINE_PARAMS: tuple[PreconditionerGroup, ...] = (PerParameter(),)


class _NoModel(Module):
    """Stands in for a model of which nothing but parameters is known."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self._given = params

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Return the parameters."""
        return iter(self._given)  # type: ignore[arg-type]


def _take_steps(tasks: Sequence[Task], batch_size: int, workspace: Workspace) -> None:
    """Do what is planned: all the arithmetic of a step, in one piece for a compiler."""
    for task in tasks:
        task.stack.take_step(task, batch_size, workspace)


def _unwatch(model: weakref.ref[Module], hook: ForwardHook) -> None:
    """Remove a hook from a model that may be gone."""
    present = model()
    if present is not None:
        hook.remove_from(present)


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
        global_step: The number of steps taken. Add to it where steps pass the optimizer
            by, as those of a replayed CUDA graph do.
        spread_updates: Whether updates of pre-conditioners are spread over the steps.
        debug: Whether a step warns of gradients that are not finite, and names their
            parameters. On an accelerator that waits for the device. Default: False.
    """

    SUPPORTED_STRUCTURES: dict[str, type[StructuredMatrix]] = SUPPORTED_STRUCTURES
    STATE_ATTRIBUTES: list[str] = ["global_step"]  # noqa: RUF012 - documented type

    def __init__(
        self,
        model: Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        lr: float | Tensor = 0.001,
        beta2: float = 0.01,
        alpha1: float = 0.9,
        alpha2: float = 0.5,
        lam: float = 0.001,
        kappa: float = 0.0,
        batch_size: int | Callable[..., int] = get_batch_size,
        T: int | Callable[[int], bool] = 1,
        structures: str | dict[int, str | tuple[str, ...]] = "dense",
        preconditioner_dtypes: torch.dtype
        | dict[int, torch.dtype | tuple[torch.dtype | None, ...] | None]
        | None = None,
        combine_params: tuple[PreconditionerGroup, ...] = DEFAULT_COMBINE_PARAMS,
        verbose_init: bool = False,
        *,
        spread_updates: bool = False,
        process_group: ProcessGroup | DeviceMesh | Literal[False] | None = None,
        shard_preconditioners: ProcessGroup | DeviceMesh | bool = False,
        initial_factors: str = "identity",
        exponent: float = 1.0,
        momentum_first: bool = False,
        nesterov: bool = False,
        max_update_norm: float | None = None,
        max_update_rms: float | None = None,
        cautious_decay: bool = False,
    ) -> None:
        """Set up the optimizer.

        Args:
            model: The neural network. Rules that join parameters look at its layers,
                and its forward passes are watched to learn the batch size. Or, as in
                ``torch.optim``, what `params` accepts: then `batch_size` must be an
                integer, and rules that join parameters are not available.
            params: The parameters to train: an iterable of parameters, of pairs
                (name, parameter) such as ``named_parameters()``, or of dictionaries
                with the key ``'params'`` and any of the options from ``lr`` to
                ``combine_params`` (but not ``batch_size``). Default: all parameters of
                the model that require a gradient.
            lr: Learning rate of the parameters (β₁ in the paper). If it is a tensor,
                each group gets a copy of its own, into which schedulers write: put it
                on the device of the parameters, then a compiled step or a captured
                CUDA graph follows a schedule.
            beta2: Learning rate of the pre-conditioner.
            alpha1: Momentum of the parameter update.
            alpha2: Riemannian momentum of the pre-conditioner.
            lam: Damping λ of the pre-conditioner update.
            kappa: Weight decay κ, added to the pre-conditioned gradient.
            batch_size: The number of examples that the loss averages over: an integer,
                or a callable from the tuple of the model's positional inputs to it; if
                it has a second required parameter, that gets the dictionary of keyword
                inputs. It is called for each forward pass with gradients enabled, and
                the pass counts once gradients flow back from its outputs; counts add
                up until the next step or ``zero_grad``. Default: the first axis of the
                first input tensor.
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
            spread_updates: Whether to spread the updates of the pre-conditioners over
                the steps, so that no step does much more than another. Without, all
                groups of equal integer ``T`` are updated when ``step % T == 0``. With
                it, when ``step % T`` is a number of the group's own, chosen such that
                counted operations are balanced; it follows from shapes, structures,
                ``T`` and whether ``lam`` is 0, in the order of the groups, hence a
                checkpoint holds nothing of it. A callable ``T`` keeps its own mind.
                Where pre-conditioners are sharded, it is each rank that is balanced,
                hence the steps of updates depend on the number of ranks.
            process_group: The ranks of ``torch.distributed`` that see different
                examples: examples that are counted are summed over them once a step.
                A process group, a mesh of devices, or False if this rank trains by
                itself. An integer `batch_size` is that of all ranks, and not summed.
                Default: the group of ``DistributedDataParallel`` if `model` is one,
                else all ranks.
            shard_preconditioners: Whether each pre-conditioner lies on one rank alone,
                which pre-conditions for all; they are balanced by counted operations.
                True, or the ranks to share them: a process group or a mesh of one
                dimension, each with the same gradients or shards of them. All ranks
                must call `state_dict`, `load_state_dict` and `diagnostics` then.
            initial_factors: Where factors start: at ``'identity'``; or at
                ``'gradient'``, that is at (B · mean(G²) + lam)^(−1/(2N)) · I of the
                gradient G, with N axes. The first gradient updates factors whatever `T`
                says, if it is finite (with `shard_preconditioners`: the first that `T`
                says); until then they are 0, and parameters rest, but for the weight
                decay. From the identity hundreds of updates pass until factors have the
                gradient's scale: in place of it in the recipe, the transformer of
                ``benchmarks/TRAINING.md`` ends at a test loss of 1.52, not 1.40.
            exponent: Which power p of the inverse (K_1 ⊗ … ⊗ K_N)(K_1 ⊗ … ⊗ K_N)ᵀ
                pre-conditions: 1; 0.5, as in Shampoo, SOAP and, element by element,
                Adam; or 0.75 between. A smaller one trusts rare directions less, and
                lets steps grow less as gradients vanish, with 0.5 not at all. With 0.5,
                every K_n is multiplied on once and not twice (cheaper, too): it is kept
                symmetric and positive definite, K ← E K E with
                E = I − ½ beta2 / max(1, ‖m‖_F) · m, so that it is the inverse square
                root itself. With 0.75, the first of several
                axes (the outputs of a layer) is multiplied on twice, the others once,
                each times (‖K_n‖_F / √d_n)^(2p − its number). Structures that are
                multiplied on once must be dense, diagonal or block-diagonal. In the
                recipe, 0.75 ends at 1.40 (transformer) and 0.126 (logistic regression),
                1 at 1.42 and 0.259, 0.5 at 1.72 and 0.312.
            momentum_first: Whether the momentum averages gradients, which are then
                pre-conditioned, and not pre-conditioned gradients: V ← alpha1 · V + G,
                W ← W − lr · (U(V) + kappa · W). The newest factors then serve all that
                is in the momentum; the weight decay is that of AdamW. Not for
                parameters that are sharded where pre-conditioners are, too. The
                recipe's transformer ends at 1.40, and at 2.17 without.
            nesterov: Whether to look ahead as ``torch.optim.SGD(nesterov=True)``:
                W moves along U + alpha1 · V in place of V; with `momentum_first`, U
                pre-conditions G + alpha1 · V. The recipe's transformer ends at 1.40,
                and at 1.46 without; the digits' MLP is no better for it.
            max_update_norm: The largest Frobenius norm of U, of each pre-conditioner
                and step: a larger U is scaled down. Without `momentum_first`, the
                momentum adds up to 1 / (1 − alpha1) of them. U grows as gradients
                vanish, and this stops the divergence that the next surprise makes of
                it: without limits the recipe loses the digits' MLP in 3 of 3 runs.
                Default: None, no limit.
            max_update_rms: The largest root mean square of the entries of U, in the
                same way. If both are given, what stays within one of them may pass: a
                norm for small matrices, whose every entry may have to go far, a root
                mean square for large ones (an LSTM of width 128 ends at 1.30 with both,
                at 1.36 with the norm alone). Default: None, no limit.
            cautious_decay: Whether `kappa` shrinks only the weights that U shrinks,
                too, those where U · W > 0 ("Cautious Weight Decay", arXiv 2510.12402):
                weights that have to grow are not held back, noise is. The recipe's
                transformer ends at 1.40, and at 1.45 with plain decay; the digits' CNN
                is no better for it.

        Raises:
            ValueError: If an argument is wrong, or if no rule takes a parameter.
            MemoryError: If the state would not fit into the free memory of a device.
        """
        check_model(model, params)
        check_batch_size(batch_size, model)
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
        check_flag("spread_updates", spread_updates)
        check_initial_factors(initial_factors)
        check_exponent(exponent)
        check_flag("momentum_first", momentum_first)
        check_flag("nesterov", nesterov)
        check_flag("cautious_decay", cautious_decay)
        check_limit("max_update_norm", max_update_norm)
        check_limit("max_update_rms", max_update_rms)
        self._model = model if isinstance(model, Module) else None
        if self._model is None:
            params = model  # type: ignore[assignment]
        elif params is None:
            params = [p for p in self._model.parameters() if p.requires_grad]

        self._stacks: list[Stack] | None = None
        self._global_step = 0
        self.debug = False
        self.spread_updates = spread_updates
        self._exponent = float(exponent)
        self._variant = Variant(
            initial_factors,
            momentum_first,
            nesterov,
            max_update_norm,
            max_update_rms,
            cautious_decay,
        )
        # the phase of each group, and what it follows from
        self._phases: tuple[Any, list[int]] = None, []
        self._batch_size = BatchSizeCounter(batch_size)
        self._ranks = Ranks(process_group, self._model)
        self._owners: Owners | None = None
        if shard_preconditioners is not False and is_initialized():
            self._owners = Owners(shard_preconditioners)
        self._hook: ForwardHook | None = None
        self._is_set_up = False
        self._told: set[int] = set()  # units whose missing gradients were told
        self._units: list[Unit] = []
        self._workspace = Workspace()
        # what rules find in the model; remembered while groups are being added
        self._identified: dict[int, list[list[Parameter]]] = {}
        super().__init__(params, defaults)  # type: ignore[arg-type]
        # schedulers that cycle the momentum look here, and put it into the groups
        self.defaults[CYCLED_MOMENTUM] = alpha1
        self._identified.clear()
        self._check_memory(self._units, self.param_groups)
        self._restack()
        self._is_set_up = True
        if self._model is not None:
            self._hook = self._batch_size.watch(self._model)
            self._unwatch_at_the_end()
        if verbose_init:
            print(self._summary())

    def _unwatch_at_the_end(self) -> None:
        """Take the hook along when this is no more."""
        if self._hook is not None and self._model is not None:
            model = weakref.ref(self._model)
            weakref.finalize(self, _unwatch, model, self._hook).atexit = False

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
            if CYCLED_MOMENTUM not in param_group:
                given.pop(CYCLED_MOMENTUM, None)
            names = given.get("param_names") or self._names_of(given["params"])
            units, groups = form_units(
                given,
                names=names,
                identify=lambda rule: self._identify(rule, given["params"]),
                start=len(self._units),
                exponent=self._exponent,
            )
        finally:
            self.param_groups = before
        if self.spread_updates and callable(given["T"]):
            warn_of_callable_interval(names)
        if self._owners is not None:
            if self._variant.momentum_first and any(map(is_dtensor, given["params"])):
                raise ValueError(
                    "Argument 'momentum_first' must be False where parameters and "
                    f"pre-conditioners are sharded, got True for {names}."
                )
            units = self._owners.assign(units, [*before, *groups], self._units)
        if self._is_set_up:  # else the constructor does it once for all
            self._identified.clear()
            self._check_memory([*self._units, *units], [*before, *groups])
        self.param_groups += groups
        self._units += units
        self._batch_size.params += [p for unit in units for p in unit.params]
        if self._is_set_up:
            self._restack()

    def _check_memory(
        self, units: Sequence[Unit], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Check that there is memory for what `_restack` allocates."""
        held = [unit for unit in units if self._holds(unit)]
        check_memory(held, groups, self._names_of)

    def _holds(self, unit: Unit) -> bool:
        """Return whether this rank holds the factors of a unit."""
        return self._owners is None or unit.owner == self._owners.rank

    def _identify(
        self, rule: PreconditionerGroup, params: Sequence[Tensor]
    ) -> list[list[Parameter]]:
        """Return what a rule finds in the model, or in parameters without one."""
        if self._model is None:
            check_rule(rule)
            return rule.identify(_NoModel(params))
        if id(rule) not in self._identified:
            self._identified[id(rule)] = rule.identify(self._model)
        return self._identified[id(rule)]

    def _names_of(self, params: Iterable[Tensor]) -> list[str]:
        """Return the parameters' names in the model."""
        known = () if self._model is None else self._model.named_parameters()
        names = {id(p): name for name, p in known}
        return [
            names.get(id(p), f"a tensor of shape {tuple(p.shape)} outside the model")
            for p in params
        ]

    def _unit_names(self) -> list[list[str]]:
        """Return, a unit, the names of its parameters; without any: their numbers."""
        params = [p for unit in self._units for p in unit.params]
        # all at once: a walk through the model for each unit would take long
        known = iter(
            [str(i) for i in range(len(params))]
            if self._model is None
            else self._names_of(params)
        )
        names = [[next(known) for _ in unit.params] for unit in self._units]
        return [
            group.get("param_names") or found
            for group, found in zip(self.param_groups, names, strict=True)
        ]

    # ------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Perform a single optimization step.

        A pre-conditioner whose parameters lack a gradient rests, and so does one whose
        gradient is not finite (``skipped`` in its state counts these). On an
        accelerator the host does not wait for the device. ``torch.compile`` makes two
        variants of a step, with an update of the pre-conditioners and without; and
        more if not all groups are updated in the same steps.

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
        stacks, tasks, batch_size = self._plan()
        with full_precision({stack.skipped.device.type for stack in stacks}):
            take_steps = (
                _take_steps if self._owners is None else self._owners.take_steps
            )
            take_steps(tasks, batch_size, self._workspace)
        self._close(batch_size)

    @untraced
    def _plan(self) -> tuple[list[Stack], list[Task], int]:
        """Return the stacks, what is to be done with them, and the batch size."""
        present, counted = self._ranks.agree(
            [unit.has_gradients() for unit in self._units], self._batch_size.counted()
        )
        batch_size = self._batch_size.read(counted) if any(present) else 0
        partly_missing = partly_missing_gradients(self._units) - self._told
        if partly_missing:
            self._told |= partly_missing
            warn_of_missing_gradients(self._units, self._unit_names(), partly_missing)
        if self.debug:
            warn_of_non_finite_gradients(self._units, self._unit_names())
        for group in self.param_groups:
            adopt_cycled_momentum(group)
        settings = [
            Settings.of_group(group, due=due, variant=self._variant)
            if has_gradients
            else None
            for group, due, has_gradients in zip(
                self.param_groups, self._due(), present, strict=True
            )
        ]
        stacks, groups = self._current_stacks(), self.param_groups
        tasks = [task for stack in stacks for task in stack.plan(settings, groups)]
        return stacks, tasks, batch_size

    @untraced
    def _close(self, batch_size: int) -> None:
        """Count a step that was taken."""
        self.global_step += 1
        for stack in self._stacks or []:
            stack.note_writes()
        self._batch_size.close(batch_size)

    @property
    def global_step(self) -> int:
        """The number of steps taken. Set it where steps pass this object by."""
        return self._global_step

    @global_step.setter
    def global_step(self, value: int) -> None:
        for stack in self._stacks or []:
            stack.step.add_(value - self._global_step)
        self._global_step = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget how many examples they averaged over.

        Args:
            set_to_none: Whether to set them to None, and not to zero. Default: True.
        """
        super().zero_grad(set_to_none)
        self._batch_size.forget()

    def _due(self) -> list[bool]:
        """Return, a group, whether its pre-conditioner is to be updated."""
        intervals = [group["T"] for group in self.param_groups]
        return [
            bool(T(self.global_step)) if callable(T) else self.global_step % T == phase
            for T, phase in zip(intervals, self._present_phases(), strict=True)
        ]

    def _present_phases(self) -> list[int]:
        """Return, a group, in which step of its period its factors are updated."""
        groups = self.param_groups
        if not self.spread_updates:
            return [0] * len(groups)
        reason = [(group["T"], bool(group["lam"])) for group in groups]
        if reason != self._phases[0]:
            costs = [cost_of(unit, groups[unit.group]) for unit in self._units]
            phases = [0] * len(groups)
            for owner in {unit.owner for unit in self._units}:  # each is balanced
                own = [i for i, unit in enumerate(self._units) if unit.owner == owner]
                updates = [costs[i].update_flops for i in own]
                found = spread(updates, [period_of(groups[i]) for i in own])
                for i, phase in zip(own, found, strict=True):
                    phases[i] = phase
            self._phases = reason, phases
        return self._phases[1]

    def _restack(self) -> list[Stack]:
        """Build the stacks from the state."""
        self._ranks.depend(
            (p for unit in self._units for p in unit.params),
            None if self._owners is None else self._owners.exchange,
        )
        phases = self._present_phases()
        # rows that are updated in the same steps are neighbours
        units = sorted(self._units, key=lambda unit: phases[unit.group])
        self._stacks = stack_units(
            units,
            self.param_groups,
            self.state,
            step=self.global_step,
            rank=None if self._owners is None else self._owners.rank,
            initial_factors=self._variant.initial_factors,
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
        """The number of examples counted for the present (or last) step.

        Of several ranks, this one's before the step, that of all after it.
        """
        return self._batch_size.value

    @property
    def preconditioner(self) -> list[list[StructuredMatrix]]:
        """The Kronecker factors K_n of each group, as views of the state.

        Of sharded pre-conditioners, what another rank holds is an empty list.
        """
        factors: dict[int, list[StructuredMatrix]] = {}
        for stack in self._held_stacks():
            for row, unit in enumerate(stack.units):
                factors[unit.group] = [K_n[row] for K_n in stack.K]
        return [factors.get(i, []) for i in range(len(self._units))]

    @property
    def preconditioner_momenta(self) -> list[list[StructuredMatrix | None]]:
        """The momenta m_n of each group, as views of the state; None without any.

        Of sharded pre-conditioners, what another rank holds is an empty list.
        """
        momenta: dict[int, list[StructuredMatrix | None]] = {}
        for stack in self._held_stacks():
            for row, unit in enumerate(stack.units):
                momenta[unit.group] = (
                    [None] * len(stack.K)
                    if stack.m is None
                    else [m_n[row] for m_n in stack.m]
                )
        return [momenta.get(i, []) for i in range(len(self._units))]

    def _held_stacks(self) -> list[Stack]:
        """Return the stacks whose factors lie on this rank."""
        return [stack for stack in self._current_stacks() if stack.held]

    def _summary(self) -> Summary:
        """Return what the pre-conditioners are and cost."""
        return summarize(self._units, self.param_groups, self._unit_names())

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Return numbers that tell how training goes, ready for any logger.

        Returns:
            For each pre-conditioner, under the names of its parameters joined by "+":
            ``name/update_norm`` and ``name/update_rms``, the Frobenius norm and the
            root mean square of the last change of the parameters (with ``alpha1 = 0``:
            of that which the present gradients ask for; NaN without any; with
            `momentum_first` without what the weight decay adds),
            ``name/momentum_norm`` (0 without momentum),
            ``name/K{n}_norm``, the Frobenius norm of the factor of axis n, and
            ``name/skipped``, the steps sat out because of a non-finite gradient. One
            wait for each device.
        """
        told = diagnostics(
            self._current_stacks(),
            self.param_groups,
            self._unit_names(),
            self._variant,
        )
        return told if self._owners is None else self._owners.exchange.joined(told)

    # ------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, ready for ``torch.save``.

        Returns:
            ``'state'``, ``'param_groups'`` and the attributes in `STATE_ATTRIBUTES`:
            tensors and plain values only, so that ``torch.load(weights_only=True)``
            reads it. In place of options that are code (``combine_params``, a callable
            ``T``) stands None.
        """
        stacks = self._current_stacks()  # a state put in by hand takes its place first
        state_dict = super().state_dict()
        if self._owners is not None:
            params = (p for group in self.param_groups for p in group["params"])
            number = {id(p): i for i, p in enumerate(params)}
            state = {i: dict(e) for i, e in state_dict["state"].items()}
            for p, key, tensor in self._owners.spread(stacks):
                state[number[id(p)]][key] = tensor
            state_dict["state"] = state
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
        expected = self.state
        if self._owners is not None:
            expected = self._owners.template(self._current_stacks())  # type: ignore[assignment]
        saved, step = check_fit(state_dict, self.param_groups, expected)
        check_symmetric(self._units, saved)

        pairs = zip(state_dict["param_groups"], self.param_groups, strict=True)
        self.param_groups = [with_code(group, present) for group, present in pairs]
        self._units = [
            replace(unit, dtypes=group["preconditioner_dtypes"])
            for unit, group in zip(self._units, self.param_groups, strict=True)
        ]
        self._global_step = self.global_step if step is None else step
        if self._owners is not None:
            for unit in self._units:
                saved |= self._owners.collect(unit, saved)
        for p, entries in saved.items():
            self.state[p] = entries
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
        state = {p: {k: t.clone() for k, t in s.items()} for p, s in self.state.items()}
        made_anew: dict[str, Any] = {
            "_stacks": None,
            "_workspace": Workspace(),
            "_identified": {},
        }
        return {**kept, "state": state, **made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` returned."""
        super().__setstate__(state)
        self.state = defaultdict(dict, self.state)
        if self._hook is not None:
            # the copied model has it already, or will when it is complete
            self._hook.attach(self._batch_size)
            self._unwatch_at_the_end()
