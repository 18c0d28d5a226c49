"""Stop strings in a text that comes in pieces: the automata against plain searching, and their steps counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ssd_runtime.engine.stop_strings import StopStrings, check_stop_strings
from ssd_runtime.errors import RequestError


class Searching:
    """The oracle: all of what is held is searched for each stop string at each piece."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            certain, self._held = self._held[: min(found)], ""
            return certain, True
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


letters = st.sampled_from("aab\né")


@given(
    stop=st.lists(st.text(letters, min_size=1, max_size=6), max_size=4),
    pieces=st.lists(st.one_of(st.text(letters, max_size=8), st.none()), max_size=12),
)
@example(stop=["abcd", "b"], pieces=["abcd"])
@example(stop=["aabaaab"], pieces=["aabaa", "baaab"])
@example(stop=["ab", "ab"], pieces=["a", None, "b", "ab"])
def test_any_stop_strings_cut_any_pieces_exactly_as_searching_does(stop: list[str], pieces: list[str | None]) -> None:
    """None is a flush; after a stop or a flush a new text begins."""
    fast, plain = StopStrings(stop), Searching(stop)
    for piece in pieces:
        assert (fast.flush() if piece is None else fast.push(piece)) == (
            plain.flush() if piece is None else plain.push(piece)
        )
    assert fast.flush() == plain.flush()


def first_stop(text: str, stop: tuple[str, ...]) -> str:
    """What may be shown of a text that grows letter by letter."""
    for end in range(len(text) + 1):
        hits = [at for s in stop if (at := text[:end].find(s)) >= 0]
        if hits:
            return text[: min(hits)]
    return text


@given(
    text=st.text("ab\n", max_size=30),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_stop_strings_let_through_exactly_what_comes_before_the_first(text: str, stop: tuple[str, ...]) -> None:
    filtered, shown = StopStrings(stop), ""
    for end, letter in enumerate(text, 1):
        certain, stopped = filtered.push(letter)
        shown += certain
        assert first_stop(text[:end], stop).startswith(shown)
        held = len(first_stop(text[:end], stop)) - len(shown)
        assert held < max(map(len, stop), default=1)  # no more is held back than may become a stop string
        if stopped:
            assert first_stop(text, stop) == shown != text[:end]
            return
    assert shown + filtered.flush() == first_stop(text, stop) == text


class Counted(str):
    """A stop string that counts how often one of its characters is looked at, and how many are copied."""

    steps = 0

    def __getitem__(self, key: int | slice) -> str:  # type: ignore[override]
        part = super().__getitem__(key)
        Counted.steps += len(part)
        return part


@pytest.mark.parametrize(
    "stop",
    [
        ["a" * 1023 + "b"],
        ["a" * n + "b" for n in range(1008, 1024)],
        ["ab" * 511 + "aa", "b" + "a" * 1023],
        ["x" * 1024] * 16,
    ],
    ids=["one", "sixteen", "periodic", "never begun"],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 14])
def test_the_steps_are_linear_in_the_text_and_in_the_number_of_stop_strings(stop: list[str], piece: int) -> None:
    text = "".join(itertools.islice(adversary(), 1 << 14))
    Counted.steps = 0
    filtered = StopStrings([Counted(one) for one in stop])
    assert Counted.steps == 0  # a request that waits has cost nothing
    shown = "".join(filtered.push(text[at : at + piece])[0] for at in range(0, len(text), piece)) + filtered.flush()
    assert shown == text
    # Two for a character and two for building, for each stop string; each character is copied once.
    assert Counted.steps <= 4 * len(text) * len(stop) + len(text)


def adversary() -> Iterator[str]:
    """Runs of a letter as long as the stop strings nearly are, broken off again and again."""
    while True:
        yield from "a" * 1000 + "ba" * 300 + "c"


def test_stop_strings_are_bounded_in_number_and_in_bytes() -> None:
    check_stop_strings(("é" * 512,) * 16, most=16, most_bytes=1024)
    check_stop_strings((), most=0, most_bytes=1)
    with pytest.raises(RequestError, match=r"17 stop strings are given and serve.max_stop_strings is 16: give fewer"):
        check_stop_strings(("x",) * 17, most=16, most_bytes=1024)
    for long in ("x" * 1025, "é" * 512 + "x", "\ud800" * 342):
        with pytest.raises(RequestError, match=r"a stop string is longer than serve.max_stop_bytes = 1024"):
            check_stop_strings(("x", long), most=16, most_bytes=1024)
