"""The command line `ssd`. Parses, checks, hands over, prints; every error is one line and an exit code.

Exit codes: 0 done, 1 something broke, 2 something the user can mend, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from launcher.sampling_options import sampling_options, sampling_params
from launcher.slurm_cli import slurm
from launcher.study.command import study
from ssd_runtime import __version__, logs
from ssd_runtime.config import MODES, Config, Mode, load_config
from ssd_runtime.errors import ConfigError, RequestError, SsdError
from ssd_runtime.speculation.types import SamplingParams

if TYPE_CHECKING:
    from launcher.nodes import Nodes
    from launcher.session import Session
    from launcher.torchrun import Launch
    from ssd_runtime.comm.messages import Generate
    from ssd_runtime.topology import Group, Role

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 300.0  # longest silence of an engine that has answered before; long prompts take their time
UP_POLL_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        logs.setup("launcher")
        result = ssd.main(args=arguments, prog_name="ssd", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except SsdError as error:
        log.debug("traceback", exc_info=True)
        return _fail(str(error), 2 if isinstance(error, ConfigError | RequestError) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: keep the flush at exit quiet
        return 1
    except Exception as error:  # the last resort: a traceback is not for users
        log.debug("traceback", exc_info=True)
        remedy = "this is a bug; SSD_LOG=debug shows the traceback"
        return _fail(f"unexpected {type(error).__name__}: {error} ({remedy})", 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"ssd: error: {' '.join(message.split())}", err=True)
    return code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_config_options = _options(
    click.option(
        "--config", "config_path", type=click.Path(path_type=Path), help="TOML file; the defaults without it."
    ),
    click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one configuration key."
    ),
)
_connect_option = click.option("--connect", metavar="ADDRESS", help="Use the engine that runs there (see ssd up).")
_trace_option = click.option(
    "--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write a Perfetto/Chrome trace of both roles."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ssd")
def ssd() -> None:
    """Speculative speculative decoding: the draft prepares the next speculation while the target verifies this one."""


@ssd.command()
@_config_options
@click.option("--prompt", "-p", required=True, help="What to answer; - reads standard input.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@sampling_options
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--mode", type=click.Choice(MODES), help="Default: speculation.mode.")
@click.option("--lookahead", type=click.IntRange(min=0), help="Most draft tokens a round; default: the engine's.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--n", type=click.IntRange(1, 128), default=1, show_default=True, help="Answers; i has seed SEED + i.")
@click.option("--logprobs", type=click.IntRange(0, 20), help="With --json: log-probabilities, so many alternatives.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON at the end, nothing else.")
@_connect_option
@_trace_option
def generate(
    config_path: Path | None,
    overrides: tuple[str, ...],
    prompt: str,
    max_tokens: int,
    stop: tuple[str, ...],
    mode: Mode | None,
    lookahead: int | None,
    raw: bool,
    n: int,
    logprobs: int | None,
    as_json: bool,
    connect: str | None,
    trace: Path | None,
    **sampling: Any,
) -> None:
    """Answer one prompt."""
    from launcher import answers, bench, preflight

    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are part of the JSON: give --json too")
    if mode is not None:
        overrides = (*overrides, f"speculation.mode={mode}")
    if lookahead is not None:
        overrides = (*overrides, f"speculation.lookahead={lookahead}")
    config = load_config(config_path, overrides)
    if prompt == "-":
        prompt = sys.stdin.read()
    request = _request(prompt, raw, max_tokens, stop, mode, sampling_params(sampling, max_tokens))
    streams = not as_json and n == 1
    request = replace(request, lookahead=lookahead, stream=streams, logprobs=logprobs, n=n)
    preflight.check_not_empty(request)
    with _session(config, config_path, overrides, connect, trace, request) as session:
        try:
            generation = bench.generate(session.client, request, _stream if streams else _nothing)
        finally:
            if streams:
                click.echo()
        if as_json:
            click.echo(json.dumps(answers.as_json(generation)))
        else:
            if not streams:
                click.echo(answers.as_text(generation))
            click.echo(answers.summary_line(generation, session.cores), err=True)


@ssd.command(name="bench")
@_config_options
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
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Measure all of it so often.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to this file.")
@_connect_option
@_trace_option
def bench_command(
    config_path: Path | None,
    overrides: tuple[str, ...],
    modes: str,
    lookaheads: tuple[str, ...],
    prompts_path: Path | None,
    limit: int | None,
    max_tokens: int,
    batches: str,
    numerics: str | None,
    repeat: int,
    out: Path | None,
    connect: str | None,
    trace: Path | None,
    **sampling: Any,
) -> None:
    """Compare modes on the same prompts and seeds, prompt by prompt in one engine."""
    from launcher import bench, screen
    from launcher.prompts import read_prompts

    config = load_config(config_path, overrides)
    modes_asked = [mode.strip() for mode in modes.split(",")]
    runs = bench.plan_runs(modes_asked, lookaheads, config.speculation.lookahead, bench.parse_batches(batches))
    settings = [config.engine.numerics] if numerics is None else bench.parse_numerics(numerics)
    if connect is not None and numerics is not None:
        raise click.UsageError("--numerics is the engine's own: give it to ssd up, not together with --connect")
    prompts = tuple(read_prompts(prompts_path, limit))
    overrides = (*overrides, *_overrides_for(runs, config))
    config = load_config(config_path, overrides)
    _check_writable(out)
    params = sampling_params(sampling, max_tokens)
    longest = max(prompts, key=lambda prompt: len(prompt.prompt)).prompt
    request = _request(longest, False, max_tokens, (), None, params)
    reports = {}
    for setting in settings:
        own = overrides if numerics is None else (*overrides, f"engine.numerics={setting}")
        config = load_config(config_path, own)
        with _session(config, config_path, own, connect, trace, request) as session:
            devices = bench.devices_by_mode(config, session.cores)
            workload = bench.Workload(prompts, params, max_tokens, repeat, devices)
            with screen.counting("benchmark", bench.count_steps(runs, workload)) as advance:
                reports[setting] = bench.measure(session.client, runs, workload, advance)
            reports[setting]["machine"] = _machine(session.cores)
    report = bench.join_numerics(reports)
    if report["first_divergence"] and connect is None:
        from launcher.scoring import gap_of_divergence

        report["first_divergence"]["logit_gap"] = gap_of_divergence(report["first_divergence"], config, prompts, params)
    report["workload"] = {
        "prompts": str(prompts_path or "embedded"),
        "num_prompts": len(prompts),
        "max_tokens": max_tokens,
        "repeat": repeat,
        "sampling": sampling,
        "config": config.to_dict(),
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    screen.show_bench(report)


@ssd.command()
@_config_options
@_trace_option
@click.option("--nnodes", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes of the world.")
@click.option("--node-rank", type=click.IntRange(min=0), default=0, show_default=True, help="Of this node; 0 leads.")
@click.option("--rendezvous", metavar="HOST:PORT", help="Of node 0, the same on all nodes.")
@click.option("--nproc-per-node", type=click.IntRange(min=1), help="Ranks on this node, if not the same on all.")
@click.option("--role", type=click.Choice(["target", "draft"]), help="Start only these ranks: both may fail apart.")
@click.option("--target", metavar="HOST:PORT", help="With --role draft: the address that the target prints.")
def up(
    config_path: Path | None,
    overrides: tuple[str, ...],
    trace: Path | None,
    nnodes: int,
    node_rank: int,
    rendezvous: str | None,
    nproc_per_node: int | None,
    role: Role | None,
    target: str | None,
) -> None:
    """Keep an engine running for `ssd generate --connect` until Ctrl-C or SIGTERM.

    On several nodes, run it on each with the same --nnodes and --rendezvous. To let target and draft fail apart, run
    it once with --role target and once with --role draft --target HOST:PORT; a draft may come, go and come back.
    """
    from launcher.nodes import Nodes
    from launcher.torchrun import Launch
    from ssd_runtime.topology import group_of

    group = group_of(role, target)
    nodes = Nodes(nnodes, node_rank, rendezvous, nproc_per_node or 0)
    config = load_config(config_path, overrides)
    overrides = (*overrides, *nodes.overrides(config))
    config = load_config(config_path, overrides)
    try:
        if not nodes.leads or role == "draft":
            _stay(Launch(config, config_path, overrides, trace, nodes, group))
            return
        with _session(config, config_path, overrides, None, trace, None, nodes, group) as session:
            from launcher import screen

            click.echo(f"address: {session.address}")
            click.echo(f"cores: {screen.cores_line(session.cores)}")
            click.echo(f"use it: ssd generate --connect {session.address} --prompt 'Hello'  (Ctrl-C ends it)")
            assert session.ranks is not None, "up starts its own ranks"
            while session.ranks.is_running():
                time.sleep(UP_POLL_S)
            session.ranks.raise_unless_ended_well()
    except KeyboardInterrupt:
        click.echo("engine stopped", err=True)


@ssd.command()
@_config_options
def doctor(config_path: Path | None, overrides: tuple[str, ...]) -> int:
    """Say whether this machine can run the configuration."""
    from launcher import doctor as physician
    from launcher import screen

    findings = list(physician.examine(load_config(config_path, overrides)))
    screen.console().print(screen.findings_table(findings))
    failed = [finding.subject for finding in findings if not finding.ok]
    click.echo(f"FAIL: {', '.join(failed)}" if failed else "OK: this configuration can run here")
    return 1 if failed else 0


@ssd.command()
@click.argument("names", nargs=-1)
@_config_options
def fetch(names: tuple[str, ...], config_path: Path | None, overrides: tuple[str, ...]) -> None:
    """Bring embedded models into the cache: NAMES, or those the configuration uses."""
    from launcher import screen
    from ssd_runtime.model.catalogue import CATALOGUE, resolve
    from ssd_runtime.model.fetch import fetch as fetch_model

    config = load_config(config_path, overrides)
    for name in names or dict.fromkeys([config.target.model, config.draft.model]):
        if not names and name not in CATALOGUE:
            click.echo(f"{name}: {resolve(name)}")  # the user's own file: there, or an error
            continue
        with screen.fetching(f"fetch {name}") as progress:
            path = fetch_model(name, progress)
        click.echo(f"{name}: {path}")


ssd.add_command(slurm)


def _stay(launch: Launch) -> None:
    """Ranks that are led from elsewhere: another node of their world, or the target of a draft's group."""
    from launcher import preflight

    nodes, group = launch.nodes, launch.group
    _check_writable(launch.trace)
    preflight.check_engine(launch.config, nodes, group)
    from launcher import session

    with session.joined(launch) as ranks:
        if group is not None and group.target is not None:
            click.echo(f"drafts for: {group.target}  (Ctrl-C ends it; the target goes on without)")
        else:
            click.echo(f"node {nodes.rank} of {nodes.count}: ranks started; node 0 says when the engine is ready")
        while ranks.is_running():
            time.sleep(UP_POLL_S)
        ranks.raise_unless_ended_well()


ssd.add_command(study)


def _session(
    config: Config,
    config_path: Path | None,
    overrides: tuple[str, ...],
    connect: str | None,
    trace: Path | None,
    request: Generate | None,
    nodes: Nodes | None = None,
    group: Group | None = None,
) -> AbstractContextManager[Session]:
    """The engine at `connect`, or one of our own after everything that can be checked beforehand has been."""
    from launcher import preflight

    if connect is not None:
        if trace is not None:
            raise click.UsageError("--trace is the engine's own: give it to ssd up, not together with --connect")
        from launcher import session

        return session.connected(connect, CONNECT_TIMEOUT_S)
    _check_writable(trace)
    preflight.check_engine(config, nodes, group)
    if request is not None:
        preflight.check_request(request, config)
    from launcher import screen, session  # after the checks, which are to answer at once
    from launcher.torchrun import Launch

    launch = Launch(config, config_path, overrides, trace, group=group)
    return session.started(launch if nodes is None else replace(launch, nodes=nodes), screen.loading)


def _request(
    prompt: str, raw: bool, max_tokens: int, stop: tuple[str, ...], mode: Mode | None, params: SamplingParams
) -> Generate:
    from ssd_runtime.comm.messages import ChatMessage, Generate

    request = Generate(request_id=uuid.uuid4().hex, params=params, max_tokens=max_tokens, stop=stop, mode=mode)
    if raw:
        return replace(request, prompt=prompt)
    return replace(request, messages=(ChatMessage("user", prompt),))


def _overrides_for(runs: Sequence[Any], config: Config) -> list[str]:
    """What the engine must be started with so that every run can take place in it."""
    needed = []
    deepest = max(run.lookahead for run in runs)
    if deepest > config.speculation.lookahead:
        needed.append(f"speculation.lookahead={deepest}")
    together = max(run.batch for run in runs)
    if together > config.engine.max_num_seqs:
        needed.append(f"engine.max_num_seqs={together}")
    modes = {run.mode for run in runs}
    widest = next(mode for mode in ("ssd", "sd", "sd-colocated", "ar") if mode in modes)
    if widest != config.speculation.mode:
        needed.append(f"speculation.mode={widest}")
    return needed


def _check_writable(path: Path | None) -> None:
    if path is not None and not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: {path.parent} is not a directory one may write to")


def _stream(text: str) -> None:
    click.echo(text, nl=False)


def _nothing(text: str) -> None:
    pass


def _machine(cores: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    import torch

    from cuda_ext import ops
    from ssd_runtime import topology

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


if __name__ == "__main__":
    main()
