"""`ssd study`: reruns the paper's figures with any model pair and writes CSV, PNG and one Markdown page."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import click

from launcher.bench.plan import parse_numbers
from launcher.commands.options import config_options
from ssd_runtime.config import Config, ConfigFile, load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.random.models import random_model

FROM_TEXT, FROM_ENGINES = ("3", "4", "5"), ("4 speed", "6")


@click.command(name="study")
@config_options
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory to write into.")
@click.option("--figures", default="3,4,5,6", show_default=True, help="Which of the paper's figures.")
@click.option("--offline", is_flag=True, help="Only what follows from recorded text: no engine, no speeds.")
@click.option("--live", is_flag=True, help="Only what needs an engine: the speeds of 4, and 6.")
@click.option(
    "--prompts", multiple=True, type=click.Path(path_type=Path), help="JSON lines; may be given several times."
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many prompts of each file.")
@click.option("--max-tokens", type=click.IntRange(min=8), default=128, show_default=True, help="Of each text.")
@click.option("--temperatures", default="0,0.7,1", show_default=True)
@click.option("--batch", "batches", default="1,2,4", show_default=True, help="Requests at once, for Figure 6.")
@click.option("--redraw", is_flag=True, help="Measure nothing: pictures and page again, from the numbers in --out.")
@click.option(
    "--merge",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Measure nothing: take from this directory the figures that --out lacks; may be given several times.",
)
@click.option("--recording", type=click.Path(dir_okay=False, path_type=Path), help="Keep, or take, the recorded text.")
def study(
    config_file: ConfigFile | None,
    overrides: tuple[str, ...],
    out: Path,
    figures: str,
    offline: bool,
    live: bool,
    prompts: tuple[Path, ...],
    limit: int | None,
    max_tokens: int,
    temperatures: str,
    batches: str,
    redraw: bool,
    merge: tuple[Path, ...],
    recording: Path | None,
) -> None:
    """Rerun the paper's figures 3 to 6 with this pair of models.

    What can be is computed from recorded text, in one pass of both models, and does not depend on how busy the machine
    is: Figures 3 and 5 and the hit rates of 4. The speeds of 4 and Figure 6 run engines, as ssd bench does.

    A directory is one study, which grows run by run: figures of the same pair, K and B join those that are there. Write
    remarks into REMARKS.md beside them; the page has them too.
    """
    from launcher.bench.prompts import read_prompts

    if redraw or merge:
        _redraw(out, merge)
        return
    config = load_config(config_file, overrides)
    names = _figures(figures, offline, live)
    heats, sizes = _temperatures(temperatures), parse_numbers("--batch", batches)
    texts = [prompt for path in prompts or (None,) for prompt in read_prompts(path, limit)]
    least = config.speculation.lookahead + 3
    if max_tokens < least:
        raise ConfigError(f"--max-tokens must be at least {least} with speculation.lookahead = {least - 3}")
    from launcher import preflight
    from launcher.study import course, folder, pictures  # with torch: after what can be told without
    from ssd_runtime.host import topology

    pictures.check_installed()
    preflight.check_engine(config)
    if random_model(config.target.model) is not None:
        raise ConfigError(f"target model {config.target.model} says scripted text; a study needs real text")
    course.make_directory(out)
    machine = " ".join(topology.describe().splitlines()[0].split())
    run = folder.Run("ssd " + shlex.join(sys.argv[1:]), machine, time.strftime("%Y-%m-%d"), len(texts), max_tokens)

    def configure(extra: tuple[str, ...]) -> Config:
        return load_config(config_file, (*overrides, *extra))

    course.measure(course.Plan(names, config, configure, texts, heats, max_tokens, sizes, recording), run, out)
    click.echo(f"written: {out / folder.PAGE}")


def _redraw(out: Path, merge: tuple[Path, ...]) -> None:
    """Pictures and page from the numbers that are there, and from those of other directories."""
    from launcher.study import course, folder, pictures

    pictures.check_installed()
    for line in course.redraw(out, merge):
        click.echo(line, err=True)
    click.echo(f"written: {out / folder.PAGE}")


def _figures(text: str, offline: bool, live: bool) -> list[str]:
    """The names of the figures to measure; the speeds of Figure 4 are one of their own."""
    wanted = [value.strip() for value in text.split(",")]
    for value in wanted:
        if value not in ("3", "4", "5", "6"):
            raise ConfigError(f"--figures: there is no figure {value!r}; known: 3, 4, 5, 6")
    if offline and live:
        raise ConfigError("--offline and --live leave nothing to do: give one of them")
    known = (*(FROM_TEXT if not live else ()), *(FROM_ENGINES if not offline else ()))
    found = [name for name in known if name[0] in wanted]
    if not found:
        raise ConfigError(
            f"--figures {text} "
            + ("needs an engine: leave --offline out" if offline else "needs no engine: leave --live out")
        )
    return found


def _temperatures(text: str) -> list[float]:
    try:
        found = sorted({float(value) for value in text.split(",")})
    except ValueError:
        raise ConfigError(f"--temperatures {text!r}: expected numbers, as in 0,0.7,1") from None
    if not all(0.0 <= value <= 100.0 for value in found):
        raise ConfigError(f"--temperatures {text!r}: each must be between 0 and 100")
    return found
