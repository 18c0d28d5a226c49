"""Settings of NCCL that matter here, with the reason for each. What the environment sets already is left alone.

Written from NCCL's and torch's documentation; nothing here has run on GPUs yet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssd_runtime.comm.hosts import interfaces, is_loopback, own_address
from ssd_runtime.host.hardware import INFINIBAND, rdma_adapters

ANY_PORT = 9  # the way to a host is the same for all of them


@dataclass(frozen=True)
class Setting:
    """One environment variable.

    Attributes:
        chosen: by us, rather than found in the environment.
        reason: why it matters.
    """

    name: str
    value: str
    reason: str
    chosen: bool = True


def settings(environ: Mapping[str, str], infiniband: Path = INFINIBAND) -> list[Setting]:
    """What a rank that torchrun started with `environ` should have set before NCCL is loaded."""
    wanted = [
        Setting(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING",
            "2",
            "a failed communicator is cleaned up and the process lives: losing the draft must not end the target",
        ),
        Setting(
            "TORCH_NCCL_ENABLE_MONITORING",
            "0",
            "torch's monitor ends the process when a communicator hangs; deadlines here end the link only",
        ),
        Setting(
            "TORCH_NCCL_NONBLOCKING_TIMEOUT",
            "60",
            "torch waits half an hour for a peer that is lost while a communicator is made, and cannot be interrupted",
        ),
        Setting(
            "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING",
            "false",
            "sends of a link are to follow each other: each direction has a communicator of its own",
        ),
    ]
    if interface := _interface_to(environ.get("MASTER_ADDR", "")):
        wanted.append(Setting("NCCL_SOCKET_IFNAME", f"={interface}", "the interface that leads to the other nodes"))
    if not rdma_adapters(infiniband):
        wanted.append(Setting("NCCL_IB_DISABLE", "1", "this host has no InfiniBand or RoCE adapter"))
    return [
        Setting(one.name, environ[one.name], one.reason, chosen=False) if one.name in environ else one for one in wanted
    ]


def apply() -> list[Setting]:
    """Set what is not set; call before torch loads NCCL. Returns all of it, to be logged."""
    found = settings(os.environ)
    for one in found:
        os.environ.setdefault(one.name, one.value)
    return found


def _interface_to(host: str) -> str | None:
    """The interface of the route to another node; None if there is none, or it is this machine."""
    if not host or is_loopback(host):
        return None
    try:
        return interface_of(own_address(host, ANY_PORT))
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The name of the interface with an IPv4 address."""
    return next((name for name, own in interfaces() if own == address), None)
