"""Whether two models speak the same tokens. Knows no tokenizer library.

Tables are padded at the end to round sizes, so vocabularies are compared without that padding.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PADDING = re.compile(r"\[PAD\d+\]|<pad_\d+>|<dummy\d+>|\[unused\d+\]|", re.IGNORECASE)


@dataclass(frozen=True)
class VocabularyDigest:
    """Token strings by id, without the padding at the end.

    Attributes:
        tokens: tokens[i] is the string of id i; ids nobody uses are "".
    """

    tokens: tuple[str, ...]

    @classmethod
    def from_tokens(cls, tokens: Sequence[str]) -> VocabularyDigest:
        """Cut the padding ("[PAD151665]", "<pad_3>", unnamed) from the end."""
        size = len(tokens)
        while size and _PADDING.fullmatch(tokens[size - 1]):
            size -= 1
        return cls(tuple(tokens[:size]))

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """For the handshake; the strings travel compressed so that a refusal can name the first difference."""
        packed = zlib.compress(json.dumps(self.tokens).encode(), 1)
        return {"size": len(self.tokens), "sha256": self.sha256, "tokens": packed}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VocabularyDigest:
        """Inverse of `to_dict`. Raises ValueError on anything else."""
        try:
            tokens = json.loads(zlib.decompress(values["tokens"]))
        except (KeyError, TypeError, zlib.error) as error:
            raise ValueError(f"not a vocabulary: {error}") from None
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError("not a vocabulary: tokens must be strings")
        return cls(tuple(tokens))

    def difference(self, other: VocabularyDigest) -> str | None:
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
