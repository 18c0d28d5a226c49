"""How ranks tell the launcher how they go, as nobody else can: both ends. Knows no roles."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from ssd_runtime.comm.control.codec import ASKED, decode, encode
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.comm.protocol import ProtocolError

log = logging.getLogger(__name__)

KEY = "SSD_ANNOUNCE_KEY"  # in the environment, which other users of the host cannot read as they can a command line
BATCH = 256  # most messages that are read at once, whoever sends them


@dataclass(frozen=True)
class Announcer:
    """A rank's end; silent without a socket, when the rank was started by hand. Every message comes behind the key that
    the launcher gave its ranks."""

    socket: zmq.Socket[bytes] | None = None

    @classmethod
    def to(cls, address: str | None) -> Announcer:
        """One that tells the launcher at an address, if there is any."""
        if address is None:
            return cls()
        socket = zmq.Context().socket(zmq.PUSH)
        socket.linger = 1000
        socket.connect(address)
        return cls(socket)

    def say(self, message: Message) -> None:
        if self.socket is not None:
            with contextlib.suppress(zmq.Again):
                self.socket.send_multipart((os.environ.get(KEY, "").encode(), encode(message)), zmq.NOBLOCK)

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket.context.term()


class Announcements:
    """The launcher's end.

    Attributes:
        key: for the environment of the ranks.
        address: where it listens; empty before `open`.
    """

    def __init__(self) -> None:
        self.key = secrets.token_hex(16)
        self.address = ""
        self._socket: zmq.Socket[bytes] | None = None
        self._strangers = 0

    def open(self) -> None:
        """Listen, on this host alone."""
        self._socket = zmq.Context().socket(zmq.PULL)
        self._socket.linger = 0
        self._socket.maxmsgsize = ASKED.bytes
        self._socket.bind("tcp://127.0.0.1:*")
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)

    def heard(self, timeout_s: float) -> Iterator[Message]:
        """What ranks have said since; waits for the first word of anybody. Some may be left for the next call."""
        assert self._socket is not None, "not open"
        for _ in range(BATCH):
            if not self._socket.poll(int(timeout_s * 1000)):
                return
            timeout_s = 0.0
            if (message := self._understood(self._socket.recv_multipart())) is not None:
                yield message

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket.context.term()

    def _understood(self, parts: list[bytes]) -> Message | None:
        """What a rank of this launcher says; None for whatever others send to its port, which is told of once."""
        try:
            if len(parts) != 2 or not hmac.compare_digest(parts[0], self.key.encode()):
                raise ProtocolError("it is none of the ranks")
            return decode(parts[1])
        except ProtocolError as error:
            self._strangers += 1
            if self._strangers == 1:
                log.warning("ignored what somebody sent to %s: %s", self.address, error)
            return None
