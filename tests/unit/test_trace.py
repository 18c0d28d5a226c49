"""The trace file: what Perfetto needs is there, parts of several processes join on one clock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_runtime.errors import InputOutputError
from ssd_runtime.trace import Tracer, merge_parts, part_path, part_paths, write_events


def spans(path: Path) -> list[dict]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


def test_an_event_has_microseconds_and_a_named_row(tmp_path: Path) -> None:
    tracer = Tracer("target rank 0", sort_index=1)
    tracer.complete("verify", 5_000_000, 7_500_000, {"round": 3})
    tracer.write(tmp_path / "trace.json")
    (event,) = spans(tmp_path / "trace.json")
    assert (event["ts"], event["dur"], event["args"]) == (5000.0, 2500.0, {"round": 3})
    names = {e["name"]: e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "M"}
    assert names["process_name"]["args"] == {"name": "target rank 0"}
    assert names["process_sort_index"]["args"] == {"sort_index": 1}
    assert names["thread_name"]["args"] == {"name": "main"}
    assert names["thread_name"]["tid"] == event["tid"]


def test_a_tracer_that_is_off_keeps_nothing() -> None:
    tracer = Tracer("target", enabled=False)
    tracer.complete("verify", 0, 1)
    assert tracer.events == []


def test_parts_are_joined_on_one_clock_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    target, draft = Tracer("target"), Tracer("draft")
    draft.pid = target.pid + 1
    target.complete("verify", 2_000_000, 9_000_000)
    draft.complete("grow", 3_000_000, 4_000_000)
    target.write(part_path(path, 0))
    draft.write(part_path(path, 1))
    assert merge_parts(path, part_paths(path, 3)) == 2
    verify, grow = spans(path)
    assert (verify["ts"], grow["ts"]) == (0.0, 1000.0)
    assert verify["pid"] != grow["pid"]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputOutputError, match=r"cannot write trace .*trace\.json: No such file or directory"):
        write_events(tmp_path / "gone" / "trace.json", [])
    code = """
import resource, signal, sys
from pathlib import Path
from ssd_runtime.errors import InputOutputError
from ssd_runtime.trace import write_events
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
write_events(Path(sys.argv[1]), [])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "trace.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "trace.json: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_event_leaves_neither_file_nor_part(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_events(tmp_path / "trace.json", [{"name": object()}])
    assert list(tmp_path.iterdir()) == []
