"""Coupling "rejection": whether a token is offered to the target must not depend on which token it is.

Whoever decides how much to speculate, and how long to wait, is replaced by somebody who looks at the very tokens that
are decided on. Nothing of it may show in what is emitted: what the draft has sampled and sent is offered.
"""

from __future__ import annotations

import random

import pytest

from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.leader.link_speculator import LinkSpeculator
from ssd_runtime.speculation.planning.ngrams import NgramIndex
from ssd_runtime.speculation.planning.planner import MeasuredRound
from ssd_runtime.speculation.types import Plan, SamplingParams
from tests.engines import InProcess, request
from tests.enumeration import CRITICAL_Z
from tests.tabular_runs import LOOKAHEAD, PROMPT, Case


class Curious:
    """A planner that looks at what it plans for: longer speculations only of odd tokens.

    Rejection sampling would then see more odd proposals than q has: with 5000 tokens z is 8.3 where the plan cuts.
    """

    process: InProcess

    def __init__(self) -> None:
        self.seen: tuple[int, ...] = ()
        self.shorter = 0  # plans below what is there

    def plan(self, sequences: int) -> Plan:
        (sequence,) = self.process.engine.scheduler.running
        assert sequence.outcome is not None
        branch = self.process.link._cache.lookup(sequence.sequence_id, sequence.turn - 1, sequence.outcome)
        self.seen = (branch or ())[: sequence.most_speculated]
        lookahead = next((place for place, token in enumerate(self.seen) if token % 2 == 0), LOOKAHEAD)
        self.shorter += lookahead < len(self.seen)
        return Plan(lookahead, 10)

    def observe(self, round: MeasuredRound) -> None:
        """What was there when it planned is what was verified."""
        assert self.process.link._proposed is not None
        (speculation,) = self.process.link._proposed.speculations
        assert speculation.tokens == self.seen

    def forget(self) -> None:
        pass


def test_a_plan_takes_back_nothing_that_was_drafted() -> None:
    planner = Curious()
    planner.process = Case(4, {"budget": 10}, planner=lambda: planner).engine(batch=1, tokens=80)
    params = SamplingParams(temperature=1.0, seed=3)
    planner.process.run([request(PROMPT, lookahead=LOOKAHEAD, max_tokens=80, params=params)])
    assert planner.shorter > 10


class Restless:
    """A planner that changes its mind in every round."""

    def __init__(self) -> None:
        self._chance = random.Random(5)

    def plan(self, sequences: int) -> Plan:
        return Plan(self._chance.choice((0, 1, 2, 2, 2)), self._chance.randint(0, 9))

    def observe(self, round: MeasuredRound) -> None:
        pass

    def forget(self) -> None:
        pass


def waits_for_odd_tokens(self: LinkSpeculator, pending: list[Sequence]) -> list[int]:
    """Goes on waiting as long as it dislikes the last token that it has."""
    found = {sequence.sequence_id: (self._lookup(sequence), self._most(sequence)) for sequence in pending}
    if all(len(tokens) >= most or (tokens and tokens[-1] % 2 == 1) for tokens, most in found.values()):
        return []
    return [sequence_id for sequence_id, (tokens, most) in found.items() if len(tokens) < most]


def test_plans_waits_and_backups_that_change_at_will_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(4)
    match = NgramIndex.match

    def some_wait(self: LinkSpeculator, _: object, missed: list[Sequence], may_wait: bool) -> list[Sequence]:
        return [one for one in missed if may_wait and chance.random() < 0.5]

    def some_tokens(self: NgramIndex, tokens: list[int], count: int) -> tuple[int, ...]:
        return match(self, tokens, chance.randint(0, count))

    monkeypatch.setattr(LinkSpeculator, "_pending", some_wait)
    monkeypatch.setattr(NgramIndex, "match", some_tokens)
    monkeypatch.setattr(LinkSpeculator, "_lacking", waits_for_odd_tokens)
    speculation = {"backup": "ngram", "budget": 9, "fan_out": "confidence", "recycle": 2}
    # Few at a time: now and then all of a batch miss, and somebody waits.
    case = Case(5, speculation, steps=None, planner=Restless, hits=(0.1, 0.9))
    for found in case.judge(case.run("at will", requests=5, batch=3)).values():
        assert max(one.z for one in found.values()) < CRITICAL_Z, found
