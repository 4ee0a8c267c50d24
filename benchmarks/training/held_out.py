"""The held-out tasks: no choice of the recipe was made on them.

They are only run at the end, and their numbers stand as they come. The longest runs
come first, so that not all processes wait for them at the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import actor_critic
from benchmarks.training import held_out_models as models
from benchmarks.training.data import Data
from benchmarks.training.held_out_data import SHORT
from benchmarks.training.parts import Part
from benchmarks.training.task import Task, squares

_task = partial(Task, held_out=True)


def _evidence(
    inputs: Tensor, outputs: tuple[Tensor, Tensor, Tensor], targets: Tensor
) -> Tensor:
    """Return the negative lower bound on the evidence, summed over the pixels."""
    logits, mean, log_variance = outputs
    pixels = inputs.flatten(1)
    told = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none")
    distance = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
    return (told.sum(-1) + distance.sum(-1)).mean()


def _residual(model: nn.Module, batch: Part) -> Tensor:
    return models.residual_of_boundary_problem(model, batch.inputs)


def _speedrun(width: int) -> Task:
    def make(data: Data) -> nn.Module:
        return models.FastTransformer(data.classes, width, layers=4)

    return _task(
        f"speed-run's 4-layer decoder, width {width}, Python's source",
        data="long source",
        model=make,
        batch_size=16,
        steps=300,
    )


def _always(make: Callable[..., nn.Module], *args: Any) -> Callable[[Data], nn.Module]:
    """Make the same network for all data."""
    return lambda _: make(*args)


TASKS: dict[str, Task] = {
    "speedrun-384": _speedrun(384),
    "speedrun-256": _speedrun(256),
    "speedrun-128": _speedrun(128),
    "source-code": _task(
        "2-layer character transformer as GPT-2 starts, width 64, Python's source",
        data="source",
        model=lambda data: models.gpt2(data.classes, SHORT, width=64, layers=2),
        batch_size=32,
        steps=300,
    ),
    "gru": _task(
        "GRU, adding problem of length 50",
        data="adding",
        model=_always(models.GRU, 2, 64),
        loss=squares,
        batch_size=64,
        steps=600,
    ),
    "vit": _task(
        "vision transformer, digits",
        data="digits",
        model=_always(models.VisionTransformer, 64, 3),
        batch_size=64,
        steps=300,
    ),
    "deep-residual": _task(
        "16 residual blocks of an MLP, digits",
        data="digits",
        model=_always(models.deep_residual, 16, 64),
        batch_size=128,
        steps=300,
    ),
    "deep-plain": _task(
        "20-layer MLP, digits",
        data="digits",
        model=_always(models.deep_plain, 20, 64),
        batch_size=128,
        steps=300,
    ),
    "pinn": _task(
        "boundary problem by its residual; error of the solution",
        data="boundary problem",
        model=_always(models.tanh_mlp, 32),
        loss=squares,
        objective=_residual,
        batch_size=64,
        steps=800,
    ),
    "actor-critic": _task(
        "actor and critic: a mass is to come to rest; cost of a step",
        data="starts",
        model=_always(actor_critic.ActorCritic, 64),
        loss=actor_critic.cost,
        objective=actor_critic.objective,
        batch_size=64,
        steps=300,
    ),
    "vae": _task(
        "variational autoencoder, digits",
        data="digits",
        model=_always(models.VAE, 128, 8),
        loss=_evidence,
        batch_size=128,
        steps=800,
    ),
    "factorization": _task(
        "matrix factorization, ratings as they come",
        data="ratings",
        model=_always(models.Factorization, 16),
        loss=squares,
        batch_size=512,
        steps=500,
    ),
    "friedman-raw": _task(
        "MLP with batch norms, Friedman's function as it comes",
        data="friedman",
        model=_always(models.normalized_mlp, 10, 128),
        loss=squares,
        batch_size=128,
        steps=600,
    ),
    "fine-tuning": _task(
        "MLP that knows the digits 0 to 4, a new head, digits 5 to 9",
        data="high digits",
        model=models.fine_tuned,
        batch_size=64,
        steps=200,
    ),
    "adapters": _task(
        "adapters of rank 4 on frozen layers that know 0 to 4, digits 5 to 9",
        data="high digits",
        model=lambda data: models.adapted(data, rank=4),
        batch_size=64,
        steps=200,
    ),
}
