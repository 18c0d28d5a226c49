"""What the engine emits at temperature 1 has the model's own distribution, jointly over three tokens.

A random model with a vocabulary of 8, so that all 512 texts of three tokens can be enumerated. Chi-square on fixed
seeds: the outcome is the same at every run.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import in_process, random_steps, request
from tests.tiny_models import PagedRun, tiny_decoder

VOCAB, LENGTH = 8, 3
TRIALS = {"ar": 6000, "ssd": 1500}  # SSD costs more and must give the tokens of AR anyway
PROMPT = (3, 1, 4, 1, 5)
CRITICAL_Z = 3.72  # of the standard normal, one-sided p = 1e-4


def enumerated(model: Decoder, temperature: float) -> torch.Tensor:
    """The probability of every text of LENGTH tokens after PROMPT, from the model's logits; [VOCAB ** LENGTH]."""
    chances = []
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        logits_NV = PagedRun(model).trunk([*PROMPT, *text])
        rows_NV = torch.log_softmax(logits_NV[len(PROMPT) - 1 : -1].double() / temperature, dim=1)
        chances.append(float(sum(rows_NV[i, token] for i, token in enumerate(text)).exp()))
    return torch.tensor(chances, dtype=torch.float64)


def emitted(target: Decoder, draft: Decoder, mode: str, temperature: float) -> torch.Tensor:
    """How often each text came out of the engine, over TRIALS[mode] seeds; [VOCAB ** LENGTH]."""
    engine = EngineConfig(max_model_len=32, max_num_seqs=32, block_size=4)
    process = in_process(target, draft, engine, SpeculationConfig(lookahead=2, budget=32), random_steps(1, 2))
    asked = [
        request(
            PROMPT,
            mode,
            lookahead=2,
            max_tokens=LENGTH,
            params=SamplingParams(temperature=temperature, seed=seed),
            request_id=str(seed),
        )
        for seed in range(TRIALS[mode])
    ]
    counts = torch.zeros(VOCAB**LENGTH, dtype=torch.float64)
    for sequence in process.run(asked):
        first, second, third = sequence.tokens[len(PROMPT) :]
        counts[(first * VOCAB + second) * VOCAB + third] += 1
    return counts


def chi_square_z(observed: torch.Tensor, chances: torch.Tensor) -> float:
    """The chi-square statistic as a standard normal (Wilson-Hilferty); texts expected fewer than 5 times are pooled."""
    expected = chances / chances.sum() * observed.sum()
    common = expected >= 5
    pairs = [*zip(observed[common].tolist(), expected[common].tolist(), strict=True)]
    pairs.append((float(observed[~common].sum()), float(expected[~common].sum())))
    statistic = sum((o - e) ** 2 / e for o, e in pairs if e > 0)
    freedom = sum(e > 0 for _, e in pairs) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize(("mode", "temperature"), [("ar", 1.0), ("ar", 0.7), ("ssd", 1.0)])
def test_three_tokens_have_the_models_joint_distribution(mode, temperature):
    target, draft = tiny_decoder(seed=4, vocab_size=VOCAB), tiny_decoder(seed=5, vocab_size=VOCAB)
    chances = enumerated(target, temperature)
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-4)
    assert chi_square_z(emitted(target, draft, mode, temperature), chances) < CRITICAL_Z


def test_the_test_tells_a_slightly_wrong_distribution():
    """Power: the same counts against temperature 1.15 instead of 1 must be refused."""
    target = tiny_decoder(seed=4, vocab_size=VOCAB)
    observed = emitted(target, target, "ar", 1.0)
    assert chi_square_z(observed, enumerated(target, 1.15)) > CRITICAL_Z
