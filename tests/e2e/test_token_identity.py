"""The guard of the house: AR, SD and SSD emit the same tokens, whatever the draft, its speed, the batch or the cache.

Tiny random models with a wide spread of logits: targets and drafts that agree often, rarely, or never.
"""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.speculation.planning.planner import MeasuredRound, Planner
from ssd_runtime.speculation.types import Plan, SamplingParams
from tests.engines import in_process, random_steps, request
from tests.tiny_models import CPU, RandomWeights, tiny_architecture

VOCAB = 96
BLOCK = 8
MODES = ("sd", "sd-colocated", "ssd")


@functools.cache
def models() -> dict[str, Decoder]:
    """A target, and drafts that are its twin, its relative (some noise on the weights) and a stranger."""
    arch = tiny_architecture(vocab_size=VOCAB)
    weights = RandomWeights(arch, seed=1)
    relative = RandomWeights(arch, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in relative._tensors.items():
        relative._tensors[name] = tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    named = {"target": weights, "twin": weights, "relative": relative, "stranger": RandomWeights(arch, seed=3)}
    return {name: decoder_from_weights(source, "fp32", CPU) for name, source in named.items()}


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    draws = random.Random(f"{length}-{seed}")
    return tuple(draws.randrange(VOCAB) for _ in range(length))


class Restless:
    """A planner that knows nothing and changes its mind in every round, from no speculation to all that is allowed."""

    def __init__(self, seed: int, lookahead: int = 5, budget: int = 6) -> None:
        self._chance, self._most = random.Random(seed), (lookahead, budget)
        self.rounds = 0

    def plan(self, sequences: int) -> Plan:
        lookahead, budget = self._most
        return Plan(self._chance.randint(0, lookahead), self._chance.randint(0, budget + 2))

    def observe(self, round: MeasuredRound) -> None:
        self.rounds += 1

    def forget(self) -> None:
        pass


def outputs(
    requests: list[Request], draft: str = "relative", steps=3, planner: Planner | None = None, **speculation
) -> list[tuple[int, ...]]:
    """Output tokens of requests served together by one engine; all its blocks must come back."""
    engine = EngineConfig(max_model_len=160, max_num_seqs=4, block_size=BLOCK, prefill_chunk=11)
    config = SpeculationConfig(**({"lookahead": 5, "budget": 6} | speculation))
    process = in_process(models()["target"], models()[draft], engine, config, steps, planner)
    sequences = process.run(requests)
    process.assert_all_blocks_are_back()
    assert process.link.drafts.num_lost == 0
    return [tuple(sequence.tokens[sequence.num_prompt :]) for sequence in sequences]


@functools.cache
def alone(asked: Request) -> tuple[int, ...]:
    """What plain decoding gives this request by itself."""
    plain = Request(
        asked.request_id,
        asked.prompt_tokens,
        asked.params,
        "ar",
        0,
        asked.max_tokens,
        asked.stop,
        asked.eos_token_ids,
    )
    return outputs([plain])[0]


@pytest.mark.parametrize("draft", ["twin", "relative", "stranger"])
@pytest.mark.parametrize("lookahead", [1, 3, 5])
@pytest.mark.parametrize("mode", MODES)
def test_one_sequence_gets_the_tokens_of_plain_decoding(mode, lookahead, draft):
    for temperature, steps in itertools.product([0.0, 0.7, 1.0], [0, 2, random_steps(lookahead)]):
        params = SamplingParams(temperature=temperature, seed=lookahead)
        asked = request(prompt(13), mode, lookahead=lookahead, max_tokens=60, params=params)
        assert outputs([asked], draft, steps) == [alone(asked)]


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_with_mixed_temperatures_gives_each_what_it_gets_alone(mode):
    asked = [
        request(prompt(length, 7), mode, lookahead=lookahead, max_tokens=50, params=params)
        for length, lookahead, params in [
            (5, 3, SamplingParams()),
            (16, 5, SamplingParams(temperature=0.7, seed=1)),
            (23, 1, SamplingParams(temperature=1.0, seed=2, top_k=20)),
            (40, 4, SamplingParams(temperature=1.3, seed=3, top_p=0.9, min_p=0.01)),
        ]
    ]
    assert outputs(asked, steps=random_steps(4)) == [alone(one) for one in asked]


def test_more_requests_than_places_come_and_go():
    asked = [
        request(
            prompt(3 + 5 * i, i),
            ("ar", *MODES)[i % 4],
            lookahead=1 + i % 5,
            max_tokens=5 + 7 * (i % 4),
            params=SamplingParams(temperature=(i % 3) * 0.5, seed=i),
            request_id=str(i),
        )
        for i in range(14)
    ]
    assert outputs(asked, steps=random_steps(5)) == [alone(one) for one in asked]


@pytest.mark.parametrize("backup", ["draft", "ngram", "none"])
@pytest.mark.parametrize("fan_out", ["uniform", "geometric", "confidence"])
def test_every_backup_and_fan_out(backup, fan_out):
    for draft, budget in itertools.product(["twin", "relative", "stranger"], [1, 4, 9]):
        asked = [
            request(prompt(9, 1), lookahead=4, max_tokens=50, params=SamplingParams(temperature=0.8, seed=budget)),
            request(prompt(20, 2), lookahead=4, max_tokens=50),
        ]
        found = outputs(asked, draft, random_steps(budget), backup=backup, fan_out=fan_out, budget=budget)
        assert found == [alone(one) for one in asked]


@pytest.mark.parametrize("backup", ["draft", "ngram", "none"])
@pytest.mark.parametrize("seed", range(6))
def test_a_planner_that_changes_its_mind_every_round_leaves_no_trace(seed, backup):
    for draft in ("twin", "relative"):
        planner = Restless(seed)
        asked = [
            request(prompt(9 + i, seed), lookahead=5, max_tokens=60, params=SamplingParams(0.4 * i, seed=seed))
            for i in range(4)
        ]
        assert outputs(asked, draft, random_steps(seed), planner, backup=backup) == [alone(one) for one in asked]
        assert planner.rounds >= 12


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK])
def test_prompts_that_end_at_block_borders(length):
    for mode in MODES:
        asked = request(prompt(length, 3), mode, lookahead=4, max_tokens=3 * BLOCK)
        assert outputs([asked], steps=random_steps(length)) == [alone(asked)]


@pytest.mark.parametrize("mode", MODES)
def test_every_length_limit_is_met_exactly(mode):
    for max_tokens in range(1, 12):
        asked = request(prompt(10, 4), mode, lookahead=5, max_tokens=max_tokens)
        (found,) = outputs([asked], "twin", 6)
        assert found == alone(asked)
        assert len(found) == max_tokens


@pytest.mark.parametrize("mode", MODES)
def test_the_model_length_ends_a_sequence(mode):
    for length in (150, 158, 159):
        asked = request(prompt(length, 5), mode, lookahead=5, max_tokens=1000)
        (found,) = outputs([asked], "twin", 6)
        assert found == alone(asked)
        assert len(found) == 160 - length


@pytest.mark.parametrize("mode", MODES)
def test_an_end_token_inside_an_accepted_run_ends_the_sequence_there(mode):
    free = alone(request(prompt(12, 6), "ar", max_tokens=60))
    for place in range(1, 30, 3):
        end = free[place]
        expected = free[: free.index(end) + 1]
        asked = request(prompt(12, 6), mode, lookahead=5, max_tokens=60, eos_token_ids=(end,))
        assert outputs([asked], "twin", 6) == [expected]


@settings(max_examples=60, deadline=None)
@given(
    draft=st.sampled_from(["twin", "relative", "stranger"]),
    backup=st.sampled_from(["draft", "ngram", "none"]),
    fan_out=st.sampled_from(["uniform", "geometric", "confidence"]),
    budget=st.integers(1, 10),
    speed=st.integers(0, 2**16),
    plans=st.booleans(),
    many=st.lists(
        st.tuples(
            st.sampled_from(MODES),
            st.integers(1, 60),
            st.integers(0, 5),
            st.sampled_from([0.0, 0.7, 1.0, 2.0]),
            st.integers(1, 100),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_whatever_is_asked_and_however_fast_the_draft_is(draft, backup, fan_out, budget, speed, plans, many):
    asked = [
        request(
            prompt(length, i),
            mode,
            lookahead=lookahead,
            max_tokens=max_tokens,
            params=SamplingParams(temperature=temperature, seed=i),
            request_id=str(i),
        )
        for i, (mode, length, lookahead, temperature, max_tokens) in enumerate(many)
    ]
    planner = Restless(speed, budget=budget) if plans else None
    found = outputs(asked, draft, random_steps(speed), planner, backup=backup, fan_out=fan_out, budget=budget)
    assert found == [alone(one) for one in asked]


def test_losing_the_draft_in_mid_stream_costs_no_token():
    engine = EngineConfig(max_model_len=160, block_size=BLOCK)
    process = in_process(models()["target"], models()["relative"], engine, SpeculationConfig(lookahead=4), 3)
    asked = request(prompt(14, 8), lookahead=4, max_tokens=60, params=SamplingParams(temperature=0.6, seed=8))
    sequence = process.engine.add(asked)
    while process.engine.has_work:
        process.engine.step()
        process.draft.dead = process.draft.dead or sequence.num_output > 20
    assert process.link.drafts.num_lost == 1
    assert tuple(sequence.tokens[sequence.num_prompt :]) == alone(asked)


def test_drafting_really_happens():
    """Identity alone would also hold for a draft that never guesses right."""
    engine = EngineConfig(max_model_len=256)
    process = in_process(models()["target"], models()["twin"], engine, SpeculationConfig(lookahead=4, budget=4), 9)
    (sequence,) = process.run([request(prompt(10), lookahead=4, max_tokens=200)])
    statistics = sequence.statistics()
    assert statistics.num_accepted_tokens == statistics.num_draft_tokens  # a twin is never refused
    assert statistics.hits == statistics.lookups  # and its own continuation is always prepared
    assert (statistics.num_tokens - 1) / statistics.rounds > 4.5


def tokens_a_round(recycle: int, steps: int) -> float:
    """Of a twin that takes `steps` drafting steps in one verification."""
    engine = EngineConfig(max_model_len=256)
    speculation = SpeculationConfig(lookahead=4, budget=4, recycle=recycle)
    process = in_process(models()["target"], models()["twin"], engine, speculation, steps)
    (sequence,) = process.run([request(prompt(10), lookahead=4, max_tokens=200)])
    statistics = sequence.statistics()
    assert statistics.hits >= statistics.lookups - 2
    return (statistics.num_tokens - 1) / statistics.rounds


def test_a_slow_draft_gives_shorter_branches_instead_of_misses():
    """Each round takes two steps of the draft, and each step is one token of the text."""
    assert 1.8 < tokens_a_round(recycle=0, steps=2) < 2.3


def test_recycled_candidates_draft_more_than_one_token_a_step():
    assert tokens_a_round(recycle=2, steps=2) > tokens_a_round(recycle=0, steps=2) + 0.2
