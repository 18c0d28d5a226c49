"""Text to tokens and back, and conversations to text, from a model's own files. Knows no weights.

In both kinds of tokenizer read here (byte-level BPE, SentencePiece with byte fallback) a token's bytes do not depend on
its neighbours, so text can be streamed exactly: `Detokenizer`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tokenizers
from tokenizers import pre_tokenizers

from ssd_runtime.errors import ConfigError, RequestError
from ssd_runtime.model.architecture import LARGEST_VOCABULARY
from ssd_runtime.model.files.fields import brief_error
from ssd_runtime.model.files.opening import file_size, read_json, read_text
from ssd_runtime.model.random.models import random_model
from ssd_runtime.model.random.tokenizer import CHAT_TEMPLATE, random_tokenizer
from ssd_runtime.model.text.chat_template import ChatTemplate
from ssd_runtime.model.text.special_tokens import gguf_token_id, special_ids_gguf, special_tokens_hf
from ssd_runtime.model.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ssd_runtime.model.files.gguf_header import GgufFile

_CHAT_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>", "<end_of_turn>")
_GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_MOST_ID = (1 << 31) - 1


@dataclass(frozen=True)
class _Parts:
    """What differs between the formats.

    Attributes:
        special_tokens: text by name, for the chat template.
        templates: sources of chat templates by name.
        front, behind: put around a plain text by `encode`; nothing where the library's own post-processing does it.
    """

    tokenizer: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    templates: Mapping[str, str]
    front: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()


class Tokenizer:
    """A model's tokenizer; `from_model` makes one.

    Attributes:
        eos_token_ids: every id that ends an answer, sorted.
        special_tokens: text by name ("bos_token"), as the model's files name them.
        vocab_size: ids the tokenizer knows; the model's table may be larger.
        longest_token: no token stands for more characters of a text.
    """

    def __init__(self, path: str, parts: _Parts) -> None:
        self._path = path
        self._tokenizer = parts.tokenizer
        self._front, self._behind = parts.front, parts.behind
        self._chat_template = ChatTemplate(parts.templates, parts.special_tokens, f"model {path}")
        self.eos_token_ids = parts.eos_token_ids
        self.special_tokens = parts.special_tokens
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(f"model {path}: its tokenizer has an id of {self.vocab_size - 1}; fetch the model again")
        self._tokens = [""] * self.vocab_size
        for token, token_id in vocabulary.items():
            self._tokens[token_id] = token
        self.longest_token = max(map(len, self._tokens), default=1)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._kind = _decoder_kind(self._tokenizer, path)

    @classmethod
    def from_model(cls, path: str) -> Tokenizer:
        """From a Hugging Face directory or a GGUF file, or of a random model. Raises ConfigError with the remedy."""
        if (model := random_model(path)) is not None:
            return cls(path, _Parts(random_tokenizer(model.arch.vocab_size), (), {}, {"default": CHAT_TEMPLATE}))
        return cls(path, _hf_parts(Path(path)) if Path(path).is_dir() else _gguf_parts(path))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; `add_special` puts in front (and behind) what the model expects around a plain text.

        Raises:
            RequestError: the tokenizer cannot read this text.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
                raise
            half = any("\ud800" <= character <= "\udfff" for character in text)
            reason = "it holds half of a surrogate pair, which is no character" if half else brief_error(error)
            raise RequestError(f"the model's tokenizer cannot read this text: {reason}") from None
        return [*self._front, *ids, *self._behind] if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of a whole sequence; ids of the table's padding are nothing."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as the model's template writes it, up to where the assistant answers.

        Encode the result with `add_special=False`: templates write the special tokens themselves.

        Raises:
            ConfigError: the model has no chat template, or one that does not parse.
            RequestError: the template refuses the messages, or fails on them.
        """
        return self._chat_template.render(messages)

    def vocabulary(self) -> Vocabulary:
        """For the comparison with another model's."""
        return Vocabulary.from_tokens(self._tokens)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """What one token adds to a text; nothing for skipped and unknown ids."""
        if not 0 <= token_id < self.vocab_size or (skip_special and token_id in self._special_ids):
            return b""
        token = self._tokens[token_id]
        if self._kind == "byte-level":
            known = all(character in _BYTE_OF for character in token)
            return bytes(_BYTE_OF[character] for character in token) if known else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes((int(token[3:5], 16),))
        return token.replace("▁", " ").encode()


class Detokenizer:
    """Text of one stream of tokens as it becomes certain; incomplete UTF-8 is held back.

    Streams begin in the middle of a text (after a prompt), so a first leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one token, return the text that is now certain (may be empty)."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def flush(self) -> str:
        """End of the stream: what was held back, as replacement characters."""
        return self._decoder.decode(b"", final=True)


def _gguf_parts(path: str) -> _Parts:
    from ssd_runtime.model.files.gguf_header import open_gguf  # these need the package gguf
    from ssd_runtime.model.text.gguf_tokenizer import tokenizer_from_gguf

    file = open_gguf(path)
    tokenizer = tokenizer_from_gguf(file)
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    special = special_ids_gguf(file, len(tokens))
    template = file.metadata.get("tokenizer.chat_template")
    pre_adds_bos = file.metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")
    adds_bos = pre_adds_bos or file.metadata.get("tokenizer.ggml.model") == "llama"
    return _Parts(
        tokenizer=tokenizer,
        eos_token_ids=_end_ids(tokenizer, (gguf_token_id(file, key, len(tokens)) for key in _GGUF_ENDS)),
        special_tokens={name: tokens[token_id] for name, token_id in special.items()},
        templates={"default": template} if isinstance(template, str) else {},
        front=_added(file, "bos", special, default=adds_bos),
        behind=_added(file, "eos", special, default=False),
    )


def _added(file: GgufFile, name: str, special: Mapping[str, int], default: bool) -> tuple[int, ...]:
    """The token of that name, if the file, or else the kind of its tokenizer, puts it around a text."""
    asked = file.metadata.get(f"tokenizer.ggml.add_{name}_token")
    token = special.get(f"{name}_token")
    if token is None and asked:
        raise ConfigError(
            f"model {file.path}: tokenizer.ggml.add_{name}_token is set and tokenizer.ggml.{name}_token_id names no "
            "token; convert the model again, with its tokenizer"
        )
    return (token,) if token is not None and (default if asked is None else asked) else ()


def _hf_parts(directory: Path) -> _Parts:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"model {directory} has no tokenizer.json; put the one of its model family there")
    file_size(path)  # a regular file, or what is said of it
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (`tokenizers` raises bare Exception)
        raise ConfigError(f"{path} cannot be read ({brief_error(error)}); fetch the model again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    config, generation, extra, special_map = (
        read_json(directory / name) if (directory / name).exists() else {} for name in names
    )
    who = f"model {directory}"
    byte_level = _decoder_kind(tokenizer, str(directory)) == "byte-level"
    special = special_tokens_hf(config, extra, special_map, byte_level, who)
    ends: list[int | None] = [*_config_ends(generation, who), *_config_ends(config, who)]
    if "eos_token" in special:
        ends.append(tokenizer.token_to_id(special["eos_token"]))
    return _Parts(
        tokenizer=tokenizer,
        eos_token_ids=_end_ids(tokenizer, ends),
        special_tokens=special,
        templates=_hf_templates(directory, extra),
    )


def _hf_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """By name; files come before what tokenizer_config.json has, all of it."""
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").exists():
        files.setdefault("default", directory / "chat_template.jinja")
    if files:
        return {name: read_text(path) for name, path in files.items()}
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    templates = template if isinstance(template, dict) else {} if template is None else {"default": template}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise ConfigError(f"model {directory}: chat_template in tokenizer_config.json is not text; fetch it again")
    return templates


def _end_ids(tokenizer: tokenizers.Tokenizer, ids: Iterable[int | None]) -> tuple[int, ...]:
    chat_ends = (tokenizer.token_to_id(token) for token in _CHAT_ENDS)
    return tuple(sorted({token_id for token_id in (*ids, *chat_ends) if token_id is not None}))


def _config_ends(config: Mapping[str, Any], who: str) -> list[int]:
    """`eos_token_id` of config.json or generation_config.json: an id, several or none."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and 0 <= token_id <= _MOST_ID for token_id in ids):
        raise ConfigError(f"{who}: eos_token_id is {value!r:.40}, not the id of a token; fetch the model again")
    return ids


def _decoder_kind(tokenizer: tokenizers.Tokenizer, path: str) -> Literal["byte-level", "sentencepiece"]:
    decoder = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()  # its part of tokenizer.json
    if b"ByteLevel" in decoder:
        return "byte-level"
    if b"ByteFallback" in decoder or b"Metaspace" in decoder:
        return "sentencepiece"
    raise ConfigError(f"model {path}: this kind of tokenizer is not supported (neither byte-level nor SentencePiece)")


# GPT-2's character for each byte: its own where that is printable; the others have those from 256 on, in order.
_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
_BYTE_OF = dict(zip(_LETTERS, sorted(range(256), key=lambda byte: chr(byte) not in _LETTERS), strict=True))
