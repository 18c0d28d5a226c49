"""The figures drawn. Needs matplotlib (the extra `study`). Knows tables, not models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from launcher.study import paper
from launcher.study.figures import FAN_OUTS, POLICIES, Point
from ssd_runtime.errors import ConfigError

GREY = "0.6"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by everyone
MARKERS = ("o", "s", "^", "D", "v", "P")
NAMED_C = (1.0, 0.3, 0.15, 0.05, 0.02)  # labelled in Figure 5
HIT_RATE = "hit rate of whole outcomes (share of rounds)"


def check_installed() -> None:
    """Raise ConfigError where pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("the pictures of ssd study need matplotlib: pip install matplotlib") from None


def draw(figure: str, points: Sequence[Point], title: str, path: Path) -> None:
    """Draw one figure of the study into a PNG file."""
    from matplotlib.figure import Figure

    drawers = {"3": _figure3, "4": _figure4, "4 speed": _figure4_speed, "5": _figure5, "6": _figure6}
    wide = figure in ("3", "5")
    picture = Figure(figsize=(11 if wide else 7.5, 5.2), layout="constrained")
    drawers[figure](picture, points)
    picture.suptitle(title, fontsize=10)
    picture.savefig(path, dpi=110)


def _series(points: Sequence[Point], name: str) -> list[Point]:
    return sorted((one for one in points if one.series == name and one.y is not None), key=lambda one: one.x)


def _line(axes: Any, points: Sequence[Point], label: str, index: int, **style: Any) -> None:
    if points:
        axes.errorbar(
            [one.x for one in points],
            [one.y for one in points],
            yerr=[one.error or 0.0 for one in points],
            label=label,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            capsize=2,
            linewidth=1.4,
            **style,
        )


def _grey(axes: Any, curve: Sequence[tuple[float, float]], label: str, linestyle: str) -> None:
    if curve:
        axes.plot(*zip(*curve, strict=True), label=label, color=GREY, linestyle=linestyle, linewidth=1.2, zorder=1)


def _finish(axes: Any, x: str, y: str, fontsize: int = 8, place: str = "best") -> None:
    """Names of the axes, a grid, and the legend."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=fontsize, loc=place)


def _percent(axes: Any, which: str, decimals: int = 0) -> None:
    from matplotlib.ticker import PercentFormatter

    getattr(axes, f"{which}axis").set_major_formatter(PercentFormatter(1.0, decimals))


def _doublings(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis with a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, labels=[f"{value:g}" for value in values])


def _figure3(picture: Any, points: Sequence[Point]) -> None:
    temperatures = sorted({one.temperature for one in points})
    for axes, after in zip(picture.subplots(1, 2, sharey=True), ("hit", "miss"), strict=True):
        for index, temperature in enumerate(temperatures):
            some = [one for one in points if one.temperature == temperature and one.y]
            label = f"T = {temperature:g}"
            _line(axes, _series(some, f"shared noise, after a {after}"), f"{label}, shared noise", index)
            _line(axes, _series(some, f"rejection, after a {after}"), f"{label}, rejection", index, linestyle=":")
        for (side, temperature), misses in paper.FIG3_MISS.items():
            if side == after:
                curve = list(zip(paper.FIG3_FAN_OUT, misses, strict=True))
                _grey(axes, curve, f"paper, T = {temperature:g}", {0.0: "-", 0.7: "--", 1.0: "-."}[temperature])
        _doublings(axes, FAN_OUTS)
        axes.set_yscale("log")
        shares = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
        axes.set_yticks(shares, labels=[f"{100 * share:g}%" for share in shares])
        axes.minorticks_off()
        axes.set_ylim(0.004, 0.85)
        axes.set_title("primary: after a hit" if after == "hit" else "backup: after a miss", fontsize=10)
        y = "miss rate (share of rounds)" if after == "hit" else ""
        _finish(axes, "fan-out F at every position (candidates)", y, 7, "lower left")


def _figure4(picture: Any, points: Sequence[Point]) -> None:
    axes = picture.subplots()
    for index, policy in enumerate(POLICIES):
        _line(axes, _series(points, policy), policy, index)
    for linestyle, (name, curve) in zip((":", "--"), paper.FIG4_HITS.items(), strict=True):
        _grey(axes, curve, f"paper, {name}", linestyle)
    _percent(axes, "y")
    _finish(axes, "temperature", HIT_RATE)


def _speeds(picture: Any, points: Sequence[Point], papers: dict[str, paper.Curve]) -> Any:
    """Every series, and by name what the paper has over SD, times our SD; returns the axes."""
    axes = picture.subplots()
    for index, name in enumerate(dict.fromkeys(one.series for one in points)):
        _line(axes, _series(points, name), name, index)
    sd = {one.x: one.y for one in points if one.series == "sd" and one.y}
    for linestyle, (name, curve) in zip((":", "--")[-len(papers) :], papers.items(), strict=True):
        _grey(axes, [(x, over * sd[x]) for x, over in curve if x in sd], f"{name} over SD, times our SD", linestyle)
    axes.set_ylim(bottom=0)
    return axes


def _figure4_speed(picture: Any, points: Sequence[Point]) -> None:
    axes = _speeds(picture, points, {"paper's SSD": paper.FIG4_OVER_SD})
    _finish(axes, "temperature", "tokens/s of one request alone, prefill excluded")


def _figure6(picture: Any, points: Sequence[Point]) -> None:
    axes = _speeds(picture, points, {f"paper's {name}": curve for name, curve in paper.FIG6_OVER_SD.items()})
    _doublings(axes, sorted({one.x for one in points}))
    axes.minorticks_off()
    y = "tokens/s of one sequence, first token to last;\nprefills of the others of its batch fall into that time"
    _finish(axes, "requests at once", y)


def _figure5(picture: Any, points: Sequence[Point]) -> None:
    temperatures = sorted({one.temperature for one in points})
    for axes, temperature in zip(picture.subplots(1, len(temperatures), squeeze=False)[0], temperatures, strict=True):
        some = [one for one in points if one.temperature == temperature]
        saguaro = sorted((one for one in some if one.note is not None), key=lambda one: -(one.note or 0.0))
        shown = [one for one in saguaro if one.x > 0.35]  # with C = 0 next to nothing is accepted
        # Without errors: the points are of the same texts and move together. The CSV has them.
        _line(axes, [replace(one, error=None) for one in shown], "rejection, Saguaro's C, uniform fan-out", 0)
        beside = {"xytext": (-8, -3), "textcoords": "offset points", "fontsize": 7, "ha": "right", "va": "top"}
        for one in shown:
            if one.note in NAMED_C and one.y is not None:
                axes.annotate(f"C = {one.note:g}", (one.x, one.y), **beside)
        for index, policy in enumerate(POLICIES, start=1):
            ours = f"shared noise, {policy}"
            _line(axes, _series(some, ours), ours, index, linestyle="none")
        if temperature == 1.0 or len(temperatures) == 1:
            _grey(axes, paper.FIG5, "paper, C falling to the left", "--")
        low, high = axes.get_xlim()
        axes.set_xlim(low - 0.12 * (high - low), high)  # room for the labels
        _percent(axes, "x", 1)
        _percent(axes, "y")
        axes.set_title(f"T = {temperature:g}", fontsize=10)
        _finish(axes, "acceptance (share of draft tokens)", HIT_RATE, 7)
