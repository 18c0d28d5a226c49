"""The paged KV cache against plain dicts: rows never get lost, mixed up or left behind."""

from __future__ import annotations

import random
import unittest.mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ssd_runtime.kv.pool import BlockAllocator, OutOfBlocks
from ssd_runtime.kv.table import BlockTable, ScratchSlots, copy_branch, copy_branch_oracle

CPU = torch.device("cpu")
BLOCK = 4


def table(allocator: BlockAllocator, max_length: int = 64) -> BlockTable:
    return BlockTable(allocator, BLOCK, max_length, CPU)


def test_blocks_are_handed_out_once_and_come_back_when_nobody_holds_them() -> None:
    allocator = BlockAllocator(3)
    assert [allocator.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OutOfBlocks, match="all 3 KV blocks"):
        allocator.allocate()
    allocator.retain(1)
    allocator.release(1)
    assert (allocator.num_free, allocator.references(1)) == (0, 1)
    allocator.release(1)
    assert (allocator.num_free, allocator.references(1)) == (1, 0)
    assert allocator.allocate() == 1


@pytest.mark.parametrize("misuse", ["release", "retain"])
def test_a_free_block_has_no_holder(misuse: str) -> None:
    allocator = BlockAllocator(1)
    with pytest.raises(AssertionError, match="block 0 is free"):
        getattr(allocator, misuse)(0)


def test_reserve_takes_whole_blocks_and_only_what_is_missing() -> None:
    allocator = BlockAllocator(4)
    rows = table(allocator)
    for length, blocks in [(0, 0), (1, 1), (4, 1), (5, 2), (3, 2), (8, 2), (9, 3)]:
        rows.reserve(length)
        assert len(rows.blocks) == blocks == 4 - allocator.num_free
        assert rows.capacity == blocks * BLOCK
        assert rows.length == 0


def test_a_table_takes_nothing_of_the_device_before_it_holds_rows() -> None:
    with unittest.mock.patch.object(torch, "zeros", side_effect=AssertionError("memory was taken")):
        rows = table(BlockAllocator(4), 1 << 20)
        rows.rollback(0)
        rows.release()
    assert len(rows.slots) == 1 << 20


def test_slots_on_the_device_are_those_computed_on_the_host() -> None:
    allocator = BlockAllocator(6)
    rows, other = table(allocator), table(allocator)
    for length in (3, 6, 11):  # blocks of two tables alternate
        rows.reserve(length)
        other.reserve(length)
    assert rows.slots[:11].tolist() == [rows.slot(position) for position in range(11)]
    assert not set(rows.slots[:11].tolist()) & set(other.slots[:11].tolist())


@pytest.mark.parametrize(("length", "blocks"), [(9, 3), (8, 2), (7, 2), (5, 2), (4, 1), (1, 1), (0, 0)])
def test_rollback_gives_back_every_whole_block_behind_the_end(length: int, blocks: int) -> None:
    allocator = BlockAllocator(5)
    rows = table(allocator)
    rows.reserve(11)
    rows.length = 11
    before = rows.blocks
    rows.rollback(length)
    assert (rows.length, rows.blocks) == (length, before[:blocks])
    assert allocator.num_free == 5 - blocks


def test_scratch_takes_whole_blocks_reuses_slots_and_gives_all_back() -> None:
    allocator = BlockAllocator(3)
    scratch = ScratchSlots(allocator, BLOCK, 8)
    taken = [scratch.take() for _ in range(BLOCK + 1)]
    assert len(set(taken)) == BLOCK + 1
    assert allocator.num_free == 1
    scratch.give_back(taken[:3])
    again = [scratch.take() for _ in range(3)]
    assert not set(again) & set(taken[3:])
    assert allocator.num_free == 1
    scratch.release()
    assert allocator.num_free == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), max_size=16, unique_by=lambda move: move[1]))
def test_copy_branch_is_its_oracle_also_where_sources_and_targets_overlap(moves: list[tuple[int, int]]) -> None:
    kv = torch.arange(2 * 2 * 16 * 3 * 2, dtype=torch.float32).reshape(2, 2, 16, 3, 2)
    expected = kv.clone()
    sources, targets = [source for source, _ in moves], [target for _, target in moves]
    copy_branch(kv, sources, targets)
    copy_branch_oracle(expected, sources, targets)
    assert torch.equal(kv, expected)


def test_copy_branch_swaps_and_shifts() -> None:
    kv = torch.arange(6.0).reshape(1, 1, 6, 1, 1).repeat(1, 2, 1, 1, 1)
    copy_branch(kv, [0, 1, 3, 4], [1, 0, 4, 5])
    assert kv[0, 0, :, 0, 0].tolist() == [1, 0, 2, 3, 3, 4]


class PoolModel(RuleBasedStateMachine):
    """Several sequences over one pool; `texts` is what their rows must hold, position by position."""

    NUM_BLOCKS = 10

    @initialize(seed=st.integers(0, 999))
    def begin(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.allocator = BlockAllocator(self.NUM_BLOCKS)
        self.kv = torch.full((2, 2, self.NUM_BLOCKS * BLOCK, 1, 2), float("nan"))
        self.scratch = ScratchSlots(self.allocator, BLOCK, 1000)
        self.tables: dict[int, BlockTable] = {}
        self.texts: dict[int, list[float]] = {}
        self.branches: dict[int, dict[int, float]] = {}  # sequence -> scratch slot -> value
        self.written = 0

    def any_table(self) -> int:
        return self.random.choice(list(self.tables))

    def write(self, slot: int) -> float:
        self.written += 1
        self.kv[:, :, slot] = float(self.written)
        return float(self.written)

    @rule()
    def admit(self) -> None:
        if len(self.tables) < 4:
            self.tables[self.written] = BlockTable(self.allocator, BLOCK, 32, CPU)
            self.texts[self.written] = []
            self.branches[self.written] = {}
            self.written += 1

    @precondition(lambda self: self.tables)
    @rule(count=st.integers(1, 9))
    def append(self, count: int) -> None:
        key = self.any_table()
        rows, text = self.tables[key], self.texts[key]
        count = min(count, 32 - len(text))
        try:
            rows.reserve(len(text) + count)
        except OutOfBlocks:
            rows.rollback(len(text))  # whatever it had taken goes back
            return
        text += [self.write(rows.slot(position)) for position in range(len(text), len(text) + count)]
        rows.length = len(text)

    @precondition(lambda self: self.tables)
    @rule(share=st.floats(0, 1))
    def rollback(self, share: float) -> None:
        key = self.any_table()
        keep = int(share * len(self.texts[key]))
        self.tables[key].rollback(keep)
        del self.texts[key][keep:]

    @precondition(lambda self: self.tables)
    @rule(count=st.integers(1, 6))
    def draft(self, count: int) -> None:
        key = self.any_table()
        for _ in range(count):
            try:
                slot = self.scratch.take()
            except OutOfBlocks:
                return
            self.branches[key][slot] = self.write(slot)

    @precondition(lambda self: any(self.branches.values()))
    @rule(rejected=st.integers(0, 2))
    def adopt(self, rejected: int) -> None:
        """Rows of branches move into the trunks, for all sequences in one call; the rest is dropped."""
        sources, targets, gone = [], [], []
        for key, branch in self.branches.items():
            slots = list(branch)[: max(0, len(branch) - rejected)]
            rows, text = self.tables[key], self.texts[key]
            slots = slots[: 32 - len(text)]
            try:
                rows.reserve(len(text) + len(slots))
            except OutOfBlocks:
                rows.rollback(len(text))
                continue
            sources += slots
            targets += [rows.slot(len(text) + index) for index in range(len(slots))]
            text += [branch[slot] for slot in slots]
            rows.length = len(text)
            gone += list(branch)
            branch.clear()
        copy_branch(self.kv, sources, targets)
        self.scratch.give_back(gone)

    @precondition(lambda self: any(len(text) > 2 for text in self.texts.values()))
    @rule(by=st.integers(1, 3))
    def close_a_gap(self, by: int) -> None:
        """Move the rows of a sequence down by a few positions: sources and targets overlap."""
        key = next(key for key, text in self.texts.items() if len(text) > 2)
        rows, text = self.tables[key], self.texts[key]
        by = min(by, len(text) - 1)
        sources = [rows.slot(position) for position in range(by, len(text))]
        copy_branch(self.kv, sources, [rows.slot(position) for position in range(len(text) - by)])
        del text[:by]
        rows.rollback(len(text))

    @precondition(lambda self: self.tables)
    @rule()
    def finish(self) -> None:
        key = self.any_table()
        self.tables.pop(key).release()
        del self.texts[key]
        self.scratch.give_back(list(self.branches.pop(key)))

    @invariant()
    def rows_hold_what_was_written(self) -> None:
        for key, text in self.texts.items():
            held = self.kv[1, 1, self.tables[key].slots[: len(text)], 0, 1]
            assert held.tolist() == text
            for slot, value in self.branches[key].items():
                assert self.kv[0, 0, slot, 0, 0] == value

    @invariant()
    def every_block_has_one_holder_or_is_free(self) -> None:
        held = [block for rows in self.tables.values() for block in rows.blocks]
        assert len(held) == len(set(held))
        assert all(self.allocator.references(block) == 1 for block in held)
        drafted = {slot // BLOCK for branch in self.branches.values() for slot in branch}
        assert not drafted & set(held)
        assert all(self.allocator.references(block) == 1 for block in drafted)
        in_use = sum(self.allocator.references(block) for block in range(self.NUM_BLOCKS))
        assert in_use == self.NUM_BLOCKS - self.allocator.num_free

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        for rows in self.tables.values():
            rows.release()
        self.scratch.release()
        assert self.allocator.num_free == self.NUM_BLOCKS
        assert all(self.allocator.references(block) == 0 for block in range(self.NUM_BLOCKS))


TestPool = PoolModel.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
