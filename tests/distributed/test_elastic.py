"""A job that loses a rank goes on with the others, from its last checkpoint."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.distributed_cases import batches, make_model, maker, mean_loss
from tests.distributed.elastic import STEPS


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def agent(port: int, host: bool, *arguments: str) -> subprocess.Popen[str]:
    """Start torchrun as on one of three machines, of which two suffice."""
    conf = f"is_host={int(host)}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2:3"]
    command += ["--nproc-per-node", "1", "--max-restarts", "3"]
    command += ["--monitor-interval", "0.1", "--rdzv-id", "test"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command += ["--rdzv-conf", f"{conf},last_call_timeout=3,keep_alive_interval=1"]
    command += ["--local-addr", "localhost", "-m", "tests.distributed.elastic"]
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    # with the agents' own store, a second restart may find addresses of the first
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(
        [*command, *arguments],
        env={**environment, "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses_alone() -> list[float]:
    """Return the losses of a run by one process that nothing interrupts."""
    model = make_model()
    optimizer = maker("momentum first")(model, process_group=False)
    losses = []
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        loss = mean_loss(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.heavy
@pytest.mark.parametrize(("way", "dies_in"), [("ddp", "save"), ("fsdp", "step")])
def test_two_of_three_ranks_go_on(tmp_path: Path, way: str, dies_in: str) -> None:
    port = free_port()
    ends = ["nowhere", "nowhere", dies_in]
    agents = [
        agent(port, i == 0, str(tmp_path), way, end) for i, end in enumerate(ends)
    ]
    try:
        told = [each.communicate(timeout=500)[0] for each in agents]
    finally:
        for each in agents:
            each.kill()
    assert [each.returncode for each in agents] == [0, 0, -9], "\n".join(told)
    taken = json.loads((tmp_path / "losses.json").read_text())
    expected = losses_alone()
    assert [(ranks, step) for ranks, step, _ in taken] == [
        (2, step) for step in range(4, STEPS)
    ]
    for _, step, loss in taken:
        assert abs(loss - expected[step]) < 1e-10
    assert expected[-1] < expected[4]
