"""Gaps between verifications: split into laps, told apart by cause, the longest kept."""

from __future__ import annotations

import time

import pytest

from ssd_runtime.comm.control.client_messages import Status
from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.stalls import Lap, Reading, Stall, StallWatch, ThreadClock

MS = 1_000_000


class Played:
    """Clocks that a test moves, in milliseconds."""

    def __init__(self) -> None:
        self._now = Reading(0, 0, 0, 0)

    def wall(self) -> int:
        return self._now.wall

    def read(self) -> Reading:
        return self._now

    def go(self, wall: float, cpu: float = 0, delayed: float = 0, sleeps: int = 1) -> None:
        now = self._now
        self._now = Reading(
            now.wall + round(wall * MS),
            now.cpu + round(cpu * MS),
            now.delayed + round(delayed * MS),
            now.sleeps + sleeps,
        )


@pytest.fixture
def clock() -> Played:
    return Played()


def gap(watch: StallWatch, clock: Played, wall: int, round: int = 1, *, held_up: bool = True) -> None:
    watch.begin()
    clock.go(wall, cpu=wall)
    watch.lap("commit")
    watch.end(round, held_up=held_up)


def test_a_gap_is_split_by_what_was_done_and_by_who_is_to_blame(clock: Played) -> None:
    watch = StallWatch(clock)
    watch.begin()
    clock.go(5, cpu=2)
    watch.lap("commit")
    clock.go(100, cpu=10, delayed=30)
    watch.lap("propose", awaited_s=0.05)
    watch.end(7, held_up=True)
    (stall,) = watch.longest
    assert stall.round == 7
    assert stall.laps == (Lap("commit", 5, 2, 0), Lap("propose", 100, 10, 30, 50))
    assert stall.milliseconds == 105
    assert stall.causes() == {
        "awaiting a draft": 50,
        "not run by the system": 30,
        "propose": 10,
        "blocked in propose": 10,
        "blocked in commit": 3,
        "commit": 2,
    }
    assert str(stall).startswith("105 ms before round 7: 50 awaiting a draft, 30 not run by the system, 10 propose")


def test_a_wait_that_was_not_slept_through_is_not_counted_as_one(clock: Played) -> None:
    watch = StallWatch(clock)
    watch.begin()
    clock.go(40, cpu=5, delayed=20)
    watch.lap("propose", awaited_s=0.04)  # the draft had answered; the leader was not let run
    watch.end(1, held_up=True)
    assert watch.longest[0].laps == (Lap("propose", 40, 5, 20, 15),)


def test_a_thread_that_never_slept_was_not_run(clock: Played) -> None:
    watch = StallWatch(clock)
    watch.begin()
    clock.go(50, cpu=10, delayed=5, sleeps=0)  # a virtual machine that is halted counts no delay
    watch.lap("commit")
    watch.end(1, held_up=True)
    assert watch.longest[0].causes() == {"not run by the system": 40, "commit": 10}


def test_short_laps_count_to_the_next_and_are_not_lost(clock: Played) -> None:
    watch = StallWatch(clock)
    watch.begin()
    for name in ("commit", "publish", "messages"):
        clock.go(0.5, cpu=0.5)
        watch.lap(name)
    clock.go(0.25, cpu=0.25)
    watch.lap("propose", awaited_s=0.0)
    watch.end(1, held_up=True)
    assert watch.longest[0].laps == (Lap("publish", 1.0, 1.0, 0.0), Lap("propose", 0.75, 0.75, 0.0))


def test_the_longest_are_kept_the_longest_first(clock: Played) -> None:
    watch = StallWatch(clock, kept=3)
    for round, wall in enumerate([4, 9, 1, 8, 30, 2]):
        gap(watch, clock, wall, round)
    assert [(stall.round, stall.milliseconds) for stall in watch.longest] == [(4, 30), (1, 9), (3, 8)]


def test_a_gap_that_held_up_nobody_is_none(clock: Played) -> None:
    watch = StallWatch(clock)
    gap(watch, clock, 50, held_up=False)
    assert watch.longest == ()
    watch.lap("idle")  # before the first gap has begun there is nothing to add to
    assert StallWatch(clock).longest == ()


def test_what_was_done_before_a_gap_began_is_not_in_it(clock: Played) -> None:
    watch = StallWatch(clock)
    watch.begin()
    clock.go(200)
    watch.lap("messages")
    gap(watch, clock, 3)
    assert [lap.name for lap in watch.longest[0].laps] == ["commit"]


def test_the_clocks_of_a_thread_tell_work_from_sleep() -> None:
    clock = ThreadClock()
    before = clock.read()
    time.sleep(0.02)
    after = clock.read()
    assert after.wall - before.wall >= 20 * MS
    assert after.cpu - before.cpu < after.wall - before.wall
    assert after.sleeps > before.sleeps
    before = clock.read()
    while time.thread_time_ns() < before.cpu + 5 * MS:
        pass
    after = clock.read()
    assert after.cpu - before.cpu >= 5 * MS
    assert after.delayed >= before.delayed


def test_stalls_travel_in_a_status() -> None:
    stall = Stall(3, 12.5, (Lap("admit", 1.5, 1.0, 0.25), Lap("propose", 9.0, 1.0, 0.0, 7.5)))
    status = Status("ready", "linked", "a", "b", "ssd", stalls=(stall,))
    assert decode(encode(status)) == status
