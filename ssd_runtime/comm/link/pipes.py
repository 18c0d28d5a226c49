"""One direction of a link over a process group of two, between CPUs; the groups themselves. Knows words, no frames.

Between GPUs the same is in nccl_pipe.py.

Facts this rests on (torch 2.13, Gloo): a receive completes only in a wait; a wait that times out closes every
connection of its group, which also frees whoever else waits there - that is how a deadline ends a link and how close()
ends a blocked receive.
"""

from __future__ import annotations

import contextlib
from collections import deque
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ssd_runtime.comm.link.gloo_ports import heard_while_built

WINDOW = 16  # receives posted at once


class Pipe(Protocol):
    """All but `receive` and `finish` return at once. Whatever fails or times out is a RuntimeError, and final."""

    def post(self, words: Tensor) -> Any: ...
    def finish(self, in_flight: Any, timeout_s: float) -> None: ...
    def receive(self, num_words: int, timeout_s: float) -> Tensor: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


class GlooPipe:
    """Frames between CPUs.

    Args:
        group: a ProcessGroupGloo of two.
        peer: the other one's rank in it.
    """

    def __init__(self, group: Any, peer: int) -> None:
        self._group, self._peer = group, peer
        self._window: deque[tuple[Any, Tensor]] = deque()

    def post(self, words: Tensor) -> Any:
        return self._group.send([words], self._peer, 0), words  # the words must outlive the work

    def finish(self, in_flight: Any, timeout_s: float) -> None:
        in_flight[0].wait(timedelta(seconds=timeout_s))

    def receive(self, num_words: int, timeout_s: float) -> Tensor:
        if not self._window:  # many at once: posting one between two frames would delay whoever awaits the first
            rows = torch.empty(WINDOW, num_words, dtype=torch.int64)
            self._window.extend((self._group.recv([words], self._peer, 0), words) for words in rows)
        work, words = self._window.popleft()
        work.wait(timedelta(seconds=timeout_s))
        return words

    def cancel(self) -> None:
        """Fail whoever waits in this group: a wait that times out closes its connections."""
        with contextlib.suppress(RuntimeError):
            nothing = torch.empty(1, dtype=torch.int64)
            self._group.recv([nothing], self._peer, 1).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        self._window.clear()
        self._group = None


def gloo_group(store: Any, rank: int, local_host: str, timeout: timedelta, size: int = 2) -> Any:
    """A group between CPUs. It listens at `local_host` while it is built."""
    with heard_while_built(lambda: dist.ProcessGroupGloo.create_device(hostname=local_host)) as device:
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout, options._threads = [device], timeout, 1
        return dist.ProcessGroupGloo(store, rank, size, options)


def nccl_group(
    store: Any, rank: int, device: torch.device, timeout: timedelta, size: int = 2, small: bool = False
) -> Any:
    """A group between GPUs with a non-blocking communicator.

    Args:
        timeout: torch itself ends an operation that takes longer.
        small: for few words beside a forward: one block of threads, before the forward's where there is a choice.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout, options.config.blocking = timeout, 0
    if small:
        options.is_high_priority_stream, options.config.max_ctas = True, 1
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that torch appends."""
    return (str(error).splitlines() or [type(error).__name__])[0]
