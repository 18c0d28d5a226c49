"""A target of the shape of Qwen3 32B on the GPU, a draft of 135M in int8 on CPU cores: two real devices.

Random weights, text scripted so that the draft agrees at .85 of the positions. The trace of all modes is kept, and says
what a verification takes alone (in sd the draft waits for it) and beside a draft that is busy (in ssd).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from ops.gpu.bench import bench
from ops.gpu.result import Finding, Number, Setting, judged, run_step

LABEL = (
    "The text is scripted (agreement .85 at each position) and the weights are random: the times of forwards are real, "
    "how often the draft is right is set."
)
TRACE = "large_target.trace.json"
Span = tuple[float, float]


def find(setting: Setting) -> Iterator[Finding]:
    trace = setting.keep / TRACE
    trace.unlink(missing_ok=True)
    target, draft = ("tiny", "tiny") if setting.small else ("qwen-32b", "qwen-135m")
    models = (f"target.model=random:{target}", f"draft.model=random:{draft}@0.85")
    options = ("--modes", "ar,sd,ssd", "--limit", "2", "--max-tokens", "64", "--trace", str(trace))
    yield from bench(setting, "gpu_target_cpu_draft.toml", options, models)
    yield verifications(json.loads(trace.read_text())["traceEvents"])


def verifications(events: Sequence[dict[str, Any]]) -> Finding:
    """Medians of verifications of speculations: those that no draft step met, and those drafted beside for the most
    part."""
    steps = [_span(event) for event in events if event["name"] == "draft step"]
    verified = [_span(event) for event in events if event["name"] == "verify" and any(event["args"]["speculated"])]
    alone, beside = [], []
    for start, end in verified:
        drafting = sum(max(0.0, min(end, last) - max(start, first)) for first, last in steps)
        if drafting == 0.0:
            alone.append(end - start)
        elif drafting > (end - start) / 2:
            beside.append(end - start)
    numbers = [Number("draft steps", len(steps)), Number("alone", len(alone)), Number("beside", len(beside))]
    for name, found in (("alone, median", alone), ("beside, median", beside)):
        numbers += [Number(name, statistics.median(found) / 1e3, "ms")] if found else []
    return judged("verifications alone and beside a busy draft", verified and steps, *numbers, note=f"from {TRACE}")


def _span(event: dict[str, Any]) -> Span:
    """Start and end in microseconds."""
    return event["ts"], event["ts"] + event["dur"]


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find, (LABEL,)))
