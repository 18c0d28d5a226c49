"""Compile the CUDA kernels to objects, beside any torch and without a GPU, and hold ptxas to the budgets below.

The C++ that registers them is `ops/host_check.py`'s part: it needs torch and no nvcc.

Fails where a source does not compile, a kernel spills registers or exceeds its budget, or a kernel has no budget.
Architectures: TORCH_CUDA_ARCH_LIST as torch reads it ("8.0;9.0+PTX"), by default sm_80, sm_90, sm_100 and PTX.

    python ops/cuda_check.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "cuda_ext" / "csrc" / "cuda"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"


@dataclass(frozen=True)
class Budget:
    """What a kernel may use: registers a thread, bytes of static shared memory a block.

    80 registers leave an SM of 65536 room for three blocks of 256 threads, 40 for six.
    """

    registers: int
    shared_bytes: int


BUDGETS = {
    "copy_branch_kernel": Budget(40, 0),  # up to 48 KiB of dynamic shared memory, see indexing.h
    "write_kv_kernel": Budget(40, 0),
    "write_kv_convert_kernel": Budget(40, 0),
    "rollback_kernel": Budget(40, 0),
    "match_outcomes_kernel": Budget(40, 0),
    "sample_shared_noise_kernel": Budget(80, 6656),
}

ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\S+)' for '(?P<architecture>\w+)'")
SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel on one architecture."""

    symbol: str
    architecture: str
    registers: int
    shared_bytes: int
    spilled_bytes: int

    def kernel(self) -> str | None:
        """The longest known name in the mangled symbol."""
        names = [name for name in BUDGETS if re.search(rf"(?<!\d){len(name)}{name}", self.symbol)]
        return max(names, key=len, default=None)

    def complaint(self) -> str | None:
        """What is wrong, or None."""
        name = self.kernel()
        if name is None:
            return f"{self.symbol} has no budget in {Path(__file__).name}"
        budget = BUDGETS[name]
        if self.spilled_bytes:
            return f"{name} spills {self.spilled_bytes} bytes"
        if self.registers > budget.registers:
            return f"{name} uses {self.registers} registers, its budget is {budget.registers}"
        if self.shared_bytes > budget.shared_bytes:
            return f"{name} uses {self.shared_bytes} bytes of shared memory, its budget is {budget.shared_bytes}"
        return None


def parse(report: str) -> list[Usage]:
    """The usages in what `nvcc -Xptxas -v` prints."""
    usages = []
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", report):
        entry, used, spills, shared = (pattern.search(part) for pattern in (ENTRY, USED, SPILLS, SHARED))
        if entry is None:
            continue
        if used is None or spills is None:
            raise ValueError(f"ptxas says nothing of {entry['symbol']}; its report must have changed")
        spilled = int(spills["stores"]) + int(spills["loads"])
        shared_bytes = int(shared["bytes"]) if shared else 0
        usages.append(Usage(entry["symbol"], entry["architecture"], int(used["registers"]), shared_bytes, spilled))
    return usages


def gencodes(architectures: str) -> list[str]:
    """nvcc's flags for a list as in TORCH_CUDA_ARCH_LIST."""
    flags = []
    for name in re.split(r"[;,\s]+", architectures.strip()):
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+a?f?", number):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: cannot read {name!r}; write for example 8.0;9.0+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def compile_sources(nvcc: str, directory: Path) -> str:
    """Compile every .cu to an object; returns what ptxas reports. Raises CalledProcessError."""
    report = ""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    for source in sorted(SOURCES.glob("*.cu")):
        command = [nvcc, "-O3", "-std=c++17", "--fmad=false", "-Xptxas", "-v", *gencodes(architectures)]
        command += ["-c", str(source), "-o", str(directory / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            sys.stderr.write(done.stdout + done.stderr)
            done.check_returncode()
        report += done.stdout + done.stderr
    return report


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: no nvcc in CUDA_HOME or PATH; the CUDA kernels have not been compiled", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        try:
            usages = parse(compile_sources(nvcc, Path(directory)))
        except subprocess.CalledProcessError as error:
            print(f"cuda-check: {' '.join(error.cmd)} failed", file=sys.stderr)
            return 1
    complaints = [f"{usage.architecture}: {wrong}" for usage in usages if (wrong := usage.complaint())]
    for name, budget in BUDGETS.items():
        mine = [usage for usage in usages if usage.kernel() == name]
        if not mine:
            complaints.append(f"{name} has a budget and is not compiled")
            continue
        registers, shared = max(usage.registers for usage in mine), max(usage.shared_bytes for usage in mine)
        print(f"{name:28} {registers:3} of {budget.registers:3} registers, {shared:5} of {budget.shared_bytes:5} bytes")
    for complaint in complaints:
        print(f"cuda-check: {complaint}", file=sys.stderr)
    architectures = sorted({usage.architecture for usage in usages})
    print(f"cuda-check: {len(usages)} kernels on {', '.join(architectures)}, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
