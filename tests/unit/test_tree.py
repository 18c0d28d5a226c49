"""The draft's tree: nothing is forwarded twice, every slot is accounted for, no branch leaves its limits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.speculation.drafting.fan_out import FanOut, Fork, Verified, divide_budget
from ssd_runtime.speculation.drafting.policies import fan_out_policy
from ssd_runtime.speculation.drafting.tree import NO_SLOT, Advance, Node, TokenTree
from ssd_runtime.speculation.sampling.ranking import Ranking
from ssd_runtime.speculation.types import Branch, Outcome

VOCAB = 7


def rank(context: tuple[int, ...], count: int = VOCAB) -> Ranking:
    """A language model: what follows depends on the last two tokens."""
    generator = random.Random(repr(context[-2:]))
    tokens = generator.sample(range(VOCAB), VOCAB)[:count]
    margins = itertools.accumulate((generator.random() for _ in tokens[1:]), initial=0.0)
    return Ranking(tuple(tokens), tuple(margins))


class Grown:
    """A tree and the draft that runs on it: hands out slots, ranks, and objects to work done twice."""

    def __init__(
        self,
        *,
        lookahead: int = 3,
        max_position: int = 1000,
        fan_out: FanOut | None = None,
        predraft: bool = True,
        budget: int = 4,
        prompt: Sequence[int] = (1,),
        recycle: int = 0,
    ) -> None:
        self.tree = TokenTree(
            prompt,
            lookahead=lookahead,
            max_position=max_position,
            fan_out=fan_out or fan_out_policy("uniform"),
            predraft=predraft,
            recycle=recycle,
        )
        self.committed = list(prompt[:-1])  # tokens before the root
        self.budget = budget
        self.slots_taken: set[int] = set()
        self._next_slot = 0
        self._forwarded: set[tuple[int, ...]] = set()

    def grow(self, steps: int = 1) -> list[Node]:
        """Forward the frontier `steps` times; returns the nodes of the last time."""
        frontier: list[Node] = []
        for _ in range(steps):
            frontier = self.frontier()
            for node in frontier:  # parents before children, as the rows of one forward must be
                self._forward(node)
        return frontier

    def frontier(self) -> list[Node]:
        (forks,) = divide_budget([self.tree.forks(self.budget)], self.budget)
        return self.tree.frontier(forks)

    def grow_fully(self) -> None:
        for _ in range(100):
            if not self.grow():
                return
        raise AssertionError("the tree never stops growing")

    def _forward(self, node: Node) -> None:
        path = node.ancestors()
        assert all(above.slot != NO_SLOT for above in path[:-1]), "a parent has no row yet"
        context = (*self.committed, *(above.token for above in path))
        assert context not in self._forwarded, f"{context} is forwarded twice"
        assert node.position == len(context) - 1
        self._forwarded.add(context)
        node.slot = self._next_slot
        self._next_slot += 1
        self.slots_taken.add(node.slot)
        self.tree.record(node, rank(context))

    def advance(self, num_accepted: int, bonus_token: int) -> Advance:
        advance = self.tree.advance(Outcome(num_accepted, bonus_token))
        self.committed += [node.token for node in advance.committed]
        moved = [node.slot for node in advance.committed if node.slot != NO_SLOT]
        gone = [*moved, *advance.dropped_slots]
        assert len(gone) == len(set(gone)), "a slot is given back twice"
        assert set(gone) <= self.slots_taken
        self.slots_taken -= set(gone)
        self.assert_slots_are_those_of_the_tree()
        return advance

    def assert_slots_are_those_of_the_tree(self) -> None:
        held = [node.slot for node in self.tree.root.walk() if node.slot != NO_SLOT]
        assert sorted(held) == sorted(self.slots_taken)

    def branches(self) -> dict[tuple[int, Outcome], tuple[int, ...]]:
        found = self.tree.branches(0)
        named = {(branch.turn, branch.outcome): branch.tokens for branch in found}
        assert len(named) == len(found), "two branches for one outcome"
        return named

    def hit(self, outcome: Outcome) -> Branch | None:
        return next((b for b in self.tree.branches(0) if b.outcome == outcome and b.turn == self.tree.turn), None)


def test_the_prompts_last_token_comes_first_and_then_the_first_forks() -> None:
    grown = Grown(budget=2, lookahead=2)
    assert grown.grow() == [grown.tree.root]
    assert grown.branches() == {}
    best = rank((1,)).tokens
    assert [node.token for node in grown.grow()] == list(best[:2])
    assert grown.branches() == {(-1, Outcome(0, t)): rank((1, t)).tokens[:1] for t in best[:2]}
    grown.grow()
    first = rank((1, best[0])).tokens[0]
    assert grown.branches()[-1, Outcome(0, best[0])] == (first, rank((best[0], first)).tokens[0])


def test_a_hit_forwards_only_the_last_token_and_the_new_forks() -> None:
    grown = Grown(lookahead=3, budget=4)
    grown.grow_fully()
    (turn, outcome), tokens = next(iter(grown.branches().items()))
    assert (turn, len(tokens)) == (-1, 3)
    grown.advance(outcome.num_accepted, outcome.bonus_token)
    grown.tree.resolve(len(tokens))
    root, trunk = grown.tree.root, grown.tree.trunk
    assert trunk is not None
    assert [node.token for node in trunk] == list(tokens)
    known = (root, *trunk[:-1])
    assert all(node.ranking is not None for node in known)  # no glue pass: these rows were made while drafting
    frontier = grown.frontier()
    assert trunk[-1] in frontier
    assert not set(map(id, frontier)) & set(map(id, known))
    assert all(node.parent in known for node in frontier if node is not trunk[-1])  # forks join in the same step
    grown.grow()


class Sure:
    """A fan-out that is certain of the likeliest outcome."""

    def forks(self, verified: Verified, budget: int, allowed: int | None = None) -> list[Fork]:
        last = len(verified.speculation)
        ranking = verified.rankings[last]
        return [] if ranking is None else [Fork(last, ranking.tokens[0], 0.9)]

    def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
        pass


def test_a_nearly_certain_outcome_is_drafted_for_beyond_the_next_round() -> None:
    """Its branch is no longer than others; when it is verified, the branch behind it is there before its first step."""
    grown = Grown(lookahead=3, fan_out=Sure())
    grown.grow_fully()
    for _ in range(2):
        ((_, tokens),) = grown.branches().items()
        assert len(tokens) == 3
        ((_, outcome),) = grown.branches()
        grown.advance(outcome.num_accepted, outcome.bonus_token)
        grown.tree.resolve(3)
        ((_, ahead),) = grown.branches().items()
        assert len(ahead) == 3 - 1  # the bonus token was one of the three
        grown.grow_fully()


def test_a_miss_drafts_the_wanted_branch_first_and_alone() -> None:
    grown = Grown(lookahead=3, budget=4)
    grown.grow_fully()
    wanted = rank((1,)).tokens[-1]  # the least likely: no fork was made for it
    assert (-1, Outcome(0, wanted)) not in grown.branches()
    grown.advance(0, wanted)
    drafted: list[int] = []
    for _ in range(3):
        assert len(grown.grow()) == 1
        drafted.append(rank((1, wanted, *drafted)).tokens[0])
        assert grown.branches() == {(-1, Outcome(0, wanted)): tuple(drafted)}
    assert grown.grow() == []  # complete: the target has to say what it takes of it


def test_a_miss_that_is_taken_short_keeps_the_rest_as_a_branch() -> None:
    grown = Grown(lookahead=3, budget=1)
    grown.grow()
    grown.advance(0, 5)
    grown.grow(3)
    ((_, drafted),) = grown.branches().items()
    grown.tree.resolve(1)
    outcome = Outcome(1, drafted[1])
    assert grown.branches()[0, outcome] == drafted[2:]


def test_a_speculation_of_the_target_itself_becomes_the_trunk() -> None:
    grown = Grown(lookahead=3, budget=3)
    grown.grow_fully()
    grown.advance(0, 5)
    grown.tree.resolve(3, (6, 6, 2))
    assert [node.token for node in grown.tree.trunk or ()] == [6, 6, 2]
    assert [node.token for node in grown.grow()] == [5, 6, 6, 2]  # in one forward, parents before children
    grown.grow_fully()
    assert all(outcome.num_accepted <= 3 for _, outcome in grown.branches())
    assert grown.branches()


@pytest.mark.parametrize("policy", ["uniform", "geometric", "confidence"])
def test_forks_leave_out_the_token_that_was_sent(policy: str) -> None:
    grown = Grown(lookahead=3, budget=30, fan_out=fan_out_policy(policy))  # type: ignore[arg-type]
    grown.grow_fully()
    grown.advance(0, rank((1,)).tokens[0])
    grown.tree.resolve(3)
    sent = [node.token for node in grown.tree.trunk or ()]
    grown.grow_fully()
    outcomes = [outcome for _, outcome in grown.branches()]
    assert {outcome.num_accepted for outcome in outcomes} == {0, 1, 2, 3}
    for k, token in enumerate(sent):
        assert Outcome(k, token) not in outcomes


def test_no_branch_is_longer_than_the_lookahead() -> None:
    for lookahead in range(5):
        grown = Grown(lookahead=lookahead)
        grown.grow_fully()
        lengths = {len(tokens) for tokens in grown.branches().values()}
        assert lengths == ({lookahead} if lookahead else set())


@pytest.mark.parametrize("recycle", [0, 3])
@pytest.mark.parametrize("room", [1, 2, 3, 4, 5])
def test_nothing_is_drafted_at_the_end_of_the_sequence_or_beyond(room: int, recycle: int) -> None:
    """`room` positions follow the root."""
    grown = Grown(lookahead=3, prompt=range(10), max_position=10 + room, recycle=recycle)
    grown.grow_fully()
    longest = max((len(tokens) for tokens in grown.branches().values()), default=0)
    assert longest == min(3, room - 1)  # t* takes one of them
    assert all(node.position < 10 + room - 1 for node in grown.tree.root.walk() if node.slot != NO_SLOT)


def test_without_predrafting_only_what_is_asked_for_is_drafted() -> None:
    grown = Grown(lookahead=2, predraft=False)
    assert grown.grow() == []
    grown.advance(0, 4)
    assert len(grown.branches()) == 0
    grown.grow_fully()
    assert [len(tokens) for tokens in grown.branches().values()] == [2]
    grown.tree.resolve(2)
    assert grown.frontier() == []
    assert grown.branches() == {}


@pytest.mark.parametrize(("recycle", "drafted"), [(0, 1), (1, 2), (3, 2)])
def test_a_bet_that_holds_drafts_two_tokens_in_one_step(recycle: int, drafted: int) -> None:
    """The prompt has "1 2 x" in it, where x is what the draft says after "1 2"; now it ends in "1" and 2 comes."""
    expected = rank((1, 2)).tokens[0]
    grown = Grown(prompt=(1, 2, expected, 1), predraft=False, recycle=recycle)
    grown.advance(0, 2)
    assert len(grown.grow()) >= drafted
    ((_, tokens),) = grown.branches().items()
    assert tokens[:drafted] == (expected, rank((2, expected)).tokens[0])[:drafted]


def test_the_first_bet_leads_a_chain() -> None:
    """All of what the draft says after "1 2" is in the prompt: three tokens in one step."""
    text = [1, 2]
    for _ in range(3):
        text.append(rank(tuple(text[-2:])).tokens[0])
    grown = Grown(lookahead=4, prompt=(*text, 1), predraft=False, recycle=2)
    grown.advance(0, 2)
    grown.grow()
    ((_, tokens),) = grown.branches().items()
    assert len(tokens) >= 3
    assert tokens[:3] == tuple(text[2:])


def test_a_bet_that_fails_costs_rows_and_nothing_else() -> None:
    unexpected = rank((1, 2)).tokens[-1]
    grown = Grown(prompt=(1, 2, unexpected, 1), predraft=False, recycle=1)
    grown.advance(0, 2)
    assert [node.token for node in grown.grow()] == [2, unexpected]
    ((_, tokens),) = grown.branches().items()
    assert tokens == rank((1, 2)).tokens[:1]


def test_branches_come_likeliest_first() -> None:
    grown = Grown(lookahead=2, budget=30)
    grown.grow_fully()
    found = [branch.outcome.bonus_token for branch in grown.tree.branches(0)]
    assert found == list(rank((1,)).tokens)


@settings(max_examples=300, deadline=None)
@given(
    policy=st.sampled_from(["uniform", "geometric", "confidence"]),
    predraft=st.booleans(),
    lookahead=st.integers(0, 4),
    budget=st.integers(1, 9),
    recycle=st.integers(0, 3),
    end=st.integers(2, 60),
    data=st.data(),
)
def test_whatever_the_outcomes_every_slot_is_accounted_for_and_nothing_is_forwarded_twice(
    policy: str, predraft: bool, lookahead: int, budget: int, recycle: int, end: int, data: st.DataObject
) -> None:
    """`Grown` asserts both at every step; here come the outcomes, the backups and a draft of any speed."""
    grown = Grown(
        lookahead=lookahead,
        max_position=end,
        fan_out=fan_out_policy(policy),  # type: ignore[arg-type]
        predraft=predraft,
        budget=budget,
        recycle=recycle,
    )
    tree = grown.tree
    while tree.root.position < end - 1:
        grown.grow(data.draw(st.integers(0, 6), label="steps"))
        assert tree.trunk is not None
        most = min(len(tree.trunk), end - 2 - tree.root.position)
        num_accepted = data.draw(st.integers(0, most), label="accepted")
        denied = tree.trunk[num_accepted].token if num_accepted < len(tree.trunk) else None
        bonus = data.draw(st.sampled_from([t for t in range(VOCAB) if t != denied]), label="bonus")
        prepared = grown.hit(Outcome(num_accepted, bonus))
        grown.advance(num_accepted, bonus)
        if prepared is not None:
            assert grown.branches() == {(prepared.turn, prepared.outcome): prepared.tokens}, "adoption changed a branch"
        room = max(0, end - 2 - tree.root.position)
        if data.draw(st.booleans(), label="n-gram"):
            size = min(lookahead, room)
            tokens = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=size), label="tokens")
            tree.resolve(len(tokens), tokens)
        else:
            grown.grow(data.draw(st.integers(0, 5), label="awaited steps"))
            ready = max((len(tokens) for tokens in grown.branches().values()), default=0)
            tree.resolve(data.draw(st.integers(0, min(ready, room)), label="length"))
        grown.assert_slots_are_those_of_the_tree()
        assert all(len(tokens) <= lookahead for tokens in grown.branches().values())
        assert all(node.position < end for node in tree.root.walk() if node.slot != NO_SLOT)
