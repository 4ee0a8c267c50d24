"""The README's snippets run as they are written, one after the other."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sirfshampoo import SIRFShampoo

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def snippets_of(path: Path) -> list[str]:
    """Return the Python snippets of a page."""
    return re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = snippets_of(README)
    assert len(snippets) == 8
    # 1 to 4 axes, an embedding, linear layers: what the snippets talk about
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3))
    data = [(torch.randint(7, (8,)), torch.randint(3, (8,))) for _ in range(3)]
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "data": data,
        "loss_function": nn.functional.cross_entropy,
        "SIRFShampoo": SIRFShampoo,
    }
    before = model[1].weight.detach().clone()
    for snippet in snippets:
        exec(snippet, names)
    assert names["optimizer"].global_step == len(data)
    assert not torch.equal(model[1].weight, before)
    assert (tmp_path / "optimizer.pt").exists()
    assert (tmp_path / "optimizer.safetensors").exists()


def test_snippets_of_the_page_for_users_of_adamw_run() -> None:
    names: dict[str, Any] = {}
    snippets = snippets_of(ROOT / "docs" / "from_adamw.md")
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet, names)
    SIRFShampoo(names["model"], **names["arguments"])
