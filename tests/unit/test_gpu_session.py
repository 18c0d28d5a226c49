"""The scripts of a session on a GPU: their steps in small, what they write and carry, the page that comes of it."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict

from launcher.bench.plan import plan_runs
from launcher.bench.report import Machine as BenchMachine
from launcher.bench.report import Report, Task
from ops.gpu import bench, carry, counters, device_tests, large_target, report, result
from ops.gpu.result import Finding, Machine, Number, Result, Setting, judged, left_out
from ssd_runtime.config import load_config
from ssd_runtime.speculation.types import SamplingParams
from tests.unit.test_bench import Player, measured

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ops" / "gpu"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
STEPS = sorted(
    {name for script in SCRIPTS for name in re.findall(r"^step \d+ (\w+)", script.read_text(), re.MULTILINE)}
)
ENGINES = {"cpu_draft", "shared_gpu", "large_target", "nccl_link", "nccl_target"}  # start ranks: tests/process
ELSEWHERE = {"build": "a compiler at work for a minute", "device_tests": "pytest in pytest"}

# A step that is imported above is run here as the program that it is, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")


def run(step: str, *arguments: str) -> int:
    """Run a step in this process; returns its exit code."""
    before, sys.argv = sys.argv, [step, *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"ops.gpu.{step}", run_name="__main__")
    finally:
        sys.argv = before
    return int(ended.value.code or 0)


# ---- steps and scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_both_scripts_have_the_steps_that_are_tested_here() -> None:
    assert len(STEPS) >= 12
    assert set(STEPS) >= ENGINES | ELSEWHERE.keys()


@pytest.mark.parametrize("step", STEPS)
def test_a_step_says_what_it_does_and_how_it_is_run(step: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(step, "--help") == 0
    said = capsys.readouterr().out
    assert f"python -m ops.gpu.{step}" in said
    assert "--small" in said


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ENGINES | ELSEWHERE.keys()])
def test_a_step_runs_in_small_on_a_cpu(step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert run(step, "--device", "cpu", "--small", "--model", "random:tiny", "--out", str(out)) == 0, out.read_text()
    found = Result.from_json(out.read_text())
    assert found.step == step
    assert found.small
    assert found.findings
    assert len(capsys.readouterr().out.splitlines()) == 1, "a step prints one line"


STUB = """#!/usr/bin/env bash
# Stands for Python: "-m ops.gpu.STEP ... --out FILE" writes a line and ends as the name of the step says.
step=${2#ops.gpu.}
while [ "$1" != --out ]; do shift; done
echo "{\\"step\\": \\"$step\\"}" >"$2"
case $step in slow) sleep 30 ;; broken) echo "broken: FAIL" && exit 1 ;; *) echo "$step: OK" ;; esac
"""


def session(folder: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    """A script of such steps, in the environment of a rehearsal."""
    stub, script = folder / "python", folder / "trial.sh"
    stub.write_text(STUB)
    stub.chmod(0o755)
    script.write_text("\n".join([f". {FOLDER}/steps.sh", "PATIENCE=1", "begin trial 20", *steps, "table"]))
    environment = {**os.environ, "PYTHON": str(stub), "OUT": str(folder / "out"), "REHEARSE": "1"}
    environment |= {"CARRY": str(folder / "carry"), "CARRIED": str(folder / "carried")}
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)


def test_a_step_that_fails_or_takes_too_long_is_a_line_in_the_table_and_ends_nothing(tmp_path: Path) -> None:
    done = session(tmp_path, "step 20 good", "step 1 slow", "step 20 broken", "step 20 last &")
    table = (tmp_path / "out" / "trial.txt").read_text()
    states = dict(line.split()[:2] for line in table.splitlines()[1:])
    assert states == {"good": "OK", "slow": "FAIL", "broken": "FAIL", "last": "OK"}
    assert "stopped after 1 s" in table
    assert table in done.stdout
    assert done.returncode == 1
    results = [json.loads(line) for line in (tmp_path / "out" / "trial.jsonl").read_text().splitlines()]
    assert {one["step"] for one in results} == states.keys(), "what a step had found when it was stopped is kept"


def test_a_session_in_which_all_is_well_says_so(tmp_path: Path) -> None:
    assert session(tmp_path, "step 20 good").returncode == 0


def test_a_step_that_the_script_has_no_time_for_is_not_begun(tmp_path: Path) -> None:
    done = session(tmp_path, "LIMIT=0", "step 20 good")
    assert "NO TIME" in done.stdout
    assert done.returncode == 1


# ---- results


def machine() -> Machine:
    return Machine("Card", "580.1", "2.11.0", "3.6.0", "3.12.3", 16)


def whole(*findings: Finding, **changes: object) -> Result:
    made = Result("step", "Title.", machine(), "2026-01-02T03:04:05+00:00", False, 1.0, findings, ("label",), "")
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_result_comes_back_from_its_json() -> None:
    numbers = Number("a", 1.5, "ms"), Number("b", "word"), Number("c", 3)
    made = whole(Finding("one", numbers, note="é"), judged("two", False), left_out("three", "no GPU"))
    assert Result.from_json(made.to_json()) == made
    assert "\n" not in made.to_json()


def test_a_step_that_breaks_leaves_what_it_had_found_and_says_how(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "result.json"

    def find(setting: Setting) -> Iterator[Finding]:
        yield Finding("first")
        assert Result.from_json(out.read_text()).failure == result.UNFINISHED, "written with every finding"
        assert Result.from_json(out.read_text()).findings == (Finding("first"),)
        raise ValueError("no more")

    monkeypatch.setattr(sys, "argv", ["step", "--device", "cpu", "--out", str(out)])
    assert result.run_step("step.py", "Title.", find) == 1
    left = Result.from_json(out.read_text())
    assert (left.findings, left.failure) == ((Finding("first"),), "ValueError: no more")
    assert capsys.readouterr().out == f"step: FAIL, 1 findings, {left.seconds:.1f} s; ValueError: no more\n"


def test_one_finding_that_failed_fails_its_step() -> None:
    assert whole(judged("well", True), left_out("later", "no GPU")).ok
    assert not whole(judged("well", True), judged("wrong", False)).ok
    assert not whole(failure=result.UNFINISHED).ok


# ---- what is carried


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=5), room=st.integers(200, 4000), order=st.randoms())
def test_files_come_out_as_they_went_in_and_no_part_is_above_the_limit(tmp_path_factory, sizes, room, order) -> None:
    folder = tmp_path_factory.mktemp("carry")
    files = {}
    for index, size in enumerate(sizes):
        files[f"in/{index}"] = folder / f"file-{index}"
        files[f"in/{index}"].write_bytes(os.urandom(size))
    with mock.patch.object(carry, "MANIFEST_BYTES", 3000):  # so that it counts beside files of this size
        limit = room + carry.MANIFEST_BYTES
        parts = carry.pack(files, folder / "parts", limit)
    assert all(sum(path.stat().st_size for path in part.iterdir()) <= limit for part in parts)
    order.shuffle(parts)
    for part in parts:
        carry.unpack(folder / "out", [part])
    assert carry.unpack(folder / "out", parts) == []
    assert {name: (folder / "out" / name).read_bytes() for name in files} == {
        name: path.read_bytes() for name, path in files.items()
    }


def test_a_file_in_several_parts_is_there_with_the_last_of_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1000))
    first, second = carry.pack({"file": tmp_path / "file"}, tmp_path / "parts", 600 + carry.MANIFEST_BYTES)
    assert carry.unpack(tmp_path / "out", [second]) == ["file"]
    assert not (tmp_path / "out" / "file").exists()
    assert carry.unpack(tmp_path / "out", [first]) == []
    assert (tmp_path / "out" / "file").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_damaged_piece_is_refused_and_nothing_of_it_is_kept(tmp_path: Path, capsys) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    first, *_ = carry.pack({"file": file}, tmp_path / "parts", 600 + carry.MANIFEST_BYTES)
    (first / "piece-0").write_bytes(bytes(599) + b"x")
    assert carry.main(["unpack", str(tmp_path / "out"), *map(str, sorted((tmp_path / "parts").iterdir()))]) == 1
    assert "piece-0 arrived damaged" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*"))


def test_a_file_that_has_changed_since_is_replaced(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        (tmp_path / "file").write_bytes(content)
        parts = carry.pack({"file": tmp_path / "file"}, tmp_path / "parts", 1 << 20)
        assert carry.unpack(tmp_path / "out", parts) == []
        assert (tmp_path / "out" / "file").read_bytes() == content


# ---- what steps make of what others say


def test_tests_of_the_gpu_may_skip_only_without_one_and_the_others_never_all() -> None:
    passed, skipped = '<testcase name="a"/>', '<testcase name="b"><skipped message="no GPU"/></testcase>'
    failed = '<testcase name="c"><failure message="1 != 2"/></testcase>'

    def status(cases: str, suite: str = device_tests.ON_GPU, on_gpu: bool = False) -> str:
        tree = ElementTree.fromstring(f"<testsuite>{cases}</testsuite>")
        return device_tests.read_report(suite, tree, on_gpu).status

    assert status(skipped) == "needs a GPU"
    assert status(passed, on_gpu=True) == "ok"
    assert [status(cases, on_gpu=True) for cases in ("", skipped, passed + skipped, failed)] == ["failed"] * 4
    assert [status(cases, "other") for cases in (passed + skipped, skipped, "")] == ["ok", "failed", "failed"]


def test_kernels_are_read_from_the_raw_page_of_ncu() -> None:
    names = ["ID", "Kernel Name", *counters.METRICS]
    units = ["", "", "ns", "byte", "byte", "%", "%", "register/thread"]
    rows = [names, units, ["0", "void copy_branch_kernel<4>(int)", "12,500", "2000000", "0", "81.5", "50", "40"]]
    text = ["==PROF== Connected", *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    (finding,) = counters.kernels(text)
    assert finding.what == "void copy_branch_kernel<4>"
    assert [number.value for number in finding.numbers] == [12.5, 2.0, 0.0, 81.5, 50.0, 40.0]


def test_verifications_are_told_apart_by_what_the_draft_did_meanwhile() -> None:
    def event(name: str, start: float, end: float, speculated: int = 5) -> dict[str, object]:
        return {"name": name, "ts": start, "dur": end - start, "args": {"speculated": [speculated]}}

    events = [event("verify", 0, 2000), event("verify", 3000, 6000), event("verify", 7000, 7500, speculated=0)]
    events += [event("draft step", 2100, 2900), event("draft step", 3000, 5000)]
    numbers = {number.name: number.value for number in large_target.verifications(events).numbers}
    assert numbers == {"draft steps": 2, "alone": 1, "beside": 1, "alone, median": 2.0, "beside, median": 3.0}
    assert large_target.verifications(events[:3]).status == "failed", "no draft in the trace"


@pytest.mark.parametrize(
    ("device", "numerics", "label", "status"),
    [
        ("cpu", "fast", False, "failed"),
        ("cuda", "invariant", False, "failed"),
        ("cuda", "fast", True, "failed"),
        ("cuda", "fast", False, "ok"),
    ],
)
def test_tokens_that_differ_are_wrong_where_equal_ones_are_promised(device, numerics, label, status) -> None:
    said = "scripted" if label else None
    made = Report(
        **asdict(measured(Player(broken="ssd"), plan_runs(["ar", "ssd"], [], 4))) | {"label": said},
        machine=BenchMachine("host", (), "system", "3", "2", "plain", "2026-01-02", {}),
        workload=Task("embedded", 2, 13, 1, SamplingParams(), load_config(None, [f"engine.numerics={numerics}"])),
    )
    written = msgspec.json.decode(msgspec.json.encode(made), type=Report)
    assert written == made
    first, _, same = bench.findings(written, device)
    assert (first.numbers[0], first.numbers[3].value) == (Number("tokens/s", 100.0), "")
    assert same.status == status


# ---- the page


def test_the_page_of_a_session_says_where_it_was_what_failed_and_what_must_be_known(tmp_path: Path) -> None:
    timed = [Finding(f"M = {rows}", (Number("rows", rows), Number("forward", 16.2 + rows, "ms"))) for rows in (1, 7)]
    first = whole(*timed, judged("bits", False, note="a|b"), step="forwards", date="2026-01-02T03:00:00+00:00")
    later = whole(Finding("one"), step="shared_gpu", labels=("A lower bound.",), failure=result.UNFINISHED)
    (tmp_path / "second.jsonl").write_text(later.to_json() + "\n")
    (tmp_path / "first.jsonl").write_text(first.to_json() + "\n")
    page = report.page(report.read([tmp_path / "second.jsonl", tmp_path / "first.jsonl"]))
    assert page.startswith(
        "# Card, 2026-01-02\n\nCard, driver 580.1, torch 2.11.0, Triton 3.6.0, Python 3.12.3, 16 CPU cores."
    )
    assert report.REHEARSED not in page
    overview = [
        "| forwards | FAIL | 1.0 | 3 |  | bits |",
        "| shared_gpu | FAIL | 1.0 | 1 |  | stopped before its end |",
    ]
    assert "\n".join(overview) in page, "in the order in which they ran"
    assert "|  | rows | forward, ms |\n| --- | --: | --: |\n| M = 1 | 1 | 17.2 |\n| M = 7 | 7 | 23.2 |" in page
    assert "| bits | **FAILED** | a/b |" in page
    assert "## shared_gpu: Title\n\nA lower bound." in page
    assert "It did not reach its end: stopped before its end" in page


def test_the_page_of_a_rehearsal_says_that_its_numbers_mean_nothing() -> None:
    cpu = replace(machine(), card="none", driver="none")
    page = report.page([whole(Finding("one", (Number("a", 1.0, "ms"),)), machine=cpu, small=True)])
    assert page.startswith("# CPU, 2026-01-02")
    assert report.REHEARSED in page


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(whole().to_json() + "\n{}\n")
    with pytest.raises(ValueError, match="file, line 2: not a result"):
        report.read([tmp_path / "file"])
