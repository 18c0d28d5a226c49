"""A rank sizes its pool by its device, and where the device's memory runs out says so in one line with what to change.

The device is `meta`, which holds any model, and says of its memory what the test says.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launcher.ranks import models
from launcher.ranks.announcer import Announcer
from launcher.ranks.models import Models
from launcher.ranks.rendezvous import SharedTarget
from ssd_runtime.config import Config, load_config
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import Role
from ssd_runtime.host.topology import Placement
from ssd_runtime.model import device_memory, memory
from ssd_runtime.model.device_memory import told
from tests.target_ranks import on_every_rank
from tests.tiny_models import tiny_architecture, write_hf

GIB = 2**30
ROLES: tuple[Role, Role] = ("target", "draft")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


class Device:
    """What a device says of its memory."""

    def __init__(self, free: int, total: int = 0) -> None:
        self.free, self.total = free, total

    def __call__(self, device: torch.device) -> tuple[int, int]:
        assert device.type != "cpu"
        return self.free, self.total


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    asked = Device(10 * GIB)
    monkeypatch.setattr(models, "free_and_total", asked)
    monkeypatch.setattr(device_memory, "free_and_total", asked)
    return asked


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = write_hf(tmp_path / "model")
    gpus = ["target.device=cuda", "draft.device=cuda", "draft.dtype=bf16", "speculation.mode=ar"]
    return load_config(None, [f"target.model={path}", f"draft.model={path}", *gpus, "engine.max_num_seqs=64"])


def models_of(config: Config, role: Role = "target", device: str = "meta") -> Models:
    where = torch.device(device)
    return Models(config, Placement(role, 0, 1, where, "gloo", (), 1, range(1)), Announcer())


def free_for(config: Config, role: Role, blocks: int) -> int:
    """Free memory with which so many blocks fit, and no more."""
    one = memory.demand(config, role, tiny_architecture(vocab_size=300), "cuda")
    return -int(-(one.scratch + one.pool(blocks)) // config.engine.kv_memory)


@pytest.mark.parametrize("role", ROLES)
def test_a_pool_is_as_large_as_what_is_free_once_the_model_is_loaded(
    config: Config, device: Device, role: Role
) -> None:
    rank = models_of(config, role)
    decoder = rank.load(role)
    device.free = free_for(config, role, 300)
    engine = rank.engine_of(rank.blocks_that_fit())
    assert engine == replace(config.engine, num_blocks=300)
    if role == "draft":
        trees = memory.tree_blocks(engine, config.speculation)
        assert Drafter(decoder, engine, config.speculation).allocator.num_blocks == 300 + trees
    device.free = 1000 * GIB
    assert rank.blocks_that_fit() == config.engine.most_blocks == 64 * 128
    device.free = free_for(config, role, 127)
    with pytest.raises(ConfigError, match=f"^{role} rank 0 on meta: .* lower engine.max_model_len to {127 * 16}$"):
        rank.engine_of(rank.blocks_that_fit())


def test_on_a_cpu_and_with_a_number_of_blocks_nothing_is_asked_of_the_device(config: Config, device: Device) -> None:
    device.free = 0
    on_cpu = models_of(config, device="cpu")
    assert on_cpu.blocks_that_fit() == 64 * 128
    asked = replace(config, engine=replace(config.engine, num_blocks=20))
    rank = models_of(asked)
    rank.load("target")
    assert rank.engine_of(rank.blocks_that_fit()) == asked.engine


def test_a_draft_in_the_target_s_process_shares_its_memory(config: Config, device: Device) -> None:
    held = replace(config, deployment=replace(config.deployment, colocated=True))
    alone, both = models_of(config), models_of(held)
    alone.load("target")
    both.load("target")
    both.load("draft")
    device.free = free_for(config, "target", 4000) + free_for(config, "draft", 0)
    assert alone.blocks_that_fit() > 4000 > 2000 >= both.blocks_that_fit() > 1990


def test_roles_on_one_gpu_read_each_other_s_header(config: Config, device: Device) -> None:
    shared = replace(
        config,
        deployment=replace(config.deployment, share_gpu=True),
        speculation=replace(config.speculation, mode="ssd"),
        engine=replace(config.engine, max_num_seqs=4096),
    )
    device.total, found = 10 * GIB, []
    for role in ROLES:
        rank = models_of(shared, role)
        rank.load(role)
        device.free -= GIB  # the second one finds less
        found.append(rank.blocks_that_fit())
    assert found[0] == found[1] > 128


def test_ranks_of_one_target_take_the_least_of_their_pools() -> None:
    fit = (9, 4, 7)
    found = on_every_rank(3, lambda group: SharedTarget(group, group, 5.0).all_loaded(fit[group.rank]))
    assert found == [4, 4, 4]


def test_weights_that_do_not_fit_are_one_line(config: Config, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise NO_MEMORY

    monkeypatch.setattr(models, "load_decoder", load)
    device.free = 3 * GIB // 2
    says = (
        rf"^target rank 0 ran out of memory on meta while loading the target model {config.target.model}: 0\.0 GiB of "
        r"weights, 1\.5 GiB free; use more ranks \(target\.tensor_parallel\) or a smaller dtype or model$"
    )
    with pytest.raises(ConfigError, match=says):
        models_of(config).load("target")


@pytest.mark.parametrize(("num_blocks", "key"), [(0, "kv_memory"), (300, "num_blocks")])
def test_a_pool_that_does_not_fit_names_the_key_that_sized_it(
    config: Config, device: Device, num_blocks: int, key: str
) -> None:
    rank = models_of(replace(config, engine=replace(config.engine, num_blocks=num_blocks)))
    rank.load("target")
    says = rf"^target rank 0 ran out of memory on meta while making the KV pool: .* GiB free; lower engine\.{key}$"
    with pytest.raises(ConfigError, match=says), rank.making_pool(300):
        raise NO_MEMORY


def test_what_nobody_contains_ends_the_rank_with_what_to_change(config: Config) -> None:
    says = r"^draft rank 0 on meta: out of device memory; lower engine\.kv_memory or engine\.prefill_chunk$"
    with pytest.raises(ConfigError, match=says), models_of(config, "draft").computing():
        raise NO_MEMORY
    with pytest.raises(RuntimeError, match=r"^another$"), models_of(config, "draft").computing():
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NO_MEMORY, "out of device memory; lower engine.kv_memory or engine.prefill_chunk"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might"), "out of device memory; lower"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "out of device memory;"),
        (RuntimeError("CUDA error: device-side assert\nmore"), "RuntimeError: CUDA error: device-side assert"),
        (ValueError("of one\nof two"), "ValueError: of one"),
    ],
)
def test_what_went_wrong_is_one_line(error: Exception, says: str) -> None:
    assert told(error).startswith(says)
    assert "\n" not in told(error)


RANK = """
import sys, torch
from launcher.ranks import models
from launcher.ranks import roles
from launcher.ranks.announcer import Announcer

def load(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory.")

models.load_decoder = load
sys.exit(roles.run(None, ("speculation.mode=ar", "target.model=" + sys.argv[1]), None, None, Announcer(), None))
"""


def test_a_rank_that_has_no_memory_for_its_model_ends_with_a_line_and_no_traceback(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "model")
    ended = subprocess.run([sys.executable, "-c", RANK, path], capture_output=True, text=True, timeout=60)
    said = [line for line in ended.stderr.splitlines() if "ran out of memory on cpu while loading" in line]
    assert (ended.returncode, len(said)) == (2, 1), ended.stderr
    assert "bug" not in ended.stderr
    assert "Traceback" not in ended.stderr
