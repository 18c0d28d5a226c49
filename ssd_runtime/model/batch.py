"""What one forward computes: its rows, collected and as tensors, and what computes them. Knows no requests and no
scheduler."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cuda_ext.ops import Span, uploaded
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.speculation.sampling.ranking import Choice


@dataclass(frozen=True)
class ForwardBatch:
    """N rows for one forward; int64 tensors on the model's device.

    Rows of a sequence come one after the other, sequences in the order of the tables. What decides the shapes of a
    forward is there as integers of the host, so that nobody reads a tensor of the device for it.

    A row sees the first `prefix` slots of its sequence's table and the non-negative slots of its chain. Its own slot is
    among them: a trunk row at position p has prefix p + 1, a tree row ends its chain with its own slot.

    Attributes:
        tokens_N: token ids.
        positions_N: positions in the text, for the rotary embedding.
        slots_N: KV slot each row is written to, all different.
        sequence_N: which row of the tables a row belongs to.
        tables_SC: slots of each sequence in order (C may exceed what is used).
        prefix_N: how many slots of its table a row sees.
        chain_ND: further slots a row sees, -1 for none; D may be 0.
        spans: of each sequence how many rows it has and how far they reach.
        logit_rows_R: rows whose logits are wanted; None for all.
    """

    tokens_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    sequence_N: Tensor
    tables_SC: Tensor
    prefix_N: Tensor
    chain_ND: Tensor
    spans: tuple[Span, ...]
    logit_rows_R: Tensor | None = None


class RowBuilder:
    """Collects the rows of several sequences, one sequence after the other, and makes a `ForwardBatch` of them.

    Args:
        device: where the batch is wanted. It travels there as one vector.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: list[BlockTable] = []
        self._first_rows: list[int] = []  # of each table
        self._reaches: list[int] = []  # likewise
        self._tokens: list[int] = []  # of each row, as the four that follow
        self._positions: list[int] = []
        self._slots: list[int] = []
        self._prefixes: list[int] = []
        self._chains: list[Sequence[int]] = []
        self._wanted: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def begin_sequence(self, table: BlockTable) -> None:
        """The rows added from here on belong to the sequence of this table."""
        self._tables.append(table)
        self._first_rows.append(len(self))
        self._reaches.append(0)

    def add_trunk(self, tokens: Sequence[int], start: int) -> None:
        """Consecutive tokens of the sequence from position `start`, written to their own places, causal."""
        end = start + len(tokens)
        self._tokens += tokens
        self._positions += range(start, end)
        self._slots += self._tables[-1].slots_of(start, end)
        self._prefixes += range(start + 1, end + 1)
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
        self._wanted.extend(range(len(self) - count, len(self)))

    def build(self) -> ForwardBatch:
        """The batch. Logits come in the order they were asked for; of the last row if none was asked for."""
        num_rows, depth = len(self), max(map(len, self._chains))
        counts = [end - first for first, end in itertools.pairwise([*self._first_rows, num_rows])]
        wanted = self._wanted or [num_rows - 1]
        if wanted == list(range(num_rows)):
            wanted = []
        words = [*self._tokens, *self._positions, *self._slots, *self._prefixes]
        for index, count in enumerate(counts):
            words += [index] * count
        if depth:
            padding = [-1] * depth
            for chain in self._chains:
                words += chain
                words += padding[len(chain) :]
        words += wanted
        lengths = [num_rows] * 5 + [num_rows * depth, len(wanted)]
        tokens_N, positions_N, slots_N, prefix_N, sequence_N, chains, wanted_R = uploaded(words, self._device).split(
            lengths
        )
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
        self._tokens.append(token)
        self._positions.append(position)
        self._slots.append(slot)
        self._prefixes.append(prefix)
        self._chains.append(chain)
        if prefix > self._reaches[-1]:
            self._reaches[-1] = prefix


class Model(Protocol):
    """A decoder as the engine uses it: in this process (decoder.py) or spread over ranks (leader/replay.py).

    All that is ever done to the KV pool is done by `forward`, so that other ranks can do the same to theirs.
    """

    @property
    def arch(self) -> Architecture: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def row_invariant(self) -> bool: ...

    def check(self) -> None:
        """Between forwards: raise PeerLost if a rank that shares the model is gone."""

    def new_kv(self, num_slots: int) -> Tensor: ...

    def forward(self, batch: ForwardBatch, kv_L2SGD: Tensor) -> Tensor: ...

    def choose(self, batch: ForwardBatch, kv_L2SGD: Tensor, choices: Sequence[Choice], first_row: int = 0) -> list[int]:
        """A forward, and the tokens chosen at its rows with logits from `first_row` on, as many as the choices have.

        The same tokens as `choose` of ranking.py on the logits of `forward`, which need not come together here.
        """
