"""Times of work on a device, and the rates that bound it. Knows no model.

On a CPU the same functions work, with a clock in place of events: what they say there is for a rehearsal only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ops.gpu.result import Setting


def device_of(setting: Setting) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if setting.device == "cuda" else torch.device("cpu")


def median_ms(run: Callable[[], object], device: torch.device, repeats: int = 10, warm_up: int = 3) -> float:
    """Of the repeats, each timed alone, after some that are not counted."""
    for _ in range(warm_up):
        run()
    return statistics.median(_once_ms(run, device) for _ in range(repeats))


def _once_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize(device)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended)


def read_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second that a sum over so many bytes reads: the ceiling of work that reads every weight once."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device).uniform_()
    return num_bytes / median_ms(data.sum, device) * 1e3


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of a copy on the device, those read and those written."""
    source = torch.empty(num_bytes // 8, dtype=torch.float32, device=device).uniform_()
    target = torch.empty_like(source)
    return num_bytes / median_ms(lambda: target.copy_(source), device) * 1e3


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; NaN where either has one, which no bound admits."""
    exact = expected.double()
    return float((out.double() - exact).norm() / exact.norm())
