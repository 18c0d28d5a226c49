"""A language model that is a table, for tests that enumerate every text: exact, fast, and served by the real engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.speculation.sampling.ranking import Choice, choose, count_rows
from tests.tiny_models import CPU, tiny_architecture


class TabularModel:
    """The logits after a token depend on it and on the token before it: `table[before, token]`.

    A `Model` like a decoder. Its KV rows hold tokens, and the token before is read from there: a row that was rolled
    back, moved or adopted wrongly changes what is emitted.

    Args:
        table_VVV: logits by the two last tokens.
    """

    row_invariant = True
    device = CPU

    def __init__(self, table_VVV: Tensor) -> None:
        self.table_VVV = table_VVV
        self.arch: Architecture = tiny_architecture(vocab_size=table_VVV.shape[2])

    def new_kv(self, num_slots: int) -> Tensor:
        return torch.full((1, 2, num_slots, 1, 1), -1.0)

    def forward(self, batch: ForwardBatch, kv_L2SGD: Tensor) -> Tensor:
        stored_S = kv_L2SGD[0, 0, :, 0, 0]
        stored_S[batch.slots_N] = batch.tokens_N.float()
        depth_N = (batch.chain_ND >= 0).sum(dim=1)
        in_table_N = batch.prefix_N - 2 + depth_N  # place of the token before, of rows without a chain or with one node
        slots_N = batch.tables_SC[batch.sequence_N, in_table_N.clamp(0, batch.tables_SC.shape[1] - 1)]
        if batch.chain_ND.shape[1]:
            above_N = batch.chain_ND.gather(1, (depth_N - 2).clamp(min=0)[:, None]).squeeze(1)
            slots_N = torch.where(depth_N > 1, above_N, slots_N)
        before_N = stored_S[slots_N].long()
        before_N = torch.where(batch.positions_N > 0, before_N, 0)
        assert bool((before_N >= 0).all()), "a row sees a slot that nothing was written to"
        logits_NV = self.table_VVV[before_N, batch.tokens_N]
        return logits_NV if batch.logit_rows_R is None else logits_NV[batch.logit_rows_R]

    def choose(self, batch: ForwardBatch, kv_L2SGD: Tensor, choices: Sequence[Choice], first_row: int = 0) -> list[int]:
        return choose(self.forward(batch, kv_L2SGD)[first_row : first_row + count_rows(choices)], choices)

    def check(self) -> None:
        """Nothing can be wrong with a table."""

    def law(self, prompt: Sequence[int], length: int, temperature: float) -> Tensor:
        """The probability of every text of `length` tokens after the prompt, float64 [V] * length."""
        size = self.table_VVV.shape[2]
        p_VVV = torch.softmax(self.table_VVV.double() / temperature, dim=2)
        law = torch.ones([size] * length, dtype=torch.float64)
        for text in itertools.product(range(size), repeat=length):
            whole = (*prompt[-2:], *text)
            for before, last, token in zip(whole, whole[1:], whole[2:], strict=False):
                law[text] *= p_VVV[before, last, token]
        return law
