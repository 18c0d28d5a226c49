"""How a rank tells the launcher how it goes. Knows no roles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import zmq

from ssd_runtime.comm.codec import encode
from ssd_runtime.comm.messages import Message


@dataclass
class Announcer:
    """Silent when the rank was started by hand."""

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
                self._socket.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._context.term()
