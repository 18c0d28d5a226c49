"""Collects the rows of one forward and makes a `ForwardBatch` of them. Knows no model and no schedule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ext.ops import Span
from cuda_ext.upload import uploaded
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.batch import ForwardBatch


class RowBuilder:
    """Rows of several sequences, one after the other.

    Args:
        device: where the batch is wanted. It travels there as one vector.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: list[BlockTable] = []
        self._first_rows: list[int] = []  # of each table
        self._reaches: list[int] = []
        self._rows: list[tuple[int, int, int, int]] = []  # token, position, slot, prefix
        self._chains: list[Sequence[int]] = []
        self._wanted: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def begin_sequence(self, table: BlockTable) -> None:
        """The rows added from here on belong to the sequence of this table."""
        self._tables.append(table)
        self._first_rows.append(len(self._rows))
        self._reaches.append(0)

    def add_trunk(self, tokens: Sequence[int], start: int) -> None:
        """Consecutive tokens of the sequence from position `start`, written to their own places, causal."""
        end = start + len(tokens)
        slots = self._tables[-1].slots_of(start, end)
        self._rows += zip(tokens, range(start, end), slots, range(start + 1, end + 1), strict=True)
        self._chains += [()] * len(tokens)
        self._reaches[-1] = max(self._reaches[-1], end)

    def add_branch_row(self, token: int, position: int, prefix: int, chain: Sequence[int]) -> None:
        """A row of a tree: sees `prefix` positions of the sequence and the slots of `chain`, the last one its own."""
        self._add(token, position, chain[-1], prefix, chain)

    def add_padding(self, position: int, slot: int, prefix: int) -> None:
        """A row that nobody asks for, on a slot that belongs to nobody: it keeps a place in the forward."""
        self._add(0, position, slot, prefix, ())

    def want_logits(self, count: int = 1) -> None:
        """Logits are wanted of the last `count` rows added."""
        self._wanted.extend(range(len(self._rows) - count, len(self._rows)))

    def build(self) -> ForwardBatch:
        """The batch. Logits come in the order they were asked for; of the last row if none was asked for."""
        num_rows, depth = len(self._rows), max(map(len, self._chains))
        counts = [end - first for first, end in itertools.pairwise([*self._first_rows, num_rows])]
        wanted = self._wanted or [num_rows - 1]
        if wanted == list(range(num_rows)):
            wanted = []
        words = [*itertools.chain.from_iterable(zip(*self._rows, strict=True))]
        for index, count in enumerate(counts):
            words += [index] * count
        if depth:
            padding = [-1] * depth
            for chain in self._chains:
                words += chain
                words += padding[len(chain) :]
        words += wanted
        lengths = [num_rows] * 5 + [num_rows * depth, len(wanted)]
        *rows_5N, chains, wanted_R = uploaded(words, self._device).split(lengths)
        tokens_N, positions_N, slots_N, prefix_N, sequence_N = rows_5N
        return ForwardBatch(
            tokens_N=tokens_N,
            positions_N=positions_N,
            slots_N=slots_N,
            sequence_N=sequence_N,
            tables_SC=self._slots_of_tables(),
            prefix_N=prefix_N,
            chain_ND=chains.view(num_rows, depth),
            spans=tuple(map(Span, counts, self._reaches)),
            logit_rows_R=wanted_R if wanted else None,
        )

    def _slots_of_tables(self) -> Tensor:
        width = max(1, *self._reaches)
        if len(self._tables) == 1:
            return self._tables[0].slots[None, :width]
        return torch.stack([table.slots[:width] for table in self._tables])

    def _add(self, token: int, position: int, slot: int, prefix: int, chain: Sequence[int]) -> None:
        self._rows.append((token, position, slot, prefix))
        self._chains.append(chain)
        if prefix > self._reaches[-1]:
            self._reaches[-1] = prefix
