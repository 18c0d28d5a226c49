"""CPU cores of one host: who gets which, who shares, and drafts that keep apart without knowing each other."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ssd_runtime.config import Config, ModelConfig
from ssd_runtime.host.cores import (
    Claims,
    Cores,
    allowed_cores,
    choose_cores,
    crowding,
    divide_cores,
    divide_near,
    listed,
    physical_first,
)

NONE_SUCH = (70001, 70002, 70003)  # cores that no draft of this machine runs on


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
    assert choose_cores(threads(*asked), allowed) == Cores(target, draft)


def test_named_cores_are_taken_and_the_other_role_goes_around_them() -> None:
    assert choose_cores(config(draft=ModelConfig(cores=(0,))), (0, 1)) == Cores((1,), (0,))


def test_beside_a_role_on_a_gpu_the_other_takes_the_last_cores_and_leaves_it_some() -> None:
    asked = config(ModelConfig(device="cuda"), ModelConfig(threads=2))
    assert choose_cores(asked, range(4)) == Cores((), (2, 3))
    assert choose_cores(asked, (0, 1)) == Cores((), (1,))
    assert choose_cores(asked, (0, 1), num_targets=0) == Cores((), (0, 1))


def test_ranks_near_one_gpu_divide_its_cores_and_where_they_are_too_few_all_divide_what_is_free() -> None:
    assert divide_near([(0, 1, 2, 3), (0, 1, 2, 3), (8, 9)], range(12)) == [(0, 2), (1, 3), (8, 9)]
    assert divide_near([(0,), (0,)], (0, 5)) == [(0,), (5,)]
    assert divide_near([(0, 1), ()], (0, 1, 6)) == [(0, 6), (1,)]
    assert divide_near([(0, 1), (1, 2)], (0, 1, 2)) == [(0, 2), (1,)]
    assert divide_near([(), ()], (3,)) == [(3,), (3,)]


def test_a_draft_alone_on_its_host_takes_the_first_cores() -> None:
    assert choose_cores(config(), (0, 1), num_targets=0) == Cores((), (0,))


def test_each_target_rank_gets_its_threads_and_the_draft_goes_around_them() -> None:
    assert choose_cores(threads(2, 1), range(8), num_targets=2) == Cores((0, 1, 2, 3), (4,))
    assert choose_cores(threads(2, 1), range(4), num_targets=2) == Cores((0, 1, 2), (3,))


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
    assert choose_cores(threads(*asked), range(allowed), num_targets, num_drafts) == Cores(target, draft)


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
    assert [divide_cores(cores, index, count) for index in range(count)] == shares


@pytest.mark.parametrize(
    ("cores", "says"),
    [
        ({"target": (0,), "draft 1": (1,), "draft 2": (2,)}, None),
        ({"target": (), "draft": ()}, None),
        ({"target": (0, 1), "draft": (0, 1)}, "target and draft share cores 0-1: drafting cannot hide"),
        (
            {"target": (0,), "draft 1": (1,), "draft 2": (1,), "draft 3": (1,)},
            "draft 1, draft 2 and draft 3 share core 1: they draft in turns; lower deployment.drafts or",
        ),
        (
            {"target 0": (0,), "target 1": (1,), "target 2": (0,), "target 3": (1,), "draft": (2,)},
            "target 0 and target 2 share core 0; target 1 and target 3 share core 1: they wait for each other",
        ),
    ],
)
def test_ranks_on_the_same_core_are_told_in_one_line(cores: dict[str, tuple[int, ...]], says: str | None) -> None:
    found = crowding(cores)
    assert found == says if says is None else found is not None and found.startswith(says) and "\n" not in found


def test_pinning_keeps_a_process_on_its_cores_and_allowed_cores_as_they_were() -> None:
    core = allowed_cores()[-1]
    script = (
        "import os, torch; from ssd_runtime.host import cores; before = cores.allowed_cores();"
        f"cores.pin(({core},), 4); unchanged = before == cores.allowed_cores();"
        "print(sorted(os.sched_getaffinity(0)), torch.get_num_threads(), unchanged)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[0] == f"[{core}] 1 True"


def test_cores_are_listed_in_runs() -> None:
    assert listed((8, 0, 1, 2, 4)) == "0-2,4,8"
    assert listed((*range(0, 56, 4), *range(112, 168, 4), 200)) == "0-52:4,112-164:4,200"
    assert listed((0, 2, 3, 4, 6, 8)) == "0,2-4,6,8"
    assert listed(()) == ""


@pytest.mark.parametrize(
    ("siblings", "order"),
    [
        (["0-1", "0-1", "2-3", "2-3"], (0, 2, 1, 3)),  # as many virtual machines number them
        (["0,2", "1,3", "0,2", "1,3"], (0, 1, 2, 3)),
        (["0", "1"], (0, 1, 2, 3)),
        ([], (0, 1, 2, 3)),
    ],
)
def test_a_thread_of_each_physical_core_comes_before_a_second_of_any(
    siblings: list[str], order: tuple[int, ...], tmp_path: Path
) -> None:
    for core, text in enumerate(siblings):
        (tmp_path / f"cpu{core}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(text + "\n")
    assert physical_first(range(4), tmp_path) == order
    assert physical_first((1, 3), tmp_path) == (1, 3), "a sibling that is not allowed is nobody's"


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def drafts() -> Iterator[list[Claims]]:
    made = [Claims() for _ in range(5)]
    yield made
    for one in made:
        one.release()


def test_drafts_take_different_cores_and_share_evenly_when_there_are_too_few(drafts: list[Claims]) -> None:
    assert [one.take(NONE_SUCH[:2], 1) for one in drafts] == [
        (NONE_SUCH[0],),
        (NONE_SUCH[1],),
        (NONE_SUCH[0],),
        (NONE_SUCH[1],),
        (NONE_SUCH[0],),
    ]
    assert [one.crowded for one in drafts] == [False, False, True, True, True]


def test_a_draft_takes_as_many_cores_as_are_free_of_those_it_can_use(drafts: list[Claims]) -> None:
    assert drafts[0].take(NONE_SUCH, 2) == NONE_SUCH[:2]
    assert drafts[1].take(NONE_SUCH, 2) == NONE_SUCH[2:]
    drafts[0].release()
    assert drafts[2].take(NONE_SUCH, 2) == NONE_SUCH[:2]


def test_cores_that_were_named_are_noted_for_others(drafts: list[Claims]) -> None:
    drafts[0].note(NONE_SUCH[:1])
    drafts[1].note(NONE_SUCH[:1])
    assert drafts[2].take(NONE_SUCH, 1) == NONE_SUCH[1:2]


def _hold(ready: Connection) -> None:
    claims = Claims()
    ready.send(claims.take(NONE_SUCH[:1], 1))
    ready.recv()  # never comes


def test_a_killed_draft_leaves_no_claim_behind(drafts: list[Claims]) -> None:
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(theirs,), daemon=True)
    other.start()
    assert ours.poll(30)
    assert ours.recv() == NONE_SUCH[:1]
    assert drafts[0].take(NONE_SUCH[:2], 1) == NONE_SUCH[1:2]
    other.kill()
    other.join(30)
    assert drafts[1].take(NONE_SUCH[:2], 1) == NONE_SUCH[:1]
