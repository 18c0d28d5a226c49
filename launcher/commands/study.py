"""`ssd study`: reruns the paper's figures with any model pair and writes CSV, PNG and one Markdown page."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands.options import config_options, writing
from ssd_runtime.config import Config, ConfigFile, load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.random.models import random_model

if TYPE_CHECKING:
    from launcher.bench.prompts import Prompt
    from launcher.generation import Generates
    from launcher.study.figures import Point
    from launcher.study.folder import Folder, Run
    from launcher.study.recording import Record

FIGURES = ("3", "4", "5", "6")


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
    from launcher.bench.plan import parse_numbers
    from launcher.bench.prompts import read_prompts

    if redraw or merge:
        click.echo(f"written: {_redraw(out, merge)}")
        return
    config = load_config(config_file, overrides)
    wanted = _figures(figures, offline, live)
    heats = _temperatures(temperatures)
    sizes = parse_numbers("--batch", batches)
    texts = [prompt for path in prompts or (None,) for prompt in read_prompts(path, limit)]
    if max_tokens < config.speculation.lookahead + 3:
        least = config.speculation.lookahead + 3
        raise ConfigError(f"--max-tokens must be at least {least} with speculation.lookahead = {least - 3}")
    from launcher import preflight
    from launcher.study import pictures  # with torch: after what can be told without

    pictures.check_installed()
    preflight.check_engine(config)
    if random_model(config.target.model) is not None:
        raise ConfigError(f"target model {config.target.model} says scripted text; a study needs real text")
    _make_directory(out)
    grown = _standing(out, config)
    run = _run(len(texts), max_tokens)
    if not live and {"3", "4", "5"} & set(wanted):
        records = _records(config, texts, heats, max_tokens, recording)
        grown = _grow(grown, run, _from_records(records, config, wanted))
    if not offline:
        for found in _live(config, config_file, overrides, texts, heats, max_tokens, sizes, wanted):
            grown = _grow(grown, run, found)
    click.echo(f"written: {out / 'README.md'}")


def _figures(text: str, offline: bool, live: bool) -> list[str]:
    wanted = [value.strip() for value in text.split(",")]
    for value in wanted:
        if value not in FIGURES:
            raise ConfigError(f"--figures: there is no figure {value!r}; known: {', '.join(FIGURES)}")
    if offline and wanted == ["6"]:
        raise ConfigError("--figures 6 needs an engine: leave --offline out")
    if offline and live:
        raise ConfigError("--offline and --live leave nothing to do: give one of them")
    if live and not {"4", "6"} & set(wanted):
        raise ConfigError(f"--figures {text} needs no engine: leave --live out")
    return wanted


def _temperatures(text: str) -> list[float]:
    try:
        found = sorted({float(value) for value in text.split(",")})
    except ValueError:
        raise ConfigError(f"--temperatures {text!r}: expected numbers, as in 0,0.7,1") from None
    if not all(0.0 <= value <= 100.0 for value in found):
        raise ConfigError(f"--temperatures {text!r}: each must be between 0 and 100")
    return found


def _make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"cannot write into {out}: {error.strerror}") from None


def _records(
    config: Config, prompts: Sequence[Prompt], temperatures: Sequence[float], max_tokens: int, path: Path | None
) -> list[Record]:
    """Recorded now, or read from the file that is there."""
    from launcher import screen
    from launcher.study import store
    from launcher.study.figures import CS, rules_for
    from launcher.study.recording import Limits, Pass, load_pair, write_texts
    from ssd_runtime.speculation.types import SamplingParams

    speculation = config.speculation
    about = {
        "target": f"{config.target.model} {config.target.dtype}",
        "draft": f"{config.draft.model} {config.draft.dtype}",
        "prompts": [prompt.id for prompt in prompts],
        "temperatures": list(temperatures),
        "max_tokens": max_tokens,
        "lookahead": speculation.lookahead,
        "budget": speculation.budget,
        "saguaro": list(CS),
    }
    if path is not None and path.exists():
        return store.load(path, about)
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"cannot write recording {path}: {path.parent} is not a directory")
    with screen.loading_here() as progress:
        pair = load_pair(config, progress)
    asked = [pair.prompt_tokens(prompt.prompt) for prompt in prompts]
    limits = Limits(max_tokens, speculation.lookahead, pair.eos_token_ids)
    both = Pass(
        pair.target,
        pair.draft,
        pair.vocab_size,
        speculation.lookahead,
        speculation.budget + 2,
        rules_for(speculation.lookahead, speculation.budget),
    )
    records = []
    with screen.counting("recording", 2 * len(prompts) * len(temperatures)) as advance:
        for temperature in temperatures:
            for text in write_texts(pair.target, asked, SamplingParams(temperature=temperature), limits, advance):
                records.append(both.record(text))
                advance(f"T={temperature:g}")
    if path is not None:
        with writing(path):
            store.save(path, about, records)
    return records


def _from_records(records: Sequence[Record], config: Config, wanted: Sequence[str]) -> dict[str, list[Point]]:
    from launcher.study import figures

    lookahead, budget = config.speculation.lookahead, config.speculation.budget
    found: dict[str, list[Point]] = {}
    if "3" in wanted:
        found["3"] = figures.figure3(records, lookahead)
    if "4" in wanted:
        found["4"] = figures.figure4(records, lookahead, budget)
    if "5" in wanted and any(record.temperature > 0 for record in records):
        found["5"] = figures.figure5(records, lookahead, budget)
    return found


def _live(
    config: Config,
    config_file: ConfigFile | None,
    overrides: tuple[str, ...],
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    max_tokens: int,
    batches: Sequence[int],
    wanted: Sequence[str],
) -> Iterator[dict[str, list[Point]]]:
    from launcher import screen
    from launcher.session import started
    from launcher.study import live
    from launcher.torchrun import Launch

    @contextlib.contextmanager
    def engines(extra: tuple[str, ...]) -> Iterator[Generates]:
        own = (*overrides, *extra)
        with started(Launch(load_config(config_file, own)), screen.loading) as session:
            yield session.client

    lookahead = config.speculation.lookahead
    if "4" in wanted:
        with screen.counting("figure 4", live.figure4_steps(len(prompts), len(temperatures))) as advance:
            points = live.figure4_speed(engines, prompts, temperatures, max_tokens, lookahead, advance)
        yield {"4 speed": points}
    if "6" in wanted:
        with screen.counting("figure 6", live.figure6_steps(len(prompts), batches)) as advance:
            points = live.figure6(engines, prompts, batches, max_tokens, lookahead, advance)
        yield {"6": points}


def _standing(out: Path, config: Config) -> Folder:
    """What stands in the directory, if it is of the same pair and sizes."""
    from launcher.study import folder

    target, draft = (f"{Path(model.model).stem} {model.dtype}" for model in (config.target, config.draft))
    subject = folder.Subject(target, draft, config.speculation.lookahead, config.speculation.budget)
    return (folder.load(out) or folder.start(out, subject)).grown(subject, {})


def _run(num_prompts: int, max_tokens: int) -> Run:
    from launcher.study.folder import Run
    from ssd_runtime.host import topology

    machine = " ".join(topology.describe().splitlines()[0].split())
    return Run("ssd " + shlex.join(sys.argv[1:]), machine, time.strftime("%Y-%m-%d"), num_prompts, max_tokens)


def _grow(study: Folder, run: Run, found: Mapping[str, Sequence[Point]]) -> Folder:
    """Write what was found now: a later figure that fails costs no earlier one."""
    from launcher.study.folder import Figure

    study = study.grown(study.subject, {name: Figure(run, tuple(points)) for name, points in found.items()})
    with writing(study.path):
        study.save(list(found))
        _draw(study, list(found))
    return study


def _redraw(out: Path, others: Sequence[Path]) -> Path:
    """Pictures and page from the numbers that are there, and from those of other directories; returns the page."""
    from launcher.study import folder, pictures

    pictures.check_installed()
    study = folder.load(out)
    taken: list[str] = []
    for path in others:
        other = folder.load(path)
        if other is None:
            raise ConfigError(f"there is no figure in {path} to take")
        study = study or folder.start(out, other.subject)
        lacking = {name: figure for name, figure in other.figures.items() if name not in study.figures}
        for name in other.figures.keys() - lacking.keys():
            click.echo(f"{folder.stem(name)} of {path} left out: {out} has one", err=True)
        study = study.grown(other.subject, lacking)
        taken += lacking
    if study is None:
        raise ConfigError(f"there is no figure in {out} to draw again")
    _make_directory(out)
    with writing(out):
        study.save(taken)
        _draw(study, list(study.figures))
    return out / folder.PAGE


def _draw(study: Folder, names: Sequence[str]) -> None:
    """The pictures of these figures, and the page of all."""
    from launcher.study import folder, page, pictures

    subject = study.subject
    for name in names:
        run, points = study.figures[name].run, study.figures[name].points
        about = f"{subject.target} <- {subject.draft}\n{subject.sizes}; {run.machine}; {run.date}"
        pictures.draw(name, points, f"{page.CAPTIONS[name]}\n{about}", study.path / f"{folder.stem(name)}.png")
    (study.path / folder.PAGE).write_text(page.render(study))
