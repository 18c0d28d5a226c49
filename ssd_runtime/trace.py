"""A trace of both roles on one clock, in the Chrome trace format that Perfetto reads.

Owns the events of one process and the file they end in. Knows nothing of what the events mean.
All times are time.monotonic_ns: on Linux every process of a host reads the same clock.
Format: "Trace Event Format", complete events (ph X) with ts and dur in microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd_runtime.errors import InputOutputError


class Tracer:
    """Collects the events of one process. When off, recording costs one comparison.

    Args:
        process: the row's title, as "target rank 0".
        enabled: whether anything is kept.
        sort_index: rows are shown in this order.
    """

    def __init__(self, process: str, *, enabled: bool = True, sort_index: int = 0) -> None:
        self.process, self.enabled, self.sort_index = process, enabled, sort_index
        self.pid = os.getpid()
        self.events: list[dict[str, Any]] = []

    def complete(self, name: str, start_ns: int, end_ns: int, arguments: dict[str, Any] | None = None) -> None:
        """Record that `name` lasted from `start_ns` to `end_ns` (time.monotonic_ns)."""
        if self.enabled:
            lasted = {"ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3}
            self.events.append({"name": name, "ph": "X", "pid": self.pid, "tid": 1, **lasted, "args": arguments or {}})

    def write(self, path: Path) -> None:
        """Write this process's own trace file, led by the names of the process and its thread."""
        names = {
            "process_name": {"name": self.process},
            "process_sort_index": {"sort_index": self.sort_index},
            "thread_name": {"name": "main"},
        }
        led = [{"name": kind, "ph": "M", "pid": self.pid, "tid": 1, "args": args} for kind, args in names.items()]
        write_events(path, [*led, *self.events])


def write_events(path: Path, events: Sequence[dict[str, Any]]) -> None:
    """Write a trace file so that nobody ever sees half of it; raises InputOutputError if it cannot be written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("x") as file:
                json.dump({"traceEvents": list(events), "displayTimeUnit": "ms"}, file)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputOutputError(f"cannot write trace {path}: {error.strerror}") from None


def part_path(path: Path, rank: int) -> Path:
    """Where rank `rank` leaves its part of the trace `path`."""
    return Path(f"{path}.rank{rank}")


def part_paths(path: Path, num_ranks: int) -> list[Path]:
    """The parts of all ranks."""
    return [part_path(path, rank) for rank in range(num_ranks)]


def merge_parts(path: Path, parts: Sequence[Path]) -> int:
    """Join the parts of several processes into `path`, the earliest event at 0, and remove them.

    Returns:
        The number of events (names of rows not counted). Parts that do not exist are left out.

    Raises:
        InputOutputError: the whole cannot be written; the parts stay.
    """
    present = [part for part in parts if part.exists()]
    events = [event for part in present for event in json.loads(part.read_text())["traceEvents"]]
    spans = [event for event in events if event["ph"] == "X"]
    origin = min((event["ts"] for event in spans), default=0.0)
    for event in spans:
        event["ts"] = round(event["ts"] - origin, 3)
        event["dur"] = round(event["dur"], 3)
    write_events(path, events)
    for part in present:
        part.unlink()
    return len(spans)
