"""How the ranks of one torchrun find each other: its store, the leader's control address in it, and the group that the
ranks of a tensor-parallel target make of it before they load the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssd_runtime.comm.collective import TargetGroup, meet_target_gpus, meet_target_ranks
from ssd_runtime.comm.hosts import address_of_host, bare, is_loopback, is_own, own_address, split
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host import topology
from ssd_runtime.typed import shown

CONTROL_KEY = "ssd/control"


@dataclass(frozen=True)
class SharedTarget:
    """What one rank of a target reaches the others by.

    Attributes:
        frames: between CPUs, for the leader's frames.
        tensors: between the devices of the model; the same group where these are CPUs.
        silence: longest wait for another rank once all have loaded, in seconds.
    """

    frames: TargetGroup
    tensors: TargetGroup
    silence: float

    def all_loaded(self, blocks: int) -> int:
        """Wait until every rank has loaded its part; from here on nobody waits long.

        Args:
            blocks: KV blocks that fit beside this rank's part.

        Returns:
            Those that fit beside every rank's.
        """
        least = int(self.frames.gather(torch.tensor([blocks])).min())
        self.frames.deadline_s = self.tensors.deadline_s = self.silence
        return least


@contextlib.contextmanager
def target_joined(config: Config, place: topology.Placement, store: Any) -> Iterator[SharedTarget]:
    """Meet the other target ranks; while they load they may take as long as loading may. Raises PeerLost."""
    timeouts = config.timeouts
    patience = timeouts.load + timeouts.handshake
    rank, size = place.rank, place.num_targets
    with contextlib.ExitStack() as groups:
        prefix = dist.PrefixStore("target/frames", store)
        frames = meet_target_ranks(prefix, rank, size, way_to_store(), patience)
        groups.callback(frames.close)
        tensors = frames
        if topology.group_backend(config.target.device) == "nccl":
            prefix = dist.PrefixStore("target/tensors", store)
            tensors = meet_target_gpus(prefix, rank, size, place.device, patience)
            groups.callback(tensors.close)
        yield SharedTarget(frames, tensors, max(timeouts.link, 3 * timeouts.idle_heartbeat))


def store(config: Config) -> Any:
    """A client of torchrun's own store: built directly, since init_process_group would join a world of all ranks."""
    host, port = _store_address()
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = not agent_serves and os.environ["RANK"] == "0"
    timeout = timedelta(seconds=config.timeouts.handshake)
    try:
        served = dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise ConfigError(f"cannot reach torchrun's store at {host}:{port}: {str(error).splitlines()[0]}") from None
    # A restarted world must not read what the last one wrote. All ranks of one agent see the same count.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{restarts}", served)


def await_control_address(store: Any, timeout_s: float) -> str:
    """What the target wrote under CONTROL_KEY; raises ConfigError if it did not within `timeout_s`."""
    try:
        store.wait([CONTROL_KEY], timedelta(seconds=timeout_s))
        value: bytes = store.get(CONTROL_KEY)
    except RuntimeError:
        raise ConfigError(f"no target came within {timeout_s:g} s: is rank 0 running?") from None
    return value.decode()


def own_host(config: Config, *, guests: bool = False) -> str:
    """The address of this node that the other ranks reach: the front door's. If that one is a wildcard, then
    `serve.announce`, or the way to torchrun's store, or for guests what others most likely reach.

    Args:
        guests: drafts of another torchrun may come, from other nodes too.

    Raises:
        ConfigError: there are ranks on other nodes and the front door is for this node only; or `serve.announce` is
            not of this node, where the link to a draft has to listen.
    """
    host = bare(config.serve.host)
    if config.serve.is_wildcard:
        if announced := config.serve.announce:
            if not is_own(announced):
                raise ConfigError(f"serve.announce = {announced} is not an address of this node")
            return bare(announced)
        here = way_to_store()
        return address_of_host() if guests and is_loopback(here) else here
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE") and is_loopback(host):
        raise ConfigError(
            f"serve.host = {host} is for this node only, and there are ranks on others; "
            "set serve.host to an address of this node that they can reach, or to 0.0.0.0"
        )
    return host


def way_to_store() -> str:
    """The address of this node on the way to torchrun's store, where the ranks of other nodes reach it too."""
    return own_address(*_store_address())


def _store_address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        return split(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except ValueError:
        told = f"MASTER_ADDR={shown(host)} and MASTER_PORT={shown(port)}"
        raise ConfigError(f"{told} are no address of torchrun's store; they are torchrun's to set") from None
