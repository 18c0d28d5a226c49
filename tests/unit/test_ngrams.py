"""N-grams: the index against a scan of the text, and what is learned of matches against what came."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.speculation.planning.ngrams import Match, NgramIndex, NgramRecord, ngram_match_oracle


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
        assert index.match(tokens[:cut], count) == ngram_match_oracle(tokens[:cut], count, *sizes)


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
    for found in (NgramIndex().match(tokens, 5), ngram_match_oracle(tokens, 5)):
        assert "".join(map(chr, found.tokens)) == match


def test_a_match_says_how_long_the_suffix_was() -> None:
    assert NgramIndex().match([1, 2, 9, 1, 2], 3) == Match((9, 1, 2), 2)
    assert NgramIndex().match([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5], 2) == Match((9, 1), 4)
    assert NgramIndex().match([1, 2, 3], 3) == Match((), 0)


@pytest.mark.parametrize(
    ("came", "right", "wrong"), [([7], 0, 0), ([7, 8], 0, 0), ([7, 8, 9, 1], 3, 0), ([7, 5], 1, 1), ([5], 0, 1)]
)
def test_a_match_counts_once_it_is_known_what_came(came: list[int], right: int, wrong: int) -> None:
    """However few tokens a round brings, and whether the match was verified or not."""
    record, text = NgramRecord(prior=0.5, weight=2.0, memory=1e9), [1, 2]
    record.expect(Match((7, 8, 9), 3), len(text))
    for token in came:
        text.append(token)
        record.learn(text)
        record.expect(Match((4,), 4), len(text))  # in vain while the first is open
    assert record.rate(3) == pytest.approx((1.0 + right) / (2.0 + right + wrong))
    assert record.rate(2) == 0.5


def test_a_sequence_is_believed_its_own_and_leans_on_all_others() -> None:
    of_all = NgramRecord()
    good, bad, new = (NgramRecord(of_all) for _ in range(3))
    for _ in range(60):
        good.observe(4, 3, failed=False)
        bad.observe(4, 0, failed=True)
    assert good.rate(4) > 0.9
    assert bad.rate(4) < 0.2
    assert new.rate(4) == of_all.rate(4)
    assert bad.rate(4) < of_all.rate(4) < good.rate(4)
    assert of_all.rate(2) == NgramRecord().rate(2)
