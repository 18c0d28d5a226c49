"""Does the extension fit the oldest torch that pyproject.toml takes? Needs a C++ compiler, no nvcc, no GPU.

Compiles every C++ source of the extension against that torch's headers, and those of the CUDA side, which a CPU build
leaves out, against the torch at hand too. Then looks whether the extension that was built calls anything of torch that
the oldest does not declare: on the stable ABI, one that is built with any torch runs with all of them.

    python -m ops.host_check
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setup import ROOT, SOURCES, STABLE_ABI, oldest

# Of all wheels of a torch the smallest, 80 MB; its headers are the same for every platform, as far as we include them.
PLATFORM = ("--platform=macosx_11_0_arm64", "--python-version=3.11", "--only-binary=:all:")
FLAGS = ("-std=c++17", "-fsyntax-only", "-fPIC", "-Wall", "-Wno-psabi", "-Werror", STABLE_ABI)


def oldest_headers() -> Path:
    """The directory of the oldest torch's headers: downloaded once for each environment. Raises CalledProcessError."""
    version = ".".join(map(str, oldest("torch")))
    kept = Path(sys.prefix) / f"torch-{version}-headers"
    if kept.exists():
        return kept / "torch" / "include"
    with tempfile.TemporaryDirectory(dir=sys.prefix) as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*command, *PLATFORM, f"--dest={directory}", f"torch=={version}.*"], check=True, timeout=540)
        (wheel,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                Path(directory, "headers"), [name for name in archive.namelist() if name.startswith("torch/include/")]
            )
        Path(directory, "headers").rename(kept)
    return kept / "torch" / "include"


def complaint(source: Path, headers: list[str]) -> str | None:
    """What the compiler says of a source, if anything."""
    command = [*os.environ.get("CXX", "c++").split(), *FLAGS, *(f"-isystem{path}" for path in headers), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return None if done.returncode == 0 else f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def undeclared(library: Path, headers: Path) -> set[str]:
    """What a library calls of torch's C interface that these headers do not declare."""
    command = ["nm", "--dynamic", "--undefined-only", str(library)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    called = set(re.findall(r"\bU ((?:aoti_)?torch_\w+)", said))
    declared = "".join(path.read_text() for path in (headers / "torch" / "csrc").rglob("*shim*.h"))
    return called - set(re.findall(r"\b(?:aoti_)?torch_\w+", declared))


def main() -> int:
    from torch.utils import cpp_extension

    try:
        headers = oldest_headers()
    except (subprocess.SubprocessError, OSError) as error:
        print(f"host-check: the oldest torch's headers cannot be had: {error}", file=sys.stderr)
        return 1
    cuda = sorted(SOURCES.glob("cuda/*.cpp"))
    pairs = [(source, [str(headers)]) for source in [*sorted(SOURCES.glob("*.cpp")), *cuda]]
    pairs += [(source, cpp_extension.include_paths()) for source in cuda]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = [said for said in pool.map(lambda pair: complaint(*pair), pairs) if said]
    libraries = sorted((ROOT / "cuda_ext").glob("_C*.so"))
    for library in libraries:
        if names := undeclared(library, headers):
            complaints.append(f"{library.name} calls what the oldest torch has not: {', '.join(sorted(names))}")
    for said in complaints:
        print(f"host-check: {said}", file=sys.stderr)
    number = ".".join(map(str, oldest("torch")))
    print(
        f"host-check: torch {number}, {len(pairs)} compilations, {len(libraries)} library, {len(complaints)} complaints"
    )
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
