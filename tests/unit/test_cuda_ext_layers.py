"""Compiled norms, activations, rotary embedding and attention against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext import reference
from cuda_ext.reference.attention import attention_by_rows

compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)

ROWS = st.integers(0, 24)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
NUM_SLOTS = 90
kernel = torch.ops.ssd_runtime.paged_attention  # takes the rows in any order, and no spans


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within float32 reordering, or one rounding step of bfloat16."""
    rtol, atol = (2**-7, 2e-3) if expected.dtype == torch.bfloat16 else (2e-5, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, features=st.sampled_from([1, 15, 16, 50, 576]), dtype=DTYPES, weight_dtype=DTYPES)
def test_norms_agree_and_the_residual_is_exact(rows, features, dtype, weight_dtype):
    x, residual = random(0, rows, features).to(dtype), random(1, rows, features).to(dtype)
    weight = random(2, features).to(weight_dtype)
    assert_near(compiled.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    normed, total = compiled.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_near(normed, expected)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, features=st.sampled_from([1, 15, 16, 50, 1536]), dtype=DTYPES, size=st.sampled_from([1.0, 30.0]))
def test_silu_mul_agrees(rows, features, dtype, size):
    gate_up = (random(0, rows, 2 * features) * size).to(dtype)
    assert_near(compiled.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_silu_mul_stays_finite_far_from_zero():
    gates = torch.tensor([[-1e30, -200.0, -100.0, 0.0, 100.0, 1e30, 1.0, 1.0]])
    assert_near(
        compiled.silu_mul(torch.cat((gates, torch.ones_like(gates)), 1)),
        torch.relu(gates).where(gates != 1.0, torch.nn.functional.silu(gates)),
    )


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, head_dim=st.sampled_from([2, 20, 64, 80, 128]), dtype=DTYPES, angle_dtype=DTYPES, kv_dtype=DTYPES)
def test_rope_write_agrees_on_views_of_a_fused_projection(rows, head_dim, dtype, angle_dtype, kv_dtype):
    fused = random(0, rows, 15, head_dim).to(dtype)
    kv = random(1, 2, NUM_SLOTS, 3, head_dim).to(kv_dtype)
    cos, sin = random(2, 2, rows, head_dim).to(angle_dtype)
    slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(3))[:rows]
    outcomes = []
    for module in (compiled, reference):
        mine, cache = fused.clone(), kv.clone()
        module.rope_write_(mine[:, :9], mine[:, 9:12], mine[:, 12:], cos, sin, cache, slots)
        outcomes.append((mine, cache))
    for actual, expected in zip(*outcomes, strict=True):
        assert_near(actual, expected)
    others = torch.ones(NUM_SLOTS, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(outcomes[0][1][:, others], kv[:, others])


def attention_case(rows: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    q = random(seed, rows, 15, head_dim).to(dtype)[:, 2:11]
    kv = random(seed + 1, 2, NUM_SLOTS, 3, head_dim).to(kv_dtype)
    sequence = torch.randint(0, 3, (rows,), generator=generator)
    if seed % 2:
        sequence = sequence.sort().values
    tables = torch.stack([torch.randperm(NUM_SLOTS, generator=generator)[:70] for _ in range(3)])
    prefix = torch.randint(0, 71, (rows,), generator=generator)
    chain = torch.randint(-2, NUM_SLOTS, (rows, seed % 4), generator=generator)
    return q, kv, sequence, tables, prefix, chain, head_dim**-0.5


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS,
    head_dim=st.sampled_from([4, 20, 64, 80, 128]),
    dtype=DTYPES,
    kv_dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_attention_agrees_and_a_row_does_not_depend_on_the_others(rows, head_dim, dtype, kv_dtype, seed):
    q, kv, sequence, tables, prefix, chain, scale = attention_case(rows, head_dim, dtype, kv_dtype, seed)
    together = kernel(q, kv, sequence, tables, prefix, chain, scale)
    assert_near(together, attention_by_rows(q, kv, sequence, tables, prefix, chain, scale, reach=70))
    for row in range(rows):
        one = slice(row, row + 1)
        alone = kernel(q[one], kv, sequence[one], tables, prefix[one], chain[one], scale)
        assert torch.equal(alone[0], together[row])


def test_attention_never_reads_a_hidden_slot():
    q, kv, sequence, tables, prefix, chain, scale = attention_case(12, 64, torch.float32, torch.float32, 3)
    clean = kernel(q, kv, sequence, tables, prefix, chain, scale)
    for row in range(12):
        seen = torch.cat((tables[sequence[row], : prefix[row]], chain[row][chain[row] >= 0]))
        poisoned = kv.clone()
        hidden = torch.ones(NUM_SLOTS, dtype=torch.bool).index_fill(0, seen, False)
        poisoned[:, hidden] = float("nan")
        out = kernel(q, poisoned, sequence, tables, prefix, chain, scale)
        assert torch.equal(out[row], clean[row])


def test_a_row_that_sees_nothing_is_zero():
    q, kv, sequence, tables, prefix, chain, scale = attention_case(4, 64, torch.bfloat16, torch.bfloat16, 3)
    out = kernel(q, kv, sequence, tables, prefix * 0, chain * 0 - 1, scale)
    assert not out.any()


def test_norm_rows_do_not_depend_on_each_other():
    x, residual, weight = random(0, 9, 576), random(1, 9, 576), random(2, 576)
    together, _ = compiled.add_rms_norm(x, residual, weight, 1e-5)
    alone = [compiled.add_rms_norm(x[r : r + 1], residual[r : r + 1], weight, 1e-5)[0] for r in range(9)]
    assert torch.equal(together, torch.cat(alone))


def test_slots_out_of_range_are_refused_before_anything_is_written():
    fused, kv = random(0, 2, 15, 64), random(1, 2, NUM_SLOTS, 3, 64)
    cos, sin = random(2, 2, 2, 64)
    before, cache_before = fused.clone(), kv.clone()
    for bad in (NUM_SLOTS, -1):
        with pytest.raises(RuntimeError, match=rf"slot {bad} is outside \[0, {NUM_SLOTS}\)"):
            compiled.rope_write_(fused[:, :9], fused[:, 9:12], fused[:, 12:], cos, sin, kv, torch.tensor([0, bad]))
    assert torch.equal(fused, before)
    assert torch.equal(kv, cache_before)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sequence", torch.tensor([0, 3]), r"sequence 3 is outside \[0, 3\)"),
        ("prefix", torch.tensor([71, 0]), r"prefix 71 is outside \[0, 71\)"),
        ("prefix", torch.tensor([-1, 0]), r"prefix -1 is outside"),
        ("chain", torch.tensor([[0], [NUM_SLOTS]]), "chain slot 90 is outside"),
        ("tables", torch.full((3, 70), NUM_SLOTS), r"slot 90 is outside \[0, 90\)"),
        ("tables", torch.zeros(3, 70), "tables must be int64"),
        ("q", torch.zeros(2, 8, 64), "8 query heads are no multiple of 3"),
        ("kv", torch.zeros(2, NUM_SLOTS, 3, 32), "head dimension of kv must be 64, not 32"),
    ],
)
def test_attention_refuses_bad_indices(name, value, reason):
    arguments = {
        "q": random(0, 2, 9, 64),
        "kv": random(1, 2, NUM_SLOTS, 3, 64),
        "sequence": torch.tensor([0, 1]),
        "tables": torch.arange(70).repeat(3, 1),
        "prefix": torch.tensor([70, 1]),
        "chain": torch.tensor([[0], [-1]]),
        "scale": 0.125,
    }
    arguments[name] = value
    with pytest.raises(RuntimeError, match=reason):
        kernel(*arguments.values())
