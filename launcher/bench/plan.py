"""What a benchmark runs, and in which engines. Knows no engine that runs.

With `--drafts` and equal budgets each draft does the work of one alone, on a device of its own: D drafts of budget B
prepare for up to D * B outcomes of a sequence. With a divided budget they prepare together for as many as one alone, in
less time each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ssd_runtime.config import MODES, NUMERICS, Config, Mode
from ssd_runtime.errors import ConfigError

DRAFTED = ("sd", "ssd")  # modes that use the drafts' ranks
WIDEST_FIRST: tuple[Mode, ...] = ("ssd", "sd", "sd-colocated", "ar")  # by what an engine in it can serve


@dataclass(frozen=True)
class Run:
    """One row of the table: a mode at one lookahead, with so many requests at once.

    Attributes:
        drafts, budget: of its engine, and of each draft, where their number is compared.
    """

    name: str
    mode: Mode
    lookahead: int
    batch: int = 1
    drafts: int | None = None
    budget: int | None = None


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


@dataclass(frozen=True)
class Engine:
    """One engine of a benchmark.

    Attributes:
        name: tells it from the others; "" where there are none.
        overrides: what it has beside the configuration that all have.
        runs: in this engine.
        setup: its drafts, where these are compared.
    """

    name: str
    overrides: tuple[str, ...]
    runs: tuple[Run, ...]
    setup: DraftSetup | None = None


def plan_runs(
    modes: Sequence[str], lookaheads: Sequence[str], default: int, batches: Iterable[int] = (1,)
) -> list[Run]:
    """The runs of `--modes`, of each `--lookahead mode=K,K,...` and of `--batch`.

    A mode with several K becomes several runs mode@K; a batch of b several runs "mode xb".

    Raises:
        ConfigError: an unknown or repeated mode, or a lookahead that is not a list of numbers for one of the modes.
    """
    chosen: dict[Mode, list[int]] = {}
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes: unknown mode {mode!r}; known: {', '.join(MODES)}")
        if mode in chosen:
            raise ConfigError(f"--modes: {mode} is there twice")
        chosen[mode] = [0 if mode == "ar" else default]
    for text in lookaheads:
        mode, equals, values = text.partition("=")
        if not equals or not (numbers := _numbers(values)):
            raise ConfigError(f"--lookahead {text!r}: expected MODE=K or MODE=K,K,... as in ssd=3,5")
        if mode not in chosen or mode == "ar":
            known = ", ".join(mode for mode in chosen if mode != "ar") or "none that speculates"
            raise ConfigError(f"--lookahead {text!r}: {mode} is not among the modes to run ({known})")
        chosen[mode] = numbers
    runs = []
    for batch in sorted(set(batches)):
        for mode, several in chosen.items():
            for lookahead in several:
                name = (f"{mode}@{lookahead}" if len(several) > 1 else mode) + (f" x{batch}" if batch > 1 else "")
                runs.append(Run(name, mode, lookahead, batch))
    return runs


def parse_numbers(option: str, text: str, kind: str = "requests") -> list[int]:
    """The numbers of an option, ascending; raises ConfigError unless it is a list of numbers above 0."""
    if not (numbers := _numbers(text)):
        raise ConfigError(f"{option} {text!r}: expected numbers of {kind} above 0, as in 1,2,4")
    return numbers


def _numbers(text: str) -> list[int]:
    """Ascending, each once; none where one of them is no number above 0."""
    values = [value.strip() for value in text.split(",")]
    return sorted({int(value) for value in values}) if all(v.isdecimal() and int(v) > 0 for v in values) else []


def setups_of(text: str, budget: int, *, divide: bool) -> list[DraftSetup]:
    """The setups of `--drafts`, ascending.

    Args:
        text: numbers of drafts.
        budget: of one draft alone.
        divide: whether the drafts of a setup divide it, rounded down, at least 1 each; else each has all of it.

    Raises:
        ConfigError: not a list of numbers above 0.
    """
    counts = parse_numbers("--drafts", text, "drafts")
    return [DraftSetup(count, max(1, budget // count) if divide else budget) for count in counts]


def engines_by_setup(setups: Sequence[DraftSetup], runs: Sequence[Run]) -> list[Engine]:
    """An engine for each setup: runs of modes that use drafts are in each, the others in the first only.

    Raises:
        ConfigError: no run uses drafts.
    """
    drafted = [run for run in runs if run.mode in DRAFTED]
    if not drafted:
        raise ConfigError("--drafts compares modes that use drafts: have sd or ssd among --modes")
    engines: list[Engine] = []
    for setup in setups:
        own = [replace(run, name=f"{run.name} {setup.name}", **vars(setup)) for run in drafted]
        others = [] if engines else [run for run in runs if run not in drafted]
        overrides = f"deployment.drafts={setup.drafts}", f"speculation.budget={setup.budget}"
        engines.append(Engine(setup.name, overrides, (*others, *own), setup))
    return engines


def engines_by_numerics(numerics: str | None, runs: Sequence[Run]) -> list[Engine]:
    """An engine for each setting of `--numerics`, one without the option; raises ConfigError for what is no setting."""
    if numerics is None:
        return [Engine("", (), tuple(runs))]
    found = list(dict.fromkeys(value.strip() for value in numerics.split(",")))
    for value in found:
        if value not in NUMERICS:
            raise ConfigError(f"--numerics: unknown {value!r}; known: {', '.join(NUMERICS)}")
    return [Engine(one, (f"engine.numerics={one}",), tuple(runs)) for one in found]


def overrides_for(runs: Sequence[Run], config: Config) -> list[str]:
    """What the engine must be started with so that every run can take place in it."""
    needed = []
    deepest = max(run.lookahead for run in runs)
    if deepest > config.speculation.lookahead:
        needed.append(f"speculation.lookahead={deepest}")
    together = max(run.batch for run in runs)
    if together > config.engine.max_num_seqs:
        needed.append(f"engine.max_num_seqs={together}")
    modes = {run.mode for run in runs}
    widest = next(mode for mode in WIDEST_FIRST if mode in modes)
    if widest != config.speculation.mode:
        needed.append(f"speculation.mode={widest}")
    if "sd-colocated" in modes and not config.deployment.holds_draft(widest):
        needed.append("deployment.colocated=true")
    return needed
