"""The connections behind the peers of a ZeroMQ server: where each comes from, whether it is silent, how it is ended.

ZeroMQ tells none of that, but with every message the descriptor that it came by. Knows no messages.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Iterator

import zmq

GRAIN_S = 0.02  # what the kernel's clock and ours may differ by, and ZeroMQ's thread be late
TCP_INFO = struct.Struct("=52xI72xQ")  # Linux' struct tcp_info: milliseconds since data came last, bytes that came


class Connection:
    """One of them.

    Args:
        descriptor: of its socket, which is ZeroMQ's own and may be closed or another's by now.
        host: at its other end.
        port: at this end.

    Attributes:
        ended: it was ended from here; what still arrives of it is to be passed over.
        num_read: bytes of its messages so far.
        pings: something came of it that was no message; not every client's ZeroMQ is told to ping.
    """

    def __init__(self, descriptor: int, host: str, port: int) -> None:
        self.descriptor, self.host = descriptor, host
        self.ended = False
        self.num_read = 0
        self._port = port
        self._heard_at = time.monotonic()
        self.pings = False
        self._behind_since, self._unread_then = -1, 0
        self._peer: tuple[str, int] | None = None
        with self._socket() as opened:
            if opened is not None:
                self._peer = opened.getpeername()[:2]

    @property
    def is_loopback(self) -> bool:
        """Whether it came over a loopback address, which none of another host can."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback

    def heard(self) -> None:
        """A message of it was read."""
        self._heard_at = time.monotonic()

    def silence(self, read_until: float) -> float:
        """Seconds since its peer sent anything, pings included; 0 if that cannot be told, or while it does not ping.

        Args:
            read_until: all messages that had come by then, on the monotonic clock, are read.
        """
        silent = self._told()[0] / 1e3
        came_at = time.monotonic() - silent
        self.pings |= self._heard_at + GRAIN_S < came_at < read_until - GRAIN_S
        return silent if self.pings else 0.0

    def behind(self, since: int) -> int:
        """Bytes that came and were not read, beyond those at the first look.

        Args:
            since: number of the time for which the server has been behind; each has its own first look.
        """
        unread = self._told()[1] - self.num_read
        if self._behind_since != since:
            self._behind_since, self._unread_then = since, unread
        return unread - self._unread_then

    def _told(self) -> tuple[int, int]:
        """What the kernel tells (TCP_INFO); zeros of a connection that is gone."""
        with self._socket() as opened:
            if opened is not None:
                silent_ms, came = TCP_INFO.unpack(opened.getsockopt(socket.SOL_TCP, socket.TCP_INFO, TCP_INFO.size))
                return int(silent_ms), int(came)
        return 0, 0

    def end(self) -> str | None:
        """End it; returns the address of its peer, None if it is gone already."""
        self.ended = True
        with self._socket() as opened:
            if opened is not None:
                host, port = opened.getpeername()[:2]
                opened.shutdown(socket.SHUT_RDWR)
                return f"{host}:{port}"
        return None

    @contextlib.contextmanager
    def _socket(self) -> Iterator[socket.socket | None]:
        """A copy of its socket; None if the descriptor is none of ours any more."""
        with contextlib.ExitStack() as copies:
            found = None
            with contextlib.suppress(OSError):
                copy = copies.enter_context(socket.socket(fileno=os.dup(self.descriptor)))
                is_tcp = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM
                host, port = copy.getpeername()[:2]
                is_ours = is_tcp and copy.getsockname()[1] == self._port
                if is_ours and host == self.host and self._peer in (None, (host, port)):
                    found = copy
            with contextlib.suppress(OSError):  # it may go at any time
                yield found


class Connections:
    """Those of one server. At most one is kept for each descriptor, so strangers cannot pile them up.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._by_identity: dict[bytes, Connection] = {}
        self._identities: dict[int, bytes] = {}  # by descriptor: who was there last

    def get(self, identity: bytes) -> Connection | None:
        """That of a peer, if it has sent anything."""
        return self._by_identity.get(identity)

    def heard(self, identity: bytes, frame: zmq.Frame) -> Connection:
        """The connection by which a peer has sent this frame, the last of a message."""
        try:
            descriptor, host = int(frame.get(zmq.SRCFD)), str(frame.get("Peer-Address"))
        except zmq.ZMQError:
            descriptor, host = -1, ""
        known = self._by_identity.get(identity)
        if known is not None and (known.descriptor, known.host) == (descriptor, host):
            known.heard()
            return known
        former = self._identities.get(descriptor, b"")
        if former in self._by_identity and self._by_identity[former].descriptor == descriptor:
            del self._by_identity[former]
        self._identities[descriptor] = identity
        self._by_identity[identity] = Connection(descriptor, host, self._port)
        return self._by_identity[identity]
