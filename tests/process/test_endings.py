"""However a run ends - asked, interrupted, killed - nothing of it is left, and what the user reads is one line."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import pytest

from ssd_runtime.comm.control.client_messages import Generate
from ssd_runtime.comm.hosts import address_of_host
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import SsdError
from tests.process.conftest import Start
from tests.process.runs import TORCHRUN, Run, error_line, eventually, free_port

pytestmark = pytest.mark.process


def tokens_of(address: str, max_tokens: int = 12) -> tuple[int, ...]:
    """What the engine at `address` answers."""
    with contextlib.closing(Client(address, 20.0)) as client:
        request = Generate("r", prompt="the quick", max_tokens=max_tokens, ignore_eos=True)
        *chunks, _ = client.generate(request)
    return tuple(token for chunk in chunks for token in chunk.token_ids)


def test_two_engines_on_one_host_do_not_meet_and_end_as_they_are_told(ssd: Start, models: Path) -> None:
    """Both start at the same moment; one is another model. One ends by SIGTERM, one by a kill nobody can catch."""
    ours, theirs = ssd("up"), ssd("up", "--set", f"target.model={models}/other")
    address, other = ours.until("address: "), theirs.until("address: ")
    assert address != other
    assert len(ours.members()) == len(theirs.members()) == 5  # ssd, keeper, torchrun, two ranks
    expected = tokens_of(address)
    assert tokens_of(other) != expected

    theirs.process.send_signal(signal.SIGKILL)
    theirs.exit_code(5)
    theirs.assert_nothing_is_left(within_s=20)
    assert list(theirs.temporary.iterdir()) == []

    assert tokens_of(address) == expected
    ours.process.send_signal(signal.SIGTERM)
    assert ours.exit_code() == 0
    assert ours.err.splitlines()[-1] == "engine stopped"
    assert "Traceback" not in ours.err
    ours.assert_nothing_is_left(within_s=1)
    assert list(ours.temporary.iterdir()) == []


def test_at_an_address_of_its_network_an_engine_is_ended_by_its_launcher_and_by_no_client(ssd: Start) -> None:
    host = address_of_host()
    assert not host.startswith("127."), "this host has loopback addresses only"
    ours = ssd("up", "--set", f"serve.host={host}", "--set", "speculation.mode=ar")
    address = ours.until("address: ")
    with contextlib.closing(Client(address, 20.0)) as client:
        with pytest.raises(SsdError, match=r"does not end: .*serve\.allow_shutdown = true"):
            client.shutdown()
        assert client.status().state == "ready"
    assert len(tokens_of(address)) == 12
    asked_at = time.monotonic()
    ours.process.send_signal(signal.SIGTERM)
    assert ours.exit_code(10) == 0
    assert time.monotonic() - asked_at < 4, "it was not asked but killed"  # timeouts.shutdown = 5
    ours.assert_nothing_is_left(within_s=1)


def test_ctrl_c_in_the_middle_of_an_answer(ssd: Start) -> None:
    answering = ssd("generate", "--raw", "-p", "the quick brown", "--max-tokens", "4000")
    eventually(lambda: len(answering.out) > 20 or answering.ended, 60, "the answer begins")
    answering.process.send_signal(signal.SIGINT)
    assert answering.exit_code() == 130
    assert error_line(answering.err) == "ssd: error: interrupted"
    assert len(answering.out) < 3900
    answering.assert_nothing_is_left(within_s=1)
    assert list(answering.temporary.iterdir()) == []


def test_ctrl_c_while_the_ranks_come_up(ssd: Start) -> None:
    starting = ssd("generate", "-p", "x")
    eventually(lambda: len(starting.members()) >= 4 or starting.ended, 60, "a rank exists")
    starting.process.send_signal(signal.SIGINT)
    assert starting.exit_code() == 130
    assert error_line(starting.err) == "ssd: error: interrupted"
    starting.assert_nothing_is_left(within_s=1)
    assert list(starting.temporary.iterdir()) == []


def test_a_draft_that_is_killed_in_mid_request_ends_the_world_with_one_line(ssd: Start) -> None:
    """In one torchrun world a lost rank ends all of it (torchrun's rule); the user is told, and nothing hangs."""
    answering = ssd("generate", "--raw", "-p", "the quick brown", "--max-tokens", "4000")
    eventually(lambda: len(answering.out) > 20 or answering.ended, 60, "the answer begins")
    answering.rank(1).kill()
    assert answering.exit_code() == 1
    said, _, log = error_line(answering.err).partition("; log: ")
    assert "draft rank 1" in said
    assert "SIGKILL" in said or "signal 9" in said
    assert Path(log).exists()
    answering.assert_nothing_is_left(within_s=1)


def test_by_hand_under_torchrun_it_serves_until_sigterm(run: Start, config: Path) -> None:
    port = free_port()
    worker = ["-m", "launcher.worker", "--config", str(config), "--set", f"serve.port={port}"]
    by_hand = run(*TORCHRUN, "--nnodes", "1", "--nproc-per-node", "2", *worker)
    assert by_hand.until("address: ") == f"tcp://127.0.0.1:{port}"
    assert len(tokens_of(f"tcp://127.0.0.1:{port}")) == 12
    by_hand.process.send_signal(signal.SIGTERM)
    by_hand.exit_code()
    by_hand.assert_nothing_is_left(within_s=2)


def test_an_answer_with_its_trace_and_its_line_of_json(ssd: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["--max-tokens", "200", "--json", "--trace", str(trace)]
    done = ssd("generate", "-p", "the quick brown fox", *arguments)
    assert done.exit_code(60) == 0, done.err
    done.assert_nothing_is_left(within_s=1)
    (line,) = done.out.splitlines()
    said = json.loads(line)
    assert set(said) == {"text", "token_ids", "finish_reason", "usage", "statistics"}
    assert said["finish_reason"] == "length"
    assert len(said["token_ids"]) == said["usage"]["completion_tokens"] == 200
    assert said["statistics"]["mode"] == "ssd"
    assert said["statistics"]["rounds"] < 150
    assert list(tmp_path.glob("trace.json*")) == [trace]
    assert_drafting_hides_behind_verification(trace, rounds=said["statistics"]["rounds"])


def assert_drafting_hides_behind_verification(trace: Path, rounds: int) -> None:
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert sorted(rows) == ["draft rank 1", "target rank 0"]
    spans = [event for event in events if event["ph"] == "X"]
    verifications = spans_of(spans, rows["target rank 0"], "verify")
    steps = spans_of(spans, rows["draft rank 1"], "draft step")
    assert len(verifications) == rounds
    overlapping = sum(any(a < end and start < b for a, b in steps) for start, end in verifications)
    assert overlapping > rounds / 2


def spans_of(spans: list[dict], pid: int, name: str) -> list[tuple[float, float]]:
    return [(s["ts"], s["ts"] + s["dur"]) for s in spans if s["pid"] == pid and s["name"] == name]


def finished(run: Run, timeout_s: float = 60) -> str:
    assert run.exit_code(timeout_s) == 0, run.err
    return run.out


SERIES = ("round_ms", "verify_ms", "wait_ms", "other_ms", "draft_step_ms")
NUMBERS = ("tokens", "decode_seconds", "tokens_per_second", "rounds", "tokens_per_round", "prefill_seconds")


def test_a_benchmark_compares_all_modes_in_one_engine(ssd: Start, tmp_path: Path) -> None:
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    asked = [{"id": f"p{i}", "set": "tiny", "prompt": "the lazy dog " * (i + 1)} for i in range(2)]
    prompts.write_text("".join(json.dumps(one) + "\n" for one in asked))
    modes = ["ar", "sd", "sd-colocated", "ssd"]
    arguments = ["--modes", ",".join(modes), "--prompts", str(prompts), "--max-tokens", "24", "--json", str(report)]
    finished(ssd("bench", *arguments))
    found = json.loads(report.read_text())
    assert [row["mode"] for row in found["runs"]] == modes
    assert found["identical_tokens"] is True
    assert found["compared_outputs"] == 6
    for row in found["runs"]:
        assert row["tokens"] == 48
        assert all(row[key] > 0 for key in NUMBERS)
        for name in SERIES:
            assert set(row[name]) == {"p50", "p95"}
        assert row["verify_ms"]["p50"] <= row["verify_ms"]["p95"]
        assert (row["acceptance"] is None) == (row["mode"] == "ar")
        assert (row["hit_rate"] is None) == (row["mode"] != "ssd")
        assert (row["draft_step_ms"]["p50"] is None) == (row["mode"] == "ar")
