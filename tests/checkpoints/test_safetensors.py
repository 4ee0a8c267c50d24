"""The state goes through safetensors, which holds nothing but tensors and text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sirfshampoo import SIRFShampoo
from tests.cases import FAST, MODELS, STRUCTURES, alternate, build, mixture

MIXED = alternate(torch.bfloat16, None, torch.float64, torch.float16)
StateDict = dict[str, Any]


def to_file(state_dict: StateDict, path: Path) -> dict[str, Tensor]:
    """Write the tensors of a state dict as they are; return them under their names."""
    tensors = {
        f"{number}.{key}": tensor
        for number, entries in state_dict["state"].items()
        for key, tensor in entries.items()
    }
    save_file(tensors, path)
    return tensors


def from_file(like: StateDict, path: Path) -> StateDict:
    """Return a state dict with the tensors of a file, and the groups of another."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        number, key = name.split(".", maxsplit=1)
        state.setdefault(int(number), {})[key] = tensor
    return {"state": state, "param_groups": like["param_groups"]}


def trained(model: str, config: dict[str, Any], steps: int) -> tuple[Any, ...]:
    """Return a model with its optimizer and data after some steps."""
    torch.manual_seed(5)
    net, x, y = build(model, batch=4, dtype=torch.float32)
    run = net, SIRFShampoo(net, **config), x, y
    train(run, steps)
    return run


def train(run: tuple[Any, ...], steps: int) -> None:
    """Take some steps."""
    net, optimizer, x, y = run
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


def assert_goes_through(model: str, config: dict[str, Any], path: Path) -> None:
    """Assert that a run resumed from a file ends like one that was not interrupted."""
    whole, resumed = trained(model, config, steps=3), trained(model, config, steps=0)
    written = to_file(whole[1].state_dict(), path)
    for name, tensor in load_file(path).items():
        assert tensor.dtype == written[name].dtype
        assert torch.equal(tensor, written[name])
    # rows of stacks share memory, but each is written once, and alone
    payload = sum(tensor.nbytes for tensor in written.values())
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + payload

    resumed[0].load_state_dict(whole[0].state_dict())
    resumed[1].load_state_dict(from_file(whole[1].state_dict(), path))
    assert resumed[1].global_step == 3
    train(whole, steps=3)
    train(resumed, steps=3)
    for p, q in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)
        ours, theirs = whole[1].state[p], resumed[1].state[q]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            assert torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize(
    "structures", [*STRUCTURES, mixture(1)], ids=[*STRUCTURES, "mixture"]
)
@pytest.mark.parametrize(
    "dtypes", [None, torch.bfloat16, MIXED], ids=["as-parameters", "bfloat16", "mixed"]
)
def test_every_structure_and_type_goes_through(
    structures: Any, dtypes: Any, tmp_path: Path
) -> None:
    config = {**FAST, "structures": structures, "preconditioner_dtypes": dtypes}
    for model in ("mlp-axes-61-and-33", "mlp-equal-layers"):
        assert_goes_through(model, config, tmp_path / "state.safetensors")


@pytest.mark.parametrize("model", [name for name in MODELS if name != "channels-last"])
def test_every_model_goes_through(model: str, tmp_path: Path) -> None:
    config = {**FAST, "structures": mixture(2), "preconditioner_dtypes": MIXED}
    assert_goes_through(model, config, tmp_path / "state.safetensors")


def test_momentum_with_channels_last_has_to_be_made_contiguous(tmp_path: Path) -> None:
    # the momentum lies in memory like its parameter; safetensors knows one layout only
    model, optimizer, *_ = trained("channels-last", FAST, steps=2)
    state_dict, path = optimizer.state_dict(), tmp_path / "state.safetensors"
    with pytest.raises(
        ValueError, match=r"non contiguous tensor: `\d.momentum_buffer`"
    ):
        to_file(state_dict, path)
    for entries in state_dict["state"].values():
        entries |= {key: tensor.contiguous() for key, tensor in entries.items()}
    to_file(state_dict, path)
    optimizer.load_state_dict(from_file(state_dict, path))
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert momentum.is_contiguous(memory_format=torch.channels_last)
