"""`ssd bench --drafts`: which engines it starts, what it runs in each, and the one report on all of them."""

from __future__ import annotations

from io import StringIO

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from launcher.bench.benchmark import Measured, Workload, measure
from launcher.bench.plan import DraftSetup, engines_by_setup, plan_runs, setups_of
from launcher.bench.report import Results, Setup, results_of
from launcher.bench.tables import runs_table, series_lines, setup_lines, verdict
from launcher.screen import WIDTH_OF_A_FILE
from ssd_runtime.config import SpeculationConfig
from ssd_runtime.errors import ConfigError
from ssd_runtime.speculation.types import SamplingParams
from tests.unit.test_bench import PROMPTS, Player


def results(broken: str | None = None, batches: tuple[int, ...] = (1,)) -> Results:
    """Of engines with one and two drafts; in the second mode `broken` differs."""
    measured: list[Measured] = []
    for engine in engines_by_setup(setups_of("2,1", 8, divide=False), plan_runs(["ar", "sd", "ssd"], [], 4, batches)):
        player = Player(broken if engine.name == "d2" else None)
        workload = Workload(PROMPTS, SamplingParams(seed=7), 13, devices={"ssd": 1 + int(engine.name[1:])})
        measured += measure(player, engine.runs, workload, lambda name: None)
    return results_of(measured, PROMPTS)


SETUPS = [
    Setup(1, 8, {"target": (0,), "draft": (1,)}, shares_cores=False),
    Setup(2, 8, {"target": (0,), "draft 1": (1,), "draft 2": (2,)}, shares_cores=False),
]


def test_modes_without_drafts_run_once_and_the_others_in_every_engine() -> None:
    found = results()
    assert [row.name for row in found.runs] == ["ar", "sd d1", "ssd d1", "sd d2", "ssd d2"]
    assert [(row.drafts, row.budget) for row in found.runs] == [
        (None, None),
        (1, 8),
        (1, 8),
        (2, 8),
        (2, 8),
    ]
    assert [row.speedup for row in found.runs] == [1.0, 1.0, 4.0, 1.0, 4.0]  # over AR of the first engine
    assert found.runs[-1].devices == 3
    assert found.runs[-1].hit_rate == 0.5
    assert msgspec.json.decode(msgspec.json.encode(found), type=Results) == found


def test_the_tokens_of_all_engines_are_compared() -> None:
    found = results()
    assert found.identical_tokens is True
    assert found.compared_outputs == 8  # four runs against AR, two prompts each
    assert verdict(found) == "tokens: identical in all runs (8 outputs compared)"
    differing = results(broken="ssd")
    assert differing.first_divergence.runs == ("ar", "ssd d2")
    assert differing.differing_outputs == 1


@pytest.mark.parametrize(
    ("divide", "budgets"), [(False, [(1, 8), (2, 8), (3, 8), (16, 8)]), (True, [(1, 8), (2, 4), (3, 2), (16, 1)])]
)
def test_each_draft_has_the_budget_of_one_alone_or_a_part_of_it(divide: bool, budgets: list[tuple[int, int]]) -> None:
    found = setups_of("1, 2,3,16", 8, divide=divide)
    assert found == [DraftSetup(*both) for both in budgets]
    engines = engines_by_setup(found, plan_runs(["ssd"], [], 4))
    assert engines[1].overrides == ("deployment.drafts=2", f"speculation.budget={budgets[1][1]}")


def test_the_page_says_budgets_hit_rates_and_speeds() -> None:
    found = results(batches=(1, 2))
    assert series_lines(found) == [
        "hit rate of ssd: 50.0% with 1 draft, 50.0% with 2 drafts",
        "tokens/s of ssd: 400.0 with 1 draft, 400.0 with 2 drafts",
        "hit rate of ssd x2: 50.0% with 1 draft, 50.0% with 2 drafts",
        "tokens/s of ssd x2: 800.0 with 1 draft, 800.0 with 2 drafts",
    ]
    most = "; these are the most, speculation.adapt plans each round"
    assert setup_lines(SETUPS, False, SpeculationConfig(adapt=True)) == [
        f"budgets the same for each draft: 1 x 8 = 8, 2 x 8 = 16{most}",
        "d1: target on core 0, draft on core 1",
        "d2: target on core 0, draft 1 on core 1, draft 2 on core 2",
    ]
    assert (
        setup_lines([replace(SETUPS[1], shares_cores=True)], False, SpeculationConfig())[-1]
        == "ranks of d2 share cores: their drafts hit less often than on cores of their own"
    )
    page = StringIO()
    Console(file=page, width=WIDTH_OF_A_FILE).print(runs_table(found))
    assert "drafts x B" in page.getvalue()
    assert "2 x 8 = 16" in page.getvalue()
    assert "ssd x2 d2" in page.getvalue()


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (
            8,
            [
                "1 x 8 = 8, 3 x 2 = 6",
                "these are not equal in all: 8 cannot be divided by 1, 3; speculation.budget=9 can",
            ],
        ),
        (
            1,
            [
                "1 x 1 = 1, 3 x 1 = 3",
                "these are not equal in all: 1 cannot be divided by 1, 3; speculation.budget=3 can",
            ],
        ),
        (9, ["1 x 9 = 9, 3 x 3 = 9"]),
    ],
)
def test_it_is_said_where_a_budget_cannot_be_divided_evenly(budget: int, said: list[str]) -> None:
    about = [Setup(one.drafts, one.budget, {}, False) for one in setups_of("1,3", budget, divide=True)]
    lines = setup_lines(about, True, SpeculationConfig(adapt=False, budget=budget))
    assert lines[: -len(about)] == [f"budgets divided among the drafts: {said[0]}", *said[1:]]


@pytest.mark.parametrize("text", ["", "0", "1,x", "2,,3", "-1"])
def test_drafts_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--drafts"):
        setups_of(text, 8, divide=False)


def test_a_comparison_of_drafts_needs_a_mode_that_uses_them() -> None:
    with pytest.raises(ConfigError, match="have sd or ssd among --modes"):
        engines_by_setup(setups_of("1,2", 8, divide=False), plan_runs(["ar", "sd-colocated"], [], 4))
