"""Text to tokens and back, and the chat template, from a model's own files. Knows no weights.

In both kinds of tokenizer read here (byte-level BPE, SentencePiece with byte fallback) a token's bytes do not depend on
its neighbours, so text can be streamed exactly: `Detokenizer`.
"""

from __future__ import annotations

import codecs
import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ssd_runtime.errors import ConfigError, RequestError
from ssd_runtime.model.gguf_file import open_gguf
from ssd_runtime.model.tokenizer_gguf import brief, tokenizer_from_gguf
from ssd_runtime.model.vocabulary import Vocabulary
from ssd_runtime.model.weights_hf import read_json

_CHAT_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>", "<end_of_turn>")
_GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class _Parts:
    """What differs between the formats.

    Attributes:
        bos_token_id: put in front by `encode`; None for the library's own post-processing.
        template: source of the chat template.
    """

    tokenizer: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos: bool
    template: str | None


class Tokenizer:
    """A model's tokenizer; `from_model` makes one.

    Attributes:
        eos_token_ids: every id that ends an answer, sorted.
        bos_token_id: the id texts begin with, None if the model has none.
        vocab_size: ids the tokenizer knows; the model's table may be larger.
        longest_token: no token stands for more characters of a text.
    """

    def __init__(self, path: str, parts: _Parts) -> None:
        self._path = path
        self._tokenizer = parts.tokenizer
        self._add_bos = parts.add_bos
        self._template = parts.template
        self.eos_token_ids = parts.eos_token_ids
        self.bos_token_id = parts.bos_token_id
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._tokens = [""] * self.vocab_size
        for token, token_id in vocabulary.items():
            self._tokens[token_id] = token
        self.longest_token = max(map(len, self._tokens), default=1)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._kind = _decoder_kind(self._tokenizer, path)

    @classmethod
    def from_model(cls, path: str) -> Tokenizer:
        """From a Hugging Face directory or a GGUF file. Raises ConfigError with the remedy."""
        return cls(path, _hf_parts(Path(path)) if Path(path).is_dir() else _gguf_parts(path))

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; `add_special` puts in front (and behind) what the model expects around a plain text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        if add_special and self._add_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of a whole sequence; ids of the table's padding are nothing."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as the model's template writes it, up to where the assistant answers.

        Encode the result with `add_special=False`: templates write the special tokens themselves.

        Raises:
            ConfigError: the model has no chat template, or one that does not parse.
            RequestError: the template refuses the messages.
        """
        if self._template is None:
            raise ConfigError(f"model {self._path} has no chat template; use a plain prompt")
        try:
            template = _environment().from_string(self._template)
        except jinja2.TemplateError as error:
            who = f"model {self._path}"
            raise ConfigError(f"{who}: its chat template does not parse ({error}); use a plain prompt") from None
        eos = self._tokens[self.eos_token_ids[0]] if self.eos_token_ids else ""
        bos = self._tokens[self.bos_token_id] if self.bos_token_id is not None else ""
        try:
            return template.render(messages=list(messages), add_generation_prompt=True, bos_token=bos, eos_token=eos)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from None

    def vocabulary(self) -> Vocabulary:
        """For the comparison with another model's."""
        return Vocabulary.from_tokens(self._tokens)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """What one token adds to a text; nothing for skipped and unknown ids."""
        if not 0 <= token_id < self.vocab_size or (skip_special and token_id in self._special_ids):
            return b""
        token = self._tokens[token_id]
        if self._kind == "byte-level":
            if all(character in _BYTE_OF for character in token):
                return bytes(_BYTE_OF[character] for character in token)
            return token.encode()
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
    file = open_gguf(path)
    tokenizer = tokenizer_from_gguf(file)
    named = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in (*_GGUF_ENDS, "bos_token_id")}
    bos = named.pop("bos_token_id")
    pre_adds_bos = file.metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")
    default = pre_adds_bos or file.metadata.get("tokenizer.ggml.model") == "llama"
    return _Parts(
        tokenizer=tokenizer,
        eos_token_ids=_end_ids(tokenizer, (value for value in named.values() if value is not None)),
        bos_token_id=bos,
        add_bos=bool(file.metadata.get("tokenizer.ggml.add_bos_token", default)),
        template=file.metadata.get("tokenizer.chat_template"),
    )


def _hf_parts(directory: Path) -> _Parts:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"model {directory} has no tokenizer.json; put the one of its model family there")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (`tokenizers` raises bare Exception)
        raise ConfigError(f"{path} cannot be read ({brief(error)}); fetch the model again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config, generation, extra = (
        read_json(directory / name) if (directory / name).exists() else {}
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    ends: list[int | None] = [*_as_list(generation.get("eos_token_id")), *_as_list(config.get("eos_token_id"))]
    ends += [tokenizer.token_to_id(token) for token in (_token_text(extra.get("eos_token")),) if token]
    bos_text = _token_text(extra.get("bos_token"))
    bos = tokenizer.token_to_id(bos_text) if bos_text else config.get("bos_token_id")
    return _Parts(
        tokenizer=tokenizer,
        eos_token_ids=_end_ids(tokenizer, ends),
        bos_token_id=bos,
        add_bos=False,  # the post-processor in tokenizer.json does it
        template=_hf_template(directory, extra),
    )


def _hf_template(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _end_ids(tokenizer: tokenizers.Tokenizer, ids: Iterable[int | None]) -> tuple[int, ...]:
    chat_ends = (tokenizer.token_to_id(token) for token in _CHAT_ENDS)
    return tuple(sorted({int(token_id) for token_id in (*ids, *chat_ends) if token_id is not None}))


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: a string, or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _decoder_kind(tokenizer: tokenizers.Tokenizer, path: str) -> Literal["byte-level", "sentencepiece"]:
    decoder = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()  # its part of tokenizer.json
    if b"ByteLevel" in decoder:
        return "byte-level"
    if b"ByteFallback" in decoder or b"Metaspace" in decoder:
        return "sentencepiece"
    raise ConfigError(f"model {path}: this kind of tokenizer is not supported (neither byte-level nor SentencePiece)")


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders chat templates (utils/chat_template_utils.py)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _byte_table() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted (openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_table()
