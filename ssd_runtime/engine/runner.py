"""How the rows of prompts and verifications become forwards, and what is decided by them. Knows no schedule.

It is the one place that knows what each backend needs for `engine.numerics = "invariant"`: a row's bits may depend on
its own token and on what is before it in its sequence, and on nothing else.

The compiled operators promise it for any batch (each row is accumulated in an order of its own), so there both settings
are one. In plain torch and on GPUs the library picks a kernel by the shape of its input, and inside a kernel a row's
place may decide how it is summed. Hence windows: the positions of a text are cut into windows of WINDOW; a forward is
over one window of one sequence, with every row in its place (position modulo WINDOW) and the attention as wide as the
window reaches. Rows of the window that are not asked for are padding. So a position is always computed in the same
place of a forward of the same shape, in every mode, at every speculation length and in every batch. Prompts are
computed in chunks from their beginning, one sequence a forward, which is the same everywhere already, also for a
sequence that begins with chunks of another (`share_unit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ssd_runtime.config import Coupling, EngineConfig, Numerics
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.kv.table import BlockTable, raise_faults
from ssd_runtime.model.batch import ForwardBatch, Model, RowBuilder
from ssd_runtime.speculation.sampling.ranking import Choice
from ssd_runtime.speculation.types import Outcome, Speculation
from ssd_runtime.speculation.verify import tokens_decide, verify_by_logits, verify_by_tokens

WINDOW = 16  # rows; a speculation of 6 and its bonus token meet a second window three times in eight


@dataclass(frozen=True)
class FreshTokens:
    """Consecutive tokens of one sequence without KV rows; their places in the table are reserved."""

    table: BlockTable
    tokens: Sequences[int]
    start: int

    @staticmethod
    def of(sequence: Sequence, start: int, tokens: Sequences[int]) -> FreshTokens:
        """Reserves their places; they count as rows of the table from now on."""
        sequence.table.reserve(start + len(tokens))
        sequence.table.length = start + len(tokens)
        return FreshTokens(sequence.table, tokens, start)


@dataclass(frozen=True)
class Verified:
    """What a verification decided for one sequence.

    Attributes:
        logits_LV: raw, of its rows, if anything but the target's own tokens was wanted of the forward.
    """

    sequence: Sequence
    speculation: Speculation
    outcome: Outcome
    logits_LV: Tensor | None


class Runner:
    """Runs the target model on a KV pool.

    Args:
        decoder: the target model.
        kv: its pool, with WINDOW slots that belong to nobody from `spare_slot` on where there are windows.
        coupling: how speculations are verified.
        windows: whether verifications are cut into windows.
    """

    def __init__(self, decoder: Model, kv: Tensor, coupling: Coupling, windows: bool, spare_slot: int) -> None:
        self.decoder = decoder
        self._kv = kv
        self._coupling = coupling
        self._windows = windows
        self._spare_slot = spare_slot

    @classmethod
    def on(cls, decoder: Model, config: EngineConfig, coupling: Coupling) -> Runner:
        """With a pool of its own."""
        num_slots, windows = config.pool_blocks * config.block_size, needs_windows(decoder, config.numerics)
        kv = decoder.new_kv(num_slots + (WINDOW if windows else 0))
        return cls(decoder, kv, coupling, windows, num_slots)

    def raise_faults(self) -> None:
        """After results were read: raise DeviceFault if the KV rows cannot be trusted any more."""
        raise_faults(self._kv)

    def prefill(self, sequence: Sequence, start: int, end: int) -> Verified | None:
        """Compute positions of a prompt; what its last token decides, None before it."""
        chunk = FreshTokens.of(sequence, start, sequence.tokens[start:end])
        rows = RowBuilder(self.decoder.device)
        rows.begin_sequence(chunk.table)
        rows.add_trunk(chunk.tokens, start)
        forward = rows.build()
        if end < sequence.num_prompt:
            self.decoder.choose(forward, self._kv, ())
            return None
        (found,) = self._decided(
            [sequence],
            [Speculation()],
            partial(self.decoder.forward, forward, self._kv),
            partial(self.decoder.choose, forward, self._kv),
        )
        return found

    def verify(self, batch: Sequences[Sequence], speculations: Sequences[Speculation]) -> list[Verified]:
        """Verify the speculation of each sequence: 1 + len(speculation) rows a sequence."""
        fresh = [
            FreshTokens.of(sequence, len(sequence.tokens) - 1, (sequence.tokens[-1], *speculation.tokens))
            for sequence, speculation in zip(batch, speculations, strict=True)
        ]
        return self._decided(batch, speculations, partial(self.forward, fresh), partial(self._choose, fresh))

    def _decided(
        self,
        batch: Sequences[Sequence],
        speculations: Sequences[Speculation],
        forward: Callable[[], Tensor],
        choose: Callable[[Sequences[Choice]], list[int]],
    ) -> list[Verified]:
        """Most verifications want nothing of the logits but the tokens that are chosen from them, and a target that is
        spread over ranks need not bring these logits together.

        Args:
            forward, choose: run the same forward, and give its logits or only the tokens chosen at its rows.
        """
        choices = [self._choice(*one) for one in zip(batch, speculations, strict=True)]
        logits: Sequences[Tensor | None] = [None] * len(batch)
        by_tokens = all(tokens_decide(self._coupling, choice.params) for choice in choices)
        if by_tokens and all(sequence.request.logprobs is None for sequence in batch):
            outcomes = verify_by_tokens(choose(choices), speculations)
        else:
            logits_RV = forward()
            outcomes = verify_by_logits(self._coupling, logits_RV, choices, speculations)
            logits = logits_RV.split([len(choice.rows) for choice in choices])
        return list(map(Verified, batch, speculations, outcomes, logits))

    def _choice(self, sequence: Sequence, speculation: Speculation) -> Choice:
        """The target's own tokens behind the sequence and behind each speculated token."""
        text = sequence.text_hash() if self._coupling == "rejection" else 0
        rows = range(len(speculation.tokens) + 1)
        position, params = len(sequence.tokens), sequence.request.params
        return Choice(params, position, rows, speculation.tokens, sequence.processors, text)

    def forward(self, batch: Sequences[FreshTokens]) -> Tensor:
        """Logits of all fresh tokens, sequence by sequence, float32 [R, vocabulary]; their KV rows are written."""
        if not self._windows:
            return self.decoder.forward(self._together(batch), self._kv)
        found = []
        for fresh in batch:
            for window, asked in self._cut(fresh):
                found.append(self.decoder.forward(window, self._kv)[asked])
        return torch.cat(found)

    def _choose(self, batch: Sequences[FreshTokens], choices: Sequences[Choice]) -> list[int]:
        """The token chosen behind every fresh token; a choice for each of the batch. The forwards are the same."""
        if not self._windows:
            return self.decoder.choose(self._together(batch), self._kv, choices)
        tokens: list[int] = []
        for fresh, choice in zip(batch, choices, strict=True):
            done = 0
            for window, asked in self._cut(fresh):
                count = asked.stop - asked.start
                part = choice.part(slice(done, done + count))
                tokens += self.decoder.choose(window, self._kv, [part], asked.start)
                done += count
        return tokens

    def _together(self, batch: Sequences[FreshTokens]) -> ForwardBatch:
        """All fresh tokens as one forward."""
        rows = RowBuilder(self.decoder.device)
        for fresh in batch:
            rows.begin_sequence(fresh.table)
            rows.add_trunk(fresh.tokens, fresh.start)
            rows.want_logits(len(fresh.tokens))
        return rows.build()

    def _cut(self, fresh: FreshTokens) -> Iterator[tuple[ForwardBatch, slice]]:
        """The windows that hold the fresh tokens, and which of their rows were asked for."""
        end = fresh.start + len(fresh.tokens)
        for first in range(fresh.start // WINDOW * WINDOW, end, WINDOW):
            reach = min(first + WINDOW, len(fresh.table.slots))
            begin, stop = max(fresh.start, first), min(end, first + WINDOW)
            rows = RowBuilder(self.decoder.device)
            rows.begin_sequence(fresh.table)
            # Padding sees the whole window, so that the attention is always as wide; what comes out is dropped.
            for position in range(first, begin):
                rows.add_padding(position, self._spare_slot + position - first, reach)
            rows.add_trunk(fresh.tokens[begin - fresh.start : stop - fresh.start], begin)
            for position in range(stop, first + WINDOW):
                rows.add_padding(position, self._spare_slot + position - first, reach)
            rows.want_logits(WINDOW)
            yield rows.build(), slice(begin - first, stop - first)


def needs_windows(decoder: Model, numerics: Numerics) -> bool:
    """Whether forwards have to be cut into windows: only where they were asked to be invariant and are not anyway."""
    return numerics == "invariant" and not decoder.row_invariant


def share_unit(decoder: Model, config: EngineConfig) -> int:
    """In multiples of how many rows a sequence may begin with what another has computed of the same prompt.

    The rest of the prompt must come out with the same bits. Where rounding depends on the shape of a forward, it does
    if the rest begins where a chunk of the whole prompt would have begun.
    """
    return config.block_size if decoder.row_invariant else math.lcm(config.block_size, config.prefill_chunk)
