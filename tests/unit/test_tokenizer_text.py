"""Tokenizers of both formats against transformers', streaming, end tokens and chat templates."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.text.tokenizer import Detokenizer, Tokenizer
from ssd_runtime.model.text.vocabulary import Vocabulary
from tests.tiny_models import add_byte_level_tokenizer, tiny_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\n\nnew lines\r\n   and   runs    of spaces \n \n x",
    "digits 1 12 123 1234 12345678 3.14159 ١٢٣ ½",
    "I'm you're WE'LL they'd 'tis it's DON'T",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n\n\tif a != b: c += 1_000',
    "naïve café Å e\u0301 ﬁ Ω 你好，世界。 こんにちは мир مرحبا שלום ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u200bf \u00a0\u3000x \u2028 ",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start| >",
    "$100 + €5 = ~£3^2 <=> `code` ||| a|b",
    "\x00\x07\x7f\x80",
]
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


def byte_level(*splits: pre_tokenizers.PreTokenizer, use_regex: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


# As in tokenizer.json of SmolLM2, Qwen2.5, Llama 3 and GPT-2.
PRE_TOKENIZERS = {
    "smollm": byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "qwen2": byte_level(pre_tokenizers.Split(Regex(WORDS + LETTERS + r"|\p{N}" + TAIL), "isolated")),
    "llama-bpe": byte_level(pre_tokenizers.Split(Regex(WORDS + LETTERS + r"|\p{N}{1,3}" + TAIL), "isolated")),
    "gpt-2": byte_level(use_regex=True),
}


def gguf_of(path: Path, tokenizer: tokenizers.Tokenizer, pre: str, **metadata: Any) -> str:
    writer = gguf.GGUFWriter(path, "llama")
    add_byte_level_tokenizer(writer, tokenizer, pre)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def hf_of(directory: Path, tokenizer: tokenizers.Tokenizer, **files: dict[str, Any]) -> str:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return str(directory)


@pytest.mark.model
def test_smollm2_gguf_encodes_and_decodes_as_transformers(smollm2_path: str) -> None:
    directory, file = os.path.split(smollm2_path)
    reference = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=file)
    # transformers' reader leaves out the split at digits, which the model's own tokenizer.json has
    reference.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS["smollm"]
    tokenizer = Tokenizer.from_model(smollm2_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids, skip_special=False) == text
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_gguf_pre_tokenizers_are_those_of_tokenizer_json(tmp_path: Path, pre: str) -> None:
    original = tiny_tokenizer(PRE_TOKENIZERS[pre], vocab_size=340)
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    rebuilt = Tokenizer.from_model(gguf_of(tmp_path / "model.gguf", original, pre))
    pre_tokenizer = rebuilt._tokenizer.pre_tokenizer
    assert pre_tokenizer is not None
    for text in TEXTS:
        assert rebuilt.encode(text, add_special=False) == original.encode(text).ids, text
        pieces = [piece for piece, _ in PRE_TOKENIZERS[pre].pre_tokenize_str(text)]
        assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("form", ["gguf", "hf"])
@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, form: str, text: str) -> None:
    tokenizer = ROUND_TRIP.get(form)
    if tokenizer is None:
        directory = tmp_path_factory.mktemp(form)
        original = tiny_tokenizer()
        path = hf_of(directory, original) if form == "hf" else gguf_of(directory / "model.gguf", original, "gpt-2")
        tokenizer = ROUND_TRIP.setdefault(form, Tokenizer.from_model(path))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, ids) == text


ROUND_TRIP: dict[str, Tokenizer] = {}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()


def test_streaming_holds_back_half_a_character(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_model(hf_of(tmp_path, tiny_tokenizer()))
    first, *rest = tokenizer.encode("🙂")
    assert len(rest) == 3
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token_id) for token_id in (first, *rest)] == ["", "", "", "🙂"]
    assert detokenizer.push(first) == ""
    assert detokenizer.push(tokenizer.encode("a")[0]) == "\ufffda"  # it was no character after all
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 305)))
def test_streamed_text_of_any_tokens_is_the_decoded_text(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int]
) -> None:
    tokenizer = ROUND_TRIP.get("hf")
    if tokenizer is None:
        tokenizer = ROUND_TRIP.setdefault(
            "hf", Tokenizer.from_model(hf_of(tmp_path_factory.mktemp("any"), tiny_tokenizer()))
        )
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_end_tokens_come_from_every_file_that_names_them(tmp_path: Path) -> None:
    original = tiny_tokenizer()  # 298 is <|endoftext|>, 299 is <|im_end|>
    path = hf_of(
        tmp_path / "hf",
        original,
        config={"eos_token_id": 5},
        generation_config={"eos_token_id": [6, 7]},
        tokenizer_config={"eos_token": {"content": "<|endoftext|>"}},
    )
    tokenizer = Tokenizer.from_model(path)
    assert tokenizer.eos_token_ids == (5, 6, 7, 298, 299)
    path = gguf_of(tmp_path / "model.gguf", original, "gpt-2", **{"ggml.eot_token_id": 9})
    assert Tokenizer.from_model(path).eos_token_ids == (9, 298, 299)


def test_bos_is_put_in_front_where_the_model_wants_it(tmp_path: Path) -> None:
    original = tiny_tokenizer()
    path = gguf_of(tmp_path / "a.gguf", original, "gpt-2", **{"ggml.bos_token_id": 298, "ggml.add_bos_token": True})
    tokenizer = Tokenizer.from_model(path)
    plain = original.encode("hello").ids
    assert tokenizer.encode("hello") == [298, *plain]
    assert tokenizer.encode("hello", add_special=False) == plain
    original.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 298)])
    tokenizer = Tokenizer.from_model(hf_of(tmp_path / "hf", original))
    assert tokenizer.encode("hello") == [298, *plain]
    assert tokenizer.encode("hello", add_special=False) == plain


@pytest.mark.model
def test_chat_renders_as_transformers_does(smollm2_path: str) -> None:
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer())
    messages = [{"role": "user", "content": "hi\n{{ 7 * 7 }}"}, {"role": "assistant", "content": "<b>"}]
    messages += [{"role": "user", "content": "bye"}]
    template = Tokenizer.from_model(smollm2_path)._chat_template._templates["default"]
    expected = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert Tokenizer.from_model(smollm2_path).chat(messages) == expected


def test_unsupported_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pre-tokenizer 'klingon' is not supported"):
        Tokenizer.from_model(gguf_of(tmp_path / "model.gguf", tiny_tokenizer(), "klingon"))
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ConfigError, match="neither byte-level nor SentencePiece"):
        Tokenizer.from_model(hf_of(tmp_path / "hf", words))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer.from_model(str(tmp_path / "hf"))


def test_sentencepiece_gguf_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *([6] * 256)]
    words = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "he",
        "ll",
        "▁he",
        "llo",
        "▁hello",
        "or",
        "▁w",
        "▁wor",
        "ld",
        "▁world",
    ]
    pieces, kinds = pieces + words, kinds + [1] * len(words)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(words))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = Tokenizer.from_model(str(tmp_path / "model.gguf"))
    ids = tokenizer.encode("hello world é</s>")
    assert [pieces[i] for i in ids] == ["<s>", "▁hello", "▁world", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(ids) == "hello world é"
    assert streamed(tokenizer, ids) == " hello world é"
    assert tokenizer.eos_token_ids == (2,)


def test_vocabularies_are_equal_up_to_padding_at_the_end() -> None:
    plain = Vocabulary.from_tokens(["a", "b", "c"])
    padded = Vocabulary.from_tokens(["a", "b", "c", "", "[PAD4]", "[PAD5]"])
    assert plain.difference(padded) is None
    assert plain == padded
    assert plain.digest() == padded.digest()
    other = Vocabulary.from_tokens(["a", "x", "c"])
    assert plain.difference(other) == "the vocabularies differ first at id 1: 'b' and 'x'"
    longer = Vocabulary.from_tokens(["a", "b", "c", "d"])
    assert plain.difference(longer) == "the vocabularies have 3 and 4 tokens: id 3 is 'd' in one only"
    assert longer.difference(plain) is not None


def test_special_tokens_are_skipped_when_asked(tmp_path: Path) -> None:
    original = tiny_tokenizer()
    original.add_tokens([AddedToken("<tool>", normalized=False)])
    assert isinstance(original.decoder, decoders.Decoder)
    tokenizer = Tokenizer.from_model(hf_of(tmp_path, original))
    ids = tokenizer.encode("a<tool>b<|im_end|>")
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special=False) == "a<tool>b<|im_end|>"
    detokenizer = Detokenizer(tokenizer, skip_special=False)
    assert "".join(map(detokenizer.push, ids)) == "a<tool>b<|im_end|>"
