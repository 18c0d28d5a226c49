"""How two processes meet for a link: the target's store, a name for each epoch, a process group for each direction.

Knows no frames; what is built here works in endpoint.py.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssd_runtime.comm.endpoint import Endpoint, GroupDraftLink, GroupTargetLink
from ssd_runtime.comm.frames import OutcomeCodec, TreeCodec
from ssd_runtime.comm.hosts import own_address
from ssd_runtime.comm.link import LinkTiming
from ssd_runtime.comm.messages_draft import LinkAddress
from ssd_runtime.comm.pipes import GlooPipe, NcclPipe, Pipe, first_line, gloo_group, nccl_group
from ssd_runtime.comm.protocol import FrameShape
from ssd_runtime.errors import ConfigError, PeerLost

TARGET, DRAFT = 0, 1  # ranks inside a link's groups


class LinkHost:
    """The target's meeting place: a TCPStore on a free port, and the count of links made there.

    Args:
        host: address of this machine that the draft can reach.
        timeout_s: for operations of the store.
    """

    def __init__(self, host: str, *, timeout_s: float = 20.0) -> None:
        try:
            self._store: Any = dist.TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
        except RuntimeError as error:
            raise ConfigError(f"cannot serve a store on {host}: {first_line(error)}") from None
        self._host, self._session, self._epoch = host, secrets.token_hex(8), 0

    def next_address(self, shape: FrameShape) -> LinkAddress:
        """A new link's name: to be sent to the draft and opened on both sides."""
        self._epoch += 1
        return LinkAddress(self._host, self._store.port, self._session, self._epoch, shape)

    def close(self) -> None:
        """Stop serving; links that are open stay so."""
        self._store = None


def open_target_link(
    address: LinkAddress, timing: LinkTiming, *, device: torch.device | None = None, backend: str = "gloo"
) -> GroupTargetLink:
    """Meet the draft at `address`; blocks at most `timing.build`. Raises PeerLost if it does not come."""
    outcomes, trees = _meet(address, TARGET, timing, device, backend)
    return GroupTargetLink(
        Endpoint("draft", 1, outcomes, trees, OutcomeCodec(address.shape), TreeCodec(address.shape), timing)
    )


def open_draft_link(
    address: LinkAddress, timing: LinkTiming, *, device: torch.device | None = None, backend: str = "gloo"
) -> GroupDraftLink:
    """Meet the target at `address`; blocks at most `timing.build`. Raises PeerLost if it does not come."""
    outcomes, trees = _meet(address, DRAFT, timing, device, backend)
    return GroupDraftLink(
        Endpoint("target", 0, trees, outcomes, TreeCodec(address.shape), OutcomeCodec(address.shape), timing)
    )


def _meet(
    address: LinkAddress, rank: int, timing: LinkTiming, device: torch.device | None, backend: str
) -> tuple[Pipe, Pipe]:
    """The pipes of both directions, outcomes first; both sides must call this for the same address."""
    build = timedelta(seconds=timing.build)
    give_up = time.monotonic() + timing.build  # the store and both directions have it together
    peer = 1 - rank
    role = ("target", "draft")[peer]
    try:
        store = dist.TCPStore(address.host, address.port, is_master=False, wait_for_workers=False, timeout=build)
        local_host = own_address(address.host, address.port)

        def pipe(direction: str) -> Pipe:
            prefix = dist.PrefixStore(f"link/{address.session}/{address.epoch}/{direction}", store)
            if backend == "nccl":
                assert device is not None, "NCCL needs a device"
                return NcclPipe(nccl_group(prefix, rank, device, build), peer, device)
            left = timedelta(seconds=max(0.1, give_up - time.monotonic()))
            return GlooPipe(gloo_group(prefix, rank, local_host, left), peer)

        return pipe("outcomes"), pipe("trees")
    except (RuntimeError, OSError) as error:
        met = f"did not meet at {address.host}:{address.port} (epoch {address.epoch}) within {timing.build:g} s"
        raise PeerLost(role, peer, -1, f"{met}: {first_line(error)}") from error
