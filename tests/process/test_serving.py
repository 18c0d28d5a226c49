"""One engine with two real ranks, and clients that come, leave and die."""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.generation import Generation, generate, generate_together
from launcher.session import Session, started
from launcher.torchrun import Launch
from ssd_runtime.comm.control.client_messages import Finished, Generate
from ssd_runtime.config import MODES, load_config
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import RequestError
from ssd_runtime.speculation.types import SamplingParams
from tests.process.conftest import Start
from tests.process.runs import PLAIN, SSD, error_line, eventually

pytestmark = pytest.mark.process
ENDLESS = 4000  # tokens: half a minute


@contextlib.contextmanager
def unseen() -> Iterator[Any]:
    yield lambda progress: None


@pytest.fixture(scope="module")
def engine(config: Path) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in PLAIN.items():
            environment.setenv(name, value)
        overrides = ("deployment.colocated=true",)  # for requests in every mode
        with started(Launch(load_config(config, overrides)), unseen) as session:
            yield session


@pytest.fixture
def client(engine: Session) -> Iterator[Client]:
    with contextlib.closing(Client(engine.address, 30.0)) as connected:
        yield connected


def ask(prompt: str = "the quick brown", **fields: Any) -> Generate:
    fields = {"max_tokens": 32, "ignore_eos": True} | fields
    return Generate(request_id=uuid.uuid4().hex, prompt=prompt, **fields)


def answer(client: Client, request: Generate) -> Generation:
    return generate(client, request)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_mode_gives_the_same_tokens(client: Client, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3)
    answers = {mode: answer(client, ask(params=params, mode=mode)) for mode in MODES}
    plain = answers["ar"]
    assert len(plain.token_ids) == 32
    for mode, found in answers.items():
        assert (found.token_ids, found.text) == (plain.token_ids, plain.text), mode
        assert found.finished.statistics.mode == mode
        assert (found.finished.statistics.num_draft_tokens > 0) == (mode != "ar")
    assert answers["ssd"].finished.statistics.hits > 0


@pytest.mark.parametrize("stream", [True, False])
def test_several_outputs_are_those_of_their_seeds(client: Client, stream: bool) -> None:
    params = SamplingParams(temperature=0.9, seed=2**64 - 2, repetition_penalty=1.2, frequency_penalty=0.3)
    found = answer(client, ask(params=params, n=3, logprobs=2, stream=stream))
    for output, seed in zip(found.outputs, (2**64 - 2, 2**64 - 1, 0), strict=True):
        alone = answer(client, ask(params=replace(params, seed=seed), mode="ar", logprobs=2))
        assert (output.token_ids, output.text) == (alone.token_ids, alone.text)
        for mine, theirs in zip(output.logprobs, alone.outputs[0].logprobs, strict=True):
            assert mine.token == theirs.token
            assert [one for one, _ in mine.top] == [one for one, _ in theirs.top]
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert len({output.token_ids for output in found.outputs}) == 3
    assert found.finished.finish_reasons == ("length",) * 3
    assert (found.finished.usage.completion_tokens, found.finished.statistics.num_tokens) == (96, 96)
    assert found.finished.usage.prompt_tokens == alone.finished.usage.prompt_tokens


def test_text_is_streamed_in_pieces_that_make_the_whole(client: Client) -> None:
    *chunks, finished = client.generate(ask())
    assert isinstance(finished, Finished)
    assert len(chunks) == finished.statistics.rounds + 1 > 8
    assert finished.usage.completion_tokens == sum(len(chunk.token_ids) for chunk in chunks) == 32


def test_one_client_asks_for_several_answers_at_once(client: Client) -> None:
    requests = [ask("jumps over " * (i + 1), mode=MODES[i], max_tokens=40) for i in range(4)]
    alone = [answer(client, request).token_ids for request in requests]
    together = generate_together(client, requests)
    assert [generation.token_ids for generation in together] == alone


def test_a_refused_request_cancels_those_it_came_with(client: Client) -> None:
    endless = ask(max_tokens=ENDLESS, mode="ar")
    with pytest.raises(RequestError, match="stop string is empty"):
        generate_together(client, [endless, ask(stop=("",))])
    eventually(lambda: idle(client), 30, "the other request is cancelled")


def test_clients_at_once_get_what_each_gets_alone(engine: Session, client: Client) -> None:
    params = [SamplingParams(temperature=0.5 * i, seed=i) for i in range(4)]
    requests = [ask("jumps over " * (i + 1), params=params[i], mode=MODES[i], max_tokens=60) for i in range(4)]
    alone = [answer(client, request).token_ids for request in requests]
    together: dict[int, tuple[int, ...]] = {}
    ready = threading.Barrier(4)

    def serve(index: int) -> None:
        with contextlib.closing(Client(engine.address, 30.0)) as mine:
            mine.status()
            ready.wait(10)
            together[index] = answer(mine, requests[index]).token_ids

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [together.get(index) for index in range(4)] == alone


def test_leaving_streams_early_cancels_their_requests(engine: Session, client: Client) -> None:
    expected = answer(client, ask()).token_ids
    with contextlib.ExitStack() as clients:
        for _ in range(4):
            leaving = clients.enter_context(contextlib.closing(Client(engine.address, 30.0)))
            stream = leaving.generate(ask(max_tokens=ENDLESS, mode="ar"))
            next(stream)
            stream.close()  # type: ignore[attr-defined]
    eventually(lambda: idle(client), 3, "the requests are cancelled")
    assert answer(client, ask()).token_ids == expected


DYING = f"""
import os, sys
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.control.client_messages import Chunk, Generate
peer = ControlPeer.connect(sys.argv[1])
for i in range(8):
    peer.send(Generate(f"dying {{i}}", prompt="x", max_tokens={ENDLESS}, mode="ar"))
peer.wait_for(Chunk, timeout_s=30)
os._exit(9)
"""


def test_a_client_that_dies_does_not_keep_its_requests_running(engine: Session, client: Client, run: Start) -> None:
    done = run(SSD[0], "-c", DYING, engine.address)
    assert done.exit_code() == 9, done.err
    eventually(lambda: idle(client), 3, "the requests of the dead client end")


def idle(client: Client) -> bool:
    status = client.status()
    return status.num_running == status.num_waiting == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "1 2 3 " * 1400}, r"engine\.max_model_len is 4096"),
        ({"prompt": None}, "give exactly one of prompt, messages and token_ids"),
        ({"prompt": None, "token_ids": (5, 10**9)}, "outside the vocabulary"),
        ({"lookahead": 9}, r"between 0 and speculation\.lookahead = 3"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"params": SamplingParams(top_p=2.0)}, "top_p must be"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_next_is_not(
    client: Client, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        answer(client, ask(**fields))
    assert len(answer(client, ask(max_tokens=2)).token_ids) == 2


def test_generate_connects_to_a_running_engine_and_leaves_it_running(
    engine: Session, client: Client, run: Start
) -> None:
    arguments = ["--connect", engine.address, "--raw", "-p", "the quick brown", "--max-tokens", "12", "--json"]
    done = run(*SSD, "generate", *arguments)
    assert done.exit_code() == 0, done.err
    said = json.loads(done.out.splitlines()[-1])
    assert said["token_ids"] == list(answer(client, ask(max_tokens=12)).token_ids)
    assert client.status().state == "ready"


def test_generate_says_in_one_line_what_a_running_engine_refuses(engine: Session, run: Start) -> None:
    done = run(*SSD, "generate", "--connect", engine.address, "-p", "1 2 3 " * 1400)
    assert done.exit_code() == 2
    assert "engine.max_model_len is 4096" in error_line(done.err)
