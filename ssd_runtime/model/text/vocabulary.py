"""Whether two models speak the same tokens. Knows no tokenizer library.

Tables are padded at the end to round sizes, so vocabularies are compared without that padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssd_runtime.comm.protocol import VocabularyDigest, is_padding


@dataclass(frozen=True)
class Vocabulary:
    """Token strings by id, without the padding at the end.

    Attributes:
        tokens: tokens[i] is the string of id i; ids nobody uses are "".
    """

    tokens: tuple[str, ...]

    @classmethod
    def from_tokens(cls, tokens: Sequence[str]) -> Vocabulary:
        """Cut the padding ("[PAD151665]", "<pad_3>", unnamed) from the end."""
        size = len(tokens)
        while size and is_padding(tokens[size - 1]):
            size -= 1
        return cls(tuple(tokens[:size]))

    def digest(self) -> VocabularyDigest:
        """For the handshake: a few kilobytes that can be compared."""
        return VocabularyDigest.of(self.tokens)

    def difference(self, other: Vocabulary) -> str | None:
        """None when the vocabularies are equal up to padding, else the reason, with the first id that differs."""
        for token_id, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                return f"the vocabularies differ first at id {token_id}: {mine!r} and {theirs!r}"
        if len(self.tokens) != len(other.tokens):
            first = min(len(self.tokens), len(other.tokens))
            token = max(self.tokens, other.tokens, key=len)[first]
            sizes = f"{len(self.tokens)} and {len(other.tokens)} tokens"
            return f"the vocabularies have {sizes}: id {first} is {token!r} in one only"
        return None
