"""The embedded model, fp32 with its int8 draft, in one process: every mode says exactly what plain decoding says."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.text.tokenizer import Detokenizer, Tokenizer
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess, in_process, request

pytestmark = pytest.mark.model

MODES = ("sd", "sd-colocated", "ssd")
QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Why is the sky blue?",
    "List the days of the week, one a line.",
)
ENGINE = EngineConfig(max_model_len=256, max_num_seqs=4)


@dataclass(frozen=True)
class Pair:
    """Target and draft, loaded once, and what plain decoding gave so far."""

    target: Decoder
    draft: Decoder
    tokenizer: Tokenizer

    def engine(self) -> InProcess:
        return in_process(self.target, self.draft, ENGINE, SpeculationConfig(lookahead=4, budget=8), steps=3)

    def serve(self, *asked: Request) -> list[Sequence]:
        process = self.engine()
        sequences = process.run(list(asked), lambda: Detokenizer(self.tokenizer))
        process.assert_all_blocks_are_back()
        return sequences

    def chat(self, question: str) -> tuple[int, ...]:
        text = self.tokenizer.chat([{"role": "user", "content": question}])
        return tuple(self.tokenizer.encode(text, add_special=False))

    @functools.cache  # noqa: B019 - as long as the module's fixture lives
    def plain(self, question: str, params: SamplingParams, max_tokens: int = 64) -> tuple[int, ...]:
        (sequence,) = self.serve(request(self.chat(question), "ar", params=params, max_tokens=max_tokens))
        return output(sequence)


@pytest.fixture(scope="module")
def pair(smollm2_path: str) -> Pair:
    cpu = torch.device("cpu")
    target, draft = (load_decoder(smollm2_path, dtype, cpu, None) for dtype in ("fp32", "int8"))
    return Pair(target, draft, Tokenizer.from_model(smollm2_path))


def output(sequence: Sequence) -> tuple[int, ...]:
    return tuple(sequence.tokens[sequence.num_prompt :])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_64_tokens_are_those_of_plain_decoding(pair: Pair, mode: str, temperature: float) -> None:
    for seed, question in enumerate(QUESTIONS):
        params = SamplingParams(temperature=temperature, seed=seed)
        (sequence,) = pair.serve(request(pair.chat(question), mode, lookahead=4, params=params, max_tokens=64))
        assert output(sequence) == pair.plain(question, params)
        statistics = sequence.statistics()
        assert statistics.num_tokens == 64
        assert statistics.num_accepted_tokens > 20, "a draft that is never right proves nothing"


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_with_mixed_temperatures_gives_each_what_it_gets_alone(pair: Pair, mode: str) -> None:
    rows = [(QUESTIONS[0], 0.0), (QUESTIONS[1], 0.7), (QUESTIONS[2], 1.0), (QUESTIONS[1], 0.0)]
    asked = [
        request(
            pair.chat(question),
            mode,
            lookahead=4,
            max_tokens=40,
            params=SamplingParams(temperature=temperature, seed=seed),
            request_id=str(seed),
        )
        for seed, (question, temperature) in enumerate(rows)
    ]
    found = [output(sequence) for sequence in pair.serve(*asked)]
    assert found == [pair.plain(q, one.params, 40) for (q, _), one in zip(rows, asked, strict=True)]


@pytest.mark.parametrize("mode", ["ar", *MODES])
def test_a_stop_string_inside_a_run_cuts_text_and_tokens(pair: Pair, mode: str) -> None:
    tokens = pair.plain(QUESTIONS[2], SamplingParams())
    text = pair.tokenizer.decode(tokens)
    stop = text[60:67]  # begins and ends wherever tokens do
    count = next(n for n in range(1, 65) if stop in pair.tokenizer.decode(tokens[:n]))
    asked = request(pair.chat(QUESTIONS[2]), mode, lookahead=4, max_tokens=64, stop=(stop,), request_id="x")
    process = pair.engine()
    (sequence,) = process.run([asked], lambda: Detokenizer(pair.tokenizer))
    assert sequence.finish_reason == "stop"
    assert output(sequence) == tokens[:count]
    assert "".join(delta.text for delta in process.deltas["x"]) == text[: text.index(stop)]
    assert sequence.statistics().num_tokens == count


@pytest.mark.parametrize("mode", ["ar", *MODES])
def test_the_models_own_end_token_ends_an_answer(pair: Pair, mode: str) -> None:
    ends = pair.tokenizer.eos_token_ids
    prompt = pair.chat("Answer with one word: what colour is the sky?")
    (sequence,) = pair.serve(request(prompt, mode, lookahead=4, max_tokens=64, eos_token_ids=ends))
    assert sequence.finish_reason == "stop"
    assert output(sequence)[-1] in ends
    assert not set(output(sequence)[:-1]) & set(ends)
