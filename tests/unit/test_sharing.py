"""Prompts computed once: who holds which block, whatever order sequences come and go in, and that no token changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.scheduler import Scheduler
from ssd_runtime.engine.sequence import NoText, Sequence
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.sharing import Prompt, take_over
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.speculation.types import Outcome, SamplingParams, Speculation
from tests.engines import in_process, request
from tests.tiny_models import tiny_decoder

BLOCK = 4
CONFIG = EngineConfig(max_model_len=64, max_num_seqs=4, block_size=BLOCK, num_blocks=14, prefill_chunk=6)


class Pool:
    """A scheduler, its pool, and what stands in every slot; `step` does to them what the engine does."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(CONFIG)
        self.allocator = BlockAllocator(CONFIG.pool_blocks)
        self.rows: dict[int, tuple[int, int]] = {}  # slot -> position, token
        self.computed = 0
        self._next = 0

    def add(self, prompt: tuple[int, ...], max_tokens: int) -> Sequence:
        asked = Request(str(self._next), prompt, SamplingParams(), "ar", 0, max_tokens)
        table = BlockTable(self.allocator, BLOCK, CONFIG.max_model_len, torch.device("cpu"))
        sequence = Sequence(self._next, asked, table, NoText(), CONFIG.max_model_len)
        self._next += 1
        self.scheduler.add(sequence)
        return sequence

    def admit(self) -> None:
        for one in self.scheduler.admit():
            one.begin(vocab_size=200)

    def step(self) -> None:
        """Admit, compute a chunk of a prompt, decode a token of everybody else."""
        self.admit()
        sequence = self.scheduler.prefilling()
        if sequence is not None:
            self.scheduler.share_prompt(sequence)
            start = sequence.table.length
            self._write(sequence, start, min(start + CONFIG.prefill_chunk, sequence.num_prompt))
            if sequence.table.length == sequence.num_prompt:
                sequence.commit(Outcome(0, 90 + sequence.sequence_id), Speculation())
        for one in self.scheduler.next_batch():
            if one is not sequence and one.finish_reason is None:
                self._write(one, len(one.tokens) - 1, len(one.tokens))
                one.commit(Outcome(0, 90 + one.sequence_id), Speculation())
        for one in list(self.scheduler.running):
            if one.finish_reason is not None:
                self.scheduler.remove(one)

    def _write(self, sequence: Sequence, start: int, end: int) -> None:
        sequence.table.reserve(end)
        sequence.table.length = end
        for position in range(start, end):
            self.rows[sequence.table.slot(position)] = (position, sequence.tokens[position])
        self.computed += end - start

    def check(self) -> None:
        """Against a model of the pool: blocks are held by exactly those in whose tables they are, and nobody's rows
        were written by another; what is reserved covers the worst."""
        running = self.scheduler.running
        holders = Counter(block for one in running for block in one.table.blocks)
        for block in range(CONFIG.pool_blocks):
            assert self.allocator.references(block) == holders[block]
        assert self.allocator.num_free == CONFIG.pool_blocks - len(holders)
        for one in running:
            for position in range(one.table.length):
                assert self.rows[one.table.slot(position)] == (position, one.tokens[position])
                assert int(one.table.slots[position]) == one.table.slot(position)
        reserved = 0
        for prompt in {one.request.prompt_tokens for one in running}:
            whole = (len(prompt) - 1) // BLOCK
            alike = [one for one in running if one.request.prompt_tokens == prompt]
            reserved += whole + sum(-(-(len(prompt) + one.max_tokens) // BLOCK) - whole for one in alike)
        assert self.scheduler._free == CONFIG.pool_blocks - reserved >= 0
        assert len(holders) <= reserved


PROMPTS = (tuple(range(10)), tuple(range(12)), (1, 2), tuple(range(20, 29)))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 12)),
            st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
            st.tuples(st.just("leave"), st.integers(0, 9), st.just(0)),
        ),
        max_size=40,
    )
)
def test_whatever_order_sequences_come_and_go_in_every_block_is_held_by_those_who_see_it(
    acts: list[tuple[str, int, int]],
) -> None:
    pool = Pool()
    for act, number, max_tokens in acts:
        here = [*pool.scheduler.running, *pool.scheduler.waiting]
        if act == "add":
            pool.add(PROMPTS[number], max_tokens)
        elif act == "leave" and here:
            pool.scheduler.remove(here[number % len(here)])
        for _ in range(number if act == "step" else 0):
            pool.step()
            pool.check()
        pool.check()
    while pool.scheduler.running or pool.scheduler.waiting:
        pool.step()
        pool.check()
    assert pool.allocator.num_free == CONFIG.pool_blocks


def test_outputs_of_one_prompt_fit_where_as_many_strangers_would_not() -> None:
    alike, strangers = Pool(), Pool()
    for i in range(4):
        alike.add(tuple(range(30)), 4)  # 9 blocks, 7 of them shared
        strangers.add((i, *range(29)), 4)
    assert len(alike.scheduler.admit()) == 3
    assert len(strangers.scheduler.admit()) == 1


def test_the_prompt_is_computed_once_and_what_no_block_is_full_of_again() -> None:
    pool = Pool()
    for _ in range(3):
        pool.add(tuple(range(10)), 1)  # the first token is the last: each leaves when its prompt is computed
    pool.admit()
    first, second, third = pool.scheduler.running
    pool.step()
    assert pool.computed == 6
    pool.step()
    assert (pool.computed, first.finish_reason) == (10, "length")
    pool.step()  # nobody has the rows any more: the second computes all of it
    assert (pool.computed, second.table.length) == (16, 6)
    pool.scheduler.remove(second)
    pool.step()
    assert third.table.length == 6


def test_rows_are_taken_over_up_to_the_block_of_the_last_token() -> None:
    allocator = BlockAllocator(9)
    tables = [BlockTable(allocator, BLOCK, 32, torch.device("cpu")) for _ in range(3)]
    for length, rows in ((1, 0), (4, 0), (5, 4), (8, 4), (9, 8)):
        assert Prompt(tuple(range(length)), tables[0]).rows == rows
    first, second, other = (Prompt((*range(9), last), table) for last, table in zip((1, 1, 2), tables, strict=True))
    together = [first, second, other]
    assert [take_over(one, together) for one in together] == [True, False, True]  # the second waits for the first
    tables[0].reserve(10)
    tables[0].length = 7
    assert not take_over(second, together)
    tables[0].length = 10
    assert take_over(second, together)
    assert take_over(other, together)
    assert (tables[1].length, tables[1].blocks, tables[2].length) == (8, tables[0].blocks[:2], 0)
    tables[0].release()
    assert allocator.num_free == 7
    tables[1].release()
    assert allocator.num_free == 9


def outputs(count: int, mode: str) -> list[Request]:
    """Of one request."""
    first = request(tuple(range(3, 26)), mode, max_tokens=12, request_id="r")
    return [replace(first, params=SamplingParams(temperature=1.0, seed=i), index=i) for i in range(count)]


@pytest.mark.parametrize("mode", ["ar", "ssd", "sd-colocated"])
def test_outputs_share_the_prompt_at_target_and_draft_and_are_what_each_is_alone(mode: str) -> None:
    engine = EngineConfig(max_model_len=64, max_num_seqs=3, block_size=4, prefill_chunk=16)
    target = tiny_decoder(1)
    process = in_process(target, tiny_decoder(2), engine)
    sequences = [process.engine.add(one) for one in outputs(3, mode)]
    while not all(sequence.prefilled for sequence in sequences):
        process.engine.step()
    tables = [sequence.table for sequence in sequences]
    # All blocks but that of the last token; where rounding depends on the shape of a forward, those of whole chunks.
    whole = 5 if target.row_invariant else 4
    assert tables[0].blocks[:whole] == tables[1].blocks[:whole] == tables[2].blocks[:whole]
    assert len({table.blocks[whole] for table in tables}) == 3
    if mode != "ar":
        drafter = process.colocated if mode == "sd-colocated" else process.draft.drafter
        while drafter.grow():
            pass
        shared = [one.table.blocks[:whole] for one in drafter._sequences.values()]
        assert shared[0] == shared[1] == shared[2]
        assert len(shared[0]) == whole
    if mode == "ssd":  # a draft that takes over all three in the middle of their texts shares too
        process.drop_draft()
        process.engine.step()
        process.bring_draft_back()
        process.engine.step()
        assert process.link.drafts.num_linked == 2
        while process.draft.drafter.grow():
            pass
        assert len({one.table.blocks[:whole] for one in process.draft.drafter._sequences.values()}) == 1
    while process.engine.has_work:
        process.engine.step()
    process.assert_all_blocks_are_back()
    for sequence, asked in zip(sequences, outputs(3, "ar"), strict=True):
        (alone,) = in_process(tiny_decoder(1), tiny_decoder(2), engine).run([asked])
        assert alone.tokens == sequence.tokens


def test_the_draft_computes_a_prompt_once_also_when_its_first_holder_leaves() -> None:
    engine = EngineConfig(max_model_len=64, max_num_seqs=3, block_size=4, prefill_chunk=8)
    drafter = Drafter(tiny_decoder(), engine, SpeculationConfig(lookahead=3, budget=4))
    prompt = tuple(range(3, 26))

    def admit(sequence_id: int) -> None:
        drafter.admit(Admit(sequence_id, prompt, SamplingParams(), "sd", 3, 12))

    for sequence_id in range(3):
        admit(sequence_id)
    first = drafter.grow()
    assert first is not None
    assert first.rows == 8  # the other two wait for the first
    drafter.finish(0)
    rows = []
    while step := drafter.grow():
        rows.append(step.rows)
    # The second computes all of it but its last token; the third what is left behind the shared blocks.
    assert rows == [8, 8, 6 + 2]
    admit(0)
    drafter.finish(1)
    again = drafter.grow()
    assert again is not None
    assert again.rows == 2
    for sequence_id in (2, 0):
        drafter.finish(sequence_id)
    assert drafter.allocator.num_free == drafter.allocator.num_blocks
