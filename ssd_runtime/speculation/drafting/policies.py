"""Fan-out policies by name. Knows which there are, and nothing else."""

from __future__ import annotations

from typing import Literal

from ssd_runtime.speculation.drafting.confidence import ConfidenceFanOut
from ssd_runtime.speculation.drafting.counts import CountedFanOut, GeometricGains, UniformGains
from ssd_runtime.speculation.drafting.fan_out import FanOut

FanOutName = Literal["uniform", "geometric", "confidence"]


def fan_out_policy(name: FanOutName) -> FanOut:
    """A new policy of that name."""
    if name == "confidence":
        return ConfidenceFanOut()
    return CountedFanOut(UniformGains() if name == "uniform" else GeometricGains())
