"""How a rank tells the launcher how it goes, as nobody else can. Knows no roles."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import zmq

from ssd_runtime.comm.control.codec import encode
from ssd_runtime.comm.control.messages import Message

KEY = "SSD_ANNOUNCE_KEY"  # in the environment, which other users of the host cannot read as they can a command line


@dataclass
class Announcer:
    """Silent when the rank was started by hand. Every message comes behind the key that the launcher gave its ranks."""

    address: str | None

    def __post_init__(self) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        if self.address is not None:
            self._socket = self._context.socket(zmq.PUSH)
            self._socket.linger = 1000
            self._socket.connect(self.address)

    def say(self, message: Message) -> None:
        if self._socket is not None:
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart((os.environ.get(KEY, "").encode(), encode(message)), zmq.NOBLOCK)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._context.term()
