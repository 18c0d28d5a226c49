"""A hundred thousand tokens under every combination of policies: not one differs from plain decoding.

The target is one layer deep and everything is served in batches, so that so many tokens take a minute on one core.
"""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.speculation.planning.planner import MeasuredRound
from ssd_runtime.speculation.types import Plan, SamplingParams
from tests.engines import in_process, random_steps, request
from tests.tiny_models import CPU, RandomWeights, tiny_architecture

ENGINE = EngineConfig(max_model_len=512, max_num_seqs=8, block_size=16)
LENGTH, BATCH, EXAMPLES = 440, 8, 6
LOOKAHEAD = 5


@functools.cache
def models() -> dict[str, Decoder]:
    """One layer: a target, a draft that is a little off, and a stranger."""
    arch = tiny_architecture(num_layers=1, vocab_size=64, hidden_size=16, num_heads=2, num_kv_heads=1)
    weights, relative = RandomWeights(arch, seed=1), RandomWeights(arch, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in relative._tensors.items():
        relative._tensors[name] = tensor + 0.03 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    named = {"target": weights, "relative": relative, "stranger": RandomWeights(arch, seed=3)}
    return {name: decoder_from_weights(source, "fp32", CPU) for name, source in named.items()}


def asked(index: int, mode: str, lookahead: int) -> Request:
    """Request `index` of a fixed stock, in some mode: prompts and temperatures of all kinds."""
    chance = random.Random(index)
    prompt = tuple(chance.randrange(64) for _ in range(1 + index * 5 % 50))
    params = SamplingParams(temperature=(0.0, 0.3, 0.7, 1.0, 1.5)[index % 5], seed=index, top_p=(1.0, 0.9)[index % 2])
    return request(prompt, mode, lookahead=lookahead, max_tokens=LENGTH - index, params=params, request_id=str(index))


@functools.cache
def plain() -> list[list[int]]:
    """What plain decoding gives each request of the stock."""
    process = in_process(models()["target"], models()["relative"], ENGINE)
    return [sequence.tokens for sequence in process.run([asked(index, "ar", 0) for index in range(3 * BATCH)])]


class Restless:
    """A planner that changes its mind in every round."""

    def __init__(self, seed: int, budget: int) -> None:
        self._chance, self._budget = random.Random(seed), budget

    def plan(self, sequences: int) -> Plan:
        return Plan(self._chance.randint(0, LOOKAHEAD), self._chance.randint(1, self._budget))

    def observe(self, round: MeasuredRound) -> None:
        pass

    def forget(self) -> None:
        pass


CHECKED: list[int] = []  # tokens of each example


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate],
)
@given(
    draft=st.sampled_from(["relative", "relative", "relative", "stranger"]),
    backup=st.sampled_from(["draft", "ngram", "none"]),
    fan_out=st.sampled_from(["uniform", "geometric", "confidence"]),
    budget=st.integers(2, 8),
    recycle=st.integers(0, 3),
    restless=st.booleans(),
    seed=st.integers(0, 2**16),
    modes=st.lists(st.sampled_from(["ssd", "ssd", "ssd", "sd", "sd-colocated"]), min_size=BATCH, max_size=BATCH),
    lookaheads=st.lists(st.integers(1, LOOKAHEAD), min_size=BATCH, max_size=BATCH),
)
def check(draft, backup, fan_out, budget, recycle, restless, seed, modes, lookaheads):
    speculation = SpeculationConfig(
        lookahead=LOOKAHEAD,
        fan_out=fan_out,
        budget=budget,
        recycle=recycle,
        backup=backup,
    )
    planner = Restless(seed, budget) if restless else None
    process = in_process(models()["target"], models()[draft], ENGINE, speculation, random_steps(seed, most=6), planner)
    chosen = random.Random(seed).sample(range(3 * BATCH), BATCH)
    requests = [asked(index, mode, k) for index, mode, k in zip(chosen, modes, lookaheads, strict=True)]
    found = [sequence.tokens for sequence in process.run(requests)]
    assert found == [plain()[index] for index in chosen]
    process.assert_all_blocks_are_back()
    CHECKED.append(sum(len(tokens) - len(one.prompt_tokens) for tokens, one in zip(found, requests, strict=True)))


@pytest.mark.parametrize("part", range(5))
def test_a_hundred_thousand_tokens_in_five_parts_are_those_of_plain_decoding(part):
    CHECKED.clear()
    check()
    assert sum(CHECKED) >= 20_000
