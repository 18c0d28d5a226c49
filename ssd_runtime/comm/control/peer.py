"""A peer of the control plane: a ZeroMQ DEALER of a draft, a client or a worker. Knows messages, not what they mean.

Nothing here blocks longer than it is told to.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from typing import Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from ssd_runtime.comm.control.codec import ANSWERED, encode
from ssd_runtime.comm.control.messages import Heartbeat, Message, Refused
from ssd_runtime.comm.control.sockets import BATCH, HEARTBEAT_S, QUEUE, ControlSocket, decode_parts, opened_socket
from ssd_runtime.comm.hosts import join, split
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.errors import ConfigError, PeerLost

log = logging.getLogger(__name__)


class ControlPeer(ControlSocket):
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
        opened = opened_socket(zmq.DEALER, host, heartbeat_s, ANSWERED)
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
                message = decode_parts(self._socket.recv_multipart(zmq.NOBLOCK), ANSWERED)
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
