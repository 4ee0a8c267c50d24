"""The examples for other people's training loops, and the numbers they promise."""

import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from examples import (
    accelerate_loop,
    huggingface_trainer,
    lightning_module,
    tensorboard_logging,
    timm_style,
)
from sirfshampoo import SIRFShampoo, recipe

pytestmark = [
    # Lightning 2.6 asks torch's trees in the way of before torch 2.9.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
]

EXAMPLES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        accelerate_loop,
        huggingface_trainer,
        lightning_module,
        tensorboard_logging,
        timm_style,
    )
}

# Those that resume: steps, and by what factor the loss falls at least.
RESUMING = {
    "accelerate_loop": (accelerate_loop, 40, 10),
    "huggingface_trainer": (huggingface_trainer, 36, 4),
    "lightning_module": (lightning_module, 40, 10),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections: no example may download anything."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"An example connects to {args[1:]}.")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def run(main: Callable[[list[str]], Any], steps: int, output: Path) -> Any:
    return main([f"--steps={steps}", "--seed=1", f"--output={output}"])


@pytest.fixture
def gradient_norms() -> Iterator[list[float]]:
    """Gather the norm of the gradient that each step of any optimizer sees."""
    norms: list[float] = []

    def measure(optimizer: Optimizer, *_: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(get_total_norm([p.grad for p in params]).item())

    # after the step: a closure may have computed the gradients within it
    handle = register_optimizer_step_post_hook(measure)
    yield norms
    handle.remove()


@pytest.mark.parametrize("name", RESUMING)
def test_resumed_training_equals_uninterrupted_training(
    name: str, tmp_path: Path, capsys, gradient_norms: list[float]
) -> None:
    module, steps, factor = RESUMING[name]
    result = run(module.main, steps, tmp_path)
    printed = capsys.readouterr().out
    assert result["losses"][-1] < result["losses"][0] / factor
    # One optimizer step sees the examples of all its micro-batches.
    assert result["batch_sizes"] == steps * [module.BATCH * module.ACCUMULATE]
    assert module.ACCUMULATE > 1
    # Clipping sees the whole gradient before the step does, and had something to clip.
    assert max(gradient_norms) == pytest.approx(module.CLIP, rel=1e-4)
    assert min(gradient_norms) < 0.9 * module.CLIP
    assert len(gradient_norms) == steps * (1.5 + len(result["differences"]) - 1)
    assert result["differences"].pop("resumed") == 0
    assert "resumed: parameters differ by 0.0 from the uninterrupted run" in printed
    # The other ways in which a framework constructs the optimizer; of groups, it cannot
    # know which parameters embeddings look up.
    if name == "huggingface_trainer":
        assert result["differences"].pop("factory") == 0
        assert result["differences"].pop("groups") > 0
        loss = float(printed.partition("groups: loss ")[2].split()[0])
        assert loss < result["losses"][0] / factor
    assert not result["differences"]


@pytest.mark.parametrize("name", RESUMING)
def test_optimizer_state_that_is_lost_fails_the_example(
    name: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(self: SIRFShampoo, state_dict: dict[str, Any]) -> None:
        """Load no state."""

    monkeypatch.setattr(SIRFShampoo, "load_state_dict", forget)
    with pytest.raises(SystemExit) as exit_:
        run(RESUMING[name][0].main, 4, tmp_path)
    assert exit_.value.code == "The runs differ: they should be equal to the bit."
    assert "resumed: parameters differ by 0.0 " not in capsys.readouterr().out


def regression(
    optimizer: Callable[[torch.nn.Module], Optimizer], seen: list[float]
) -> Any:
    """Return a module that notes the norms of the gradients before each step."""

    class Regression(lightning_module.pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            x, y = batch
            return 1000 * (self.net(x) - y).square().mean()

        def configure_optimizers(self) -> Optimizer:
            return optimizer(self.net)

        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            grads = [p.grad for p in self.net.parameters()]
            seen.append(get_total_norm(grads).item())

    return Regression()


OPTIMIZERS = {
    "AdamW": lambda net: torch.optim.AdamW(net.parameters()),
    "SIRFShampoo": lambda net: SIRFShampoo(net, allow_closure=True),
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_lightning_clips_and_calls_hooks_as_with_adamw(
    optimizer: Any, precision: str, gradient_norms: list[float], tmp_path: Path
) -> None:
    seen: list[float] = []
    module = regression(optimizer, seen)
    trainer = lightning_module.pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        gradient_clip_val=0.5,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = lightning_module.teacher_data(0, 64)
    trainer.fit(module, torch.utils.data.DataLoader(data, 16))
    assert trainer.global_step == len(seen) == 4
    assert min(seen) > 0.5  # the hook sees what is not yet clipped
    assert gradient_norms == pytest.approx([0.5] * 4, rel=1e-4)


def test_timm_groups_reach_their_parameters(tmp_path: Path) -> None:
    result = run(timm_style.main, 40, tmp_path / "vit.pt")
    assert result["losses"][-1] < result["losses"][0] / 5
    assert result["accuracy"] > 0.8
    assert result["batch_size"] == timm_style.BATCH
    model = timm_style.SmallViT()
    kappa = recipe(model, batch_size=timm_style.BATCH, steps=40)["kappa"]
    assert result["kappa"] == {
        name: kappa if name.endswith("weight") and p.ndim > 1 else 0.0
        for name, p in model.named_parameters()
    }
    weights = torch.load(tmp_path / "vit.pt", weights_only=True)
    model.load_state_dict(weights)
    generator = torch.Generator().manual_seed(7)
    x, y = timm_style.stripes(generator)
    assert (model(x).argmax(1) == y).float().mean() > 0.8


def test_event_file_holds_the_diagnostics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    diagnostics = SIRFShampoo.diagnostics

    def record(self: SIRFShampoo) -> dict[str, float]:
        seen.append(diagnostics(self))
        return seen[-1]

    monkeypatch.setattr(SIRFShampoo, "diagnostics", record)
    logged = run(tensorboard_logging.main, 33, tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()

    def values(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(tag)]

    assert len(values("train/loss")) == len(values("train/lr")) == 33
    assert values("train/loss")[-1] < values("train/loss")[0] / 5
    assert values("train/lr")[0] == pytest.approx(0.01)
    assert values("train/lr") == sorted(values("train/lr"), reverse=True)
    steps = [*range(0, 33, tensorboard_logging.EVERY), 32]
    assert len(seen) == len(steps)
    assert {f"optimizer/{name}" for name in seen[0]} == {
        tag for tag in events.Tags()["scalars"] if tag.startswith("optimizer/")
    }
    for name in seen[0]:
        tag = f"optimizer/{name}"
        assert [event.step for event in events.Scalars(tag)] == steps
        # An event holds a float32.
        expected = [numbers[name] for numbers in seen]
        assert values(tag) == pytest.approx(expected, rel=1e-6)
        assert logged[tag] == expected
    # Weight and bias of a layer share a pre-conditioner, and so a name.
    layers = {name.partition("/")[0] for name in seen[0]}
    assert layers == {"0.weight+0.bias", "2.weight+2.bias"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_tells_the_options(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        EXAMPLES[name].main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--steps", "--seed", "--output"))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("accelerate_loop", "accelerate"),
        ("huggingface_trainer", "transformers"),
        ("lightning_module", "pytorch_lightning"),
        ("tensorboard_logging", "tensorboard"),
    ],
)
def test_missing_extra_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in sys.modules makes the import fail as if it were not installed.
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(EXAMPLES[name].__file__)
    assert f"No module '{package}'" in exit_.value.code
    assert "pip install -e '.[frameworks]'" in exit_.value.code


@pytest.mark.parametrize("name", EXAMPLES)
def test_wrong_number_of_steps_is_refused(name: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(EXAMPLES[name].main, -1, tmp_path)
    assert exit_.value.code == 2
    assert "got -1" in capsys.readouterr().err
