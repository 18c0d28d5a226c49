"""Engines on two hosts: started, asked from inside the network, and cleaned up after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.generation import Generation, generate
from ssd_runtime.comm.control.client_messages import Generate
from ssd_runtime.engine.client import Client
from tests.cluster.hosts import Host

# Each host of the pair has both cores: keep the two roles apart as on a machine of their own.
APART = ("--set", "target.cores=[{first}]", "--set", "draft.cores=[{last}]")


@contextlib.contextmanager
def client_on(host: Host, address: str, timeout_s: float = 60.0) -> Iterator[Client]:
    """A client in this process whose packets start at `host`."""
    with host.entered():
        client = Client(address, timeout_s)
    with contextlib.closing(client):
        client.status()
        yield client


def ask(client: Client, mode: str, **fields: Any) -> Generation:
    """The answer to one request, whole."""
    wanted: dict[str, Any] = {"prompt": "the quick brown", "max_tokens": 48, "ignore_eos": True}
    request = Generate(f"{mode} request", mode=mode, **(wanted | fields))  # type: ignore[arg-type]
    return generate(client, request)


def cores_apart(allowed: Sequence[int]) -> tuple[str, ...]:
    """Options that keep the roles from sharing a core."""
    return tuple(part.format(first=allowed[0], last=allowed[-1]) for part in APART)
