"""Backup `auto` against the best fixed backup, in tokens a simulated second: text that repeats or not, drafts fast or
slow, verifications that are dearer with more rows or not. Table models in the real engine, on a simulated clock.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.leader.link_speculator import Backup
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import request
from tests.simulated import Costs, simulated
from tests.tabular import TabularModel

VOCAB, LOOKAHEAD, TOKENS = 48, 5, 160
FIXED: tuple[Backup, ...] = ("draft", "ngram", "none")
BACKUPS: tuple[Backup, ...] = (*FIXED, "auto")
REPEATS, VARIED = 0.0, 1.0  # temperatures: a greedy table soon goes round in a circle


@functools.cache
def models(noise: float) -> tuple[TabularModel, TabularModel]:
    """A target, and a draft whose logits are so far from its own."""
    generator = torch.Generator().manual_seed(0)
    target_VVV = 3.0 * torch.randn(VOCAB, VOCAB, VOCAB, generator=generator)
    draft_VVV = target_VVV + 3.0 * noise * torch.randn(VOCAB, VOCAB, VOCAB, generator=generator)
    return TabularModel(target_VVV), TabularModel(draft_VVV)


@dataclass(frozen=True)
class World:
    """Costs of forwards in ms, how far the draft is off, how many outcomes it prepares for, and the sequences."""

    costs: Costs
    temperatures: tuple[float, ...]
    noise: float = 0.5
    budget: int = 4

    def run(self, backup: Backup) -> tuple[float, list[list[int]]]:
        """Tokens a simulated second, and the texts."""
        batch = len(self.temperatures)
        engine = EngineConfig(max_model_len=TOKENS + 16, max_num_seqs=batch, block_size=16)
        speculation = SpeculationConfig(lookahead=LOOKAHEAD, budget=self.budget, backup=backup)
        with simulated(self.costs, *models(self.noise), engine, speculation) as (process, clock):
            asked = [
                request(
                    (3 + i, 5, 7, i),
                    lookahead=LOOKAHEAD,
                    max_tokens=TOKENS,
                    params=SamplingParams(temperature, seed=i),
                    request_id=str(i),
                )
                for i, temperature in enumerate(self.temperatures)
            ]
            sequences = process.run(asked)
            return batch * TOKENS / clock.now, [sequence.tokens for sequence in sequences]


FLAT, FLAT_AND_SLOW_DRAFT = Costs(10, 0.05, 0.5, 0.02), Costs(10, 0.05, 7, 0.02)
LINEAR, LINEAR_AND_SLOW_DRAFT = Costs(4, 1.5, 1, 0.1), Costs(4, 1.5, 6, 0.3)

# Each with the best fixed backup and the costs under which it is that.
WORLDS = {
    "draft": World(FLAT, (VARIED,), noise=0.35, budget=1),  # misses are many, a step costs a 20th of a verification
    "ngram": World(FLAT, (REPEATS,) * 2),
    "ngram, slow draft": World(FLAT_AND_SLOW_DRAFT, (REPEATS,)),
    "ngram, rows cost": World(LINEAR, (REPEATS,) * 2),
    "ngram, rows cost, half the text varies": World(LINEAR, (VARIED, REPEATS)),
    "none, slow draft": World(FLAT_AND_SLOW_DRAFT, (VARIED,), noise=0.35),
    "none, rows cost": World(LINEAR, (VARIED,) * 4, noise=0.8),
    "none, rows cost, slow draft": World(LINEAR_AND_SLOW_DRAFT, (VARIED,) * 4),
}


@pytest.mark.parametrize("name", WORLDS)
def test_auto_is_as_fast_as_the_best_fixed_backup(name: str) -> None:
    runs = {backup: WORLDS[name].run(backup) for backup in BACKUPS}
    speeds = {backup: speed for backup, (speed, _) in runs.items()}
    best = name.partition(",")[0]
    assert speeds[best] == max(speeds[backup] for backup in FIXED)
    assert speeds["auto"] >= 0.97 * speeds[best]
    assert all(texts == runs["none"][1] for _, texts in runs.values())


@pytest.mark.parametrize(("mode", "rounds", "steps"), [("ar", 24, 0), ("sd", 4, 4 * LOOKAHEAD), ("ssd", 5, 0)])
def test_the_simulated_clock_counts_forwards_and_what_is_waited_for(mode: str, rounds: int, steps: int) -> None:
    """One verification for the prompt and one a round. A draft that is always right has time enough in `ssd`."""
    target, _ = models(0.5)
    engine = EngineConfig(max_model_len=64, max_num_seqs=1, block_size=16)
    speculation = SpeculationConfig(lookahead=LOOKAHEAD, budget=1, recycle=0)
    with simulated(Costs(10, 0, 1, 0), target, target, engine, speculation) as (process, clock):
        (sequence,) = process.run([request((3, 5, 7), mode, lookahead=LOOKAHEAD, max_tokens=25)])
        assert sequence.measured.rounds == rounds
        assert clock.now == pytest.approx(0.010 * (1 + rounds) + 0.001 * steps)


def test_a_question_waits_for_the_end_of_a_step_that_has_begun() -> None:
    """A draft that is slower than the target is in the midst of its step when the first token comes."""
    target, draft = models(0.5)
    engine = EngineConfig(max_model_len=64, max_num_seqs=1, block_size=16)
    speculation = SpeculationConfig(lookahead=1, budget=1, recycle=0, backup="draft")
    with simulated(Costs(10, 0, 14, 0), target, draft, engine, speculation) as (process, clock):
        sequence = process.engine.add(request((3, 5, 7), lookahead=1, max_tokens=4))
        process.engine.step()
        waited_until = clock.now - 0.010
        assert sequence.measured.misses == 1
        assert waited_until == pytest.approx(2 * 0.014)  # the prompt's, which began with the request; then its own
