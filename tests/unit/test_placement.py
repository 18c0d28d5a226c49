"""GPUs as NVML tells them, and the plan made of it, on a modelled node of eight H100."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import doctor, placement
from launcher.nodes import seat_ranks
from launcher.ranks import nccl
from ssd_runtime.config import Config, load_config
from ssd_runtime.host import hardware, topology
from ssd_runtime.host.allotment import near_cores
from ssd_runtime.host.cores import Role
from ssd_runtime.host.hardware import Hardware, read
from ssd_runtime.model import memory
from ssd_runtime.model.architecture import Architecture
from tests.recorded_nvml import RecordedNvml
from tests.tiny_models import write_hf

ALL_CORES = tuple(range(224))
NO_NVLINK = {"p2p_status_nvlink": [[5] * 8 for _ in range(8)]}
GIB = 2**30


def llama(layers: int, hidden: int, inner: int, heads: int, tied: bool = False) -> Architecture:
    return Architecture(
        "llama", layers, heads, 8, hidden // heads, hidden, inner, 128256, 1e-5, 5e5, tie_word_embeddings=tied
    )


LLAMA_70B, LLAMA_1B = llama(80, 8192, 28672, 64), llama(16, 2048, 8192, 32, tied=True)


def config(*overrides: str) -> Config:
    on_gpus = ["target.device=cuda", "draft.device=cuda", "draft.dtype=bf16", "target.tensor_parallel=4"]
    return load_config(None, [*on_gpus, "engine.max_model_len=8192", "engine.max_num_seqs=8", *overrides])


def planned(
    *overrides: str, node: Hardware | None = None, counts: tuple[int, ...] = (5,), rdma: tuple[str, ...] = ()
) -> placement.Plan:
    node, asked = read(RecordedNvml(), {}) if node is None else node, config(*overrides)
    models: dict[Role, Architecture] = {"target": LLAMA_70B, "draft": LLAMA_1B}
    seats = seat_ranks(asked.target.tensor_parallel, counts)
    return placement.plan(asked, node, models, seats, ALL_CORES, rdma)


def test_a_node_is_read_with_its_links_memory_and_cores() -> None:
    nvml = RecordedNvml()
    node = read(nvml, {})
    assert nvml.open == 0
    assert len(node.gpus) == 8
    assert {(gpu.name, gpu.nvlinks) for gpu in node.gpus} == {("NVIDIA H100 80GB HBM3", 18)}
    assert [gpu.numa for gpu in node.gpus] == [(0,)] * 4 + [(1,)] * 4
    assert topology.listed(node.gpus[7].cores) == "56-111,168-223"
    assert (node.joint(0, 7), node.joint(3, 3)) == ("nvlink", "same")
    assert node.gpus[0].memory_free == (81559 - 551) * 2**20


def test_without_nvlink_gpus_are_joined_by_what_both_hang_on() -> None:
    node = read(RecordedNvml(**NO_NVLINK), {})
    assert (node.joint(0, 3), node.joint(4, 3), node.joint(3, 4)) == ("numa", "socket", "socket")
    levels = {10: "switch", 20: "switch", 30: "bridge", 40: "numa", 50: "socket"}
    for level, joint in levels.items():
        changed = RecordedNvml(**NO_NVLINK, topology_common_ancestor=[[level] * 8 for _ in range(8)])
        assert read(changed, {}).joint(0, 1) == joint


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        (None, list(range(8))),
        ("6,2", [6, 2]),
        ("", []),
        ("1,99,2", [1]),
        ("GPU-00000000-0000-0000-0000-000000000003", [3]),
    ],
)
def test_cuda_visible_devices_chooses_and_orders(setting: str | None, shown: list[int]) -> None:
    environ = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    node = read(RecordedNvml(), environ)
    assert [gpu.index for gpu in node.gpus] == shown
    if len(shown) == 2:
        assert node.joints == {(0, 1): "nvlink"}


class NoDriver:
    def nvmlInit(self) -> None:  # noqa: N802
        raise RuntimeError("driver not loaded")


def test_a_host_that_cannot_be_asked_has_no_gpus_and_says_why() -> None:
    assert read(NoDriver()) == Hardware(why_none="RuntimeError: driver not loaded")


def test_each_gpu_gets_cores_of_its_own_near_it() -> None:
    node = read(RecordedNvml(), {})
    chosen = [near_cores(node, i, ALL_CORES) for i in range(8)]
    assert all(set(cores) <= set(gpu.cores) for cores, gpu in zip(chosen, node.gpus, strict=True))
    assert [len(cores) for cores in chosen] == [28] * 8
    assert len(set().union(*chosen)) == 224
    assert near_cores(node, 5, (0, 1, 60)) == (60,)  # fewer cores than GPUs: shared
    assert near_cores(node, 5, (0, 1)) == near_cores(Hardware(), 0, ALL_CORES) == ()


def test_four_and_one_fit_on_one_node_with_room_counted_for_the_draft() -> None:
    plan = planned()
    assert [(one.role, one.gpu) for one in plan.ranks] == [("target", i) for i in range(4)] + [("draft", 4)]
    assert (plan.target_joint, plan.link_joint, plan.warnings) == ("nvlink", "nvlink", ())
    target, draft = plan.ranks[0], plan.ranks[4]
    assert target.kv_blocks == draft.kv_blocks == 8 * 8192 // 16
    assert target.kv_bytes == target.kv_blocks * 4 * 327_680
    assert draft.kv_bytes > draft.kv_blocks * 16 * 32_768  # its trees need rows too
    for one in (target, draft):
        taken = memory.CONTEXT + one.weights + one.scratch + one.kv_bytes
        assert one.left == (81559 - 551) * 2**20 - taken > 0
    assert set(draft.cores) <= set(range(56, 112)) | set(range(168, 224))
    assert "GPU 4, cores" in placement.describe(config(), draft)
    assert "4096 KV blocks (65536 tokens) in 5.00 GiB, 0." in placement.describe(config(), target)


def test_a_pool_smaller_than_could_be_used_is_shown_and_no_fault() -> None:
    plan = planned("engine.max_num_seqs=200", "engine.max_model_len=16384")
    assert plan.warnings == ()
    target, draft = plan.ranks[0], plan.ranks[4]
    assert target.left is not None
    assert 512 < target.kv_blocks < draft.kv_blocks < 200 * 1024
    free = (81559 - 551) * 2**20 - memory.CONTEXT - target.weights  # once it is loaded
    block = target.kv_bytes // target.kv_blocks
    assert 0.9 * free - block < target.kv_bytes + target.scratch <= 0.9 * free
    lower = planned("engine.max_num_seqs=200", "engine.max_model_len=16384", "engine.kv_memory=0.5").ranks[0]
    assert lower.kv_bytes + lower.scratch < 0.5 * free


def test_a_target_rank_with_less_free_memory_lowers_the_pools_of_all_and_a_draft_s_own() -> None:
    node = read(RecordedNvml(), {})
    gpus = list(node.gpus)
    gpus[2] = replace(gpus[2], memory_free=36 * GIB)
    plan = planned(node=replace(node, gpus=tuple(gpus)))
    pools = [one.kv_blocks for one in plan.ranks]
    assert len(set(pools[:4])) == 1
    assert 512 <= pools[0] < pools[4] == 4096
    gpus[2], gpus[4] = node.gpus[2], replace(gpus[4], memory_free=5 * GIB)
    (warning,) = planned(node=replace(node, gpus=tuple(gpus))).warnings
    assert "for 4096: set engine.num_blocks = " in warning


def test_two_roles_on_one_gpu_have_equal_pools_and_what_is_left_counts_both() -> None:
    sizes = ("target.tensor_parallel=1", "engine.max_num_seqs=512", "deployment.share_gpu=true")
    node = replace(read(RecordedNvml(), {"CUDA_VISIBLE_DEVICES": "0"}), joints={})
    models: dict[Role, Architecture] = {"target": LLAMA_1B, "draft": LLAMA_1B}
    seats = seat_ranks(1, (2,))
    plan = placement.plan(config(*sizes), node, models, seats, ALL_CORES)
    target, draft = plan.ranks
    assert target.gpu == draft.gpu == 0
    assert target.kv_blocks == draft.kv_blocks > 512
    taken = sum(memory.CONTEXT + one.weights + one.scratch + one.kv_bytes for one in plan.ranks)
    assert target.left == draft.left == node.gpus[0].memory_free - taken
    assert 0.85 * node.gpus[0].memory_total < taken <= 0.9 * node.gpus[0].memory_total


@pytest.mark.parametrize(
    ("overrides", "changes", "num_ranks", "warning"),
    [
        (["target.tensor_parallel=1"], {}, 2, "target rank 0 does not fit: 131.4 GiB of weights, 0."),
        (["engine.num_blocks=262144"], {}, 5, "the KV cache of target rank 0 does not fit: 262144 blocks (320.0 GiB)"),
        (
            ["target.tensor_parallel=2", "engine.max_model_len=131072"],
            {},
            3,
            "target rank 0: GPU 0 has 79.1 GiB free; there is room for",
        ),
        (["target.cores=[200]"], {}, 5, "target rank 0 is pinned to cores 200, which are far from GPU 0"),
        ([], NO_NVLINK, 5, "spread over NVLink islands (joined by the NUMA node)"),
        (["target.tensor_parallel=8"], NO_NVLINK, 9, "spread over sockets (joined by the link between sockets)"),
    ],
)
def test_a_bad_plan_is_told(overrides: list[str], changes: dict[str, Any], num_ranks: int, warning: str) -> None:
    plan = planned(*overrides, node=read(RecordedNvml(**changes), {}), counts=(num_ranks,))
    assert any(warning in one for one in plan.warnings), plan.warnings


def test_ranks_of_other_nodes_take_their_gpus_from_the_first_on() -> None:
    plan = planned(counts=(4, 1))
    assert [(one.node, one.gpu) for one in plan.ranks] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert (plan.target_joint, plan.link_joint, plan.warnings) == ("nvlink", "network", ())
    assert placement.describe(config(), plan.ranks[4], with_node=True).startswith("GPU 0 of node 1, cores ")


def test_a_target_over_several_nodes_is_told_unless_gpus_reach_each_other() -> None:
    apart = planned(counts=(3, 2))
    assert apart.target_joint == "network"
    (warning,) = apart.warnings
    assert (
        "target ranks are spread over nodes 0-1: they exchange activations twice a layer, and this host has no"
        in warning
    )
    assert planned(counts=(3, 2), rdma=("mlx5_0",)).warnings == ()
    on_cpus = planned("target.device=cpu", "draft.device=cpu", counts=(3, 2), rdma=("mlx5_0",))
    assert "between CPUs that is over TCP; keep them on one node" in on_cpus.warnings[0]
    crowded = planned("target.tensor_parallel=8", "deployment.drafts=2", counts=(1, 9), rdma=("mlx5_0",))
    assert crowded.warnings == ()  # that GPUs are missing is said of the devices


def test_doctor_prints_the_plan_and_fails_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("target", "draft"):
        write_hf(tmp_path / name, seed=1)
    models = (f"target.model={tmp_path}/target", f"draft.model={tmp_path}/draft", "target.tensor_parallel=2")
    node = read(RecordedNvml(**NO_NVLINK), {"CUDA_VISIBLE_DEVICES": "3,4,5"})
    monkeypatch.setattr(hardware, "read", lambda: node)
    found = {finding.subject: finding for finding in doctor.examine(config(*models, "engine.max_model_len=64"))}
    assert "GPU 2" in found["draft rank 2"].detail
    assert found["target ranks"].detail == "joined by the link between sockets"
    assert found["placement"].ok is False
    assert "spread over sockets" in found["placement"].detail
    assert "losing the draft must not end the target" in found["TORCH_NCCL_ASYNC_ERROR_HANDLING"].detail


@pytest.mark.parametrize(
    ("visible", "says", "place"),
    [
        ("", "torch sees no GPU here", "no GPU: "),
        ("0", "1 target and 1 draft want 2 GPUs of one host, and it has 1", "GPU 0"),
    ],
)
def test_missing_gpus_are_said_once_of_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, says: str, place: str
) -> None:
    models = (f"target.model={write_hf(tmp_path / 'm')}", f"draft.model={tmp_path}/m", "target.tensor_parallel=1")
    node = read(RecordedNvml(), {"CUDA_VISIBLE_DEVICES": visible})
    monkeypatch.setattr(hardware, "read", lambda: node)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(node.gpus))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {finding.subject: finding for finding in doctor.examine(config(*models, "engine.max_model_len=64"))}
    assert [finding.subject for finding in found.values() if not finding.ok] == ["devices"]
    assert says in found["devices"].detail
    assert found["draft rank 1"].detail.startswith(place)


def test_nccl_settings_respect_the_environment_and_name_the_interface(tmp_path: Path) -> None:
    names = lambda found: {one.name: (one.value, one.chosen) for one in found}  # noqa: E731
    alone = names(nccl.settings({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, tmp_path))
    assert alone["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == ("2", True)
    assert alone["TORCH_NCCL_NONBLOCKING_TIMEOUT"] == ("60", True)
    assert alone["NCCL_IB_DISABLE"] == ("1", True)
    assert "NCCL_SOCKET_IFNAME" not in alone
    (tmp_path / "mlx5_0").mkdir()
    chosen = names(nccl.settings({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, tmp_path))
    assert chosen["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == ("0", False)
    assert "NCCL_IB_DISABLE" not in chosen
    assert nccl.interface_of("127.0.0.1") == "lo"
    assert nccl.interface_of("192.0.2.1") is None
