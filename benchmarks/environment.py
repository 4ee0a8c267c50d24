"""Where a measurement was taken, and the folders of the packages beside this one."""

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES: dict[str, tuple[str, ...]] = {
    "official": ("sirfshampoo==0.0.1", "singd==0.0.5", "einops==0.8.2"),
    "pytorch-optimizer": ("pytorch-optimizer==4.1.0",),
    "heavyball": ("heavyball==3.2.1", "opt-einsum==3.4.0"),
}
"""What is installed into a folder of its own, but torch and numpy."""

IMPORT_NAMES = {"pytorch-optimizer": "pytorch_optimizer", "heavyball": "heavyball"}
"""What a package is imported as, if not as `sirfshampoo`."""


def cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for products of bfloat16.

    Without, they take up to sixty times as long as products of float32.
    """
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def describe(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Return the facts that a measurement depends on."""
    config = torch.__config__.show().splitlines()
    wanted = ("CPU capability", "MKL", "Math Kernel", "OpenMP")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_config": [
            line.strip(" -").split(" (")[0]
            for line in config
            if any(word in line for word in wanted) and len(line) < 120
        ],
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": cores(),
        "threads": threads,
        "multiplies_bfloat16": device != "cpu" or multiplies_bfloat16(),
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    found = {line.partition(":")[0].strip(): line.partition(":")[2] for line in lines}
    return found.get("model name", platform.processor() or "unknown").strip()


def _commit() -> str | None:
    """Return the commit that was measured, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return out.stdout.strip() or None


def folder_of(package: str) -> Path:
    """Install one of `PACKAGES` into a folder of its own, unless it is there.

    The official package shares its import name with this one, so it must not enter the
    environment; nor need the others. Dependencies are named one by one: resolved, they
    would pull in another build of torch.

    Returns:
        The folder to put on the path of the process that measures it.

    Raises:
        RuntimeError: If pip fails, for example without a network.
    """
    wanted = PACKAGES[package]
    target = ROOT / "build" / "-".join(wanted).replace("==", "-")
    if target.is_dir():
        return target
    numpy = () if find_spec("numpy") else ("numpy",)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    options = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options]
    command += ["--target", str(partial), *wanted, *numpy]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip: {done.stderr.strip()[-500:]}")
        partial.rename(target)  # a half-filled folder never has the final name
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
