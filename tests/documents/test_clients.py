"""Training loops that others ship, unchanged, with SIRFShampoo as their optimizer.

Models, data sets and loops are those of the packages themselves; only the line that
constructs the optimizer is another one. Nothing is downloaded.
"""

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.test_utils import RegressionDataset, RegressionModel
from accelerate.test_utils.scripts import test_script, test_sync
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from pytorch_lightning.demos import boring_classes, lstm, transformer
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from sirfshampoo import SIRFShampoo, recipe

pytestmark = [
    # Lightning 2.6 asks torch's trees in the way of before torch 2.9.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    # peft 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:.*Checkpoint directory .* exists"),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections: nothing may be downloaded."""

    def refuse(*args: Any) -> None:
        raise AssertionError(f"A client connects to {args[1:]}.")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep frameworks from printing, and from what the last test has left in them."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def bits_of(model: nn.Module) -> list[Tensor]:
    """Return copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same_bits(first: nn.Module, second: nn.Module) -> None:
    """Compare the parameters of two models."""
    for a, b in zip(bits_of(first), bits_of(second), strict=True):
        assert torch.equal(a, b)


def falls(losses: list[float], factor: float) -> bool:
    """Return whether a loss falls by a factor, from its start to its end."""
    tenth = max(len(losses) // 10, 1)
    return sum(losses[-tenth:]) * factor < sum(losses[:tenth])


# --- accelerate -----------------------------------------------------------------------
BATCH = 16


def train_regression(
    folder: Path, *, epochs: int, resume: bool = False
) -> tuple[nn.Module, list[float]]:
    """Train accelerate's regression; save after the first half, or go on from it."""
    set_seed(42)
    accelerator = Accelerator(cpu=True)
    model = RegressionModel()
    loader = DataLoader(RegressionDataset(length=64, seed=96), BATCH)
    steps = epochs * len(loader)
    optimizer = SIRFShampoo(model, **recipe(model, batch_size=BATCH, steps=steps))
    rate = optimizer.param_groups[0]["lr"]
    schedule = OneCycleLR(optimizer, rate, steps + 1, cycle_momentum=False)
    model, optimizer, loader, schedule = accelerator.prepare(
        model, optimizer, loader, schedule
    )
    losses = []
    if resume:
        accelerator.load_state(str(folder))
    for epoch in range(epochs // 2 if resume else 0, epochs):
        if epoch == epochs // 2 and not resume:
            accelerator.save_state(str(folder))
        for batch in loader:
            loss = mse_loss(model(batch["x"]), batch["y"])
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return model, losses


def test_accelerates_regression_falls_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, losses = train_regression(tmp_path, epochs=20)
    resumed, rest = train_regression(tmp_path, epochs=20, resume=True)
    # from 0 to 2 and 3 is far for 80 steps: AdamW's come to 0.04
    assert falls(losses, 1.1)
    assert whole.a.item() > 0.2
    assert whole.b.item() > 0.2
    assert rest == losses[len(losses) // 2 :]
    assert_same_bits(whole, resumed)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_accelerates_own_checks_of_accumulation_and_schedules_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[SIRFShampoo] = []

    def construct(params: Any, lr: float) -> SIRFShampoo:
        made.append(SIRFShampoo(list(params), lr=lr, batch_size=32))
        return made[-1]

    monkeypatch.setattr(test_sync, "AdamW", construct)
    test_sync.test_gradient_accumulation_with_opt_and_scheduler()
    # 5 batches: the wrapped one steps once in two of them, and at the end
    assert [optimizer.global_step for optimizer in made] == [5, 3]


def test_accelerates_own_training_check_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SIRFShampoo] = []

    def construct(params: Any, lr: float) -> SIRFShampoo:
        made.append(SIRFShampoo(list(params), lr=lr / 10, batch_size=8))
        return made[-1]

    monkeypatch.setattr(torch.optim, "SGD", construct)
    Accelerator(cpu=True)
    test_script.training_check()
    assert len(made) > 2
    assert {optimizer.global_step for optimizer in made} == {12}


# --- PyTorch Lightning ----------------------------------------------------------------
class SmallSteps:
    """Construct the optimizer of a Lightning module, with a schedule."""

    steps = 64
    per_step = 8

    def configure_optimizers(self: Any) -> Any:
        """Replace the module's own, as its documentation asks users to."""
        net = next(iter(self.children()))  # Lightning does not call `self`
        arguments = recipe(net, batch_size=self.per_step, steps=self.steps)
        optimizer = SIRFShampoo(net, **arguments, allow_closure=True)
        schedule: LRScheduler = OneCycleLR(
            optimizer, arguments["lr"], self.steps + 1, cycle_momentum=False
        )
        scheduler = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Noted:
    """Note the losses; step the schedule where nobody else does."""

    def on_train_batch_end(self: Any, outputs: Any, *_: Any) -> None:
        """Note a loss."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses = [*getattr(self, "losses", []), loss.item()]
        if not self.automatic_optimization:  # then Lightning leaves it to users
            self.lr_schedulers().step()


class Boring(Noted, SmallSteps, boring_classes.BoringModel):
    """Automatic optimization."""

    def train_dataloader(self) -> DataLoader:
        """Return batches of several examples."""
        with torch.random.fork_rng():  # Lightning restores no random numbers
            torch.manual_seed(1)
            return DataLoader(boring_classes.RandomDataset(32, 256), self.per_step)


class ManualBoring(Noted, SmallSteps, boring_classes.ManualOptimBoringModel):
    """Manual optimization."""

    def train_dataloader(self) -> DataLoader:
        """Return batches of several examples."""
        with torch.random.fork_rng():  # Lightning restores no random numbers
            torch.manual_seed(1)
            return DataLoader(boring_classes.RandomDataset(32, 256), self.per_step)


def fit(
    module: pl.LightningModule, folder: Path, resume: Path | None = None, **options: Any
) -> pl.Trainer:
    """Train for two epochs; leave a checkpoint after each, or go on from one."""
    saving = pl.callbacks.ModelCheckpoint(
        folder, filename="{epoch}", save_top_k=0 if resume else -1
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, ckpt_path=resume)
    return trainer


AUTOMATIC = {"gradient_clip_val": 1.0, "limit_val_batches": 2}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Boring, AUTOMATIC), (ManualBoring, {"limit_val_batches": 2})],
    ids=["automatic", "manual"],
)
def test_lightnings_boring_models_fall_and_resume_to_the_bit(
    kind: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    def new() -> Any:
        pl.seed_everything(0, verbose=False)
        return kind()

    whole, resumed = new(), new()
    assert fit(whole, tmp_path, **options).global_step == 64
    fit(resumed, tmp_path, tmp_path / "epoch=0.ckpt", **options)
    assert falls(whole.losses, 1.5)
    assert resumed.losses == whole.losses[32:]
    assert_same_bits(whole, resumed)


def test_a_client_that_loses_the_optimizers_state_does_not_resume_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SIRFShampoo, "load_state_dict", lambda *_: None)
    whole, whole_losses = train_regression(tmp_path, epochs=4)
    resumed, losses = train_regression(tmp_path, epochs=4, resume=True)
    assert losses != whole_losses[len(losses) :]
    assert whole.a.item() != resumed.a.item()


class Text(torch.utils.data.Dataset):
    """In the place of WikiText2, which would be downloaded: t, 5 t + 3, …"""

    vocab_size, length, count = 16, 6, 96

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Return a sequence, and the same one later."""
        tokens = [i * 7 % self.vocab_size]
        for _ in range(self.length):
            tokens.append((5 * tokens[-1] + 3) % self.vocab_size)
        return torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])


class Words:
    """A Lightning language model on text that is at hand."""

    per_step, steps = 8, 24

    def prepare_data(self) -> None:
        """Download nothing."""

    def train_dataloader(self) -> DataLoader:
        """Return the text."""
        return DataLoader(Text(), self.per_step)


class TransformerWords(Words, Noted, SmallSteps, transformer.LightningTransformer):
    """The demo's transformer."""

    def __init__(self) -> None:
        """Make it small."""
        super().__init__(Text.vocab_size)
        small = {"ninp": 16, "nhead": 2, "nhid": 16, "nlayers": 1}
        self.model = transformer.Transformer(Text.vocab_size, **small)


class LSTMWords(Words, Noted, SmallSteps, lstm.LightningLSTM):
    """The demo's LSTM, whose hidden state goes from batch to batch."""

    def __init__(self) -> None:
        """Make it small."""
        super().__init__(Text.vocab_size)
        self.model = lstm.SimpleLSTM(Text.vocab_size, ninp=16, nhid=16, nlayers=1)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("kind", [TransformerWords, LSTMWords])
def test_lightnings_language_models_fall_and_resume(kind: Any, tmp_path: Path) -> None:
    def new() -> Any:
        pl.seed_everything(0, verbose=False)
        module = kind()
        for layer in module.modules():  # Lightning restores no random numbers
            if isinstance(layer, nn.Dropout | nn.MultiheadAttention):
                layer.p = layer.dropout = 0.0
        return module

    whole, resumed = new(), new()
    fit(whole, tmp_path)
    fit(resumed, tmp_path, tmp_path / "epoch=0.ckpt")
    assert falls(whole.losses, 1.1)
    assert resumed.losses == whole.losses[12:]
    assert_same_bits(whole, resumed)


# --- transformers, peft ---------------------------------------------------------------
SEQUENCES = [
    {"input_ids": tokens, "labels": tokens}
    for tokens, _ in (Text()[i] for i in range(96))
]
TINY = {"vocab_size": Text.vocab_size, "bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> nn.Module:
    """Return a tiny GPT-2."""
    sizes = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**TINY, **sizes))


def llama() -> nn.Module:
    """Return a tiny Llama."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**TINY, **sizes, **heads))


def gpt2_with_lora() -> nn.Module:
    """Return a tiny GPT-2 of which adapters alone train."""
    adapters = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    return get_peft_model(gpt2(), adapters)


def trainer_of(make: Callable[[], nn.Module], folder: Path, steps: int) -> Trainer:
    """Set up transformers' own loop."""
    torch.manual_seed(0)
    model = make()
    options = recipe(model, batch_size=16, steps=steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=options["kappa"],
        save_steps=steps // 2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=SEQUENCES,
        optimizer_cls_and_kwargs=(SIRFShampoo, options),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (gpt2, 2.0),
        pytest.param(llama, 2.0, marks=pytest.mark.heavy),
        (gpt2_with_lora, 1.03),
    ],
)
def test_transformers_trainer_falls_and_resumes_to_the_bit(
    make: Callable[[], nn.Module], factor: float, tmp_path: Path
) -> None:
    steps = 30
    whole = trainer_of(make, tmp_path, steps)
    frozen = {
        n: p.clone() for n, p in whole.model.named_parameters() if not p.requires_grad
    }
    whole.train()
    resumed = trainer_of(make, tmp_path, steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps // 2}"))
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert falls(losses, factor)
    assert_same_bits(whole.model, resumed.model)
    assert bool(frozen) == isinstance(whole.model, PeftModel)
    for name, p in whole.model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name])


def test_peft_adapters_train_alone_and_take_all_the_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt2_with_lora()
    optimizer = SIRFShampoo(model, **recipe(model, batch_size=8, steps=20))
    tokens = torch.stack([entry["input_ids"] for entry in SEQUENCES[:8]])
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        assert optimizer.batch_size == 8
        optimizer.zero_grad()
        losses.append(loss.item())
    assert falls(losses, 1.02)
    held = {p for p, entries in optimizer.state.items() if entries}
    assert held == {p for p in model.parameters() if p.requires_grad}
    assert all("lora" in n for n, p in model.named_parameters() if p in held)

    # what peft saves is what was trained
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(gpt2(), str(tmp_path))
    assert_same_bits(model, loaded)


# --- torchmetrics ---------------------------------------------------------------------
def test_torchmetrics_see_the_loss_fall_and_count_nothing_for_the_optimizer() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = SIRFShampoo(model, **recipe(model, batch_size=32, steps=40))
    quality = MetricCollection(
        [MulticlassAccuracy(3), MulticlassF1Score(3, average="macro")]
    )
    mean_loss = MeanMetric()
    epochs = []
    for _ in range(10):
        for inputs, labels in zip(x.split(32), y.split(32), strict=True):
            logits = model(inputs)
            loss = nn.functional.cross_entropy(logits, labels)
            loss.backward()
            quality.update(logits, labels)
            mean_loss.update(loss)
            optimizer.step()
            assert optimizer.batch_size == 32
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            quality(model(x), y)
        model.train()
        epochs.append({**quality.compute(), "loss": mean_loss.compute()})
        quality.reset()
        mean_loss.reset()
    assert falls([epoch["loss"].item() for epoch in epochs], 1.5)
    assert epochs[-1]["MulticlassAccuracy"] > 0.85
    assert np.isfinite([float(v) for epoch in epochs for v in epoch.values()]).all()
