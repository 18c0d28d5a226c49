"""Who may work together: vocabularies and Hellos."""

from __future__ import annotations

import dataclasses

import pytest

from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.comm.control.draft_messages import Hello
from ssd_runtime.comm.link.endpoint import LinkTiming
from ssd_runtime.comm.protocol import CHUNK, PROTOCOL_VERSION, FrameShape, VocabularyDigest
from ssd_runtime.leader.acceptor import Terms

TOKENS = [f"t{i}" for i in range(3 * CHUNK + 100)]
VOCABULARY = VocabularyDigest.of(TOKENS)
HELLO = Hello(PROTOCOL_VERSION, "draft", 1, "digest", VOCABULARY, num_blocks=77)
TERMS = Terms("digest", VOCABULARY, FrameShape.of(1, 1, 1, 0), LinkTiming(), num_blocks=77)


def changed(index: int) -> VocabularyDigest:
    tokens = list(TOKENS)
    tokens[index] = "other"
    return VocabularyDigest.of(tokens)


@pytest.mark.parametrize("padding", [None, "", "[PAD7]", "<pad>", "<unused3>", "<|dummy_12|>", b"[PAD1]"])
def test_padding_at_the_end_does_not_count(padding: str | bytes | None) -> None:
    assert VOCABULARY.differs_from(VocabularyDigest.of([*TOKENS, *[padding] * 500])) is None


@pytest.mark.parametrize("index", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_a_difference_is_located_within_a_chunk(index: int) -> None:
    reason = VOCABULARY.differs_from(changed(index))
    chunk = index // CHUNK
    assert reason == f"vocabularies differ between token ids {chunk * CHUNK} and {(chunk + 1) * CHUNK - 1}"


def test_a_difference_in_the_last_partial_chunk_is_found() -> None:
    reason = VOCABULARY.differs_from(changed(len(TOKENS) - 1))
    assert reason is not None
    assert str(len(TOKENS) - 1) in reason


def test_a_longer_vocabulary_that_is_not_padding_is_refused_with_both_sizes() -> None:
    longer = VocabularyDigest.of([*TOKENS, "one more"])
    assert longer.differs_from(VOCABULARY) == f"vocabularies have {len(TOKENS) + 1} and {len(TOKENS)} tokens " + (
        "without padding"
    )


def test_token_borders_count() -> None:
    assert VocabularyDigest.of(["ab", "c"]).differs_from(VocabularyDigest.of(["a", "bc"])) is not None


def test_text_and_its_bytes_are_the_same_token() -> None:
    assert VocabularyDigest.of(["é"]) == VocabularyDigest.of(["é".encode()])


def test_a_draft_that_fits_is_welcome_also_after_the_wire() -> None:
    assert TERMS.mismatch(HELLO) is None
    arrived = decode(encode(HELLO))
    assert isinstance(arrived, Hello)
    assert dataclasses.replace(TERMS, num_blocks=70).mismatch(arrived) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": PROTOCOL_VERSION + 1}, "protocol version"),
        ({"role": "target"}, "only a draft"),
        ({"rank": -1}, "only a draft"),
        ({"config_digest": "another"}, "another of the draft, digest of the target"),
        ({"vocabulary": VocabularyDigest.of(["x"])}, "target's and draft's vocabularies"),
        ({"num_blocks": 76}, "has 76 blocks and the target's 77: start both with engine.num_blocks = 76"),
    ],
)
def test_a_draft_that_does_not_fit_is_told_why(change: dict[str, object], reason: str) -> None:
    refusal = TERMS.mismatch(dataclasses.replace(HELLO, **change))  # type: ignore[arg-type]
    assert refusal is not None
    assert reason in refusal
