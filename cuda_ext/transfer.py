"""Copies between the host and a device: integers there without waiting, results back together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uploaded(values: Sequence[int], device: torch.device) -> Tensor:
    """A new int64 vector on the device, in a copy that the host does not wait for."""
    return _on_host(values, device).to(device, non_blocking=True)


def upload_(target: Tensor, values: Sequence[int]) -> None:
    """Write them into an int64 vector of the same length; the host does not wait either."""
    target.copy_(_on_host(values, target.device), non_blocking=True)


def _on_host(values: Sequence[int], device: torch.device) -> Tensor:
    """Pinned for a GPU: from memory that may be paged out the copy waits, and torch keeps pinned memory until then."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")


def to_host(*results: Tensor) -> tuple[Tensor, ...]:
    """The same tensors on the CPU, by one copy; on the CPU themselves. They may differ in shape and dtype.

    Together, since each read of its own waits for all that is queued on the device.
    """
    if results[0].device.type == "cpu":
        return results
    widest_first = sorted(results, key=lambda result: -result.itemsize)  # so each begins where its dtype may
    parts = [result.flatten().contiguous().view(torch.uint8) for result in widest_first]
    copied = torch.cat(parts).cpu().split([part.numel() for part in parts])
    found = {
        id(result): flat.view(result.dtype).view(result.shape)
        for result, flat in zip(widest_first, copied, strict=True)
    }
    return tuple(found[id(result)] for result in results)
