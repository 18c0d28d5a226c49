"""Compiled sampling, matching and cache moves against plain torch and the runtime's own oracles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext import reference
from ssd_runtime.kv.table import copy_branch_oracle
from ssd_runtime.speculation.noise import gumbel_noise, noise_key, signed
from ssd_runtime.speculation.sampling.ranking import Choice, rank_tokens_oracle
from ssd_runtime.speculation.types import SamplingParams
from ssd_runtime.speculation.verify import verify

compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
BACKENDS = [reference, compiled]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(backend, logits: torch.Tensor, choices: list[Choice], count: int) -> list[tuple[int, ...]]:
    params = [one.params for one in choices]
    ranked, scores = backend.sample_shared_noise(
        logits,
        torch.tensor([p.temperature for p in params], dtype=torch.float64),
        torch.tensor([p.top_k for p in params], dtype=torch.int64),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        torch.tensor([p.min_p for p in params], dtype=torch.float64),
        torch.tensor([signed(p.seed) for p in params], dtype=torch.int64),
        torch.tensor([one.position for one in choices], dtype=torch.int64),
        count,
    )
    assert torch.equal(ranked >= 0, scores > -torch.inf)
    return [tuple(token for token in row if token >= 0) for row in ranked.tolist()]


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


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(
    choices=st.lists(CHOICES, max_size=5),
    vocabulary=st.sampled_from([1, 7, 16, 100, 1000, 5003]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    count=st.sampled_from([1, 2, 8]),
)
def test_tokens_equal_those_of_the_oracle(backend, choices, vocabulary, spread, dtype, count):
    logits = (random(len(choices), len(choices), vocabulary) * spread).to(dtype)
    expected = [ranking.tokens for ranking in rank_tokens_oracle(logits, choices, count)]
    assert sample(backend, logits, choices, count) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_tokens_are_never_chosen(backend):
    logits = torch.full((2, 40), -torch.inf)
    logits[0, 33] = 1.0
    choices = [Choice(SamplingParams(temperature=t), 0) for t in (1.0, 0.0)]
    assert sample(backend, logits, choices, 3) == [(33,), ()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 15, 16, 37])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_with_a_logit_that_is_no_number_has_no_tokens_and_no_scores(backend, dtype, place, value):
    logits = torch.zeros(3, 38, dtype=dtype)
    logits[0, place] = logits[1, place] = value
    ones, off = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    temperature = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    tokens, scores = backend.sample_shared_noise(logits, temperature, off, ones, ones * 0, off, off, 2)
    assert tokens[:2].tolist() == [[-1, -1]] * 2
    assert bool(scores[:2].isnan().all())
    assert bool((tokens[2] >= 0).all())


def test_scores_equal_those_of_plain_torch():
    seeds, off = torch.tensor([5, -7]), torch.zeros(2, dtype=torch.int64)
    ones = off.double() + 1
    arguments = (random(0, 2, 1000), torch.tensor([0.7, 0.0]).double(), off, ones, ones * 0, seeds, off + 9, 6)
    expected = reference.sample_shared_noise(*arguments)
    torch.testing.assert_close(compiled.sample_shared_noise(*arguments), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("first", "last"), [(0, 1000), (1, 1000), (613, 700), (999, 1000)])
def test_a_slice_has_the_scores_of_its_part_of_the_vocabulary(backend, first, last):
    seeds, off = torch.tensor([5, -7, 8]), torch.zeros(3, dtype=torch.int64)
    ones = off.double() + 1
    rest = (torch.tensor([0.7, 0.0, 1.3]).double(), off, ones, ones * 0, seeds, off + 9)
    logits = random(1, 3, 1000)
    inside = logits.clone()
    inside[:, :first] = inside[:, last:] = -torch.inf
    expected = backend.sample_shared_noise(inside, *rest, 20)
    found = backend.sample_shared_noise(logits[:, first:last], *rest, 20, first)
    assert torch.equal(found[0], expected[0])
    if backend is compiled:
        assert torch.equal(found[1], expected[1])
    else:  # torch rounds a logarithm by where it lies in a vector
        torch.testing.assert_close(found[1], expected[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), -1])
@pytest.mark.parametrize("position", [0, 7, 2**40])
def test_the_noise_of_seed_and_position_is_that_of_the_runtime(backend, seed, position):
    """Equal logits leave nothing but noise in the scores: every bit of the key shows."""
    one, off = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    seeds, positions = torch.tensor([signed(seed)]), torch.tensor([position])
    tokens, scores = backend.sample_shared_noise(torch.zeros(1, 40), one, off, one, one * 0, seeds, positions, 40)
    expected = gumbel_noise(noise_key(seed, position), tokens)
    torch.testing.assert_close(scores, expected, rtol=1e-14, atol=1e-14)
    assert sorted(tokens[0].tolist()) == list(range(40))


def test_sampling_refuses_wrong_inputs():
    ones, ids = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="count must be at least 1"):
        compiled.sample_shared_noise(torch.zeros(2, 8), ones, ids, ones, ones, ids, ids, 0)
    with pytest.raises(RuntimeError, match="temperature must be float64"):
        compiled.sample_shared_noise(torch.zeros(2, 8), ones.float(), ids, ones, ones, ids, ids)
    three = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="length of seed must be 2, not 3"):
        compiled.sample_shared_noise(torch.zeros(2, 8), ones, ids, ones, ones, three, ids)
    with pytest.raises(RuntimeError, match="length of position must be 2, not 3"):
        compiled.sample_shared_noise(torch.zeros(2, 8), ones, ids, ones, ones, ids, three)
    with pytest.raises(RuntimeError, match="position must be int64"):
        compiled.sample_shared_noise(torch.zeros(2, 8), ones, ids, ones, ones, ids, ids.int())
    with pytest.raises(RuntimeError, match="logits must be float32 or bfloat16"):
        compiled.sample_shared_noise(torch.zeros(2, 8).half(), ones, ids, ones, ones, ids, ids)
    with pytest.raises(RuntimeError, match="logits must have 2 dimensions, not 1"):
        compiled.sample_shared_noise(torch.zeros(8), ones, ids, ones, ones, ids, ids)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), lookahead=st.integers(0, 6), rows=st.integers(0, 5))
def test_matching_equals_verification_row_by_row(backend, data, lookahead, rows):
    token = st.integers(0, 2)
    target = [data.draw(st.lists(token, min_size=lookahead + 1, max_size=lookahead + 1)) for _ in range(rows)]
    draft = [data.draw(st.lists(token, min_size=lookahead, max_size=lookahead)) for _ in range(rows)]
    lengths = [data.draw(st.integers(0, lookahead)) for _ in range(rows)]
    accepted, bonus = backend.match_outcomes(
        torch.tensor(target, dtype=torch.int64).view(rows, lookahead + 1),
        torch.tensor(draft, dtype=torch.int64).view(rows, lookahead),
        torch.tensor(lengths, dtype=torch.int64),
    )
    outcomes = [verify(t[: n + 1], d[:n]) for t, d, n in zip(target, draft, lengths, strict=True)]
    assert accepted.tolist() == [outcome.num_accepted for outcome in outcomes]
    assert bonus.tolist() == [outcome.bonus_token for outcome in outcomes]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), head_dim=st.sampled_from([1, 5, 64]))
def test_copy_branch_moves_rows_even_where_they_overlap(backend, data, dtype, head_dim):
    slots = st.integers(0, 11)
    target = data.draw(st.lists(slots, unique=True, max_size=12))
    source = data.draw(st.lists(slots, min_size=len(target), max_size=len(target)))
    kv = random(0, 3, 2, 12, 2, head_dim).to(dtype)
    expected = kv.clone()
    copy_branch_oracle(expected, source, target)
    backend.copy_branch_(kv, torch.tensor(source, dtype=torch.int64), torch.tensor(target, dtype=torch.int64))
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("head_dim", [127, 128])  # rows of no multiple of 16 bytes, and of one
@pytest.mark.parametrize("shift", [0, 1, 40])  # onto themselves, onto neighbours, apart
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_too_large_for_the_caches_gives_the_same_rows(dtype, shift, head_dim):
    kv = random(0, 8, 2, 80, 8, head_dim).to(dtype)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    source, target = order[:40], order[shift : shift + 40]
    assert kv[:, :, :40].nbytes > 1 << 20
    expected = kv.clone()
    copy_branch_oracle(expected, source.tolist(), target.tolist())
    compiled.copy_branch_(kv, source, target)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("shape", [(2, 2, 0, 1, 4), (1, 2, 3, 2, 5), (24, 2, 700, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_cache_is_zeros_of_the_shape_asked_for(shape, dtype):
    own, plain = (backend.new_cache(shape, dtype, torch.device("cpu")) for backend in (compiled, reference))
    assert (own.shape, own.dtype, own.stride()) == (plain.shape, plain.dtype, plain.stride())
    assert torch.equal(own, plain)
    assert compiled.new_cache(shape, dtype, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv_scatters_strided_rows(dtype, kv_dtype):
    fused, slots = random(0, 5, 8, 20).to(dtype), torch.tensor([9, 0, 4, 7, 2])
    mine, expected = torch.zeros(2, 10, 3, 20, dtype=kv_dtype), torch.zeros(2, 10, 3, 20, dtype=kv_dtype)
    compiled.write_kv_(mine, fused[:, 2:5], fused[:, 5:], slots)
    reference.write_kv_(expected, fused[:, 2:5], fused[:, 5:], slots)
    assert torch.equal(mine, expected)


def test_moves_refuse_slots_outside_the_pool_and_change_nothing():
    kv = random(0, 2, 2, 6, 1, 4)
    before = kv.clone()
    with pytest.raises(RuntimeError, match=r"target slot 6 is outside \[0, 6\)"):
        compiled.copy_branch_(kv, torch.tensor([0, 1]), torch.tensor([2, 6]))
    with pytest.raises(RuntimeError, match=r"source slot -1 is outside \[0, 6\)"):
        compiled.copy_branch_(kv, torch.tensor([0, -1]), torch.tensor([2, 3]))
    with pytest.raises(RuntimeError, match="target_slots must be int64"):
        compiled.copy_branch_(kv, torch.tensor([0]), torch.tensor([2], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"slot 9 is outside \[0, 6\)"):
        compiled.write_kv_(kv[0], kv[0, 0, :2], kv[0, 1, :2], torch.tensor([0, 9]))
    assert torch.equal(kv, before)
