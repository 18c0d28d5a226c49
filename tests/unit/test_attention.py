"""Attention in plain torch: blocks of rows over keys gathered once a sequence, against the definition row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_ext.reference.attention import Span, attention_by_rows, paged_attention
from tests.live_bytes import peak_bytes

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
NUM_SLOTS = 64
MOST = st.sampled_from([0, 100, 1000, 2**62])  # blocks of a row and never the definition; in between; whole sequences


@dataclass(frozen=True)
class Case:
    """Arguments of `paged_attention`."""

    q_NHD: Tensor
    kv_2SGD: Tensor
    sequence_N: Tensor
    tables_SC: Tensor
    prefix_N: Tensor
    chain_NC: Tensor
    scale: float
    spans: tuple[Span, ...]

    def run(self, most: int) -> Tensor:
        with patch("cuda_ext.reference.attention.MOST", most):
            return paged_attention(**vars(self))

    def by_definition(self) -> Tensor:
        arguments = {name: value for name, value in vars(self).items() if name != "spans"}
        return attention_by_rows(**arguments, reach=max(span.reach for span in self.spans))

    def seen(self, row: int) -> Tensor:
        """Which slots a row sees, as booleans."""
        chain_C = self.chain_NC[row]
        slots = torch.cat((self.tables_SC[self.sequence_N[row], : self.prefix_N[row]], chain_C[chain_C >= 0]))
        return torch.zeros(NUM_SLOTS, dtype=torch.bool).index_fill(0, slots, True)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Several sequences, some without rows, in every grouping of heads; rows may see no prefix, no chain or neither."""
    groups, per_group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 20]))
    counts = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    num_rows, depth, width = sum(counts), draw(st.integers(0, 3)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    reaches = [draw(st.integers(0, width)) for _ in counts]
    sequence = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    fused = torch.randn(num_rows, groups * per_group + 2, head_dim, generator=generator).to(draw(DTYPES))
    return Case(
        q_NHD=fused[:, 1:-1],  # a view, as of a fused projection
        kv_2SGD=torch.randn(2, NUM_SLOTS, groups, head_dim, generator=generator).to(draw(DTYPES)),
        sequence_N=sequence,
        tables_SC=torch.stack([torch.randperm(NUM_SLOTS, generator=generator)[:width] for _ in counts]),
        prefix_N=(torch.rand(num_rows, generator=generator) * (torch.tensor(reaches)[sequence] + 1)).long(),
        chain_NC=torch.randint(-NUM_SLOTS, NUM_SLOTS, (num_rows, depth), generator=generator).clamp_min(-1),
        scale=head_dim**-0.5,
        spans=tuple(map(Span, counts, reaches)),
    )


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within float32 reordering, or one rounding step of bfloat16."""
    assert actual.dtype == expected.dtype
    rtol, atol = (2**-7, 2e-3) if expected.dtype == torch.bfloat16 else (2e-5, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@settings(max_examples=100, deadline=None)
@given(case=cases(), most=MOST)
def test_blocks_of_rows_over_keys_gathered_once_give_what_each_row_gives_by_definition(case: Case, most: int) -> None:
    assert_near(case.run(most), case.by_definition())


@settings(max_examples=100, deadline=None)
@given(case=cases(), most=MOST, data=st.data())
def test_what_a_row_does_not_see_changes_no_bit_of_it_and_what_it_sees_does(
    case: Case, most: int, data: st.DataObject
) -> None:
    """Not even what other rows of its sequence see: of what is hidden from one, half is made no number."""
    clean = case.run(most)
    bad_S = torch.rand(NUM_SLOTS, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.5
    if len(clean):
        bad_S &= ~case.seen(data.draw(st.integers(0, len(clean) - 1)))
    kv, values = case.kv_2SGD.clone(), data.draw(st.booleans())
    kv[int(values), bad_S] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    found = replace(case, kv_2SGD=kv).run(most)
    for row in range(len(clean)):
        if not bool((case.seen(row) & bad_S).any()):
            assert torch.equal(found[row], clean[row])
        elif values:
            assert not found[row].isfinite().all()


@settings(max_examples=20, deadline=None)
@given(case=cases(), most=MOST)
def test_a_row_that_sees_nothing_is_zero(case: Case, most: int) -> None:
    blind = replace(case, prefix_N=case.prefix_N * 0, chain_NC=case.chain_NC * 0 - 1)
    assert not blind.run(most).any()


@pytest.mark.parametrize("depth", [0, 4])
def test_twice_the_rows_take_no_more_memory_than_their_results(depth: int) -> None:
    """Rows and context of a long prompt's chunk; with chains, of a draft's forward."""

    def peak(rows: int) -> int:
        kv = torch.empty(2, 1, 2, 64, device="meta").expand(-1, 20_000, -1, -1)
        integers = torch.empty(1, 16_384, dtype=torch.int64, device="meta")
        case = Case(
            q_NHD=torch.empty(rows, 8, 64, device="meta"),
            kv_2SGD=kv,
            sequence_N=integers[0, :rows],
            tables_SC=integers,
            prefix_N=integers[0, :rows],
            chain_NC=torch.empty(rows, depth, dtype=torch.int64, device="meta"),
            scale=0.125,
            spans=(Span(rows, 16_384),),
        )
        return peak_bytes(lambda: paged_attention(**vars(case)))

    results = 2 * 4 * 2048 * 8 * 64  # blocks, then all of them together
    assert peak(4096) - peak(2048) <= results
