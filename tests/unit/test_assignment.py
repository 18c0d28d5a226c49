"""Sequences over drafts: fair, with as few moves as can be, and never a move for its own sake."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.leader.assignment import assign

Assignment = dict[int, tuple[str, ...]]


def fair_assignments(sequences: list[int], drafts: list[str]) -> Iterator[Assignment]:
    """All of them, by definition."""
    if len(sequences) >= len(drafts):
        for chosen in itertools.product(drafts, repeat=len(sequences)):
            loads = [chosen.count(draft) for draft in drafts]
            if max(loads) - min(loads) <= 1:
                yield {sequence: (draft,) for sequence, draft in zip(sequences, chosen, strict=True)}
    else:
        for served in itertools.product(sequences, repeat=len(drafts)):
            helpers = [served.count(sequence) for sequence in sequences]
            if max(helpers) - min(helpers) <= 1:
                yield {
                    sequence: tuple(d for d, s in zip(drafts, served, strict=True) if s == sequence)
                    for sequence in sequences
                }


def new_pairs(now: Assignment, before: Assignment) -> int:
    """Texts that have to be computed again."""
    return sum(draft not in before.get(sequence, ()) for sequence, own in now.items() for draft in own)


def as_sets(assignment: Assignment) -> dict[int, frozenset[str]]:
    return {sequence: frozenset(own) for sequence, own in assignment.items()}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["begin", "begin", "finish", "join", "lose"]), st.integers(0, 3)), max_size=14)
)
def test_it_is_fair_with_the_fewest_moves_whatever_happens(events: list[tuple[str, int]]) -> None:
    sequences: list[int] = []
    drafts: list[str] = []
    assignment: Assignment = {}
    for number, (event, which) in enumerate(events):
        if event == "begin" and len(sequences) < 5:
            sequences.append(number)
        elif event == "finish" and sequences:
            sequences.pop(which % len(sequences))
        elif event == "join" and len(drafts) < 4:
            drafts.append(f"draft {number}")
        elif event == "lose" and drafts:
            drafts.pop(which % len(drafts))
        before, assignment = assignment, assign(sequences, drafts, assignment)
        assert list(assignment) == sequences
        if not drafts:
            assert not any(assignment.values())
        elif sequences:
            fair = list(fair_assignments(sequences, drafts))
            assert as_sets(assignment) in map(as_sets, fair)
            assert new_pairs(assignment, before) == min(new_pairs(one, before) for one in fair)
        assert assign(sequences, drafts, assignment) == assignment


def test_every_draft_helps_the_only_sequence() -> None:
    assert assign([1], ["a", "b", "c"], {}) == {1: ("a", "b", "c")}


def test_a_new_sequence_goes_to_the_draft_with_the_fewest() -> None:
    assert assign([1, 2, 3, 4], ["a", "b"], {1: ("b",), 2: ("a",), 3: ("b",)})[4] == ("a",)


def test_a_new_sequence_takes_a_helper_not_the_draft_that_was_there_first() -> None:
    assert assign([1, 2], ["a", "b", "c"], {1: ("b", "a", "c")}) == {1: ("b", "a"), 2: ("c",)}


def test_of_the_sequences_of_one_draft_the_youngest_moves_to_a_new_one() -> None:
    assert assign([1, 2, 3], ["a", "b"], {1: ("a",), 2: ("a",), 3: ("a",)}) == {1: ("a",), 2: ("a",), 3: ("b",)}


def test_the_sequences_of_a_lost_draft_are_dealt_out_and_no_other_moves() -> None:
    before = {1: ("a",), 2: ("b",), 3: ("c",), 4: ("a",), 5: ("b",), 6: ("c",)}
    after = assign(list(before), ["a", "c"], before)
    assert {sequence for sequence in before if after[sequence] != before[sequence]} == {2, 5}
    assert {after[2], after[5]} == {("a",), ("c",)}


def test_who_is_left_of_several_keeps_its_place_before_newcomers() -> None:
    assert assign([1], ["new", "b", "a"], {1: ("a", "gone", "b")}) == {1: ("a", "b", "new")}
