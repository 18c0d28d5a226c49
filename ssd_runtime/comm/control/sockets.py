"""What both ends of the control plane share: a ZeroMQ socket with our options, and bounded closing.

Each object has a ZeroMQ context of its own and is used by one thread. ZeroMQ's heartbeats run in its own thread, so a
peer that computes is alive and a peer that is stopped or cut off is not.
"""

from __future__ import annotations

from typing import Self

import zmq

from ssd_runtime.comm.control.codec import Limits, decode
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.comm.hosts import is_ipv6
from ssd_runtime.comm.protocol import ProtocolError

HEARTBEAT_S = 1.0  # between ZeroMQ's own pings; a peer silent for three of them is lost
LINGER_MS = 1000  # longest that close() waits for what was sent last
HANDSHAKE_MS = 3000  # longest that a connection may be open before its first words are through
QUEUE = 10_000  # messages that may wait at a peer, to be sent or read, before it counts its server as lost
BATCH = 256  # most messages of one poll, so that a flood does not starve the caller


def opened_socket(kind: int, host: str, heartbeat_s: float, limits: Limits) -> zmq.Socket[bytes]:
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


class ControlSocket:
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


def decode_parts(parts: list[bytes], limits: Limits) -> Message:
    if len(parts) != 1:
        raise ProtocolError(f"a message has one part, not {'none' if not parts else 'more'}")
    return decode(parts[0], limits)
