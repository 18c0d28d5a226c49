"""What the CUDA kernels must do, as cases and checks: run by the emulator on the host and by tests/gpu on a device.

Tensors are views into larger ones, so that strides are odd, addresses are misaligned and a wild write shows: a check
compares the whole memory with what plain torch makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from cuda_ext import reference
from ssd_runtime.speculation.noise import signed
from ssd_runtime.speculation.sampling.ranking import Choice
from ssd_runtime.speculation.types import SamplingParams

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
HEAD_DIMS = st.sampled_from([1, 2, 3, 5, 8, 20, 64])  # in bytes no multiple of 16 for most


@dataclass(frozen=True)
class Kernels:
    """Operators under test (a namespace of torch.ops) and where their tensors live."""

    ops: Any
    device: torch.device

    def on(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


def ints(values: list, *shape: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).view(shape or (-1,))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Pool:
    """A cache inside larger memory: `kv` of `slots` slots, some memory before and behind."""

    memory: Tensor
    before: int
    slots: int

    @property
    def kv(self) -> Tensor:
        return self.memory[:, :, self.before : self.before + self.slots]

    def on(self, device: torch.device) -> Pool:
        return Pool(self.memory.to(device, copy=True), self.before, self.slots)


@st.composite
def pools(draw) -> Pool:
    slots, before, after = draw(st.integers(1, 12)), draw(st.integers(0, 2)), draw(st.integers(0, 2))
    shape = draw(st.integers(1, 3)), 2, before + slots + after, draw(st.integers(1, 3)), draw(HEAD_DIMS)
    return Pool(random(0, *shape).to(draw(DTYPES)), before, slots)


def same(own: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(own.cpu(), expected, rtol=0, atol=0, equal_nan=True)


# ---- copy_branch_


@st.composite
def copies(draw) -> tuple[Pool, Tensor, Tensor]:
    """Any sources, distinct targets of one pool: they overlap, reach its last slot, or are none at all."""
    pool = draw(pools())
    slot = st.integers(0, pool.slots - 1)
    target = draw(st.lists(slot, unique=True, max_size=pool.slots))
    source = draw(st.lists(slot, min_size=len(target), max_size=len(target)))
    return pool, ints(source), ints(target)


def check_copy(kernels: Kernels, case: tuple[Pool, Tensor, Tensor]) -> None:
    pool, source, target = case
    mine = pool.on(kernels.device)
    kernels.ops.copy_branch_(mine.kv, kernels.on(source), kernels.on(target))
    expected = pool.on(torch.device("cpu"))
    reference.copy_branch_(expected.kv, source, target)
    same(mine.memory, expected.memory)


def check_copy_of_many_rows(kernels: Kernels, num_rows: int) -> None:
    """So many that fewer bytes of each fit a block."""
    kv = random(0, 1, 2, num_rows + 7, 1, 4).to(torch.bfloat16)
    order = torch.randperm(num_rows + 7, generator=torch.Generator().manual_seed(1))
    source, target = order[:num_rows].clone(), order.flip(0)[:num_rows].clone()
    mine = kernels.on(kv.clone())
    kernels.ops.copy_branch_(mine, kernels.on(source), kernels.on(target))
    reference.copy_branch_(kv, source, target)
    same(mine, kv)


def check_copy_refuses_more_rows_than_a_block_holds(kernels: Kernels) -> None:
    slots = kernels.on(torch.arange(12289))
    with pytest.raises(RuntimeError, match="at most 12288 rows in one call, not 12289"):
        kernels.ops.copy_branch_(kernels.on(torch.zeros(1, 2, 12289, 1, 1)), slots, slots)


# ---- write_kv_


@st.composite
def writes(draw) -> tuple[Pool, Tensor, Tensor, Tensor]:
    """Keys and values as views of one fused projection, of either dtype, to distinct slots."""
    pool = draw(pools())
    heads, dim = pool.kv.shape[3:]
    slots = draw(st.lists(st.integers(0, pool.slots - 1), unique=True, max_size=pool.slots))
    shift = draw(st.integers(0, 1))
    fused = random(1, len(slots), (3 + 2 * heads) * dim + shift).to(draw(DTYPES))[:, shift:]
    fused = fused.view(len(slots), 3 + 2 * heads, dim) if shift == 0 else fused.unflatten(1, (3 + 2 * heads, dim))
    return pool, fused[:, 3 : 3 + heads], fused[:, 3 + heads :], ints(slots)


def check_write(kernels: Kernels, case: tuple[Pool, Tensor, Tensor, Tensor]) -> None:
    pool, key, value, slots = case
    mine = pool.on(kernels.device)
    fresh = (key, value) if kernels.device.type == "cpu" else (kernels.on(key), kernels.on(value))
    kernels.ops.write_kv_(mine.kv[0], *fresh, kernels.on(slots))
    expected = pool.on(torch.device("cpu"))
    reference.write_kv_(expected.kv[0], key, value, slots)
    same(mine.memory, expected.memory)


# ---- rollback_


@st.composite
def rollbacks(draw) -> tuple[Pool | None, Tensor, Tensor, Tensor, Tensor, int]:
    pool = draw(st.none() | pools())
    columns = draw(st.integers(1, 9))
    num_sequences = draw(st.integers(1, 3)) if pool is None else min(3, pool.slots // columns)
    num_slots = num_sequences * columns if pool is None else pool.slots
    order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    tables = order[: num_sequences * columns].view(num_sequences, columns)
    lengths = [draw(st.integers(0, columns)) for _ in range(num_sequences)]
    chosen = draw(st.lists(st.sampled_from(range(num_sequences)), unique=True)) if num_sequences else []
    kept = [draw(st.integers(0, lengths[sequence])) for sequence in chosen]
    padding = draw(st.integers(0, 2))
    sequences, kept = ints(chosen + [-1] * padding), ints(kept + [5] * padding)
    return pool, tables, ints(lengths), sequences, kept, draw(st.integers(1, 5))


def check_rollback(kernels: Kernels, case: tuple[Pool | None, Tensor, Tensor, Tensor, Tensor, int]) -> None:
    pool, tables, lengths, sequences, kept, block_size = case
    results = []
    for ops, device in ((kernels.ops, kernels.device), (reference, torch.device("cpu"))):
        changed = [tables.to(device, copy=True), lengths.to(device, copy=True)]
        mine = None if pool is None else pool.on(device)
        kv = None if mine is None else mine.kv
        ops.rollback_(*changed, sequences.to(device), kept.to(device), block_size, kv)
        results.append(changed if mine is None else [*changed, mine.memory])
    for own, expected in zip(*results, strict=True):
        same(own, expected)


# ---- match_outcomes


@st.composite
def matches(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Tables with a column to spare on either side."""
    rows, lookahead = draw(st.integers(0, 70)), draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    target = torch.randint(0, 2, (rows, lookahead + 3), generator=generator)[:, 1 : lookahead + 2]
    draft = torch.randint(0, 2, (rows, lookahead + 2), generator=generator)[:, 1 : lookahead + 1]
    return target, draft, torch.randint(0, lookahead + 1, (rows,), generator=generator)


def check_match(kernels: Kernels, case: tuple[Tensor, Tensor, Tensor]) -> None:
    results = kernels.ops.match_outcomes(*(kernels.on(tensor) for tensor in case))
    for own, expected in zip(results, reference.match_outcomes(*case), strict=True):
        same(own, expected)


# ---- sample_shared_noise

CHOICES = st.builds(
    Choice,
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 1.5]),
        top_k=st.sampled_from([0, 1, 2, 20, 300, 5000]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
        min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
        seed=st.integers(-(2**63), 2**64 - 1),
    ),
    position=st.integers(0, 10**6),
)


@st.composite
def samples(draw) -> tuple[Tensor, list[Choice], int, int]:
    choices = draw(st.lists(CHOICES, max_size=3))
    vocabulary, spread = draw(st.sampled_from([1, 7, 100, 1000, 3001])), draw(st.sampled_from([0.0, 0.5, 3.0, 20.0]))
    logits = random(len(choices), len(choices), vocabulary + 3)[:, 1 : vocabulary + 1] * spread
    if draw(st.booleans()):
        logits[:, vocabulary // 3 :: 5] = -torch.inf
    if choices and draw(st.booleans()):
        logits[-1, vocabulary // 2] = draw(st.sampled_from([torch.nan, torch.inf]))
    return logits.to(draw(DTYPES)), choices, draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([0, 1, 64128]))


def sample_arguments(logits: Tensor, choices: list[Choice], count: int, first_token: int) -> tuple:
    params = [one.params for one in choices]
    doubles = [
        torch.tensor([getattr(p, name) for p in params], dtype=torch.float64)
        for name in ("temperature", "top_p", "min_p")
    ]
    seeds, positions = ints([signed(p.seed) for p in params]), ints([one.position for one in choices])
    return (
        logits,
        doubles[0],
        ints([p.top_k for p in params]),
        doubles[1],
        doubles[2],
        seeds,
        positions,
        count,
        first_token,
    )


def check_sample(kernels: Kernels, case: tuple[Tensor, list[Choice], int, int]) -> None:
    arguments = sample_arguments(*case)
    moved = (kernels.on(a) if isinstance(a, Tensor) else a for a in arguments)
    tokens, scores = (result.cpu() for result in kernels.ops.sample_shared_noise(*moved))
    expected_tokens, expected_scores = reference.sample_shared_noise(*arguments)
    same(tokens, expected_tokens)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-12, atol=1e-12, equal_nan=True)


# ---- a whole round


class Round:
    """Sample, match, write, move and roll back, in fixed memory, so that a CUDA graph can hold it."""

    BATCH, LOOKAHEAD, SLOTS = 2, 3, 32

    def __init__(self, kernels: Kernels) -> None:
        on = kernels.on
        rows = self.BATCH * (self.LOOKAHEAD + 1)
        self.logits = on(torch.zeros(rows, 500))
        self.ones, self.ids = on(torch.ones(rows, dtype=torch.float64)), on(torch.zeros(rows, dtype=torch.int64))
        self.draft = on(torch.zeros(self.BATCH, self.LOOKAHEAD, dtype=torch.int64))
        self.full = on(torch.full((self.BATCH,), self.LOOKAHEAD))
        self.kv = on(torch.zeros(2, 2, self.SLOTS, 2, 8))
        self.fresh, self.fresh_slots = on(torch.zeros(2, 3, 4, 8)), on(ints([7, 30, 8]))
        self.source, self.target = on(ints([20, 21])), on(ints([3, 4]))
        self.tables, self.lengths = on(ints([0] * 16, self.BATCH, 8)), on(ints([0] * self.BATCH))
        self.sequences = on(ints([0, 1]))
        self.set(0)

    def set(self, seed: int) -> None:
        """New values in the same memory; the draft agrees with some of the target's tokens."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in (self.logits, self.kv, self.fresh):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        self.ids.fill_(seed)
        self.source.copy_(ints([20 + seed, 10]))
        self.fresh_slots.copy_(ints([9 + seed, 31, 0]))
        self.tables.copy_(torch.arange(16).view(self.BATCH, 8))
        self.lengths.copy_(ints([6, 5]))
        chosen, _ = reference.sample_shared_noise(*self._sampling())
        self.draft.copy_(chosen.view(self.BATCH, -1)[:, : self.LOOKAHEAD])
        self.draft[0, seed % self.LOOKAHEAD] += 1

    def _sampling(self) -> tuple:
        return self.logits, self.ones, self.ids * 0, self.ones, self.ones * 0, self.ids, self.ids + 7

    def run(self, ops: Any) -> tuple[Tensor, ...]:
        tokens, _ = ops.sample_shared_noise(*self._sampling(), 1)
        accepted, bonus = ops.match_outcomes(tokens.view(self.BATCH, -1), self.draft, self.full)
        ops.write_kv_(self.kv[1], self.fresh[0, :, ::2], self.fresh[1, :, 1::2], self.fresh_slots)
        ops.copy_branch_(self.kv, self.source, self.target)
        ops.rollback_(self.tables, self.lengths, self.sequences, accepted, 2, self.kv)
        return tokens, accepted, bonus

    def check(self, seed: int, results: tuple[Tensor, ...]) -> None:
        """What a run after `set(seed)` left behind and returned is what plain torch makes of the same values."""
        mine = [tensor.cpu().clone() for tensor in (*results, self.kv, self.tables, self.lengths)]
        self.set(seed)
        expected = (*self.run(reference), self.kv, self.tables, self.lengths)
        for own, plain in zip(mine, expected, strict=True):
            same(own, plain.cpu())
        assert mine[1].tolist() == [seed % self.LOOKAHEAD, self.LOOKAHEAD]


# ---- wrong inputs


def check_wrong_values_become_faults(kernels: Kernels) -> None:
    """A value out of range is left alone, the rows beside it are done, and raise_faults says so once."""
    on = kernels.on
    kv = random(0, 2, 2, 6, 1, 4)

    def fault(match: str) -> None:
        with pytest.raises(RuntimeError, match=match):
            kernels.ops.raise_faults(on(kv))
        kernels.ops.raise_faults(on(kv))

    for source, target, match in (
        ([0, 6], [1, 2], "source slot"),
        ([0, -1], [1, 2], "source slot"),
        ([0, 3], [1, 6], "target slot"),
        ([0, 3], [1, -5], "target slot"),
    ):
        mine, expected = on(kv.clone()), kv.clone()
        kernels.ops.copy_branch_(mine, on(ints(source)), on(ints(target)))
        reference.copy_branch_(expected, ints([0]), ints([1]))
        same(mine, expected)
        fault(match)

    mine, expected = on(kv.clone()), kv.clone()
    kernels.ops.write_kv_(mine[0], on(kv[1, 0, :2].clone()), on(kv[1, 1, :2].clone()), on(ints([6, 4])))
    reference.write_kv_(expected[0], kv[1, 0, 1:2], kv[1, 1, 1:2], ints([4]))
    same(mine, expected)
    fault("a slot outside the pool")

    for sequence, kept, match in ((2, 0, "sequence"), (-2, 0, "sequence"), (0, 3, "kept"), (0, -1, "kept")):
        tables, lengths = on(ints([0, 1, 2, 3, 4, 5], 2, 3)), on(ints([2, 3]))
        kernels.ops.rollback_(tables, lengths, on(ints([1, sequence])), on(ints([1, kept])), 1)
        same(tables, ints([0, 1, 2, 3, -1, -1], 2, 3))
        same(lengths, ints([2, 1]))
        fault(match)

    accepted, _ = kernels.ops.match_outcomes(on(ints([1, 2, 1, 2], 2, 2)), on(ints([1, 1], 2, 1)), on(ints([2, 1])))
    same(accepted, ints([0, 1]))
    fault("length")


def check_refusals(kernels: Kernels) -> None:
    """Wrong dtypes and shapes never reach a kernel."""
    kv, slots = kernels.on(torch.zeros(1, 2, 4, 1, 2)), kernels.on(ints([0]))
    for arguments, match in (
        ((kv, slots, slots.int()), "target_slots must be int64"),
        ((kv.half(), slots, slots), "kv must be float32 or bfloat16"),
        ((kv[0], slots, slots), "kv must have 5 dimensions, not 4"),
        ((kv, slots, kernels.on(ints([0, 1]))), "number of target slots must be 1, not 2"),
    ):
        with pytest.raises(RuntimeError, match=match):
            kernels.ops.copy_branch_(*arguments)
