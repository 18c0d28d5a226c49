"""Every example configuration is one that loads, and those for GPUs fit on what they are for, as it was recorded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launcher import doctor, preflight
from launcher.nodes import seats_of
from launcher.placement import plan
from launcher.slurm import Plan, render
from ssd_runtime.config import Config, load_config
from ssd_runtime.host import hardware, topology
from ssd_runtime.host.cores import Role
from ssd_runtime.host.hardware import Hardware, read
from ssd_runtime.model.architecture import Architecture
from tests.recorded_nvml import RecordedNvml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
LONG = 40960  # no model below was made for less
# The published config.json of each model.
MODELS = {
    "Llama-3.1-70B-Instruct": Architecture("llama", 80, 64, 8, 128, 8192, 28672, 128256, 1e-5, 5e5, max_position=LONG),
    "Llama-3.1-8B-Instruct": Architecture("llama", 32, 32, 8, 128, 4096, 14336, 128256, 1e-5, 5e5, max_position=LONG),
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
FOR_GPUS = [path for path in CONFIGS if load_config(path).target.device == "cuda"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_example_loads(path: Path) -> None:
    assert load_config(path).engine.max_model_len >= 2048


def hardware_for(path: Path) -> tuple[Hardware, range]:
    """What an example is for: one GPU and sixteen cores, or a node of eight."""
    one = "one_gpu" in path.name or "gpu_target" in path.name
    return read(RecordedNvml(), {"CUDA_VISIBLE_DEVICES": "0"} if one else {}), range(16 if one else 224)


def models_of(config: Config) -> dict[Role, Architecture]:
    return {"target": MODELS[Path(config.target.model).name], "draft": MODELS[Path(config.draft.model).name]}


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_an_example_for_gpus_fits_with_its_draft(path: Path) -> None:
    config = load_config(path)
    for arch in models_of(config).values():
        arch.check(path.name, {})
        arch.check_length(config.engine.max_model_len, path.name)
    num_nodes = 2 if "two_nodes" in path.name else 1
    node, allowed = hardware_for(path)
    made = plan(config, node, models_of(config), seats_of(config, num_nodes), allowed)
    assert made.warnings == ()
    assert {one.node for one in made.ranks} == set(range(num_nodes))
    for one in made.ranks:
        assert (one.gpu is None) == (getattr(config, one.role).device == "cpu")


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_an_example_for_gpus_says_that_it_has_not_run_and_why_its_numerics_are_not_fast(path: Path) -> None:
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("numerics")] or ["numerics # default"]
    assert load_config(path).engine.numerics == "fast" or "#" in line
    assert "NOT RUN on GPUs yet" in path.read_text()


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_the_doctor_is_content_with_an_example_on_the_hardware_it_is_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(path)
    node, allowed = hardware_for(path)
    archs = models_of(config)
    anything = SimpleNamespace(difference=lambda other: None)
    headers = {role: SimpleNamespace(arch=arch, format="hf", vocabulary=anything) for role, arch in archs.items()}
    monkeypatch.setattr(hardware, "read", lambda: node)
    monkeypatch.setattr(topology, "allowed_cores", lambda: tuple(allowed))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(node.gpus))
    monkeypatch.setattr(doctor, "_header", lambda model: headers["target" if model == config.target else "draft"])
    monkeypatch.setattr(preflight, "inspect", lambda config: (headers["target"], headers["draft"]))
    found = {one.subject: one for one in doctor.examine(config, seats_of(config, 2 if "two_nodes" in path.name else 1))}
    assert [one for one in found.values() if not one.ok] == []
    if config.deployment.share_gpu:
        assert found["devices"].detail == "target on cuda:0, draft on cuda:0, link over gloo"
        assert "target rank 0 and draft rank 1 share GPU 0" in found["placement"].detail
    if config.draft.device == "cpu":
        assert found["devices"].detail == "target on cuda:0, draft on cpu, link over gloo"
        assert found["cores"].detail == "16 usable; target on cores 0-7, draft on cores 8-15"


@pytest.mark.parametrize("path", FOR_GPUS, ids=lambda path: path.stem)
def test_an_example_for_gpus_becomes_the_jobs_that_its_roles_need(path: Path) -> None:
    config = load_config(path)
    if config.deployment.share_gpu:
        (job,) = render(Plan(config, path, form="single-job")).values()
        assert "--gpus-per-node=1\n" in job
        return
    target, draft, _ = render(Plan(config, path)).values()
    assert f"--gpus-per-node={config.target.tensor_parallel}\n" in target
    assert ("--gpus-per-node=1\n" in draft) == (config.draft.device == "cuda")
