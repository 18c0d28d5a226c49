"""A step of a session on a GPU that starts ranks, in small on CPU cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ops.gpu.result import Result

pytestmark = pytest.mark.process


def test_a_large_target_beside_its_draft_is_measured_in_every_mode_and_traced(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "ops.gpu.large_target", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Result.from_json(out.read_text()).findings
    whats = ["ar", "sd", "ssd", "the same tokens in every mode", "verifications alone and beside a busy draft"]
    assert [finding.what for finding in found] == whats
    assert (tmp_path / "large_target.trace.json").exists()


@pytest.mark.parametrize("step", ["nccl_link", "nccl_target"])
def test_what_stands_in_for_nccl_on_a_cpu_passes_the_steps_that_show_nccl_on_a_gpu(step: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", f"ops.gpu.{step}", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{step}: OK")
