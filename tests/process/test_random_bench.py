"""`ssd bench --random` over real ranks: models without files, compared, and labelled as what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.process.conftest import Start
from tests.process.runs import SSD

pytestmark = pytest.mark.process


def test_a_benchmark_of_random_weights_needs_no_file_and_says_what_it_is(run: Start, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    sizes = ("--limit", "1", "--max-tokens", "120", "--set", "speculation.adapt=false")
    bench = run(*SSD, "bench", "--random", "tiny", "--agreement", "0.6", *sizes, "--json", str(out))
    assert bench.exit_code(60.0) == 0, bench.err
    label = "scripted text, random weights: target random:tiny, draft random:tiny@0.6"
    assert bench.out.splitlines()[0] == label
    report = json.loads(out.read_text())
    assert report["label"] == label
    assert report["identical_tokens"] is True
    assert report["workload"]["config"]["draft"]["model"] == "random:tiny@0.6"
    rows = {row["mode"]: row for row in report["runs"]}
    assert [rows[mode]["tokens"] for mode in ("ar", "sd", "ssd")] == [120] * 3
    first = rows["sd"]["accepted_per_position"][0] / rows["sd"]["rounds"]  # rounds whose first draft token was accepted
    assert first == pytest.approx(0.6, abs=0.15)
