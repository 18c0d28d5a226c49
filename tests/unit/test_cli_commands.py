"""`ssd generate` and `ssd bench` with an engine that is played: what they ask for, print and write."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher import cli
from ssd_runtime.comm.control.client_messages import Chunk, Finished, Generate, RequestStatistics, Usage
from ssd_runtime.errors import Overloaded, PeerLost, RequestError
from ssd_runtime.speculation.types import SamplingParams, TokenLogprob


class Engine:
    """Answers every request with two chunks, or raises what it is told to."""

    error: BaseException | None = None
    label: str | None = None  # of its session

    def __init__(self) -> None:
        self.requests: list[Generate] = []

    def generate_together(self, requests: Sequence[Generate]) -> Iterator[Chunk | Finished]:
        for request in requests:
            yield from self._generate(request)

    def _generate(self, request: Generate) -> Iterator[Chunk | Finished]:
        self.requests.append(request)
        wanted = request.logprobs is not None
        logprobs = tuple(TokenLogprob(token, -1.5, ((token, -1.5), (9, -2.0))) for token in (1, 2, 3) if wanted)
        for index in range(request.n):
            yield Chunk(request.request_id, "Hello", (1, 2), index, logprobs[:2])
            if self.error is not None:
                raise self.error
        for index in range(request.n):
            yield Chunk(request.request_id, " you", (3,), index, logprobs[2:])
        statistics = RequestStatistics(mode="ssd", rounds=1, num_tokens=3, decode_seconds=0.5, lookups=1, hits=1)
        yield Finished(request.request_id, ("stop",) * request.n, Usage(4, 3 * request.n), statistics)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    played = Engine()

    class Session:
        client, address, cores, ranks = played, "tcp://127.0.0.1:9", {"target": (0,), "draft": (1,)}, None
        label = property(lambda self: played.label)

    @contextmanager
    def session(*arguments: object) -> Iterator[Session]:
        yield Session()

    monkeypatch.setattr("launcher.commands.engine.open_session", session)
    return played


def test_generate_streams_text_and_tells_its_rates(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "-p", "Hi", "--temperature", "0.7", "--seed", "3", "--stop", "a", "--stop", "b"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello you\n"
    assert "ssd: 3 tokens (stop), 4.0 tokens/s" in captured.err
    assert "target on core 0, draft on core 1" in captured.err
    (request,) = engine.requests
    assert (request.params.temperature, request.params.seed, request.stop) == (0.7, 3, ("a", "b"))
    assert request.messages is not None
    assert request.messages[0].content == "Hi"


def test_generate_json_is_one_line(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "-p", "Hi", "--json", "--raw"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    answer = json.loads(line)
    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "statistics"}
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("Hello you", [1, 2, 3], "stop")
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 3}
    assert answer["statistics"]["tokens_per_second"] == 4.0
    assert captured.err == ""
    assert engine.requests[0].prompt == "Hi"


def test_every_sampling_option_arrives_by_its_name(engine: Engine) -> None:
    options = ["--repetition-penalty", "1.2", "--presence-penalty", "-0.5", "--frequency-penalty", "0.25"]
    options += ["--logit-bias", "7=-100", "--logit-bias", "8=2.5", "--allowed-tokens", "7,8, 9", "--banned-tokens", "3"]
    assert cli.main(["generate", "-p", "Hi", "--json", "--min-tokens", "4", *options]) == 0
    assert engine.requests[0].params == SamplingParams(
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias=((7, -100.0), (8, 2.5)),
        allowed_tokens=(7, 8, 9),
        banned_tokens=(3,),
        min_tokens=4,
    )


def test_logprobs_are_part_of_the_json(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "-p", "Hi", "--json", "--logprobs", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert engine.requests[0].logprobs == 2
    assert [one["token"] for one in answer["logprobs"]] == answer["token_ids"] == [1, 2, 3]
    top = [{"token": 1, "logprob": -1.5}, {"token": 9, "logprob": -2.0}]
    assert answer["logprobs"][0] == {"token": 1, "logprob": -1.5, "top": top}


def test_several_answers_are_told_apart(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "-p", "Hi", "--n", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert engine.requests[0].n == 2
    assert [one["text"] for one in answer["outputs"]] == ["Hello you", "Hello you"]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 6}
    assert cli.main(["generate", "-p", "Hi", "--n", "2"]) == 0
    assert capsys.readouterr().out == "--- answer 0 (stop)\nHello you\n--- answer 1 (stop)\nHello you\n"


def test_a_prompt_comes_from_standard_input(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\n".encode()), encoding="utf-8"))
    assert cli.main(["generate", "-p", "-", "--raw"]) == 0
    assert engine.requests[0].prompt == "Grüße\n"


def test_bench_writes_the_report_and_prints_the_table(
    engine: Engine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--modes", "ar,ssd", "--limit", "2", "--lookahead", "ssd=2,3", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["runs"]] == ["ar", "ssd@2", "ssd@3"]
    wanted = {"mode", "lookahead", "tokens", "decode_seconds", "tokens_per_second", "rounds", "tokens_per_round"}
    wanted |= {"acceptance", "hit_rate", "prefill_seconds", "accepted_per_position"}
    wanted |= {"round_ms", "verify_ms", "wait_ms", "other_ms", "draft_step_ms"}
    assert wanted <= set(report["runs"][0])
    assert report["machine"]["cores"] == {"target": [0], "draft": [1]}
    assert report["identical_tokens"] is True
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "identical in all runs" in printed
    assert "target on core 0, draft on core 1" in printed


@pytest.mark.parametrize("command", [["generate", "-p", "Hi"], ["bench", "--modes", "ar", "--limit", "1"]])
def test_scripted_text_is_said_to_be_scripted(
    engine: Engine, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    engine.label = "scripted text, random weights: target random:tiny"
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    told = captured.err if command[0] == "generate" else captured.out
    assert told.splitlines()[0] == engine.label
    out = tmp_path / "out.json"
    assert cli.main([*command, "--json", *([str(out)] if command[0] == "bench" else [])]) == 0
    report = json.loads(out.read_text() if command[0] == "bench" else capsys.readouterr().out)
    assert report["label"] == engine.label


def test_bench_compares_numbers_of_drafts_on_one_page(
    engine: Engine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", "--modes", "ar,ssd", "--limit", "1", "--drafts", "1,2", "--divide-budget", "--json", str(out)]
    assert cli.main(arguments) == 0
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["runs"]] == ["ar", "ssd d1", "ssd d2"]
    assert [(setup["drafts"], setup["budget"]) for setup in report["setups"]] == [(1, 8), (2, 4)]
    assert (report["budget_divided"], report["identical_tokens"], report["compared_outputs"]) == (True, True, 2)
    printed = capsys.readouterr().out
    assert "hit rate of ssd: 100.0% with 1 draft, 100.0% with 2 drafts" in printed
    assert "budgets divided among the drafts: 1 x 8 = 8, 2 x 4 = 8" in printed
    assert "d2: target on core 0" in printed


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RequestError("no such thing"), 2, "no such thing"),
        (Overloaded("9 requests are waiting"), 75, "9 requests are waiting"),
        (PeerLost("target", 0, 7, "silent for 5 s"), 1, "target rank 0 lost in round 7: silent for 5 s"),
        (KeyError("odd"), 1, "unexpected KeyError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_breaks_while_running_is_one_line(
    engine: Engine, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    engine.error = error
    assert cli.main(["generate", "-p", "x"]) == code
    captured = capsys.readouterr()
    (line,) = filter(None, captured.err.splitlines())  # click ends the line of a ^C with an empty one
    assert message in line
    assert "Traceback" not in captured.err
