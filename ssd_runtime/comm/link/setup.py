"""How two processes meet for a link: a port and a secret for each epoch, a process group for each direction.

Knows no frames; what is built here works in endpoint.py.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from ssd_runtime.comm.control.draft_messages import LinkAddress
from ssd_runtime.comm.link import exchange
from ssd_runtime.comm.link.endpoint import DraftLink, Endpoint, GlooPipe, LinkTiming, Pipe, TargetLink
from ssd_runtime.comm.link.exchange import Exchange
from ssd_runtime.comm.link.frames import HEADER, OutcomeCodec, TreeCodec
from ssd_runtime.comm.link.gpu_queue import GpuQueue
from ssd_runtime.comm.link.groups import first_line, gloo_group, nccl_group
from ssd_runtime.comm.link.nccl_pipe import NcclPipe
from ssd_runtime.comm.protocol import FrameShape
from ssd_runtime.errors import ConfigError, PeerLost

TARGET, DRAFT = 0, 1  # ranks inside a link's groups
Direction = Literal["outcomes", "trees"]


class LinkHost:
    """The target's meeting places: a port for each link, open from the link's name until its draft has come.

    Args:
        host: address of this machine that the draft can reach; nothing listens at any other.
    """

    def __init__(self, host: str) -> None:
        self._host, self._epoch = host, 0
        self._ports: dict[int, socket.socket] = {}  # by epoch

    def check(self) -> None:
        """Raise ConfigError if the host is no address of this machine."""
        try:
            exchange.open_port(self._host).close()
        except OSError as error:
            raise ConfigError(f"cannot build links at {self._host}: {error.strerror}") from None

    def next_address(self, shape: FrameShape) -> LinkAddress:
        """A new link's name: to be sent to the draft and opened on both sides, or forgotten. Raises OSError."""
        port = exchange.open_port(self._host)
        self._epoch += 1
        self._ports[self._epoch] = port
        return LinkAddress(self._host, port.getsockname()[1], secrets.token_hex(16), self._epoch, shape)

    def forget(self, address: LinkAddress) -> None:
        """Nobody was told of this link."""
        port = self._ports.pop(address.epoch, None)
        if port is not None:
            port.close()

    def open(self, address: LinkAddress, timing: LinkTiming, gpu: torch.device | None = None) -> TargetLink:
        """Meet the draft at `address`; blocks at most `timing.build`. Raises PeerLost if it does not come.

        Args:
            gpu: of this side, where frames travel between GPUs over NCCL, on both sides or none.
        """
        with _meeting(address, DRAFT, timing) as give_up, contextlib.closing(self._come(address, give_up)) as store:
            outcomes, trees = _Builder(store, TARGET, give_up, address.shape, timing, gpu).pipes()
        shape = address.shape
        link = Endpoint("draft", 1, outcomes, trees, OutcomeCodec(shape), TreeCodec(shape), timing)
        link.start()
        return link

    def _come(self, address: LinkAddress, give_up: float) -> Exchange:
        port = self._ports.pop(address.epoch, None)
        if port is None:
            raise ConnectionAbortedError("nobody is met here any more")
        with contextlib.closing(port):
            return exchange.answer(port, _secret(address), give_up)

    def close(self) -> None:
        """Meet nobody any more; links that are open stay so."""
        for port in self._ports.values():
            port.close()
        self._ports.clear()


def open_draft_link(address: LinkAddress, timing: LinkTiming, gpu: torch.device | None = None) -> DraftLink:
    """Meet the target at `address`; as `LinkHost.open`."""
    with (
        _meeting(address, TARGET, timing) as give_up,
        contextlib.closing(exchange.knock(address.host, address.port, _secret(address), give_up)) as store,
    ):
        outcomes, trees = _Builder(store, DRAFT, give_up, address.shape, timing, gpu).pipes()
    shape = address.shape
    link = Endpoint("target", 0, trees, outcomes, TreeCodec(shape), OutcomeCodec(shape), timing)
    link.start()
    return link


@contextlib.contextmanager
def _meeting(address: LinkAddress, peer: int, timing: LinkTiming) -> Iterator[float]:
    """When to give up, by the monotonic clock: coming together and both directions have it together."""
    try:
        yield time.monotonic() + timing.build
    except (RuntimeError, OSError) as error:
        met = f"did not meet at {address.host}:{address.port} (epoch {address.epoch}) within {timing.build:g} s"
        raise PeerLost(("target", "draft")[peer], peer, -1, f"{met}: {first_line(error)}") from error


def _secret(address: LinkAddress) -> bytes:
    return f"{address.session}/{address.epoch}".encode()


@dataclass(frozen=True)
class _Builder:
    """One side's pipes of both directions."""

    store: Exchange
    rank: int
    give_up: float
    shape: FrameShape
    timing: LinkTiming
    gpu: torch.device | None

    def pipes(self) -> tuple[Pipe, Pipe]:
        """Outcomes first."""
        with contextlib.ExitStack() as built:
            outcomes = self._pipe("outcomes", built)
            trees = self._pipe("trees", built)
            self.store.settle()
            built.pop_all()
        return outcomes, trees

    def _pipe(self, direction: Direction, built: contextlib.ExitStack) -> Pipe:
        """Built within the deadline; `built` closes it should the rest fail."""
        prefix = dist.PrefixStore(direction, self.store)
        group = gloo_group(prefix, self.rank, self.store.own_host, timedelta(seconds=self._left()))
        gloo = GlooPipe(group, 1 - self.rank)
        if self.gpu is None:
            return gloo
        silence, store = self.timing.silence, dist.PrefixStore("nccl", prefix)
        group = nccl_group(store, self.rank, self.gpu, timedelta(seconds=silence), small=True)
        sender, codec = (TARGET, OutcomeCodec) if direction == "outcomes" else (DRAFT, TreeCodec)
        pipe = NcclPipe(gloo, group, 1 - self.rank, GpuQueue(self.gpu), codec(self.shape).num_words, HEADER, silence)
        built.callback(pipe.close)
        pipe.warm_up(self.rank == sender, self._left())
        return pipe

    def _left(self) -> float:
        return max(0.1, self.give_up - time.monotonic())
