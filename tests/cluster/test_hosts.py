"""The kit of two hosts does what it says: delay is added, a cut drops, bytes are counted, nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Lab, joined_by_a_relay
from tests.process.runs import ROOT, eventually

pytestmark = pytest.mark.process
PORT = 7000
WAIT_S = 20.0


@contextlib.contextmanager
def connection(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection from the first host to the second, without Nagle's waiting."""
    a, b = lab.hosts
    with b.entered():
        listener = socket.create_server((b.address, PORT))
    with listener:
        listener.settimeout(WAIT_S)
        with a.entered():
            near = socket.create_connection((b.address, PORT), WAIT_S)
        with near:
            far, _ = listener.accept()
            with far:
                for end in (near, far):
                    end.settimeout(WAIT_S)
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield near, far


def round_trip_s(near: socket.socket, far: socket.socket) -> float:
    begin = time.monotonic()
    near.sendall(b"?")
    assert far.recv(1) == b"?"
    far.sendall(b"!")
    assert near.recv(1) == b"!"
    return time.monotonic() - begin


def test_a_cable_carries_bytes_and_the_hosts_see_nothing_else(cable: Lab) -> None:
    with connection(cable) as (near, far):
        assert round_trip_s(near, far) < WAIT_S
        assert near.getpeername() == (cable.hosts[1].address, PORT)
    links = cable.hosts[0].run("ip", "-brief", "link")
    assert sorted(line.split("@")[0].split()[0] for line in links.splitlines()) == ["eth0", "lo"]


def test_the_relay_adds_the_delay_each_way_and_takes_it_away_again(relay: Lab) -> None:
    assert relay.relay is not None
    with connection(relay) as (near, far):
        relay.relay.delay(0.05)
        assert min(round_trip_s(near, far) for _ in range(3)) >= 0.1
        relay.relay.delay(0.0)
        eventually(lambda: round_trip_s(near, far) < 0.05, WAIT_S, "a round trip without the delay")


def test_a_cut_drops_everything_and_a_mended_wire_brings_it_again(relay: Lab) -> None:
    assert relay.relay is not None
    wire = relay.relay
    with connection(relay) as (near, far):
        round_trip_s(near, far)
        assert wire.traffic().dropped == 0
        wire.cut(True)
        near.sendall(b"lost")
        eventually(lambda: wire.traffic().dropped >= 2, WAIT_S, "the packet and a repetition of it are dropped")
        far.settimeout(0.3)
        with pytest.raises(TimeoutError):
            far.recv(4)
        wire.cut(False)
        far.settimeout(WAIT_S)
        assert far.recv(4) == b"lost"


def test_bytes_are_counted_by_sender(relay: Lab) -> None:
    assert relay.relay is not None
    size = 200_000
    with connection(relay) as (near, far):
        before = relay.relay.traffic().sent
        near.sendall(b"x" * size)
        left = size
        while left:
            left -= len(far.recv(left))
        after = relay.relay.traffic().sent
    assert size < after[0] - before[0] < 1.5 * size
    assert 0 < after[1] - before[1] < 0.2 * size


@pytest.mark.usefixtures("relay")
def test_hosts_and_relay_are_gone_at_the_end_whatever_the_end_was() -> None:
    processes = []

    def fail() -> None:
        with joined_by_a_relay():
            processes.extend(psutil.Process().children(recursive=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(processes) >= 3
    before = psutil.Process().children(recursive=True)
    assert len([process for process in processes if lives(process)]) == len(before) == 3  # those of the fixture


OWNER = """
import sys
from tests.cluster.hosts import joined_by_a_relay
with joined_by_a_relay() as lab:
    print("made", flush=True)
    sys.stdin.read()
"""


@pytest.mark.usefixtures("relay")
def test_an_owner_that_is_killed_leaves_no_host() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"made\n"
        theirs = psutil.Process(owner.pid).children(recursive=True)
        namespaces = {os.readlink(f"/proc/{process.pid}/ns/net") for process in theirs}
        assert len(theirs) == 3  # two holders and the relay
        assert os.readlink("/proc/self/ns/net") not in namespaces
        owner.send_signal(signal.SIGKILL)
        eventually(lambda: not any(lives(process) for process in theirs), WAIT_S, "holders and relay end")
    finally:
        owner.kill()
        owner.communicate(timeout=WAIT_S)


def lives(process: psutil.Process) -> bool:
    return Path(f"/proc/{process.pid}").exists() and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
