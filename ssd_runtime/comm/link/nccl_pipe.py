"""One direction of a link between GPUs: words by NCCL, each frame announced over Gloo. Knows words, no frames.

A receive of NCCL is a kernel that spins on the GPU until its words come. So the receiver posts none before the sender
has said over Gloo that words come, and frames that are a head alone (keepalive, goodbye) travel over Gloo alone. When
the words have landed the receiver says so, over Gloo too: that is what the sender waits for. So whoever waits hears of
a peer that dies, by the reset connection, and gives up at a deadline; then it aborts the group, which ends its kernels
and with them whatever waits for an event behind them.

Facts this rests on (source of torch 2.11): send and receive run on a stream of the group, which waits for the current
one; Work.wait() makes the current stream wait, not the thread; abort() may be called from any thread, ends the kernels
and returns within the group's timeout; a group connected at once to its device uses that one communicator for sends and
receives too; sends, receives and abort() release the interpreter lock. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ssd_runtime.comm.link.endpoint import GlooPipe
from ssd_runtime.comm.link.gpu_queue import Buffers, GpuQueue
from ssd_runtime.comm.link.groups import first_line

READY = 8  # frames that memory is kept for, and most receives posted at once
LANDED = torch.ones(1, dtype=torch.int64)  # what the receiver says of each frame whose words it has


class NcclPipe:
    """Frames between GPUs; a `Pipe`.

    Args:
        gloo: for announcements, to the same peer.
        group: a ProcessGroupNCCL of two.
        peer: the other one's rank in it.
        gpu: a queue that nothing else uses.
        num_words: of every frame.
        head: so many of them travel with the announcement.
        silence_s: the receiver gives up when nothing is announced for so long.
    """

    def __init__(
        self, gloo: GlooPipe, group: Any, peer: int, gpu: GpuQueue, num_words: int, head: int, silence_s: float
    ) -> None:
        self._gloo, self._group, self._peer, self._gpu = gloo, group, peer, gpu
        self._num_words, self._head, self._silence_s = num_words, head, silence_s
        self._free = [gpu.buffers(num_words - head) for _ in range(READY)]
        self._room = threading.Semaphore(READY)  # for receives
        self._announced: queue.SimpleQueue[tuple[Tensor, Buffers | None] | None] = queue.SimpleQueue()
        self._answers: deque[Any] = deque()  # sends that may not have left yet
        self._listener: threading.Thread | None = None
        self._over: str | None = None

    def post(self, words: Tensor) -> Any:
        more = bool(words[self._head :].any())
        announced = self._gloo.post(torch.cat((words[: self._head], torch.tensor([int(more)]))))
        return announced, self._send(words[self._head :]) if more else None

    def finish(self, in_flight: Any, timeout_s: float) -> None:
        announced, buffers = in_flight
        with self._fatal():
            self._gloo.finish(announced, timeout_s)
            if buffers is not None:
                self._gloo.receive(1, timeout_s)  # LANDED
                self._free.append(buffers)

    def receive(self, num_words: int, timeout_s: float) -> Tensor:
        assert num_words == self._num_words, "frames of one size"
        if self._listener is None:
            self._listener = threading.Thread(target=self._listen, name="link-listen", daemon=True)
            self._listener.start()
        with self._fatal():
            announcement, buffers = self._next(timeout_s)
            head = announcement[: self._head]
            if buffers is None:
                return torch.cat((head, torch.zeros(num_words - self._head, dtype=torch.int64)))
            buffers.landed.synchronize()
            self._raise_if_over()  # then the words may not be there
            words = torch.cat((head, buffers.host))
            self._free.append(buffers)
            self._room.release()
            with contextlib.suppress(RuntimeError):  # the next call tells; these words have come
                self._answer(timeout_s)
            return words

    def warm_up(self, sends: bool, timeout_s: float) -> None:
        """Carry one frame, before there are others: both sides call this. The first of anything on a GPU takes long,
        and may wait for all that was queued there.
        """
        if sends:
            self.finish(self.post(torch.ones(self._num_words, dtype=torch.int64)), timeout_s)
        else:
            self.receive(self._num_words, timeout_s)

    def cancel(self) -> None:
        self._abort("this side gave up")
        self._gloo.cancel()

    def close(self) -> None:
        self._abort("this side closed")
        if self._listener is not None:
            self._gloo.cancel()
            self._listener.join(self._silence_s)
        self._answers.clear()
        self._gloo.close()

    def _send(self, words: Tensor) -> Buffers:
        buffers = self._free.pop() if self._free else self._gpu.buffers(len(words))
        buffers.host.copy_(words)
        self._gpu.copy(buffers.host, buffers.device)
        self._gpu.carry(lambda: self._group.send([buffers.device], self._peer, 0))
        return buffers

    def _listen(self) -> None:
        """Post a receive for whatever is announced. This thread waits in Gloo alone, so it hears of any end at once."""
        try:
            while True:
                announcement = self._gloo.receive(self._head + 1, self._silence_s)
                self._announced.put((announcement, self._expect() if announcement[-1] else None))
        except RuntimeError as error:
            self._abort(first_line(error))
            self._announced.put(None)

    def _expect(self) -> Buffers:
        if not self._room.acquire(timeout=self._silence_s):
            raise RuntimeError(f"{READY} frames were announced and did not come")
        self._raise_if_over()
        buffers = self._free.pop()
        self._gpu.carry(lambda: self._group.recv([buffers.device], self._peer, 0))
        self._gpu.copy(buffers.device, buffers.host)
        self._gpu.mark(buffers.landed)
        return buffers

    def _next(self, timeout_s: float) -> tuple[Tensor, Buffers | None]:
        try:
            heard = self._announced.get(timeout=timeout_s)
        except queue.Empty:
            raise RuntimeError(f"nothing came within {timeout_s:g} s") from None
        if heard is None:
            self._raise_if_over()
        assert heard is not None
        return heard

    def _answer(self, timeout_s: float) -> None:
        self._answers.append(self._gloo.post(LANDED))
        if len(self._answers) > READY:
            self._gloo.finish(self._answers.popleft(), timeout_s)

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """Whatever fails is final."""
        try:
            yield
        except RuntimeError as error:
            self._abort(first_line(error))
            raise

    def _abort(self, reason: str) -> None:
        if self._over is None:
            self._over = reason
            self._room.release()  # for a listener that waits for it
            with contextlib.suppress(RuntimeError):  # it could not end the kernels either
                self._group.abort()

    def _raise_if_over(self) -> None:
        if self._over is not None:
            raise RuntimeError(self._over)
