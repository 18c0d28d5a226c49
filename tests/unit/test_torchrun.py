"""The ranks of an engine as the launcher sees them, played by one small real process."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher import torchrun
from launcher.nodes import num_ranks
from launcher.torchrun import Launch, Ranks, environment_of_ranks, run_directory
from ssd_runtime.comm.control.launcher_messages import Joined, Progress, Ready
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError, SsdError
from ssd_runtime.host.topology import Group
from tests.process.runs import ROOT, START_S, eventually

PRELUDE = """
import atexit, os, sys, time, zmq
from launcher.ranks.announcer import KEY
from ssd_runtime.comm.control.codec import encode
from ssd_runtime.comm.control.launcher_messages import Joined, Progress, Ready, WorkerFailed
context = zmq.Context()
socket = context.socket(zmq.PUSH)
atexit.register(lambda: (socket.close(), context.term()))  # else what was said just before the end may never leave
socket.connect(sys.argv[1])
key = os.environ[KEY].encode()
say = lambda message: socket.send_multipart((key, encode(message)))
"""


class PlayedRanks(Ranks):
    """Ranks whose command is a script instead of torchrun."""

    script = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", PRELUDE + self.script, self._announcements.address]


@pytest.fixture
def play() -> Iterator:
    made = []

    def start(script: str, *overrides: str, trace: Path | None = None) -> Ranks:
        ranks = PlayedRanks(Launch(load_config(None, ["timeouts.load=20", *overrides]), trace=trace), run_directory())
        ranks.script = script
        made.append(ranks)
        ranks.start()
        return ranks

    yield start
    for ranks in made:
        ranks.stop(0.5)
        shutil.rmtree(ranks.directory, ignore_errors=True)


def test_progress_is_passed_on_until_ready(play) -> None:
    script = """
say(Progress("target", 0, "load", 0.5))
say(Ready("tcp://127.0.0.1:9", {"target": (0,), "draft": (1,)}))
time.sleep(60)
"""
    seen: list[Progress] = []
    ready = play(script).wait_ready(seen.append)
    assert (ready.address, ready.cores) == ("tcp://127.0.0.1:9", {"target": (0,), "draft": (1,)})
    assert seen == [Progress("target", 0, "load", 0.5)]


@pytest.mark.parametrize(("kind", "error"), [("config", ConfigError), ("runtime", SsdError)])
def test_a_ranks_last_words_become_the_error(play, kind: str, error: type[Exception]) -> None:
    ranks = play(f"say(WorkerFailed('draft', 1, {kind!r}, 'no such luck')); sys.exit(1)")
    with pytest.raises(SsdError, match="no such luck") as caught:
        ranks.wait_ready(lambda message: None)
    assert type(caught.value) is error
    ranks.stop(0.5)
    assert ranks.log_path.exists() == (error is SsdError) == ("ranks.log" in str(caught.value))


def test_ranks_that_end_without_a_word_are_reported_with_their_log(play) -> None:
    ranks = play("raise ValueError('out of cheese')")
    with pytest.raises(SsdError, match=r"exit code 1.*ValueError: out of cheese.*ranks.log") as caught:
        ranks.wait_ready(lambda message: None)
    assert "\n" not in str(caught.value)
    ranks.stop(0.5)
    assert "out of cheese" in ranks.log_path.read_text()


@pytest.mark.parametrize(
    ("torchrun_says", "told"),
    [
        ("  rank      : 1 (local_rank: 0)\n  exitcode  : -9 (pid: 7)", "draft rank 1 was killed by signal 9"),
        ("  rank      : 0 (local_rank: 0)\n  exitcode  : 3 (pid: 7)", "target rank 0 left with exit code 3"),
    ],
)
def test_a_rank_that_was_killed_is_named(play, torchrun_says: str, told: str) -> None:
    ranks = play(f"print({torchrun_says!r}); sys.exit(1)")
    with pytest.raises(SsdError, match=f"exit code 1.*{told}; log"):
        ranks.wait_ready(lambda message: None)


def test_ranks_that_never_come_are_not_waited_for(play) -> None:
    ranks = play("time.sleep(60)", "timeouts.load=0.3", "timeouts.handshake=0.2")
    begin = time.monotonic()
    with pytest.raises(SsdError, match="the engine is not ready after"):
        ranks.wait_ready(lambda message: None)
    assert time.monotonic() - begin < 30


def test_stop_leaves_no_process_and_no_directory(play) -> None:
    ranks = play("say(Ready('a', {})); time.sleep(60)")
    ranks.wait_ready(lambda message: None)
    keeper = psutil.Process(ranks._process.pid)
    members = [keeper, *keeper.children(recursive=True)]
    assert len(members) == 2
    ranks.stop(2.0)
    assert not any(member.is_running() for member in members)
    assert not ranks.directory.exists()


def test_an_end_after_a_shutdown_request_is_no_failure(play) -> None:
    ranks = play("say(Ready('a', {}))")
    ranks.wait_ready(lambda message: None)
    assert ranks.wait(START_S)
    ranks.raise_unless_ended_well()


def test_what_ranks_said_before_they_ended_is_heard_first(play) -> None:
    ranks = play("say(Progress('target', 0, 'load', 1.0)); say(Ready('a', {}))")
    assert ranks.wait(START_S)
    seen: list[Progress] = []
    assert ranks.wait_ready(seen.append).address == "a"
    assert len(seen) == 1


def test_what_a_rank_said_last_is_the_error_even_if_all_have_ended(play) -> None:
    ranks = play("say(WorkerFailed('draft', 1, 'config', 'no such luck')); sys.exit(1)")
    assert not ranks.wait(START_S)
    with pytest.raises(ConfigError, match="no such luck"):
        ranks.raise_if_failed()


@pytest.mark.parametrize(("mode", "count"), [("ar", 1), ("sd-colocated", 1), ("sd", 2), ("ssd", 2)])
def test_a_draft_rank_is_started_where_one_is_used(mode: str, count: int) -> None:
    assert num_ranks(load_config(None, [f"speculation.mode={mode}"])) == count
    shared = ["target.tensor_parallel=4", f"speculation.mode={mode}"]
    assert num_ranks(load_config(None, shared)) == count + 3
    several = ["deployment.drafts=3", f"speculation.mode={mode}"]
    assert num_ranks(load_config(None, several)) == (4 if count == 2 else 1)


@pytest.mark.parametrize(("group", "count"), [(None, 5), (Group("target"), 2), (Group("draft", "h:1"), 1)])
def test_a_world_has_all_drafts_and_a_torchrun_of_their_own_one(group: Group | None, count: int) -> None:
    config = load_config(None, ["deployment.drafts=3", "target.tensor_parallel=2"])
    assert sum(Launch(config, group=group).ranks_by_role) == count


def test_drafts_that_a_target_took_in_are_heard_of(play) -> None:
    ranks = play("say(Progress('draft', 0, 'load', 0.5)); say(Joined(2, (3,), True)); time.sleep(60)")
    heard: list[Joined] = []
    eventually(lambda: bool(heard.extend(ranks.joined()) or heard), 20, "it has joined")
    assert heard == [Joined(2, (3,), True)]
    assert ranks.joined() == []


def test_a_draft_that_was_taken_in_while_something_else_was_awaited_is_heard_of(play) -> None:
    ranks = play("say(Joined(2, (3,), True)); say(Ready('a', {})); say(Joined(3, (4,), True)); time.sleep(60)")
    assert isinstance(ranks.wait_ready(lambda progress: None), Ready)
    ranks.raise_if_failed()
    heard: list[Joined] = []
    eventually(lambda: len(heard.extend(ranks.joined()) or heard) == 2, 20, "both have joined")
    assert heard == [Joined(2, (3,), True), Joined(3, (4,), True)]


@pytest.mark.parametrize(
    "forged",
    [
        "socket.send(b'\\x91' * 5000)",
        "socket.send(b'')",
        "socket.send(encode(Ready('forged', {})))",
        "socket.send_multipart((b'guess', encode(WorkerFailed('target', 0, 'config', 'forged'))))",
        "socket.send_multipart((key, b'\\x91' * 5000))",
        "socket.send_multipart((key, key, encode(Ready('forged', {}))))",
    ],
)
def test_what_strangers_send_to_the_launcher_is_ignored_and_told_of_once(play, caplog, forged: str) -> None:
    ranks = play(f"{forged}; {forged}; say(Ready('real', {{}})); time.sleep(60)")
    assert ranks.wait_ready(lambda message: None) == Ready("real", {})
    assert caplog.text.count("ignored what somebody sent") == 1


def test_the_ranks_read_what_the_launcher_has_read(play) -> None:
    """A copy: the file may be a pipe, or be edited while the models load."""
    ranks = play("time.sleep(60)", "engine.num_blocks=77", "speculation.mode=sd")
    command = Ranks.command(ranks)
    assert load_config(command[command.index("--config") + 1]) == ranks.launch.config
    assert ranks.launch.config.engine.num_blocks == 77


def test_two_engines_share_no_name_and_no_port(play, tmp_path: Path) -> None:
    one, other = (play("time.sleep(60)", trace=tmp_path / "trace.json") for _ in range(2))
    assert one.directory != other.directory
    command = Ranks.command(one)
    differing = [a for a, b in zip(command, Ranks.command(other), strict=True) if a != b]
    assert len(differing) == 4  # the rendezvous id, the run directory, where to announce, the configuration
    tail = " ".join(command).partition("--config ")[2]
    assert tail == f"{one.directory}/config.toml --trace {tmp_path}/trace.json"


# ---- the environment of ranks ----------------------------------------------------------------------------------------


def test_ranks_find_our_packages_and_never_those_of_the_working_directory(tmp_path: Path) -> None:
    for name in ("random.py", "queue.py", "numpy.py", "launcher.py", "torch.py", "click.py"):
        (tmp_path / name).write_text("raise ImportError('that is the working directory')")
    (tmp_path / "tokenizers").mkdir()
    for words in ("", os.pathsep, f"{os.pathsep}/elsewhere"):
        environment = environment_of_ranks({**os.environ, "PYTHONPATH": words}, tmp_path)
        script = (
            "import random, queue, numpy, launcher.worker, tokenizers; print(launcher.__file__, tokenizers.Tokenizer)"
        )
        command = [sys.executable, "-c", script]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith(str(ROOT))


def test_a_folder_of_installed_packages_is_not_put_before_the_standard_library(monkeypatch, tmp_path: Path) -> None:
    assert environment_of_ranks({"PYTHONPATH": "/mine"}, tmp_path)["PYTHONPATH"] == f"/mine{os.pathsep}{ROOT}"
    assert environment_of_ranks({"PYTHONPATH": str(ROOT)}, tmp_path)["PYTHONPATH"] == str(ROOT)
    monkeypatch.setattr(torchrun, "ROOT", Path(sysconfig.get_paths()["purelib"]))
    assert environment_of_ranks({"PYTHONPATH": "/mine"}, tmp_path)["PYTHONPATH"] == "/mine"
    assert "PYTHONPATH" not in environment_of_ranks({}, tmp_path)


def test_what_would_bind_ranks_to_cores_is_dropped_and_told_in_one_line(caplog, tmp_path: Path) -> None:
    ours = {"OMP_PROC_BIND": "true", "GOMP_CPU_AFFINITY": "0", "OMP_PLACES": "cores", "KMP_AFFINITY": "compact"}
    environment = environment_of_ranks(ours | {"OMP_WAIT_POLICY": "active"}, tmp_path)
    assert not environment.keys() & ours.keys()
    assert environment["OMP_WAIT_POLICY"] == "active"
    (record,) = caplog.records
    assert "OMP_PROC_BIND=true, OMP_PLACES=cores, GOMP_CPU_AFFINITY=0, KMP_AFFINITY=compact" in record.message
    caplog.clear()
    environment_of_ranks({}, tmp_path)
    assert not caplog.records


def test_what_torch_leaves_behind_goes_with_the_run(play) -> None:
    ranks = play("import tempfile; tempfile.mkdtemp(prefix='left-'); say(Ready('a', {})); time.sleep(60)")
    ranks.wait_ready(lambda message: None)
    assert list(ranks.directory.glob("left-*"))
    ranks.stop(2.0)
    assert not ranks.directory.exists()


def test_no_place_for_temporary_files_is_the_users_to_mend(monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/not/there"])
    with pytest.raises(ConfigError, match=r"No usable temporary directory found.*; set TMPDIR"):
        run_directory()
