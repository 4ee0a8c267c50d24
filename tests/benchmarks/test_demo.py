"""The pieces of the demo, with few steps."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples import demo

NAMES = list(demo.TASKS)


@pytest.fixture(scope="module")
def tasks() -> dict[str, demo.Task]:
    """The demo's tasks, with less validation data to save time."""
    tasks = {name: make() for name, make in demo.TASKS.items()}
    return {
        name: replace(task, val=(task.val[0][:40], task.val[1][:40]))
        for name, task in tasks.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_contestants_start_alike_and_improve(tasks, name: str) -> None:
    runs = [
        demo.train(tasks[name], contestant, steps=12, seed=3)
        for contestant in tasks[name].contestants
    ]
    assert len({run.losses[0] for run in runs}) == 1
    for run in runs:
        assert run.steps == list(range(13))
        assert run.losses[-1] == run.val_loss < run.losses[0]
        assert 0 < run.accuracy <= 100
        assert run.seconds == sorted(run.seconds)
        assert run.state_bytes > 0


def test_same_seed_gives_the_same_run(tasks) -> None:
    first, again, other = (
        demo.train(tasks["digits"], "SIRFShampoo", steps=3, seed=seed).losses
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_state_bytes_count_tensors_of_the_optimizer(tasks) -> None:
    task = tasks["digits"]
    numbers = sum(p.numel() for p in task.make_model().parameters())
    run = demo.train(task, "SGD", steps=1, seed=0)
    assert run.state_bytes == 4 * numbers


def test_validation_text_was_never_trained_on(tasks) -> None:
    (inputs, targets), (val_inputs, _) = tasks["text"].train, tasks["text"].val
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    start = inputs.storage_offset(), val_inputs.storage_offset()
    last_trained = start[0] + len(inputs) - 1 + inputs.shape[1]
    assert (
        inputs.untyped_storage().data_ptr() == val_inputs.untyped_storage().data_ptr()
    )
    assert last_trained < start[1]


def test_transformer_does_not_look_ahead(tasks) -> None:
    model = tasks["text"].make_model().eval()
    text = tasks["text"].val[0][:1]
    changed = text.clone()
    changed[0, 40:] = 0
    difference = (model(text) - model(changed)).abs().amax(-1)[0]
    assert difference[:40].max() == 0
    assert difference[40:].max() > 0


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    factors = [demo.warmup_cosine(step, steps=400) for step in range(401)]
    assert factors[0] == pytest.approx(1 / 40)
    assert factors[39] == factors[40] == 1
    assert factors[220] == pytest.approx(0.5)
    assert factors[400] == pytest.approx(0)
    assert factors[40:] == sorted(factors[40:], reverse=True)
    assert all(map(math.isfinite, (demo.warmup_cosine(s, steps=1) for s in (0, 1))))


RUNS = [
    demo.Run("text", "AdamW", train_loss=2.0, val_loss=1.9, ms=30, state_bytes=900),
    demo.Run("text", "SIRFShampoo", train_loss=1.5, val_loss=1.6, ms=50),
]


def test_mean_of_runs_averages_numbers_and_curves() -> None:
    first = demo.Run("digits", "SGD", [0, 5], [0, 1], [4, 2], 1, 2, 90, 3, 8)
    second = demo.Run("digits", "SGD", [0, 5], [0, 3], [2, 2], 3, 2, 92, 5, 8)
    mean = demo.Run("digits", "SGD", [0, 5], [0, 2], [3, 2], 2, 2, 91, 4, 8)
    assert demo.mean_of([first, second]) == mean


def test_verdict_names_gains_and_losses() -> None:
    (line,) = demo.verdicts([replace(run, accuracy=50) for run in RUNS])
    leads, loses = line.split("; ")
    assert "train loss (1.5000, AdamW 2.0000)" in leads
    assert "state bytes (0, AdamW 900)" in leads
    assert loses == "it loses in ms per step (50.0, AdamW 30.0)."


def test_command_draws_the_curves_and_prints_where(tmp_path: Path, capsys) -> None:
    picture = tmp_path / "new folder" / "curves.png"
    demo.main(["--task", "digits", "--steps", "2", "--output", str(picture)])
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in printed
    for contestant in demo.TASKS["digits"]().contestants:
        assert f"digits: {contestant} reached validation loss" in printed


@pytest.mark.parametrize("wrong", ["0", "-3", "ten"])
def test_wrong_number_of_steps_is_refused(wrong: str, capsys) -> None:
    with pytest.raises(SystemExit):
        demo.main([f"--steps={wrong}"])
    assert f"needs a whole number >= 1, got '{wrong}'" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["curves.txt", f"{__file__}/curves.png"])
def test_picture_that_cannot_be_written_is_refused_early(wrong: str, capsys) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--output", wrong])
    message = capsys.readouterr().err
    assert "needs a .png, .pdf or .svg" in message or "cannot make the fold" in message


def test_missing_extra_says_what_to_install() -> None:
    # None in sys.modules makes the import fail as if it were not installed.
    code = "import sys; sys.modules['matplotlib'] = None; import examples.demo"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "needs the module 'matplotlib" in done.stderr
    assert "pip install -e '.[demo]'" in done.stderr
