"""A trace of both roles on one clock, in the Chrome trace format that Perfetto reads.

Owns the events of one process and the file they end in. Knows nothing of what the events mean.
All times are time.monotonic_ns: on Linux every process of a host reads the same clock.
Format: "Trace Event Format", complete events (ph X) with ts and dur in microseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ssd_runtime.errors import InputOutputError

Event = tuple[str, int, int, str, dict[str, Any] | None]  # name, start_ns, end_ns, thread, arguments


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
        self.events: list[Event] = []

    def complete(
        self, name: str, start_ns: int, end_ns: int, thread: str = "main", arguments: dict[str, Any] | None = None
    ) -> None:
        """Record that `name` lasted from `start_ns` to `end_ns` (time.monotonic_ns)."""
        if self.enabled:
            self.events.append((name, start_ns, end_ns, thread, arguments))

    @contextlib.contextmanager
    def span(self, name: str, thread: str = "main", **arguments: Any) -> Iterator[None]:
        """Record the duration of a `with` block, also when it raises."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.complete(name, start, time.monotonic_ns(), thread, arguments or None)

    def to_events(self) -> list[dict[str, Any]]:
        """The events as the trace format has them, led by the names of the process and its threads."""
        threads: dict[str, int] = {}
        spans = []
        for name, start, end, thread, arguments in self.events:
            tid = threads.setdefault(thread, len(threads) + 1)
            span = {"name": name, "ph": "X", "pid": self.pid, "tid": tid, "ts": start / 1e3, "dur": (end - start) / 1e3}
            spans.append({**span, "args": arguments} if arguments else span)
        names = [_metadata(self.pid, 0, "process_name", name=self.process)]
        names.append(_metadata(self.pid, 0, "process_sort_index", sort_index=self.sort_index))
        names += [_metadata(self.pid, tid, "thread_name", name=thread) for thread, tid in threads.items()]
        return names + spans

    def write(self, path: str | Path) -> None:
        """Write this process's own trace file."""
        write_events(path, self.to_events())


def write_events(path: str | Path, events: Sequence[dict[str, Any]]) -> None:
    """Write a trace file so that nobody ever sees half of it; raises InputOutputError if it cannot be written."""
    path = Path(path)
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
            part = Path(file.name)
        try:
            with part.open("w") as file:
                json.dump({"traceEvents": list(events), "displayTimeUnit": "ms"}, file)
            part.chmod(0o644)
            part.replace(path)
        except BaseException:
            part.unlink()
            raise
    except OSError as error:
        raise InputOutputError(f"cannot write trace {path}: {error.strerror}") from None


def part_path(path: str | Path, rank: int) -> Path:
    """Where rank `rank` leaves its part of the trace `path`."""
    return Path(f"{path}.rank{rank}")


def part_paths(path: str | Path, num_ranks: int) -> list[Path]:
    """The parts of all ranks."""
    return [part_path(path, rank) for rank in range(num_ranks)]


def merge_parts(path: str | Path, parts: Sequence[str | Path]) -> int:
    """Join the parts of several processes into `path`, the earliest event at 0, and remove them.

    Returns:
        The number of events (names of rows not counted). Parts that do not exist are left out.

    Raises:
        InputOutputError: the whole cannot be written; the parts stay.
    """
    present = [Path(part) for part in parts if Path(part).exists()]
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


def _metadata(pid: int, tid: int, kind: str, **arguments: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": arguments}
