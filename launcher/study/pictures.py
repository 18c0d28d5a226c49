"""The figures drawn. Needs matplotlib (the extra `study`). Knows tables, not models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.study import paper
from launcher.study.figures import POLICIES, Point
from ssd_runtime.errors import ConfigError

GREY = "0.6"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by everyone
MARKERS = ("o", "s", "^", "D", "v", "P")


def check_installed() -> None:
    """Raise ConfigError where pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("the pictures of ssd study need matplotlib: pip install matplotlib") from None


def draw(figure: str, points: Sequence[Point], title: str, path: Path) -> None:
    """Draw one figure of the study into a PNG file."""
    from matplotlib.figure import Figure

    drawers: dict[str, Callable[[Any, Sequence[Point]], None]] = {
        "3": _figure3,
        "4": _figure4,
        "4 speed": _figure4_speed,
        "5": _figure5,
        "6": _figure6,
    }
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
    axes.plot(*zip(*curve, strict=True), label=label, color=GREY, linestyle=linestyle, linewidth=1.2, zorder=1)


def _figure3(picture: Any, points: Sequence[Point]) -> None:
    temperatures = sorted({one.temperature for one in points})
    for axes, after in zip(picture.subplots(1, 2, sharey=True), ("hit", "miss"), strict=True):
        for index, temperature in enumerate(temperatures):
            some = [one for one in points if one.temperature == temperature and one.y]
            label = f"T = {temperature:g}"
            _line(axes, _series(some, f"shared noise, after a {after}"), f"{label}, shared noise", index)
            _line(axes, _series(some, f"rejection, after a {after}"), f"{label}, rejection", index, linestyle=":")
        for style, ((side, temperature), misses) in zip("-" * 9, paper.FIG3_MISS.items(), strict=False):
            if side == after:
                linestyle = {0.0: style, 0.7: "--", 1.0: "-."}[temperature]
                _grey(
                    axes, list(zip(paper.FIG3_FAN_OUT, misses, strict=True)), f"paper, T = {temperature:g}", linestyle
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks((1, 2, 4, 8, 16, 32, 64, 128), labels=("1", "2", "4", "8", "16", "32", "64", "128"))
        axes.set_yticks(
            (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), labels=("0.5%", "1%", "2%", "5%", "10%", "20%", "50%")
        )
        axes.minorticks_off()
        axes.set_ylim(0.004, 0.85)
        axes.set_xlabel("fan-out F at every position (candidates)")
        axes.set_title("primary: after a hit" if after == "hit" else "backup: after a miss", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower left")
        if after == "hit":
            axes.set_ylabel("miss rate (share of rounds)")


def _percent(axes: Any, which: str, decimals: int = 0) -> None:
    from matplotlib.ticker import PercentFormatter

    getattr(axes, f"{which}axis").set_major_formatter(PercentFormatter(1.0, decimals))


def _figure4(picture: Any, points: Sequence[Point]) -> None:
    axes = picture.subplots()
    for index, policy in enumerate(POLICIES):
        _line(axes, _series(points, policy), policy, index)
    for linestyle, (name, curve) in zip((":", "--"), paper.FIG4_HITS.items(), strict=True):
        _grey(axes, curve, f"paper, {name}", linestyle)
    _percent(axes, "y")
    axes.set_xlabel("temperature")
    axes.set_ylabel("hit rate of whole outcomes (share of rounds)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _figure4_speed(picture: Any, points: Sequence[Point]) -> None:
    axes = picture.subplots()
    for index, name in enumerate(dict.fromkeys(one.series for one in points)):
        _line(axes, _series(points, name), name, index)
    sd = {one.x: one.y for one in points if one.series == "sd" and one.y}
    curve = [(x, over * sd[x]) for x, over in paper.FIG4_OVER_SD if x in sd]
    if curve:
        _grey(axes, curve, "paper's SSD over SD, times our SD", "--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("temperature")
    axes.set_ylabel("tokens/s of one request alone, prefill excluded")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _figure5(picture: Any, points: Sequence[Point]) -> None:
    temperatures = sorted({one.temperature for one in points})
    for axes, temperature in zip(picture.subplots(1, len(temperatures), squeeze=False)[0], temperatures, strict=True):
        some = [one for one in points if one.temperature == temperature]
        saguaro = sorted((one for one in some if one.note is not None), key=lambda one: -(one.note or 0.0))
        shown = [one for one in saguaro if one.x > 0.35]  # with C = 0 next to nothing is accepted
        # Without errors: the points are of the same texts and move together. The CSV has them.
        points_of_curve = [replace(one, error=None) for one in shown]
        _line(axes, points_of_curve, "rejection, Saguaro's C, uniform fan-out", 0)
        for one in shown:
            if one.note in (1.0, 0.3, 0.15, 0.05, 0.02) and one.y is not None:
                axes.annotate(
                    f"C = {one.note:g}",
                    (one.x, one.y),
                    xytext=(-8, -3),
                    textcoords="offset points",
                    fontsize=7,
                    ha="right",
                    va="top",
                )
        for index, policy in enumerate(POLICIES, start=1):
            ours = _series(some, f"shared noise, {policy}")
            _line(axes, ours, f"shared noise, {policy}", index, linestyle="none")
        if temperature == 1.0 or len(temperatures) == 1:
            _grey(axes, paper.FIG5, "paper, C falling to the left", "--")
        low, high = axes.get_xlim()
        axes.set_xlim(low - 0.12 * (high - low), high)  # room for the labels
        _percent(axes, "x", 1)
        _percent(axes, "y")
        axes.set_xlabel("acceptance (share of draft tokens)")
        axes.set_ylabel("hit rate of whole outcomes (share of rounds)")
        axes.set_title(f"T = {temperature:g}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="best")


def _figure6(picture: Any, points: Sequence[Point]) -> None:
    axes = picture.subplots()
    for index, name in enumerate(dict.fromkeys(one.series for one in points)):
        _line(axes, _series(points, name), name, index)
    sd = {one.x: one.y for one in points if one.series == "sd" and one.y}
    for linestyle, (name, curve) in zip((":", "--"), paper.FIG6_OVER_SD.items(), strict=True):
        scaled = [(x, over * sd[x]) for x, over in curve if x in sd]
        if scaled:
            _grey(axes, scaled, f"paper's {name} over SD, times our SD", linestyle)
    sizes = sorted({one.x for one in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, labels=[f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests at once")
    axes.set_ylabel(
        "tokens/s of one sequence, first token to last;\nprefills of the others of its batch fall into that time"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
