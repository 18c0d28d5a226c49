"""The forwards of a tensor-parallel target: the leader sends what it computes as integers, the other ranks replay it.

One frame a forward, int64: a header and the rows of the `ForwardBatch`, tables as blocks instead of slots. It has a
fixed shape, and what does not fit follows in a second broadcast whose size the header gives. Followers decide nothing
and keep no books: their KV rows are where the leader's slots say. When nothing is computed, idle frames, which every
rank answers, tell both sides that the other is there. Knows no requests and no draft.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor

from ssd_runtime.comm.collective import TargetGroup
from ssd_runtime.errors import PeerLost
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.decoder import Decoder

log = logging.getLogger(__name__)

FRAME_WORDS = 2048  # 16 KiB: a decoding batch fits; a long prompt's chunk needs the second broadcast
NOTHING = torch.empty(0, dtype=torch.int64)
_HEADER_WORDS = 8
_CPU = torch.device("cpu")


class FrameKind(IntEnum):
    NEW_KV = 1
    FORWARD = 2
    IDLE = 3
    STOP = 4


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
        self._decoder, self._frames, self._block_size = decoder, frames, block_size
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
        self._decoder, self._frames, self._block_size = decoder, frames, block_size
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
            assert self._kv is not None, "the leader makes its pool first"
            self._decoder.forward(decode_batch(payload, self._block_size, self._decoder.device), self._kv)
            self._decoder.settle()

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


def encode_batch(batch: ForwardBatch, block_size: int) -> Tensor:
    """A batch as int64 words: the five sizes, then rows, blocks of the tables, chains, wanted rows."""
    num_rows, depth = batch.chain_ND.shape
    num_sequences, reach = batch.tables_SC.shape
    wanted_R = batch.logit_rows_R
    sizes = [num_rows, num_sequences, reach, depth, -1 if wanted_R is None else len(wanted_R)]
    blocks_SB = batch.tables_SC[:, ::block_size] // block_size
    rows = (batch.tokens_N, batch.positions_N, batch.slots_N, batch.sequence_N, batch.prefix_N)
    parts = [*rows, blocks_SB.flatten(), batch.chain_ND.flatten()]
    if wanted_R is not None:
        parts.append(wanted_R)
    return torch.cat((torch.tensor(sizes), torch.cat(parts).to(_CPU)))


def decode_batch(words: Tensor, block_size: int, device: torch.device) -> ForwardBatch:
    """What `encode_batch` was given, on `device`; raises PeerLost for words that are no batch."""
    num_rows, num_sequences, reach, depth, wanted = words[:5].tolist()
    num_blocks = -(-reach // block_size)
    lengths = [num_rows] * 5 + [num_sequences * num_blocks, num_rows * depth, max(0, wanted)]
    if len(words) != 5 + sum(lengths):
        raise PeerLost("target", 0, -1, f"a frame of {len(words)} words does not hold a batch of {words[:5].tolist()}")
    tokens_N, positions_N, slots_N, sequence_N, prefix_N, blocks, chains, wanted_R = words[5:].to(device).split(lengths)
    offsets = torch.arange(block_size, device=device)
    tables_SC = (blocks[:, None] * block_size + offsets).view(num_sequences, -1)[:, :reach]
    return ForwardBatch(
        tokens_N=tokens_N,
        positions_N=positions_N,
        slots_N=slots_N,
        sequence_N=sequence_N,
        tables_SC=tables_SC.contiguous(),
        prefix_N=prefix_N,
        chain_ND=chains.view(num_rows, depth),
        logit_rows_R=None if wanted < 0 else wanted_R,
    )
