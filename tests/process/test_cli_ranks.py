"""The command line over real ranks: it answers, ends cleanly, and whatever is killed, nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.process, pytest.mark.model, pytest.mark.usefixtures("smollm2_path")]

ROOT = Path(__file__).parents[2]
SSD = [sys.executable, "-c", "import sys; from launcher.cli import main; sys.exit(main())"]
READY_S = 120.0


@dataclass
class Up:
    """An `ssd up` that is ready."""

    process: subprocess.Popen[str]
    address: str
    members: list[psutil.Process]

    def rank(self, rank: int) -> int:
        """The pid of a rank."""
        for member in self.members:
            if member.environ().get("RANK") == str(rank):
                return member.pid
        raise AssertionError(f"no rank {rank}")

    def gone(self) -> bool:
        return not any(lives(member) for member in self.members)


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str) -> Up:
        log = tmp_path / f"up{len(started)}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*SSD, "up", *arguments], cwd=ROOT, stdout=out, stderr=out, text=True, env=_environment(tmp_path)
            )
        eventually(lambda: "address: " in log.read_text() or process.poll() is not None, READY_S)
        assert process.poll() is None, log.read_text()
        address = log.read_text().partition("address: ")[2].split()[0]
        ssd = psutil.Process(process.pid)
        started.append(Up(process, address, [ssd, *ssd.children(recursive=True)]))
        return started[-1]

    yield start
    for engine in started:
        engine.process.kill()
        engine.process.wait(10)
        eventually(engine.gone, 20)


def _environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(tmp_path)}


def ssd(*arguments: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SSD, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=150, env=_environment(tmp_path)
    )


def eventually(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def test_generate_answers_traces_both_roles_and_leaves_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = ssd("generate", "-p", "Hi", "--max-tokens", "12", "--json", "--trace", str(trace), tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["usage"]["completion_tokens"] <= 12
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(rows.values()) == ["draft rank 1", "target rank 0"]
    assert {rows[event["pid"]] for event in events if event["ph"] == "X"} == set(rows.values())
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_two_engines_on_one_host_answer_alike_and_end_cleanly(up: Callable[..., Up], tmp_path: Path) -> None:
    engines = [up(), up("--set", "speculation.mode=ar", "--set", "engine.max_model_len=64")]
    assert engines[0].address != engines[1].address
    answers = []
    for engine in engines:
        done = ssd(
            "generate", "--connect", engine.address, "-p", "Name a colour.", "--max-tokens", "8", tmp_path=tmp_path
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1]
    refused = ssd("generate", "--connect", engines[1].address, "-p", "word " * 100, tmp_path=tmp_path)
    assert refused.returncode == 2
    (line,) = filter(None, refused.stderr.splitlines())
    assert line.startswith("ssd: error: ")
    assert "64" in line
    for engine, signum in zip(engines, (signal.SIGTERM, signal.SIGINT), strict=True):
        engine.process.send_signal(signum)
        assert engine.process.wait(30) == 0
        assert engine.gone()


def test_ranks_do_not_outlive_a_launcher_that_was_killed(up: Callable[..., Up]) -> None:
    engine = up()
    engine.process.kill()
    engine.process.wait(10)
    eventually(engine.gone, 20)


def test_a_killed_target_ends_the_engine_with_one_line(up: Callable[..., Up], tmp_path: Path) -> None:
    engine = up()
    os.kill(engine.rank(0), signal.SIGKILL)
    assert engine.process.wait(40) == 1
    eventually(engine.gone, 5)
    last = (tmp_path / "up0.log").read_text().splitlines()[-1]
    assert last.startswith("ssd: error: ")
    assert "ranks.log" in last
