"""Every tensor of a model file is used, known to be unneeded, or refused by name; NaN and infinity are found."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ssd_runtime.config import Dtype
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.header import open_weights
from ssd_runtime.model.load import decoder_from_weights, load_decoder
from tests.tiny_models import CPU, PagedRun
from tests.unit.test_model_logits import TOKENS, convert_to_gguf, reference_logits, save_random

FORMATS = ("hf", "gguf")


@cache
def everything() -> tuple[TemporaryDirectory[str], dict[str, str]]:
    """A Llama with every optional tensor, in both formats: path by format."""
    folder = TemporaryDirectory()
    save_random(Path(folder.name) / "hf", "llama-everything")
    source = open_weights(str(Path(folder.name) / "hf"))
    return folder, {
        "hf": str(Path(folder.name) / "hf"),
        "gguf": convert_to_gguf(Path(folder.name) / "model.gguf", source),
    }


def changed(target: Path, kind: str, tensors: dict[str, Any]) -> str:
    """A copy of that model with these tensors besides its own, or in their place."""
    path = everything()[1][kind]
    if kind == "hf":
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text((Path(path) / "config.json").read_text())
        stored = load_file(Path(path) / "model.safetensors")
        save_file(
            stored | {name: torch.as_tensor(value) for name, value in tensors.items()}, target / "model.safetensors"
        )
        return str(target)
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, tensor.data)
    for name, value in tensors.items():
        writer.add_tensor(name, np.asarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)


def refusal(path: str, dtype: Dtype = "fp32") -> str:
    with pytest.raises(ConfigError) as caught:
        decoder_from_weights(open_weights(path), dtype, CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert path in message
    return message


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=15)
@given(name=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=60))
def test_an_extra_tensor_of_any_name_is_refused_by_name(kind: str, name: str) -> None:
    with TemporaryDirectory() as folder:
        path = changed(Path(folder) / "model", kind, {name: np.zeros(2, np.float32)})
        assert name[:40] in refusal(path).replace("\\\\", "\\").replace("\\'", "'")


EXTRA = {
    "hf": [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.input_layernorm.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.bias",
        "lm_head.bias",
        "model.lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
    "gguf": [
        "blk.0.attn_q_norm.weight",
        "blk.1.attn_norm.bias",
        "blk.2.ffn_up.weight",
        "output_norm.bias",
        "output.bias",
        "rope_factors_long.weight",
        "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_q.scale",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in EXTRA.items() for name in names])
def test_a_tensor_that_would_change_the_logits_elsewhere_is_refused_by_name(
    tmp_path: Path, kind: str, name: str
) -> None:
    assert name in refusal(changed(tmp_path / "model", kind, {name: np.zeros(32, np.float32)}))


UNNEEDED = {
    "hf": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.position_ids"],
    "gguf": ["blk.0.attn_rot_embd.weight"],
}
DTYPES: dict[str, list[Any]] = {
    "hf": [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64, torch.float32],
    "gguf": [np.int64, np.int8, np.float64, np.float32],
}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_unneeded_tensor_is_passed_over_whatever_its_dtype(tmp_path: Path, kind: str) -> None:
    expected = PagedRun(load_decoder(everything()[1][kind], "fp32", CPU)).trunk(TOKENS)
    for number, (name, dtype) in enumerate((name, dtype) for name in UNNEEDED[kind] for dtype in DTYPES[kind]):
        value = torch.zeros(8, dtype=dtype) if kind == "hf" else np.zeros(8, dtype)
        path = changed(tmp_path / str(number), kind, {name: value})
        assert torch.equal(PagedRun(load_decoder(path, "fp32", CPU)).trunk(TOKENS), expected)


def test_a_tensor_that_is_used_needs_a_dtype_that_can_be_read(tmp_path: Path) -> None:
    norm = torch.ones(32, dtype=torch.int64)
    message = refusal(changed(tmp_path / "hf", "hf", {"model.norm.weight": norm}))
    assert "model.norm.weight is I64" in message
    message = refusal(changed(tmp_path / "m.gguf", "gguf", {"output_norm.weight": norm.numpy()}))
    assert "output_norm.weight is I64" in message


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    message = refusal(changed(tmp_path / "hf", "hf", {"norm.weight": torch.ones(32)}))
    assert "model.norm.weight" in message and " norm.weight" in message  # noqa: PT018 (one promise)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_tied_embeddings_is_tied_only_if_they_are_equal(tmp_path: Path, equal: bool) -> None:
    save_random(tmp_path, "llama-tied")
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.clone() if equal else table.flip(0)}, tmp_path / "model.safetensors")
    expected = reference_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    found = PagedRun(load_decoder(str(tmp_path), "fp32", CPU)).trunk(TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_adapter_is_not_left_out_in_silence(tmp_path: Path) -> None:
    path = changed(tmp_path / "hf", "hf", {})
    Path(path, "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "adapter_config.json" in refusal(path)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def stored(kind: str) -> dict[str, Any]:
    path = everything()[1][kind]
    if kind == "hf":
        return {name: tensor.numpy() for name, tensor in load_file(Path(path) / "model.safetensors").items()}
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", FORMATS)
def test_nan_and_infinity_are_found_in_every_tensor_at_every_dtype(tmp_path: Path, kind: str) -> None:
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16", "int8", "int4")
    for number, (name, value) in enumerate(stored(kind).items()):
        damaged = np.array(value)
        damaged.reshape(-1)[-1 - number % 5] = (np.nan, np.inf, -np.inf)[number % 3]
        path = changed(tmp_path / str(number), kind, {name: damaged})
        message = refusal(path, dtypes[number % 4] if "rope" not in name else "fp32")
        assert "NaN or infinity" in message
        assert name.removeprefix("model.") in message or kind == "gguf"


def test_a_number_that_only_the_wanted_dtype_cannot_hold_is_found(tmp_path: Path) -> None:
    norm = torch.full((32,), 3.4e38)
    path = changed(tmp_path / "hf", "hf", {"model.norm.weight": norm})
    load_decoder(path, "fp32", CPU)  # a sum beyond float32 is no infinity in the tensor
    assert "norm.weight: NaN or infinity (torch.bfloat16)" in refusal(path, "bf16")


def test_rope_factors_that_divide_by_nothing_are_found(tmp_path: Path) -> None:
    factors = np.zeros(8, np.float32)
    assert "rope_freqs.weight" in refusal(changed(tmp_path / "m.gguf", "gguf", {"rope_freqs.weight": factors}))
    wrong = np.ones(9, np.float32)
    assert "rope_freqs.weight has shape (9,)" in refusal(
        changed(tmp_path / "w.gguf", "gguf", {"rope_freqs.weight": wrong})
    )
