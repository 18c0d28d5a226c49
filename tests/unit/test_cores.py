"""The CPU cores of this host: their order, who shares one, and drafts that keep apart without knowing each other."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ssd_runtime.host.cores import Claims, allowed_cores, crowding, listed, physical_first

NONE_SUCH = (70001, 70002, 70003)  # cores that no draft of this machine runs on


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
