"""Several drafts divide the sequences, or the outcomes of a sequence if there are more drafts: any may die alone."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.comm.control.messages import Admit
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.engine.sequence import Request, Sequence
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.drafting.fan_out import Fork, Verified
from ssd_runtime.speculation.types import SamplingParams, Source
from tests.engines import InProcess, in_process, random_steps, request
from tests.tiny_models import tiny_decoder

ENGINE = EngineConfig(max_model_len=256, max_num_seqs=5, block_size=4)
PROMPT = tuple(range(5, 25))


@functools.cache
def decoder(seed: int) -> Decoder:
    return tiny_decoder(seed)


def serving(num_drafts: int, twins: bool = False, steps: object = 12, **speculation: object) -> InProcess:
    """A target and drafts: of another model, so that misses are the rule, or twins, which never miss."""
    config = SpeculationConfig(**({"lookahead": 3, "budget": 2, "recycle": 0, "backup": "none"} | speculation))  # type: ignore[arg-type]
    return in_process(decoder(0), decoder(0 if twins else 1), ENGINE, config, steps, num_drafts=num_drafts)  # type: ignore[arg-type]


def asked(count: int = 1, mode: str = "ssd", max_tokens: int = 150) -> list[Request]:
    return [
        request(
            PROMPT[i:],
            mode,
            lookahead=0 if mode == "ar" else 3,
            max_tokens=max_tokens,
            params=SamplingParams(temperature=0.8, seed=i),
            request_id=str(i),
        )
        for i in range(count)
    ]


@functools.cache
def alone(count: int) -> list[list[int]]:
    return [sequence.tokens for sequence in serving(1).run(asked(count, "ar"))]


def beginnings(sequences: list[Sequence]) -> list[list[int]]:
    """As far as they have come, what plain decoding gives."""
    return [whole[: len(one.tokens)] for one, whole in zip(sequences, alone(len(sequences)), strict=True)]


def hits(num_drafts: int, count: int, **speculation: object) -> int:
    process = serving(num_drafts, **speculation)
    sequences = process.run(asked(count, max_tokens=100))
    assert [sequence.tokens for sequence in sequences] == beginnings(sequences)
    assert process.link.drafts.num_lost == 0
    return sum(sequence.measured.hits for sequence in sequences)


def portions(process: InProcess) -> dict[int, list[tuple[int, int]]]:
    """What the drafts that live think is their part of each sequence, in the order of parts."""
    found: dict[int, list[tuple[int, int]]] = {}
    for draft in process.drafts:
        for sequence_id, sequence in draft.drafter._sequences.items():
            found.setdefault(sequence_id, []).extend([] if draft.dead else [sequence.portion])
    return {sequence_id: sorted(parts) for sequence_id, parts in found.items()}


def run_to_turn(process: InProcess, sequences: list[Sequence], turn: int) -> None:
    """Until all are there; none may end before."""
    while any(sequence.turn < turn for sequence in sequences):
        assert not any(sequence.finish_reason for sequence in sequences)
        process.engine.step()


# ---- more drafts, more hits ------------------------------------------------------------------------------------------


# `confidence` leaves out the improbable though a budget of 8 has room for it. Several drafts must leave out less.
@pytest.mark.parametrize(("fan_out", "budget"), [("uniform", 2), ("confidence", 8)])
def test_more_drafts_of_the_same_budget_hit_more_often(fan_out: str, budget: int) -> None:
    one, two, three = (hits(n, 1, fan_out=fan_out, budget=budget) for n in (1, 2, 3))
    assert one < two < three


@pytest.mark.parametrize(
    ("fan_out", "budget", "count", "most"), [("uniform", 2, 2, 2), ("uniform", 2, 5, 2), ("confidence", 8, 2, 3)]
)
def test_with_several_sequences_too(fan_out: str, budget: int, count: int, most: int) -> None:
    """With three drafts for two sequences one of them has two."""
    found = [hits(n, count, fan_out=fan_out, budget=budget) for n in range(1, most + 1)]
    assert sorted(set(found)) == found


def test_drafts_that_divide_a_budget_foresee_what_one_with_all_of_it_does() -> None:
    whole, divided = hits(1, 1, fan_out="confidence", budget=24), hits(3, 1, fan_out="confidence", budget=8)
    assert abs(whole - divided) <= 1


def test_drafts_do_not_prepare_for_the_same_outcome_twice() -> None:
    process = serving(3, fan_out="uniform", budget=4)
    sequence = process.engine.add(asked()[0])
    while sequence.turn < 3:
        process.engine.step()
    prepared = [{(branch.turn, branch.outcome) for branch in draft.drafter.tree().branches} for draft in process.drafts]
    assert all(prepared)
    assert sum(map(len, prepared)) == len(set.union(*prepared))


def rounds_of_twins(steps: tuple[int, int]) -> int:
    """How many verifications a request takes with two drafts that foresee nearly everything, so fast each."""
    process = serving(2, twins=True, fan_out="confidence", budget=4)
    for draft, count in zip(process.drafts, steps, strict=True):
        draft.steps = functools.partial(int, count)
    (sequence,) = process.run(asked())
    assert [sequence.tokens] == alone(1)
    return sequence.turn


def test_the_likeliest_branch_does_not_hang_on_one_slow_draft() -> None:
    fast = rounds_of_twins((12, 12))
    assert rounds_of_twins((1, 12)) <= 1.2 * fast
    assert rounds_of_twins((12, 1)) <= 1.2 * fast
    assert rounds_of_twins((1, 1)) > 2 * fast


def test_what_is_likelier_than_all_the_rest_is_everybodys_and_the_rest_is_divided() -> None:
    class Gains:
        """A fan-out that gives these chances."""

        def __init__(self, *gains: float) -> None:
            self._forks = [Fork(0, token, gain) for token, gain in enumerate(gains)]

        def forks(self, verified: Verified, budget: int, allowed: int | None = None) -> list[Fork]:
            return self._forks[:budget]

        def observe(self, verified: Verified, num_accepted: int, bonus_token: int) -> None:
            pass

    def parts(budget: int, *gains: float) -> list[list[int]]:
        found = []
        for index in range(2):
            drafter = Drafter(decoder(1), ENGINE, SpeculationConfig(budget=budget))
            drafter._fan_out = Gains(*gains)
            drafter.admit(Admit(0, PROMPT, SamplingParams(), "ssd", 3, 20))
            drafter.portion(0, index, 2)
            found.append([fork.token for fork in drafter._forks()[0]])
        return found

    assert parts(3, 0.6, 0.2, 0.1, 0.06, 0.04) == [[0, 1, 3], [0, 2, 4]]
    assert parts(3, 0.5, 0.2, 0.1, 0.06, 0.04) == [[0, 2, 4], [1, 3]]
    assert parts(1, 0.6, 0.2, 0.1) == [[0], [1]]  # with one place each there is nothing to give up


# ---- who drafts for whom ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "num_drafts"), [(2, 2), (5, 2), (5, 3), (3, 3)])
@pytest.mark.parametrize("backup", ["none", "draft"])
def test_a_draft_hears_of_its_own_sequences_only(count: int, num_drafts: int, backup: str) -> None:
    process = serving(num_drafts, backup=backup)
    sequences = [process.engine.add(one) for one in asked(count)]
    run_to_turn(process, sequences, 6)
    admitted = [draft.admitted for draft in process.drafts]
    assert sorted(itertools.chain(*admitted)) == [sequence.sequence_id for sequence in sequences]
    assert max(map(len, admitted)) - min(map(len, admitted)) <= 1
    for draft in process.drafts:
        assert {row.sequence_id for frame in draft.frames for row in frame.rows} == set(draft.admitted)
    # A draft that is waited for and has nothing to say would count as lost here.
    assert process.link.drafts.num_lost == 0


def test_each_draft_spends_the_budget_of_one_alone() -> None:
    for num_drafts, count in [(1, 4), (2, 4), (3, 4), (3, 2)]:
        process = serving(num_drafts, fan_out="uniform", budget=3, steps=20)
        sequences = [process.engine.add(one) for one in asked(count)]
        while any(sequence.turn < 3 for sequence in sequences):
            process.engine.step()
        for draft in process.drafts:
            assert len(draft.drafter.tree().branches) in range(3 * count - 3, 3 * count + 1)


@pytest.mark.parametrize("backup", ["none", "ngram", "draft"])
def test_any_of_them_may_die_alone(backup: str) -> None:
    process = serving(3, backup=backup)
    sequences = [process.engine.add(one) for one in asked(2)]
    seen = []
    while process.engine.has_work:
        process.engine.step()
        process.helpers[0].dead = sequences[0].turn > 20
        process.draft.dead = sequences[0].turn > 40
        seen.append(portions(process))
    assert [sequence.tokens for sequence in sequences] == alone(2)
    assert process.link.drafts.count == 1
    assert process.link.drafts.num_lost == 2
    assert {0: [(0, 2), (1, 2)], 1: [(0, 1)]} in seen
    assert seen[-1].keys() <= {0, 1}
    assert {0: [(0, 1)], 1: [(0, 1)]} in seen  # the last one has all of it


def test_losing_one_leaves_the_hits_of_the_others_alone() -> None:
    process = serving(2, twins=True, steps=40)
    sequences = [process.engine.add(one) for one in asked(4)]
    while process.engine.has_work:
        process.draft.dead = sequences[0].turn > 10
        process.engine.step()
    assert process.link.drafts.num_lost == 1
    lost = set(process.draft.admitted)
    assert len(lost) == 2
    for sequence in sequences:
        assert sequence.measured.misses == 0 if sequence.sequence_id not in lost else sequence.measured.misses < 5
    assert set(process.helpers[0].admitted) == {0, 1, 2, 3}


# ---- coming and going in mid-stream ----------------------------------------------------------------------------------


def test_a_draft_that_comes_gets_its_part_and_no_hit_is_lost_over_it() -> None:
    process = serving(1, twins=True, steps=40)
    sequences = [process.engine.add(one) for one in asked(5)]
    run_to_turn(process, sequences, 8)
    before = [sequence.measured.misses for sequence in sequences]
    process.send_in()
    run_to_turn(process, sequences, 12)
    assert process.helpers[0].admitted == [3, 4]  # the fair number, the youngest
    assert set(process.draft.drafter._sequences) == {0, 1, 2}
    run_to_turn(process, sequences, 30)
    assert [sequence.measured.misses for sequence in sequences] == before


def test_who_had_a_sequence_drafts_for_it_until_the_new_one_has_caught_up() -> None:
    """The new draft takes no step for a while."""
    process = serving(1, twins=True, steps=40)
    sequences = [process.engine.add(one) for one in asked(2)]
    run_to_turn(process, sequences, 8)
    before = [sequence.measured.misses for sequence in sequences]
    late = process.send_in()
    late.steps = lambda: 0
    run_to_turn(process, sequences, 16)
    assert late.admitted == [1]
    assert set(process.draft.drafter._sequences) == {0, 1}
    late.steps = process.draft.steps
    run_to_turn(process, sequences, 20)
    assert set(process.draft.drafter._sequences) == {0}
    run_to_turn(process, sequences, 30)
    assert [sequence.measured.misses for sequence in sequences] == before


def test_an_idle_draft_helps_with_what_is_left_until_it_is_needed() -> None:
    process = serving(2)
    (long,) = asked()
    short = asked(3, max_tokens=20)[1:]
    first, second = process.engine.add(long), process.engine.add(short[0])
    seen = []
    while process.engine.has_work:
        process.engine.step()
        if second.finish_reason and len(seen) == 30:
            second = process.engine.add(short[1])
        seen.append(portions(process))
    assert first.tokens == alone(1)[0]
    helped, needed = {0: [(0, 2), (1, 2)]}, [{0: [(0, 1)], 1: [(0, 1)]}, {0: [(0, 1)], 2: [(0, 1)]}]
    order = [one for one, _ in itertools.groupby(one for one in seen if one in [helped, *needed])]
    assert order[:4] == [needed[0], helped, needed[1], helped]


@settings(max_examples=8, deadline=None)
@given(
    count=st.sampled_from([1, 2, 5]),
    num_drafts=st.integers(1, 3),
    events=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=5),
    backup=st.sampled_from(["draft", "ngram", "none"]),
    speed=st.integers(0, 10**6),
    sd=st.booleans(),
)
def test_drafts_that_come_and_go_change_no_token(
    count: int, num_drafts: int, events: list[tuple[int, int]], backup: str, speed: int, sd: bool
) -> None:
    """Each event: so many rounds later draft i is lost, or one comes if there is none so far."""
    process = serving(num_drafts, steps=random_steps(speed, most=5), backup=backup, recycle=1)
    requests = asked(count, max_tokens=20)
    if sd:
        requests[-1] = asked(count, "sd", max_tokens=20)[-1]
    sequences = [process.engine.add(one) for one in requests]
    due = list(events)
    while process.engine.has_work:
        if due and due[0][0] <= 0:
            _, which = due.pop(0)
            alive = [draft for draft in process.drafts if not draft.dead]
            if which < len(alive):
                alive[which].dead = True
            else:
                process.send_in()
        due = [(due[0][0] - 1, due[0][1]), *due[1:]] if due else []
        process.engine.step()
        assert_fair(process, sequences)
    assert [sequence.tokens for sequence in sequences] == beginnings(sequences)
    for draft in process.drafts:
        draft.drafter.reset()
        assert draft.drafter.allocator.num_free == draft.drafter.allocator.num_blocks


def assert_fair(process: InProcess, sequences: list[Sequence]) -> None:
    """Every sequence that runs has a draft that was told of it, if there is one at all."""
    linked = process.link.drafts._peers
    if linked and process.link.drafts._settled:
        known = set(itertools.chain(*(draft.drafter._sequences for draft in linked)))  # type: ignore[attr-defined]
        assert {one.sequence_id for one in sequences if not one.finish_reason and one.turn > 0} <= known


# ---- portions that are none ------------------------------------------------------------------------------------------


def test_a_share_that_is_none_is_refused() -> None:
    drafter = Drafter(decoder(1), ENGINE, SpeculationConfig())
    with pytest.raises(ProtocolError, match="portion 2 of 2"):
        drafter.portion(0, 2, 2)
    with pytest.raises(ProtocolError, match="portion of sequence 7"):
        drafter.portion(7, 1, 2)


def test_only_the_drafts_of_missed_sequences_are_asked_for_a_branch() -> None:
    process = serving(2, backup="draft")
    sequences = [process.engine.add(one) for one in asked(2)]
    run_to_turn(process, sequences, 20)
    for draft, own in zip(process.drafts, [{0}, {1}], strict=True):
        pending = [row for frame in draft.frames for row in frame.rows if row.source is Source.PENDING]
        assert {row.sequence_id for row in pending} == own
    assert process.link.drafts.num_lost == 0  # as one would be that is waited for and has nothing to say
