"""What one forward computes, as tensors, and what computes it. Knows no sequences, no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cuda_ext.ops import Span
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.speculation.sampling.choice import Choice


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

        The same tokens as `speculation.choice.choose` on the logits of `forward`, which need not come together here.
        """
