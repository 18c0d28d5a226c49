"""A forward on a device, followed on the meta device: whole, without a host read, from one copy, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cuda_ext import ops, reference
from ssd_runtime.engine.runner import WINDOW, FreshTokens, Runner
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable, copy_branch
from ssd_runtime.leader.forward_codec import decode_batch, encode_batch
from ssd_runtime.model.batch import RowBuilder
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.sampling.processors import processors_of
from ssd_runtime.speculation.sampling.ranking import Choice, process_rows
from ssd_runtime.speculation.types import SamplingParams
from tests.live_bytes import peak_bytes
from tests.meta_models import META, MixedDevices, meta_decoder, meta_part, watched
from tests.tiny_models import PagedRun, tiny_architecture, tiny_decoder

BLOCK = 16
LLAMA_8B: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "hidden_size": 4096}
LLAMA_8B |= {"intermediate_size": 14336, "vocab_size": 128256, "max_position": 131072}


class Pool:
    """Sequences of some length in a KV pool."""

    def __init__(self, decoder: Decoder, *lengths: int) -> None:
        self.decoder, self.lengths = decoder, lengths
        blocks = sum(length // BLOCK + 2 for length in lengths)
        allocator = BlockAllocator(blocks)
        self.tables = [BlockTable(allocator, BLOCK, max(lengths) + BLOCK, META) for _ in lengths]
        for table, length in zip(self.tables, lengths, strict=True):
            table.reserve(length)
        self.scratch = blocks * BLOCK
        self.kv = decoder.new_kv(self.scratch + 1024)

    def trunks(self, *counts: int) -> RowBuilder:
        """The last tokens of some sequences, with logits of all of them."""
        rows = RowBuilder(META)
        for table, length, count in zip(self.tables, self.lengths, counts, strict=False):
            rows.begin_sequence(table)
            rows.add_trunk([1] * count, length - count)
            rows.want_logits(count)
        return rows

    def draft(self, chunk: int, nodes: int, depth: int) -> RowBuilder:
        """A chunk of the first sequence's prompt and tree rows of the others."""
        rows = RowBuilder(META)
        rows.begin_sequence(self.tables[0])
        rows.add_trunk([1] * chunk, self.lengths[0] - chunk)
        for table, length in zip(self.tables[1:], self.lengths[1:], strict=True):
            rows.begin_sequence(table)
            for node in range(nodes):
                chain = range(self.scratch, self.scratch + 1 + node % depth)
                rows.add_branch_row(1, length + len(chain) - 1, length, chain)
                rows.want_logits()
        return rows


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "every-bias": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
}
BATCHES: dict[str, tuple[Callable[[Pool], RowBuilder], int]] = {
    "decode": (lambda pool: pool.trunks(1), 1),
    "verify": (lambda pool: pool.trunks(5, 1, 3), 9),
    "draft": (lambda pool: pool.draft(20, 6, 3), 12),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_reads_nothing_back_and_needs_one_copy(operators: str, family: str, batch: str) -> None:
    decoder = meta_decoder(tiny_architecture(**FAMILIES[family]))
    pool = Pool(decoder, 40, 33, 7)
    collect, num_logits = BATCHES[batch]
    logits, uploads = watched(lambda: decoder.forward(collect(pool).build(), pool.kv))
    assert (logits.shape, logits.dtype, logits.device) == ((num_logits, 96), torch.float32, META)
    assert uploads == 1


@pytest.mark.parametrize("many", [False, True])
def test_attention_in_blocks_reads_nothing_back(
    plain_operators: None, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    monkeypatch.setattr(reference.attention, "MOST", 500)
    decoder = meta_decoder(tiny_architecture())
    pool = Pool(decoder, 40, 33, 7)
    watched(lambda: decoder.forward(BATCHES["draft" if many else "decode"][0](pool).build(), pool.kv))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_part_of_a_tensor_parallel_model_reads_nothing_back(operators: str, rank: int) -> None:
    decoder = meta_part(tiny_architecture(num_heads=6, num_kv_heads=3, intermediate_size=48, vocab_size=97), rank, 3)
    pool = Pool(decoder, 40, 33, 7)
    part, _ = watched(lambda: decoder.forward_part(pool.trunks(5, 1, 3).build(), pool.kv))
    whole, _ = watched(lambda: decoder.forward(pool.trunks(5, 1, 3).build(), pool.kv))
    assert (part.shape, whole.shape) == ((9, 33), (9, 97))


def test_windows_of_invariant_numerics_need_one_copy_each(operators: str) -> None:
    decoder = meta_decoder(tiny_architecture())
    pool = Pool(decoder, 40)
    runner = Runner(decoder, pool.kv, "shared-noise", windows=True, spare_slot=pool.scratch)
    fresh = FreshTokens(pool.tables[0], [1] * 6, 2 * WINDOW - 2)  # in two windows
    logits, uploads = watched(lambda: runner.forward([fresh]))
    assert (len(logits), uploads) == (6, 2)


@pytest.mark.parametrize("length", [1, BLOCK, 50 * BLOCK])
def test_new_blocks_reach_the_device_in_one_copy(length: int) -> None:
    table = BlockTable(BlockAllocator(50), BLOCK, 50 * BLOCK, META)
    table.slots  # noqa: B018 - made here
    assert watched(lambda: table.reserve(length))[1] == 1
    assert watched(lambda: table.reserve(length))[1] == 0


def test_rows_of_a_branch_are_moved_by_one_copy(operators: str) -> None:
    kv = torch.empty(1, 2, 64, 2, 4, device=META)
    assert watched(lambda: copy_branch(kv, [1, 2, 3], [4, 5, 6]))[1] == 1


def test_a_follower_puts_a_batch_on_its_device_in_one_copy(operators: str) -> None:
    decoder = meta_part(tiny_architecture(), 1, 2)
    pool = Pool(decoder, 40, 33, 7)
    numbers = encode_batch(PagedRun(tiny_decoder()).batch([1, 2, 3], 5), 1)
    logits, uploads = watched(lambda: decoder.forward_part(decode_batch(numbers, 1, META), pool.kv))
    assert (len(logits), uploads) == (3, 1)


def test_processors_of_logits_read_nothing_back() -> None:
    params = SamplingParams(
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        presence_penalty=0.5,
        logit_bias=((3, 1.0),),
        allowed_tokens=tuple(range(90)),
        banned_tokens=(4,),
        min_tokens=9,
    )
    processors = processors_of(params, range(20), 96, (95,))
    rows = [
        Choice(params, 0, processors=processors),
        Choice(params, 0),
        Choice(params, 0, range(2, 3), (5, 7), processors),
    ]
    z_RV, _ = watched(lambda: process_rows(torch.empty(3, 96, device=META, dtype=torch.bfloat16), rows))
    assert (z_RV.dtype, z_RV.device) == (torch.float32, META)


def mutants() -> dict[str, tuple[str, Callable[..., Any], type[Exception]]]:
    """What somebody might add to an operator: its name, what it would do first, and how that shows."""
    return {
        "width": ("paged_attention", lambda *given: int(given[4].max()), RuntimeError),
        "branch": ("rms_norm", lambda x_ND, *_: bool((x_ND > 0).all()), RuntimeError),
        "list": ("rope_write_", lambda *given: given[-1].tolist(), RuntimeError),
        "to-the-host": ("silu_mul", lambda x: x.cpu(), NotImplementedError),
        "data-dependent-shape": ("paged_attention", lambda *given: given[4].nonzero(), NotImplementedError),
        "index-on-the-host": ("paged_attention", lambda *given: given[3][torch.tensor([0])], MixedDevices),
        "vector-on-the-host": ("rms_norm", lambda x_ND, *_: x_ND * torch.ones(x_ND.shape[1]), RuntimeError),
        "number-on-the-host": ("add_rms_norm", lambda x_ND, *_: x_ND * torch.tensor(2.0), MixedDevices),
    }


@pytest.mark.parametrize("mutant", mutants())
def test_an_operator_that_reads_a_value_or_mixes_devices_is_noticed(
    plain_operators: None, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    name, addition, shows = mutants()[mutant]
    operator = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *given: (addition(*given), operator(*given))[1])
    decoder = meta_decoder(tiny_architecture())
    pool = Pool(decoder, 40, 33, 7)
    with pytest.raises(shows, match="meta"):
        watched(lambda: decoder.forward(pool.trunks(5, 1, 3).build(), pool.kv))


def test_a_second_copy_is_noticed(plain_operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda x_ND, *rest: norm(x_ND * torch.tensor([1.0], device=META), *rest))
    decoder = meta_decoder(tiny_architecture())
    pool = Pool(decoder, 40)
    assert watched(lambda: decoder.forward(pool.trunks(1).build(), pool.kv))[1] > 1


# Sequences of which lengths, and which rows of them; the last of a size just below where attention changes its way.
LARGE: dict[str, tuple[list[int], Callable[[Pool], RowBuilder]]] = {
    "chunk of a prompt": ([16384], lambda pool: pool.draft(2048, 0, 1)),
    "chunk and trees": ([16384] * 8, lambda pool: pool.draft(2048, 24, 8)),
    "verification": ([16384] * 16, lambda pool: pool.trunks(*[7] * 16)),
    "short verification": ([146] * 16, lambda pool: pool.trunks(*[7] * 16)),
}


@pytest.mark.parametrize("batch", LARGE)
def test_a_forward_of_llama_8b_needs_less_than_2_gb_beside_weights_and_cache(plain_operators: None, batch: str) -> None:
    lengths, collect = LARGE[batch]
    decoder = meta_decoder(tiny_architecture(**LLAMA_8B))  # of two layers, as good as 32: nothing of one is left
    pool = Pool(decoder, *lengths)
    peak = peak_bytes(lambda: decoder.forward(collect(pool).build(), pool.kv))
    assert peak < 2e9
