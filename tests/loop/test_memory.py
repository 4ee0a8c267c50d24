"""What does not fit into free memory is refused before it is allocated."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sirfshampoo import SIRFShampoo, summary
from sirfshampoo._report import memory
from sirfshampoo._report.memory import free_bytes
from tests.cases import CONFIGS, SHAPES, Tensors
from tests.conftest import LargestTensor

CPU = torch.device("cpu")
GIB = 2**30

LetFree = Callable[[int | None], None]


@pytest.fixture
def let_free(monkeypatch: pytest.MonkeyPatch) -> LetFree:
    """Say how much memory is free."""

    def let(number: int | None) -> None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: number)

    return let


def gpt2_embedding() -> nn.Module:
    """Return an embedding as long as GPT-2's, but narrow: it is really built."""
    model = nn.Module()
    model.tokens = nn.Embedding(50257, 8)
    model.norm = nn.LayerNorm(8)
    return model


# --- refused --------------------------------------------------------------------------
def test_a_dense_factor_of_a_vocabulary_is_refused_by_name(
    let_free: LetFree, largest_tensor: LargestTensor
) -> None:
    let_free(16 * GIB)
    model = gpt2_embedding()
    needed = summary(model).totals["state_bytes"]
    assert needed > 20e9  # the factor and its momentum: 20 GB
    with largest_tensor, pytest.raises(MemoryError) as caught:
        SIRFShampoo(model)
    assert largest_tensor.numbers == 0
    message = str(caught.value)
    assert f"needs 18.8 GiB ({needed:,} bytes) on cpu" in message
    assert f"16.0 GiB ({16 * GIB:,} bytes) are free" in message
    assert "axis 0 of 'tokens.weight', 50,257 long, 'dense', 18.8 GiB" in message
    assert "structures={2: ('diagonal', 'dense')}" in message
    assert "choose_structures(model)" in message
    assert message.index("tokens.weight") < message.index("norm.weight")


def test_what_the_message_says_to_write_is_accepted(let_free: LetFree) -> None:
    let_free(16 * GIB)
    model = gpt2_embedding()
    groups = [
        {"params": [model.tokens.weight], "structures": {2: ("diagonal", "dense")}},
        {"params": list(model.norm.parameters())},
    ]
    assert len(SIRFShampoo(model, groups).param_groups) == 3


def test_a_factor_of_terabytes_is_refused_on_this_very_machine(
    largest_tensor: LargestTensor,
) -> None:
    model = Tensors([(3, 2), (2_000_000,)], torch.float32)
    with largest_tensor, pytest.raises(MemoryError, match=r"29\.1 TiB") as caught:
        SIRFShampoo(model)
    assert largest_tensor.numbers == 0
    assert "axis 0 of 'tensors.1', 2,000,000 long, 'dense'" in str(caught.value)
    assert "structures={1: ('diagonal',)}" in str(caught.value)
    SIRFShampoo(model, structures="diagonal")


def test_a_refused_group_leaves_the_optimizer_as_it_was(let_free: LetFree) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 40))
    optimizer = SIRFShampoo(model, list(model[0].parameters()), batch_size=2)
    let_free(10_000)  # enough for the first layer
    before = deepcopy(optimizer.state_dict())
    with pytest.raises(MemoryError, match=r"axis 0 of '1\.weight', 40 long"):
        optimizer.add_param_group({"params": list(model[1].parameters())})
    assert str(optimizer.state_dict()) == str(before)
    assert set(optimizer.state) == set(model[0].parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    let_free(100_000)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert len(optimizer.param_groups) == 4
    optimizer.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_limit_is_what_the_summary_says(name: str, let_free: LetFree) -> None:
    model = Tensors(SHAPES, torch.float32)
    totals = summary(model, **CONFIGS[name]).totals
    needed = totals["state_bytes"] + totals["kept_bytes"]
    let_free(needed - 1)
    with pytest.raises(MemoryError, match=f"{needed:,} bytes"):
        SIRFShampoo(model, **CONFIGS[name])
    let_free(needed)
    SIRFShampoo(model, **CONFIGS[name])


def test_where_the_structure_is_lean_already_the_message_says_something_else(
    let_free: LetFree,
) -> None:
    let_free(100)
    with pytest.raises(MemoryError, match="alpha2=0") as caught:
        SIRFShampoo(Tensors([(100, 4)], torch.float32), structures="diagonal")
    assert "preconditioner_dtypes=torch.bfloat16" in str(caught.value)
    assert "structures=" not in str(caught.value)


def test_both_axes_of_equal_length_become_diagonal(let_free: LetFree) -> None:
    let_free(100)
    with pytest.raises(MemoryError, match=r"\('diagonal', 'dense', 'diagonal'\)"):
        SIRFShampoo(Tensors([(50, 3, 50)], torch.float32))


# --- not refused ----------------------------------------------------------------------
def test_unknown_memory_is_no_reason_to_refuse(let_free: LetFree) -> None:
    let_free(None)
    SIRFShampoo(nn.Linear(3, 2))


def test_a_model_on_the_meta_device_is_never_refused() -> None:
    with torch.device("meta"):
        model = nn.Embedding(3_000_000, 4)
    assert free_bytes(torch.device("meta")) is None
    assert len(SIRFShampoo(model).param_groups) == 1


def test_a_summary_shows_what_construction_refuses(let_free: LetFree) -> None:
    let_free(0)
    assert summary(nn.Linear(3, 2)).totals["state_bytes"] > 0


# --- what is free ---------------------------------------------------------------------
def test_this_machine_has_some_memory_free() -> None:
    free = free_bytes(CPU)
    assert free is None or 2**20 < free < 2**60


MEMINFO = "MemTotal:       100 kB\nMemFree:        5 kB\nMemAvailable:   50 kB\n"


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


SYSTEMS: dict[str, tuple[dict[str, str], int | None]] = {
    "nothing-known": ({}, None),
    "no-limit": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a\n",
            "cgroup/a/memory.max": "max\n",
            "cgroup/a/memory.current": "123\n",
        },
        50 * 1024,
    ),
    "version-2": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "cgroup/a/b/memory.max": "9000\n",
            "cgroup/a/b/memory.current": "8000\n",
            "cgroup/a/b/memory.stat": "anon 7000\nactive_file 100\ninactive_file 200\n",
        },
        1300,
    ),
    "the-parent-has-less": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "cgroup/a/b/memory.max": "9000\n",
            "cgroup/a/b/memory.current": "100\n",
            "cgroup/a/memory.max": "9000\n",
            "cgroup/a/memory.current": "8900\n",
        },
        100,
    ),
    "the-root-of-a-container": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/\n",
            "cgroup/memory.max": "9000\n",
            "cgroup/memory.current": "9100\n",
        },
        0,
    ),
    "version-1": (
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
            "cgroup/memory/a/memory.limit_in_bytes": "7000\n",
            "cgroup/memory/a/memory.usage_in_bytes": "5000\n",
        },
        2000,
    ),
    "no-control-groups": ({"proc/meminfo": MEMINFO}, 50 * 1024),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_free_memory_is_the_least_that_system_and_groups_leave(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, expected = SYSTEMS[system]
    lay_out(tmp_path, files)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    assert free_bytes(CPU) == expected


def test_on_a_gpu_what_torch_holds_unused_counts_as_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: dict[str, Any] = {
        "mem_get_info": (1000, 9000),
        "memory_reserved": 500,
        "memory_allocated": 200,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_bytes(torch.device("cuda", 0)) == 1300


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_refuses_what_it_cannot_hold() -> None:
    model = nn.Embedding(1_000_000, 4, device="cuda")
    allocated = torch.cuda.memory_allocated()
    with pytest.raises(MemoryError, match="on cuda:0"):
        SIRFShampoo(model)
    assert torch.cuda.memory_allocated() == allocated
    SIRFShampoo(model, structures="diagonal")
