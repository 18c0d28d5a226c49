"""A queue of operations on a GPU, beside the forward: a stream of its own, pinned memory. Knows no groups, no frames.

Nothing here waits for the forward's stream, nor the forward for this one. The host waits for an event with the
interpreter lock released (`THCPEvent_synchronize` in torch) and without spinning (cudaEventBlockingSync). Written by
reading torch's source; it has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Buffers:
    """The same words twice, and an event.

    Attributes:
        host: int64, where the GPU reads and writes it without help.
        device: int64, of the same shape.
        landed: has `synchronize()`: return when all has happened that was in the queue at its mark.
    """

    host: Tensor
    device: Tensor
    landed: Any


class GpuQueue:
    """Every call puts one operation behind those before it and returns.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # before the forward's blocks where there is a choice

    def buffers(self, num_words: int) -> Buffers:
        """Memory to be used in this queue alone. Takes long: not for every frame."""
        with torch.cuda.stream(self._stream):
            return Buffers(
                torch.empty(num_words, dtype=torch.int64, pin_memory=True),
                torch.empty(num_words, dtype=torch.int64, device=self._device),
                torch.cuda.Event(blocking=True),
            )

    def copy(self, source: Tensor, destination: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            destination.copy_(source, non_blocking=True)

    def carry(self, start: Callable[[], Any]) -> None:
        """An operation of a group of NCCL, which `start` starts: what is queued next waits for it."""
        with torch.cuda.stream(self._stream):
            start().wait()  # the stream waits, not this thread

    def mark(self, event: Any) -> None:
        event.record(self._stream)
