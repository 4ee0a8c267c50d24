"""What well-known models would cost, counted from shapes: `python -m benchmarks.costs`.

Nothing is allocated: models are built on the meta device, from the configurations that
transformers has by default.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.environment import describe
from benchmarks.results import RESULTS
from benchmarks.tables import Grid
from sirfshampoo import Summary, choose_structures, recipe, summary

FILE = RESULTS / "costs.json"


def models() -> dict[str, Callable[[], nn.Module]]:
    """Return what builds each model."""
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    xl = {"n_embd": 1600, "n_layer": 48, "n_head": 25}
    billion = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }
    return {
        "ResNet-50": lambda: ResNetForImageClassification(
            ResNetConfig(num_labels=1000)
        ),
        "ViT-B/16": lambda: ViTForImageClassification(ViTConfig(num_labels=1000)),
        "BERT base": lambda: BertModel(BertConfig()),
        "GPT-2": lambda: GPT2LMHeadModel(GPT2Config()),
        "GPT-2 XL": lambda: GPT2LMHeadModel(GPT2Config(**xl)),
        "Llama 3.2 1B": lambda: LlamaForCausalLM(LlamaConfig(**billion)),
        "Llama 2 7B": lambda: LlamaForCausalLM(LlamaConfig()),
    }


def settings(model: nn.Module) -> dict[str, Callable[[], Summary]]:
    """Return what counts the costs of each way to set the optimizer up."""
    return {
        "recipe": lambda: summary(model, **recipe(model, batch_size=32, steps=1000)),
        "recipe, bfloat16": lambda: summary(
            model,
            **recipe(model, batch_size=32, steps=1000),
            preconditioner_dtypes=torch.bfloat16,
        ),
        "choose_structures": lambda: summary(model, choose_structures(model), T=10),
        "diagonal": lambda: summary(model, structures="diagonal"),
        "dense": lambda: summary(model, T=10),
    }


def count() -> dict[str, Any]:
    """Count all models."""
    counted: dict[str, Any] = {"environment": describe(1), "models": {}}
    for name, build in models().items():
        with torch.device("meta"):
            model = build()
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        entry: dict[str, Any] = {"numbers": numbers, "settings": {}}
        for setting, told in settings(model).items():
            found = told()
            entry["settings"][setting] = found.totals | {
                "peak_flops": found.peak_flops,
                "spread_peak_flops": found.spread_peak_flops,
            }
        counted["models"][name] = entry
    return counted


def table(result: Mapping[str, Any]) -> Grid:
    """Tell bytes and operations of each model."""
    found = result["models"]
    names = list(next(iter(found.values()))["settings"])
    header = ("GiB of state", "parameters", "AdamW", *names)
    lines = [
        (
            model,
            f"{entry['numbers'] / 1e6:,.0f} M",
            _gib(8 * entry["numbers"]),
            *(_gib(_kept(entry["settings"][name])) for name in names),
        )
        for model, entry in found.items()
    ]
    note = (
        "Counted, not measured: all that the optimizer keeps, what it keeps of K Kᵀ "
        "between updates included; parameters, and factors unless said, in float32."
    )
    return Grid(header, lines, [note])


def operations(result: Mapping[str, Any]) -> Grid:
    """Tell the operations of a step, in those of the model on one token or image."""
    lines = []
    for model, entry in result["models"].items():
        cells = [model]
        for name in ("recipe", "choose_structures", "diagonal"):
            told = entry["settings"][name]
            cells += [f"{told['step_flops'] / 1e9:,.1f}"]
            cells += [f"{told['update_flops'] / 1e9:,.1f}"]
        lines.append(tuple(cells))
    header = (
        "10⁹ operations",
        "recipe: step",
        "and update",
        "choose_structures: step",
        "and update",
        "diagonal: step",
        "and update",
    )
    note = (
        "Counted, not measured. Step: to pre-condition the gradients; update: of the "
        "factors, on top of it, in the steps that `T` says. A forward and a backward "
        "pass take about 6 operations a parameter and token."
    )
    return Grid(header, lines, [note])


def _kept(told: Mapping[str, int]) -> int:
    return told["state_bytes"] + told["kept_bytes"]


def _gib(number: int) -> str:
    return f"{number / 2**30:,.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args(argv)
    args.output.write_text(json.dumps(count(), indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
