"""How fast rows move and tokens are sampled: the compiled operators against plain torch and against a plain copy.

Prints, in one run: copy_branch_ at K = 7, 24 layers, 32 sequences and sample_shared_noise over 152k logits x 8 rows,
each beside its oracle in plain torch, and the bytes moved over time as a share of what a copy of that many bytes
reaches on the same device (the roofline of work that only moves or reads). The three take turns, so that whatever else
the machine does meets all of them; times are medians, and the spread of the ratio over the turns is printed too.

On a GPU a turn is many calls between two events, each on memory of its own, several times what the L2 cache holds: one
call is shorter than its launch, and the next would find everything in that cache. Kernels are launched from a graph;
plain torch, which cannot be captured, includes what its launches cost.

    python -m ops.bench.kv [--device cpu|cuda] [--threads 1] [--turns 15]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cuda_ext import compiled, reference

LOOKAHEAD, LAYERS, SEQUENCES, SLOTS = 7, 24, 32, 4096
SHAPES = ((2, 64), (8, 128))  # key-value heads and their size: Qwen2.5-0.5B, Llama-3-8B
VOCABULARY, ROWS = 152_064, 8
DRAWS = ((0.7, 0, 1.0), (0.7, 20, 0.9), (0.0, 0, 1.0))  # temperature, top_k, top_p
LEAST_CALLS, TIMES_L2 = 20, 4  # of a turn on a GPU

Run = Callable[[int], object]  # the i-th call of a turn


@dataclass(frozen=True)
class Times:
    """Seconds of one call, one for each turn; the three took turns."""

    plain: list[float]
    own: list[float]
    copy: list[float]

    def __str__(self) -> str:
        ratios = sorted(plain / own for plain, own in zip(self.plain, self.own, strict=True))
        middle = ratios[len(ratios) // 4 : len(ratios) - len(ratios) // 4]
        return (
            f"plain {median(self.plain) * 1e3:.4g} ms, compiled {median(self.own) * 1e3:.4g} ms,"
            f" {median(ratios):.1f}x ({middle[0]:.1f} to {middle[-1]:.1f} in half of the turns)"
        )


@dataclass(frozen=True)
class Speed:
    """What was measured of one operator in one shape.

    Attributes:
        num_bytes: what a call reads and writes, at least.
    """

    what: str
    num_bytes: int
    times: Times

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / median(self.times.own)

    @property
    def share_of_copy(self) -> float:
        """Of the speed of a plain copy, which reads as many bytes as the operator."""
        return median(self.times.copy) / median(self.times.own)

    def __str__(self) -> str:
        rate = f"{self.bytes_per_s / 1e9:.1f} GB/s, {self.share_of_copy:.0%} of a copy's speed"
        return f"{self.what}: {self.times}; {rate}"


def calls_of_a_turn(num_bytes: int, device: torch.device) -> int:
    """How many calls are timed together, each of which touches so many bytes of its own."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(LEAST_CALLS, -(-TIMES_L2 * cache // num_bytes))


def timer(run: Run, calls: int, device: torch.device, captured: bool) -> Callable[[], float]:
    """What does all calls of a turn and returns the seconds of one; on a GPU replayed from a graph where `captured`."""

    def turn() -> None:
        for i in range(calls):
            run(i)

    if device.type != "cuda":

        def on_the_host() -> float:
            start = time.perf_counter()
            turn()
            return (time.perf_counter() - start) / calls

        return on_the_host
    run(0)  # what is done once, outside of the graph
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            turn()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def between_events() -> float:
        start.record()
        graph.replay() if captured else turn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return between_events


def take_turns(plain: Run, own: Run, num_bytes: int, calls: int, device: torch.device, turns: int) -> Times:
    """Time both and a copy of `num_bytes`, one after the other, after one turn to warm up."""
    source = torch.ones(calls, num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timers = (
        timer(plain, calls, device, captured=False),
        timer(own, calls, device, captured=compiled.HAS_CUDA_KERNELS),
        timer(lambda i: target[i].copy_(source[i]), calls, device, captured=True),
    )
    measured = [[seconds() for seconds in timers] for _ in range(turns + 1)][1:]
    return Times(*(list(column) for column in zip(*measured, strict=True)))


def copy_speed(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, turns: int) -> Speed:
    """One round's hits: K rows of each sequence move, in every layer."""
    num_rows = LOOKAHEAD * SEQUENCES
    num_bytes = 2 * LAYERS * num_rows * heads * head_dim * dtype.itemsize
    calls = calls_of_a_turn(2 * num_bytes, device)
    slots = max(SLOTS, 2 * num_rows * calls)
    kv = compiled.new_cache((LAYERS, 2, slots, heads, head_dim), dtype, device)
    order = torch.randperm(slots, device=device)[: 2 * num_rows * calls]
    moves = [tuple(pair.unbind()) for pair in order.view(calls, 2, num_rows)]
    times = take_turns(
        lambda i: reference.copy_branch_(kv, *moves[i]),
        lambda i: compiled.copy_branch_(kv, *moves[i]),
        num_bytes,
        calls,
        device,
        turns,
    )
    rows = f"{num_rows} rows x {LAYERS} layers x {heads} heads of {head_dim}, {num_bytes / 1e6:.1f} MB"
    return Speed(f"copy_branch_ {str(dtype).removeprefix('torch.'):8} {rows}", 2 * num_bytes, times)


def sample_speed(device: torch.device, draw: tuple[float, int, float], turns: int) -> Speed:
    """One forward's rows: every logit is read once at least."""
    temperature, top_k, top_p = draw
    num_bytes = ROWS * VOCABULARY * torch.float32.itemsize
    calls = calls_of_a_turn(num_bytes, device)
    logits = (torch.randn(calls, ROWS, VOCABULARY, device=device) * 3).unbind()
    ones = torch.ones(ROWS, dtype=torch.float64, device=device)
    ids: Tensor = torch.arange(ROWS, device=device)
    arguments = (ones * temperature, ids * 0 + top_k, ones * top_p, ones * 0, ids, ids, 1)
    one, other = (where.sample_shared_noise(logits[0], *arguments)[0] for where in (compiled, reference))
    assert torch.equal(one, other)
    times = take_turns(
        lambda i: reference.sample_shared_noise(logits[i], *arguments),
        lambda i: compiled.sample_shared_noise(logits[i], *arguments),
        num_bytes,
        calls,
        device,
        turns,
    )
    what = f"sample_shared_noise T={temperature} top_k={top_k} top_p={top_p}, {ROWS} x {VOCABULARY} logits"
    return Speed(what, num_bytes, times)


def measure(device: torch.device, turns: int) -> Iterator[Speed]:
    """All operators in all shapes, one after the other."""
    for heads, head_dim in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            yield copy_speed(device, dtype, heads, head_dim, turns)
    for draw in DRAWS:
        yield sample_speed(device, draw, turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        kernels = "CUDA kernels" if compiled.HAS_CUDA_KERNELS else "no CUDA kernels: plain torch against itself"
        where = f"{torch.cuda.get_device_name(device)}, {kernels}"
    else:
        where = f"{platform.machine()}, {compiled.cpu_level()} kernels, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}")
    for speed in measure(device, options.turns):
        print(speed)


if __name__ == "__main__":
    main()
