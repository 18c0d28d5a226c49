"""Where an accepted run is cut: EOS, stop strings and the length limit, to the token and to the character."""

from __future__ import annotations

import codecs
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.engine.request import Request
from ssd_runtime.engine.sequence import Delta, Sequence
from ssd_runtime.kv.pool import BlockAllocator
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.speculation.types import Outcome, SamplingParams, Source, Speculation

EOS = 0


class Utf8:
    """A `TextStream` whose tokens are bytes: incomplete characters are held back, as a detokenizer does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def sequence(stop: tuple[str, ...] = (), max_tokens: int = 100, max_length: int = 200, prompt: int = 3) -> Sequence:
    request = Request("r", (1,) * prompt, SamplingParams(), "ssd", 4, max_tokens, stop, (EOS,))
    table = BlockTable(BlockAllocator(50), 4, max_length, torch.device("cpu"))
    begun = Sequence(0, request, table, Utf8(), max_length)
    begun.begin(vocab_size=256)
    assert not begun.prefilled
    return begun


def commit(to: Sequence, run: str | bytes) -> Delta:
    """One verification whose draft tokens were all accepted: the run's last byte is the bonus token."""
    tokens = tuple(run.encode() if isinstance(run, str) else run)
    return to.commit(Outcome(len(tokens) - 1, tokens[-1]), Speculation(tokens[:-1], Source.DRAFT))


def begin(stop: tuple[str, ...] = (), first: str = ">", **sizes: int) -> Sequence:
    """A sequence after its prefill."""
    begun = sequence(stop, **sizes)
    commit(begun, first)
    return begun


def output(of: Sequence) -> bytes:
    return bytes(of.tokens[of.num_prompt :])


def test_a_run_is_appended_whole_and_counted() -> None:
    one = begin()
    assert commit(one, "abc") == Delta("abc", tuple(b"abc"), None)
    assert output(one) == b">abc"
    assert (one.turn, one.outcome) == (1, Outcome(2, ord("c")))
    assert (one.measured.rounds, one.measured.drafted, one.measured.accepted) == (1, 2, 2)
    assert one.measured.accepted_per_position == [1, 1]


def test_the_prefills_token_is_no_round() -> None:
    one = begin()
    assert (one.turn, one.num_output, one.measured.rounds) == (0, 1, 0)


@pytest.mark.parametrize("place", range(5))
def test_eos_inside_a_run_ends_it_there_and_nothing_behind_it_counts(place: int) -> None:
    one = begin()
    run = bytearray(b"abcde")
    run[place] = EOS
    delta = commit(one, bytes(run))
    assert delta == Delta("abcde"[:place], tuple(run[: place + 1]), "stop")
    assert output(one) == b">" + run[: place + 1]
    statistics = one.statistics()
    assert statistics.num_tokens == place + 2
    assert statistics.num_accepted_tokens == min(place + 1, 4) == sum(statistics.accepted_per_position)


def test_eos_is_no_text() -> None:
    one = begin()
    assert commit(one, b"a\0").text == "a"


def test_eos_as_the_first_token_ends_at_once() -> None:
    one = sequence()
    assert commit(one, b"\0") == Delta("", (EOS,), "stop")


@pytest.mark.parametrize("max_tokens", range(2, 7))
def test_max_tokens_inside_a_run_is_met_exactly(max_tokens: int) -> None:
    one = begin(max_tokens=max_tokens)
    delta = commit(one, "abcde")
    kept = max_tokens - 1
    assert delta == Delta("abcde"[:kept], tuple(b"abcde"[:kept]), "length")
    assert one.num_output == max_tokens
    assert one.measured.accepted == min(kept, 4)


def test_the_models_length_limits_as_max_tokens_does() -> None:
    one = begin(max_tokens=100, max_length=6)
    assert one.max_tokens == 3
    assert commit(one, "abc").finish_reason == "length"
    assert len(one.tokens) == 6


def test_eos_at_the_length_limit_is_a_stop() -> None:
    one = begin(max_tokens=3)
    assert commit(one, b"a\0").finish_reason == "stop"


def test_no_more_is_speculated_than_may_still_be_emitted() -> None:
    one = begin(max_tokens=8)
    assert one.most_speculated == 4  # the request's lookahead
    commit(one, "abc")
    assert one.most_speculated == 3
    commit(one, "def")
    assert one.most_speculated == 0  # one token is left: the bonus token


@pytest.mark.parametrize("run", ["abSTOPcd", "abSTOP"])
def test_a_stop_string_inside_a_run_ends_text_before_it_and_tokens_with_it(run: str) -> None:
    one = begin(("STOP",))
    assert commit(one, run) == Delta("ab", tuple(b"abSTOP"), "stop")
    assert output(one) == b">abSTOP"
    assert one.statistics().num_tokens == 7


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_stop_string_across_rounds_is_held_back_until_it_is_certain(cut: int) -> None:
    one = begin(("STOP",))
    run = "abSTOPxy"
    first, second = commit(one, run[:cut]), None
    if first.finish_reason is None:
        assert first.text == "ab"[:cut]  # nothing of the stop string went out
        second = commit(one, run[cut:])
    assert first.text + (second.text if second else "") == "ab"
    assert output(one) == b">abSTOP"


def test_text_that_only_looked_like_a_stop_string_is_released() -> None:
    one = begin(("STOP",))
    assert commit(one, "aSTO").text == "a"
    assert commit(one, "RE").text == "STORE"


@pytest.mark.parametrize(("run", "reason"), [(b"aST", "length"), (b"aS\0", "stop")])
def test_held_back_text_goes_out_at_the_end(run: bytes, reason: str) -> None:
    one = begin(("STOP",), max_tokens=4)
    delta = commit(one, run)
    assert (delta.text, delta.finish_reason) == (run.rstrip(b"\0").decode(), reason)


def test_half_a_character_waits_for_its_other_half() -> None:
    one = begin()
    assert commit(one, b"\xc3").text == ""
    assert commit(one, b"\xa9").text == "é"
    assert commit(one, b"\xc3\0").text == "�"  # the end: it never comes


def test_a_stop_string_may_end_inside_a_characters_bytes_of_text() -> None:
    one = begin(("né",))
    assert commit(one, "cané!".encode()) == Delta("ca", tuple("cané".encode()), "stop")


def test_the_earliest_stop_string_wins() -> None:
    one = begin(("cd", "b", "abcd"))
    assert commit(one, "abcd") == Delta("a", tuple(b"ab"), "stop")


def test_stop_strings_may_meet_the_first_token() -> None:
    one = sequence(stop=(">",))
    assert commit(one, ">") == Delta("", (ord(">"),), "stop")


@given(
    text=st.text("abc", min_size=1, max_size=24),
    stop=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2).map(tuple),
    max_tokens=st.integers(1, 30),
    cuts=st.sets(st.integers(1, 23)),
)
def test_runs_of_any_length_give_what_single_tokens_give(
    text: str, stop: tuple[str, ...], max_tokens: int, cuts: set[int]
) -> None:
    """AR is a run of one token a round: speculation must not change a character, a token or a reason."""

    def serve(pieces: list[str]) -> tuple[str, bytes, str | None]:
        one, shown = sequence(stop, max_tokens=max_tokens), ""
        for piece in pieces:
            shown += commit(one, piece).text
            if one.finish_reason:
                break
        statistics = one.statistics()
        assert statistics.num_tokens == one.num_output <= max_tokens
        assert statistics.num_accepted_tokens + statistics.rounds >= one.num_output - len(pieces[0])
        return shown, output(one), one.finish_reason

    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    assert serve([text[a:b] for a, b in itertools.pairwise(edges)]) == serve(list(text))
