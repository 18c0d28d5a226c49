"""What the hardware counts of four kernels, read by Nsight Compute (ncu): time, bytes, occupancy, registers.

The program that is profiled is `work` in a process of its own. On a CPU it runs without a profiler.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cuda_ext import ops
from ops.gpu.result import Finding, Number, Setting, judged, left_out, run_step

METRICS = {  # of ncu: name, unit, and what one of it is in that unit
    "gpu__time_duration.sum": ("time", "us", 1e-3),
    "dram__bytes_read.sum": ("read", "MB", 1e-6),
    "dram__bytes_write.sum": ("written", "MB", 1e-6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("of memory's rate", "%", 1.0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("warps active", "%", 1.0),
    "launch__registers_per_thread": ("registers", "", 1.0),
}
NCU = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw")
NCU += ("--print-units", "base", "--metrics", ",".join(METRICS))


@dataclass(frozen=True)
class Shape:
    layers: int
    slots: int
    heads: int
    head_dim: int
    vocabulary: int
    hidden: int


TINY = Shape(2, 256, 2, 16, 500, 64)
LARGE = Shape(32, 8192, 8, 128, 151936, 4096)  # Llama 8B with Qwen's vocabulary


def work(device_type: str, shape: Shape) -> None:
    """The four, each once with a profiler at it: a move in the cache, sampled rows, a matrix, attention."""
    device = torch.device(device_type)
    kv = torch.randn(shape.layers, 2, shape.slots, shape.heads, shape.head_dim, device=device).bfloat16()
    order = torch.randperm(shape.slots, device=device)
    logits = torch.randn(8, shape.vocabulary, device=device)
    ones, ids = torch.ones(8, dtype=torch.float64, device=device), torch.arange(8, device=device)
    x = torch.randn(7, shape.hidden, device=device).bfloat16()
    weight = torch.randn(4 * shape.hidden, shape.hidden, device=device).bfloat16()
    q = torch.randn(7, 4 * shape.heads, shape.head_dim, device=device).bfloat16()
    prefix = torch.full((7,), shape.slots // 16, device=device)
    none = torch.empty(7, 0, dtype=torch.int64, device=device)
    spans = [ops.Span(7, shape.slots // 16)]

    def all_four() -> None:
        ops.copy_branch_(kv, order[:56].clone(), order[56:112].clone())
        ops.sample_shared_noise(logits, ones, ids * 0, ones, ones * 0, ids, ids, 25)
        torch.nn.functional.linear(x, weight)
        ops.paged_attention(q, kv[0], prefix * 0, order[None], prefix, none, shape.head_dim**-0.5, spans)

    all_four()  # what is done once is not profiled
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    all_four()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def find(setting: Setting) -> Iterator[Finding]:
    shape = "TINY" if setting.small else "LARGE"
    program = [
        sys.executable,
        "-c",
        f"from ops.gpu import counters; counters.work('{setting.device}', counters.{shape})",
    ]
    if setting.device == "cpu":
        done = subprocess.run(program, capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        yield judged("the program, without a profiler", done.returncode == 0)
        yield left_out("hardware counters", "a CPU has no kernels that ncu could profile")
        return
    if shutil.which(NCU[0]) is None:
        raise FileNotFoundError("ncu is not in PATH")
    done = subprocess.run([*NCU, *program], capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    found = list(kernels(done.stdout.splitlines()))
    yield judged("ncu", done.returncode == 0 and found, Number("kernels", len(found)))
    yield from found


def kernels(lines: Sequence[str]) -> Iterator[Finding]:
    """A finding for each kernel in the raw page that ncu prints as CSV: a line of names, one of units, the kernels."""
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        if not row["Kernel Name"]:
            continue  # the line of units
        values = {metric: float(row[metric].replace(",", "")) for metric in METRICS}
        numbers = (Number(name, values[metric] * scale, unit) for metric, (name, unit, scale) in METRICS.items())
        yield Finding(row["Kernel Name"].partition("(")[0][-60:], tuple(numbers))


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
