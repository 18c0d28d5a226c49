"""One end of a link between target and draft: frames over two pipes, one a direction. Knows frames, not what they mean.

A link is built for one epoch (setup.py) and never repaired: when the peer dies, falls silent or talks nonsense, every
call raises PeerLost, and the caller builds the next one.

Sending happens at once in the caller's thread unless several frames are in flight; a thread completes those, sends
what had to queue, and sends keepalives. Another thread owns the receives. A direction is a process group of two: of
Gloo here, of NCCL between GPUs (nccl_pipe.py).

Facts this rests on (torch 2.13, Gloo): a receive completes only in a wait; a wait that times out closes every
connection of its group, which also frees whoever else waits there - that is how a deadline ends a link and how close()
ends a blocked receive.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ssd_runtime.comm.link.frames import FrameCodec, Kind, kind_of
from ssd_runtime.comm.link.groups import first_line
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import OutcomeFrame, TreeFrame

log = logging.getLogger(__name__)

UNREAD = 1024  # frames a slow reader may leave unread, or a slow wire unsent, before the link counts as lost
IN_FLIGHT = 4  # frames posted before the sender thread is woken to complete them; at twice as many, frames queue
WINDOW = 16  # receives posted at once
UNREAD_TREES = 64  # older trees than these are forgotten: later ones supersede them

Sent = TypeVar("Sent", OutcomeFrame, TreeFrame)
Got = TypeVar("Got", OutcomeFrame, TreeFrame)


@dataclass(frozen=True)
class LinkTiming:
    """Seconds. Both sides must use the same heartbeat.

    Attributes:
        build: longest wait for the other side to come.
        heartbeat: a side with nothing to send says so this often.
        silence: longest wait for anything at all, several heartbeats.
        close: longest wait for the goodbye to leave.
    """

    build: float = 20.0
    heartbeat: float = 5.0
    silence: float = 15.0
    close: float = 1.0


class Pipe(Protocol):
    """All but `receive` and `finish` return at once. Whatever fails or times out is a RuntimeError, and final."""

    def post(self, words: Tensor) -> Any: ...
    def finish(self, in_flight: Any, timeout_s: float) -> None: ...
    def receive(self, num_words: int, timeout_s: float) -> Tensor: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


class GlooPipe:
    """Frames between CPUs.

    Args:
        group: a ProcessGroupGloo of two.
        peer: the other one's rank in it.
    """

    def __init__(self, group: Any, peer: int) -> None:
        self._group, self._peer = group, peer
        self._window: deque[tuple[Any, Tensor]] = deque()

    def post(self, words: Tensor) -> Any:
        return self._group.send([words], self._peer, 0), words  # the words must outlive the work

    def finish(self, in_flight: Any, timeout_s: float) -> None:
        in_flight[0].wait(timedelta(seconds=timeout_s))

    def receive(self, num_words: int, timeout_s: float) -> Tensor:
        if not self._window:  # many at once: posting one between two frames would delay whoever awaits the first
            rows = torch.empty(WINDOW, num_words, dtype=torch.int64)
            self._window.extend((self._group.recv([words], self._peer, 0), words) for words in rows)
        work, words = self._window.popleft()
        work.wait(timedelta(seconds=timeout_s))
        return words

    def cancel(self) -> None:
        """Fail whoever waits in this group: a wait that times out closes its connections."""
        with contextlib.suppress(RuntimeError):
            nothing = torch.empty(1, dtype=torch.int64)
            self._group.recv([nothing], self._peer, 1).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        self._window.clear()
        self._group = None


class Endpoint(Generic[Sent, Got]):
    """Two pipes, two threads and what they share with the caller. Calls raise PeerLost once the peer is gone and all it
    sent has been read. Outcomes are never dropped; of trees that could not be sent yet only the newest is kept.

    Args:
        peer_role, peer_rank: who is at the other end, for errors.
        sending, receiving: the two directions.
        encoder, decoder: their frames.
        timing: deadlines.
    """

    def __init__(
        self,
        peer_role: str,
        peer_rank: int,
        sending: Pipe,
        receiving: Pipe,
        encoder: FrameCodec[Sent],
        decoder: FrameCodec[Got],
        timing: LinkTiming,
    ) -> None:
        self._peer_role, self._peer_rank, self._timing = peer_role, peer_rank, timing
        self._sending, self._receiving = sending, receiving
        self._encoder: FrameCodec[Sent] = encoder
        self._decoder: FrameCodec[Got] = decoder
        self._newest_only = encoder.kind is Kind.TREE
        self._round = -1
        lock = threading.Lock()  # guards everything below
        self._readable = threading.Condition(lock)  # for the caller: a frame arrived, or the end
        self._sendable = threading.Condition(lock)  # for the sender thread: enough is in flight, or the end
        self._arrived: deque[Tensor] = deque(maxlen=UNREAD_TREES if decoder.kind is Kind.TREE else None)
        self._unsent: deque[Tensor] = deque()
        self._in_flight: deque[Any] = deque()
        self._lost: str | None = None
        self._closing = False
        self._sender = threading.Thread(target=self._send_loop, name="link-send", daemon=True)
        self._receiver = threading.Thread(target=self._receive_loop, name="link-receive", daemon=True)

    def start(self) -> None:
        self._sender.start()
        self._receiver.start()

    def send(self, frame: Sent) -> None:
        """Put the frame on the wire, or in the queue if an earlier one is not gone yet. Never waits."""
        words = self._encoder.encode(frame)
        with self._sendable:
            self._round = frame.round
            self._raise_if_over()
            if len(self._in_flight) < 2 * IN_FLIGHT and not self._unsent:
                self._post(words)
                self._raise_if_over()
                return
            if self._newest_only:
                self._unsent.clear()
            self._unsent.append(words)
            if len(self._unsent) > UNREAD:
                self._lose(f"{UNREAD} frames could not be sent")

    def receive(self, timeout_s: float = 0.0) -> list[Got]:
        """All frames that arrived, in order; waits at most `timeout_s` for the first."""
        with self._readable:
            if timeout_s > 0:
                self._readable.wait_for(lambda: self._arrived or self._lost or self._closing, timeout_s)
            arrived = list(self._arrived)
            self._arrived.clear()
            if not arrived:
                self._raise_if_over()
                return []
        try:
            return [self._decoder.decode(words) for words in arrived]
        except ProtocolError as error:
            with self._readable:
                self._lose(str(error))
            raise self._peer_lost(str(error)) from error

    def close(self) -> None:
        """Say goodbye and end both threads, whatever state the peer is in. May be repeated."""
        with self._sendable:
            if self._closing:
                return
            self._closing = True
            self._sendable.notify_all()
            self._readable.notify_all()
        self._sender.join(self._timing.close)
        if self._sender.is_alive():
            self._sending.cancel()
            self._sender.join(self._timing.silence)  # no wait of a thread is longer, if cancelling should not end it
        self._receiving.cancel()
        self._receiver.join(self._timing.silence)
        self._in_flight.clear()
        self._sending.close()
        self._receiving.close()

    def _send_loop(self) -> None:
        """Complete what is in flight and send what had to queue; now and then a keepalive, a goodbye at the end."""
        while True:
            with self._sendable:
                self._sendable.wait_for(
                    lambda: len(self._in_flight) >= IN_FLIGHT or self._closing or self._lost, self._timing.heartbeat
                )
                if self._lost:
                    return
                closing = self._closing
                if closing:
                    while self._unsent and not self._lost:
                        self._post(self._unsent.popleft())
                    self._post(self._encoder.signal(Kind.GOODBYE))
                elif len(self._in_flight) < IN_FLIGHT:  # a heartbeat has passed
                    self._post(self._encoder.signal(Kind.KEEPALIVE))
                in_flight = list(self._in_flight)
            try:
                for work in in_flight:
                    self._sending.finish(work, self._timing.silence)
            except RuntimeError as error:
                with self._sendable:
                    self._lose(f"sending failed: {first_line(error)}")
                return
            if closing:
                return
            with self._sendable:
                for _ in in_flight:
                    self._in_flight.popleft()
                while self._unsent and len(self._in_flight) < IN_FLIGHT and not self._lost:
                    self._post(self._unsent.popleft())

    def _receive_loop(self) -> None:
        while True:
            try:
                words = self._receiving.receive(self._decoder.num_words, self._timing.silence)
                kind = kind_of(words)
            except (RuntimeError, ProtocolError) as error:
                with self._readable:
                    self._lose(f"receiving failed: {first_line(error)}")
                return
            if kind is Kind.KEEPALIVE:
                continue
            with self._readable:
                if kind is Kind.GOODBYE:
                    self._lost = None  # a goodbye explains a reset that the sender saw first
                    self._lose("it closed the link")
                    return
                self._arrived.append(words)
                if len(self._arrived) > UNREAD:
                    self._lose(f"{UNREAD} of its frames were never read")
                    return
                self._readable.notify_all()

    # The four below are called with the lock held.

    def _post(self, words: Tensor) -> None:
        try:
            self._in_flight.append(self._sending.post(words))
        except RuntimeError as error:
            self._lose(f"sending failed: {first_line(error)}")
        if len(self._in_flight) >= IN_FLIGHT:
            self._sendable.notify_all()

    def _lose(self, reason: str) -> None:
        if self._lost is None and not self._closing:
            self._lost = reason
            log.debug("link to %s rank %d is over: %s", self._peer_role, self._peer_rank, reason)
        self._readable.notify_all()
        self._sendable.notify_all()

    def _raise_if_over(self) -> None:
        if self._lost or self._closing:
            raise self._peer_lost(self._lost or "this side closed the link")

    def _peer_lost(self, reason: str) -> PeerLost:
        return PeerLost(self._peer_role, self._peer_rank, self._round, reason)


TargetLink = Endpoint[OutcomeFrame, TreeFrame]
DraftLink = Endpoint[TreeFrame, OutcomeFrame]
