"""The control plane's sockets, with real sockets on this host: messages between peers that mean well."""

from __future__ import annotations

import os
import socket
import time

import pytest

from ssd_runtime.comm.control.client_messages import Cancel
from ssd_runtime.comm.control.draft_messages import Welcome
from ssd_runtime.comm.control.messages import Heartbeat, Message, Refused, Shutdown
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.control.server import ControlServer
from ssd_runtime.errors import ConfigError, PeerLost
from tests.control_sockets import SOON, meet, peer_fixture, receive, server_fixture  # noqa: F401
from tests.process.runs import eventually


def test_messages_arrive_in_order_in_both_directions(server: ControlServer, peer: ControlPeer) -> None:
    identity = meet(server, peer)
    for i in range(100):
        assert server.send(identity, Cancel(str(i)))
    arrived: list[Message] = []
    while len(arrived) < 100:
        arrived += peer.poll(SOON)
    assert arrived == [Cancel(str(i)) for i in range(100)]


def test_each_peer_gets_its_own_answer(server: ControlServer, peer: ControlPeer) -> None:
    with ControlPeer.connect(server.address) as other:
        first, second = meet(server, peer), meet(server, other)
        server.send(second, Cancel("second"))
        server.send(first, Cancel("first"))
        assert peer.poll(SOON) == [Cancel("first")]
        assert other.poll(SOON) == [Cancel("second")]


def test_polling_with_nothing_there_returns_at_its_deadline(server: ControlServer, peer: ControlPeer) -> None:
    start = time.monotonic()
    assert server.poll(0.05) == []
    assert peer.poll(0.05) == []
    assert server.poll(0) == []
    assert peer.poll(0) == []
    assert 0.09 <= time.monotonic() - start < SOON  # ZeroMQ counts whole milliseconds


def test_waiting_for_a_type_keeps_what_came_before_and_after(server: ControlServer, peer: ControlPeer) -> None:
    identity = meet(server, peer)
    for message in (Cancel("a"), Refused("no"), Cancel("b")):
        server.send(identity, message)
    assert peer.wait_for(Welcome, Refused, timeout_s=SOON) == Refused("no")
    kept = peer.poll(0)
    while len(kept) < 2:
        kept += peer.poll(SOON)
    assert kept == [Cancel("a"), Cancel("b")]


def test_waiting_in_vain_names_who_was_awaited_and_for_what(server: ControlServer, peer: ControlPeer) -> None:
    meet(server, peer)
    with pytest.raises(PeerLost, match=r"target rank 0 .*no Welcome or Refused within 0.1 s from tcp://127.*connected"):
        peer.wait_for(Welcome, Refused, timeout_s=0.1)


def test_a_server_that_never_comes_is_named_and_closing_does_not_linger() -> None:
    took = []
    for _ in range(3):
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
            start = time.monotonic()
            with ControlPeer.connect(f"127.0.0.1:{reserved.getsockname()[1]}") as peer:
                peer.send(Cancel("a"))
                with pytest.raises(PeerLost, match="never connected"):
                    peer.wait_for(Welcome, timeout_s=0.1)
            took.append(time.monotonic() - start)
    assert min(took) < 0.9  # a busy machine may have paused one of them


def test_a_server_may_come_up_after_its_peer() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    with ControlPeer.connect(f"127.0.0.1:{port}") as peer:
        peer.send(Cancel("early"))
        with ControlServer.bind("127.0.0.1", port) as server:
            assert receive(server)[1] == Cancel("early")


def test_heartbeats_are_not_shown_to_the_caller(server: ControlServer, peer: ControlPeer) -> None:
    identity = meet(server, peer)
    assert server.alive(identity)
    server.send(identity, Cancel("next"))
    peer.send(Heartbeat())
    peer.send(Cancel("next"))
    assert peer.poll(SOON) == [Cancel("next")]
    assert receive(server) == (identity, Cancel("next"))


def test_the_last_words_of_a_server_are_read_before_it_is_lost() -> None:
    with ControlServer.bind("127.0.0.1", 0) as server, ControlPeer.connect(server.address) as peer:
        identity = meet(server, peer)
        server.send(identity, Shutdown("done"))
        server.close()
        assert peer.wait_for(Shutdown, timeout_s=SOON) == Shutdown("done")
        with pytest.raises(PeerLost, match="lost"):
            peer.poll(SOON)
        assert not peer.alive()
        with pytest.raises(PeerLost, match="not connected"):
            peer.send(Cancel("x"))


def test_a_port_in_use_is_a_config_error(server: ControlServer) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
        ControlServer.bind("127.0.0.1", port)


def test_a_host_that_is_not_ours_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"is serve\.host an address"):
        ControlServer.bind("192.0.2.1", 0)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "bogus://x:1", "127.0.0.1:99999", "127.0.0.1:x"])
def test_an_address_that_is_none_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        ControlPeer.connect(address)


def test_a_wildcard_server_tells_an_address_one_can_connect_to() -> None:
    with ControlServer.bind("0.0.0.0", 0) as server:
        assert "0.0.0.0" not in server.address
        with ControlPeer.connect(server.address) as peer:
            meet(server, peer)


def test_two_servers_on_one_host_do_not_share_peers(server: ControlServer, peer: ControlPeer) -> None:
    with ControlServer.bind("127.0.0.1", 0) as other:
        identity = meet(server, peer)
        assert other.poll(0.05) == []
        assert not other.alive(identity)


def test_closing_is_quick_may_be_repeated_and_leaves_no_thread() -> None:
    threads = set(os.listdir("/proc/self/task"))
    server = ControlServer.bind("127.0.0.1", 0)
    peer = ControlPeer.connect(server.address)
    meet(server, peer)
    start = time.monotonic()
    for _ in range(2):
        peer.close()
        server.close()
    assert time.monotonic() - start < 2
    # One that was joined is listed for a moment longer.
    eventually(lambda: set(os.listdir("/proc/self/task")) <= threads, 5.0, "its threads are gone")
