"""The control plane's sockets: a ZeroMQ ROUTER that serves, DEALERs that connect. Knows messages, not what they mean.

Each object has a ZeroMQ context of its own and is used by one thread. ZeroMQ's heartbeats run in its own thread, so a
peer that computes is alive and a peer that is stopped or cut off is not. What a peer can make the server hold, unheard
or unread, is bounded. Nothing here blocks longer than it is told to.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import time
from collections import deque
from typing import Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from ssd_runtime.comm.control.client_messages import Failed
from ssd_runtime.comm.control.codec import ANSWERED, ASKED, Limits, decode, encode
from ssd_runtime.comm.control.connections import Backlog, Connection, Connections, give_back
from ssd_runtime.comm.control.messages import Heartbeat, Message, Refused
from ssd_runtime.comm.hosts import WILDCARDS, bare, is_ipv6, join, split
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.errors import ConfigError, PeerLost

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0  # between ZeroMQ's own pings; a peer silent for three of them is lost
LINGER_MS = 1000  # longest that close() waits for what was sent last
HANDSHAKE_MS = 3000  # longest that a connection may be open before its first words are through
QUEUE = 10_000  # messages that may wait at a peer, to be sent or read, before it counts its server as lost
MOST_UNREAD = 2048  # messages that a peer may leave unread before the server drops it
MOST_UNHEARD = 1024  # messages of one peer that wait at the server; the next ones wait at the peer
MOST_BEHIND = 64 * 2**20  # bytes, large messages being few: what all peers may send beyond what is read
KEEPALIVE_S = 60  # silence of a connection before the kernel asks whether the other host is there
DRAIN_S = 0.02  # longest that the server reads on while there is something to read
GIVE_BACK_S = 1.0  # after a peer was dropped: until its memory can be given back
MUCH = 2**17  # bytes of a message whose memory is given back as soon as nothing comes
BATCH = 256  # most messages of one poll, so that a flood does not starve the caller
MOST_PARTS = 3  # of a message: its identity, itself, and one that shows that it is none


def _opened(kind: int, host: str, heartbeat_s: float, limits: Limits) -> zmq.Socket[bytes]:
    """A socket with our options for an address of this host, in a context of its own."""
    opened = zmq.Context(io_threads=1).socket(kind)
    beat = max(1, int(heartbeat_s * 1000))
    for option, value in (
        (zmq.IPV6, is_ipv6(host)),
        (zmq.LINGER, LINGER_MS),
        (zmq.SNDHWM, QUEUE),
        (zmq.RCVHWM, QUEUE),
        (zmq.MAXMSGSIZE, limits.bytes),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        (zmq.CONNECT_TIMEOUT, 3 * beat),  # else a lost SYN is sent again after up to a minute
        (zmq.HEARTBEAT_IVL, beat),
        (zmq.HEARTBEAT_TIMEOUT, 3 * beat),
        (zmq.HEARTBEAT_TTL, 3 * beat),
    ):
        opened.setsockopt(option, value)
    return opened


class _Socket:
    """What the two ends share: bounded closing."""

    def __init__(self, opened: zmq.Socket[bytes]) -> None:
        self._socket = opened

    def close(self) -> None:
        """Send what is queued (for at most a second) and close. May be repeated."""
        self._socket.close()
        self._socket.context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()


class ControlServer(_Socket):
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
        opened = _opened(zmq.ROUTER, host, heartbeat_s, limits)
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
            _Socket(opened).close()
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
            message = _decode_parts([part.bytes for part in parts], self._limits)
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
        known = self._connections.get(identity)
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
        known = self._connections.get(identity)
        if known is not None and (silence := known.silence(self._read_until)) > self._silence_s:
            self._drop(known, f"has been silent for {silence:.1f} s")
        return self.send(identity, Heartbeat())

    def is_local(self, identity: bytes) -> bool:
        """Whether this peer has come over a loopback address."""
        known = self._connections.get(identity)
        return known is not None and known.is_loopback

    def _drop(self, known: Connection | None, why: str) -> None:
        """End the connection of a peer, and so free what it left unread; ZeroMQ itself would keep both."""
        if known is not None and not known.ended and (peer := known.end()) is not None:
            log.warning("%s (%s) %s: dropped", peer, known.identity.hex() or "no message so far", why)
            self._flooded, self._give_back_at = True, time.monotonic() + GIVE_BACK_S


class ControlPeer(_Socket):
    """A draft's, client's or worker's end, made by `connect`. A connection that was lost stays lost: make another."""

    def __init__(self, dealer: zmq.Socket[bytes], address: str, role: str, rank: int) -> None:
        super().__init__(dealer)
        self.address = address
        self._role, self._rank = role, rank
        self._waiting: deque[Message] = deque()  # arrived while wait_for awaited something else
        self._connected, self._lost = False, False
        self._monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    @classmethod
    def connect(cls, address: str, *, role: str = "target", rank: int = 0, heartbeat_s: float = HEARTBEAT_S) -> Self:
        """A peer of the server at an address, which may come up later.

        Args:
            address: tcp://host:port or host:port.
            role, rank: who the server is, for error messages.
            heartbeat_s: between pings.

        Raises:
            ConfigError: `address` is not an address.
        """
        try:
            host, port = split(address)
        except ValueError as error:
            raise ConfigError(f"{address!r} is not an address; {error}") from None
        opened = _opened(zmq.DEALER, host, heartbeat_s, ANSWERED)
        peer = cls(opened, f"tcp://{join(host, port)}", role, rank)
        try:
            opened.connect(peer.address)
        except zmq.ZMQError as error:
            peer.close()
            why = os.strerror(error.errno or 0)
            raise ConfigError(f"{address!r} is not an address; expected host:port ({why})") from None
        return peer

    def close(self) -> None:
        if not self._monitor.closed:
            self.alive()
            if not self._connected or self._lost:
                self._socket.setsockopt(zmq.LINGER, 0)  # nobody to wait for
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        super().close()

    def send(self, message: Message) -> None:
        """Queue a message; raises PeerLost if the server is gone."""
        if not self.alive():
            raise self._gone(f"not connected to {self.address} any more")
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise self._gone(f"{self.address} has not read {QUEUE} messages") from None

    def poll(self, timeout_s: float) -> list[Message]:
        """What has arrived, in order; waits at most `timeout_s` for the first.

        Bytes this side does not understand count as a Refused with the reason. Raises PeerLost if the server is gone
        and all it sent has been read.
        """
        arrived = list(self._waiting)
        self._waiting.clear()
        deadline = time.monotonic() + timeout_s
        while True:
            alive = self.alive()  # asked first: what came just before the end is read
            arrived += self._receive()
            if arrived:
                return arrived
            if not alive:
                raise self._gone(f"connection to {self.address} lost")
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            self._poller.poll(math.ceil(left * 1000))

    def wait_for(self, *kinds: type[Message], timeout_s: float) -> Message:
        """The first message of one of these types; others wait for the next poll. Raises PeerLost at the deadline."""
        names = " or ".join(kind.__name__ for kind in kinds)
        deadline = time.monotonic() + timeout_s
        others: list[Message] = []
        try:
            left = max(0.0, timeout_s)
            while left >= 0:
                arrived = self.poll(left)
                for i, message in enumerate(arrived):
                    if isinstance(message, kinds):
                        others += arrived[i + 1 :]
                        return message
                    others.append(message)
                left = deadline - time.monotonic()
        finally:
            self._waiting.extendleft(reversed(others))
        connected = "connected" if self._connected else "never connected"
        raise self._gone(f"no {names} within {timeout_s:g} s from {self.address} ({connected})")

    def alive(self) -> bool:
        """False once an established connection was lost; True before it is established."""
        while not self._lost and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
            elif self._connected:
                self._lost = True
        return not self._lost

    def _receive(self) -> list[Message]:
        arrived: list[Message] = []
        for _ in range(BATCH):
            try:
                message = _decode_parts(self._socket.recv_multipart(zmq.NOBLOCK), ANSWERED)
            except zmq.Again:
                break
            except ProtocolError as error:
                log.warning("%s sent nonsense: %s", self.address, error)
                message = Refused(f"{self.address} sent nonsense: {error}")
            if not isinstance(message, Heartbeat):
                arrived.append(message)
        return arrived

    def _gone(self, reason: str) -> PeerLost:
        return PeerLost(self._role, self._rank, -1, reason)


def _decode_parts(parts: list[bytes], limits: Limits) -> Message:
    if len(parts) != 1:
        raise ProtocolError(f"a message has one part, not {'none' if not parts else 'more'}")
    return decode(parts[0], limits)


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
