"""Every operator of a layer on the device against float64, in the shapes of Llama 8B.

Inputs are new in every run (their seed is the first finding). An error is ||out - exact|| / ||exact||; bounds are what
rounding once or twice in the dtype gives, and half of an operator's mistake does not fit below them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ext import ops
from ops.gpu.result import Finding, Number, Setting, judged, run_step
from ops.gpu.timing import device_of, relative_error
from ssd_runtime.model.quantize import make_linear

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rows: tuple[int, ...]


LLAMA_8B = Shape(4096, 14336, 32, 8, 128, 1024, (1, 7, 24, 64))
TINY = Shape(64, 96, 4, 2, 16, 40, (1, 7))


def find(setting: Setting) -> Iterator[Finding]:
    seed = secrets.randbits(31)
    yield Finding("inputs", (Number("seed", seed),))
    shape, device = TINY if setting.small else LLAMA_8B, device_of(setting)
    generator = torch.Generator(device).manual_seed(seed)
    for dtype in BOUNDS:
        for rows in shape.rows:
            case = Case(shape, rows, dtype, generator)
            errors = {
                "rms_norm": case.norm(),
                "add_rms_norm": case.add_norm(),
                "silu_mul": case.silu(),
                "rope_write_": case.rope(),
                "paged_attention": case.attention(),
                "linear": case.linear(),
            }
            well = all(error < BOUNDS[dtype] for error in errors.values())
            yield judged(
                f"{dtype}".removeprefix("torch.") + f", M = {rows}", well, *map(Number, errors, errors.values())
            )


@dataclass(frozen=True)
class Case:
    """Random inputs of one dtype; each method gives the relative error of one operator."""

    shape: Shape
    rows: int
    dtype: torch.dtype
    generator: torch.Generator

    def random(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.randn(*shape, generator=self.generator, device=device).to(self.dtype)

    def norm(self) -> float:
        x, weight = self.random(self.rows, self.shape.hidden), self.random(self.shape.hidden)
        return relative_error(ops.rms_norm(x, weight, EPS), exact_norm(x.double(), weight))

    def add_norm(self) -> float:
        x, residual = self.random(2, self.rows, self.shape.hidden)
        weight = self.random(self.shape.hidden)
        normed, total = ops.add_rms_norm(x, residual, weight, EPS)
        exact_total = x.double() + residual.double()
        return max(relative_error(total, exact_total), relative_error(normed, exact_norm(exact_total, weight)))

    def silu(self) -> float:
        gate_up = self.random(self.rows, 2 * self.shape.inner)
        gate, up = gate_up.double().chunk(2, -1)
        return relative_error(ops.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)

    def rope(self) -> float:
        shape = self.shape
        fused = self.random(self.rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        q, k, v = fused.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
        angles = self.random(self.rows, shape.head_dim // 2).float().repeat(1, 2)
        kv = self.random(2, shape.context, shape.kv_heads, shape.head_dim)
        slots = torch.randperm(shape.context, generator=self.generator, device=kv.device)[: self.rows]
        exact_q, exact_k = (exact_rotation(heads.double(), angles.double()) for heads in (q, k))
        exact_kv = kv.double()
        exact_kv[0, slots], exact_kv[1, slots] = exact_k, v.double()
        ops.rope_write_(q, k, v, angles.cos(), angles.sin(), kv, slots)
        return max(relative_error(q, exact_q), relative_error(kv, exact_kv))

    def attention(self) -> float:
        """Rows of two sequences with chains of up to six slots of their own."""
        shape, device = self.shape, self.generator.device
        q = self.random(self.rows, shape.heads, shape.head_dim)
        kv = self.random(2, 2 * shape.context, shape.kv_heads, shape.head_dim)
        order = torch.randperm(2 * shape.context, generator=self.generator, device=device)
        tables = order[: 2 * (shape.context - 8)].view(2, -1)
        chains = order[-16:][torch.randint(0, 16, (self.rows, 6), generator=self.generator, device=device)]
        chains = chains.where(torch.arange(6, device=device) <= torch.arange(self.rows, device=device)[:, None] % 7, -1)
        counts = -(-self.rows // 2), self.rows // 2
        sequence = torch.tensor([0] * counts[0] + [1] * counts[1], device=device)
        prefix = torch.randint(1, tables.shape[1], (self.rows,), generator=self.generator, device=device)
        scale = shape.head_dim**-0.5
        spans = [ops.Span(count, tables.shape[1]) for count in counts]
        out = ops.paged_attention(q, kv, sequence, tables, prefix, chains, scale, spans)
        return relative_error(out, exact_attention(q, kv, sequence, tables, prefix, chains, scale))

    def linear(self) -> float:
        x, weight = self.random(self.rows, self.shape.hidden), self.random(self.shape.inner, self.shape.hidden)
        dtype = "fp32" if self.dtype == torch.float32 else "bf16"
        return relative_error(make_linear(weight, None, dtype, weight.device)(x), x.double() @ weight.double().T)


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def exact_rotation(heads: Tensor, angles: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * angles.cos()[:, None] + torch.cat((-second, first), -1) * angles.sin()[:, None]


def exact_attention(
    q: Tensor, kv: Tensor, sequence: Tensor, tables: Tensor, prefix: Tensor, chains: Tensor, scale: float
) -> Tensor:
    """By definition, a row at a time."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for row in range(len(q)):
        seen = torch.cat((tables[sequence[row], : prefix[row]], chains[row][chains[row] >= 0]))
        keys, values = kv[:, seen].double().repeat_interleave(q.shape[1] // kv.shape[2], 2)
        weights = torch.softmax(torch.einsum("hd,thd->ht", q[row].double(), keys) * scale, -1)
        out[row] = torch.einsum("ht,thd->hd", weights, values)
    return out


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
