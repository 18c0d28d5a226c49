"""The tokenizer of random models: all bytes, then invented words up to the size of the vocabulary. Knows no model.

It has no merges: a prompt has a token for each of its bytes, and what a model says, which is words, is printable.
Models of one vocabulary size have the same tokenizer. Nothing ends a text.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ssd_runtime.model.random.models import FIRST_WORD

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@functools.cache
def random_tokenizer(vocab_size: int) -> Tokenizer:
    """One whose every id below `vocab_size` is a token; the same object every time, not to be changed."""
    space = "Ġ"  # as byte-level tokenizers write it
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(space + word for word in _words(vocab_size - FIRST_WORD))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words(count: int) -> Iterator[str]:
    """Different ones, the shortest first."""
    by_length = (itertools.product(_SYLLABLES, repeat=length) for length in itertools.count(1))
    return map("".join, itertools.islice(itertools.chain.from_iterable(by_length), count))
