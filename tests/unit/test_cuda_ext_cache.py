"""Rollback on the device side, against plain torch and the runtime's bookkeeping; what tracing is told of operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext import reference
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable

compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
BACKENDS = [reference, compiled]


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_kv(num_slots: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 2, num_slots, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)


@st.composite
def rollbacks(draw):
    """Tables of a few sequences with slots of their own, and what to keep of some of them."""
    num_sequences, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    tables = torch.randperm(num_sequences * columns + 2)[: num_sequences * columns].view(num_sequences, columns)
    lengths = [draw(st.integers(0, columns)) for _ in range(num_sequences)]
    chosen = draw(st.lists(st.integers(0, num_sequences - 1), unique=True, max_size=num_sequences))
    kept = [draw(st.integers(0, lengths[sequence])) for sequence in chosen]
    return tables, ints(*lengths), ints(*chosen, -1), ints(*kept, 0), draw(st.integers(1, 5))


@settings(max_examples=100, deadline=None)
@given(rollbacks(), st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_rollback_changes_what_plain_torch_changes(case, kv_dtype):
    tables, lengths, sequences, kept, block_size = case
    results = []
    for backend in BACKENDS:
        mine = tables.clone(), lengths.clone()
        kv = None if kv_dtype is None else random_kv(tables.numel() + 2, kv_dtype)
        backend.rollback_(*mine, sequences, kept, block_size, kv)
        results.append((*mine, torch.zeros(0) if kv is None else kv))
    for plain, own in zip(*results, strict=True):
        torch.testing.assert_close(own, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 5, 8, 10])
def test_rollback_leaves_the_slots_a_block_table_keeps(backend, kept):
    table = BlockTable(BlockAllocator(6), 4, 16, torch.device("cpu"))
    table.reserve(11)
    table.length = 10
    tables, lengths = table.slots[None].clone(), ints(10)
    tables[0, table.capacity :] = -1
    backend.rollback_(tables, lengths, ints(0), ints(kept), 4)
    table.rollback(kept)
    assert lengths.tolist() == [kept]
    assert tables[0, : table.capacity].equal(table.slots[: table.capacity])
    assert (tables[0, table.capacity :] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_poison_reaches_every_layer_of_dropped_rows_and_no_other_row(backend):
    kv = random_kv(6)
    before = kv.clone()
    backend.rollback_(ints([5, 0, 3, 2]), ints(3), ints(0), ints(1), 2, kv)
    assert kv[:, :, [0, 3]].isnan().all()
    others = [1, 2, 4, 5]
    assert kv[:, :, others].equal(before[:, :, others])


def test_rollback_refuses_wrong_values_and_changes_nothing():
    tables, lengths = ints([0, 1, 2], [3, 4, 9]), ints(2, 3)
    before = tables.clone(), lengths.clone()
    with pytest.raises(RuntimeError, match=r"kept 3 is outside \[0, 3\)"):
        compiled.rollback_(tables, lengths, ints(1, 0), ints(0, 3), 2)
    with pytest.raises(RuntimeError, match=r"sequence 2 is outside \[-1, 2\)"):
        compiled.rollback_(tables, lengths, ints(0, 2), ints(0, 0), 2)
    with pytest.raises(RuntimeError, match=r"slot 9 is outside \[0, 6\)"):
        compiled.rollback_(tables, lengths, ints(0, 1), ints(0, 0), 2, random_kv(6))
    with pytest.raises(RuntimeError, match="block_size must be at least 1"):
        compiled.rollback_(tables, lengths, ints(0), ints(0), 0)
    with pytest.raises(RuntimeError, match="kept must be int64"):
        compiled.rollback_(tables, lengths, ints(0), ints(0).int(), 1)
    assert tables.equal(before[0])
    assert lengths.equal(before[1])


def arguments(name: str) -> tuple:
    ones, ids = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    kv = random_kv(6)
    return {
        "copy_branch_": (kv, ints(0, 1), ints(1, 2)),
        "write_kv_": (kv[0], kv[1, 0, :2].clone(), kv[1, 1, :2].clone(), ints(3, 5)),
        "rollback_": (ints([0, 1, 2], [3, 4, 5]), ints(2, 3), ints(1), ints(1), 2, kv),
        "match_outcomes": (ints([1, 2, 3]), ints([1, 5]), ints(2)),
        "sample_shared_noise": (torch.randn(2, 40), ones, ids, ones, ones * 0, ids, ids, 3),
    }[name]


OPERATORS = ["copy_branch_", "write_kv_", "rollback_", "match_outcomes", "sample_shared_noise"]


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_passes(name):
    checked = torch.library.opcheck(getattr(torch.ops.ssd_runtime, name).default, arguments(name))
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(name):
    real = getattr(compiled, name)(*arguments(name))
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments(name)]
    fake = getattr(compiled, name)(*meta)
    assert (real is None) == (fake is None)
    for own, other in zip(real or (), fake or (), strict=True):
        assert other.device.type == "meta"
        assert (own.shape, own.dtype, own.stride()) == (other.shape, other.dtype, other.stride())
