"""Who runs: first come, first served, and never more than the pool can hold to the end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.config import EngineConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.scheduler import Scheduler
from ssd_runtime.engine.sequence import NoText, Sequence
from ssd_runtime.errors import RequestError
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.speculation.types import Outcome, SamplingParams, Speculation

CONFIG = EngineConfig(max_model_len=64, max_num_seqs=3, block_size=4, num_blocks=10)


class Pool:
    """A scheduler and the pool it speaks for."""

    def __init__(self, config: EngineConfig = CONFIG) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.allocator = BlockAllocator(config.pool_blocks)
        self._next = 0

    def sequence(self, prompt: int, max_tokens: int) -> Sequence:
        strangers = (self._next, *(1,) * (prompt - 1))  # no two share a prompt; test_sharing.py has those that do
        request = Request(str(self._next), strangers, SamplingParams(), "ar", 0, max_tokens)
        table = BlockTable(self.allocator, self.config.block_size, self.config.max_model_len, torch.device("cpu"))
        self._next += 1
        return Sequence(self._next - 1, request, table, NoText(), self.config.max_model_len)

    def add(self, prompt: int, max_tokens: int) -> Sequence:
        sequence = self.sequence(prompt, max_tokens)
        self.scheduler.add(sequence)
        return sequence


def test_sequences_are_admitted_in_order_up_to_the_most() -> None:
    pool = Pool()
    added = [pool.add(2, 2) for _ in range(5)]
    assert pool.scheduler.admit() == added[:3]
    assert pool.scheduler.admit() == []
    pool.scheduler.remove(added[1])
    assert pool.scheduler.admit() == [added[3]]
    assert pool.scheduler.running == [added[0], added[2], added[3]]


def test_nobody_is_admitted_whom_the_pool_could_not_hold_to_the_end() -> None:
    pool = Pool()
    big = pool.add(1, 23)  # 6 of 10 blocks
    also_big = pool.add(1, 19)  # 5
    assert pool.scheduler.admit() == [big]
    pool.scheduler.remove(big)
    assert pool.scheduler.admit() == [also_big]


def test_a_small_sequence_does_not_overtake_a_big_one() -> None:
    pool = Pool()
    running, big, small = pool.add(1, 23), pool.add(1, 30), pool.add(1, 1)
    assert pool.scheduler.admit() == [running]
    assert list(pool.scheduler.waiting) == [big, small]


def test_exactly_filling_the_pool_is_possible() -> None:
    pool = Pool()
    added = [pool.add(2, 18), pool.add(4, 16)]
    assert pool.scheduler.admit() == added
    for sequence in added:
        sequence.table.reserve(20)
    assert pool.allocator.num_free == 0


def test_what_could_never_run_is_refused_with_the_remedy() -> None:
    pool = Pool()
    with pytest.raises(RequestError, match=r"needs 11 KV blocks and the pool has 10.*engine\.num_blocks"):
        pool.add(1, 40)
    assert not pool.scheduler.waiting


def test_removing_a_waiting_sequence_frees_nothing_it_never_had() -> None:
    pool = Pool()
    running, waiting = pool.add(1, 39), pool.add(1, 39)
    pool.scheduler.admit()
    pool.scheduler.remove(waiting)
    again = pool.add(1, 3)
    assert pool.scheduler.admit() == []
    pool.scheduler.remove(running)
    assert pool.scheduler.admit() == [again]


def test_prompts_are_computed_one_after_the_other_and_decoded_once_they_are() -> None:
    pool = Pool()
    first, second = pool.add(2, 2), pool.add(2, 2)
    pool.scheduler.admit()
    assert pool.scheduler.next_batch() == []
    assert pool.scheduler.prefilling() is first
    first.commit(Outcome(0, 5), Speculation())
    assert pool.scheduler.prefilling() is second
    assert pool.scheduler.next_batch() == [first]
    second.commit(Outcome(0, 5), Speculation())
    assert pool.scheduler.prefilling() is None
    assert pool.scheduler.next_batch() == [first, second]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=20),
    leave=st.lists(st.integers(0, 19), max_size=20),
)
def test_whatever_comes_and_goes_the_pool_suffices_and_everybody_gets_a_turn(
    sizes: list[tuple[int, int]], leave: list[int]
) -> None:
    pool = Pool()
    added = [pool.add(*size) for size in sizes]
    admitted: list[Sequence] = []
    for turn in range(len(added) + len(leave)):
        fresh = pool.scheduler.admit()
        admitted += fresh
        for sequence in fresh:
            sequence.table.reserve(sequence.num_prompt + sequence.max_tokens)  # the worst it may ever need
        here = [*pool.scheduler.running, *pool.scheduler.waiting] if turn < len(leave) else pool.scheduler.running
        if here:
            pool.scheduler.remove(here[leave[turn] % len(here)] if turn < len(leave) else here[0])
    assert not pool.scheduler.running
    assert not pool.scheduler.waiting
    assert admitted == [sequence for sequence in added if sequence in admitted]  # in the order of their coming
    assert pool.allocator.num_free == pool.allocator.num_blocks
