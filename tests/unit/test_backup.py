"""What speculates after a miss: n-grams against a scan of the text, and waiting against counting tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.speculation.backup import PATIENCE, JustInTime, NgramIndex, ngram_match_oracle, waiting_pays
from ssd_runtime.speculation.pace import Pace, expected_tokens
from ssd_runtime.speculation.types import Outcome, Source, Speculation


def worth_waiting(length: int, acceptance: float, token_seconds: float, round_seconds: float) -> bool:
    """Of one sequence that has so many tokens already."""
    added = acceptance ** (length + 1)
    return waiting_pays(added, expected_tokens(length, acceptance), token_seconds, round_seconds)


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


def paced(*, draft: float, ngram: float, step_ms: float, verify_ms: float = 30.0, a_row_ms: float = 0.0) -> JustInTime:
    """A draft and n-grams that are right so often, and forwards that take so long."""
    pace = Pace()
    for source, rate in ((Source.DRAFT, draft), (Source.NGRAM, ngram)):
        for accepted in ([True] * round(10 * rate) + [False] * round(10 * (1 - rate))) * 80:
            pace.acceptance[source].observe_one(accepted)
    for rows in (1, 2, 4, 8):
        pace.drafted((step_ms + a_row_ms * rows) / 1e3, rows)
    pace.verified([Speculation((1, 1))], [Outcome(2, 1)], verify_ms / 1e3)
    return JustInTime(pace)


def test_auto_takes_the_ngram_where_it_promises_as_much_and_the_draft_where_there_is_none() -> None:
    just_in_time = paced(draft=0.8, ngram=0.8, step_ms=3.0)
    assert just_in_time.prefer_ngrams([6], [6]) == [True]
    assert just_in_time.prefer_ngrams([0], [6]) == [False]
    assert just_in_time.prefer_ngrams([6, 0], [6, 6]) == [True, False]  # each its own


def test_auto_waits_for_the_draft_where_ngrams_are_poor() -> None:
    assert paced(draft=0.9, ngram=0.1, step_ms=3.0).prefer_ngrams([6, 6], [6, 6]) == [False, False]


def test_auto_does_not_wait_for_a_draft_that_is_slower_than_the_target() -> None:
    just_in_time = paced(draft=0.9, ngram=0.3, step_ms=60.0)
    assert just_in_time.prefer_ngrams([0, 3], [6, 6]) == [True, True]


def test_auto_waits_in_small_batches_and_not_in_large_ones() -> None:
    """Theorem 17: a step for all takes longer, a match does not; there is one batch size where it turns."""
    just_in_time = paced(draft=0.9, ngram=0.5, step_ms=1.0, a_row_ms=1.5)
    waits = [not any(just_in_time.prefer_ngrams([6] * size, [6] * size)) for size in range(1, 20)]
    assert waits[0]
    assert not waits[-1]
    assert waits == sorted(waits, reverse=True)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=8),
    draft=st.sampled_from([0.2, 0.6, 0.9]),
    ngram=st.sampled_from([0.1, 0.5, 0.9]),
    step_ms=st.sampled_from([1.0, 10.0, 50.0]),
)
def test_auto_answers_for_every_sequence_and_alike_for_like_ones(
    sizes: list[tuple[int, int]], draft: float, ngram: float, step_ms: float
) -> None:
    matches, most = [min(match, limit) for match, limit in sizes], [limit for _, limit in sizes]
    prefer = paced(draft=draft, ngram=ngram, step_ms=step_ms).prefer_ngrams(matches, most)
    assert len(prefer) == len(sizes)
    if all(match == 0 for match in matches):
        assert len(set(prefer)) == 1  # without matches all wait or nobody does


def test_nothing_measured_yet_means_waiting_for_all() -> None:
    just_in_time = JustInTime(Pace())
    assert just_in_time.prefer_ngrams([6], [6]) == [False]
    assert not just_in_time.enough([0, 6], [6, 6])
    assert just_in_time.enough([6, 3], [6, 3])


def test_a_batch_weighs_what_all_would_gain_against_what_all_would_wait() -> None:
    """One sequence with a long way to go waits less when others are ready and wait with it."""
    just_in_time = paced(draft=0.8, ngram=0.5, step_ms=7.0)
    assert not just_in_time.enough([1], [6])
    assert just_in_time.enough([1, 6, 6, 6, 6], [6, 6, 6, 6, 6])
