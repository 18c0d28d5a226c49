"""Which GPU and which cores each rank of a host gets: for every number of ranks, of GPUs and of cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest

from launcher.nodes import seat_ranks, spread
from ssd_runtime.config import Config, DeploymentConfig, ModelConfig
from ssd_runtime.host.allotment import (
    choose_cores,
    cores_beside,
    cores_of,
    divide_near,
    gpus_of,
    in_blocks,
    lacks_gpus,
    model_of,
)
from ssd_runtime.host.cores import Role, crowding
from ssd_runtime.host.hardware import Gpu, Hardware, read
from tests.recorded_nvml import RecordedNvml

H100 = read(RecordedNvml(), {})
CORES = tuple(range(48))
MACHINES = (
    Hardware(),
    Hardware((Gpu(0, "GPU", "0", 1, 1, cores=CORES),)),
    Hardware(tuple(Gpu(i, "GPU", str(i), 1, 1, cores=near) for i, near in enumerate((CORES[::2], CORES[1::2], ())))),
    Hardware(tuple(Gpu(i, "GPU", str(i), 1, 1, cores=CORES[:4]) for i in range(8))),
    H100,
)
ALLOWED = [CORES[:1], CORES[3:5], CORES[:3], CORES[::9], CORES[2:10], CORES[:16], CORES]


def configs() -> Iterator[Config]:
    """Every kind of device for either role, with few and many ranks and threads."""
    for devices in product(("cpu", "cuda"), repeat=2):
        for targets, drafts, threads in product((1, 2, 4), (1, 2, 3), ((1, 1), (2, 5))):
            for share in {False, devices == ("cuda", "cuda")}:
                yield Config(
                    ModelConfig(device=devices[0], threads=threads[0], tensor_parallel=targets),
                    ModelConfig(device=devices[1], threads=threads[1]),
                    deployment=DeploymentConfig(drafts=drafts, share_gpu=share),
                )


def hosts() -> Iterator[tuple[Config, list[Role]]]:
    """The ranks of each different node of every world of these."""
    for config in configs():
        targets, nodes = config.target.tensor_parallel, set()
        for drafts in range(config.deployment.drafts + 1):
            for count in range(1, targets + drafts + 1):
                seats = seat_ranks(targets, spread(targets, drafts, count))
                nodes |= {tuple(seat.role for seat in seats if seat.node == node) for node in range(count)}
        yield from ((config, list(roles)) for roles in sorted(nodes))


def apart(cores: Sequence[tuple[int, ...]]) -> bool:
    return sum(map(len, cores)) == len(set().union(*cores))


def test_gpus_are_taken_without_gaps_and_by_one_rank_each_unless_they_are_shared() -> None:
    for config, roles in hosts():
        gpus = gpus_of(config, roles)
        assert [gpu is not None for gpu in gpus] == [model_of(config, role).device == "cuda" for role in roles]
        taken = [gpu for gpu in gpus if gpu is not None]
        assert set(taken) == set(range(len(set(taken))))
        targets = gpus[: roles.count("target")]
        if not config.deployment.share_gpu or not targets:
            assert len(taken) == len(set(taken))
            continue
        assert targets == list(range(len(targets)))
        users = [gpus.count(gpu) for gpu in targets]
        assert sum(users) == len(roles)
        assert max(users) - min(users) <= 1


def on_cpu(config: Config, roles: list[Role]) -> tuple[Config, list[Role]]:
    return replace(config, draft=replace(config.draft, device="cpu")), roles


def sharing(config: Config, roles: list[Role]) -> tuple[Config, list[Role]]:
    return replace(config, deployment=replace(config.deployment, share_gpu=True)), roles


REMEDIES: dict[str, Callable[[Config, list[Role]], tuple[Config, list[Role]]]] = {
    "lower target.tensor_parallel": lambda config, roles: (config, ["target"]),
    "lower deployment.drafts": lambda config, roles: (config, roles[: max(1, roles.count("target"))]),
    "set deployment.share_gpu = true": sharing,
    'set draft.device = "cpu"': on_cpu,
}


def test_a_host_with_too_few_gpus_is_refused_in_one_line_whose_every_remedy_helps() -> None:
    seen = set()
    for (config, roles), count in product(hosts(), range(1, 5)):
        lack = lacks_gpus(config, roles, count)
        assert (lack is None) == (len(set(gpus_of(config, roles)) - {None}) <= count)
        if lack is None:
            continue
        assert "\n" not in lack
        named = [remedy for remedy in REMEDIES if remedy in lack]
        assert [lacks_gpus(*REMEDIES[remedy](config, roles), count) for remedy in named] == [None] * len(named), lack
        assert named
        seen |= set(named)
    assert seen == set(REMEDIES)


def test_ranks_have_cores_of_their_own_wherever_there_are_enough() -> None:
    for (config, roles), allowed, hardware in product(hosts(), ALLOWED, MACHINES):
        cores = cores_of(config, roles, allowed, hardware)
        where = (config, roles, allowed, hardware, cores)
        assert set().union(*cores) <= set(allowed), where
        if len(allowed) >= len(cores):
            assert apart(cores), where
        here = {f"{role} {i}": cores[i] for i, role in enumerate(roles)}
        assert (crowding(here) is None) == apart(list(here.values())), where
        for role, mine in zip(roles, cores, strict=False):
            on_cpu = model_of(config, role).device == "cpu"
            assert mine or not on_cpu, where
            assert not on_cpu or len(mine) <= model_of(config, role).threads, where
        if any(cores):
            assert all(cores), "nobody goes anywhere if anybody is pinned"


def test_a_draft_of_a_torchrun_of_its_own_keeps_off_the_cores_of_a_target_that_came_before_it() -> None:
    """Whether or not that target has drafts in its own torchrun already."""
    for config, allowed, hardware in product(configs(), ALLOWED, MACHINES):
        apart_by_gpu = config.target.device == config.draft.device == "cuda" and not config.deployment.share_gpu
        targets, guests = config.target.tensor_parallel, config.deployment.drafts
        if apart_by_gpu or len(allowed) < targets * config.target.threads + guests:
            continue
        for in_world in range(guests):
            cores = cores_of(config, [*["target"] * targets, *["draft"] * in_world], allowed, hardware)
            beside = cores_beside(config, targets, allowed, hardware)
            assert apart([*cores[:targets], beside]), (config, in_world, allowed, hardware)
            assert beside or hardware == Hardware()
            assert config.draft.device == "cuda" or len(beside) >= min(
                config.draft.threads, len(allowed) - targets * config.target.threads - guests
            )


# ---- in numbers ------------------------------------------------------------------------------------------------------


def config(target: ModelConfig | None = None, draft: ModelConfig | None = None) -> Config:
    return Config(target=target or ModelConfig(), draft=draft or ModelConfig())


def threads(target: int, draft: int) -> Config:
    return config(ModelConfig(threads=target), ModelConfig(threads=draft))


@pytest.mark.parametrize(
    ("asked", "allowed", "target", "draft"),
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
    asked: tuple[int, int], allowed: tuple[int, ...], target: tuple[int, ...], draft: tuple[int, ...]
) -> None:
    assert choose_cores(threads(*asked), allowed) == {"target": target, "draft": draft}


def test_named_cores_are_taken_and_the_other_role_goes_around_them() -> None:
    assert choose_cores(config(draft=ModelConfig(cores=(0,))), (0, 1)) == {"target": (1,), "draft": (0,)}


def test_beside_a_role_on_a_gpu_the_other_takes_the_last_cores_and_leaves_it_some() -> None:
    asked = config(ModelConfig(device="cuda"), ModelConfig(threads=2))
    assert choose_cores(asked, range(4)) == {"target": (), "draft": (2, 3)}
    assert choose_cores(asked, (0, 1)) == {"target": (), "draft": (1,)}
    assert choose_cores(asked, (0, 1), num_targets=0) == {"target": (), "draft": (0, 1)}


def test_ranks_near_one_gpu_divide_its_cores_and_where_they_are_too_few_all_divide_what_is_free() -> None:
    assert divide_near([(0, 1, 2, 3), (0, 1, 2, 3), (8, 9)], range(12)) == [(0, 2), (1, 3), (8, 9)]
    assert divide_near([(0,), (0,)], (0, 5)) == [(0,), (5,)]
    assert divide_near([(0, 1), ()], (0, 1, 6)) == [(0, 6), (1,)]
    assert divide_near([(0, 1), (1, 2)], (0, 1, 2)) == [(0, 2), (1,)]
    assert divide_near([(), ()], (3,)) == [(3,), (3,)]


def test_a_draft_alone_on_its_host_takes_the_first_cores() -> None:
    assert choose_cores(config(), (0, 1), num_targets=0) == {"target": (), "draft": (0,)}


def test_each_target_rank_gets_its_threads_and_the_draft_goes_around_them() -> None:
    assert choose_cores(threads(2, 1), range(8), num_targets=2) == {"target": (0, 1, 2, 3), "draft": (4,)}
    assert choose_cores(threads(2, 1), range(4), num_targets=2) == {"target": (0, 1, 2), "draft": (3,)}


@pytest.mark.parametrize(
    ("asked", "num_targets", "num_drafts", "allowed", "target", "draft"),
    [
        ((1, 1), 1, 3, 4, (0,), (1, 2, 3)),
        ((1, 2), 1, 2, 8, (0,), (1, 2, 3, 4)),
        ((4, 1), 1, 3, 4, (0,), (1, 2, 3)),  # threads give way
        ((4, 2), 1, 3, 6, (0, 1, 2), (3, 4, 5)),
        ((1, 1), 1, 3, 2, (0,), (1,)),  # drafts share
        ((1, 1), 2, 2, 3, (0, 1), (2,)),  # rather than targets
        ((1, 1), 2, 2, 2, (0,), (1,)),
        ((1, 1), 1, 2, 1, (0,), (0,)),
    ],
)
def test_each_rank_gets_a_core_before_any_gets_two_and_drafts_share_first(
    asked: tuple[int, int], num_targets: int, num_drafts: int, allowed: int, target: tuple, draft: tuple
) -> None:
    assert choose_cores(threads(*asked), range(allowed), num_targets, num_drafts) == {"target": target, "draft": draft}


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
def test_ranks_of_one_role_share_out_its_cores(cores: tuple, count: int, shares: list) -> None:
    assert in_blocks(cores, count) == shares
