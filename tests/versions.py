"""What older versions of torch do otherwise, for reasons of their own."""

import warnings

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def needs_torch(minor: int, reason: str) -> pytest.MarkDecorator:
    """Skip a test before torch 2.`minor`."""
    return pytest.mark.skipif(
        (2, minor) > TORCH, reason=f"torch before 2.{minor}: {reason}"
    )


def allow_own_warnings() -> None:
    """Let pass the warnings that a version raises at itself."""
    if TORCH < (2, 8):  # torch.distributed.checkpoint, of torch's storages
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
