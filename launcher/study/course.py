"""The course of a study: figures measured, or taken from other directories, and written at once. Knows no options."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from launcher import screen
from launcher.bench.prompts import Prompt
from launcher.files import writing
from launcher.generation import Generates
from launcher.session import started
from launcher.study import figures, folder, page, pictures, store
from launcher.study.figures import Point
from launcher.study.folder import Figure, Folder, Run, Subject
from launcher.study.live import figure4_speed, figure6
from launcher.study.recording import Pass, Record, load_pair, write_texts
from launcher.torchrun import Launch
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError
from ssd_runtime.speculation.types import SamplingParams


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        names: of the figures wanted.
        config: of the pair, with K and B.
        configure: the same with more overrides, for an engine.
        max_tokens: of each text.
        batches: requests at once, for Figure 6.
        recording: where the recorded text is, or is to be kept; None for nowhere.
    """

    names: Sequence[str]
    config: Config
    configure: Callable[[tuple[str, ...]], Config]
    prompts: Sequence[Prompt]
    temperatures: Sequence[float]
    max_tokens: int
    batches: Sequence[int]
    recording: Path | None = None


def measure(plan: Plan, run: Run, out: Path) -> None:
    """Measure the figures and add them to the study in `out`, each as soon as it is found: a later one that fails costs
    no earlier one.

    Raises:
        ConfigError: `out` holds a study of another pair or of other sizes.
    """
    target, draft = (f"{Path(model.model).stem} {model.dtype}" for model in (plan.config.target, plan.config.draft))
    subject = Subject(target, draft, plan.config.speculation.lookahead, plan.config.speculation.budget)
    study = (folder.load(out) or folder.start(out, subject)).grown(subject, {})
    for points in chain(_from_text(plan), _from_engines(plan)):
        study = study.grown(subject, {name: Figure(run, tuple(some)) for name, some in points.items()})
        _write(study, list(points), list(points))


def redraw(out: Path, others: Sequence[Path]) -> list[str]:
    """Pictures and page from the numbers in `out`, and from those of other directories that it lacks.

    Returns:
        What was left out of the others, a line each.

    Raises:
        ConfigError: there is no figure, or one of another study.
    """
    study = folder.load(out)
    taken: list[str] = []
    left_out: list[str] = []
    for path in others:
        other = folder.load(path)
        if other is None:
            raise ConfigError(f"there is no figure in {path} to take")
        study = study or folder.start(out, other.subject)
        lacking = {name: figure for name, figure in other.figures.items() if name not in study.figures}
        left_out += [
            f"{folder.stem(name)} of {path} left out: {out} has one" for name in other.figures.keys() - lacking
        ]
        study = study.grown(other.subject, lacking)
        taken += lacking
    if study is None:
        raise ConfigError(f"there is no figure in {out} to draw again")
    make_directory(out)
    _write(study, taken, list(study.figures))
    return left_out


def make_directory(out: Path) -> None:
    """Raises ConfigError where nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"cannot write into {out}: {error.strerror}") from None


def _write(study: Folder, saved: Sequence[str], drawn: Sequence[str]) -> None:
    """The points and the pictures of these figures, and the page of all."""
    subject = study.subject
    with writing(study.path):
        study.save(saved)
        for name in drawn:
            run, points = study.figures[name].run, study.figures[name].points
            about = f"{subject.target} <- {subject.draft}\n{subject.sizes}; {run.machine}; {run.date}"
            pictures.draw(name, points, f"{page.CAPTIONS[name]}\n{about}", study.path / f"{folder.stem(name)}.png")
        (study.path / folder.PAGE).write_text(page.render(study))


def _from_text(plan: Plan) -> Iterator[Mapping[str, Sequence[Point]]]:
    """The figures that follow from recorded text, all at once."""
    wanted = {"3", "4", "5"} & set(plan.names)
    if not wanted:
        return
    lookahead, budget = plan.config.speculation.lookahead, plan.config.speculation.budget
    records = _records(plan)
    found: dict[str, Sequence[Point]] = {}
    if "3" in wanted:
        found["3"] = figures.figure3(records, lookahead)
    if "4" in wanted:
        found["4"] = figures.figure4(records, lookahead, budget)
    if "5" in wanted and any(record.temperature > 0 for record in records):
        found["5"] = figures.figure5(records, lookahead, budget)
    yield found


def _records(plan: Plan) -> list[Record]:
    """Recorded now, or read from the file that is there."""
    path, config, speculation = plan.recording, plan.config, plan.config.speculation
    source = store.Source(
        target=f"{config.target.model} {config.target.dtype}",
        draft=f"{config.draft.model} {config.draft.dtype}",
        prompts=[prompt.id for prompt in plan.prompts],
        temperatures=list(plan.temperatures),
        max_tokens=plan.max_tokens,
        lookahead=speculation.lookahead,
        budget=speculation.budget,
        saguaro=list(figures.CS),
    )
    if path is not None and path.exists():
        return store.load(path, source)
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"cannot write recording {path}: {path.parent} is not a directory")
    records = _record(plan)
    if path is not None:
        with writing(path):
            store.save(path, store.Recording(source, records))
    return records


def _record(plan: Plan) -> list[Record]:
    """Load both models, let the target write its texts, and run both over them."""
    lookahead, budget = plan.config.speculation.lookahead, plan.config.speculation.budget
    with screen.loading_here() as progress:
        pair = load_pair(plan.config, progress)
    asked = [pair.prompt_tokens(prompt.prompt) for prompt in plan.prompts]
    eos, tokens = pair.tokenizer.eos_token_ids, plan.max_tokens
    rules = figures.rules_for(lookahead, budget)
    both = Pass(pair.target, pair.draft, pair.vocab_size, lookahead, budget + 2, rules)
    records = []
    with screen.counting("recording", 2 * len(asked) * len(plan.temperatures)) as advance:
        for temperature in plan.temperatures:
            params = SamplingParams(temperature=temperature)
            for text in write_texts(pair.target, asked, params, tokens, eos, advance):
                records.append(both.record(text))
                advance(f"T={temperature:g}")
    return records


def _from_engines(plan: Plan) -> Iterator[Mapping[str, Sequence[Point]]]:
    """The figures that need engines, one after the other."""

    @contextlib.contextmanager
    def engines(overrides: tuple[str, ...]) -> Iterator[Generates]:
        with started(Launch(plan.configure(overrides)), screen.loading) as session:
            yield session.client

    lookahead = plan.config.speculation.lookahead
    for live in (
        figure4_speed(plan.prompts, plan.temperatures, plan.max_tokens, lookahead),
        figure6(plan.prompts, plan.batches, plan.max_tokens, lookahead),
    ):
        if live.name in plan.names:
            with screen.counting(f"figure {live.name}", live.num_steps) as advance:
                points = live.measure(engines, advance)
            yield {live.name: points}
