"""How fast rows move and tokens are sampled: the compiled operators against plain torch and against a plain copy.

Prints, in one run: copy_branch_ at K = 7, 24 layers, 32 sequences and sample_shared_noise over 152k logits x 8 rows,
each beside its oracle in plain torch, and the bytes moved over time as a share of what a copy of that many bytes
reaches on the same device. Times are the best of a few runs.

    python ops/bench/kv.py [--device cpu|cuda] [--threads 1] [--heads 2] [--head-dim 128]
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cuda_ext import reference

LOOKAHEAD, LAYERS, SEQUENCES, SLOTS = 7, 24, 32, 4096
VOCABULARY, ROWS = 152_064, 8


def best_seconds(run: Callable[[], object], device: torch.device, runs: int = 15) -> float:
    """The shortest of `runs` runs, after two to warm up."""
    best = float("inf")
    for attempt in range(runs + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt >= 2:
            best = min(best, time.perf_counter() - start)
    return best


def copy_rate(num_bytes: int, device: torch.device) -> float:
    """Bytes read and written a second by a plain copy of `num_bytes`."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device)


def bench_copy(compiled, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> None:
    """One round's hits: K rows of each sequence move, in every layer."""
    kv = torch.randn(LAYERS, 2, SLOTS, heads, head_dim, device=device).to(dtype)
    order = torch.randperm(SLOTS, device=device)
    num_rows = LOOKAHEAD * SEQUENCES
    source, target = order[:num_rows].clone(), order[num_rows : 2 * num_rows].clone()
    num_bytes = 2 * LAYERS * num_rows * heads * head_dim * kv.element_size()
    plain = best_seconds(lambda: reference.copy_branch_(kv, source, target), device)
    own = best_seconds(lambda: compiled.copy_branch_(kv, source, target), device)
    rate, limit = 2 * num_bytes / own, copy_rate(num_bytes, device)
    name = str(dtype).removeprefix("torch.")
    print(
        f"copy_branch_ {name:8} {num_rows} rows x {LAYERS} layers x {heads} heads of {head_dim},"
        f" {num_bytes / 1e6:.1f} MB: plain {plain * 1e3:.2f} ms, compiled {own * 1e3:.2f} ms, {plain / own:.1f}x;"
        f" {rate / 1e9:.1f} GB/s, {rate / limit:.0%} of a copy's {limit / 1e9:.1f} GB/s"
    )


def bench_sample(compiled, device: torch.device, top_k: int, top_p: float, temperature: float) -> None:
    """One forward's rows: every logit is read once at least."""
    logits = torch.randn(ROWS, VOCABULARY, device=device) * 3
    ones = torch.ones(ROWS, dtype=torch.float64, device=device)
    ids: Tensor = torch.arange(ROWS, device=device)
    arguments = (logits, ones * temperature, ids * 0 + top_k, ones * top_p, ones * 0, ids, ids, 1)
    assert torch.equal(compiled.sample_shared_noise(*arguments)[0], reference.sample_shared_noise(*arguments)[0])
    plain = best_seconds(lambda: reference.sample_shared_noise(*arguments), device, runs=5)
    own = best_seconds(lambda: compiled.sample_shared_noise(*arguments), device)
    num_bytes = logits.numel() * logits.element_size()
    limit = copy_rate(num_bytes, device) / 2  # a copy reads half of what it moves
    print(
        f"sample_shared_noise T={temperature} top_k={top_k} top_p={top_p}, {ROWS} x {VOCABULARY} logits: plain"
        f" {plain * 1e3:.1f} ms, compiled {own * 1e3:.2f} ms, {plain / own:.0f}x;"
        f" reads {num_bytes / own / 1e9:.1f} GB/s, {num_bytes / own / limit:.0%} of the rate a copy reads at"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2, help="key-value heads of a layer")
    parser.add_argument("--head-dim", type=int, default=64)
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
    for dtype in (torch.bfloat16, torch.float32):
        bench_copy(compiled, device, dtype, options.heads, options.head_dim)
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (0.7, 20, 0.9), (0.0, 0, 1.0)):
        bench_sample(compiled, device, top_k, top_p, temperature)
    return 0


if __name__ == "__main__":
    sys.exit(main())
