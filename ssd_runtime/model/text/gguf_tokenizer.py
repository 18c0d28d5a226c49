"""A tokenizer from the metadata of a GGUF file. Knows no model.

Qwen's texts are normalised (NFC) as its own tokenizer.json does, which llama.cpp leaves out.
Pre-tokenizers by name: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.fields import brief_error
from ssd_runtime.model.files.gguf_header import GgufFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = (_CONTRACTIONS + r"\p{N}" + _REST,)
_LLAMA3 = (_CONTRACTIONS + r"\p{N}{1,3}" + _REST,)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": (_GPT2 + r"|\s+",),
    "smollm": (r"\p{N}", _GPT2 + r"|\s+"),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Build the tokenizer; raises ConfigError for kinds that are not supported or metadata that does not fit."""
    kind = file.metadata.get("tokenizer.ggml.model")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ConfigError(f"model {file.path} has no tokenizer; convert the model again, with its tokenizer")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(file, tokens)
        elif kind == "llama":
            tokenizer = _sentencepiece(file, tokens)
        else:
            raise ConfigError(f"model {file.path}: tokenizer {kind!r} is not supported; known: gpt2, llama")
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 (`tokenizers` raises bare Exception for merges that fit no token)
        raise ConfigError(
            f"model {file.path}: its tokenizer does not fit together ({brief_error(error)}); fetch it again"
        ) from None
    special = [
        (token, kind) for token, kind in zip(tokens, _kinds(file), strict=False) if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=bool(kind == _CONTROL)) for token, kind in special]
    )
    return tokenizer


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PATTERNS:
        raise ConfigError(f"model {file.path}: pre-tokenizer {pre!r} is not supported; known: {', '.join(_PATTERNS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in _list(file, "tokenizer.ggml.merges")]
    ignore_merges = _PATTERNS[pre] is _LLAMA3
    tokenizer = Tokenizer(models.BPE(_ids(tokens), merges, ignore_merges=ignore_merges))  # type: ignore[arg-type]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if _PATTERNS[pre] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    """Llama 2's kind: merges follow from the scores, unknown characters fall back to bytes."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ConfigError(f"model {file.path} has no scores for its tokens; convert the model again with its tokenizer")
    ids = _ids(tokens)
    unknown = next((token for token, kind in zip(tokens, _kinds(file), strict=False) if kind == _UNKNOWN), None)
    model = models.BPE(ids, _merges_from_scores(ids, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    ends: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def _merges_from_scores(ids: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best scored third first."""
    merges = []
    for token, token_id in ids.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        splits.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(-float(scores[token_id]), left, right) for left, right in splits]
    merges.sort(key=lambda merge: merge[0])  # stable: equal scores stay in order of id
    return [(left, right) for _, left, right in merges]


def _kinds(file: GgufFile) -> Iterable[int]:
    """One a token, as far as they go."""
    kinds = file.metadata.get("tokenizer.ggml.token_type", ())
    return kinds if isinstance(kinds, np.ndarray) else ()


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(tokens)}


def _list(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list):
        raise ConfigError(f"model {file.path} has no {key}; convert the model again, with its tokenizer")
    return value
