"""Branches with what their tokens were sampled from: exact over the wire, and only distributions pass."""

from __future__ import annotations

import dataclasses
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.comm.link.frames import TreeCodec
from ssd_runtime.comm.protocol import FrameShape, ProtocolError
from ssd_runtime.speculation.rejection.proposal import ProposalRule, propose_oracle
from ssd_runtime.speculation.types import Branch, Outcome, Proposal, TreeFrame

SHAPE = FrameShape.of(max_sequences=2, lookahead=3, budget=4, probabilities=5)
CODEC = TreeCodec(SHAPE)


def sampled(entropy: int, size: int, top_m: int = 5) -> tuple[int, Proposal]:
    logits_V = torch.randn(size, generator=torch.Generator().manual_seed(entropy)) * 4
    return propose_oracle(logits_V, ProposalRule(top_m), entropy)


def branch(entropy: int, length: int, with_proposals: bool = True) -> Branch:
    drafted = [sampled(entropy + k, size=2 + (entropy + k) % 9) for k in range(length)]
    proposals = tuple(proposal for _, proposal in drafted) if with_proposals else ()
    return Branch(7, 3, Outcome(1, 2), tuple(token for token, _ in drafted), proposals)


def frame(*branches: Branch) -> TreeFrame:
    return TreeFrame(4, branches, 5, 6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.builds(branch, st.integers(0, 2**31), st.integers(0, SHAPE.lookahead), st.booleans()),
        max_size=SHAPE.max_branches,
    )
)
def test_proposals_survive_the_wire_bit_for_bit(branches: list[Branch]) -> None:
    words = CODEC.encode(frame(*branches))
    assert words.shape == (CODEC.num_words,)
    assert CODEC.decode(words) == frame(*branches)


def test_without_probabilities_the_frame_is_what_it_was() -> None:
    plain = FrameShape.of(2, 3, 4)
    assert TreeCodec(plain).num_words == TreeCodec(dataclasses.replace(plain, probabilities=0)).num_words
    assert CODEC.num_words - TreeCodec(plain).num_words == SHAPE.max_branches * 3 * 5
    assert CODEC.decode(CODEC.encode(frame(branch(1, 3, False)))) == frame(branch(1, 3, False))


GOOD = Proposal((4, 9), (0.75, 0.25))


def with_proposals(*proposals: Proposal, tokens: tuple[int, ...] = (4, 9)) -> Branch:
    return Branch(7, 3, Outcome(1, 2), tokens, proposals)


@pytest.mark.parametrize(
    "proposal",
    [
        pytest.param(Proposal((4, 9), (0.75, 0.2)), id="sums to less than one"),
        pytest.param(Proposal((4, 9), (0.75, 0.3)), id="sums to more than one"),
        pytest.param(Proposal((4, 9), (1.25, -0.25)), id="a negative weight"),
        pytest.param(Proposal((4, 9), (1.0, 0.0)), id="a weight of zero"),
        pytest.param(Proposal((4, 9), (float("nan"), 0.25)), id="not a number"),
        pytest.param(Proposal((4, 9), (float("inf"), 0.25)), id="infinite"),
        pytest.param(Proposal((9, 9), (0.75, 0.25)), id="a token twice"),
        pytest.param(Proposal((4, 8), (0.75, 0.25)), id="without the token that was sampled"),
        pytest.param(Proposal((-2, 9), (0.75, 0.25)), id="a negative token"),
        pytest.param(Proposal((), ()), id="one token with, one without"),
    ],
)
def test_what_is_no_distribution_does_not_pass_although_its_checksum_is_right(proposal: Proposal) -> None:
    assert CODEC.decode(CODEC.encode(frame(with_proposals(GOOD, GOOD))))
    for wrong in (with_proposals(GOOD, proposal), with_proposals(proposal, GOOD, tokens=(9, 4))):
        with pytest.raises(ProtocolError, match=r"no distribution that could have given it"):
            CODEC.decode(CODEC.encode(frame(branch(3, 3), wrong)))


@pytest.mark.parametrize("word", [9 << 32 | struct.unpack("I", struct.pack("f", 0.25))[0], -5, 0])
@pytest.mark.parametrize("at", [2, 4, 5 + 5 + 1, 14])
def test_words_behind_the_last_one_must_be_absent(word: int, at: int) -> None:
    """Behind the pairs of a token, and behind the tokens of a branch."""
    codec = TreeCodec(dataclasses.replace(SHAPE, max_branches=1))
    right = codec.encode(frame(with_proposals(GOOD, GOOD))).clone()
    start = len(right) - 15
    assert int(right[start + at]) == -1
    right[start + at] = word
    # The checksum is part of the header: put it right, so that the content is judged.
    wrong = codec._tensor(codec.kind, 4, (5, 6), 1, right[7:].tolist())
    with pytest.raises(ProtocolError, match=r"no distribution"):
        codec.decode(wrong)


def test_more_probabilities_than_agreed_are_the_senders_mistake() -> None:
    wide = Proposal(tuple(range(6)), (0.5, 0.1, 0.1, 0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="do not fit"):
        CODEC.encode(frame(with_proposals(wide, tokens=(4,))))
