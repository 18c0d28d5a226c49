"""What the two builders of a link tell each other: one connection between them, found by a secret, and a store over it.

Knows no links. Whoever comes without the secret is hung up on; nothing that a stranger says is interpreted.
"""

from __future__ import annotations

import hmac
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ssd_runtime.comm.hosts import listen
from ssd_runtime.comm.link.gloo_ports import opening

GUESTS = 64  # connections that may be about to say the secret; when one more comes the oldest is hung up on
BACKLOG = 1024  # who wait in the kernel to be let in; a guest that finds it full tries again after a second
SIZES = struct.Struct("!II")  # of a key and of its value
LONGEST = 1 << 16  # bytes of either
BUILT = "built"


class Exchange(dist.Store):
    """A store of two: every key is set by one side, once, and read by either.

    Args:
        connection: to the other side, which has one as well.
        give_up: when to stop waiting for it, by the monotonic clock.

    All methods raise OSError if the other side is gone, silent or talks nonsense.
    """

    def __init__(self, connection: socket.socket, give_up: float) -> None:
        super().__init__()
        self._connection, self._give_up = connection, give_up
        self._values: dict[str, bytes] = {}

    @property
    def own_host(self) -> str:
        """The address of this machine that leads to the other side."""
        return str(self._connection.getsockname()[0])

    def set(self, key: str, value: Any) -> None:
        """Tell the other side."""
        self._values[key] = bytes(value)
        self._tell(key, self._values[key])

    def get(self, key: str) -> bytes:
        """Wait for the key, as long as there is time."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until all keys are there; the other side has until `give_up`, whatever `timeout` says."""
        while not self.check(keys):
            key_size, value_size = SIZES.unpack(self._read(SIZES.size))
            if max(key_size, value_size) > LONGEST:
                raise ConnectionAbortedError("the other side talks nonsense")
            key = self._read(key_size).decode(errors="replace")
            self._values[key] = self._read(value_size)

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def settle(self) -> None:
        """Return when both sides are here, so that none takes for built what the other has given up."""
        self._tell(BUILT, b"")
        self.wait([BUILT])

    def close(self) -> None:
        """What was said stays readable."""
        self._connection.close()

    def _tell(self, key: str, value: bytes) -> None:
        self._hurry()
        self._connection.sendall(SIZES.pack(len(key.encode()), len(value)) + key.encode() + value)

    def _read(self, size: int) -> bytes:
        read = b""
        while len(read) < size:
            self._hurry()
            more = self._connection.recv(size - len(read))
            if not more:
                raise ConnectionAbortedError("the other side has hung up")
            read += more
        return read

    def _hurry(self) -> None:
        left = self._give_up - time.monotonic()
        if left <= 0:
            raise TimeoutError("the other side is silent")
        self._connection.settimeout(left)


def open_port(host: str) -> socket.socket:
    """A socket that listens at a free port of `host`; raises OSError."""
    with opening:
        port = listen(host, 0, BACKLOG)
    port.setblocking(False)
    port.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted inherits it
    return port


def answer(port: socket.socket, secret: bytes, give_up: float) -> Exchange:
    """Wait at a listening socket for whoever says the secret; raises OSError if nobody has by `give_up`."""
    with _Guests(port) as guests:
        while (left := give_up - time.monotonic()) > 0:
            for one in guests.waiting(left):
                if one is port:
                    guests.let_in()
                elif guests.says(one, secret):
                    return Exchange(guests.take(one), give_up)
    raise TimeoutError("nobody came")


def knock(host: str, port: int, secret: bytes, give_up: float) -> Exchange:
    """Come to a listening socket and say the secret; raises OSError."""
    connection = socket.create_connection((host, port), max(0.001, give_up - time.monotonic()))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(secret)
        return Exchange(connection, give_up)
    except BaseException:
        connection.close()
        raise


class _Guests:
    """Those who have come to a port and have not said the secret so far: a few at a time, whoever they are."""

    def __init__(self, port: socket.socket) -> None:
        self._port = port
        self._said: dict[socket.socket, bytes] = {}  # the oldest first
        self._selector = selectors.DefaultSelector()
        self._selector.register(port, selectors.EVENT_READ)

    def __enter__(self) -> _Guests:
        return self

    def __exit__(self, *ending: object) -> None:
        for guest in list(self._said):
            self._hang_up(guest)
        self._selector.close()

    def waiting(self, timeout_s: float) -> list[socket.socket]:
        """The port, if somebody is at it, and guests that have said something."""
        ready = [key.fileobj for key, _ in self._selector.select(timeout_s)]
        return [one for one in ready if isinstance(one, socket.socket)]

    def let_in(self) -> None:
        try:
            guest = self._port.accept()[0]
        except (BlockingIOError, ConnectionError):  # it has left meanwhile
            return
        guest.setblocking(False)
        if len(self._said) == GUESTS:
            self._hang_up(next(iter(self._said)))
        self._said[guest] = b""
        self._selector.register(guest, selectors.EVENT_READ)

    def says(self, guest: socket.socket, secret: bytes) -> bool:
        """Whether this guest has now said the secret. One that has said anything else, or has left, is hung up on."""
        if guest not in self._said:  # it had to make room
            return False
        try:
            more = guest.recv(len(secret) - len(self._said[guest]))
        except BlockingIOError:
            return False
        except ConnectionError:
            more = b""
        self._said[guest] = said = self._said[guest] + more
        if more and len(said) < len(secret):
            return False
        if not hmac.compare_digest(said, secret):
            self._hang_up(guest)
            return False
        return True

    def take(self, guest: socket.socket) -> socket.socket:
        """Part with a guest that is none any more."""
        self._selector.unregister(guest)
        del self._said[guest]
        return guest

    def _hang_up(self, guest: socket.socket) -> None:
        self.take(guest).close()
