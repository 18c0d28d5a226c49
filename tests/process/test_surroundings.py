"""What ranks do not take from where they are started: their cores, and modules that lie about."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from ssd_runtime.config import load_config
from ssd_runtime.host.allotment import choose_cores
from ssd_runtime.host.cores import BINDING, allowed_cores
from tests.process.conftest import Start
from tests.process.runs import PLAIN, ROOT, SSD, TORCHRUN, Run, error_line

pytestmark = pytest.mark.process
BOUND = {**dict.fromkeys(BINDING, "0"), "OMP_PROC_BIND": "true", "KMP_AFFINITY": "compact"}  # as clusters set them


def assert_every_thread_keeps_to_the_cores_of_its_rank(run: Run, config: Path) -> None:
    chosen = choose_cores(load_config(config), allowed_cores())
    for rank, cores in enumerate(chosen.values()):
        threads = [int(task.name) for task in Path(f"/proc/{run.rank(rank).pid}/task").iterdir()]
        assert threads
        found = {thread: psutil.Process(thread).cpu_affinity() for thread in threads}
        assert all(tuple(allowed) == cores for allowed in found.values()), f"rank {rank}, on {cores}: {found}"


def test_ranks_keep_to_their_own_cores_where_openmp_is_told_to_bind(ssd: Start, run: Start, config: Path) -> None:
    ours = ssd("up", variables={**PLAIN, **BOUND})
    ours.until("address: ")
    assert_every_thread_keeps_to_the_cores_of_its_rank(ours, config)
    (said,) = [line for line in ours.err.splitlines() if "ignored" in line]
    assert all(f"{name}={value}" in said for name, value in BOUND.items())
    ours.kill()
    by_hand = run(
        *TORCHRUN,
        "--nproc-per-node",
        "2",
        "-m",
        "launcher.worker",
        "--config",
        str(config),
        variables={**PLAIN, **BOUND},
    )
    by_hand.until("address: ")
    assert_every_thread_keeps_to_the_cores_of_its_rank(by_hand, config)


def test_modules_in_the_working_directory_are_not_taken_for_pythons_or_ours(
    run: Start, config: Path, tmp_path: Path
) -> None:
    hostile = tmp_path / "hostile"
    for package in ("tokenizers", "torch", "ssd_runtime"):
        (hostile / package).mkdir(parents=True)
        (hostile / package / "__init__.py").write_text("raise ImportError('of the working directory')")
    for module in ("random", "queue", "numpy", "launcher", "zmq", "click"):
        (hostile / f"{module}.py").write_text("raise ImportError('of the working directory')")
    answering = run(
        sys.executable,
        "-P",
        *SSD[1:],
        "generate",
        "--config",
        str(config),
        "--raw",
        "-p",
        "the",
        "--max-tokens",
        "5",
        cwd=hostile,
        variables={**PLAIN, "PYTHONPATH": str(ROOT)},
    )
    assert answering.exit_code(90) == 0, error_line(answering.err)
