"""copy_branch_ and the sampler: many calls in one graph, over memory that no cache holds, beside a plain copy."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch

from ops.bench import kv
from ops.gpu.result import Finding, Number, Setting, left_out, run_step
from ops.gpu.timing import device_of

TURNS = 15


def find(setting: Setting) -> Iterator[Finding]:
    device = device_of(setting)
    for speed in _few(device) if setting.small else kv.measure(device, TURNS):
        numbers = (
            Number("plain torch", median(speed.times.plain) * 1e3, "ms"),
            Number("ours", median(speed.times.own) * 1e3, "ms"),
            Number("rate", speed.bytes_per_s / 1e9, "GB/s"),
            Number("of a copy's speed", speed.share_of_copy),
        )
        yield Finding(speed.what, numbers)
    if device.type == "cpu":
        yield left_out("calls captured in one graph", "a CPU has no graphs; the calls were made one by one")


def _few(device: torch.device) -> Iterator[kv.Speed]:
    yield kv.copy_speed(device, torch.bfloat16, *kv.SHAPES[0], 1)
    yield kv.sample_speed(device, kv.DRAWS[0], 1)


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
