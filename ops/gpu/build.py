"""The extension from source, against the torch that is here, for sm_90.

Built in a copy, since the build in the tree is in use meanwhile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ops.gpu.result import Finding, Number, Setting, judged, run_step

ROOT = Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns("*.so", "__pycache__")
CHECK = "from cuda_ext import compiled; print(compiled.HAS_CUDA_KERNELS, compiled.cpu_level())"


def find(setting: Setting) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for package in ("cuda_ext", "ssd_runtime"):  # the second says the version
            shutil.copytree(ROOT / package, copy / package, ignore=IGNORED)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        jobs = max(2, len(os.sched_getaffinity(0)) - 2)  # of many, two are left to other steps
        environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": str(jobs), "PYTHONPATH": directory}
        start = time.monotonic()
        built = _run([sys.executable, "setup.py", "build_ext", "--inplace"], copy, environment)
        seconds = Number("seconds", time.monotonic() - start, "s")
        yield judged("setup.py build_ext", built.returncode == 0, seconds, note=_end_of(built))
        loaded = _run([sys.executable, "-c", CHECK], copy, environment)
        has_cuda = loaded.stdout.startswith("True")
        yield judged("it loads, with CUDA kernels", loaded.returncode == 0 and has_cuda, note=_end_of(loaded))


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    return done


def _end_of(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return lines[-1] if lines else ""


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
