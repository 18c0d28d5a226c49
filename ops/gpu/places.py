"""Whether a row's bits depend on how many rows a forward has, and on the row's place among them.

One row of bfloat16 goes through each matrix of Llama 8B, and through attention, at every place of forwards of 1 to 64
rows whose other rows are random. The compiled CPU operators promise the same bits everywhere; on a GPU this is the
table by which `numerics = "invariant"` is designed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cuda_ext import ops
from ops.gpu.result import Finding, Number, Setting, judged, run_step
from ops.gpu.timing import device_of
from ssd_runtime.model.quantize import make_linear

ROWS = (1, 7, 16, 28, 64)
LLAMA_8B = {  # inputs and outputs
    "qkv": (4096, 6144),
    "attention out": (4096, 4096),
    "gate and up": (4096, 28672),
    "down": (14336, 4096),
    "head": (4096, 128256),
}
TINY = {"qkv": (64, 96), "head": (64, 300)}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128

Computes = Callable[[Tensor], Tensor]  # rows to rows, each on its own if all is well


def find(setting: Setting) -> Iterator[Finding]:
    device = device_of(setting)
    generator = torch.Generator(device).manual_seed(7)
    for name, (inputs, outputs) in (TINY if setting.small else LLAMA_8B).items():
        weight = torch.randn(outputs, inputs, generator=generator, device=device) / inputs**0.5
        yield from places(name, make_linear(weight, None, "bf16", device), inputs, generator)
    context = 40 if setting.small else 640
    yield from places("attention", _attention(context, generator), HEADS * HEAD_DIM, generator)


def places(name: str, compute: Computes, inputs: int, generator: torch.Generator) -> Iterator[Finding]:
    """A finding for each number of rows; the row is compared with itself at the first place of as many, and of 64."""
    promised = generator.device.type == "cpu" and ops.backend() == "compiled"
    found = {rows: _at_every_place(compute, inputs, rows, generator) for rows in ROWS}
    for rows, outputs in found.items():
        moved = sum(not torch.equal(output, outputs[0]) for output in outputs)
        as_64 = torch.equal(outputs[0], found[max(ROWS)][0])
        numbers = Number("rows", rows), Number("places with other bits", moved), Number("as in 64", str(as_64))
        yield judged(f"{name}, M = {rows}", not promised or (moved == 0 and as_64), *numbers)


def _at_every_place(compute: Computes, inputs: int, rows: int, generator: torch.Generator) -> list[Tensor]:
    """What the same row gives at each place; its company is new each time."""
    device = generator.device
    row = torch.randn(inputs, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
    found = []
    for place in range(rows):
        x = torch.randn(rows, inputs, generator=generator, device=device).bfloat16()
        x[place] = row
        found.append(compute(x)[place].clone())
    return found


def _attention(context: int, generator: torch.Generator) -> Computes:
    """Queries at the end of one sequence, which all see as much of it."""
    device = generator.device
    kv = torch.randn(2, context, KV_HEADS, HEAD_DIM, generator=generator, device=device).bfloat16()
    table = torch.randperm(context, generator=generator, device=device)[None]

    def compute(x: Tensor) -> Tensor:
        rows = len(x)
        sequence, prefix = (torch.full((rows,), value, device=device) for value in (0, context - 7))
        chains = torch.empty(rows, 0, dtype=torch.int64, device=device)
        q = x.view(rows, HEADS, HEAD_DIM)
        spans = [ops.Span(rows, context)]
        return ops.paged_attention(q, kv, sequence, table, prefix, chains, HEAD_DIM**-0.5, spans).view(rows, -1)

    return compute


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
