"""K and B by measurement, in worlds where every cost is known: against the best fixed plan and against no speculation.

Time is computed, not measured: a world says what a step and a verification take, and how often the draft is right.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from ssd_runtime.speculation.planning.cost_model import CostModel, Line, expected_tokens
from ssd_runtime.speculation.planning.planner import (
    LONGEST_INTERVAL,
    AdaptivePlanner,
    MeasuredRound,
    Planner,
    drafted_enough,
)
from ssd_runtime.speculation.types import Outcome, Plan, Source, Speculation

MOST = Plan(6, 8)


@dataclass
class World:
    """A target and a draft.

    Attributes:
        verify, step: milliseconds of a forward: fixed, and for each row.
        acceptance: of a draft token.
        miss: chance of a miss with one candidate; falls by the power law.
        contention: how much longer a verification takes while the draft computes.
    """

    verify: tuple[float, float] = (30.0, 0.0)
    step: tuple[float, float] = (4.0, 0.05)
    acceptance: float = 0.8
    miss: float = 0.4
    contention: float = 1.0
    sequences: int = 1

    def run(self, planner: Planner, costs: CostModel, rounds: int, seed: int = 0) -> float:
        """Tokens per millisecond over so many rounds."""
        chance = random.Random(seed)
        tokens, milliseconds = 0, 0.0
        drafted = Plan(0, 0)  # what was drafted during the last verification
        steps_done = 0
        for _ in range(rounds):
            plan = planner.plan(self.sequences)
            ready = min(plan.lookahead, drafted.lookahead, max(0, steps_done - 1))
            missed = chance.random() < min(1.0, self.miss * max(1, drafted.budget) ** -0.75) if ready else True
            length, waited = (0 if missed else ready), 0.0
            if not length and self.sequences == 1:  # waits as the engine does
                while not drafted_enough(costs, [length], [plan.lookahead]):
                    length, waited = length + 1, waited + self._step(1)
                    costs.drafted(self._step(1) / 1e3, 1)
            accepted = [self._accepted(chance, length) for _ in range(self.sequences)]
            verify = self._cost(self.verify, self.sequences * (1 + length))
            verify *= self.contention if plan.lookahead else 1.0
            step = self._step(1 + plan.budget)
            steps_done = int(verify / step) if plan.lookahead else 0
            for _ in range(min(steps_done, 7)):
                costs.drafted(step / 1e3, self.sequences * (1 + plan.budget))
            speculation = Speculation((1,) * length, Source.DRAFT if length else Source.NONE)
            outcomes = [Outcome(count, 1) for count in accepted]
            costs.verified([speculation] * self.sequences, outcomes, verify / 1e3)
            came = sum(accepted) + self.sequences
            lookups = self.sequences if plan.lookahead else 0
            hits = 0 if missed else lookups
            planner.observe(MeasuredRound(self.sequences, came, (waited + verify) / 1e3, hits, lookups))
            tokens += came
            milliseconds += waited + verify
            drafted = plan
        return tokens / milliseconds

    def _cost(self, line: tuple[float, float], rows: int) -> float:
        return line[0] + line[1] * rows

    def _step(self, rows_a_sequence: int) -> float:
        return self._cost(self.step, self.sequences * rows_a_sequence)

    def _accepted(self, chance: random.Random, length: int) -> int:
        return next((k for k in range(length) if chance.random() >= self.acceptance), length)

    @property
    def plain(self) -> float:
        return self.sequences / self._cost(self.verify, self.sequences)


class Always:
    """A fixed plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, sequences: int) -> Plan:
        return self._plan

    def observe(self, round: MeasuredRound) -> None:
        pass

    def forget(self) -> None:
        pass


def adaptive() -> tuple[AdaptivePlanner, CostModel]:
    costs = CostModel()
    return AdaptivePlanner(MOST.lookahead, MOST.budget, costs), costs


HOPELESS = {
    "a draft that is never right": World(acceptance=0.02, miss=0.9, contention=1.3),
    "verification priced by the row": World(verify=(2.0, 28.0), acceptance=0.4),
    "a full batch": World(verify=(2.0, 10.0), acceptance=0.5, sequences=8),
    "a draft as slow as the target": World(step=(40.0, 0.5), acceptance=0.6, contention=1.2),
}
GOOD = {
    "a fast draft": World(),
    "a sure draft": World(acceptance=0.95, miss=0.1),
    "a batch": World(verify=(30.0, 0.5), sequences=4, acceptance=0.85, miss=0.15),
    "a draft that feels every row": World(step=(2.0, 0.8), acceptance=0.9, miss=0.2),
    "rows that cost the target": World(verify=(25.0, 5.0), acceptance=0.7),
}


@pytest.mark.parametrize("world", HOPELESS.values(), ids=HOPELESS)
def test_where_speculation_does_not_pay_it_ends_and_costs_next_to_nothing(world: World) -> None:
    planner, costs = adaptive()
    world.run(planner, costs, 400)
    assert [planner.plan(world.sequences).lookahead for _ in range(10)].count(0) >= 8
    assert world.run(planner, costs, 4000) > 0.97 * world.plain


@pytest.mark.parametrize("world", GOOD.values(), ids=GOOD)
def test_where_it_pays_it_is_nearly_as_fast_as_the_best_fixed_plan(world: World) -> None:
    planner, costs = adaptive()
    world.run(planner, costs, 200)
    found = world.run(planner, costs, 3000)
    fixed = {
        (k, b): world.run(Always(Plan(k, b)), CostModel(), 1500)
        for k in range(1, MOST.lookahead + 1)
        for b in (1, 2, 4, 6, 8)
    }
    assert found > 1.1 * world.plain
    assert found > 0.9 * max(fixed.values()), max(fixed, key=fixed.__getitem__)


def test_a_draft_that_becomes_good_again_is_used_again() -> None:
    planner, costs = adaptive()
    HOPELESS["a draft that is never right"].run(planner, costs, 600)
    assert planner.plan(1).lookahead == 0
    world = World(acceptance=0.95, miss=0.05)
    world.run(planner, costs, 4000)
    assert world.run(planner, costs, 1000) > 1.5 * world.plain


def test_the_looks_at_the_other_side_become_rare() -> None:
    planner, costs = adaptive()
    world = World()
    world.run(planner, costs, 3000)
    plans = []

    class Seen(Always):
        def plan(self, sequences: int) -> Plan:
            plans.append(planner.plan(sequences))
            return plans[-1]

        def observe(self, round: MeasuredRound) -> None:
            planner.observe(round)

    world.run(Seen(MOST), costs, LONGEST_INTERVAL)
    assert sum(plan.lookahead == 0 for plan in plans) <= 4
    assert all(plan.lookahead <= MOST.lookahead and plan.budget <= MOST.budget for plan in plans)


def test_the_same_rounds_give_the_same_plans() -> None:
    """By rounds counted, not by a clock or a random number."""
    worlds = [World(), HOPELESS["a full batch"]]
    for world in worlds:
        rates = []
        for _ in range(2):
            planner, costs = adaptive()
            rates.append(world.run(planner, costs, 500))
        assert rates[0] == rates[1]


def test_every_batch_size_has_a_plan_of_its_own() -> None:
    planner, costs = adaptive()
    World().run(planner, costs, 300)
    World(verify=(2.0, 30.0), acceptance=0.3, sequences=8).run(planner, costs, 600)
    assert [planner.plan(8).lookahead for _ in range(4)].count(0) >= 3
    assert [planner.plan(1).lookahead for _ in range(4)].count(0) == 0


def test_no_lookahead_is_no_speculation() -> None:
    planner = AdaptivePlanner(0, 8, CostModel())
    assert {planner.plan(1).lookahead for _ in range(100)} == {0}


def test_a_line_is_found_and_never_falls() -> None:
    line = Line()
    line.observe(4, 0.020)
    assert line.at(1) == line.at(100) == pytest.approx(0.020)  # one point has no slope
    for rows in (1, 2, 8, 16) * 20:
        line.observe(rows, 0.010 + 0.002 * rows)
    assert line.at(4) == pytest.approx(0.018, rel=0.05)
    assert line.at(30) == pytest.approx(0.070, rel=0.05)
    falling = Line()
    for rows in (1, 2, 3) * 9:
        falling.observe(rows, 1.0 / rows)
    assert falling.at(10) == falling.at(1) > 0


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_expected_tokens_are_the_sum_of_powers(acceptance: float) -> None:
    for length in range(8):
        assert expected_tokens(length, acceptance) == pytest.approx(sum(acceptance**k for k in range(length + 1)))
