"""Tiny models on disk, and runs that are cleaned up whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.runs import SSD, Run
from tests.tiny_models import write_hf

CONFIG = """
[target]
model = "{directory}/target"
dtype = "fp32"

[draft]
model = "{directory}/draft"
dtype = "fp32"

[engine]
max_model_len = 4096
block_size = 8

[speculation]
adapt = false
lookahead = 3
budget = 4

[timeouts]
load = 60.0
handshake = 30.0
link = 10.0
shutdown = 5.0
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of models: a target, a fast draft that often agrees with it, another target, another vocabulary."""
    directory = tmp_path_factory.mktemp("models")
    write_hf(directory / "target", seed=1, num_layers=40)
    write_hf(directory / "draft", seed=1, noise=0.02)
    write_hf(directory / "other", seed=5)
    write_hf(directory / "foreign", seed=1, vocab_size=290)
    return directory


@pytest.fixture(scope="session")
def config(models: Path) -> Path:
    """A run of the tiny pair."""
    path = models / "run.toml"
    path.write_text(CONFIG.format(directory=models))
    return path


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start commands that live as long as the tests of one file."""
    runs: list[Run] = []

    def start(*command: str) -> Run:
        runs.append(Run(tmp_path_factory.mktemp("runs") / "run", command))
        return runs[-1]

    yield start
    for one in runs:
        one.kill()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """Start a command; `how`: further fields of the run."""
    runs: list[Run] = []

    def start(*command: str, **how: Any) -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", command, **how))
        return runs[-1]

    yield start
    for one in runs:
        one.kill()


@pytest.fixture
def ssd(run: Start, config: Path) -> Start:
    """Start an `ssd` command with the tiny pair."""
    return lambda verb, *arguments, **how: run(*SSD, verb, "--config", str(config), *arguments, **how)
