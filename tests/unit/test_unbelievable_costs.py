"""What a draft says of its steps, however absurd, breaks no arithmetic and is forgotten with its link."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.config import EngineConfig, Mode, SpeculationConfig
from ssd_runtime.leader.link_speculator import IDLE_SIGNS
from ssd_runtime.speculation.planning.cost_model import MOST_SECONDS, CostModel, Line
from ssd_runtime.speculation.planning.planner import AdaptivePlanner, MeasuredRound, drafted_enough
from ssd_runtime.speculation.types import Outcome, Plan, Source, Speculation, TreeFrame
from tests.engines import SteppedDraft, in_process, request
from tests.tiny_models import tiny_decoder

ABSURD = st.sampled_from([0.0, -1.0, 5e-324, 1e-9, 1e300, math.inf, -math.inf, math.nan]) | st.floats()
ROWS = st.sampled_from([-1, 0, 1, 7, 2**31, 2**63, 2**200]) | st.integers(0, 40)
LENGTHS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4)


def verify(costs: CostModel, lengths: list[tuple[int, int]], seconds: float, drafts: int) -> None:
    speculations = [Speculation((1,) * length, Source.DRAFT) for length, _ in lengths]
    outcomes = [Outcome(min(length, accepted), 2) for length, accepted in lengths]
    costs.verified(speculations, outcomes, seconds, drafts)


STEPS = st.lists(
    st.tuples(st.just("drafted"), ABSURD, ROWS)
    | st.tuples(st.just("verified"), ABSURD, LENGTHS, st.integers(1, 4))
    | st.tuples(st.just("ended"), ABSURD)
    | st.just(("forget",)),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, sequences=st.integers(1, 8), lookahead=st.integers(0, 5), budget=st.integers(1, 9))
def test_whatever_was_observed_there_is_a_plan_and_an_end_of_waiting(
    steps: list[tuple], sequences: int, lookahead: int, budget: int
) -> None:
    costs = CostModel()
    planner = AdaptivePlanner(lookahead, budget, costs)
    for step in steps:
        if step[0] == "drafted":
            costs.drafted(*step[1:])
        elif step[0] == "verified":
            verify(costs, step[2], step[1], step[3])
        elif step[0] == "ended":
            planner.observe(MeasuredRound(sequences, sequences, min(max(0.0, step[1]), MOST_SECONDS), 0, sequences))
        else:
            costs.forget_drafts()
            planner.forget()
        plan = planner.plan(sequences)
        assert 0 <= plan.lookahead <= lookahead
        assert 0 <= plan.budget <= budget
        assert drafted_enough(costs, [0, 2], [lookahead, 2]) in (True, False)
        for line in (costs.step, costs.verification):
            assert not line.known or all(0.0 < line.at(rows) < math.inf for rows in (0, 1, 40, 2**16))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 2**16), st.floats(1e-6, 3600)), min_size=1, max_size=30), st.floats(0, 2**16))
def test_a_line_is_above_zero_everywhere(points: list[tuple[float, float]], rows: float) -> None:
    line = Line()
    for at, seconds in points:
        line.observe(at, seconds)
    assert 0.0 < line.at(rows) < math.inf


class Liar(SteppedDraft):
    """Reports what it likes of its steps."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.says = (1, 1)

    def poll_trees(self) -> list[TreeFrame]:
        step_us, rows = self.says
        return [replace(tree, step_us=step_us, step_rows=rows) for tree in super().poll_trees()]


def test_a_draft_that_lies_about_its_steps_costs_no_token_and_is_forgotten_when_it_goes() -> None:
    engine, speculation = EngineConfig(max_model_len=256), SpeculationConfig(lookahead=3, budget=4)
    asked = request((1, 2, 3), "ssd", max_tokens=150, request_id="ssd")
    (plain,) = in_process(tiny_decoder(0), tiny_decoder(1), engine).run([replace(asked, mode="ar")])
    process = in_process(tiny_decoder(0), tiny_decoder(1), engine, speculation, make_rank=Liar)
    costs = process.link._costs
    process.link._planner = planner = AdaptivePlanner(3, 4, costs)
    lies = [(1, 1), (1, 2**62), (2**62, 1), (2**62, 2**62), (1, 0)]
    sequence = process.engine.add(asked)
    for round in range(30):
        process.draft.says = lies[round % len(lies)]  # type: ignore[attr-defined]
        process.engine.step()
    assert costs.step.known
    assert costs.step_seconds.value is not None
    assert costs.step_seconds.value <= process.link.drafts.deadline
    assert planner._batches
    process.drop_draft()
    process.link.check()
    assert not costs.step.known
    assert costs.step_seconds.value is costs.token_seconds.value is costs.steps_per_token.value is None
    assert not planner._batches
    assert costs.verification.known, "what the target knows of itself stays"
    process.bring_draft_back()
    while process.engine.has_work:
        process.engine.step()
    assert sequence.tokens == plain.tokens


def test_a_hopeless_draft_that_is_replaced_is_no_reason_not_to_try_the_next() -> None:
    costs = CostModel()
    planner = AdaptivePlanner(4, 8, costs)
    for _ in range(2000):
        plan = planner.plan(1)
        costs.drafted(10.0, 9)
        verify(costs, [(plan.lookahead, 0)], 0.01 * (1 + plan.lookahead), 1)
        planner.observe(MeasuredRound(1, 1, 0.01 * (1 + plan.lookahead)))
    assert planner.plan(1) == Plan(0, 0)
    costs.forget_drafts()
    planner.forget()
    assert planner.plan(1) == Plan(4, 8)


def test_a_flood_of_steps_between_two_rounds_takes_no_memory() -> None:
    process = in_process(tiny_decoder(0), tiny_decoder(0))
    flood = [TreeFrame(0, (), step_us, 3) for step_us in range(1, 5000)]
    process.draft.poll_trees = lambda: flood  # type: ignore[method-assign]
    process.link.check()
    assert len(process.link._steps) <= 256


class Talker(SteppedDraft):
    """Speaks whenever it is waited for, for ever, and drafts nothing."""

    waits = 0

    def wait_trees(self, timeout_s: float) -> list[TreeFrame]:
        self._raise_if_dead()
        self.waits += 1
        return [TreeFrame(0, (), 1, 1)]


@pytest.mark.parametrize("mode", ["sd", "ssd"])
def test_a_draft_that_speaks_without_drafting_holds_up_no_round_for_long(mode: Mode) -> None:
    engine = EngineConfig(max_model_len=256)
    asked = request((1, 2, 3), mode, max_tokens=20)
    (plain,) = in_process(tiny_decoder(0), tiny_decoder(1), engine).run([replace(asked, mode="ar")])
    process = in_process(tiny_decoder(0), tiny_decoder(1), engine, steps=0, make_rank=Talker)
    (sequence,) = process.run([asked])
    assert sequence.tokens == plain.tokens
    rounds = sequence.statistics().rounds
    assert isinstance(process.draft, Talker)
    assert rounds < process.draft.waits <= IDLE_SIGNS * rounds
