"""Fan-out policies by name. Knows which there are, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ssd_runtime.speculation.drafting.confidence import ConfidenceFanOut
from ssd_runtime.speculation.drafting.counts import CountedFanOut, GeometricGains, ListedGains, UniformGains
from ssd_runtime.speculation.drafting.fan_out import FanOut

FanOutName = Literal["uniform", "geometric", "confidence", "list"]


def fan_out_policy(name: FanOutName, counts: Sequence[int] = ()) -> FanOut:
    """A new policy of that name.

    Args:
        counts: F_0..F_K, for `list` only.
    """
    if name == "confidence":
        return ConfidenceFanOut()
    if name == "list":
        return CountedFanOut(ListedGains(counts))
    return CountedFanOut(UniformGains() if name == "uniform" else GeometricGains())
