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
        rows = [[f"{p.temperature:g}", p.series, _number(p.note, "g"), _percent(p.x), _rate(p)] for p in points]
        return _markdown(heads, rows)
    keys = list(dict.fromkeys((p.series, p.temperature) for p in points))
    if figure in ("4", "4 speed"):
        keys = list(dict.fromkeys((p.series, 0.0) for p in points))
    across = sorted({p.x for p in points})
    name = {"3": "F", "4": "T", "4 speed": "T", "6": "batch"}[figure]
    rows = []
    for series, temperature in keys:
        mine = {p.x: p for p in points if p.series == series and (figure[0] == "4" or p.temperature == temperature)}
        cells = [_cell(figure, mine[x]) if x in mine else "" for x in across]
        rows.append([series + (f", T = {temperature:g}" if figure == "3" else ""), *cells])
    return _markdown(["", *(f"{name} = {x:g}" for x in across)], rows)


def order_of_policies(points: Sequence[Point]) -> list[str]:
    """Whether confidence beats geometric beats uniform, temperature by temperature."""
    lines = []
    for temperature in sorted({p.temperature for p in points}):
        found = {p.series: p for p in points if p.temperature == temperature and p.y is not None}
        ordered = sorted((name for name in POLICIES if name in found), key=lambda name: -(found[name].y or 0.0))
        said = ", ".join(f"{name} {_percent(found[name].y)}" for name in ordered)
        if len({found[name].y for name in ordered}) == 1 and len(ordered) > 1:
            lines.append(f"- T = {temperature:g}: all the same, {_percent(found[ordered[0]].y)}.")
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
            beaten: list[str] = []
            hits_only: list[str] = []
            neither: list[str] = []
            for one in (p for p in some if p.note is not None):
                higher = (our.y or 0.0) > (one.y or 0.0)
                (beaten if higher and our.x >= one.x else hits_only if higher else neither).append(f"{one.note:g}")
            parts = [
                f"higher hit rate and acceptance than C = {', '.join(beaten) or 'none'}",
                f"higher hit rate at lower acceptance than C = {', '.join(hits_only) or 'none'}",
                f"lower hit rate than C = {', '.join(neither) or 'none'}",
            ]
            lines.append(f"- T = {temperature:g}, shared noise with {policy}: {'; '.join(parts)}.")
    return lines


def _cell(figure: str, point: Point) -> str:
    return _rate(point) if figure in ("3", "4") else _speed(point)


def _speed(point: Point) -> str:
    if point.y is None:
        return "-"
    error = f" ± {point.error:.1f}" if point.error is not None else ""
    return f"{point.y:.1f}{error}" + (f" ({point.over_sd:.2f})" if point.over_sd is not None else "")


def _rate(point: Point) -> str:
    if point.y is None:
        return "-"
    return f"{point.y:.3f}" + (f" ± {point.error:.3f}" if point.error is not None else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
