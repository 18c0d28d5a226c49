"""A target of two ranks and its drafts under a real torchrun: the tokens of one rank, no rank is lost unnoticed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssd_runtime.comm.control.client_messages import Generate
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import SsdError
from ssd_runtime.speculation.types import SamplingParams
from tests.process.conftest import Start
from tests.process.runs import Run, error_line, eventually

pytestmark = pytest.mark.process

TWO = ("--set", "target.tensor_parallel=2")
BRISK = ("--set", "timeouts.link=2", "--set", "timeouts.idle_heartbeat=0.5")


def tokens_of(address: str, mode: str, temperature: float) -> tuple[int, ...]:
    with contextlib.closing(Client(address, 30.0)) as client:
        params = SamplingParams(temperature=temperature, seed=3)
        request = Generate("r", prompt="the quick", params=params, max_tokens=10, ignore_eos=True, mode=mode)  # type: ignore[arg-type]
        *chunks, _ = client.generate(request)
    return tuple(token for chunk in chunks for token in chunk.token_ids)


def test_two_ranks_and_two_drafts_answer_as_one_rank_does_and_end_cleanly(ssd: Start, models: Path) -> None:
    model = ("--set", f"target.model={models}/other")
    shared, alone = ssd("up", *TWO, *model, "--set", "deployment.drafts=2"), ssd("up", *model)
    address, other = shared.until("address: "), alone.until("address: ")
    assert len(shared.members()) == 7  # ssd, keeper, torchrun, two target ranks, two drafts
    for rank in ("target 0", "target 1", "draft 2", "draft 3"):
        assert f"{rank} on core" in shared.out
    with contextlib.closing(Client(address, 30.0)) as client:
        assert client.status().num_drafts == 2
    for mode in ("ar", "sd", "ssd"):
        for temperature in (0.0, 1.0):
            found = tokens_of(address, mode, temperature)
            assert len(found) == 10
            assert found == tokens_of(other, mode, temperature), (mode, temperature)
    shared.process.send_signal(signal.SIGTERM)
    assert shared.exit_code(15) == 0
    shared.assert_nothing_is_left(within_s=1)
    assert list(shared.temporary.iterdir()) == []


@contextlib.contextmanager
def asked_for_much(address: str) -> Iterator[list[str]]:
    """A client in the middle of a long answer; yields what it was told in the end, once the block is over."""
    told: list[str] = []
    begun, ended = threading.Event(), threading.Event()

    def ask() -> None:
        with contextlib.closing(Client(address, 60.0)) as client:
            request = Generate("r", prompt="the quick", max_tokens=4000, ignore_eos=True, mode="ar")
            try:
                for _ in client.generate(request):
                    begun.set()
                told.append("an answer")
            except SsdError as error:
                told.append(str(error))
        ended.set()

    threading.Thread(target=ask, daemon=True).start()
    assert begun.wait(60)
    yield told
    assert ended.wait(20), "the client still waits"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_target_rank_that_is_killed_ends_its_requests_and_the_world(ssd: Start, rank: int) -> None:
    engine = ssd("up", *TWO)
    with asked_for_much(engine.until("address: ")) as told:
        engine.rank(rank).kill()
    assert "target" in told[0] or "the request was not finished" in told[0]
    assert engine.exit_code(20) == 1
    assert f"target rank {rank}" in error_line(_without_screen(engine))
    engine.assert_nothing_is_left(within_s=1)


def test_a_target_rank_that_is_frozen_fails_the_requests_in_time(ssd: Start) -> None:
    engine = ssd("up", *TWO, *BRISK)
    with asked_for_much(engine.until("address: ")) as told:
        engine.rank(1).suspend()
    assert "target rank 1 lost" in told[0]
    leader = [process for process in engine.members() if process.environ().get("RANK") == "0"]
    eventually(lambda: not any(process.is_running() and process.status() != "zombie" for process in leader), 20, "exit")


def test_a_model_that_does_not_divide_is_refused_before_anything_starts(ssd: Start) -> None:
    refused = ssd("up", "--set", "target.tensor_parallel=3")
    assert refused.exit_code(30) == 2
    said = error_line(refused.err)
    assert "do not divide among target.tensor_parallel = 3 ranks; possible are 1, 2, 4" in said


def _without_screen(run: Run) -> str:
    return "\n".join(line for line in run.err.splitlines() if line.startswith("ssd: error"))
