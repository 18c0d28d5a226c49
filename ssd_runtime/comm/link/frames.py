"""`OutcomeFrame` and `TreeFrame` as fixed-shape int64 tensors, and back. Knows no ranks, no I/O.

    header   magic, kind, round, two words about the frame, rows used, checksum of everything behind the header
             (outcome: control_seq, plan; tree: microseconds and rows of the drafting step that grew it)
    row      outcome: sequence_id, turn, num_accepted, bonus_token, source, length, tokens[K]
             tree:    sequence_id, turn, num_accepted, bonus_token, length, tokens[K], proposals[K][m]

A proposal is what a branch token was sampled from: up to m words, a token id in the upper 32 bits and the bits of its
float32 probability in the lower ones. m is 0 unless draft tokens are sampled apart from the target's.

Tokens and words of proposals that are absent are -1; unused rows are zero. A signal (keepalive, goodbye) is a header
alone, padded to the same size. Decoding checks every range, those of `speculation/types.py` and of the shape: what
passes is a frame, whatever the peer was.
"""

from __future__ import annotations

import dataclasses
import zlib
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Generic, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssd_runtime.comm.protocol import FrameShape, ProtocolError
from ssd_runtime.speculation.types import (
    MOST_COUNT,
    MOST_STEP_ROWS,
    MOST_STEP_US,
    MOST_TOKEN,
    Branch,
    Outcome,
    OutcomeFrame,
    OutcomeRow,
    Plan,
    Proposal,
    Source,
    TreeFrame,
)

MAGIC = 0x5353_4431  # "SSD1"
HEADER = 7  # words
MOST_WORDS = 2**27  # of a frame: 1 GiB
PLAN_BUDGET = 2**16  # a plan is one word: 1 + lookahead + budget * PLAN_BUDGET; 0 is no plan
SHOWN_WORDS = 12  # of a row that is none
SUM_TOLERANCE = 1e-5  # of a proposal's probabilities: each is rounded to one part in 10^7

Words = NDArray[np.int64]
Frame = TypeVar("Frame", OutcomeFrame, TreeFrame)


class Kind(IntEnum):
    """What a frame is, readable without decoding the rest."""

    OUTCOMES = 1
    TREE = 2
    KEEPALIVE = 3
    GOODBYE = 4


def kind_of(words: Tensor) -> Kind:
    """The kind in a received header; raises ProtocolError if it is none."""
    header = words.numpy()
    magic, kind = int(header[0]), int(header[1])
    if magic != MAGIC or not 1 <= kind <= 4:
        raise ProtocolError(f"frame starts with {magic:#x} {kind}: not a frame of this protocol")
    return Kind(kind)


class FrameCodec(Generic[Frame]):
    """Encodes and decodes one direction's frames; every tensor it makes has `num_words` int64.

    Raises:
        ProtocolError: nobody means frames of that shape.
    """

    kind: Kind
    row_words: int
    max_rows: int

    def __init__(self, shape: FrameShape, max_rows: int, row_words: int) -> None:
        self.shape = shape
        self.max_rows, self.row_words = max_rows, row_words
        self.num_words = HEADER + max_rows * row_words
        if self.num_words > MOST_WORDS:
            raise ProtocolError(f"frames of {self.num_words} words, {shape}; at most {MOST_WORDS} are sent")

    def signal(self, kind: Kind) -> Tensor:
        """A keepalive or goodbye of this direction's size."""
        return self._tensor(kind, 0, (0, 0), 0, [])

    def encode(self, frame: Frame) -> Tensor:
        """The frame as int64 words; raises ValueError if it is larger than the agreed shape."""
        raise NotImplementedError

    def decode(self, words: Tensor) -> Frame:
        """The frame in `words` (on the CPU); raises ProtocolError on garbage."""
        raise NotImplementedError

    def _tensor(self, kind: Kind, round: int, about: tuple[int, int], rows: int, body: list[int]) -> Tensor:
        if rows > self.max_rows:
            raise ValueError(f"{rows} rows do not fit a frame of {self.max_rows}")
        content = array("q", body)
        content.frombytes(bytes(8 * (self.max_rows * self.row_words - len(content))))
        words = array("q", (MAGIC, kind, round, *about, rows, zlib.crc32(content)))
        words.extend(content)
        return torch.frombuffer(words, dtype=torch.int64)

    def _tokens(self, tokens: Sequence[int]) -> list[int]:
        absent: int = self.shape.lookahead - len(tokens)
        if absent < 0:
            raise ValueError(f"{len(tokens)} tokens do not fit a lookahead of {self.shape.lookahead}")
        return [*tokens, *[-1] * absent]

    def _rows(self, words: Tensor) -> tuple[int, tuple[int, int], list[list[int]]]:
        if words.dtype != torch.int64 or words.shape != (self.num_words,):
            raise ProtocolError(f"frame of {tuple(words.shape)} {words.dtype}, expected {self.num_words} int64")
        kind = kind_of(words)
        if kind != self.kind:
            raise ProtocolError(f"expected a frame of kind {self.kind.name}, got {kind.name}")
        _, _, round, first, second, used, checksum = words[:HEADER].tolist()
        if zlib.crc32(words[HEADER:].numpy()) != checksum:
            raise ProtocolError(f"frame of round {round} has a wrong checksum")
        if min(round, first, second) < 0 or round > MOST_COUNT or not 0 <= used <= self.max_rows:
            raise ProtocolError(f"frame header out of range: round {round}, words {first} {second}, rows {used}")
        width = self.row_words
        flat = words[HEADER : HEADER + used * width].tolist()
        return round, (first, second), [flat[i : i + width] for i in range(0, used * width, width)]

    def _check(self, row: list[int], length: int, tokens: list[int]) -> tuple[int, ...]:
        """Check the four common words and the tokens of a row; returns the tokens that are present."""
        sequence_id, turn, num_accepted, bonus_token = row[:4]
        lookahead = self.shape.lookahead
        if not 0 <= sequence_id <= MOST_COUNT or not -1 <= turn <= MOST_COUNT:
            self._garbage(row)
        if not 0 <= num_accepted <= lookahead or not 0 <= bonus_token <= MOST_TOKEN:
            self._garbage(row)
        if not 0 <= length <= lookahead or not -1 <= min(tokens, default=-1) <= max(tokens, default=-1) <= MOST_TOKEN:
            self._garbage(row)
        present = tokens.index(-1) if -1 in tokens else lookahead
        if any(token != -1 for token in tokens[present:]):
            self._garbage(row)
        return tuple(tokens[:present])

    def _garbage(self, row: list[int]) -> NoReturn:
        raise ProtocolError(f"row out of range in a frame of kind {self.kind.name}: {row[:SHOWN_WORDS]}")


class OutcomeCodec(FrameCodec[OutcomeFrame]):
    """Target -> draft."""

    kind = Kind.OUTCOMES

    def __init__(self, shape: FrameShape) -> None:
        super().__init__(shape, shape.max_sequences, 6 + shape.lookahead)

    def encode(self, frame: OutcomeFrame) -> Tensor:
        body: list[int] = []
        for row in frame.rows:
            assert len(row.tokens) == row.length, row
            outcome = row.outcome
            body += (row.sequence_id, row.turn, outcome.num_accepted, outcome.bonus_token, row.source, row.length)
            body += self._tokens(row.tokens)
        plan = 0 if frame.plan is None else 1 + frame.plan.lookahead + frame.plan.budget * PLAN_BUDGET
        return self._tensor(self.kind, frame.round, (frame.control_seq, plan), len(frame.rows), body)

    def decode(self, words: Tensor) -> OutcomeFrame:
        round, (control_seq, word), rows = self._rows(words)
        if control_seq > MOST_COUNT:
            raise ProtocolError(f"a frame that rests on {control_seq} control messages")
        budget, lookahead = divmod(word - 1, PLAN_BUDGET)
        if word and lookahead > self.shape.lookahead:
            raise ProtocolError(f"a plan of {lookahead} tokens ahead, above the agreed {self.shape.lookahead}")
        if word and budget > self.shape.max_branches:
            raise ProtocolError(f"a plan of {budget} outcomes, above the {self.shape.max_branches} of a frame")
        plan = Plan(lookahead, budget) if word else None
        return OutcomeFrame(round, control_seq, tuple(map(self._row, rows)), plan)

    def _row(self, row: list[int]) -> OutcomeRow:
        sequence_id, turn, num_accepted, bonus_token, source, length = row[:6]
        tokens = self._check(row, length, row[6:])
        if turn < 0 or not 0 <= source < len(Source) or len(tokens) != length:
            self._garbage(row)
        return OutcomeRow(sequence_id, turn, Outcome(num_accepted, bonus_token), Source(source), length, tokens)


class TreeCodec(FrameCodec[TreeFrame]):
    """Draft -> target."""

    kind = Kind.TREE

    def __init__(self, shape: FrameShape) -> None:
        super().__init__(shape, shape.max_branches, 5 + shape.lookahead * (1 + shape.probabilities))

    def encode(self, frame: TreeFrame) -> Tensor:
        body: list[int] = []
        for branch in frame.branches:
            outcome, tokens = branch.outcome, branch.tokens
            body += (branch.sequence_id, branch.turn, outcome.num_accepted, outcome.bonus_token, len(tokens))
            body += self._tokens(tokens)
            assert len(branch.proposals) in (0, len(tokens)), branch
            for proposal in branch.proposals:
                body += self._proposal(proposal)
            body += [-1] * (self.shape.probabilities * (self.shape.lookahead - len(branch.proposals)))
        step = min(frame.step_us, MOST_STEP_US), frame.step_rows  # a draft that was stopped meanwhile says less
        return self._tensor(self.kind, frame.round, step, len(frame.branches), body)

    def _proposal(self, proposal: Proposal) -> list[int]:
        absent: int = self.shape.probabilities - len(proposal.tokens)
        if absent < 0:
            raise ValueError(f"{len(proposal.tokens)} probabilities do not fit a shape of {self.shape.probabilities}")
        bits = np.array(proposal.weights, dtype=np.float32).view(np.uint32).tolist()
        words = [token << 32 | weight for token, weight in zip(proposal.tokens, bits, strict=True)]
        return [*words, *[-1] * absent]

    def decode(self, words: Tensor) -> TreeFrame:
        round, (step_us, step_rows), rows = self._rows(words)
        if step_us > MOST_STEP_US or step_rows > MOST_STEP_ROWS:
            raise ProtocolError(f"a drafting step of {step_us} microseconds with {step_rows} rows")
        branches = tuple(map(self._branch, rows))
        if self.shape.probabilities and branches:
            branches = self._with_proposals(branches, words)
        return TreeFrame(round, branches, step_us, step_rows)

    def _branch(self, row: list[int]) -> Branch:
        sequence_id, turn, num_accepted, bonus_token, length = row[:5]
        tokens = self._check(row, length, row[5 : 5 + self.shape.lookahead])
        if len(tokens) != length:
            self._garbage(row)
        return Branch(sequence_id, turn, Outcome(num_accepted, bonus_token), tokens)

    def _with_proposals(self, branches: tuple[Branch, ...], words: Tensor) -> tuple[Branch, ...]:
        """The branches with their proposals, all of them checked at once."""
        rows, lookahead = len(branches), self.shape.lookahead
        body = words[HEADER : HEADER + rows * self.row_words].numpy().reshape(rows, self.row_words)
        words_BKM = body[:, 5 + lookahead :].reshape(rows, lookahead, self.shape.probabilities)
        ids_BKM = words_BKM >> 32
        weights_BKM = (words_BKM & 0xFFFF_FFFF).astype(np.uint32).view(np.float32)
        count_BK = (words_BKM >= 0).sum(axis=2)
        self._check_proposals(branches, body[:, 5 : 5 + lookahead], words_BKM, ids_BKM, weights_BKM, count_BK)
        ids, weights, counts = ids_BKM.tolist(), weights_BKM.tolist(), count_BK.tolist()
        found = []
        for index, branch in enumerate(branches):
            sampled = len(branch.tokens) if counts[index][0] else 0
            proposals = tuple(
                Proposal(tuple(ids[index][k][:count]), tuple(weights[index][k][:count]))
                for k, count in enumerate(counts[index][:sampled])
            )
            found.append(dataclasses.replace(branch, proposals=proposals))
        return tuple(found)

    def _check_proposals(
        self,
        branches: tuple[Branch, ...],
        tokens_BK: Words,
        words_BKM: Words,
        ids_BKM: Words,
        weights_BKM: NDArray[np.float32],
        count_BK: Words,
    ) -> None:
        """All or none of a branch's tokens have a proposal: a distribution over tokens, their own among them."""
        present_BKM = np.arange(words_BKM.shape[2]) < count_BK[:, :, None]
        expected_BKM = np.where(present_BKM, words_BKM >= 0, words_BKM == -1)
        length_B1 = np.array([len(branch.tokens) for branch in branches])[:, None]
        sampled_BK = (np.arange(words_BKM.shape[1]) < length_B1) & (count_BK[:, :1] > 0)
        total_BK = np.where(present_BKM, weights_BKM.astype(np.float64), 0.0).sum(axis=2)
        sorted_BKM = np.sort(np.where(present_BKM, ids_BKM, -1 - np.arange(words_BKM.shape[2])), axis=2)
        own_BKM = present_BKM & (ids_BKM == tokens_BK[:, :, None])
        # Comparisons are written so that a weight that is no number fails them.
        good_BK = expected_BKM.all(axis=2) & ((count_BK > 0) == sampled_BK)
        good_BK &= ~sampled_BK | (np.abs(total_BK - 1.0) <= SUM_TOLERANCE) & own_BKM.any(axis=2)
        good_BK &= (~present_BKM | (weights_BKM > 0.0)).all(axis=2) & (np.diff(sorted_BKM, axis=2) > 0).all(axis=2)
        if not good_BK.all():
            index, k = np.argwhere(~good_BK)[0].tolist()
            about = f"token {k} of the branch for {branches[index].outcome} of sequence {branches[index].sequence_id}"
            raise ProtocolError(f"what {about} was sampled from is no distribution that could have given it")
