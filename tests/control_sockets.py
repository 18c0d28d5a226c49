"""The control plane's sockets on this host, and how tests wait on them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ssd_runtime.comm.control.client_messages import Cancel
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.control.server import ControlServer

SOON = 10.0  # seconds: a deadline that a healthy machine never reaches


@pytest.fixture(name="server")
def server_fixture() -> Iterator[ControlServer]:
    with ControlServer.bind("127.0.0.1", 0, heartbeat_s=0.1) as made:
        yield made


@pytest.fixture(name="peer")
def peer_fixture(server: ControlServer) -> Iterator[ControlPeer]:
    with ControlPeer.connect(server.address, heartbeat_s=0.1) as made:
        yield made


def receive(server: ControlServer) -> tuple[bytes, Message]:
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        arrived = server.poll(0.1)
        if arrived:
            assert len(arrived) == 1
            return arrived[0]
    raise AssertionError("nothing arrived")


def meet(server: ControlServer, peer: ControlPeer) -> bytes:
    peer.send(Cancel("hello"))
    return receive(server)[0]


def wait_until_gone(server: ControlServer, identity: bytes) -> float:
    start = time.monotonic()
    while server.alive(identity):
        assert time.monotonic() - start < SOON
        server.poll(0.01)
    return time.monotonic() - start
