"""NCCL and a GPU, stood in for on a CPU: Gloo that can be aborted, a thread for a stream. No tests here.

What the pipe rests on is as there: what is queued happens later, in order and without its caller; an operation of the
group holds up what is queued behind it; abort() frees it, whatever the peer does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ssd_runtime.comm.link import setup
from ssd_runtime.comm.link.endpoint import GlooPipe
from ssd_runtime.comm.link.gpu_queue import Buffers
from ssd_runtime.comm.link.groups import gloo_group

OVER_NCCL: dict[str, Any] = {"gpu": torch.device("cpu")}


def stand_in(replace: Callable[[object, str, object], None] = setattr) -> None:
    """From now on links over NCCL are built of these."""
    replace(setup, "nccl_group", StandInGroup)
    replace(setup, "GpuQueue", HostQueue)


class StandInGroup:
    """What a pipe uses of a ProcessGroupNCCL.

    Attributes:
        posted: what was asked of it, in order: send, recv or abort.
    """

    def __init__(self, store: Any, rank: int, device: object, timeout: timedelta, small: bool = False) -> None:
        self._group: Any = gloo_group(store, rank, "127.0.0.1", timeout)
        self._peer = 1 - rank
        self.posted: list[str] = []

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        self.posted.append("send")
        return self._group.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        self.posted.append("recv")
        return self._group.recv(tensors, peer, tag)

    def abort(self) -> None:
        self.posted.append("abort")
        GlooPipe(self._group, self._peer).cancel()


class Event:
    """As a CUDA event: waits for its last mark."""

    done = threading.Event()

    def synchronize(self) -> None:
        self.done.wait()


class HostQueue:
    """As `GpuQueue`. Between `hold` and `release` nothing in it happens, as if the GPU were busy.

    Attributes:
        carried: operations of the group that were put in.
    """

    def __init__(self, device: object = None) -> None:
        self._stream = ThreadPoolExecutor(1)  # its thread ends with it
        self._free = threading.Event()
        self._free.set()
        self.carried = 0

    def buffers(self, num_words: int) -> Buffers:
        host, device = torch.empty(2, num_words, dtype=torch.int64)
        return Buffers(host, device, Event())

    def copy(self, source: Tensor, destination: Tensor) -> None:
        self._queue(lambda: destination.copy_(source))

    def carry(self, start: Callable[[], Any]) -> None:
        def operation() -> None:
            with contextlib.suppress(RuntimeError):  # aborted: what is behind it goes on
                start().wait()

        self.carried += 1
        self._queue(operation)

    def mark(self, event: Event) -> None:
        event.done = done = threading.Event()
        self._queue(done.set)

    def hold(self) -> None:
        self._free.clear()
        self._queue(self._free.wait)

    def release(self) -> None:
        self._free.set()

    def _queue(self, operation: Callable[[], object]) -> None:
        self._stream.submit(operation)
