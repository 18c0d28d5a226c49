"""Collects the rows of one forward and makes a `ForwardBatch` of them. Knows no model and no schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_runtime.kv.paged import BlockTable
from ssd_runtime.model.batch import ForwardBatch


class RowBuilder:
    """Rows of several sequences, one after the other.

    Args:
        device: where the batch is wanted. It travels there as one tensor.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: list[BlockTable] = []
        self._reach: int = 1
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._chains: list[Sequence[int]] = []
        self._wanted: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def begin_sequence(self, table: BlockTable) -> None:
        """The rows added from here on belong to the sequence of this table."""
        self._tables.append(table)

    def add_trunk(self, tokens: Sequence[int], start: int) -> None:
        """Consecutive tokens of the sequence from position `start`, written to their own places, causal."""
        table, index = self._tables[-1], len(self._tables) - 1
        for position, token in enumerate(tokens, start):
            self._rows.append((token, position, table.slot(position), index, position + 1))
            self._chains.append(())
        self._reach = max(self._reach, start + len(tokens))

    def add_branch_row(self, token: int, position: int, prefix: int, chain: Sequence[int]) -> None:
        """A row of a tree: sees `prefix` positions of the sequence and the slots of `chain`, the last one its own."""
        self._rows.append((token, position, chain[-1], len(self._tables) - 1, prefix))
        self._chains.append(chain)
        self._reach = max(self._reach, prefix)

    def want_logits(self, count: int = 1) -> None:
        """Logits are wanted of the last `count` rows added."""
        self._wanted.extend(range(len(self._rows) - count, len(self._rows)))

    def build(self) -> ForwardBatch:
        """The batch. Logits come in the order they were asked for; of the last row if none was asked for."""
        rows_5N = torch.tensor(self._rows, dtype=torch.int64).T.contiguous().to(self._device)
        depth = max(map(len, self._chains))
        chains = [[*chain, *[-1] * (depth - len(chain))] for chain in self._chains]
        if len(self._tables) == 1:
            tables_SC = self._tables[0].slots[None, : self._reach]
        else:
            tables_SC = torch.stack([table.slots[: self._reach] for table in self._tables])
        wanted = self._wanted or [len(self._rows) - 1]
        return ForwardBatch(
            tokens_N=rows_5N[0],
            positions_N=rows_5N[1],
            slots_N=rows_5N[2],
            sequence_N=rows_5N[3],
            tables_SC=tables_SC,
            prefix_N=rows_5N[4],
            chain_ND=torch.tensor(chains, dtype=torch.int64, device=self._device).reshape(len(chains), depth),
            logit_rows_R=None if wanted == list(range(len(self._rows))) else _indices(wanted, self._device),
        )


def _indices(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
