"""What both planes agree on before they speak: version, frame sizes, vocabularies. No sockets, no messages.

`PROTOCOL.md` beside this file is the description for people.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from ssd_runtime.errors import SsdError
from ssd_runtime.speculation.types import Lookahead

Name = Annotated[str, Meta(max_length=64)]
Reason = Annotated[str, Meta(max_length=2**16)]
Rank = Annotated[int, Meta(ge=0, le=2**20)]
CoreNumbers = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**16)], ...], Meta(max_length=2**16)]
CoresByRole = Annotated[dict[Name, CoreNumbers], Meta(max_length=2**10)]

PROTOCOL_VERSION = 9
CHUNK = 1024  # tokens behind one digest of a vocabulary

# Names that converters give to ids no tokenizer ever produces; at the end of a vocabulary they are padding.
_PADDING = re.compile(r"(\[PAD\d*\]|<\|?(pad|unused|dummy|placeholder)_?\d*\|?>)?", re.IGNORECASE)


class ProtocolError(SsdError):
    """Bytes, a message or a frame that this version does not understand. The message says what is wrong with it.

    Args:
        request_id: of the request that a message was about, where that can be read.
    """

    def __init__(self, reason: str, request_id: str | None = None) -> None:
        super().__init__(reason)
        self.request_id = request_id


@dataclass(frozen=True)
class FrameShape:
    """Fixed sizes of the data plane's frames.

    Attributes:
        max_sequences: most rows of an `OutcomeFrame`.
        lookahead: K, most tokens of a row or branch.
        max_branches: most branches of a `TreeFrame`.
        probabilities: most probabilities that a branch carries for each of its tokens.
    """

    max_sequences: Annotated[int, Meta(ge=1, le=2**16)]
    lookahead: Lookahead
    max_branches: Annotated[int, Meta(ge=1, le=2**24)]
    probabilities: Annotated[int, Meta(ge=0, le=2**12)] = 0

    @classmethod
    def of(cls, max_sequences: int, lookahead: int, budget: int, probabilities: int = 0) -> FrameShape:
        """Room for `budget` branches a sequence and one drafted just in time after a miss."""
        return cls(max_sequences, lookahead, max_sequences * (budget + 1), probabilities)


@dataclass(frozen=True)
class VocabularyDigest:
    """A vocabulary in a few kilobytes, so that two sides can compare theirs and name where they differ.

    Attributes:
        size: tokens without the padding at the end.
        chunks: chained digests: entry i covers the tokens below (i + 1) * CHUNK; the last one covers all.
    """

    size: Annotated[int, Meta(ge=0, le=2**24)]
    chunks: Annotated[tuple[Name, ...], Meta(max_length=2**24 // CHUNK)]

    @classmethod
    def of(cls, tokens: Iterable[str | bytes | None]) -> VocabularyDigest:
        """Digest the tokens in id order. None is an id without a token; padding at the end is not counted."""
        spelled = ["" if token is None else token for token in tokens]
        while spelled and is_padding(spelled[-1]):
            spelled.pop()
        chunks: list[str] = []
        for start in range(0, len(spelled), CHUNK):
            digest = hashlib.sha256(chunks[-1].encode() if chunks else b"")
            for token in spelled[start : start + CHUNK]:
                raw = token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")
                digest.update(len(raw).to_bytes(4, "little") + raw)
            chunks.append(digest.hexdigest()[:16])
        return cls(len(spelled), tuple(chunks))

    def differs_from(self, other: VocabularyDigest) -> str | None:
        """The reason two vocabularies cannot be used together, or None if they are equal up to padding."""
        if self == other:
            return None
        whole = min(self.size, other.size) // CHUNK  # a partial chunk compares only with one of the same size
        for i, (mine, theirs) in enumerate(zip(self.chunks[:whole], other.chunks[:whole], strict=False)):
            if mine != theirs:
                return f"vocabularies differ between token ids {i * CHUNK} and {(i + 1) * CHUNK - 1}"
        if self.size != other.size:
            return f"vocabularies have {self.size} and {other.size} tokens without padding"
        return f"vocabularies differ between token ids {whole * CHUNK} and {self.size - 1}"


def is_padding(token: str | bytes) -> bool:
    """Whether a token at the end of a vocabulary is there only to fill a table."""
    text = token.decode("utf-8", "replace") if isinstance(token, bytes) else token
    return _PADDING.fullmatch(text) is not None
