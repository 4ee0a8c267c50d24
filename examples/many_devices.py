"""Train a character transformer on several processes, one a device.

    torchrun --nproc-per-node 2 examples/many_devices.py                     # DDP
    torchrun --nproc-per-node 2 examples/many_devices.py --way fsdp          # FSDP2
    torchrun --nproc-per-node 2 examples/many_devices.py --shard-preconditioners

Kill it, and start it again with the same folder, on as many processes as you like: it
goes on from the last complete checkpoint. On GPUs it takes one for each process.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

try:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from sirfshampoo import SIRFShampoo
except ModuleNotFoundError as missing:
    sys.exit(
        f"The example needs the module {missing.name!r}: `make setup` installs all, or "
        "`pip install -e '.[demo]'` in the root of the repository."
    )

CONTEXT = 32  # characters
BATCH = 32  # sequences in a step, on all ranks together


# ----------------------------------------------------------------------- model


class Block(nn.Module):
    """Attention to what came before, then a small network for each character."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # [batch, heads, time, width / heads]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Predicts the next character at every place."""

    def __init__(self, letters: int, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(letters, width)
        self.place = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(layers))
        self.head = nn.Linear(width, letters)

    def forward(self, text: Tensor) -> Tensor:  # [batch, time]
        places = torch.arange(text.shape[1], device=text.device)
        x = self.token(text) + self.place(places)
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(0, 1))  # [batch * time, letters]


def read_text() -> tuple[Tensor, int]:
    """Return the help texts that Python ships as numbers, and how many letters."""
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    vocabulary = {char: i for i, char in enumerate(sorted(set(text)))}
    return torch.tensor([vocabulary[char] for char in text]), len(vocabulary)


# -------------------------------------------------------------------- training


def distribute(model: nn.Module, way: str, device: str) -> nn.Module:
    """Make a model one of several ranks."""
    if way == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch_of(stream: Tensor, step: int, device: str) -> tuple[Tensor, Tensor]:
    """Return this rank's share of the batch of a step.

    It follows from the step alone, so that a run may go on with other ranks.
    """
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(len(stream) - CONTEXT - 1, (BATCH,), generator=draw)
    mine = starts.tensor_split(dist.get_world_size())[dist.get_rank()]
    rows = torch.stack([stream[i : i + CONTEXT + 1] for i in mine.tolist()]).to(device)
    return rows[:, :-1], rows[:, 1:]


def loss_on(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return this rank's part of the mean cross-entropy over the whole batch.

    Gradients are averaged over ranks, which may have unequal shares.
    """
    total = F.cross_entropy(model(x), y.flatten(), reduction="sum")
    return total * dist.get_world_size() / (BATCH * CONTEXT)


# ----------------------------------------------------------------- checkpoints


def save(folder: Path, model: nn.Module, optimizer: SIRFShampoo) -> None:
    """Write a checkpoint; until it is complete, the last one stays the last."""
    name = f"step-{optimizer.global_step}"
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.save(state, checkpoint_id=folder / name)  # each rank writes what it has
    if dist.get_rank() == 0:
        partial = folder / "latest.partial"
        partial.write_text(name)
        os.replace(partial, folder / "latest")  # in one piece, or not at all
        for other in folder.glob("step-*"):
            if other.name != name:
                shutil.rmtree(other)
    dist.barrier()


def resume(folder: Path, model: nn.Module, optimizer: SIRFShampoo) -> None:
    """Go on from the last complete checkpoint, if there is one."""
    latest = folder / "latest"
    if not latest.exists():
        return
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder / latest.read_text())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


# ------------------------------------------------------------------------ main


def positive(text: str) -> int:
    """Read a whole number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number >= 1, got {text!r}")
    return int(text)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--way", choices=("ddp", "fsdp"), default="ddp", help="default: %(default)s")
    add(
        "--shard-preconditioners",
        action="store_true",
        help="keep each pre-conditioner on one rank alone",
    )
    add("--steps", type=positive, default=200, help="default: %(default)s")
    add("--every", type=positive, default=50, help="steps between checkpoints")
    add("--width", type=positive, default=64, help="default: %(default)s")
    add("--layers", type=positive, default=2, help="default: %(default)s")
    add("--folder", type=Path, default="out/many_devices", help="default: %(default)s")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, device: str) -> float:
    """Train to the end, on this rank; return the loss on a batch not yet seen."""
    torch.manual_seed(0)
    stream, letters = read_text()
    model = Transformer(letters, args.width, args.layers).to(device)
    model = distribute(model, args.way, device)
    optimizer = SIRFShampoo(
        model,
        lr=1e-3,
        beta2=0.2,  # the default is too slow for a few hundred steps
        lam=1e-4,
        structures={1: "diagonal", 2: "dense"},
        shard_preconditioners=args.shard_preconditioners,
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    resume(args.folder, model, optimizer)

    first = dist.get_rank() == 0
    console = Console(highlight=False, soft_wrap=True, quiet=not first)
    console.print(
        f"{dist.get_world_size()} ranks, {args.way}, from step {optimizer.global_step}"
    )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console)
    task = bar.add_task("steps", total=args.steps, completed=optimizer.global_step)
    with bar if first else nullcontext():
        while optimizer.global_step < args.steps:
            x, y = batch_of(stream, optimizer.global_step, device)
            optimizer.zero_grad()
            loss_on(model, x, y).backward()
            optimizer.step()
            if (
                optimizer.global_step % args.every == 0
                or optimizer.global_step == args.steps
            ):
                save(args.folder, model, optimizer)
            bar.update(task, completed=optimizer.global_step)
    with torch.no_grad():
        mean = loss_on(model, *batch_of(stream, args.steps, device))
    dist.all_reduce(mean.div_(dist.get_world_size()))
    kept = sum(
        t.numel() * t.element_size()
        for entries in optimizer.state.values()
        for t in (getattr(t, "_local_tensor", t) for t in entries.values())
    )
    console.print(f"Loss of the next batch: {mean.item():.6f}")
    console.print(f"State of the optimizer on rank 0: {kept / 2**20:.2f} MiB")
    return mean.item()


def main(argv: list[str] | None = None) -> None:
    """Join the other ranks, train, and leave."""
    args = read_arguments(argv)
    if "RANK" not in os.environ:
        sys.exit("Start it by torchrun: see --help.")
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # what ranks tell each other of checkpoints goes between CPUs
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        train(args, device)
        dist.barrier()  # nobody leaves while another still listens
    finally:
        gc.collect()  # what refers to groups goes before them
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
