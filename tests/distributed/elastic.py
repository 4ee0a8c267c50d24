"""What the test of elasticity runs by torchrun: training of which a rank is killed."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from examples.many_devices import resume, save
from tests.distributed.distributed_cases import (
    batches,
    make_model,
    maker,
    mean_loss,
    share,
    wrapped,
)

MACHINES = 3
STEPS, EVERY = 8, 2
KILLED_IN = {"step": 5, "save": 5}
"""The step, or that before the save; the last complete checkpoint is of step 4."""


def die(*_: Any, **__: Any) -> None:
    """Be no more, and the agent that would start this anew neither."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, way: str, dies_in: str) -> list[tuple[int, int, float]]:
    """Train to the end; return number of ranks, step and loss of all steps taken."""
    model = wrapped(way, make_model())
    optimizer = maker("momentum first")(model, shard_preconditioners=True)
    resume(folder, model, optimizer)
    if dist.get_world_size() < MACHINES and optimizer.global_step == 0:
        signal.pause()  # one is late: when it comes, the agents start all anew
    taken = []
    for step in range(optimizer.global_step, STEPS):
        x, y = batches()[step]
        optimizer.zero_grad()
        loss = mean_loss(model, share(x), share(y), dist.get_world_size())
        loss.backward()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if KILLED_IN.get(dies_in) == step:
            if dies_in == "step":  # the others wait for what is to come
                optimizer._engine.owners.exchange.broadcast = die
            else:
                FileSystemWriter.write_data = die
        optimizer.step()
        taken.append((dist.get_world_size(), step, mean.item()))
        if (step + 1) % EVERY == 0:
            save(folder, model, optimizer)
    return taken


def main(folder: Path, way: str, dies_in: str) -> None:
    """Join the others, train, and write down the losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    taken = train(folder, way, dies_in)
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(taken))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
