"""How the ranks of one torchrun find each other: its store, and the leader's control address in it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from launcher.addresses import address_of_host
from ssd_runtime.comm.hosts import bare, is_loopback, is_own, own_address
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError

CONTROL_KEY = "ssd/control"


def store(config: Config) -> Any:
    """A client of torchrun's own store: built directly, since init_process_group would join a world of all ranks."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = not agent_serves and os.environ["RANK"] == "0"
    timeout = timedelta(seconds=config.timeouts.handshake)
    try:
        served = dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise ConfigError(f"cannot reach torchrun's store at {host}:{port}: {str(error).splitlines()[0]}") from None
    return dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{_restarts()}", served)


def await_key(store: Any, key: str, timeout_s: float) -> str:
    """What the target wrote under `key`; raises ConfigError if it did not within `timeout_s`."""
    try:
        store.wait([key], timedelta(seconds=timeout_s))
        value: bytes = store.get(key)
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
    return own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def _restarts() -> str:
    """A restarted world must not read what the last one wrote. All ranks of one agent see the same count."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
