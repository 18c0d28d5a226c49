"""How the rows of a verification become forwards, so that rounding does or does not depend on what shares a forward.

The one place that knows what each backend needs for `engine.numerics = "invariant"`: a row's bits may depend on its own
token and on what is before it in its sequence, and on nothing else. Knows no requests and no speculators.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_runtime.config import EngineConfig, Numerics
from ssd_runtime.engine.rows import RowBuilder
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.batch import ForwardBatch, Model
from ssd_runtime.speculation.sampling.choice import Choice

WINDOW = 16  # rows; a speculation of 6 and its bonus token meet a second window three times in eight


@dataclass(frozen=True)
class FreshTokens:
    """Consecutive tokens of one sequence without KV rows; their places in the table are reserved."""

    table: BlockTable
    tokens: Sequence[int]
    start: int


class Rounding:
    """Runs a decoder on the rows of verifications.

    Args:
        decoder: the target model.
        numerics: whether rounding may depend on what shares a forward.
        spare_slot: the first of WINDOW slots of the KV pool that belong to nobody; see `spare_slots`.
    """

    def __init__(self, decoder: Model, numerics: Numerics, spare_slot: int) -> None:
        self._decoder = decoder
        self._windows = needs_windows(decoder, numerics)
        self._spare_slot = spare_slot

    def forward(self, batch: Sequence[FreshTokens], kv: Tensor) -> Tensor:
        """Logits of all fresh tokens, sequence by sequence, float32 [R, vocabulary]; their KV rows are written."""
        if not self._windows:
            return self._decoder.forward(self._together(batch), kv)
        found = []
        for fresh in batch:
            for window, asked in self._cut(fresh):
                found.append(self._decoder.forward(window, kv)[asked])
        return torch.cat(found)

    def choose(self, batch: Sequence[FreshTokens], kv: Tensor, choices: Sequence[Choice]) -> list[int]:
        """The token chosen behind every fresh token; a choice for each of the batch. The forwards are the same."""
        if not self._windows:
            return self._decoder.choose(self._together(batch), kv, choices)
        tokens: list[int] = []
        for fresh, choice in zip(batch, choices, strict=True):
            done = 0
            for window, asked in self._cut(fresh):
                count = asked.stop - asked.start
                tokens += self._decoder.choose(window, kv, [choice.part(slice(done, done + count))], asked.start)
                done += count
        return tokens

    def _together(self, batch: Sequence[FreshTokens]) -> ForwardBatch:
        """All fresh tokens as one forward."""
        rows = RowBuilder(self._decoder.device)
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
            rows = RowBuilder(self._decoder.device)
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


def spare_slots(decoder: Model, numerics: Numerics) -> int:
    """KV slots that padding rows are written to, beyond those of the pool."""
    return WINDOW if needs_windows(decoder, numerics) else 0
