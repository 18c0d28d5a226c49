"""Bad input gets one clear line and exit code 2, at once: from `ssd`, and from a rank that was started by hand."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.process.conftest import Start
from tests.process.runs import SSD, TORCHRUN, error_line, free_port
from tests.tiny_models import write_hf

pytestmark = pytest.mark.process
AT_ONCE_S = 40.0  # of a loaded machine; the deadlines that nobody must wait for are longer together


def truncated(models: Path) -> str:
    directory = models / "truncated"
    if not directory.exists():
        write_hf(directory, seed=1)
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5000])
    return str(directory)


Case = tuple[Callable[[Path], list[str]], str]
CASES: dict[str, Case] = {
    "missing model": (lambda models: ["--set", f"target.model={models}/nope"], "nope does not exist"),
    "missing draft": (lambda models: ["--set", "draft.model=/nope"], "/nope does not exist"),
    "truncated model": (lambda models: ["--set", f"target.model={truncated(models)}"], "truncated"),
    "truncated draft": (lambda models: ["--set", f"draft.model={truncated(models)}"], "truncated"),
    "vocabularies differ": (lambda models: ["--set", f"draft.model={models}/foreign"], "do not fit"),
    "a colocated draft does not fit": (
        lambda models: [
            *("--set", "speculation.mode=ar", "--set", "deployment.colocated=true"),
            *("--set", f"draft.model={models}/foreign"),
        ],
        "do not fit",
    ),
    "empty prompt": (lambda models: ["-p", ""], "the prompt is empty"),
    "long prompt": (
        lambda models: ["--set", "engine.max_model_len=20", "-p", "word " * 20],
        "engine.max_model_len = 20",
    ),
    "unknown key": (lambda models: ["--set", "speculation.lokahead=3"], "did you mean 'lookahead'"),
    "ill-typed key": (lambda models: ["--set", "engine.block_size=big"], "'engine.block_size' must be int"),
    "unknown section": (lambda models: ["--set", "enjine.block_size=4"], "did you mean 'engine'"),
    "no such GPU": (lambda models: ["--set", "target.device=cuda"], "torch sees no GPU"),
    "foreign core": (lambda models: ["--set", "draft.cores=[4095]"], "names 4095"),
}


@pytest.mark.parametrize("case", CASES)
def test_ssd_says_what_is_wrong(ssd: Start, models: Path, case: str) -> None:
    arguments, said = CASES[case]
    done = ssd("generate", "-p", "Hello", *arguments(models))
    assert done.exit_code(AT_ONCE_S) == 2
    assert said in error_line(done.err)
    assert done.out.strip() == ""
    done.assert_nothing_is_left(within_s=1)
    assert list(done.temporary.iterdir()) == []


def test_a_config_file_with_an_unknown_key_is_named_too(run: Start, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("[engine]\nblok_size = 4\n")
    done = run(*SSD, "up", "--config", str(path))
    assert done.exit_code(AT_ONCE_S) == 2
    assert "config key 'engine.blok_size' is unknown; did you mean 'block_size'?" in error_line(done.err)


def test_a_port_in_use_is_refused(ssd: Start) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = ssd("up", "--set", f"serve.port={port}")
        assert done.exit_code(AT_ONCE_S) == 2
    assert str(port) in error_line(done.err)


# ---- a rank by itself ------------------------------------------------------------------------------------------------


@pytest.fixture
def rank(run: Start, config: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start one rank by hand, as torchrun would: RANK of WORLD_SIZE."""
    port = free_port()

    def start(number: int, world_size: int, *arguments: str) -> object:
        placed = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        for name, value in {**placed, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        return run(SSD[0], "-m", "launcher.worker", "--config", str(config), *arguments)

    return start  # type: ignore[return-value]


def last_line(err: str) -> str:
    lines = err.strip().splitlines()
    assert "Traceback" not in err
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(("number", "world_size"), [(0, 3), (5, 2)])
def test_impossible_ranks_are_refused(rank: Start, number: int, world_size: int) -> None:
    done = rank(number, world_size)
    assert done.exit_code(AT_ONCE_S) == 2
    assert "rank" in last_line(done.err)


def test_one_rank_cannot_run_ssd(rank: Start) -> None:
    done = rank(0, 1)
    assert done.exit_code(AT_ONCE_S) == 2
    assert "speculation.mode = ssd needs 2 ranks" in last_line(done.err)


def test_too_many_ranks_under_torchrun_end_by_themselves(run: Start, config: Path) -> None:
    done = run(*TORCHRUN, "--nnodes", "1", "--nproc-per-node", "3", "-m", "launcher.worker", "--config", str(config))
    assert done.exit_code(40) != 0
    assert "3 ranks cannot be used: start 2" in done.err
    done.assert_nothing_is_left(within_s=1)


def test_a_draft_that_never_comes_is_not_waited_for_longer_than_agreed(rank: Start) -> None:
    done = rank(0, 2, "--set", "timeouts.load=1", "--set", "timeouts.handshake=1")
    assert done.exit_code(AT_ONCE_S) == 2
    assert "no draft came within 2 s" in last_line(done.err)
    done.assert_nothing_is_left(within_s=1)


def test_a_draft_without_a_target_gives_up(rank: Start) -> None:
    done = rank(1, 2, "--set", "timeouts.load=1", "--set", "timeouts.handshake=1")
    assert done.exit_code(AT_ONCE_S) == 2
    assert "cannot reach torchrun's store at 127.0.0.1" in done.err.splitlines()[-1]  # torch has its say before that


def test_a_draft_with_another_configuration_is_refused_on_both_sides(rank: Start) -> None:
    target, draft = rank(0, 2), rank(1, 2, "--set", "speculation.budget=5")
    assert (target.exit_code(40), draft.exit_code(10)) == (2, 2)
    for done in (target, draft):
        assert "start both with the same [engine], [speculation] and [link] sections" in last_line(done.err)


def test_a_draft_with_another_vocabulary_is_refused_on_both_sides(rank: Start, models: Path) -> None:
    target, draft = rank(0, 2), rank(1, 2, "--set", f"draft.model={models}/foreign")
    assert (target.exit_code(40), draft.exit_code(10)) == (2, 2)
    for done in (target, draft):
        assert "choose a draft of the target's family" in last_line(done.err)


def test_a_configuration_may_come_through_a_pipe(run: Start, config: Path) -> None:
    command = f"{shlex.join(SSD)} generate -p Hello --max-tokens 5 --json --config <(cat {config})"
    done = run("bash", "-c", command)
    assert done.exit_code(AT_ONCE_S) == 0, done.err
    assert len(json.loads(done.out)["token_ids"]) == 5


def test_a_trace_that_cannot_be_written_is_said_at_the_end(ssd: Start, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    up = ssd("up", "--trace", str(folder / "trace.json"))
    up.until("address: ")
    folder.rmdir()
    up.process.terminate()
    assert up.exit_code(AT_ONCE_S) == 74
    assert f"cannot write trace {folder}/trace.json: No such file" in error_line(up.err)
    up.assert_nothing_is_left()


def test_an_answer_that_nobody_can_read_ends_the_engine(run: Start, config: Path) -> None:
    done = run("bash", "-c", f"{shlex.join(SSD)} generate -p Hello --max-tokens 5 --config {config} > /dev/full")
    assert done.exit_code(AT_ONCE_S) == 74
    assert "standard output: No space left on device" in error_line(done.err)
    done.assert_nothing_is_left()
