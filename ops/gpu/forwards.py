"""The plain forward of large models against its floor: the bytes it must read, at the rate at which they can be read.

Random weights in published shapes, made on the device; rows of one sequence behind a context, as a verification has.
Each weight is read once, and the keys and values of the context once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import torch

from ops.gpu.result import Finding, Number, Setting, run_step
from ops.gpu.timing import copy_rate, device_of, median_ms, read_rate
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.batch import ForwardBatch, RowBuilder
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.memory import block_bytes, weight_bytes

MODELS = ("random:llama-1b", "random:llama-8b", "random:qwen-32b")
ROWS = (1, 7, 16, 28, 64)
CONTEXT, BLOCK_SIZE = 512, 16
RATE_BYTES = 1 << 32  # far more than any cache holds


def find(setting: Setting) -> Iterator[Finding]:
    device = device_of(setting)
    num_bytes = RATE_BYTES >> 8 if setting.small else RATE_BYTES
    rate = read_rate(device, num_bytes)
    copied = copy_rate(device, num_bytes)
    yield Finding("rates", (Number("read", rate / 1e9, "GB/s"), Number("copy", copied / 1e9, "GB/s")))
    for name in ("random:tiny",) if setting.small else MODELS:
        yield from _model(name, device, rate)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _model(name: str, device: torch.device, rate: float) -> Iterator[Finding]:
    start = time.monotonic()
    decoder = load_decoder(name, "bf16", device)
    kv = decoder.new_kv(CONTEXT + max(ROWS) + BLOCK_SIZE).normal_()
    num_bytes = read_bytes(decoder.arch)
    seconds = Number("made in", time.monotonic() - start, "s")
    yield Finding(name, (Number("read by a forward", num_bytes / 1e9, "GB"), seconds))
    floor_ms = num_bytes / rate * 1e3
    for rows in ROWS:
        batch = verification(decoder, rows)
        ms = median_ms(lambda batch=batch: decoder.forward(batch, kv), device)
        numbers = Number("rows", rows), Number("forward", ms, "ms"), Number("floor", floor_ms, "ms")
        yield Finding(f"{name}, M = {rows}, plain", (*numbers, Number("over the floor", ms / floor_ms, "x")))


def verification(decoder: Decoder, rows: int) -> ForwardBatch:
    """Fresh tokens of one sequence behind CONTEXT others, all with logits."""
    blocks = -(-(CONTEXT + rows) // BLOCK_SIZE)
    table = BlockTable(BlockAllocator(blocks), BLOCK_SIZE, blocks * BLOCK_SIZE, decoder.device)
    table.reserve(CONTEXT + rows)
    table.length = CONTEXT + rows
    builder = RowBuilder(decoder.device)
    builder.begin_sequence(table)
    builder.add_trunk([token % decoder.arch.vocab_size for token in range(100, 100 + rows)], CONTEXT)
    builder.want_logits(rows)
    return builder.build()


def read_bytes(arch: Architecture) -> int:
    """Of a forward in bfloat16. Of an embedding table that is not the head too, a few rows are read."""
    unread = 0 if arch.tie_word_embeddings else 2 * arch.vocab_size * arch.hidden_size
    return weight_bytes(arch, "bf16", "cuda") - unread + block_bytes(arch, CONTEXT, "bf16")


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
