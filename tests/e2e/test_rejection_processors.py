"""Coupling "rejection" with penalties, biases and exclusions: each token has the target's law given the text so far."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import reduce
from operator import add

import pytest
import torch

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.leader import link_speculator
from ssd_runtime.speculation.sampling.processors import History, LogitsProcessors, process_history
from ssd_runtime.speculation.sampling.ranking import process_logits
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import in_process, random_steps, request
from tests.enumeration import CRITICAL_Z, ChiSquare
from tests.tabular_runs import LOOKAHEAD, PROMPT, models

SIZE, TOKENS = 8, 120
END = (6,)
PARAMS = (
    SamplingParams(temperature=0.7, repetition_penalty=1.6, top_p=0.95),
    SamplingParams(temperature=1.0, frequency_penalty=0.3, presence_penalty=-1.0),
    SamplingParams(temperature=1.0, frequency_penalty=-0.02, top_k=5),
    SamplingParams(temperature=1.0, logit_bias=((3, 1.5), (5, -1.0)), allowed_tokens=(0, 1, 3, 4, 5, 6)),
    SamplingParams(temperature=0.7, banned_tokens=(2, 7), min_p=0.02),
    SamplingParams(temperature=1.0, min_tokens=TOKENS - 30),
)


@pytest.fixture(autouse=True)
def _waits_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_speculator, "drafted_enough", lambda _, lengths, most: lengths == most)


def asked(mode: str, kinds: tuple[SamplingParams, ...], requests: int) -> list[Request]:
    return [
        request(
            PROMPT,
            mode,
            lookahead=LOOKAHEAD,
            max_tokens=TOKENS,
            params=replace(params, seed=zlib.crc32(f"{mode} {kind} {i}".encode())),
            request_id=f"{mode} {kind} {i}",
            eos_token_ids=END if params.min_tokens else (),
            logprobs=1,
        )
        for kind, params in enumerate(kinds)
        for i in range(requests)
    ]


def judge(texts: list[tuple[Request, list[int]]]) -> ChiSquare:
    """Over requests of the same parameters: every token, by the token before it."""
    table_VV = models(SIZE)[0].table_VVV[0]
    chosen, chances, before = [], [], []
    for one, output in texts:
        for i, token in enumerate(output):
            before.append(output[i - 1] if i else PROMPT[-1])
            logits_V = process_history(table_VV[before[-1]], one.params, History(PROMPT, tuple(output[:i]), END))
            chances.append(torch.softmax(process_logits(logits_V, one.params).double(), dim=0))
            chosen.append(token)
    chosen_N, chances_NV, before_N = torch.tensor(chosen), torch.stack(chances), torch.tensor(before)
    assert bool((chances_NV[torch.arange(len(chosen)), chosen_N] > 0).all()), "a token that may not be chosen"
    groups = [before_N == token for token in before_N.unique()]
    return reduce(add, [ChiSquare.of_choices(chosen_N[group], chances_NV[group]) for group in groups])


def run(
    mode: str, requests: int, kinds: tuple[SamplingParams, ...] = PARAMS
) -> dict[SamplingParams, list[tuple[Request, list[int]]]]:
    """The requests of each kind and their outputs; log-probabilities are looked at on the way."""
    engine = EngineConfig(max_model_len=len(PROMPT) + TOKENS, max_num_seqs=64, block_size=16)
    speculation = SpeculationConfig(lookahead=LOOKAHEAD, budget=3, coupling="rejection", top_m=4)
    process = in_process(*models(SIZE), engine, speculation, random_steps(1, 4))  # type: ignore[arg-type]
    texts: dict[SamplingParams, list[tuple[Request, list[int]]]] = {}
    every = asked(mode, kinds, requests)
    for kind, (one, sequence) in enumerate(zip(every, process.run(every), strict=True)):
        output = sequence.tokens[len(PROMPT) :]
        texts.setdefault(kinds[kind // requests], []).append((one, output))
        logprobs_VV = torch.log_softmax(models(SIZE)[0].table_VVV[0], dim=1)
        told = [logprob for delta in process.deltas[one.request_id] for logprob in delta.logprobs]
        for before, token, logprob in zip((PROMPT[-1], *output), output, told, strict=False):
            assert logprob.token == token
            assert logprob.logprob == pytest.approx(float(logprobs_VV[before, token]), abs=1e-5)
        assert len(told) == len(output)
    process.assert_all_blocks_are_back()
    return texts


@pytest.mark.parametrize(("mode", "requests"), [("ssd", 3), ("sd", 6)])
def test_each_token_has_the_law_of_the_processors_given_the_text_so_far(mode: str, requests: int) -> None:
    for params, texts in run(mode, requests).items():
        assert judge(texts).z < CRITICAL_Z, params
        if params.min_tokens:
            assert all(not set(END) & set(output[: params.min_tokens]) for _, output in texts)
            assert any(output[-1] in END for _, output in texts)


def test_a_history_without_the_speculated_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    process = LogitsProcessors.process
    monkeypatch.setattr(LogitsProcessors, "process", lambda self, logits_V, _, z_V: process(self, logits_V, (), z_V))
    ((_, texts),) = run("sd", 8, (SamplingParams(temperature=1.0, frequency_penalty=2.0),)).items()
    assert judge(texts).z > CRITICAL_Z
