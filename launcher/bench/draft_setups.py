"""`ssd bench --drafts`: the same workload with 1, 2, 3 drafts. The engines that takes, and one report on them.

With equal budgets each draft does the work of one alone, on a device of its own: D drafts of budget B prepare for up to
D * B outcomes of a sequence. With a divided budget they prepare together for as many as one alone, in less time each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from launcher.bench import benchmark as bench
from launcher.bench.benchmark import Measured, Run
from launcher.bench.prompts import Prompt
from ssd_runtime.errors import ConfigError

DRAFTED = ("sd", "ssd")  # modes that use the drafts' ranks


@dataclass(frozen=True)
class DraftSetup:
    """The drafts of one engine.

    Attributes:
        drafts: how many.
        budget: B of each.
    """

    drafts: int
    budget: int

    @property
    def name(self) -> str:
        """Behind the mode in the name of a run."""
        return f"d{self.drafts}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes an engine have this setup."""
        return f"deployment.drafts={self.drafts}", f"speculation.budget={self.budget}"


def setups_of(text: str, budget: int, *, divide: bool) -> list[DraftSetup]:
    """The setups of `--drafts`, ascending.

    Args:
        text: numbers of drafts.
        budget: of one draft alone.
        divide: whether the drafts of a setup divide it, rounded down, at least 1 each; else each has all of it.

    Raises:
        ConfigError: not a list of numbers above 0.
    """
    if not all(value.strip().isdigit() and int(value) > 0 for value in text.split(",")):
        raise ConfigError(f"--drafts {text!r}: expected numbers of drafts above 0, as in 1,2,3")
    counts = sorted({int(value) for value in text.split(",")})
    return [DraftSetup(count, max(1, budget // count) if divide else budget) for count in counts]


def runs_by_setup(setups: Sequence[DraftSetup], runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each setup's engine: those of modes that use drafts in each, the others in the first only.

    Raises:
        ConfigError: no run uses drafts.
    """
    drafted = [run for run in runs if run.mode in DRAFTED]
    if not drafted:
        raise ConfigError("--drafts compares modes that use drafts: have sd or ssd among --modes")
    named = [
        [replace(run, name=f"{run.name} {setup.name}", drafts=setup.drafts, budget=setup.budget) for run in drafted]
        for setup in setups
    ]
    named[0] = [run for run in runs if run not in drafted] + named[0]
    return named


def report_on(
    setups: Sequence[DraftSetup],
    measured: Mapping[str, Sequence[Measured]],
    machines: Mapping[str, Mapping[str, Any]],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """One report on all engines; the tokens of all runs are compared.

    Args:
        measured, machines: by the setup's name.
    """
    from ssd_runtime.host.cores import crowding

    about = []
    for setup in setups:
        cores = machines[setup.name]["cores"]
        shares = crowding(cores) is not None
        about.append({"drafts": setup.drafts, "budget": setup.budget, "cores": cores, "shares_cores": shares})
    found = bench.report_on(list(chain.from_iterable(measured.values())), prompts)
    return found | {"machine": machines[setups[0].name], "setups": about}
