"""Integers of the host on a device, in a copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uploaded(values: Sequence[int], device: torch.device) -> Tensor:
    """A new int64 vector on the device."""
    return _on_host(values, device).to(device, non_blocking=True)


def upload_(target: Tensor, values: Sequence[int]) -> None:
    """Write them into an int64 vector of the same length."""
    target.copy_(_on_host(values, target.device), non_blocking=True)


def _on_host(values: Sequence[int], device: torch.device) -> Tensor:
    """Pinned for a GPU: from memory that may be paged out the copy waits, and torch keeps pinned memory until then."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
