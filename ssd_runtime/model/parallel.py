"""The shard plan: which part of a model each rank of a tensor-parallel target holds, and how the parts make a whole.

Column-parallel q, k, v, gate and up (each rank some heads and inner features), row-parallel o and down whose outputs
are summed over the ranks, embedding table and head split by vocabulary (Megatron-LM, arXiv 1909.08053). Knows no
processes: what the ranks say to each other goes through a `Collective`.

Shape legend: N rows, R rows of logits, V vocabulary, L columns of a rank, G ranks, E hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.files.source import WHOLE, Part, WeightSource
from ssd_runtime.speculation.sampling.ranking import Choice
from ssd_runtime.speculation.sampling.vocab_parallel import report

_COLUMN_PARALLEL = ("gate_proj", "up_proj")
_SUMMED_BIASES = (".o_proj.bias", ".down_proj.bias")  # of linear layers whose outputs are added over the ranks


class Collective(Protocol):
    """The ranks that share a model. Every rank calls the same methods in the same order with equal shapes.

    All raise PeerLost when a rank is gone or silent. An element of a result depends on nothing but the same element of
    every rank's tensor: row-invariant kernels stay row-invariant.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor, in the order of ranks, along a new first dimension."""

    def sum(self, x: Tensor) -> Tensor:
        """In float32 and in the order of ranks, then rounded to the dtype of `x`: the same bits at every rank."""

    def maximum(self, x: Tensor) -> Tensor: ...

    def settle(self) -> None:
        """Return when all of the above has happened; on a GPU they only queue it."""


class Alone:
    """A group of one."""

    rank, size = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        return x[None]

    def sum(self, x: Tensor) -> Tensor:
        return x

    def maximum(self, x: Tensor) -> Tensor:
        return x

    def settle(self) -> None:
        pass


ALONE = Alone()


@dataclass(frozen=True)
class ShardPlan:
    """What one rank holds.

    Where there are fewer key-value heads than ranks, each rank holds one and several ranks hold the same. The
    vocabulary is padded to a multiple of the ranks.

    Attributes:
        arch: of the whole model.
        rank, size: of the group.

    Raises:
        ConfigError: the model does not divide among so many ranks; names the numbers it does divide among.
    """

    arch: Architecture
    rank: int
    size: int

    def __post_init__(self) -> None:
        self.arch.check_divides(self.size, f"a model of {self.arch.num_heads} heads")

    @property
    def heads(self) -> tuple[int, int]:
        return self._shard(self.arch.num_heads)

    @property
    def kv_heads(self) -> tuple[int, int]:
        count = self.arch.num_kv_heads
        if count >= self.size:
            return self._shard(count)
        first = self.rank * count // self.size
        return first, first + 1

    @property
    def inner(self) -> tuple[int, int]:
        return self._shard(self.arch.intermediate_size)

    @property
    def vocab_size(self) -> int:
        """Rows of this rank's part of the embedding table, padding included."""
        return self.local.vocab_size

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Token ids of this rank, without padding."""
        start = min(self.rank * self.vocab_size, self.arch.vocab_size)
        return start, min(start + self.vocab_size, self.arch.vocab_size)

    @property
    def local(self) -> Architecture:
        """The part as a model of its own."""
        return self.arch.part(self.size)

    def part(self, name: str) -> Part:
        """Which part of a tensor (by its Hugging Face name) this rank reads."""
        stem = name.rpartition(".")[0].rpartition(".")[2]
        if stem in ("embed_tokens", "lm_head"):
            return Part(rows=self.vocabulary)
        if name.endswith(_SUMMED_BIASES):
            return WHOLE
        if stem == "q_proj":
            return Part(rows=self._features(self.heads))
        if stem in ("k_proj", "v_proj"):
            return Part(rows=self._features(self.kv_heads))
        if stem in _COLUMN_PARALLEL:
            return Part(rows=self.inner)
        if stem == "o_proj":
            return Part(columns=self._features(self.heads))
        if stem == "down_proj":
            return Part(columns=self.inner)
        return WHOLE

    def _shard(self, count: int) -> tuple[int, int]:
        each = count // self.size
        return self.rank * each, (self.rank + 1) * each

    def _features(self, heads: tuple[int, int]) -> tuple[int, int]:
        return heads[0] * self.arch.head_dim, heads[1] * self.arch.head_dim


class ShardedWeights:
    """A `WeightSource` of one rank's part; reads nothing else."""

    def __init__(self, source: WeightSource, plan: ShardPlan) -> None:
        self.path = source.path
        self.architecture = plan.local
        self._source = source
        self._plan = plan

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        tensor = self._source.read(name, self._plan.part(name))
        if name.startswith(("embed_tokens.", "lm_head.")):
            tensor = functional.pad(tensor, (0, 0, 0, self._plan.vocab_size - len(tensor)))
        if name.endswith(_SUMMED_BIASES) and self._plan.rank:
            tensor = torch.zeros_like(tensor)  # rank 0 adds it
        return part.of(tensor)

    def rope_factors(self) -> Tensor | None:
        return self._source.rope_factors()


@dataclass(frozen=True)
class Shard:
    """How one rank's part works together with the others'."""

    plan: ShardPlan
    group: Collective

    def embed(self, table_VE: Tensor, tokens_N: Tensor) -> Tensor:
        """Rows of the table that is split by vocabulary: one rank has each, the others add zeros (NE)."""
        start, end = self.plan.vocabulary
        mine_N = (tokens_N >= start) & (tokens_N < end)
        rows_NE = table_VE.index_select(0, torch.where(mine_N, tokens_N - start, 0))
        return self.group.sum(rows_NE.masked_fill(~mine_N[:, None], 0.0))

    def whole_rows(self, logits_RV: Tensor) -> Tensor:
        """Logits over the whole vocabulary from every rank's part, padding cut off."""
        parts_GRV = self.group.gather(logits_RV)
        return parts_GRV.transpose(0, 1).reshape(len(logits_RV), -1)[:, : self.plan.arch.vocab_size].contiguous()

    def reports(self, logits_RL: Tensor, choices: Sequence[Choice]) -> Tensor:
        """Every rank's report on its part of the logits (vocab_parallel.py), for rank 0 to choose from (GC).

        Args:
            logits_RL: this rank's part, padding included, of the rows of all choices.
        """
        start, stop = self.plan.vocabulary
        self.group.settle()  # a report may wait for the device, and only this wait has a deadline
        within = [choice.within(start, stop) for choice in choices]
        mine = report(logits_RL[:, : stop - start], within, start, self.plan.arch.vocab_size)
        reports_GC = self.group.gather(mine)
        self.group.settle()
        return reports_GC
