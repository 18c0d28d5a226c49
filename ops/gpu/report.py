"""Result files of a GPU session as one Markdown page, for ops/bench/results.

    python -m ops.gpu.report build/gpu/results/*.jsonl > ops/bench/results/DATE-CARD.md

Imports nothing outside Python.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ops.gpu.result import Finding, Machine, Number, Result

REHEARSED = "**A rehearsal: small shapes on a CPU. No number on this page says anything about speed.**"
MARKS = {"ok": "", "failed": "**FAILED**", "needs a GPU": "needs a GPU"}


def read(paths: Iterable[Path]) -> list[Result]:
    """Every line of every file, in the order in which the steps began. Raises ValueError for a line that is none."""
    results = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                results.append(Result.from_json(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a result of a step ({error})") from None
    return sorted(results, key=lambda result: result.date)


def page(results: Sequence[Result]) -> str:
    """The whole page. `results` is not empty."""
    machines = dict.fromkeys(result.machine for result in results)
    parts = [f"# {_cards(machines)}, {results[0].date[:10]}", *map(_about, machines)]
    if any(result.small for result in results):
        parts.append(REHEARSED)
    parts.append("\n".join(_overview(results)))
    parts += ["\n\n".join(_section(result)) for result in results]
    return "\n\n".join(parts) + "\n"


def _cards(machines: Iterable[Machine]) -> str:
    return ", ".join(dict.fromkeys("CPU" if machine.card == "none" else machine.card for machine in machines))


def _about(machine: Machine) -> str:
    gpu = "" if machine.card == "none" else f"{machine.card}, driver {machine.driver}, "
    return f"{gpu}torch {machine.torch}, Triton {machine.triton}, Python {machine.python}, {machine.cores} CPU cores."


def _overview(results: Sequence[Result]) -> Iterator[str]:
    yield from ("| step | | seconds | findings | need a GPU | failed |", "| --- | --- | --: | --: | --: | --- |")
    for result in results:
        needs = sum(finding.status == "needs a GPU" for finding in result.findings)
        failed = [finding.what for finding in result.findings if finding.status == "failed"]
        failed += [result.failure] if result.failure else []
        cells = result.step, "OK" if result.ok else "FAIL", f"{result.seconds:.1f}", str(len(result.findings))
        yield _row((*cells, str(needs or ""), "; ".join(failed)))


def _section(result: Result) -> Iterator[str]:
    yield f"## {result.step}: {result.title.removesuffix('.')}"
    yield from result.labels
    for names, findings in itertools.groupby(result.findings, lambda finding: [one.name for one in finding.numbers]):
        yield "\n".join(_table(names, list(findings)))
    if result.failure:
        yield f"It did not reach its end: {result.failure}"


def _table(names: Sequence[str], findings: Sequence[Finding]) -> Iterator[str]:
    """Findings that measured the same; columns in which nothing stands are left out."""
    units = [number.unit for number in findings[0].numbers]
    heads = ["", *(f"{name}, {unit}" if unit else name for name, unit in zip(names, units, strict=True)), "", "note"]
    rows = [[one.what, *map(_value, one.numbers), MARKS[one.status], one.note] for one in findings]
    kept = [index for index in range(len(heads)) if any(row[index] for row in rows)]
    numeric = range(1, len(names) + 1)
    yield _row(heads[index] for index in kept)
    yield _row("--:" if index in numeric else "---" for index in kept)
    yield from (_row(row[index] for index in kept) for row in rows)


def _value(number: Number) -> str:
    return f"{number.value:.4g}" if isinstance(number.value, float) else str(number.value)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.gpu.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="result files, JSON lines")
    results = read(parser.parse_args().files)
    if not results:
        raise SystemExit("report: there is no result in these files")
    print(page(results), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
