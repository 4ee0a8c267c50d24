"""Train a tiny GPT-2 with the Trainer of transformers: accumulate, resume, compare.

The model comes from a configuration, its text from a rule; nothing is downloaded.

    python examples/huggingface_trainer.py --help
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

try:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        get_scheduler,
    )
    from transformers.utils import logging
except ModuleNotFoundError as missing:
    sys.exit(f"No module {missing.name!r}: run `pip install -e '.[frameworks]'`.")

from sirfshampoo import SIRFShampoo, recipe

VOCABULARY, LENGTH = 32, 16
BATCH, ACCUMULATE = 8, 2  # an optimizer step sees 8 * 2 sequences
CLIP = 1.0  # the largest norm of a gradient


def sequences(seed: int) -> list[dict[str, torch.Tensor]]:
    """Make texts in which the next token is 5 t + 3 (modulo the vocabulary)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (256, 1), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append((5 * tokens[-1] + 3) % VOCABULARY)
    return [{"input_ids": row, "labels": row} for row in torch.cat(tokens, dim=1)]


def make_trainer(route: str, folder: Path, *, steps: int, seed: int) -> Trainer:
    """Hand SIRFShampoo to the Trainer by one of the three routes that it has."""
    torch.manual_seed(seed)
    sizes = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ends))
    options = recipe(model, batch_size=BATCH * ACCUMULATE, steps=steps)
    warm_up = steps // 10
    if route == "optimizers":  # you construct
        optimizer = SIRFShampoo(model, **options)
        schedule = get_scheduler("cosine", optimizer, warm_up, num_training_steps=steps)
        given: dict[str, Any] = {"optimizers": (optimizer, schedule)}
    elif route == "factory":  # the Trainer calls SIRFShampoo(model, **options)
        given = {"optimizer_cls_and_kwargs": (lambda: SIRFShampoo, options)}
    else:  # the Trainer calls SIRFShampoo(groups, **options), with a decay by group;
        # parameters alone do not tell which of them are looked up by embeddings
        given = {"optimizer_cls_and_kwargs": (SIRFShampoo, options)}
    arguments = TrainingArguments(
        output_dir=str(folder / route),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        max_grad_norm=CLIP,
        lr_scheduler_type="cosine",
        warmup_steps=warm_up,
        weight_decay=options["kappa"],
        save_steps=steps // 2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = Trainer(model, arguments, train_dataset=sequences(seed), **given)
    trainer.remove_callback(PrinterCallback)  # it prints every entry of the log
    trainer.create_optimizer()  # `train` would do it, too
    return trainer


def largest_difference(first: Trainer, second: Trainer) -> float:
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="even; default: 40")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="out/huggingface", help="folder")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.steps % 2:
        parser.error(f"argument --steps: needs an even number >= 2, got {args.steps}")
    logging.set_verbosity_error()  # tied weights: the checkpoint lacks 'lm_head.weight'
    logging.disable_progress_bar()
    how = {"steps": args.steps, "seed": args.seed}

    whole = make_trainer("optimizers", args.output, **how)
    sizes: list[int] = []
    whole.optimizer.register_step_pre_hook(
        lambda optimizer, *_: sizes.append(optimizer.batch_size)
    )
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {args.steps} steps")
    print(f"examples in a step: {set(sizes)} ({ACCUMULATE} micro-batches of {BATCH})")

    resumed = make_trainer("optimizers", args.output, **how)
    checkpoint = args.output / "optimizers" / f"checkpoint-{args.steps // 2}"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    others = {"resumed": resumed}
    for route in ("factory", "groups"):
        others[route] = make_trainer(route, args.output, **how)
        others[route].train()
    differences = {
        name: largest_difference(whole, other) for name, other in others.items()
    }
    for name, difference in differences.items():
        print(f"{name}: parameters differ by {difference} from the uninterrupted run")
    last = others["groups"].state.log_history[-2]["loss"]
    print(f"groups: loss {last:.4f}")
    if differences["resumed"] or differences["factory"]:
        sys.exit("The runs differ: they should be equal to the bit.")
    return {"losses": losses, "batch_sizes": sizes, "differences": differences}


if __name__ == "__main__":
    main()
