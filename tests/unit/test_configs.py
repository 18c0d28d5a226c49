"""Every example configuration is one that loads, and those for H100 nodes fit on the modelled node."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.doctor import seats_of
from launcher.placement import plan
from launcher.slurm import Plan, render
from ssd_runtime.config import load_config
from ssd_runtime.cores import Role
from ssd_runtime.hardware import read
from ssd_runtime.model.architecture import Architecture
from tests.recorded_nvml import RecordedNvml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
LONG = 40960  # no model below was made for less
# The published config.json of each model.
MODELS = {
    "Llama-3.1-70B-Instruct": Architecture("llama", 80, 64, 8, 128, 8192, 28672, 128256, 1e-5, 5e5, max_position=LONG),
    "Llama-3.2-1B-Instruct": Architecture(
        "llama", 16, 32, 8, 64, 2048, 8192, 128256, 1e-5, 5e5, tie_word_embeddings=True, max_position=LONG
    ),
    "Qwen3-32B": Architecture("qwen3", 64, 64, 8, 128, 5120, 25600, 151936, 1e-6, 1e6, qk_norm=True, max_position=LONG),
    "Qwen3-0.6B": Architecture(
        "qwen3",
        28,
        16,
        8,
        128,
        1024,
        3072,
        151936,
        1e-6,
        1e6,
        tie_word_embeddings=True,
        qk_norm=True,
        max_position=40960,
    ),
}
FOR_H100 = [path for path in CONFIGS if "h100" in path.name or "two_nodes" in path.name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_example_loads(path: Path) -> None:
    assert load_config(path).engine.max_model_len >= 2048


@pytest.mark.parametrize("path", FOR_H100, ids=lambda path: path.stem)
def test_an_example_for_h100_fits_with_its_draft(path: Path) -> None:
    config = load_config(path)
    models: dict[Role, Architecture] = {
        "target": MODELS[Path(config.target.model).name],
        "draft": MODELS[Path(config.draft.model).name],
    }
    for arch in models.values():
        arch.check(path.name, {})
        arch.check_length(config.engine.max_model_len, path.name)
    num_nodes = 2 if "two_nodes" in path.name else 1
    made = plan(config, read(RecordedNvml(), {}), models, seats_of(config, num_nodes), range(224))
    assert made.warnings == ()
    assert {one.node for one in made.ranks} == set(range(num_nodes))
    assert all(one.gpu is not None for one in made.ranks)


@pytest.mark.parametrize("path", FOR_H100, ids=lambda path: path.stem)
def test_an_example_for_h100_becomes_two_jobs(path: Path) -> None:
    config = load_config(path)
    target, draft, _ = render(Plan(config, path)).values()
    assert f"--gpus-per-node={config.target.tensor_parallel}\n" in target
    assert "--gpus-per-node=1\n" in draft
