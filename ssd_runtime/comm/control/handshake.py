"""Whether two sides may work together. Knows no sockets; the reasons are written for the user."""

from __future__ import annotations

from ssd_runtime.comm.control.draft_messages import Hello
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, VocabularyDigest


def check_hello(hello: Hello, config_digest: str, vocabulary: VocabularyDigest, num_blocks: int) -> str | None:
    """Compare a draft's Hello with what the target has; returns why not, or None if all is well.

    Args:
        num_blocks: of the target's KV pool. What fits there is to fit at the draft.
    """
    if hello.version != PROTOCOL_VERSION:
        return f"protocol version {hello.version} of the {hello.role}, the target speaks {PROTOCOL_VERSION}"
    if hello.role != "draft" or hello.rank < 0:
        return f"rank {hello.rank} says it is a {hello.role}; only a draft (rank 0 or above) may join"
    if hello.config_digest != config_digest:
        return (
            f"configuration {hello.config_digest} of the draft, {config_digest} of the target: "
            "start both with the same [engine], [speculation] and [link] sections"
        )
    if hello.num_blocks < num_blocks:
        return (
            f"the draft's KV pool has {hello.num_blocks} blocks and the target's {num_blocks}: "
            f"start both with engine.num_blocks = {hello.num_blocks}"
        )
    difference = vocabulary.differs_from(hello.vocabulary)
    return f"target's and draft's {difference}: choose a draft of the target's family" if difference else None
