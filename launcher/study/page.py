"""One Markdown page of a study: what was run where, the pictures, the numbers. Knows tables, not models."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.study.figures import POLICIES, Point
from launcher.study.folder import Folder, Run, stem

CAPTIONS = {
    "3": "Miss rate over the fan-out F (the paper's Figure 3), from recorded text",
    "4": "Hit rate over temperature for each fan-out policy (Figure 4), from recorded text",
    "4 speed": "Speed over temperature for each fan-out policy (Figure 4), live",
    "5": "Hit rate against acceptance: Saguaro's C and shared noise (Figure 5), from recorded text",
    "6": "Speed over requests at once, for each backup (Figure 6), live",
}


INTRODUCTION = """\
Figures from recorded text do not depend on how busy the machine was: the target wrote the text by plain
decoding, and both models were run over it once. A hit is then an outcome that was prepared for, as if the
draft had always had the time. Errors are standard errors over texts. Grey: the paper's numbers, read off its
plots (a draft of 1B for a target of 70B)."""
UNITS = {
    "4 speed": "tokens/s of one request at a time, prefill excluded.",
    "6": """\
tokens/s of one sequence: the tokens after the first of each request, over the sum of the requests' times from first
token to last. Requests at once arrive together and their prompts are computed one after the other, so the prefills of
those that come later fall into the time of those that came first.""",
}
ANCHORED = """\
In brackets: over mode sd in the same engine, where it ran in turns with SSD. Each SSD has an engine of its own, started
one after the other, so what the machine did meanwhile is in the speeds and not in these ratios. ar ran in the first
engine; sd is the mean over all engines and its standard error."""
ADRIFT = """\
Each SSD has an engine of its own, started one after the other; ar and sd ran in the first of them. What the machine did
meanwhile is part of the differences."""


def render(folder: Folder) -> str:
    """The page of a study."""
    subject = folder.subject
    lines = [f"# ssd study: {subject.target} <- {subject.draft}", ""]
    lines += [f"- target: {subject.target}", f"- draft: {subject.draft}", f"- sizes: {subject.sizes}", ""]
    lines += [folder.remarks, ""] if folder.remarks else []
    lines += [INTRODUCTION, ""]
    said: Run | None = None
    for name, figure in folder.figures.items():
        run, points = figure.run, figure.points
        lines += [f"## {CAPTIONS[name]}", "", f"![]({stem(name)}.png)", ""]
        lines += [f"{_measured(run) if run != said else 'Measured as above'}; numbers: {stem(name)}.csv", ""]
        lines += [f"    {run.command}", ""] if run != said else []
        said = run
        if name in UNITS:
            anchored = any(point.over_sd is not None for point in points)
            lines += [UNITS[name], ANCHORED if anchored else ADRIFT, ""]
        lines += [*_table(name, points), ""]
        if name == "4":
            lines += [*order_of_policies(points), ""]
        if name == "5":
            lines += [*dominance(points), ""]
    return "\n".join(lines).rstrip() + "\n"


def _measured(run: Run) -> str:
    return f"{run.date}, {run.machine}; {run.num_prompts} prompts, up to {run.max_tokens} tokens each"


def _table(figure: str, points: Sequence[Point]) -> list[str]:
    if figure == "5":
        heads = ["T", "series", "C", "acceptance", "hit rate"]
        rows = [
            [f"{p.temperature:g}", p.series, "" if p.note is None else f"{p.note:g}", f"{p.x:.3f}", _value(p, 3)]
            for p in points
        ]
        return _markdown(heads, rows)
    across = {"3": "F", "4": "T", "4 speed": "T", "6": "batch"}[figure]
    digits = 3 if figure in ("3", "4") else 1  # of rates, of speeds
    xs = sorted({p.x for p in points})
    lines: dict[str, dict[float, str]] = {}
    for p in points:
        name = f"{p.series}, T = {p.temperature:g}" if figure == "3" else p.series
        lines.setdefault(name, {})[p.x] = _value(p, digits)
    heads = ["", *(f"{across} = {x:g}" for x in xs)]
    return _markdown(heads, [[name, *(cells.get(x, "") for x in xs)] for name, cells in lines.items()])


def order_of_policies(points: Sequence[Point]) -> list[str]:
    """Whether confidence beats geometric beats uniform, temperature by temperature."""
    lines = []
    for temperature in sorted({p.temperature for p in points}):
        found = {p.series: p for p in points if p.temperature == temperature and p.y is not None}
        ordered = sorted((name for name in POLICIES if name in found), key=lambda name: -(found[name].y or 0.0))
        said = ", ".join(f"{name} {found[name].y:.3f}" for name in ordered)
        if len({found[name].y for name in ordered}) == 1 and len(ordered) > 1:
            lines.append(f"- T = {temperature:g}: all the same, {found[ordered[0]].y:.3f}.")
            continue
        expected = ordered == [name for name in reversed(POLICIES) if name in found]
        lines.append(f"- T = {temperature:g}: {said}" + ("." if expected else " (not the order that was hoped for)."))
    return lines


def dominance(points: Sequence[Point]) -> list[str]:
    """For each C: whether shared noise has the higher hit rate at equal or higher acceptance."""
    lines = []
    for temperature in sorted({p.temperature for p in points}):
        some = [p for p in points if p.temperature == temperature and p.y is not None]
        ours = {p.series.removeprefix("shared noise, "): p for p in some if p.note is None}
        for policy, our in ours.items():
            said: dict[str, list[str]] = {
                "higher hit rate and acceptance": [],
                "higher hit rate at lower acceptance": [],
                "lower hit rate": [],
            }
            both, hits_only, neither = said.values()
            for one in (p for p in some if p.note is not None):
                higher = (our.y or 0.0) > (one.y or 0.0)
                (both if higher and our.x >= one.x else hits_only if higher else neither).append(f"{one.note:g}")
            parts = [f"{what} than C = {', '.join(cs) or 'none'}" for what, cs in said.items()]
            lines.append(f"- T = {temperature:g}, shared noise with {policy}: {'; '.join(parts)}.")
    return lines


def _value(point: Point, digits: int) -> str:
    """y, its standard error, and in brackets the ratio to SD, as far as they are known."""
    if point.y is None:
        return "-"
    error = "" if point.error is None else f" ± {point.error:.{digits}f}"
    return f"{point.y:.{digits}f}{error}" + ("" if point.over_sd is None else f" ({point.over_sd:.2f})")


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
