"""Fan-out policies by name. Knows which there are, and nothing else."""

from __future__ import annotations

from typing import Literal

from ssd_runtime.speculation.drafting.confidence import ConfidenceFanOut
from ssd_runtime.speculation.drafting.counts import GeometricFanOut, UniformFanOut
from ssd_runtime.speculation.drafting.fan_out import FanOut

FanOutName = Literal["uniform", "geometric", "confidence"]
POLICIES: dict[FanOutName, type[FanOut]] = {
    "uniform": UniformFanOut,
    "geometric": GeometricFanOut,
    "confidence": ConfidenceFanOut,
}


def fan_out_policy(name: FanOutName) -> FanOut:
    """A new policy of that name."""
    return POLICIES[name]()
