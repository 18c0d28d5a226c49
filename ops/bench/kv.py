"""How fast rows move and tokens are sampled: the compiled operators against plain torch and against a plain copy.

Prints, in one run: copy_branch_ at K = 7, 24 layers, 32 sequences and sample_shared_noise over 152k logits x 8 rows,
each beside its oracle in plain torch, and the bytes moved over time as a share of what a copy of that many bytes
reaches on the same device (the roofline of work that only moves or reads). The three take turns, so that whatever else
the machine does meets all of them; times are medians, and the spread of the ratio over the turns is printed too.

    python ops/bench/kv.py [--device cpu|cuda] [--threads 1] [--turns 15]
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cuda_ext import reference

LOOKAHEAD, LAYERS, SEQUENCES, SLOTS = 7, 24, 32, 4096
SHAPES = ((2, 64), (8, 128))  # key-value heads and their size: Qwen2.5-0.5B, Llama-3-8B
VOCABULARY, ROWS = 152_064, 8


@dataclass(frozen=True)
class Times:
    """Seconds of the runs that took turns, one list each."""

    plain: list[float]
    own: list[float]
    copy: list[float]

    def __str__(self) -> str:
        ratios = sorted(plain / own for plain, own in zip(self.plain, self.own, strict=True))
        middle = ratios[len(ratios) // 4 : len(ratios) - len(ratios) // 4]
        return (
            f"plain {median(self.plain) * 1e3:.2f} ms, compiled {median(self.own) * 1e3:.2f} ms,"
            f" {median(ratios):.1f}x ({middle[0]:.1f} to {middle[-1]:.1f} in half of the turns)"
        )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    plain: Callable[[], object], own: Callable[[], object], num_bytes: int, device: torch.device, turns: int
) -> Times:
    """Time both and a copy of `num_bytes`, one after the other, after one turn to warm up."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = (plain, own, lambda: target.copy_(source))
    measured = [[seconds(run, device) for run in runs] for _ in range(turns + 1)][1:]
    return Times(*(list(column) for column in zip(*measured, strict=True)))


def bench_copy(compiled, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, turns: int) -> None:
    """One round's hits: K rows of each sequence move, in every layer."""
    kv = compiled.new_cache((LAYERS, 2, SLOTS, heads, head_dim), dtype, device)
    order = torch.randperm(SLOTS, device=device)
    num_rows = LOOKAHEAD * SEQUENCES
    source, target = order[:num_rows].clone(), order[num_rows : 2 * num_rows].clone()
    num_bytes = 2 * LAYERS * num_rows * heads * head_dim * kv.element_size()
    times = take_turns(
        lambda: reference.copy_branch_(kv, source, target),
        lambda: compiled.copy_branch_(kv, source, target),
        num_bytes,
        device,
        turns,
    )
    name = str(dtype).removeprefix("torch.")
    rate, limit = (2 * num_bytes / median(one) for one in (times.own, times.copy))
    print(
        f"copy_branch_ {name:8} {num_rows} rows x {LAYERS} layers x {heads} heads of {head_dim},"
        f" {num_bytes / 1e6:.1f} MB: {times}; {rate / 1e9:.1f} GB/s, {rate / limit:.0%} of a copy's {limit / 1e9:.1f}"
    )


def bench_sample(compiled, device: torch.device, draw: tuple[float, int, float], turns: int) -> None:
    """One forward's rows: every logit is read once at least."""
    temperature, top_k, top_p = draw
    logits = torch.randn(ROWS, VOCABULARY, device=device) * 3
    ones = torch.ones(ROWS, dtype=torch.float64, device=device)
    ids: Tensor = torch.arange(ROWS, device=device)
    arguments = (logits, ones * temperature, ids * 0 + top_k, ones * top_p, ones * 0, ids, ids, 1)
    assert torch.equal(compiled.sample_shared_noise(*arguments)[0], reference.sample_shared_noise(*arguments)[0])
    num_bytes = logits.numel() * logits.element_size()
    times = take_turns(
        lambda: reference.sample_shared_noise(*arguments),
        lambda: compiled.sample_shared_noise(*arguments),
        num_bytes,
        device,
        turns,
    )
    rate, limit = (num_bytes / median(one) for one in (times.own, times.copy))
    print(
        f"sample_shared_noise T={temperature} top_k={top_k} top_p={top_p}, {ROWS} x {VOCABULARY} logits: {times};"
        f" reads {rate / 1e9:.1f} GB/s, {rate / limit:.0%} of the rate a copy reads at"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    try:
        from cuda_ext import compiled
    except (ImportError, OSError) as error:
        print(f"the extension cannot be loaded ({error}); `make ext` builds it", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        kernels = "CUDA kernels" if compiled.HAS_CUDA_KERNELS else "no CUDA kernels: plain torch against itself"
        where = f"{torch.cuda.get_device_name(device)}, {kernels}"
    else:
        where = f"{platform.machine()}, {compiled.cpu_level()} kernels, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}")
    for heads, head_dim in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            bench_copy(compiled, device, dtype, heads, head_dim, options.turns)
    for draw in ((0.7, 0, 1.0), (0.7, 20, 0.9), (0.0, 0, 1.0)):
        bench_sample(compiled, device, draw, options.turns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
