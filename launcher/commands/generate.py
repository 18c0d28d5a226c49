"""`ssd generate`: one prompt, answered."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from launcher.commands import engine
from launcher.commands.options import config_options, connect_option, trace_option
from launcher.commands.sampling import sampling_options
from ssd_runtime.config import MODES, ConfigFile, Mode, load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.reading import decode
from ssd_runtime.speculation.types import SamplingParams

MOST_BYTES = 1 << 24  # of a prompt; messages are no larger


@click.command()
@config_options
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
@connect_option
@trace_option
def generate(
    config_file: ConfigFile | None,
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
    params: SamplingParams,
) -> None:
    """Answer one prompt."""
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are part of the JSON: give --json too")
    if mode is not None:
        overrides = (*overrides, f"speculation.mode={mode}")
    if lookahead is not None:
        overrides = (*overrides, f"speculation.lookahead={lookahead}")
    config = load_config(config_file, overrides)
    from launcher import answers, preflight  # with the libraries of model files: after what can be told without
    from launcher.generation import generate as generate_one

    if prompt == "-":
        prompt = _standard_input()
    request = engine.request_for(prompt, raw, max_tokens, stop, mode, params)
    streams = not as_json and n == 1
    request = replace(request, lookahead=lookahead, stream=streams, logprobs=logprobs, n=n)
    preflight.check_not_empty(request)
    with engine.open_session(config, connect, trace, request) as session:
        try:
            generation = generate_one(session.client, request, _stream if streams else None)
        finally:
            if streams:
                click.echo()
        if as_json:
            click.echo(answers.as_json(generation, session.label))
        else:
            if not streams:
                click.echo(answers.as_text(generation))
            click.echo(answers.summary_line(generation, session.cores, session.label), err=True)


def _standard_input() -> str:
    """All of it; raises ConfigError for what is no prompt: closed, larger than a message may be, not UTF-8."""
    if sys.stdin is None:
        raise ConfigError("standard input is closed: give the prompt as --prompt TEXT, or in a file or pipe")
    return decode(sys.stdin.buffer.read(MOST_BYTES + 1), "standard input", MOST_BYTES)


def _stream(text: str) -> None:
    click.echo(text, nl=False)
