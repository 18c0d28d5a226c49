"""tests/gpu, and tests of the CPU kernels in the same build, which is the one that was carried.

The plugins and options of the project's own environment are not asked for.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from ops.gpu.result import Finding, Number, Setting, judged, left_out, run_step

ON_GPU = "tests/gpu"
ON_CPU = ("tests/unit/test_cuda_ext_layers.py", "tests/unit/test_cuda_ext_cache.py")


def find(setting: Setting) -> Iterator[Finding]:
    for suite in (ON_GPU,) if setting.small else (ON_GPU, *ON_CPU):
        yield _suite(suite, setting.device == "cuda")


def _suite(suite: str, on_gpu: bool) -> Finding:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        options = ["-o", "addopts=", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        done = subprocess.run([sys.executable, "-m", "pytest", *options, suite], capture_output=True, text=True)
        sys.stderr.write(done.stdout + done.stderr)
        if not report.exists():
            return judged(suite, False, note=(done.stdout + done.stderr).strip().splitlines()[-1])
        return read_report(suite, ElementTree.parse(report).getroot(), on_gpu)


def read_report(suite: str, report: ElementTree.Element, on_gpu: bool) -> Finding:
    """What a JUnit report says of one suite. Tests of the GPU may skip only where there is none, and then all do."""
    cases = list(report.iter("testcase"))
    skipped = [skip.get("message") for case in cases if (skip := case.find("skipped")) is not None]
    failed = [str(case.get("name")) for case in cases for kind in ("failure", "error") if case.find(kind) is not None]
    all_skip = len(skipped) == len(cases)
    if suite == ON_GPU and not on_gpu and cases and all_skip:
        return left_out(suite, f"all {len(cases)} tests skip here: {skipped[0]}")
    numbers = Number("passed", len(cases) - len(skipped) - len(failed)), Number("skipped", len(skipped))
    ran = not skipped if suite == ON_GPU else not all_skip
    return judged(suite, cases and ran and not failed, *numbers, note=", ".join(failed))


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
