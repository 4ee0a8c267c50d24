"""A run that is killed at any moment goes on from its last complete checkpoint."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from examples import checkpoints
from examples.checkpoints import Settings, finish, resume

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed runs are forks")
@pytest.mark.parametrize(
    ("kills", "fewest"), [(5, 0), pytest.param(50, 10, marks=pytest.mark.heavy)]
)
def test_killed_runs_end_like_an_uninterrupted_one(
    kills: int, fewest: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.checkpoints.kills"]
    done = subprocess.run(
        [*command, str(kills), str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == kills
    assert all(kill["same"] for kill in found)
    assert any(kill["step"] > 0 for kill in found)
    # every second was to be killed within the writing of a file; some are too fast
    assert sum(kill["writing"] for kill in found) >= fewest


def test_the_command_that_is_killed_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--steps", "60", "--every", "1", "--width", "8", "--folder"]
    command = [sys.executable, str(ROOT / "examples" / "checkpoints.py"), *arguments]
    killed, path = tmp_path / "killed", tmp_path / "killed" / "checkpoint.pt"
    process = subprocess.Popen(
        [*command, str(killed)], env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    try:
        while not path.exists() and process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    printed = []
    for folder in (killed, tmp_path / "whole"):
        checkpoints.main([*arguments, str(folder)])
        printed.append(capsys.readouterr().out)
    assert re.search(r"Going on after step \d+;", printed[0])
    assert "Starting anew;" in printed[1]
    ends = [text[text.index("Validation loss") :] for text in printed]
    assert ends[0] == ends[1]
    assert re.search(r"Digest: [0-9a-f]{64}\n", ends[0])


SETTINGS = Settings(steps=6, every=4, width=8)


def test_a_torn_file_never_takes_the_place_of_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    training = finish(resume(SETTINGS, path), path)
    complete = path.read_bytes()

    def torn(checkpoint: object, file: object) -> None:
        file.write(b"half a file")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write(training.state_dict(), path)
    assert path.read_bytes() == complete
    assert resume(SETTINGS, path).step == SETTINGS.steps


def test_the_last_step_is_kept_though_it_is_no_multiple(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    first = finish(resume(SETTINGS, path), path)
    again = finish(resume(SETTINGS, path), path)
    assert again.step == SETTINGS.steps
    assert again.digest() == first.digest()
    assert again.validate() == first.validate() < 6


def test_a_checkpoint_of_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--folder", str(tmp_path), "--width", "8", "--every", "4"]
    checkpoints.main([*arguments, "--steps", "4"])
    assert "Digest: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"'steps': 4.*Delete .*checkpoint.pt"):
        checkpoints.main([*arguments, "--steps", "5"])
    with pytest.raises(SystemExit):
        checkpoints.main(["--steps", "0"])
    assert "needs a whole number >= 1, got '0'" in capsys.readouterr().err
