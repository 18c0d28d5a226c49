"""`ssd bench`: modes compared on the same prompts, in as many engines as that takes."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.commands import engine
from launcher.commands.options import check_writable, config_options, connect_option, trace_option, writing
from launcher.commands.sampling import sampling_options, sampling_params
from ssd_runtime.config import MODES, Config, ConfigFile, Mode, load_config
from ssd_runtime.model.random.models import pair_overrides

if TYPE_CHECKING:
    from launcher.bench.benchmark import Run
    from launcher.bench.draft_setups import DraftSetup

DEFAULT_AGREEMENT = 0.85  # of the draft of --random
WIDEST_FIRST: tuple[Mode, ...] = ("ssd", "sd", "sd-colocated", "ar")  # by what an engine in it can serve


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
def bench_command(
    config_file: ConfigFile | None,
    overrides: tuple[str, ...],
    modes: str,
    lookaheads: tuple[str, ...],
    prompts_path: Path | None,
    limit: int | None,
    max_tokens: int,
    batches: str,
    numerics: str | None,
    drafts: str | None,
    divide_budget: bool,
    shapes: str | None,
    agreement: float | None,
    repeat: int,
    out: Path | None,
    connect: str | None,
    trace: Path | None,
    **sampling: Any,
) -> None:
    """Compare modes on the same prompts and seeds, prompt by prompt in one engine."""
    from launcher import screen
    from launcher.bench import benchmark as bench
    from launcher.bench import draft_setups
    from launcher.bench.prompts import read_prompts

    if shapes is not None:
        overrides = (*pair_overrides(shapes, DEFAULT_AGREEMENT if agreement is None else agreement), *overrides)
    config = load_config(config_file, overrides)
    modes_asked = [mode.strip() for mode in modes.split(",")]
    runs = bench.plan_runs(modes_asked, lookaheads, config.speculation.lookahead, bench.parse_batches(batches))
    _check_options(connect, numerics, drafts, divide_budget, shapes, agreement)
    compared = [] if drafts is None else draft_setups.setups_of(drafts, config.speculation.budget, divide=divide_budget)
    prompts = tuple(read_prompts(prompts_path, limit))
    overrides = (*overrides, *overrides_for(runs, config))
    config = load_config(config_file, overrides)
    check_writable(out)
    params = sampling_params(sampling, max_tokens)
    longest = max(prompts, key=lambda prompt: len(prompt.prompt)).prompt
    request = engine.request_for(longest, False, max_tokens, (), None, params)
    engines = _engines(overrides, runs, numerics, compared)
    if connect is None:
        from launcher import preflight  # with the libraries of model files: after what can be told without

        for one in engines:  # all before the first, which takes minutes
            preflight.check_devices(load_config(config_file, one.overrides))
    measured: dict[str, list[bench.Measured]] = {}
    machines: dict[str, dict[str, Any]] = {}
    label: str | None = None
    for one in engines:
        config = load_config(config_file, one.overrides)
        with engine.open_session(config, connect, trace, request) as session:
            devices = bench.devices_by_mode(config, session.cores)
            workload = bench.Workload(prompts, params, max_tokens, repeat, devices)
            with screen.counting(f"benchmark {one.name}".strip(), bench.count_steps(one.runs, workload)) as advance:
                measured[one.name] = bench.measure(session.client, one.runs, workload, advance)
            machines[one.name], label = _machine(session.cores), session.label
    if compared:
        config = load_config(config_file, overrides)  # the rows say in what the engines differ
        report = draft_setups.report_on(compared, measured, machines, prompts) | {"budget_divided": divide_budget}
    else:
        report = bench.join_numerics(
            {name: bench.report_on(measured[name], prompts) | {"machine": machines[name]} for name in measured}
        )
    if report["first_divergence"] and connect is None:
        from launcher.bench.scoring import gap_of_divergence

        report["first_divergence"]["logit_gap"] = gap_of_divergence(report["first_divergence"], config, prompts, params)
    report["workload"] = {
        "prompts": str(prompts_path or "embedded"),
        "num_prompts": len(prompts),
        "max_tokens": max_tokens,
        "repeat": repeat,
        "sampling": sampling,
        "config": config.to_dict(),
    }
    if label is not None:
        report = {"label": label, **report}
    screen.show_bench(report)  # first: a full disk is not to cost what took minutes to measure
    if out is not None:
        with writing(out):
            out.write_text(json.dumps(report, indent=1) + "\n")


@dataclass(frozen=True)
class _Engine:
    """One engine of a benchmark; its name tells it from the others, if there are any."""

    name: str
    overrides: tuple[str, ...]
    runs: list[Run]


def _engines(
    overrides: tuple[str, ...], runs: list[Run], numerics: str | None, compared: Sequence[DraftSetup]
) -> list[_Engine]:
    """The engines to start one after the other."""
    from launcher.bench import benchmark as bench
    from launcher.bench import draft_setups

    if compared:
        pairs = zip(compared, draft_setups.runs_by_setup(compared, runs), strict=True)
        return [_Engine(setup.name, (*overrides, *setup.overrides), own) for setup, own in pairs]
    if numerics is None:
        return [_Engine("", overrides, runs)]
    return [_Engine(one, (*overrides, f"engine.numerics={one}"), runs) for one in bench.parse_numerics(numerics)]


def _check_options(
    connect: str | None,
    numerics: str | None,
    drafts: str | None,
    divide_budget: bool,
    shapes: str | None,
    agreement: float | None,
) -> None:
    """Raise UsageError for options that do not go together."""
    for option, given in (("--numerics", numerics), ("--drafts", drafts), ("--random", shapes)):
        if connect is not None and given is not None:
            raise click.UsageError(f"{option} is the engine's own: give it to ssd up, not together with --connect")
    if drafts is not None and numerics is not None:
        raise click.UsageError("--drafts and --numerics start engines of their own: compare one of them at a time")
    if drafts is None and divide_budget:
        raise click.UsageError("--divide-budget says how the drafts of --drafts share: give that too")
    if shapes is None and agreement is not None:
        raise click.UsageError("--agreement is of the models of --random: give that too")


def overrides_for(runs: Sequence[Any], config: Config) -> list[str]:
    """What the engine must be started with so that every run can take place in it."""
    needed = []
    deepest = max(run.lookahead for run in runs)
    if deepest > config.speculation.lookahead:
        needed.append(f"speculation.lookahead={deepest}")
    together = max(run.batch for run in runs)
    if together > config.engine.max_num_seqs:
        needed.append(f"engine.max_num_seqs={together}")
    modes = {run.mode for run in runs}
    widest: Mode = next(mode for mode in WIDEST_FIRST if mode in modes)
    if widest != config.speculation.mode:
        needed.append(f"speculation.mode={widest}")
    if "sd-colocated" in modes and not config.deployment.holds_draft(widest):
        needed.append("deployment.colocated=true")
    return needed


def _machine(cores: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    import torch

    from cuda_ext import ops
    from ssd_runtime.host import topology

    return {
        "host": platform.node(),
        "hardware": topology.describe().splitlines(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "operators": ops.backend(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "cores": {role: list(numbers) for role, numbers in cores.items()},
    }
