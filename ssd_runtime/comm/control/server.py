"""The server of the control plane: a ZeroMQ ROUTER of the leader or the launcher. Knows messages, not what they mean.

What a peer can make it hold, unheard or unread, is bounded. Nothing here blocks longer than it is told to.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import zmq

from ssd_runtime.comm.control.client_messages import Failed
from ssd_runtime.comm.control.codec import ASKED, Limits, encode
from ssd_runtime.comm.control.connections import Connection, Connections
from ssd_runtime.comm.control.messages import Heartbeat, Message, Refused
from ssd_runtime.comm.control.sockets import BATCH, HEARTBEAT_S, ControlSocket, decode_parts, opened_socket
from ssd_runtime.comm.hosts import WILDCARDS, bare, join
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.errors import ConfigError

log = logging.getLogger(__name__)

MOST_UNREAD = 2048  # messages that a peer may leave unread before the server drops it
MOST_UNHEARD = 1024  # messages of one peer that wait at the server; the next ones wait at the peer
MOST_BEHIND = 64 * 2**20  # bytes, large messages being few: what all peers may send beyond what is read
KEEPALIVE_S = 60  # silence of a connection before the kernel asks whether the other host is there
DRAIN_S = 0.02  # longest that the server reads on while there is something to read
GIVE_BACK_S = 1.0  # after a peer was dropped: until its memory can be given back
MUCH = 2**17  # bytes of a message whose memory is given back as soon as nothing comes
MOST_PARTS = 3  # of a message: its identity, itself, and one that shows that it is none
PAGE = os.sysconf("SC_PAGE_SIZE")
LOOK_S = 0.05  # between two looks whether the process has grown
GROWN = 16 * 2**20  # bytes by which it has, if its connections are looked at
MOST_SEEN = 256  # of them, in one call: some milliseconds


class ControlServer(ControlSocket):
    """The leader's (or launcher's) end, made by `bind`. Peers are known by the identity their messages come with.

    Attributes:
        address: where peers connect, as tcp://host:port.
    """

    def __init__(self, router: zmq.Socket[bytes], address: str, port: int, silence_s: float, limits: Limits) -> None:
        super().__init__(router)
        self.address = address
        self._silence_s = silence_s  # the longest of a peer that pings
        self._limits = limits
        self._connections = Connections(port)
        self._backlog = Backlog(self._connections)
        self._nonsense = 0
        self._parts: list[zmq.Frame] = []  # of the message that is being received: identity, and what came after it
        self._flooded = False  # more came than is read at once, and not all was read so far
        self._size_read = 0  # on the wire, of that message so far
        self._read_until = 0.0  # all that had come by then is read
        self._give_back_at = 0.0  # not before; what a dropped peer left unread takes a moment to be freed

    @classmethod
    def bind(
        cls,
        host: str,
        port: int,
        *,
        known_as: str | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        limits: Limits = ASKED,
    ) -> Self:
        """A server at an address.

        Args:
            host: "0.0.0.0" for all addresses of this machine.
            port: 0 takes a free one.
            known_as: the host to tell others, where `host` is a wildcard.
            heartbeat_s: between the pings of its peers.

        Raises:
            ConfigError: the address cannot be bound.
        """
        host = bare(host)
        opened = opened_socket(zmq.ROUTER, host, heartbeat_s, limits)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.RCVHWM, MOST_UNHEARD),
            (zmq.SNDHWM, MOST_UNREAD),
            # No pings of the server's own: libzmq 4.3 aborts the process ("Assertion failed: !_io_error") when it is
            # about to ping a peer that left while its queue here was full, as a flood makes it. The peers ping, and
            # `alive` looks whether one that did still does; those that never did the kernel asks.
            (zmq.HEARTBEAT_IVL, 0),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S),
        ):
            opened.setsockopt(option, value)
        try:
            opened.bind(f"tcp://{join(host, port)}")
        except zmq.ZMQError as error:
            ControlSocket(opened).close()
            raise ConfigError(_bind_failure(host, port, error)) from None
        port = int(opened.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        address = f"tcp://{join(known_as or _reachable(host), port)}"
        return cls(opened, address, port, 3 * heartbeat_s, limits)

    def poll(self, timeout_s: float) -> list[tuple[bytes, Message]]:
        """What has arrived, in order; waits at most `timeout_s` for the first.

        Nonsense is answered by Failed if it says which request it would have been about, else by Refused.
        """
        arrived: list[tuple[bytes, Message]] = []
        read = 0
        if timeout_s > 0:
            self._socket.poll(math.ceil(timeout_s * 1000))
        until = time.monotonic() + DRAIN_S
        while len(arrived) < BATCH and time.monotonic() < until:
            try:
                whole = self._receive()
            except zmq.Again:
                self._read_until = time.monotonic()
                break
            if whole is not None:
                read += 1
                arrived += self._read(whole[0].bytes, whole[1:])
        for one in self._backlog.beyond(MOST_BEHIND):
            self._drop(one, f"has sent {one.unread() >> 20} MiB that could not be read")
        self._tidy_up(read)
        return arrived

    def _read(self, identity: bytes, parts: list[zmq.Frame]) -> list[tuple[bytes, Message]]:
        """What a peer says in these parts, none if it is not for the caller; what it cannot mean is answered."""
        sender = self._connections.heard(identity, parts[-1])
        sender.num_read += self._size_read
        self._flooded |= self._size_read >= MUCH
        self._size_read = 0
        if sender.ended:
            return []
        try:
            message = decode_parts([part.bytes for part in parts], self._limits)
        except ProtocolError as error:
            self._nonsense += 1
            if self._nonsense.bit_count() == 1:  # 1, 2, 4, 8...: a flood of it is not to flood the log
                log.warning("peer %s sent nonsense (%d so far): %s", identity.hex(), self._nonsense, error)
            about, reason = error.request_id, str(error)
            self.send(identity, Refused(reason) if about is None else Failed(about, "request", reason))
            return []
        return [] if isinstance(message, Heartbeat) else [(identity, message)]

    def _receive(self) -> list[zmq.Frame] | None:
        """One more part of what a peer sends; with the last one all, the identity first. Millions hold up nobody."""
        part = self._socket.recv(zmq.NOBLOCK, copy=False)
        if self._parts:  # the identity is not sent
            self._size_read += len(part) + (2 if len(part) < 256 else 9)  # ZMTP 3: flags, and its length in 1 byte or 8
        if len(self._parts) < MOST_PARTS:
            self._parts.append(part)
        else:
            self._flooded = True
        if self._socket.getsockopt(zmq.RCVMORE):
            return None
        parts, self._parts = self._parts, []
        return parts

    def _tidy_up(self, read: int) -> None:
        """Once a flood is over, give back the memory in which it waited to be read."""
        if read >= BATCH:
            self._flooded = True
        elif self._flooded and not read and time.monotonic() > self._give_back_at:
            self._flooded = False
            give_back()

    def send(self, identity: bytes, message: Message) -> bool:
        """Send without waiting; False if this peer is gone. One that has left too much unread is dropped with this."""
        known = self._connections.by_identity.get(identity)
        if known is not None and known.ended:
            return False
        try:
            self._socket.send_multipart((identity, encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno == zmq.EAGAIN:
                self._drop(known, f"has left {MOST_UNREAD} messages unread")
            elif error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def alive(self, identity: bytes) -> bool:
        """Whether this peer is connected and, if its ZeroMQ pings, still does (a heartbeat is sent to it)."""
        known = self._connections.by_identity.get(identity)
        if known is not None and (silence := known.silence(self._read_until)) > self._silence_s:
            self._drop(known, f"has been silent for {silence:.1f} s")
        return self.send(identity, Heartbeat())

    def is_local(self, identity: bytes) -> bool:
        """Whether this peer has come over a loopback address."""
        known = self._connections.by_identity.get(identity)
        return known is not None and known.is_loopback

    def _drop(self, known: Connection | None, why: str) -> None:
        """End the connection of a peer, and so free what it left unread; ZeroMQ itself would keep both."""
        if known is not None and not known.ended and (peer := known.end()) is not None:
            log.warning("%s (%s) %s: dropped", peer, known.identity.hex() or "no message so far", why)
            self._flooded, self._give_back_at = True, time.monotonic() + GIVE_BACK_S


class Backlog:
    """What a server holds that came by its connections and was not read: whole messages, and parts of such.

    ZeroMQ keeps the parts of a message and shows none before the last one has come, which need never be.

    Args:
        connections: of the server.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._size, self._look_at = 0, 0.0
        self._to_see: Iterator[Connection] | None = None
        self._seen: list[tuple[int, Connection]] = []

    def beyond(self, most: int) -> list[Connection]:
        """Of whom most came, as many as have to be ended for no more than `most` bytes to be left; mostly none.

        To be called often: it looks only when the process has grown, and never at many in one call.
        """
        if self._to_see is None:
            if not self._has_grown():
                return []
            self._to_see, self._seen = self._connections.open_ones(), []
        seen = [(one.unread(), one) for one in itertools.islice(self._to_see, MOST_SEEN)]
        self._seen += seen
        if len(seen) == MOST_SEEN:
            return []
        every, self._to_see, self._seen = self._seen, None, []
        left, ending = sum(unread for unread, _ in every), []
        for unread, one in sorted(every, key=lambda item: item[0], reverse=True):
            if left > most:
                ending.append(one)
                left -= unread
        return ending

    def _has_grown(self) -> bool:
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + LOOK_S
        try:
            size = resident()
        except OSError:  # no descriptor is left to look with
            return False
        has_grown = size > self._size + GROWN
        self._size = size if has_grown else min(self._size, size)
        return has_grown


def give_back() -> None:
    """Return memory that was freed to the system.

    What piles up in a burst is freed in the order of its reading, between blocks that stay, and malloc by itself gives
    back only what is free at the top: after each burst the process may be a little larger. Under a millisecond after a
    burst of tens of MiB. Without glibc (malloc_trim(3)) nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident() -> int:
    """Bytes of memory that the process takes now. Raises OSError if no descriptor is left to look with."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * PAGE


def _bind_failure(host: str, port: int, error: zmq.ZMQError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; choose another with --set serve.port=N, or 0 for any free one"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges; choose one above 1023 with --set serve.port=N"
    why = os.strerror(error.errno or 0)
    return f"cannot serve on {join(host, port)}: {why}; is serve.host an address of this machine?"


def _reachable(host: str) -> str:
    """The host to tell others: a wildcard is not an address."""
    if host not in WILDCARDS:
        return host
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
