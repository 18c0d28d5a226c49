"""The working memory that pools leave room for, against what forwards and choosing make: never less, nor twice as much.

Forwards of published shapes run on the meta device, two layers of them: all layers use the same memory in turn.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssd_runtime.config import EngineConfig
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.batch import ForwardBatch, RowBuilder
from ssd_runtime.model.decoder import Decoder, Layer, PlainLinear
from ssd_runtime.model.memory import MOST_SCORES, forward_bytes, logit_bytes, logit_copies, table_bytes
from ssd_runtime.speculation.rejection.proposal import ProposalRule, propose_tokens
from ssd_runtime.speculation.sampling.processors import processors_of
from ssd_runtime.speculation.sampling.ranking import Choice, choose, rank_tokens
from ssd_runtime.speculation.types import SamplingParams
from tests.live_bytes import peak_bytes

META = torch.device("meta")
MIB = 2**20


def llama(hidden: int, inner: int, heads: int) -> Architecture:
    return Architecture("llama", 2, heads, 8, hidden // heads, hidden, inner, 128256, 1e-5, 5e5)


LLAMA_1B, LLAMA_8B, LLAMA_70B = llama(2048, 8192, 32), llama(4096, 14336, 32), llama(8192, 28672, 64)


def weight(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def decoder_of(arch: Architecture) -> Decoder:
    hidden, inner, queries = arch.hidden_size, arch.intermediate_size, arch.num_heads * arch.head_dim

    def linear(outputs: int, inputs: int) -> PlainLinear:
        return PlainLinear(weight(outputs, inputs), None)

    def layer() -> Layer:
        qkv = linear(queries + 2 * arch.num_kv_heads * arch.head_dim, hidden)
        up, down = linear(2 * inner, hidden), linear(hidden, inner)
        return Layer(weight(hidden), qkv, None, None, linear(hidden, queries), weight(hidden), up, down)

    layers, head = [layer() for _ in range(arch.num_layers)], linear(arch.vocab_size, hidden)
    table = weight(arch.vocab_size, hidden)
    return Decoder(arch, table, layers, weight(hidden), head, torch.ones(arch.head_dim // 2))


def forward_peak(arch: Architecture, sequences: int, context: int, add: Callable[[RowBuilder], None]) -> int:
    """Bytes of a forward of the rows that `add` adds of each of so many sequences with so much context."""
    decoder, blocks = decoder_of(arch), context // 16 + 200
    allocator, rows = BlockAllocator(sequences * blocks), RowBuilder(META)
    for _ in range(sequences):
        table = BlockTable(allocator, 16, blocks * 16, META)
        table.reserve(blocks * 16)
        rows.begin_sequence(table)
        add(rows)
    batch, kv = rows.build(), decoder.new_kv(sequences * blocks * 16)
    return peak_bytes(lambda: decoder.forward(batch, kv))


pytestmark = pytest.mark.usefixtures("plain_operators")  # whose every tensor is seen


@pytest.mark.parametrize(
    ("arch", "rows", "context"),
    [
        (LLAMA_8B, 2048, 16384 - 2048),
        (LLAMA_8B, 512, 16384 - 512),
        (LLAMA_8B, 64, 65536 - 64),
        (LLAMA_70B, 2048, 0),
        (LLAMA_1B, 256, 2048 - 256),
    ],
)
def test_a_chunk_of_a_prompt_needs_what_is_computed(arch: Architecture, rows: int, context: int) -> None:
    peak = forward_peak(arch, 1, context, lambda batch: batch.add_trunk([0] * rows, context))
    assert peak <= forward_bytes(arch, "bf16", rows, context + rows) <= 2 * peak


def test_a_chunk_of_2048_tokens_at_a_context_of_16384_takes_less_than_2_gb() -> None:
    assert forward_bytes(LLAMA_8B, "bf16", 2048, 16384) < 2e9


@pytest.mark.parametrize(
    ("arch", "sequences", "rows", "context"),
    [(LLAMA_8B, 32, 7, 16384), (LLAMA_8B, 1, 7, 16384), (LLAMA_1B, 16, 1, 1000), (LLAMA_70B, 48, 7, 2048)],
)
def test_a_verification_needs_what_is_computed(arch: Architecture, sequences: int, rows: int, context: int) -> None:
    def add(batch: RowBuilder) -> None:
        batch.add_trunk([0] * rows, context)
        batch.want_logits(rows)

    peak, wanted = forward_peak(arch, sequences, context, add), sequences * rows
    layers = forward_bytes(arch, "bf16", wanted, context + rows)
    assert peak <= max(layers, logit_bytes(arch.vocab_size, wanted, logit_copies("target", "shared-noise", 1)))
    assert max(layers, logit_bytes(arch.vocab_size, wanted, 1)) <= 2.1 * peak


@pytest.mark.parametrize(("sequences", "nodes", "context"), [(32, 31, 16384), (1, 37, 8192)])
def test_a_step_of_trees_needs_what_is_computed(sequences: int, nodes: int, context: int) -> None:
    def add(batch: RowBuilder) -> None:
        for _ in range(nodes):
            batch.add_branch_row(0, context + 7, context, range(8))
            batch.want_logits()

    peak, wanted = forward_peak(LLAMA_1B, sequences, context, add), sequences * nodes
    layers = forward_bytes(LLAMA_1B, "bf16", wanted, context + 8)
    assert peak <= max(layers, logit_bytes(LLAMA_1B.vocab_size, wanted, logit_copies("draft", "shared-noise", 1)))
    assert max(layers, logit_bytes(LLAMA_1B.vocab_size, wanted, 1)) <= 2.1 * peak


def test_the_tables_of_sequences_need_what_is_computed() -> None:
    engine = EngineConfig(max_model_len=8190, max_num_seqs=6)
    allocator = BlockAllocator(engine.most_blocks)

    def build() -> tuple[list[BlockTable], ForwardBatch]:
        tables = [BlockTable(allocator, engine.block_size, engine.max_model_len, META) for _ in range(6)]
        rows = RowBuilder(META)
        for table in tables:
            table.reserve(engine.max_model_len)
            rows.begin_sequence(table)
            rows.add_trunk([0], engine.max_model_len - 1)
        return tables, rows.build()

    peak = peak_bytes(build)
    assert 0.99 * peak <= table_bytes(engine) <= 1.2 * peak


PENALISED = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2)


def logits(rows: int, vocabulary: int) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))


def test_choosing_needs_what_is_computed_at_the_target() -> None:
    rows, vocabulary = 24, 32768
    processors = processors_of(PENALISED, (1, 2, 3), vocabulary, ())
    choices = [Choice(PENALISED, 3, range(rows), (1,) * rows, processors)]
    peak = peak_bytes(lambda: choose(logits(rows, vocabulary), choices))
    assert peak <= logit_bytes(vocabulary, rows, logit_copies("target", "shared-noise", 1)) <= 2 * peak


@pytest.mark.parametrize("coupling", ["shared-noise", "rejection"])
def test_choosing_needs_what_is_computed_at_the_draft(coupling: str) -> None:
    rows, vocabulary = 24, 32768
    processors = processors_of(PENALISED, (1, 2, 3), vocabulary - 1, ())
    choices = [Choice(PENALISED, 3, processors=processors)] * rows

    def rank() -> None:
        whole_RV = logits(rows, vocabulary)
        if coupling == "shared-noise":
            rank_tokens(whole_RV[:, :-1], choices, 9)
        else:
            propose_tokens(whole_RV[:, :-1], choices, 9, ProposalRule())

    peak = peak_bytes(rank)
    assert peak <= logit_bytes(vocabulary, rows, logit_copies("draft", coupling, 1)) <= 2 * peak  # type: ignore[arg-type]


def test_the_bound_of_attention_is_the_operator_s_own() -> None:
    from cuda_ext.reference import attention

    assert attention.MOST == MOST_SCORES
