"""Which draft drafts for which sequence. A pure function of who is there and of how it was; knows no links.

A draft that gets a sequence has to compute the text so far. So of all fair assignments one with the fewest new pairs is
taken, and one that is fair already stays as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

S = TypeVar("S", bound=Hashable)
D = TypeVar("D", bound=Hashable)


def assign(sequences: Sequence[S], drafts: Sequence[D], previous: Mapping[S, tuple[D, ...]]) -> dict[S, tuple[D, ...]]:
    """The drafts of each sequence.

    With at least as many sequences as drafts each has one draft, and drafts differ by at most one in how many they
    have. With fewer, each draft has one sequence, and sequences differ by at most one in how many drafts they have.
    Without drafts nobody has any.

    Args:
        sequences: those that run, the oldest first. Of those that have to move the youngest do: their texts are short.
        drafts: those that are there.
        previous: the last assignment; who is gone since does not matter.
    """
    had = {sequence: [one for one in previous.get(sequence, ()) if one in drafts] for sequence in sequences}
    if not drafts or not sequences:
        return dict.fromkeys(sequences, ())
    if len(sequences) >= len(drafts):
        spread = _spread(sequences, drafts, {sequence: old[0] for sequence, old in had.items() if old})
        return {sequence: (spread[sequence],) for sequence in sequences}
    served: dict[D, S] = {}
    for sequence, old in had.items():
        for draft in old:
            served.setdefault(draft, sequence)
    serves = _spread(drafts, sequences, served)
    kept = {sequence: [draft for draft in old if serves[draft] == sequence] for sequence, old in had.items()}
    return {
        sequence: (*old, *(draft for draft in drafts if serves[draft] == sequence and draft not in old))
        for sequence, old in kept.items()
    }


def _spread(items: Sequence[S], bins: Sequence[D], previous: Mapping[S, D]) -> dict[S, D]:
    """A bin for each item: numbers differ by at most one, as few items as possible move, and the last ones of a bin."""
    number = dict.fromkeys(bins, 0)
    for bin in previous.values():
        number[bin] += 1
    least, over = divmod(len(items), len(bins))
    fullest = sorted(bins, key=lambda bin: -number[bin])
    room = {bin: least + (rank < over) for rank, bin in enumerate(fullest)}  # as many places as items
    spread: dict[S, D] = {}
    for item in items:
        if item in previous and room[previous[item]]:
            spread[item] = previous[item]
            room[previous[item]] -= 1
    for item in items:
        if item not in spread:
            spread[item] = next(bin for bin in bins if room[bin])
            room[spread[item]] -= 1
    return spread
