"""Roles, devices, cores: plain questions with plain answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from launcher import preflight
from ssd_runtime.config import Config, DeploymentConfig, ModelConfig, SpeculationConfig, load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host import topology
from ssd_runtime.host.cores import listed
from ssd_runtime.host.topology import Placement

CPU = torch.device("cpu")


def config(target: ModelConfig | None = None, draft: ModelConfig | None = None, mode: str = "ssd") -> Config:
    speculation = SpeculationConfig(mode=mode)  # type: ignore[arg-type]
    return Config(target=target or ModelConfig(), draft=draft or ModelConfig(), speculation=speculation)


@pytest.mark.parametrize(
    ("num_targets", "most_drafts", "roles"),
    [(1, 1, "td"), (1, 1, "t"), (3, 1, "tttd"), (2, 1, "tt"), (2, 2, "ttdd"), (2, 3, "ttd")],
)
def test_the_first_ranks_are_targets_and_the_next_draft(num_targets: int, most_drafts: int, roles: str) -> None:
    world = len(roles)  # drafts that are missing may come as torchruns of their own
    assert "".join(topology.role_of(rank, world, num_targets, most_drafts)[0] for rank in range(world)) == roles


@pytest.mark.parametrize(
    ("num_targets", "rank", "world_size"),
    [(1, 0, 3), (1, 0, 0), (1, 5, 8), (1, 2, 2), (1, -1, 2), (3, 0, 1), (3, 0, 2), (3, 0, 5), (3, 4, 4)],
)
def test_impossible_ranks_are_told_what_is_possible(num_targets: int, rank: int, world_size: int) -> None:
    says = {
        1: r"start 2 ranks \(rank 0 target, rank 1 draft\) or 1|ranks are 0 to 1",
        3: r"start 4 ranks \(ranks 0 to 2 target, rank 3 draft\) or 3|ranks are 0 to 3",
    }
    with pytest.raises(ConfigError, match=says[num_targets]):
        topology.role_of(rank, world_size, num_targets)


GPU, GPU_DRAFT = ModelConfig(device="cuda"), ModelConfig(device="cuda", dtype="bf16")


@pytest.mark.parametrize(
    ("asked", "devices"),
    [
        (config(GPU, GPU_DRAFT), ["cuda:0", "cuda:1"]),
        (config(ModelConfig(), GPU_DRAFT), ["cpu", "cuda:0"]),
        (config(GPU, ModelConfig()), ["cuda:0", "cpu"]),
        (replace(config(GPU, GPU_DRAFT), deployment=DeploymentConfig(share_gpu=True)), ["cuda:0", "cuda:0"]),
    ],
)
def test_a_rank_is_placed_on_a_gpu_counted_among_those_ranks_that_want_one(
    asked: Config, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len({"cpu", *devices}) - 1)
    assert [str(placed(asked, rank, 2, rank, 2).device) for rank in range(2)] == devices
    for group in (topology.Group("target"), topology.Group("draft", "192.0.2.1:7333")):
        alone = topology.place(asked, {}, group).device
        assert str(alone) == devices[group.role == "draft"].replace("1", "0"), "a torchrun of its own counts from 0"


def test_missing_gpus_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        topology.devices_of(config(GPU), ["target"], device_count=0)
    with pytest.raises(ConfigError, match=r"and it has 1: set deployment\.share_gpu = true"):
        topology.devices_of(config(GPU, GPU_DRAFT), ["target", "draft"], device_count=1)


def on_gpus(backend: str, *more: str) -> Config:
    return load_config(
        None, ["target.device=cuda", "draft.device=cuda", "draft.dtype=bf16", f"link.backend={backend}", *more]
    )


def test_frames_travel_over_gloo_unless_nccl_is_asked_for() -> None:
    asked = ("auto", "gloo", "nccl")
    assert [topology.link_backend(on_gpus(backend), {}) for backend in asked] == ["gloo", "gloo", "nccl"]


def test_nccl_between_ranks_on_one_gpu_is_refused_unless_nccl_was_told_that_they_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = on_gpus("nccl", "deployment.share_gpu=true")
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    with pytest.raises(ConfigError, match="NCCL refuses two ranks on one GPU"):
        preflight.check_devices(shared)  # before any rank is started, and before a GPU is looked for
    for environ in ({}, {"NCCL_MULTI_RANK_GPU_ENABLE": "0"}):
        with pytest.raises(ConfigError, match="NCCL_MULTI_RANK_GPU_ENABLE=1; set that"):
            topology.link_backend(shared, environ)
    assert topology.link_backend(shared, {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}) == "nccl"
    assert topology.link_backend(on_gpus("auto", "deployment.share_gpu=true"), {}) == "gloo"


def test_frames_live_on_the_gpu_only_with_nccl() -> None:
    gpu = torch.device("cuda", 0)
    for backend, where in (("nccl", gpu), ("gloo", None)):
        assert Placement("draft", 1, 2, gpu, backend, (), 1, range(2)).link_gpu == where  # type: ignore[arg-type]


def test_cores_outside_the_allowed_ones_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"draft.cores' names 9, but this process may only use 0-1,3"):
        topology.cores_of(config(draft=ModelConfig(cores=(9,))), ["target", "draft"], (0, 1, 3), topology.Hardware())


def test_a_rank_is_placed_by_torchruns_variables() -> None:
    allowed = topology.allowed_cores()
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    placement = topology.place(config(), environ)
    assert (placement.role, placement.rank, placement.world_size) == ("draft", 1, 2)
    assert (placement.device, placement.link_backend) == (CPU, "gloo")
    assert set(placement.cores) <= set(allowed)
    assert placement.cores == topology.cores_by_role(config(), 2)["draft"]


def test_without_torchrun_there_is_a_target_alone() -> None:
    assert topology.place(config(mode="ar"), {}).role == "target"
    with pytest.raises(ConfigError, match="needs 2 ranks"):
        topology.place(config(mode="ssd"), {})


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"):
        topology.place(config(), {"WORLD_SIZE": "two"})


def test_describe_names_cores_and_torch_and_never_fails() -> None:
    text = topology.describe()
    assert torch.__version__ in text
    assert listed(topology.allowed_cores()) in text
    assert "gpu" in text


# ---- a target of several ranks ---------------------------------------------------------------------------------------


def shared(ranks: int, mode: str = "ssd", **target: object) -> Config:
    return config(ModelConfig(tensor_parallel=ranks, **target), mode=mode)  # type: ignore[arg-type]


def placed(asked: Config, rank: int, world_size: int, local_rank: int, here: int) -> topology.Placement:
    environ = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": here}
    return topology.place(asked, {name: str(value) for name, value in environ.items()})


def test_a_shared_target_without_its_draft_can_only_decode_plainly() -> None:
    assert topology.place(shared(2, "ar"), {"RANK": "1", "WORLD_SIZE": "2"}).num_drafts == 0
    with pytest.raises(ConfigError, match=r"needs 3 ranks \(ranks 0 to 1 target, rank 2 draft\), not 2"):
        topology.place(shared(2), {"RANK": "0", "WORLD_SIZE": "2"})


def test_target_ranks_on_two_hosts_number_their_cores_from_the_first_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three target ranks and the draft, two ranks a host."""
    monkeypatch.setattr(topology, "allowed_cores", lambda: (0, 1, 2, 3))
    asked = shared(3)
    found = [placed(asked, rank, 4, rank % 2, 2) for rank in range(4)]
    assert [place.role for place in found] == ["target", "target", "target", "draft"]
    assert [place.cores for place in found] == [(0,), (1,), (0,), (1,)]
    assert [place.num_drafts for place in found] == [1] * 4


def test_the_cores_of_each_target_rank_are_named_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "allowed_cores", lambda: (0, 1, 2))
    assert topology.cores_by_role(shared(2), 3) == {"target 0": (0,), "target 1": (1,), "draft": (2,)}
    assert topology.cores_by_role(shared(2, "ar"), 2) == {"target 0": (0,), "target 1": (1,)}


def test_the_group_of_a_target_on_gpus_is_nccl() -> None:
    assert topology.group_backend("cuda") == "nccl"
    assert topology.group_backend("cpu") == "gloo"


# ---- several drafts --------------------------------------------------------------------------------------------------


def with_drafts(drafts: int, targets: int = 1, **draft: object) -> Config:
    return Config(
        target=ModelConfig(tensor_parallel=targets),
        draft=ModelConfig(**draft),  # type: ignore[arg-type]
        deployment=DeploymentConfig(drafts=drafts),
    )


def test_more_or_fewer_drafts_than_are_configured_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"5 ranks .* start 2 to 4 ranks \(rank 0 target, up to 3 drafts from rank 1"):
        topology.role_of(0, 5, 1, 3)
    with pytest.raises(ConfigError, match=r"for 2 drafts set deployment.drafts = 2"):
        topology.role_of(0, 3)
    with pytest.raises(
        ConfigError, match=r"needs 2 to 3 ranks \(rank 0 target, up to 2 drafts from rank 1 on\), not 1"
    ):
        topology.place(with_drafts(2), {})


def test_each_draft_of_a_world_has_a_core_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "allowed_cores", lambda: (0, 1, 2, 3))
    found = [placed(with_drafts(2, 2), rank, 4, rank, 4) for rank in range(4)]
    assert [(place.role, place.cores) for place in found] == [
        ("target", (0,)),
        ("target", (1,)),
        ("draft", (2,)),
        ("draft", (3,)),
    ]
    assert {place.num_drafts for place in found} == {2}
    assert not any(place.claims for place in found)
    assert topology.cores_by_role(with_drafts(3), 4) == {
        "target": (0,),
        "draft 1": (1,),
        "draft 2": (2,),
        "draft 3": (3,),
    }


def test_named_cores_are_shared_out_among_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "allowed_cores", lambda: (0, 1, 2, 3))
    asked = with_drafts(2, cores=(1, 3))
    assert [placed(asked, rank, 3, rank, 3).cores for rank in range(3)] == [(0,), (1,), (3,)]


def test_drafts_on_two_hosts_have_cores_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target and a draft on one host, two drafts on the other."""
    monkeypatch.setattr(topology, "allowed_cores", lambda: (0, 1, 2, 3))
    asked = with_drafts(3)
    hosts = [(0, 0, 2), (1, 1, 2), (2, 0, 2), (3, 1, 2)]
    found = [placed(asked, rank, 4, local, here) for rank, local, here in hosts]
    assert [place.cores for place in found] == [(0,), (1,), (0,), (1,)]
    assert topology.cores_by_role(asked, 4, found[0].here) == {"target": (0,), "draft 1": (1,)}
    assert topology.cores_by_role(asked, 4, found[3].here) == {"draft 2": (0,), "draft 3": (1,)}


def test_a_draft_of_a_torchrun_of_its_own_chooses_among_the_cores_the_target_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topology, "allowed_cores", lambda: (0, 1, 2, 3))
    group = topology.Group("draft", "127.0.0.1:7333")
    beside = topology.place(with_drafts(2), {}, group)
    assert (beside.claims, beside.cores) == (True, (1, 2, 3))
    elsewhere = topology.place(with_drafts(2), {}, topology.Group("draft", "192.0.2.1:7333"))
    assert (elsewhere.claims, elsewhere.cores) == (True, (0, 1, 2, 3))
    named = topology.place(with_drafts(2, cores=(2,)), {}, group)
    assert (named.claims, named.cores) == (False, (2,))
    monkeypatch.setattr(topology, "allowed_cores", lambda: (5,))
    assert topology.place(with_drafts(2), {}, group).cores == (5,)
