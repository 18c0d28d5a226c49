"""The speculation cache: branches of the newest turn of known sequences, the longest for each outcome."""

from __future__ import annotations

from ssd_runtime.speculation.cache import SpeculationCache
from ssd_runtime.speculation.types import Branch, Outcome, Proposal, TreeFrame

A, B = Outcome(0, 5), Outcome(2, 7)


def tree(*branches: Branch) -> TreeFrame:
    return TreeFrame(0, branches)


def test_a_branch_is_found_under_its_sequence_turn_and_outcome_only() -> None:
    cache = SpeculationCache()
    cache.admit(3)
    cache.store(tree(Branch(3, -1, A, (1, 2))))
    assert cache.lookup(3, -1, A) == (1, 2)
    assert cache.lookup(3, -1, B) is None
    assert cache.lookup(3, 0, A) is None
    assert cache.lookup(4, -1, A) is None


def test_a_later_tree_makes_a_branch_longer_and_never_shorter() -> None:
    cache = SpeculationCache()
    cache.admit(0)
    for tokens, found in [((1,), (1,)), ((1, 2), (1, 2)), ((1,), (1, 2)), ((1, 2, 3), (1, 2, 3))]:
        cache.store(tree(Branch(0, -1, A, tokens)))
        assert cache.lookup(0, -1, A) == found


def test_of_two_drafts_branches_for_one_outcome_the_first_stays_however_long() -> None:
    cache = SpeculationCache()
    cache.admit(0)
    cache.store(tree(Branch(0, -1, A, (1, 2))))
    cache.store(tree(Branch(0, -1, A, (1, 3, 4))))
    assert cache.lookup(0, -1, A) == (1, 2)


def test_a_later_tree_without_a_branch_does_not_take_it_away() -> None:
    cache = SpeculationCache()
    cache.admit(0)
    cache.store(tree(Branch(0, -1, A, (1,))))
    cache.store(tree(Branch(0, -1, B, (2,))))
    assert (cache.lookup(0, -1, A), cache.lookup(0, -1, B)) == ((1,), (2,))


def test_a_new_verification_forgets_the_branches_of_the_last() -> None:
    cache = SpeculationCache()
    cache.admit(0)
    cache.store(tree(Branch(0, -1, A, (1,))))
    cache.advance(0, 0)
    assert cache.lookup(0, -1, A) is None
    cache.store(tree(Branch(0, -1, A, (1, 2)), Branch(0, 0, A, (9,))))  # the first one is late
    assert cache.lookup(0, -1, A) is None
    assert cache.lookup(0, 0, A) == (9,)
    assert len(cache) == 1


def test_advancing_to_the_same_turn_keeps_what_is_there() -> None:
    cache = SpeculationCache()
    cache.admit(0)
    cache.advance(0, 0)
    cache.store(tree(Branch(0, 0, A, (1,))))
    cache.advance(0, 0)
    assert cache.lookup(0, 0, A) == (1,)


def test_trees_of_unknown_and_finished_sequences_leave_nothing() -> None:
    cache = SpeculationCache()
    cache.admit(0)
    cache.store(tree(Branch(0, -1, A, (1,)), Branch(1, -1, A, (2,))))
    assert len(cache) == 1
    cache.finish(0)
    cache.store(tree(Branch(0, -1, A, (1,))))
    cache.advance(0, 0)
    assert len(cache) == 0
    assert cache.lookup(0, -1, A) is None


def test_sequences_do_not_see_each_others_branches() -> None:
    cache = SpeculationCache()
    cache.admit(0)
    cache.admit(1)
    cache.store(tree(Branch(0, -1, A, (1,)), Branch(1, -1, A, (2,))))
    cache.advance(0, 0)
    assert cache.lookup(1, -1, A) == (2,)


def test_what_a_branch_was_sampled_from_is_kept_with_it() -> None:
    cache = SpeculationCache()
    cache.admit(0)
    first, second = Proposal((1, 4), (0.5, 0.5)), Proposal((2,), (1.0,))
    cache.store(tree(Branch(0, -1, A, (1,), (first,)), Branch(0, -1, B, (9,))))
    assert cache.proposals(0, -1, A) == (first,)
    assert cache.proposals(0, -1, B) == ()
    cache.store(tree(Branch(0, -1, A, (1, 2), (first, second))))
    assert cache.proposals(0, -1, A) == (first, second)
    assert cache.proposals(0, 0, A) == cache.proposals(5, -1, A) == ()
