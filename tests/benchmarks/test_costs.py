"""What well-known models would cost is what the package counts today."""

import json

import torch

from benchmarks import costs


def test_the_figures_of_the_page_on_costs() -> None:
    with torch.device("meta"):
        model = costs.models()["GPT-2"]()
    recorded = json.loads(costs.FILE.read_text("utf-8"))["models"]["GPT-2"]
    numbers = sum(p.numel() for p in model.parameters())
    assert recorded["numbers"] == numbers
    for name, told in costs.settings(model).items():
        counted = told()
        peaks = {
            "peak_flops": counted.peak_flops,
            "spread_peak_flops": counted.spread_peak_flops,
        }
        assert recorded["settings"][name] == counted.totals | peaks, (
            f"{name}: run `make costs`, then `make report`"
        )
