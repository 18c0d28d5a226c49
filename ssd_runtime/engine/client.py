"""A client of a running engine: sends requests to the leader, yields what comes back. Knows no models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ssd_runtime.comm.control.client_messages import Cancel, Chunk, Failed, Finished, Generate, GetStatus, Status
from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.comm.control.messages import Refused, Shutdown
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.errors import Overloaded, PeerLost, RequestError, SsdError

FAILURES: dict[str, type[SsdError]] = {"request": RequestError, "engine": SsdError, "busy": Overloaded}


class Client:
    """One connection. Used by one thread.

    Args:
        address: of the leader, host:port or tcp://host:port.
        timeout_s: longest silence while something is awaited.

    Raises:
        ConfigError: `address` is not an address.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self._peer = ControlPeer.connect(address)
        self._timeout_s = timeout_s

    def generate(self, request: Generate) -> Iterator[Chunk | Finished]:
        """Send a request and yield its chunks as they come, then its Finished. Leaving early cancels the request.

        Raises:
            RequestError: the engine refuses the request, or would; the message says what to change.
            Overloaded: too many requests wait already; try again later.
            SsdError: the engine failed it.
            PeerLost: the engine is gone, or silent for `timeout_s`.
        """
        return self.generate_together([request])

    def generate_together(self, requests: Sequence[Generate]) -> Iterator[Chunk | Finished]:
        """As `generate` for several requests at once: what belongs to any of them, as it comes, until all are over.

        Whatever ends it early (the caller, or one request failing) cancels the others.
        """
        running = {request.request_id for request in requests}
        if len(running) < len(requests):  # an answer could not say whose it is
            raise RequestError("several requests have the same request_id: give each its own")
        for request in requests:
            _check(request)
        for request in requests:
            self._peer.send(request)
        try:
            for message in self._messages():
                if isinstance(message, Failed) and message.request_id in running:
                    running.discard(message.request_id)
                    raise FAILURES[message.kind](message.reason)
                if isinstance(message, Refused):
                    raise SsdError(f"the engine refused the request: {message.reason}")
                if isinstance(message, Chunk | Finished) and message.request_id in running:
                    if isinstance(message, Finished):
                        running.discard(message.request_id)
                    yield message
                    if not running:
                        return
        except PeerLost:
            running.clear()
            raise
        finally:
            for request_id in running:
                self._peer.send(Cancel(request_id))

    def _messages(self) -> Iterator[object]:
        silent_since = time.monotonic()
        while True:
            arrived = self._peer.poll(min(1.0, self._timeout_s))
            if arrived:
                yield from arrived
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > self._timeout_s:
                reason = f"{self._peer.address} said nothing for {self._timeout_s:g} s"
                raise PeerLost("target", 0, -1, reason)

    def status(self) -> Status:
        """How the engine is.

        Raises:
            PeerLost: it does not answer within `timeout_s`.
            SsdError: it does not take requests yet.
        """
        self._peer.send(GetStatus())
        answer = self._peer.wait_for(Status, Refused, timeout_s=self._timeout_s)
        if isinstance(answer, Refused):
            raise SsdError(f"the engine at {self._peer.address} takes no requests yet: {answer.reason}")
        assert isinstance(answer, Status)
        return answer

    def shutdown(self, key: str = "", timeout_s: float = 10.0) -> None:
        """Ask the engine to end, both roles. Returns when the leader has said that it will, and does not wait for it.

        Args:
            key: of the engine, told to whoever started it; without it, an engine may refuse to be ended from elsewhere.
            timeout_s: longest wait for the leader's word.

        Raises:
            PeerLost: the engine is gone, or silent for `timeout_s`.
            SsdError: it refuses; the message says what would be needed.
        """
        self._peer.send(Shutdown("asked by a client", key))
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._peer.wait_for(Status, Refused, timeout_s=max(0.001, deadline - time.monotonic()))
            if isinstance(answer, Refused):
                raise SsdError(f"the engine at {self._peer.address} does not end: {answer.reason}")
            if isinstance(answer, Status) and answer.state == "stopping":
                return

    def close(self) -> None:
        self._peer.close()


def _check(request: Generate) -> None:
    """Raise RequestError for a request that the engine would not read: it is read here, by the same rules."""
    try:
        decode(encode(request))
    except ProtocolError as error:
        raise RequestError(str(error)) from None
