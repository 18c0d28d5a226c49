"""N-grams: the index against a scan of the text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.speculation.planning.ngrams import NgramIndex


def oracle(tokens: Sequence[int], count: int, longest: int = 4, shortest: int = 2) -> tuple[int, ...]:
    """`NgramIndex.match` by definition: scan the text for the latest earlier occurrence of its own longest suffix."""
    for n in range(longest, shortest - 1, -1):
        suffix = tuple(tokens[-n:])
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(suffix) == n and tuple(tokens[end - n : end]) == suffix:
                return tuple(tokens[end : end + count])
    return ()


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    cuts=st.lists(st.integers(1, 80), max_size=8),
    count=st.integers(0, 6),
    sizes=st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda pair: (pair[0] + pair[1], pair[0])),
)
def test_the_index_finds_what_a_scan_finds_however_the_text_grows(
    tokens: list[int], cuts: list[int], count: int, sizes: tuple[int, int]
) -> None:
    index = NgramIndex(*sizes)
    for cut in sorted({min(cut, len(tokens)) for cut in cuts} | {len(tokens)}):
        assert index.match(tokens[:cut], count) == oracle(tokens[:cut], count, *sizes)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", ""),
        ("a", ""),
        ("ab", ""),
        ("abXab", "Xab"),
        ("abXabYab", "Yab"),  # the latest occurrence
        ("xabcPabcQxabc", "PabcQ"),  # the longest suffix before a later short one
        ("aaaa", "a"),  # an occurrence may overlap the suffix
    ],
)
def test_matches_by_example(text: str, match: str) -> None:
    tokens = [ord(letter) for letter in text]
    for found in (NgramIndex().match(tokens, 5), oracle(tokens, 5)):
        assert "".join(map(chr, found)) == match
