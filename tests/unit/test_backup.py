"""What speculates after a miss: n-grams against a scan of the text, and waiting against counting tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.speculation.backup import PATIENCE, NgramIndex, ngram_match_oracle, worth_waiting


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
        assert "".join(map(chr, found)) == match


@given(
    length=st.integers(0, 8),
    acceptance=st.floats(0.01, 0.99),
    step_ms=st.floats(0.1, 100),
    verify_ms=st.floats(0.1, 100),
    waited_ms=st.floats(0, 500),
)
def test_waiting_pays_when_a_token_more_is_worth_its_time(
    length: int, acceptance: float, step_ms: float, verify_ms: float, waited_ms: float
) -> None:
    """Against the rates themselves: tokens of this round over the time from now to its end. What was waited is gone."""

    def tokens_per_ms(tokens: int, further_wait_ms: float) -> float:
        expected = sum(acceptance**k * (1 - acceptance) * (k + 1) for k in range(tokens))
        expected += acceptance**tokens * (tokens + 1)
        return expected / (further_wait_ms + verify_ms)

    # Patience counts the tokens that are added for a little more than they are.
    now, later = tokens_per_ms(length, 0.0), tokens_per_ms(length + 1, step_ms)
    later += (PATIENCE - 1) * acceptance ** (length + 1) / (step_ms + verify_ms)
    if now != pytest.approx(later, rel=1e-9):
        assert worth_waiting(length, acceptance, step_ms / 1e3, verify_ms / 1e3) == (later > now)


def test_waiting_ends_for_good_once_it_does_not_pay() -> None:
    for acceptance in (0.3, 0.8, 0.95):
        worth = [worth_waiting(length, acceptance, 0.010, 0.060) for length in range(60)]
        assert worth == sorted(worth, reverse=True)
        assert worth[0]
        assert not worth[-1]


def test_a_draft_slower_than_the_target_is_not_waited_for() -> None:
    assert not worth_waiting(0, 0.99, 0.050, 0.040)
