"""What a step of a GPU session found, as JSON, and how a step is run. Knows no step; imports nothing outside Python.

A step is a module of this folder that yields findings and ends with

    if __name__ == "__main__":
        raise SystemExit(run_step(__file__, __doc__, find))

It is run as `python -m ops.gpu.<step> --device cuda|cpu --out FILE [--small]`. Its file is written anew with every
finding, so that a step that is stopped leaves what it had found by then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "failed", "needs a GPU"]
UNFINISHED = "stopped before its end"


@dataclass(frozen=True)
class Number:
    """A measured value, or a word where that is what came out: `Number("copy", 2950.0, "GB/s")`."""

    name: str
    value: float | str
    unit: str = ""


@dataclass(frozen=True)
class Finding:
    """One line of a step.

    Attributes:
        what: what was looked at, in a few words.
        status: whether it is as it must be; "needs a GPU" for what was left out on a CPU, and why stands in `note`.
        numbers: what was measured; findings of one step that have the same names form the columns of a table.
        note: what a reader has to be told.
    """

    what: str
    numbers: tuple[Number, ...] = ()
    status: Status = "ok"
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """Where a step ran.

    Attributes:
        card: name of the GPU; "none" on a CPU.
        driver: of NVIDIA; "none" without.
        torch, triton, python: versions; "none" for what is not installed.
        cores: CPU cores of this process.
    """

    card: str
    driver: str
    torch: str
    triton: str
    python: str
    cores: int


@dataclass(frozen=True)
class Result:
    """A whole step.

    Attributes:
        step, title: name of its module and first line of its docstring.
        date: of its start, UTC, ISO 8601.
        small: whether shapes were those of a rehearsal: then no number says anything about speed.
        seconds: from start to end.
        findings: in the order in which they were made.
        labels: what must be said beside the numbers.
        failure: why it did not reach its end; "" if it did.
    """

    step: str
    title: str
    machine: Machine
    date: str
    small: bool
    seconds: float
    findings: tuple[Finding, ...] = ()
    labels: tuple[str, ...] = ()
    failure: str = UNFINISHED

    @property
    def ok(self) -> bool:
        return not self.failure and all(finding.status != "failed" for finding in self.findings)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ValueError, KeyError or TypeError for anything but what `to_json` wrote."""
        fields = json.loads(text)
        findings = tuple(
            Finding(**{**found, "numbers": tuple(Number(**number) for number in found["numbers"])})
            for found in fields["findings"]
        )
        known = {"machine": Machine(**fields["machine"]), "findings": findings, "labels": tuple(fields["labels"])}
        return cls(**{**fields, **known})


@dataclass(frozen=True)
class Setting:
    """How a step is to be run.

    Attributes:
        device: "cuda" or "cpu".
        small: shapes of a rehearsal.
        model: what steps with a real model load.
        keep: folder for what a step leaves beside its result, a trace for example.
    """

    device: str
    small: bool
    model: str
    keep: Path


def this_machine(device: str) -> Machine:
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    on_gpu = device == "cuda"
    return Machine(
        card=torch.cuda.get_device_name() if on_gpu else "none",
        driver=_driver() if on_gpu else "none",
        torch=torch.__version__,
        triton=triton_version,
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def run_step(
    file: str, doc: str | None, find: Callable[[Setting], Iterator[Finding]], labels: Sequence[str] = ()
) -> int:
    """Run a step as its command line says; print one line of how it went. Returns the exit code: 0 if all is well."""
    title = (doc or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m ops.gpu.{Path(file).stem}", description=title)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="the file of the result, JSON")
    parser.add_argument("--small", action="store_true", help="shapes of a rehearsal")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="of steps with a real one (%(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for other files of the step (default: that of --out)")
    options = parser.parse_args()
    setting = Setting(options.device, options.small, options.model, options.keep or options.out.parent)
    start = time.monotonic()
    machine = this_machine(setting.device)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    result = Result(Path(file).stem, title, machine, date, setting.small, 0.0, (), tuple(labels))
    _write(result, options.out)
    failure = ""
    try:
        for finding in find(setting):
            seconds = time.monotonic() - start
            result = replace(result, findings=(*result.findings, finding), seconds=seconds)
            _write(result, options.out)
    except Exception as error:  # noqa: BLE001 - whatever it is belongs to the result; the next step runs all the same
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
    result = replace(result, seconds=time.monotonic() - start, failure=failure)
    _write(result, options.out)
    print(summary(result), flush=True)
    return 0 if result.ok else 1


def summary(result: Result) -> str:
    """One line: how many findings, and which are not well."""
    wrong = [finding.what for finding in result.findings if finding.status == "failed"]
    left_out = sum(finding.status == "needs a GPU" for finding in result.findings)
    line = f"{result.step}: {'OK' if result.ok else 'FAIL'}, {len(result.findings)} findings, {result.seconds:.1f} s"
    line += f", {left_out} need a GPU" if left_out else ""
    line += f"; failed: {', '.join(wrong)}" if wrong else ""
    return line + (f"; {result.failure}" if result.failure else "")


def _write(result: Result, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(result.to_json() + "\n", encoding="utf-8")
    part.replace(path)


def judged(what: str, holds: Any, *numbers: Number, note: str = "") -> Finding:
    """A finding that is well if `holds`."""
    return Finding(what, numbers, "ok" if holds else "failed", note)


def left_out(what: str, why: str) -> Finding:
    """A finding that only a GPU can make."""
    return Finding(what, (), "needs a GPU", why)
