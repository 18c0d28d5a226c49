"""One forced miss a round in a batch of eight: the other seven lose nothing, in rounds and steps counted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.speculation.cache import SpeculationCache
from ssd_runtime.speculation.types import Outcome
from tests.engines import InProcess, in_process, request
from tests.tiny_models import tiny_decoder

SEQUENCES, LOOKAHEAD, STEPS = 8, 4, 7


class Forgetful(SpeculationCache):
    """Loses what it has of one sequence, another one each time the round changes."""

    victim: int | None = None

    def lookup(self, sequence_id: int, turn: int, outcome: Outcome) -> tuple[int, ...] | None:
        return None if sequence_id == self.victim else super().lookup(sequence_id, turn, outcome)


@dataclass
class Count:
    """What the rounds were in which all eight ran."""

    hit_rows: int = 0
    hit_tokens: int = 0
    missed_rows: int = 0
    waits: int = 0
    steps: int = 0
    rounds: int = 0

    @property
    def tokens_a_hit(self) -> float:
        return self.hit_tokens / self.hit_rows


def run(backup: str, misses: bool) -> Count:
    engine = EngineConfig(max_model_len=256, max_num_seqs=SEQUENCES, block_size=16)
    speculation = SpeculationConfig(lookahead=LOOKAHEAD, budget=4, backup=backup)  # type: ignore[arg-type]
    process = in_process(tiny_decoder(1), tiny_decoder(1), engine, speculation, STEPS)
    cache = process.link._cache = Forgetful()
    count = Count()
    _count_drafting(process, count)
    asked = [
        request((3 + i, 5, 7, 11 * i % 90), lookahead=LOOKAHEAD, max_tokens=200, request_id=f"{i}")
        for i in range(SEQUENCES)
    ]
    sequences = [process.engine.add(one) for one in asked]
    while not all(sequence.turn >= 1 for sequence in sequences):  # prompts are computed one after the other
        process.engine.step()
    count.steps = count.waits = 0
    while all(sequence.finish_reason is None for sequence in sequences) and count.rounds < 12:
        cache.victim = count.rounds % SEQUENCES if misses else None
        before = [(sequence.num_output, sequence.measured.hits) for sequence in sequences]
        process.engine.step()
        count.rounds += 1
        for sequence, (tokens, hits) in zip(sequences, before, strict=True):
            hit = sequence.measured.hits > hits
            count.hit_rows += hit
            count.missed_rows += not hit
            count.hit_tokens += hit * (sequence.num_output - tokens)
    return count


def _count_drafting(process: InProcess, count: Count) -> None:
    grow, wait = process.draft.drafter.grow, process.draft.wait_trees

    def counted_grow():  # type: ignore[no-untyped-def]
        step = grow()
        count.steps += step is not None
        return step

    def counted_wait(timeout_s: float):  # type: ignore[no-untyped-def]
        count.waits += 1
        return wait(timeout_s)

    process.draft.drafter.grow = counted_grow  # type: ignore[method-assign]
    process.draft.wait_trees = counted_wait  # type: ignore[method-assign]


@pytest.mark.parametrize("backup", ["draft", "ngram", "none"])
def test_a_miss_in_one_sequence_costs_the_others_neither_tokens_nor_steps_nor_waiting(backup: str) -> None:
    clean, forced = run(backup, misses=False), run(backup, misses=True)
    assert clean.rounds == forced.rounds == 12
    assert clean.missed_rows == 0
    # The twin's branch is always right: a miss is the forced one, or none is.
    assert forced.missed_rows == forced.rounds
    assert forced.waits == clean.waits == 0
    assert forced.steps <= STEPS * forced.rounds
    assert forced.tokens_a_hit >= 0.95 * clean.tokens_a_hit
    assert clean.tokens_a_hit > LOOKAHEAD
