"""The benchmark of a slow wire, with tiny models: that it runs, and that the tokens do not feel the delay."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.process.conftest import Start

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("relay")]


def test_a_delay_changes_no_token_in_any_mode(run: Start, config: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["--delay-ms", "5", "--limit", "1", "--repeat", "1", "--max-tokens", "40", "--json", str(report)]
    done = run(sys.executable, "-m", "ops.bench.delay", "--config", str(config), *arguments)
    assert done.exit_code(120) == 0, done.err
    found = json.loads(report.read_text())
    assert found["identical"] is True
    assert [row["mode"] for row in found["runs"]] == ["ar", "sd", "ssd"]
    plain, late = (found["runs"][1][name] for name in ("plain", "late"))
    assert late["round_ms"]["p50"] > 10  # a round of SD asks the draft: both ways are in it
    assert plain["tokens"] == late["tokens"] == 40
    done.assert_nothing_is_left()
