"""The control plane's sockets and strangers: nonsense, floods, peers that vanish, descriptors that are another's."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zmq

from ssd_runtime.comm.control import server as control
from ssd_runtime.comm.control.client_messages import Cancel, Failed, Generate
from ssd_runtime.comm.control.codec import ASKED, encode
from ssd_runtime.comm.control.connections import Connection
from ssd_runtime.comm.control.messages import Message, Refused
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.control.server import ControlServer
from ssd_runtime.comm.hosts import address_of_host
from ssd_runtime.speculation.types import SamplingParams
from tests.control_sockets import SOON, meet, peer_fixture, receive, server_fixture, wait_until_gone  # noqa: F401
from tests.process.runs import eventually


@pytest.mark.parametrize(
    "parts", [[b"garbage"], [b""], [b"a", b"b"], [b"\x93\x01\xa6Cancel\x80"], [b"\x93\x63\xa6Cancel\x80"]]
)
def test_nonsense_is_refused_and_the_server_goes_on(
    server: ControlServer, peer: ControlPeer, parts: list[bytes]
) -> None:
    identity = meet(server, peer)
    peer._socket.send_multipart(parts)
    peer.send(Cancel("after"))
    assert receive(server) == (identity, Cancel("after"))
    assert isinstance(peer.wait_for(Refused, timeout_s=SOON), Refused)


def test_nonsense_from_the_server_reads_as_a_refusal(server: ControlServer, peer: ControlPeer) -> None:
    identity = meet(server, peer)
    server._socket.send_multipart((identity, b"\x93\x63\xa6Cancel\x80"))
    refused = peer.wait_for(Refused, timeout_s=SOON)
    assert isinstance(refused, Refused)
    assert "protocol version 99" in refused.reason


def test_something_that_does_not_speak_zeromq_disturbs_nobody(server: ControlServer, peer: ControlPeer) -> None:
    host, _, port = server.address.removeprefix("tcp://").partition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        meet(server, peer)


def test_a_message_beyond_the_limit_ends_its_senders_connection_and_no_others(
    server: ControlServer, peer: ControlPeer
) -> None:
    with ControlPeer.connect(server.address) as sender:
        meet(server, sender)
        sender._socket.send(bytes(ASKED.bytes + 1))
        deadline = time.monotonic() + SOON
        while sender.alive():
            assert time.monotonic() < deadline
            assert server.poll(0.01) == []
    meet(server, peer)


def test_a_message_that_cannot_be_read_fails_its_request_if_it_names_one(
    server: ControlServer, peer: ControlPeer
) -> None:
    meet(server, peer)
    request = Generate("mine", params=SamplingParams(top_k=2**63))
    for sent, answered in ((encode(request), Failed), (b"\x91" * 100_000, Refused), (b"", Refused)):
        peer._socket.send(sent)
        assert server.poll(SOON) == []
        (answer,) = peer.poll(SOON)
        assert isinstance(answer, answered)
        if isinstance(answer, Failed):
            assert (answer.request_id, answer.kind) == ("mine", "request")
            assert "Generate.params.top_k must be between 0 and 2147483647, not 9223372036854775808" in answer.reason
    meet(server, peer)


def test_a_message_of_very_many_parts_is_refused_without_holding_up_the_server(
    server: ControlServer, peer: ControlPeer
) -> None:
    with ControlPeer.connect(server.address) as sender:
        meet(server, sender)
        sender._socket.send_multipart([b""] * 200_000)
        refused: list[Message] = []
        longest, deadline = 0.0, time.monotonic() + SOON
        while not refused:
            assert time.monotonic() < deadline
            begin = time.thread_time()
            assert server.poll(0.0) == []
            longest = max(longest, time.thread_time() - begin)
            assert len(server._parts) <= 3
            refused = sender.poll(0.0)
        assert refused == [Refused("a message has one part, not more")]
        assert longest < 0.5  # all at once took seconds for millions
    meet(server, peer)


def test_memory_is_given_back_once_a_flood_is_over(
    server: ControlServer, peer: ControlPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(control, "give_back", lambda: given_back.append(True))
    meet(server, peer)
    assert not server.poll(0.0)
    assert not given_back
    monkeypatch.setattr(control, "BATCH", 4)  # what is read at once; more than that waits

    def flood() -> bool:
        for _ in range(100):
            peer.send(Cancel("flood"))
        while server.poll(0.1):
            pass
        return bool(given_back)

    eventually(flood, SOON, "memory is given back")
    assert not server.poll(0.0)
    given_back.clear()
    assert not server.poll(0.0)
    assert not given_back


def test_a_peer_that_left_is_noticed(server: ControlServer) -> None:
    with ControlPeer.connect(server.address) as peer:
        identity = meet(server, peer)
        assert server.alive(identity)
    wait_until_gone(server, identity)
    assert not server.send(identity, Cancel("x"))


def test_an_unknown_peer_is_not_alive(server: ControlServer) -> None:
    assert not server.send(b"nobody", Cancel("x"))


CHILD = """
import sys
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.control.client_messages import Cancel
peer = ControlPeer.connect(sys.argv[1], heartbeat_s=0.1)
peer.send(Cancel("child"))
while True:
    peer.poll(10)
"""


@pytest.mark.process
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_peer_is_noticed_by_the_heartbeat(server: ControlServer, signal_number: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, server.address])
    try:
        identity, _ = receive(server)
        connection = server._connections.by_identity.get(identity)
        while not connection.pings:
            server.poll(0.05)
            assert server.alive(identity)
        os.kill(child.pid, signal_number)
        assert wait_until_gone(server, identity) < 3
    finally:
        child.kill()
        child.wait(10)


def test_a_peer_whose_zeromq_does_not_ping_is_not_taken_for_lost() -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        with ControlServer.bind("127.0.0.1", 0, heartbeat_s=0.1) as server:
            dealer.connect(server.address)
            dealer.send(encode(Cancel("x")))
            identity, _ = receive(server)
            connection = server._connections.by_identity.get(identity)
            while connection._told()[0] < 3 * 300:  # ms of silence, three times what one that pings may have
                server.poll(0.05)
                assert server.alive(identity)
    finally:
        dealer.close(0)
        context.term()


FLOODS = """
import os, sys, time
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.control.client_messages import Cancel
from ssd_runtime.errors import PeerLost
peer = ControlPeer.connect(sys.argv[1], heartbeat_s=float(sys.argv[2]))
until = time.monotonic() + float(sys.argv[3])
while time.monotonic() < until:
    try:
        peer.send(Cancel("x" * 200))
    except PeerLost:  # its own queue is full, or the connection lost
        time.sleep(0.01)
        if not peer.alive() or len(sys.argv) > 4:
            break
os._exit(9)
"""


@pytest.mark.process
def test_what_waits_to_be_heard_of_a_peer_is_bounded(server: ControlServer) -> None:
    child = subprocess.Popen([sys.executable, "-c", FLOODS, server.address, "10", "20", "until its queue is full"])
    try:
        assert child.wait(10) == 9, "it could send without end"
    finally:
        child.kill()
        child.wait(10)
    assert server.poll(1.0)


OVERRUN = """
import subprocess, sys, time
from ssd_runtime.comm.control import server as control
from ssd_runtime.comm.control.client_messages import Cancel
control.MOST_UNHEARD, control.BATCH = 16, 1  # so that little fills its queue, and it is read slowly
with control.ControlServer.bind("127.0.0.1", 0, heartbeat_s=0.1) as server:
    flood = [sys.executable, "-c", sys.argv[1], server.address, "0.1", "0.4"]
    for _ in range(2):
        children = [subprocess.Popen(flood) for _ in range(3)]
        while any(child.poll() is None for child in children):
            for identity, _ in server.poll(0.02):
                server.send(identity, Cancel("x"))
            time.sleep(0.02)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        server.poll(0.02)
        time.sleep(0.02)
    print("still there")
"""


@pytest.mark.process
def test_the_death_of_those_who_flood_it_does_not_end_the_server() -> None:
    """libzmq aborts the process where its own heartbeat meets the full queue of a peer that is gone."""
    command = [sys.executable, "-c", OVERRUN, FLOODS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "still there\n", done.stderr


def test_a_peer_of_this_host_is_told_from_others(server: ControlServer, peer: ControlPeer) -> None:
    assert server.is_local(meet(server, peer))
    assert not server.is_local(b"nobody")
    host = address_of_host()
    with ControlServer.bind(host, 0) as elsewhere, ControlPeer.connect(elsewhere.address) as other:
        assert elsewhere.is_local(meet(elsewhere, other)) == host.startswith("127.")


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::ffff:127.0.0.1", True)]
    + [(host, False) for host in ("192.0.2.2", "::ffff:192.0.2.2", "fd00::2", "fe80::1%eth0", "", "localhost")],
)
def test_only_loopback_addresses_are_taken_for_this_host(host: str, is_loopback: bool) -> None:
    assert Connection(-1, host, 1).is_loopback == is_loopback


def test_a_dropped_peer_is_heard_no_more_and_one_that_comes_anew_is(
    server: ControlServer, peer: ControlPeer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    identity = meet(server, peer)
    for _ in range(3):
        peer.send(Cancel("waits"))
    server._drop(server._connections.by_identity.get(identity), "is not wanted")
    server._drop(server._connections.by_identity.get(identity), "is not wanted")
    assert not server.send(identity, Cancel("x"))
    assert not server.alive(identity)
    eventually(lambda: not peer.alive(), SOON, "its connection is gone")
    assert server.poll(0.1) == []
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("127.0.0.1:")
    assert line.endswith("is not wanted: dropped")
    with ControlPeer.connect(server.address) as again:
        meet(server, again)


def test_looking_at_a_descriptor_that_is_no_connection_opens_none(server: ControlServer, tmp_path: Path) -> None:
    """A descriptor may be another's by now: a file's, a pipe's, a socket's of another kind or port."""
    port = int(server.address.rpartition(":")[2])
    me = psutil.Process()
    with contextlib.ExitStack() as opened:
        file = opened.enter_context((tmp_path / "file").open("w"))
        reading, writing = os.pipe()
        opened.callback(os.close, reading)
        opened.callback(os.close, writing)
        sockets = [
            opened.enter_context(socket.socket(family, kind))
            for family, kind in ((socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM))
        ]
        elsewhere = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        before = me.num_fds()
        for descriptor in (
            -1,
            10**6,
            file.fileno(),
            reading,
            writing,
            elsewhere.fileno(),
            *map(socket.socket.fileno, sockets),
        ):
            for _ in range(10):
                connection = Connection(descriptor, "", port)
                assert not connection.is_open
                assert connection.unread() == 0
                assert connection.end() is None
        assert me.num_fds() == before
        assert os.fstat(file.fileno())


def take_all(opened: contextlib.ExitStack) -> None:
    """All descriptors that are left."""
    while True:
        opened.callback(os.close, os.dup(0))


def test_a_server_without_a_descriptor_left_goes_on(
    server: ControlServer, peer: ControlPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks around by opening files, which must not end it when strangers hold all descriptors."""
    identity = meet(server, peer)
    monkeypatch.setattr("ssd_runtime.comm.control.server.LOOK_S", 0.0)
    monkeypatch.setattr("ssd_runtime.comm.control.server.GROWN", -(2**40))  # so it looks at every turn
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 8, hard))
        assert [one.identity for one in server._connections.open_ones()] == [identity]
        eventually(server._backlog._has_grown, SOON, "it looks again")
        with pytest.raises(OSError, match="Too many open files"):
            take_all(opened)
        for message in (Cancel("one"), Cancel("two")):
            peer.send(message)
            assert receive(server) == (identity, message)
        assert not list(server._connections.open_ones())
        assert not server._backlog._has_grown()
