"""The process group of a tensor-parallel target: Gloo between CPUs, NCCL between GPUs. Knows no models.

Built on a prefix of torchrun's store and never together with the draft's ranks. A sum is one all-gather, added up by
every rank in the order of ranks: one step over the wire, which is what few rows need; the same bits at every rank; and,
unlike an all-reduce, which adds in an order that depends on where an element lies in the tensor, the same bits for a
row whatever the rows beside it (speculation changes the rows of a batch and must not change tokens).

Every wait has a deadline. A group that has failed once is not used again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, BroadcastOptions

from ssd_runtime.comm.link.groups import first_line, gloo_group, nccl_group
from ssd_runtime.errors import PeerLost


class TargetGroup:
    """Ranks of one target, on the CPU.

    Args:
        group: a ProcessGroupGloo of all of them.
        rank, size: this rank, and how many.
        deadline_s: longest wait for the others in one operation.

    Attributes:
        deadline_s: may be changed by its owner, as loading takes longer than a layer.
    """

    def __init__(self, group: Any, rank: int, size: int, deadline_s: float) -> None:
        self.rank, self.size, self.deadline_s = rank, size, deadline_s
        self._group = group

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor, in the order of ranks, along a new first dimension; all of one shape and dtype."""
        x = x.contiguous()
        parts = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel():
            options = AllgatherOptions()
            self._run(options, lambda group: group._allgather_base(parts.view(-1), x.view(-1), options))
        return parts

    def sum(self, x: Tensor) -> Tensor:
        """In float32 and in the order of ranks, then rounded to the dtype of `x`."""
        first, *others = self.gather(x).unbind(0)
        total = first.float()
        for part in others:
            total = total + part
        return total.to(x.dtype)

    def maximum(self, x: Tensor) -> Tensor:
        return self.gather(x).amax(0)

    def broadcast(self, words: Tensor) -> None:
        """Overwrite `words` with rank 0's; all of one shape and dtype."""
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._run(options, lambda group: group.broadcast([words], options))

    def settle(self) -> None:
        """Return when everything asked for so far has happened."""

    def close(self) -> None:
        """Drop the connections; whoever still waits for this rank is told."""
        self._group = None

    def _run(self, options: Any, start: Callable[[Any], Any]) -> None:
        assert self._group is not None, "the group is closed"
        options.timeout = timedelta(seconds=self.deadline_s)  # ends the operation itself, not only the wait for it
        try:
            self._finish(start(self._group))
        except RuntimeError as error:
            raise self._lost(_said(error)) from error

    def _finish(self, work: Any) -> None:
        work.wait()

    def _lost(self, reason: str) -> PeerLost:
        """With two ranks it is known who is gone; a follower of many looks to its leader."""
        rank = 1 - self.rank if self.size == 2 else -1
        where = f"in the group of {self.size} target ranks, at most {self.deadline_s:g} s awaited"
        return PeerLost("target", rank, -1, f"{reason} ({where})")


class GpuTargetGroup(TargetGroup):
    """Ranks of one target, each on a GPU. Written by reading torch's source; it has not run yet.

    Operations are queued on the GPU and only `settle` waits for them.
    """

    _last: Any = None

    def _finish(self, work: Any) -> None:
        work.wait()  # the stream waits, not this thread
        self._last = work

    def settle(self) -> None:
        deadline = time.monotonic() + self.deadline_s
        while self._last is not None and not self._last.is_completed():
            if time.monotonic() > deadline:
                self._group.abort()
                raise self._lost("no answer")
            time.sleep(20e-6)
        self._last = None


def meet_target_ranks(store: Any, rank: int, size: int, local_host: str, deadline_s: float) -> TargetGroup:
    """The group of all target ranks between CPUs; each of them calls this with the same store.

    Args:
        store: a store, or a prefix of one, that nothing else writes to.
        local_host: an address of this machine that the others can reach.
        deadline_s: longest wait for the others, now and until `deadline_s` is changed.

    Raises:
        PeerLost: they did not all come.
    """
    here = [f"here/{one}" for one in range(size)]
    try:
        store.set(here[rank], "")
        store.wait(here, timedelta(seconds=deadline_s))  # nobody listens before all are there
        group = gloo_group(store, rank, local_host, timedelta(seconds=deadline_s), size)
        return TargetGroup(group, rank, size, deadline_s)
    except (RuntimeError, OSError) as error:
        raise _not_met(size, deadline_s, error) from error


def meet_target_gpus(store: Any, rank: int, size: int, device: torch.device, deadline_s: float) -> TargetGroup:
    """The same between GPUs, over NCCL."""
    try:
        group = nccl_group(store, rank, device, timedelta(seconds=deadline_s), size)
        return GpuTargetGroup(group, rank, size, deadline_s)
    except (RuntimeError, OSError) as error:
        raise _not_met(size, deadline_s, error) from error


def _not_met(size: int, deadline_s: float, error: Exception) -> PeerLost:
    return PeerLost("target", -1, -1, f"{size} target ranks did not meet within {deadline_s:g} s: {_said(error)}")


def _said(error: BaseException) -> str:
    """What Gloo says, without the line of its source before and the good wishes behind."""
    return re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". This is typically")[0]
