"""Small decoders on the device against the same in float32 on the CPU.

Prompts, a verification of two sequences and rows of trees, each family of models; the logits are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops.gpu.result import Finding, Number, Setting, judged, run_step
from ops.gpu.timing import device_of, relative_error
from ssd_runtime.config import Dtype
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.batch import RowBuilder
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import decoder_from_weights
from tests.tiny_models import RandomWeights, tiny_architecture

BOUNDS: dict[Dtype, float] = {"fp32": 1e-4, "bf16": 1e-1}
FAMILIES = {
    "llama": {},
    "llama, one table for both ends": {"tie_word_embeddings": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
SIZES = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "hidden_size": 256}
BLOCKS, BLOCK_SIZE, LONGEST = 16, 16, 128
PROMPTS = (tuple(range(2, 73)), tuple(range(60, 30, -1)))


def find(setting: Setting) -> Iterator[Finding]:
    device = device_of(setting)
    for family, changes in FAMILIES.items():
        arch = tiny_architecture(**(changes if setting.small else SIZES | changes))
        expected = logits(decoder(arch, "fp32", torch.device("cpu")))
        for dtype, bound in BOUNDS.items():
            found = logits(decoder(arch, dtype, device))
            error = max(map(relative_error, found, expected))
            yield judged(f"{family}, {dtype}", error < bound, Number("error", error), Number("bound", bound))


def decoder(arch: Architecture, dtype: Dtype, device: torch.device) -> Decoder:
    return decoder_from_weights(RandomWeights(arch), dtype, device)


def logits(decoder: Decoder) -> list[Tensor]:
    """Of three forwards: each prompt in two chunks, a verification of both sequences, a tree behind each."""
    kv = decoder.new_kv(BLOCKS * BLOCK_SIZE)
    allocator = BlockAllocator(BLOCKS)
    tables = [BlockTable(allocator, BLOCK_SIZE, LONGEST, decoder.device) for _ in PROMPTS]
    found = []

    def run(rows: RowBuilder) -> None:
        found.append(decoder.forward(rows.build(), kv).cpu())

    for table, prompt in zip(tables, PROMPTS, strict=True):
        table.reserve(len(prompt) + 8)
        table.length = len(prompt) + 3
        for start in (0, 24):
            rows = RowBuilder(decoder.device)
            rows.begin_sequence(table)
            rows.add_trunk(prompt[start : 24 if start == 0 else None], start)
            run(rows)
    rows = RowBuilder(decoder.device)
    for table, prompt in zip(tables, PROMPTS, strict=True):
        rows.begin_sequence(table)
        rows.add_trunk((5, 6, 7), len(prompt))
        rows.want_logits(3)
    run(rows)
    rows, scratch = RowBuilder(decoder.device), (BLOCKS - 1) * BLOCK_SIZE
    for index, (table, prompt) in enumerate(zip(tables, PROMPTS, strict=True)):
        rows.begin_sequence(table)
        first, second, other = (scratch + 3 * index + offset for offset in range(3))
        for token, position, chain in ((8, 3, (first,)), (9, 4, (first, second)), (10, 3, (other,))):
            rows.add_branch_row(token, len(prompt) + position, len(prompt) + 3, chain)
        rows.want_logits(3)
    run(rows)
    return found


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
