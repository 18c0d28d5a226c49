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
PINGS_PER_S = 128  # bytes that may have come of it and were no messages
TCP_INFO = struct.Struct("=52xI72xQ")  # Linux' struct tcp_info: milliseconds since data came last, bytes that came


class Connection:
    """One of them.

    Args:
        descriptor: of its socket, which is ZeroMQ's own and may be closed or another's by now.
        host: at its other end; empty for whichever is there.
        port: at this end.
        identity: by which ZeroMQ knows its peer; empty before the first message.

    Attributes:
        ended: it was ended from here; what still arrives of it is to be passed over.
        num_read: bytes that its messages so far took on the wire.
        pings: something came of it that was no message; not every client's ZeroMQ is told to ping.
    """

    def __init__(self, descriptor: int, host: str, port: int, identity: bytes = b"") -> None:
        self.descriptor, self.host, self.identity = descriptor, host, identity
        self.ended = False
        self.num_read = 0
        self._port = port
        self._begun_at = self._heard_at = time.monotonic()
        self.pings = False
        self._peer: tuple[str, int] | None = None

    def look(self) -> Connection:
        """Find out who is at its other end while it is there; returns itself."""
        with self._socket() as opened:
            if opened is not None:
                self._peer = opened.getpeername()[:2]
                self.host = self._peer[0]
        return self

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

    def unread(self) -> int:
        """Bytes that came and were not read, which may be of a message without an end; 0 of one that is gone."""
        return max(0, self._told()[1] - self.num_read - int(PINGS_PER_S * (time.monotonic() - self._begun_at)))

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

    @property
    def is_open(self) -> bool:
        """Whether its descriptor still is that of its socket."""
        with self._socket() as opened:
            return opened is not None

    @contextlib.contextmanager
    def _socket(self) -> Iterator[socket.socket | None]:
        """A copy of its socket; None if the descriptor is none of ours any more."""
        copy = _copy_of(self.descriptor, self._port)
        with contextlib.nullcontext() if copy is None else copy, contextlib.suppress(OSError):  # it may go at any time
            yield copy if copy is not None and self._is_mine(copy) else None

    def _is_mine(self, opened: socket.socket) -> bool:
        try:
            host, port = opened.getpeername()[:2]
        except OSError:
            return False
        return self.host in ("", host) and self._peer in (None, (host, port))


def _copy_of(descriptor: int, port: int) -> socket.socket | None:
    """A copy of that socket, None if it is no TCP socket of this port."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    try:
        opened = socket.socket(fileno=copy)
    except OSError:  # of a file or a pipe, which is still open then
        os.close(copy)
        return None
    is_tcp = opened.family in (socket.AF_INET, socket.AF_INET6) and opened.type == socket.SOCK_STREAM
    if is_tcp and opened.getsockname()[1] == port:
        return opened
    opened.close()
    return None


class Connections:
    """Those of one server. At most one is kept for each descriptor, so strangers cannot pile them up.

    Args:
        port: of the server.

    Attributes:
        by_identity: that of each peer that has sent anything.
    """

    def __init__(self, port: int) -> None:
        self.by_identity: dict[bytes, Connection] = {}
        self._port = port
        self._identities: dict[int, bytes] = {}  # by descriptor: who was there last

    def open_ones(self) -> Iterator[Connection]:
        """All that are open, also those by which no whole message has come yet."""
        descriptors: list[str] = []
        with contextlib.suppress(OSError):  # none is left to look with
            descriptors = os.listdir("/proc/self/fd")
        for descriptor in map(int, descriptors):
            known = self.by_identity.get(self._identities.get(descriptor, b""))
            if known is None or known.descriptor != descriptor or not known.is_open:
                known = Connection(descriptor, "", self._port).look()
            if known.is_open:
                yield known

    def heard(self, identity: bytes, frame: zmq.Frame) -> Connection:
        """The connection by which a peer has sent this frame, the last of a message."""
        try:
            descriptor, host = int(frame.get(zmq.SRCFD)), str(frame.get("Peer-Address"))
        except zmq.ZMQError:
            descriptor, host = -1, ""
        known = self.by_identity.get(identity)
        if known is not None and (known.descriptor, known.host) == (descriptor, host):
            known.heard()
            return known
        former = self._identities.get(descriptor, b"")
        if former in self.by_identity and self.by_identity[former].descriptor == descriptor:
            del self.by_identity[former]
        self._identities[descriptor] = identity
        self.by_identity[identity] = Connection(descriptor, host, self._port, identity).look()
        return self.by_identity[identity]
