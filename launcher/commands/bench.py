"""`ssd bench`: modes compared on the same prompts, in as many engines as that takes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from launcher.bench import plan
from launcher.commands import engine
from launcher.commands.options import config_options, connect_option, trace_option
from launcher.commands.sampling import sampling_options
from launcher.files import check_writable, writing
from ssd_runtime.config import MODES, Config, ConfigFile, load_config
from ssd_runtime.model.random.models import pair_overrides
from ssd_runtime.speculation.types import SamplingParams

if TYPE_CHECKING:
    from launcher.bench.benchmark import Measured, Workload
    from launcher.bench.report import Machine, Report

DEFAULT_AGREEMENT = 0.85  # of the draft of --random


@dataclass(frozen=True)
class Asked:
    """The options of `ssd bench` as they were given."""

    config_file: ConfigFile | None
    overrides: tuple[str, ...]
    modes: str
    lookaheads: tuple[str, ...]
    prompts_path: Path | None
    limit: int | None
    max_tokens: int
    params: SamplingParams
    batches: str
    numerics: str | None
    drafts: str | None
    divide_budget: bool
    shapes: str | None
    agreement: float | None
    repeat: int
    out: Path | None
    connect: str | None
    trace: Path | None

    def check(self) -> None:
        """Raise UsageError for options that do not go together."""
        for option, given in (("--numerics", self.numerics), ("--drafts", self.drafts), ("--random", self.shapes)):
            if self.connect is not None and given is not None:
                raise click.UsageError(f"{option} is the engine's own: give it to ssd up, not together with --connect")
        if self.drafts is not None and self.numerics is not None:
            raise click.UsageError("--drafts and --numerics start engines of their own: compare one of them at a time")
        if self.drafts is None and self.divide_budget:
            raise click.UsageError("--divide-budget says how the drafts of --drafts share: give that too")
        if self.shapes is None and self.agreement is not None:
            raise click.UsageError("--agreement is of the models of --random: give that too")


@dataclass(frozen=True)
class Found:
    """What was measured in one engine, and where it ran; `label` is the session's."""

    engine: plan.Engine
    runs: list[Measured]
    machine: Machine
    label: str | None


@click.command(name="bench")
@config_options
@click.option("--modes", default="ar,sd,ssd", show_default=True, help=f"Which of {', '.join(MODES)}.")
@click.option("--lookahead", "lookaheads", multiple=True, metavar="MODE=K[,K...]", help="Try these K for that mode.")
@click.option("--prompts", "prompts_path", type=click.Path(path_type=Path), help="JSON lines of id, set and prompt.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many prompts.")
@click.option("--max-tokens", type=click.IntRange(min=2), default=128, show_default=True)
@sampling_options
@click.option(
    "--batch", "batches", default="1", show_default=True, metavar="N[,N...]", help="So many requests at once."
)
@click.option("--numerics", metavar="NAME[,NAME]", help="fast, invariant or both, to see what it costs.")
@click.option(
    "--drafts",
    metavar="N[,N...]",
    help="So many drafts, an engine each. Every draft has the whole speculation.budget, as on a device of its own.",
)
@click.option(
    "--divide-budget",
    is_flag=True,
    help="With --drafts: N drafts have speculation.budget / N each, rounded down, at least 1.",
)
@click.option("--random", "shapes", metavar="TARGET[,DRAFT]", help="Random weights of these shapes, as in llama-8b.")
@click.option("--agreement", type=click.FloatRange(0, 1), help="With --random: of the draft; 0.85 without.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Measure all of it so often.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to this file.")
@connect_option
@trace_option
def bench_command(**options: Any) -> None:
    """Compare modes on the same prompts and seeds, prompt by prompt in one engine."""
    from launcher.bench import tables
    from launcher.bench.benchmark import Workload
    from launcher.bench.prompts import read_prompts

    asked = Asked(**options)
    asked.check()
    config, engines = _plan(asked)
    workload = Workload(
        tuple(read_prompts(asked.prompts_path, asked.limit)), asked.params, asked.max_tokens, asked.repeat
    )
    check_writable(asked.out)
    if asked.connect is None:
        from launcher import preflight  # with the libraries of model files: after what can be told without

        for _, own in engines:  # all before the first, which takes minutes
            preflight.check_devices(own)
    found = [_measure(one, own, workload, asked) for one, own in engines]
    report = _report(asked, config, workload, found)
    tables.show(report)  # first: a full disk is not to cost what took minutes to measure
    if asked.out is not None:
        with writing(asked.out):
            asked.out.write_text(json.dumps(msgspec.to_builtins(report), indent=1) + "\n")


def _plan(asked: Asked) -> tuple[Config, list[tuple[plan.Engine, Config]]]:
    """The configuration that the report tells of, and the engines to start one after the other, with theirs."""
    overrides = asked.overrides
    if asked.shapes is not None:
        agreement = DEFAULT_AGREEMENT if asked.agreement is None else asked.agreement
        overrides = (*pair_overrides(asked.shapes, agreement), *overrides)
    config = load_config(asked.config_file, overrides)
    modes = [mode.strip() for mode in asked.modes.split(",")]
    batches = plan.parse_numbers("--batch", asked.batches)
    runs = plan.plan_runs(modes, asked.lookaheads, config.speculation.lookahead, batches)
    if asked.drafts is None:
        engines = plan.engines_by_numerics(asked.numerics, runs)
    else:
        setups = plan.setups_of(asked.drafts, config.speculation.budget, divide=asked.divide_budget)
        engines = plan.engines_by_setup(setups, runs)
    overrides = (*overrides, *plan.overrides_for(runs, config))
    found = [(one, load_config(asked.config_file, (*overrides, *one.overrides))) for one in engines]
    # Of several setups of drafts what all have in common; their rows say in what they differ.
    return found[-1][1] if asked.drafts is None else load_config(asked.config_file, overrides), found


def _measure(one: plan.Engine, config: Config, workload: Workload, asked: Asked) -> Found:
    """Start an engine, or take the one that runs already, and run the workload in every mode of it."""
    from launcher import screen
    from launcher.bench.benchmark import count_steps, devices_by_mode, measure
    from launcher.bench.report import this_machine

    longest = max((prompt.prompt for prompt in workload.prompts), key=len)
    request = engine.request_for(longest, False, asked.max_tokens, (), None, asked.params)
    with engine.open_session(config, asked.connect, asked.trace, request) as session:
        own = replace(workload, devices=devices_by_mode(config, session.cores))
        with screen.counting(f"benchmark {one.name}".strip(), count_steps(one.runs, own)) as advance:
            measured = measure(session.client, one.runs, own, advance)
        return Found(one, measured, this_machine(session.cores), session.label)


def _report(asked: Asked, config: Config, workload: Workload, found: list[Found]) -> Report:
    """One report on all engines: with several setups of drafts the tokens of all runs are compared."""
    from launcher.bench.report import Report, Setup, Task, join_numerics, results_of
    from ssd_runtime.host.cores import crowding

    task = Task(
        prompts=str(asked.prompts_path or "embedded"),
        num_prompts=len(workload.prompts),
        max_tokens=workload.max_tokens,
        repeat=workload.repeat,
        sampling=workload.params,
        config=config,
    )
    compared = asked.drafts is not None
    if compared:
        results = results_of(list(chain.from_iterable(one.runs for one in found)), workload.prompts)
    else:
        results = join_numerics({one.engine.name: results_of(one.runs, workload.prompts) for one in found})
    if (where := results.first_divergence) is not None and asked.connect is None:
        from launcher.bench.scoring import gap_of_divergence

        gap = gap_of_divergence(where, config, workload.prompts, workload.params)
        results = msgspec.structs.replace(results, first_divergence=msgspec.structs.replace(where, logit_gap=gap))
    return Report(
        **msgspec.structs.asdict(msgspec.structs.replace(results, label=found[-1].label)),
        machine=found[0].machine,
        workload=task,
        setups=tuple(
            Setup(setup.drafts, setup.budget, one.machine.cores, crowding(one.machine.cores) is not None)
            for one in found
            if (setup := one.engine.setup) is not None
        ),
        budget_divided=asked.divide_budget if compared else None,
    )
