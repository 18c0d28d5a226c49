"""Accept while the draft's token equals the target's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.speculation.types import Outcome
from ssd_runtime.speculation.verify import verify


@pytest.mark.parametrize(
    ("chosen", "speculation", "outcome"),
    [
        ((4,), (), Outcome(0, 4)),
        ((4, 5), (4,), Outcome(1, 5)),
        ((4, 5), (3,), Outcome(0, 4)),
        ((4, 5, 6), (4, 9), Outcome(1, 5)),
        ((4, 5, 6), (9, 5), Outcome(0, 4)),  # right again after a rejection is no use
        ((4, 5, 6), (4, 5), Outcome(2, 6)),
    ],
)
def test_outcomes_by_example(chosen: tuple[int, ...], speculation: tuple[int, ...], outcome: Outcome) -> None:
    assert verify(chosen, speculation) == outcome


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=8), st.integers(0, 2))
def test_what_is_emitted_is_always_the_targets_own_choice(pairs: list[tuple[int, int]], last: int) -> None:
    speculation = [draft for draft, _ in pairs]
    chosen = [*(target for _, target in pairs), last]
    outcome = verify(chosen, speculation)
    emitted = [*speculation[: outcome.num_accepted], outcome.bonus_token]
    assert emitted == chosen[: len(emitted)]
    rejected = outcome.num_accepted
    assert rejected == len(speculation) or speculation[rejected] != chosen[rejected]  # and none too few
