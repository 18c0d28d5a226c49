"""Any value at any key of a GGUF header: honoured as llama.cpp does, or a refusal that names the key."""

from __future__ import annotations

import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import Keys
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.gguf_header import open_gguf
from ssd_runtime.model.files.header import inspect_model, open_weights
from ssd_runtime.model.load import load_decoder
from tests.tiny_models import CPU, PagedRun, tiny_architecture, write_gguf
from tests.unit.test_model_logits import TOKENS, convert_to_gguf, reference_logits, save_random

GENERAL = ["general.alignment", "general.type", "general.architecture", "split.count", "split.no"]
GENERAL += [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores", "merges", "model", "pre")]
ARCH = tiny_architecture(num_layers=1, vocab_size=16, hidden_size=8, head_dim=2, intermediate_size=8)
HONOURED = {  # what may be different then, by key
    "llama.context_length": "max_position",
    "llama.attention.sliding_window": "sliding_window",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "llama.rope.scaling.factor": "rope_scaling",
    "llama.rope.scale_linear": "rope_scaling",
}
KEYS = sorted(
    value.format(arch="llama", dense="dense")
    for group in vars(Keys).values()
    if isinstance(group, type)
    for value in vars(group).values()
    if isinstance(value, str) and "{arch}" in value
)


def small_file(path: Path, **metadata: Any) -> str:
    sizes = {"token_embd": (16, 8), "output": (16, 8), "output_norm": (8,)}
    layer = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "attn_norm": (8,)}
    layer |= {"ffn_gate": (8, 8), "ffn_up": (8, 8), "ffn_down": (8, 8), "ffn_norm": (8,)}
    shapes = sizes | {f"blk.0.{name}": shape for name, shape in layer.items()}
    tensors = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    return write_gguf(path, ARCH, tensors, metadata)


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        inspect_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path in message
    return message


values = st.one_of(
    st.integers(0, 64),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=8),
    st.sampled_from(["none", "linear", "yarn", "longrope"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
)


@settings(max_examples=300)
@given(key=st.sampled_from([*KEYS, "llama.rope.scale_linear", "llama.of_tomorrow"]), value=values)
def test_any_value_at_any_key_of_the_architecture_is_honoured_harmless_or_refused_by_name(key: str, value: Any) -> None:
    with TemporaryDirectory() as folder:
        expected = open_weights(small_file(Path(folder) / "base.gguf")).architecture
        path = small_file(Path(folder) / "model.gguf", **{key: value})
        try:
            found = open_weights(path).architecture
        except ConfigError as error:
            found, message = expected, str(error)
        else:
            message = key
        assert "\n" not in message
        assert key in message or "tensor" in message or "head" in message, (key, value, message)
        for name in expected.__dataclass_fields__:
            assert name == HONOURED.get(key) or getattr(found, name) == getattr(expected, name), (key, value, name)


@settings(max_examples=100)
@given(key=st.sampled_from(GENERAL), value=values)
def test_nonsense_at_a_general_key_is_one_line(key: str, value: Any) -> None:
    with TemporaryDirectory() as folder:
        path = small_file(Path(folder) / "model.gguf", **{key: value})
        if key == "general.alignment":  # the writer would obey
            path = small_file(Path(folder) / "model.gguf", **{"general.alignmens": value})
            Path(path).write_bytes(Path(path).read_bytes().replace(b"general.alignmens", b"general.alignment"))
        refusal(path)  # at least: it has no tokenizer


# ---- rope scaling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "scaled"),
    [
        ({"rope.scaling.factor": 4.0}, True),  # alone: linear
        ({"rope.scale_linear": 4.0}, True),  # its old name
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, True),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, True),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, False),
        ({"rope.scaling.type": "linear"}, False),
        ({"rope.scaling.factor": 0.0}, False),
        ({"rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0}, False),
    ],
)
def test_scaling_is_read_as_llama_cpp_reads_it(tmp_path: Path, metadata: dict[str, Any], scaled: bool) -> None:
    expected = reference_logits(save_random(tmp_path / "hf", "linear-rope" if scaled else "llama"))
    source = open_weights(str(tmp_path / "hf"))
    path = convert_to_gguf(tmp_path / "m.gguf", source, {f"llama.{key}": value for key, value in metadata.items()})
    found = PagedRun(load_decoder(path, "fp32", CPU)).trunk(TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic"])
def test_other_scalings_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    message = refusal(small_file(tmp_path / "m.gguf", **{"llama.rope.scaling.type": kind}))
    assert f"llama.rope.scaling.type '{kind}'" in message


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_part_of_a_split_file_is_told_from_an_incomplete_one(tmp_path: Path) -> None:
    path = small_file(tmp_path / "m-00002-of-00003.gguf", **{"split.no": 1, "split.count": 3, "split.tensors.count": 9})
    message = refusal(path)
    assert "part 2 of 3 of a split GGUF file" in message
    assert "llama-gguf-split --merge" in message
    assert "incomplete" not in message
    open_gguf(small_file(tmp_path / "whole.gguf", **{"split.no": 0, "split.count": 1}))


def header(*keys: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys)


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def test_headers_that_ggml_would_not_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    number = struct.pack("<I", 7)
    path.write_bytes(header(key("a", 4, number), key("a", 4, number)))
    assert "key 'a' is there twice" in refusal(str(path))
    nested = struct.pack("<IQ", 9, 1) * 100_000
    path.write_bytes(header(key("a", 9, nested)))
    assert "an array of type 9" in refusal(str(path))
    for alignment in (0, 3):
        path.write_bytes(header(key("general.alignment", 4, struct.pack("<I", alignment))))
        assert f"an alignment of {alignment}" in refusal(str(path))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    assert "general.type 'adapter'" in refusal(small_file(tmp_path / "m.gguf", **{"general.type": "adapter"}))


def test_every_kind_that_the_library_writes_is_read_or_refused_by_name(tmp_path: Path) -> None:
    for kind in gguf.GGMLQuantizationType:
        path = tmp_path / f"{kind.name}.gguf"
        tensors = {"token_embd.weight": np.zeros((4, 256), np.float32)}
        write_gguf(path, tiny_architecture(hidden_size=256, vocab_size=4), tensors)
        content = path.read_bytes()
        at = content.index(b"token_embd.weight") + 17 + 4 + 16
        path.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
        assert "token_embd.weight" in refusal(str(path)) or "no tensor" in refusal(str(path))
