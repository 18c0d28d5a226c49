"""Roles, devices, cores: plain questions with plain answers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ssd_runtime import topology
from ssd_runtime.config import Config, ModelConfig, SpeculationConfig
from ssd_runtime.errors import ConfigError

CPU = torch.device("cpu")


def config(target: ModelConfig | None = None, draft: ModelConfig | None = None, mode: str = "ssd") -> Config:
    speculation = SpeculationConfig(mode=mode)  # type: ignore[arg-type]
    return Config(target=target or ModelConfig(), draft=draft or ModelConfig(), speculation=speculation)


def test_rank_0_is_the_target_and_rank_1_the_draft() -> None:
    assert [topology.role_of(rank, 2) for rank in (0, 1)] == ["target", "draft"]
    assert topology.role_of(0, 1) == "target"


@pytest.mark.parametrize(("rank", "world_size"), [(0, 3), (0, 0), (5, 8), (2, 2), (-1, 2)])
def test_impossible_ranks_are_told_what_is_possible(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=r"0 target, rank 1 draft|ranks are 0 to 1"):
        topology.role_of(rank, world_size)


def test_a_rank_takes_the_gpu_of_its_local_rank() -> None:
    assert topology.device_for("cuda", 1, device_count=2) == torch.device("cuda", 1)
    assert topology.device_for("cpu", 1, device_count=2) == CPU


def test_missing_gpus_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        topology.device_for("cuda", 0, device_count=0)
    with pytest.raises(ConfigError, match="has 1"):
        topology.device_for("cuda", 1, device_count=1)


def test_nccl_carries_the_link_only_between_two_gpus() -> None:
    assert topology.link_backend("cuda", "cuda") == "nccl"
    assert {topology.link_backend(*pair) for pair in (("cpu", "cpu"), ("cuda", "cpu"), ("cpu", "cuda"))} == {"gloo"}


def test_frames_live_on_the_gpu_only_with_nccl() -> None:
    gpu = torch.device("cuda", 0)
    assert topology.link_device("nccl", gpu) == gpu
    assert topology.link_device("gloo", gpu) == CPU


@pytest.mark.parametrize(
    ("threads", "allowed", "target", "draft"),
    [
        ((1, 1), (0, 1), (0,), (1,)),
        ((1, 1), (3, 5, 7), (3,), (5,)),
        ((2, 1), (0, 1, 2, 3), (0, 1), (2,)),
        ((4, 4), (0, 1, 2, 3), (0, 1, 2), (3,)),
        ((2, 2), (0, 1), (0,), (1,)),
        ((1, 1), (4,), (4,), (4,)),
    ],
)
def test_target_and_draft_get_cores_of_their_own_where_there_are_enough(
    threads: tuple[int, int], allowed: tuple[int, ...], target: tuple[int, ...], draft: tuple[int, ...]
) -> None:
    asked = config(ModelConfig(threads=threads[0]), ModelConfig(threads=threads[1]))
    assert topology.choose_cores(asked, allowed) == topology.Cores(target, draft)


def test_named_cores_are_taken_and_the_other_role_goes_around_them() -> None:
    assert topology.choose_cores(config(draft=ModelConfig(cores=(0,))), (0, 1)) == topology.Cores((1,), (0,))


def test_cores_outside_the_allowed_ones_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"draft.cores' names 9, but this process may only use 0-1,3"):
        topology.choose_cores(config(draft=ModelConfig(cores=(9,))), (0, 1, 3))


def test_a_role_on_a_gpu_leaves_the_cores_to_the_other() -> None:
    asked = config(ModelConfig(device="cuda"), ModelConfig(threads=2))
    assert topology.choose_cores(asked, (0, 1)) == topology.Cores((), (0, 1))


def test_a_draft_alone_on_its_host_takes_the_first_cores() -> None:
    assert topology.choose_cores(config(), (0, 1), here=("draft",)) == topology.Cores((), (0,))


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


def test_pinning_keeps_a_process_on_its_cores_and_allowed_cores_as_they_were() -> None:
    core = topology.allowed_cores()[-1]
    script = (
        "import os, torch; from ssd_runtime import topology; before = topology.allowed_cores();"
        f"topology.pin(({core},), 4); unchanged = before == topology.allowed_cores();"
        "print(sorted(os.sched_getaffinity(0)), torch.get_num_threads(), unchanged)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[0] == f"[{core}] 1 True"


def test_describe_names_cores_and_torch_and_never_fails() -> None:
    text = topology.describe()
    assert torch.__version__ in text
    assert topology.listed(topology.allowed_cores()) in text
    assert "gpu" in text


def test_cores_are_listed_in_runs() -> None:
    assert topology.listed((8, 0, 1, 2, 4)) == "0-2,4,8"


# ---- a target of several ranks ---------------------------------------------------------------------------------------


def shared(ranks: int, mode: str = "ssd", **target: object) -> Config:
    return config(ModelConfig(tensor_parallel=ranks, **target), mode=mode)  # type: ignore[arg-type]


def placed(asked: Config, rank: int, world_size: int, local_rank: int, here: int) -> topology.Placement:
    environ = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": here}
    return topology.place(asked, {name: str(value) for name, value in environ.items()})


def test_the_first_ranks_share_the_target_and_the_next_one_drafts() -> None:
    assert [topology.role_of(rank, 4, 3) for rank in range(4)] == ["target", "target", "target", "draft"]
    assert [topology.role_of(rank, 2, 2) for rank in range(2)] == ["target", "target"]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (0, 5), (4, 4)])
def test_ranks_that_do_not_make_up_a_shared_target_are_told_what_does(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=r"start 4 \(ranks 0 to 2 target, rank 3 draft\) or 3|ranks are 0 to 3"):
        topology.role_of(rank, world_size, 3)


def test_a_shared_target_without_its_draft_can_only_decode_plainly() -> None:
    assert topology.place(shared(2, "ar"), {"RANK": "1", "WORLD_SIZE": "2"}).num_drafts == 0
    with pytest.raises(ConfigError, match=r"needs 3 ranks \(ranks 0 to 1 target, rank 2 draft\), not 2"):
        topology.place(shared(2), {"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("cores", "count", "shares"),
    [
        ((0, 1), 2, [(0,), (1,)]),
        ((0, 1, 2, 3, 4), 2, [(0, 1), (2, 3, 4)]),
        ((3,), 3, [(3,), (3,), (3,)]),
        ((3, 4), 3, [(3,), (4,), (3,)]),
        ((), 2, [(), ()]),
    ],
)
def test_target_ranks_of_one_host_share_out_its_cores(cores: tuple, count: int, shares: list) -> None:
    assert [topology.share_out(cores, index, count) for index in range(count)] == shares


def test_each_target_rank_gets_its_threads_and_the_draft_goes_around_them() -> None:
    asked = shared(2, threads=2)
    assert topology.choose_cores(asked, range(8), num_targets=2) == topology.Cores((0, 1, 2, 3), (4,))
    assert topology.choose_cores(asked, range(4), num_targets=2) == topology.Cores((0, 1, 2), (3,))


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
