"""The forwards of a tensor-parallel target: the leader sends what it computes as integers, the other ranks replay it.

One frame a forward, int64 (forward_codec.py): a header and the rows of the `ForwardBatch`, tables as blocks instead of
slots. Where tokens are to be chosen and nothing else is wanted of the logits, it also says by what: every rank then
reports on its slice of the vocabulary, and the leader decides (vocab_parallel.py). Rows that the reports cannot tell,
and forwards of which more is wanted, are gathered whole. A frame has a fixed shape, and what does not fit follows in a
second broadcast whose size the header gives. Followers decide nothing and keep no books: their KV rows are where the
leader's slots say. When nothing is computed, idle frames, which every rank answers, tell both sides that the other is
there. Knows no requests and no draft.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from ssd_runtime.comm.collective import TargetGroup
from ssd_runtime.errors import PeerLost
from ssd_runtime.leader.forward_codec import decode_batch, decode_choices, encode_batch, encode_choices
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.device_memory import told
from ssd_runtime.speculation.sampling.ranking import Choice, choose, count_rows, row_by_row
from ssd_runtime.speculation.sampling.vocab_parallel import decidable, decide

log = logging.getLogger(__name__)

FRAME_WORDS = 2048  # 16 KiB: a decoding batch fits; a long prompt's chunk needs the second broadcast
NOTHING = torch.empty(0, dtype=torch.int64)
_HEADER_WORDS = 8


class FrameKind(IntEnum):
    NEW_KV = 1
    FORWARD = 2
    IDLE = 3
    STOP = 4
    CHOOSE = 5
    WHOLE_ROWS = 6


class LeadingDecoder:
    """Rank 0's decoder: every forward is announced to the followers first. Used like a `Decoder`, by one thread.

    Args:
        decoder: this rank's part of the model.
        frames: all target ranks, between CPUs.
        block_size: KV slots in one block; tables consist of whole blocks.
        heartbeat_s: followers hear something at least this often, between `start` and `close`.
    """

    def __init__(self, decoder: Decoder, frames: TargetGroup, block_size: int, heartbeat_s: float) -> None:
        self.arch, self.device, self.row_invariant = decoder.arch, decoder.device, decoder.row_invariant
        assert decoder.shard is not None, "a model of one rank has no followers"
        self._decoder, self._frames, self._block_size, self._shard = decoder, frames, block_size, decoder.shard
        self._heartbeat_s = heartbeat_s
        self._lock = threading.Lock()  # one frame and what belongs to it at a time; guards the three below
        self._serial = 0
        self._said = time.monotonic()
        self._lost: PeerLost | None = None
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="target-heartbeat", daemon=True)

    def start(self) -> None:
        self._heart.start()

    def new_kv(self, num_slots: int) -> Tensor:
        """This rank's part of an empty KV pool; the followers make theirs, which is the only one they have."""
        with self._announced(FrameKind.NEW_KV, torch.tensor([num_slots])):
            return self._decoder.new_kv(num_slots)

    def forward(self, batch: ForwardBatch, kv_L2SGD: Tensor) -> Tensor:
        """As `Decoder.forward`. Raises PeerLost when a follower is gone or does not keep up; that is final."""
        with self._announced(FrameKind.FORWARD, encode_batch(batch, self._block_size)):
            logits_RV = self._decoder.forward(batch, kv_L2SGD)
            self._decoder.settle()
            return logits_RV

    def choose(self, batch: ForwardBatch, kv_L2SGD: Tensor, choices: Sequence[Choice], first_row: int = 0) -> list[int]:
        """As `Decoder.choose`, from a few numbers a row and rank where these can tell. Raises as `forward`.

        The logits are gathered where these numbers could not tell, or what they rest on (a long text that is penalised,
        a long list of allowed tokens) is larger than the logits.
        """
        vocab_size = self.arch.vocab_size
        asked = encode_choices(choices)
        num_rows = count_rows(choices)
        rows = slice(first_row, first_row + num_rows)
        if asked.nbytes > 4 * vocab_size * max(1, num_rows) or not all(
            decidable(choice, vocab_size) for choice in choices
        ):
            return choose(self.forward(batch, kv_L2SGD)[rows], choices)
        words = encode_batch(batch, self._block_size)
        with self._announced(FrameKind.CHOOSE, torch.cat((torch.tensor([len(words), first_row]), words, asked))):
            logits_RL = self._decoder.forward_part(batch, kv_L2SGD)[rows]
            reports_GC = self._shard.reports(logits_RL, choices)
        tokens = decide(reports_GC, choices, vocab_size)
        open_rows = [row for row, token in enumerate(tokens) if token is None]
        if open_rows:
            with self._announced(FrameKind.WHOLE_ROWS, torch.tensor(open_rows)):
                logits_RV = self._shard.whole_rows(logits_RL[open_rows])
                self._decoder.settle()
            each = row_by_row(choices)
            closed = iter(choose(logits_RV, [each[row] for row in open_rows]))
            return [next(closed) if token is None else token for token in tokens]
        return [token for token in tokens if token is not None]

    def check(self) -> None:
        """Raise PeerLost if a follower was found missing while nothing was computed."""
        if self._lost is not None:
            raise self._lost

    def close(self) -> None:
        """Tell the followers to leave, if they are there to be told."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._heart.ident is not None:
            self._heart.join()
        if self._lost is None:
            try:
                self._send(FrameKind.STOP, NOTHING)
            except PeerLost as lost:
                log.warning("%s; it was told to leave", lost)

    @contextlib.contextmanager
    def _announced(self, kind: FrameKind, payload: Tensor) -> Iterator[None]:
        """Tell the followers, then do the same here; a loss anywhere in it is final."""
        with self._lock:
            self.check()
            try:
                self._send(kind, payload)
                yield
            except PeerLost as lost:
                self._lost = lost
                raise
            except Exception as error:
                # The others wait in the middle of the same forward: nothing brings the ranks together again.
                self._lost = PeerLost("target", 0, -1, f"its part of a forward failed: {told(error)}")
                raise self._lost from error
            self._said = time.monotonic()

    def _send(self, kind: FrameKind, payload: Tensor) -> None:
        self._serial += 1
        words = torch.zeros(max(FRAME_WORDS, _HEADER_WORDS + len(payload)), dtype=torch.int64)
        words[:3] = torch.tensor([kind, self._serial, len(payload)])
        words[_HEADER_WORDS : _HEADER_WORDS + len(payload)] = payload
        self._frames.broadcast(words[:FRAME_WORDS])
        if len(words) > FRAME_WORDS:
            self._frames.broadcast(words[FRAME_WORDS:])

    def _beat(self) -> None:
        while not self._closing.wait(self._heartbeat_s / 2):
            with self._lock:
                if self._lost is not None:
                    return
                if time.monotonic() - self._said < self._heartbeat_s / 2:
                    continue
                try:
                    self._send(FrameKind.IDLE, NOTHING)
                    answer_idle(self._frames, self._serial)
                except PeerLost as lost:
                    self._lost = lost
                    return
                self._said = time.monotonic()


class Follower:
    """Another target rank: replays what the leader computes until it is told to leave.

    Args:
        decoder: this rank's part of the model.
        frames: all target ranks, between CPUs.
        block_size: as the leader's.
    """

    def __init__(self, decoder: Decoder, frames: TargetGroup, block_size: int) -> None:
        assert decoder.shard is not None, "a model of one rank has no followers"
        self._decoder, self._frames, self._block_size, self._shard = decoder, frames, block_size, decoder.shard
        self._logits_RL: Tensor | None = None  # this rank's part, of the rows that were chosen at last
        self._kv: Tensor | None = None
        self._serial = 0

    def run(self) -> None:
        """Until the leader says so. Raises PeerLost when it is gone, silent, or says what cannot be understood."""
        while True:
            kind, payload = self._receive()
            if kind is FrameKind.STOP:
                return
            if kind is FrameKind.IDLE:
                answer_idle(self._frames, self._serial)
                continue
            if kind is FrameKind.NEW_KV:
                self._kv = self._decoder.new_kv(int(payload))
                continue
            if kind is FrameKind.WHOLE_ROWS:
                assert self._logits_RL is not None, "the leader has its rows chosen first"
                self._shard.whole_rows(self._logits_RL[payload.to(self._decoder.device)])
            elif kind is FrameKind.CHOOSE:
                self._logits_RL = self._report(payload)
            else:
                assert self._kv is not None, "the leader makes its pool first"
                self._decoder.forward(self._batch(payload), self._kv)
            self._decoder.settle()

    def _report(self, payload: Tensor) -> Tensor:
        """Run a forward and report on it; this rank's part of the logits of the rows chosen at."""
        assert self._kv is not None, "the leader makes its pool first"
        length, first_row = payload[:2].tolist()
        choices = decode_choices(payload[2 + length :], self._decoder.arch.vocab_size)
        logits_RL = self._decoder.forward_part(self._batch(payload[2 : 2 + length]), self._kv)
        logits_RL = logits_RL[first_row : first_row + count_rows(choices)]
        self._shard.reports(logits_RL, choices)
        return logits_RL

    def _batch(self, words: Tensor) -> ForwardBatch:
        return decode_batch(words, self._block_size, self._decoder.device)

    def _receive(self) -> tuple[FrameKind, Tensor]:
        words = torch.empty(FRAME_WORDS, dtype=torch.int64)
        self._frames.broadcast(words)
        kind, serial, length = words[:3].tolist()
        self._serial += 1
        if serial != self._serial or kind not in FrameKind.__members__.values():
            raise PeerLost("target", 0, -1, f"frame {serial} of kind {kind} came where frame {self._serial} was due")
        rest = _HEADER_WORDS + length - FRAME_WORDS
        if rest > 0:
            tail = torch.empty(rest, dtype=torch.int64)
            self._frames.broadcast(tail)
            words = torch.cat((words, tail))
        return FrameKind(kind), words[_HEADER_WORDS : _HEADER_WORDS + length]


def answer_idle(frames: TargetGroup, serial: int) -> None:
    """Every rank hears from every other one that it is at the same frame."""
    heard = frames.gather(torch.tensor([serial])).flatten().tolist()
    if heard != [serial] * frames.size:
        raise PeerLost("target", -1, -1, f"the target ranks disagree about the number of frames: {heard}")
