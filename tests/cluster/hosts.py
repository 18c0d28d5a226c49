"""Two hosts on one machine: network namespaces joined by a cable, or by a relay that delays, counts and cuts.

Nothing here has a name that others could see: a namespace lives as long as a process in it, and the process that holds
it ends when the pipe to its owner closes. So nothing is left behind, even by a test run that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RELAY = Path(__file__).with_name("relay.py")
CLONE_NEWNET = 0x40000000  # linux/sched.h
READY_S = 20.0


class CannotMakeHosts(Exception):
    """What this machine lacks; the reason of a skip."""


@dataclass
class Host:
    """A network namespace with one address.

    Attributes:
        name: for people.
        address: its IPv4 address.
        holder: the process that keeps it alive, waiting for the end of its standard input.
    """

    name: str
    address: str
    holder: subprocess.Popen[bytes]

    @property
    def namespace(self) -> str:
        return f"/proc/{self.holder.pid}/ns/net"

    def command(self, *command: str) -> tuple[str, ...]:
        """The command line that runs a command on this host."""
        return ("nsenter", f"--net={self.namespace}", "--", *command)

    def run(self, *command: str) -> str:
        """Run a short command here; what it prints."""
        done = subprocess.run(self.command(*command), capture_output=True, text=True, timeout=READY_S)
        if done.returncode != 0:
            raise CannotMakeHosts(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return done.stdout

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is on this host; so are, for ever, the sockets and threads that it makes meanwhile."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(self.namespace, os.O_RDONLY)
        try:
            enter(there)
            yield
        finally:
            enter(home)
            os.close(home)
            os.close(there)

    def close(self) -> None:
        """Let the namespace go; it ends with the last process in it."""
        self.holder.communicate(timeout=READY_S)  # closes its standard input


@dataclass(frozen=True)
class Traffic:
    """What the relay has carried so far, both ways together unless said otherwise.

    Attributes:
        sent: bytes that came from each host.
        dropped: packets that fell into the black hole.
    """

    sent: tuple[int, int]
    dropped: int


class Relay:
    """The wire between two hosts, in a process of its own."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        command = [sys.executable, "-S", "-E", str(RELAY), *(host.namespace for host in hosts)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        try:
            said = self._read()
            if "error" in said:
                raise CannotMakeHosts(f"no TUN device: {said['error']}")
        except BaseException:
            self.close()
            raise

    def delay(self, seconds: float) -> None:
        """Every packet takes so much longer from now on, each way."""
        self._ask({"delay": seconds})

    def cut(self, cut: bool) -> None:
        """Whether every packet disappears from now on."""
        self._ask({"cut": cut})

    def traffic(self) -> Traffic:
        said = self._ask({})
        return Traffic(tuple(said["sent"]), said["dropped"])

    def close(self) -> None:
        self._process.communicate(timeout=READY_S)

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CannotMakeHosts(f"the relay ended with exit code {self._process.wait(READY_S)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Lab:
    """Two hosts, and the wire if it is one that can be disturbed."""

    hosts: tuple[Host, Host]
    relay: Relay | None = None


@contextlib.contextmanager
def joined_by_a_cable() -> Iterator[Lab]:
    """Two hosts with a veth pair between them."""
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(_host(i)) for i in (1, 2))
        a.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(b.holder.pid))
        for host in (a, b):
            _configure(host)
        yield Lab((a, b))


@contextlib.contextmanager
def joined_by_a_relay() -> Iterator[Lab]:
    """Two hosts with a TUN device each, and a process that carries packets between them."""
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(_host(i)) for i in (1, 2))
        relay = Relay((a, b))
        stack.callback(relay.close)
        for host in (a, b):
            _configure(host)
        yield Lab((a, b), relay)


def reason_for_none() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "nsenter", "unshare") if shutil.which(program) is None]
    if missing:
        return f"missing: {', '.join(missing)} (packages iproute2 and util-linux)"
    try:
        with joined_by_a_cable(), joined_by_a_relay():
            return None
    except CannotMakeHosts as error:
        return str(error)


def enter(namespace: int) -> None:
    """Move the calling thread to a network namespace, given as an open file (setns(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"setns: {os.strerror(errno)}")


@contextlib.contextmanager
def _host(number: int) -> Iterator[Host]:
    script = "ip link set lo up && echo up && exec cat"
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C at the terminal is the test's to handle
    )
    host = Host(f"host{number}", f"10.77.0.{number}", holder)
    assert holder.stdout is not None
    try:
        said = holder.stdout.readline().decode().strip()
        if said != "up":
            raise CannotMakeHosts(f"no network namespace: {said}")
        yield host
    finally:
        host.close()


def _configure(host: Host) -> None:
    host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    host.run("ip", "link", "set", "eth0", "up")
