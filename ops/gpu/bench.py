"""`ssd bench` in a process of its own, and its report as findings. Knows no deployment."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from launcher.bench.report import Report
from ops.gpu.result import Finding, Number, Setting, judged

ON_CPU = ("target.device=cpu", "draft.device=cpu", "draft.threads=1", "deployment.share_gpu=false")
ON_CPU += ("engine.max_model_len=1024",)  # pools of a CPU have the size that is asked for
FEW = ("--limit", "1", "--max-tokens", "12")


def bench(setting: Setting, config: str, options: Sequence[str], overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """Run it and yield a finding for each run, and one on whether all said the same.

    Args:
        config: a file of configs/.
        options: of `ssd bench`, beside --config, --set and --json.
        overrides: as of --set.

    Raises:
        RuntimeError: it failed; its last line.
    """
    sets = ["serve.port=0", *overrides, *(ON_CPU if setting.device == "cpu" else ())]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "bench.json"
        command = [sys.executable, "-m", "launcher.cli", "bench", "--config", f"configs/{config}", "--json", str(out)]
        command += [*options, *(FEW if setting.small else ()), *(part for one in sets for part in ("--set", one))]
        done = subprocess.run(command, capture_output=True, text=True)
        sys.stderr.write(done.stdout + done.stderr)
        if done.returncode:
            raise RuntimeError(f"ssd bench ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
        yield from findings(msgspec.json.decode(out.read_bytes(), type=Report), setting.device)


def findings(report: Report, device: str) -> Iterator[Finding]:
    """Of a report of `ssd bench`. Equal tokens are promised on CPUs, by numerics = "invariant", and by a script."""
    for run in report.runs:
        measured = (
            ("tokens/s", run.tokens_per_second, ""),
            ("over AR", run.speedup, "x"),
            ("tokens a round", run.tokens_per_round, ""),
            ("accepted", run.acceptance, ""),
            ("hits", run.hit_rate, ""),
            ("verify", run.verify_ms.p50, "ms"),
            ("wait", run.wait_ms.p50, "ms"),
            ("draft step", run.draft_step_ms.p50, "ms"),
        )
        yield Finding(run.name, tuple(Number(name, "" if one is None else one, unit) for name, one, unit in measured))
    promised = device == "cpu" or report.label is not None or report.workload.config.engine.numerics == "invariant"
    differing = Number("outputs that differ", report.differing_outputs), Number("of", report.compared_outputs)
    note = report.label or ""
    yield judged("the same tokens in every mode", report.identical_tokens or not promised, *differing, note=note)
