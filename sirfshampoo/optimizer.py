"""The optimizer: parameters in, pre-conditioned steps out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from sirfshampoo._config.arguments import check_batch_size, check_model
from sirfshampoo._config.checks import check_flag
from sirfshampoo._config.groups import check_options, with_kappa
from sirfshampoo._config.variant import Variant
from sirfshampoo._distributed import Ranks, check_sharing, is_initialized
from sirfshampoo._engine.batch_size import BatchSizeCounter
from sirfshampoo._engine.engine import Engine
from sirfshampoo._engine.examples import get_batch_size
from sirfshampoo._engine.model import KnownModel
from sirfshampoo._engine.owners import Owners
from sirfshampoo._engine.plan import Task
from sirfshampoo._engine.step import take_steps
from sirfshampoo._engine.unit_optimizer import UnitOptimizer
from sirfshampoo._engine.warn import warn_of_non_finite_gradients
from sirfshampoo._method.device import untraced
from sirfshampoo._method.precision import Precision, full_precision
from sirfshampoo._report.diagnostics import diagnostics
from sirfshampoo._report.groups import tell_groups
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


class SIRFShampoo(UnitOptimizer):
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
    ``m{n}.{field}``, with `follow_gradient` ``norm_mean`` and ``norm_count``, too;
    under every parameter ``momentum_buffer``, or, of gradients, ``gradient_momentum``.

    Attributes:
        SUPPORTED_STRUCTURES: Maps the name of a structure to the class of structured
            matrices that the pre-conditioner uses for it.
        debug: Whether a step warns of gradients that are not finite, and names their
            parameters. On an accelerator that waits for the device. Default: False.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SIRFShampoo(model, **recipe(model, batch_size=8, steps=100))
    """

    SUPPORTED_STRUCTURES: dict[str, type[StructuredMatrix]] = SUPPORTED_STRUCTURES
    _MEMORY_CHECK = staticmethod(check_memory)

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
        normalize_update: bool = False,
        follow_gradient: bool = False,
        max_relative_update: float | None = None,
        clamp: str = "frobenius",
        relative_damping: bool = False,
        cautious_decay: bool = False,
        decay_vectors: bool = True,
        allow_closure: bool = False,
        expected_batch_size: int | None = None,
        weight_decay: float | None = None,
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
                the model. Those that are frozen rest, and get factors when their first
                gradient comes.
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
                a copy of its own of a callable. What a callable remembers is saved and
                loaded with the optimizer if it has ``state_dict`` and
                ``load_state_dict``; without these, let it answer from the step alone,
                or a resumed run updates in other steps.
            structures: The structure of the Kronecker factors: one name for all; or a
                dictionary that maps the number of axes of a tensor to a name, or to a
                tuple of names, one for each axis, such as
                ``{1: 'dense', 2: ('dense', 'diagonal'), 3: 'diagonal'}``. Names are
                ``'dense'``, ``'diagonal'``, ``'block30diagonal'``,
                ``'hierarchical15_15'``, ``'triltoeplitz'``, ``'triutoeplitz'``, those
                with other sizes, such as ``'block64diagonal'`` and
                ``'hierarchical8_8'``, and ``'dense1024'``: ``'dense'`` for axes up to
                128, or up to 1024 and at most twice as long as the tensor's others
                together, ``'block128diagonal'`` for longer ones, and ``'diagonal'``
                from 16 times 1024 on.
            preconditioner_dtypes: The data type of the Kronecker factors, in the same
                format: float16, bfloat16, float32, float64, or None for the type of
                the parameter.
            combine_params: Rules that say which parameters share a pre-conditioner.
                They are tried in order, an earlier one wins. Default: every parameter
                has its own.
            verbose_init: Whether to print how parameters are grouped and which
                pre-conditioners they get.
            spread_updates: Whether to spread the updates of the pre-conditioners over
                the steps, so that no step does much more than another: a group is
                updated when ``step % T`` is a number of its own, chosen such that
                counted operations are balanced (where pre-conditioners are sharded, on
                each rank). The numbers follow from the groups, hence a checkpoint holds
                nothing of them. A callable ``T`` keeps its own mind.
            process_group: The ranks of ``torch.distributed`` that see different
                examples: examples that are counted are summed over them once a step.
                A process group, a mesh of devices, or False if this rank trains by
                itself. An integer `batch_size` is that of all ranks, and not summed.
                Default: the group of ``DistributedDataParallel`` if `model` is one,
                else all ranks.
            shard_preconditioners: Whether each pre-conditioner lies on one rank alone,
                which pre-conditions for all; they are balanced by counted operations.
                True (those of `process_group`), or the ranks to share them: a process
                group or a mesh of one dimension, each with the same gradients or shards
                of them. All of them must call `state_dict`, `load_state_dict` and
                `diagnostics` then.
            initial_factors: Where factors start: at ``'identity'``; or at
                ``'gradient'``, that is at (B · mean(G²) + lam)^(−1/(2N)) · I of the
                gradient G, with N axes. The first gradient updates factors whatever `T`
                says. Until a finite one has come they are 0, and parameters rest, but
                for the weight decay (after one that is not, a CPU tries the next, an
                accelerator and `shard_preconditioners` that which `T` says).
            exponent: Which power p of the inverse (K_1 ⊗ … ⊗ K_N)(K_1 ⊗ … ⊗ K_N)ᵀ
                pre-conditions: 1; 0.5, as in Shampoo, SOAP and, element by element,
                Adam; or 0.75 between. A smaller one trusts rare directions less, and
                lets steps grow less as gradients vanish, with 0.5 not at all. With 0.5,
                every K_n is multiplied on once and not twice (cheaper, too): it is kept
                symmetric and positive definite, K ← E K E with
                E = I − ½ beta2 / max(1, ‖m‖_F) · m, so that it is the inverse square
                root itself. With 0.75, the first of several axes (the outputs of a
                layer) is multiplied on twice, the others once, each times
                (‖K_n‖_F / √d_n)^(2p − its number). Structures that are multiplied on
                once must be dense, diagonal or block-diagonal.
            momentum_first: Whether the momentum averages gradients, which are then
                pre-conditioned, and not pre-conditioned gradients: V ← alpha1 · V + G,
                W ← W − lr · (U(V) + kappa · W). The newest factors then serve all that
                is in the momentum; the weight decay is that of AdamW.
            nesterov: Whether to look ahead as ``torch.optim.SGD(nesterov=True)``:
                W moves along U + alpha1 · V in place of V; with `momentum_first`, U
                pre-conditions G + alpha1 · V. The newest gradient counts at once.
            normalize_update: Whether U, D numbers in m rows, is scaled to ‖U‖_S4 = s ·
                r^(−1/4), s = √m, r = min(m, D / m): to the size of orthonormal rows.
                Axes of size 1 do not count. s = 1 for vectors, and for weights of four
                axes of which the first, of outputs, is 1; an embedding of `model` looks
                up outputs: s = √D.
            follow_gradient: Whether U shrinks with what is pre-conditioned, X: times
                ‖X‖_F / its mean over all steps so far, between 0.1 and 1. A normalized
                update has one size however small gradients have become.
            max_relative_update: How far lr · U moves a parameter at most, beside its
                Frobenius norm, or ½ s if that is more. Default: None, no limit.
            clamp: Which norm of m limits the step of K: ``'frobenius'``, with which
                long axes learn slowly; or ``'spectral'``, by the power method.
            relative_damping: Whether `lam` counts in units of B · mean(G²), and factors
                rest while a gradient is 0.
            cautious_decay: Whether `kappa` shrinks only the weights that U shrinks,
                too, those where U · W > 0 ("Cautious Weight Decay", arXiv 2510.12402):
                weights that have to grow are not held back, noise is.
            decay_vectors: Whether `kappa` shrinks parameters with one axis, such as
                biases and norms, too; axes of size 1 do not count.
            allow_closure: Whether `step` runs a closure with gradients enabled, then
                steps, as torch's optimizers do. PyTorch Lightning needs it.
            expected_batch_size: How many examples a step has. A warning tells if others
                are counted for several steps on end. It is the `batch_size` where
                parameters stand in the place of `model`. Default: None, any number.
            weight_decay: Another name of `kappa`, for frameworks that pass torch's.

        Raises:
            ValueError: If an argument is wrong, or if no rule takes a parameter.
            MemoryError: If the state would not fit into the free memory of a device.
        """
        check_model(model, params)
        module = model if isinstance(model, Module) else None
        if module is None and expected_batch_size and batch_size is get_batch_size:
            batch_size = expected_batch_size
        check_batch_size(batch_size, model)
        check_flag("verbose_init", verbose_init)
        check_sharing(shard_preconditioners)
        variant = Variant(
            spread_updates=spread_updates,
            initial_factors=initial_factors,
            exponent=exponent,
            momentum_first=momentum_first,
            nesterov=nesterov,
            normalize_update=normalize_update,
            follow_gradient=follow_gradient,
            max_relative_update=max_relative_update,
            clamp=clamp,
            relative_damping=relative_damping,
            cautious_decay=cautious_decay,
            decay_vectors=decay_vectors,
            allow_closure=allow_closure,
            expected_batch_size=expected_batch_size,
        )
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
        if weight_decay:  # 0 says nothing: frameworks that decay by group pass it
            own = {"kappa": kappa} if kappa else {}
            defaults |= with_kappa({**own, "weight_decay": weight_decay})
        check_options(defaults)
        known = KnownModel(module)
        if module is None:
            params = model  # type: ignore[assignment]
        elif params is None:
            params = known.trainable()

        self.debug = False
        ranks, owners = Ranks(process_group, module), None
        if shard_preconditioners is not False and is_initialized():
            owners = Owners(ranks.sharing(shard_preconditioners))
        super().__init__(
            params,
            defaults,
            model=known,
            engine=Engine(variant, ranks, owners, allocates=self._ALLOCATES),
            batch_size=BatchSizeCounter(batch_size, expected_batch_size),
        )
        if verbose_init:
            print(self._summary())

    # ------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Parameters that lack a gradient rest; of those that share a pre-conditioner, the
        others take theirs as 0. If a gradient is not finite, all that share its
        pre-conditioner rest (``skipped`` in its state counts that). On an
        accelerator the host does not wait for the device. ``torch.compile`` makes two
        variants of a step, with an update of the pre-conditioners and without; and
        more if not all groups are updated in the same steps.

        Args:
            closure: Not supported, unless `allow_closure` is set.

        Returns:
            What the closure returns; None without.

        Raises:
            NotImplementedError: If a closure is given, and not allowed.
            RuntimeError: If the batch size is unknown or a gradient is sparse.
        """
        result = None
        if closure is not None:
            if not self._engine.variant.allow_closure:
                raise NotImplementedError(
                    "SIRFShampoo.step takes no closure: compute the loss and its "
                    "gradients before the step. If a framework passes it, as PyTorch "
                    "Lightning does, write SIRFShampoo(..., allow_closure=True)."
                )
            with torch.enable_grad():
                result = closure()
        tasks, batch_size, precision = self._plan()
        with precision:
            how = self._engine.workspace, self._engine.route()
            take_steps(tasks, batch_size, *how, [task.skipped for task in tasks])
        self._close(tasks, batch_size)
        return result

    @untraced
    def _plan(self) -> tuple[list[Task], int, Precision]:
        """Return what is to be done, the batch size, and in which precision."""
        units = self._units()
        present, counted = self._engine.agree(self._batch_size.counted())
        batch_size = 0
        moving = (unit for unit, has in zip(units, present, strict=True) if any(has))
        if any(unit.dims.numel() for unit in moving):
            batch_size = self._batch_size.read(counted)
        woken = [i for i in self._engine.at_rest if True in present[i]]
        if woken:  # they were frozen
            self._allocate(woken)
        if self.debug:
            warn_of_non_finite_gradients(units, self._unit_names())
        self._adopt()
        tasks = self._engine.plan(
            self.param_groups, self.state, self.global_step, present
        )
        precision = full_precision({task.skipped.device.type for task in tasks})
        return tasks, batch_size, precision

    @untraced
    def _close(self, tasks: Sequence[Task], batch_size: int) -> None:
        """Count a step that was taken."""
        self.global_step += 1
        self._engine.close(tasks)
        self._batch_size.close(batch_size)

    # ------------------------------------------------------------------ what is seen

    def __repr__(self) -> str:
        """Return the parameter groups, equal ones folded."""
        return tell_groups(type(self).__name__, self.param_groups)

    def _summary(self) -> Summary:
        """Return what the pre-conditioners are and cost, but of what is frozen."""
        pairs = list(zip(self._units(), self._unit_names(), strict=True))
        wanted = [pair for pair in pairs if pair[0].is_wanted(self.state)]
        units, names = [u for u, _ in wanted], [n for _, n in wanted]
        return summarize(units, self.param_groups, names)

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
            wait for each device. Of sharded parameters, all ranks must ask.
        """
        stacks, names = self._stacks(), self._unit_names()
        present, _ = self._engine.look_for_gradients()
        with full_precision({stack.skipped.device.type for stack in stacks}):
            how = self.param_groups, names, present, self._engine.variant
            told = diagnostics(stacks, *how)
        owners = self._engine.owners
        return told if owners is None else owners.exchange.joined(told)
