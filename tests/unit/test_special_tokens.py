"""Which special tokens a model has, as transformers finds them in its files; what a GGUF file names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from ssd_runtime.errors import ConfigError, RequestError
from ssd_runtime.model.text.tokenizer import Tokenizer
from tests.tiny_models import add_byte_level_tokenizer, tiny_tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def model_of(directory: Path, tokenizer: tokenizers.Tokenizer, **files: Any) -> str:
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return str(directory)


CLASSES = [None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "NoSuchTokenizer"]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, sentencepiece])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_where_the_files_are_silent_the_tokenizers_class_speaks_as_in_transformers(
    tmp_path: Path, family: str, tokenizer: Any
) -> None:
    for number, (name, named) in enumerate(itertools.product(CLASSES, [{}, {"eos_token": None, "pad_token": "a"}])):
        directory = tmp_path / str(number)
        directory.mkdir()
        config = None if name is None and not named else {"tokenizer_class": name, **named}
        path = model_of(directory, tokenizer(), config={"model_type": family}, tokenizer_config=config)
        expected = transformers.AutoTokenizer.from_pretrained(path).special_tokens_map
        assert Tokenizer.from_model(path).special_tokens == expected, (name, named)


@pytest.mark.parametrize("decoder", [None, {"298": {"content": "<|endoftext|>", "special": True}}])
def test_special_tokens_map_speaks_where_transformers_still_reads_it(tmp_path: Path, decoder: Any) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "a", "eos_token": "b", "cls_token": "c"}
    if decoder is not None:
        config["added_tokens_decoder"] = decoder
    path = model_of(
        tmp_path,
        tiny_tokenizer(),
        config={"model_type": "llama"},
        tokenizer_config=config,
        special_tokens_map={
            "bos_token": {"content": "<|im_end|>", "lstrip": False},
            "eos_token": "d",
            "sep_token": "e",
        },
    )
    special = Tokenizer.from_model(path).special_tokens
    assert special == transformers.AutoTokenizer.from_pretrained(path).special_tokens_map
    assert special["eos_token"] == ("d" if decoder is None else "b")


@pytest.mark.parametrize("value", [5, ["a"], {"text": "a"}, {"content": 5}, True])
def test_what_is_no_token_is_refused_by_name(tmp_path: Path, value: object) -> None:
    path = model_of(tmp_path, tiny_tokenizer(), tokenizer_config={"bos_token": value})
    with pytest.raises(ConfigError, match=r"bos_token in tokenizer_config\.json is .*, not a token"):
        Tokenizer.from_model(path)


@pytest.mark.parametrize("file", ["config", "generation_config"])
@pytest.mark.parametrize("value", ["</s>", [1, "2"], -1, 1.0, True, 10**30, {"a": 1}, [[1]]])
def test_an_end_that_is_no_id_is_refused_by_name(tmp_path: Path, file: str, value: object) -> None:
    path = model_of(tmp_path, tiny_tokenizer(), **{file: {"eos_token_id": value}})
    with pytest.raises(ConfigError, match=r"eos_token_id is .*, not the id of a token; fetch the model again"):
        Tokenizer.from_model(path)


def gguf_of(path: Path, **metadata: int | bool | str) -> str:
    """Named by what follows "tokenizer."; an end token is there already."""
    writer = gguf.GGUFWriter(path, "llama")
    add_byte_level_tokenizer(writer, tiny_tokenizer(), "gpt-2")
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ unk_token is defined }}|{{ pad_token }}"
MESSAGES = [{"role": "user", "content": "x"}]


def test_a_gguf_files_special_tokens_are_those_it_names_by_id(tmp_path: Path) -> None:
    path = gguf_of(
        tmp_path / "model.gguf",
        **{"ggml.bos_token_id": 299, "ggml.padding_token_id": (1 << 32) - 1, "chat_template": TEMPLATE},
    )
    tokenizer = Tokenizer.from_model(path)
    assert tokenizer.special_tokens == {"bos_token": "<|im_end|>", "eos_token": "<|endoftext|>"}
    assert tokenizer.chat(MESSAGES) == "<|im_end|>|<|endoftext|>|False|"
    path = gguf_of(tmp_path / "without.gguf", chat_template=TEMPLATE)
    assert Tokenizer.from_model(path).chat(MESSAGES) == "|<|endoftext|>|False|"


@pytest.mark.parametrize("front", [None, False, True])
@pytest.mark.parametrize("behind", [None, False, True])
def test_a_gguf_file_says_what_stands_around_a_text(tmp_path: Path, front: bool | None, behind: bool | None) -> None:
    said = {"ggml.add_bos_token": front, "ggml.add_eos_token": behind}
    said = {key: value for key, value in said.items() if value is not None}
    path = gguf_of(tmp_path / "model.gguf", **{"ggml.bos_token_id": 299}, **said)
    plain = tiny_tokenizer().encode("hello").ids
    tokenizer = Tokenizer.from_model(path)
    assert tokenizer.encode("hello") == [299] * bool(front) + plain + [298] * bool(behind)
    assert tokenizer.encode("hello", add_special=False) == plain


@pytest.mark.parametrize("key", ["bos", "eot", "unknown", "padding"])
@pytest.mark.parametrize("value", [300, 1 << 31, "<s>", True])
def test_an_id_beyond_a_gguf_files_vocabulary_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    path = gguf_of(tmp_path / "model.gguf", **{f"ggml.{key}_token_id": value})
    with pytest.raises(ConfigError, match=rf"tokenizer\.ggml\.{key}_token_id is .*, not one of its 300 tokens"):
        Tokenizer.from_model(path)


def test_a_gguf_file_that_asks_for_a_token_it_does_not_name_is_refused(tmp_path: Path) -> None:
    path = gguf_of(tmp_path / "model.gguf", **{"ggml.add_bos_token": True})
    with pytest.raises(ConfigError, match=r"add_bos_token is set and tokenizer\.ggml\.bos_token_id names no token"):
        Tokenizer.from_model(path)


def test_a_text_the_tokenizer_cannot_read_is_a_failure_of_the_request(tmp_path: Path) -> None:
    path = model_of(tmp_path, tiny_tokenizer(), tokenizer_config={"chat_template": "\ud800{{ messages[0].content }}"})
    tokenizer = Tokenizer.from_model(path)
    for add_special in (True, False):
        with pytest.raises(
            RequestError, match="the model's tokenizer cannot read this text: it holds half of a surrogate pair"
        ):
            tokenizer.encode("a\udcff", add_special=add_special)
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode(tokenizer.chat(MESSAGES), add_special=False)
    broken = sentencepiece()
    broken.model = models.BPE({"a": 0, "▁": 1}, [], unk_token="<none>", byte_fallback=True)
    with pytest.raises(RequestError, match="cannot read this text: Unk token"):
        Tokenizer.from_model(model_of(tmp_path, broken)).encode("b")


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(("error", "expected"), [(PanicException("boom"), RequestError), (KeyboardInterrupt(), None)])
def test_a_panic_of_the_tokenizer_is_a_failure_and_an_interrupt_is_not(
    tmp_path: Path, error: BaseException, expected: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panics:
        def encode(self, *given: object, **named: object) -> None:
            raise error

    tokenizer = Tokenizer.from_model(model_of(tmp_path, tiny_tokenizer()))
    monkeypatch.setattr(tokenizer, "_tokenizer", Panics())
    with pytest.raises(expected or type(error)):
        tokenizer.encode("a")
