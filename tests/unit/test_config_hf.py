"""Any value at any key of config.json: transformers' logits, or a refusal that names the key."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.header import open_weights
from ssd_runtime.model.files.hf_config import architecture_from_config
from ssd_runtime.model.load import decoder_from_weights
from tests.tiny_models import CPU, PagedRun, random_weight

TOKENS = torch.randint(0, 48, (24,), generator=torch.Generator().manual_seed(7)).tolist()
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 4}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "qwen2": ("Qwen2", {"rope_parameters": LINEAR}),
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 30}),
}

# What transformers looks at and no logit depends on: training, precision, what is returned, parallelism, names.
HARMLESS = """
attention_dropout initializer_range use_cache pad_token_id bos_token_id eos_token_id dtype gradient_checkpointing
output_hidden_states output_attentions _output_attentions return_dict id2label num_labels problem_type name_or_path
_name_or_path _attn_implementation _attn_implementation_internal _experts_implementation
_experts_implementation_internal mtp_layer_types base_model_tp_plan base_model_pp_plan base_model_ep_plan
base_model_fsdp_plan vision_aspect_ratio vision_feature_layer vision_feature_select_strategy
"""
# Its own workings: a file cannot set them, or they are another key's.
WORKINGS = """
_heterogeneity_spec is_heterogeneous sub_configs sub_configs_defaults default_theta default_rope_type
_remove_keys_not_serialized _update_heterogeneous_to_dict_output
"""
# Where the tensors say that the key is wrong, the refusal may name these.
STRUCTURAL = {"attention_bias", "mlp_bias", "model_type", *SIZES}


@dataclass(frozen=True)
class Model:
    """A random model as transformers saves it, with every option of its family."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    directory: TemporaryDirectory[str]

    def refusal_or_logits(self, config: dict[str, Any]) -> str | Tensor:
        """What this project makes of the same weights under another config.json."""
        with TemporaryDirectory() as directory:
            os.link(Path(self.directory.name) / "model.safetensors", Path(directory) / "model.safetensors")
            Path(directory, "config.json").write_text(json.dumps(config))
            try:
                source = open_weights(directory)
                source.architecture.check_length(len(TOKENS), "model: max_position_embeddings")
                return PagedRun(decoder_from_weights(source, "fp32", CPU)).trunk(TOKENS)
            except ConfigError as error:
                return str(error)

    @torch.inference_mode()
    def reference(self, config: dict[str, Any]) -> Tensor:
        """What transformers makes of them; raises whatever it raises."""
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**copy.deepcopy(config)), attn_implementation="eager"
        )
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # both are in the file
        missing, _ = model.float().load_state_dict(self.tensors, strict=False)
        assert not missing
        logits: Tensor = model.eval()(torch.tensor([TOKENS])).logits[0]
        return logits


@cache
def model_of(family: str) -> Model:
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(SIZES | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(3)
    tensors = {name: random_weight(name, tensor.shape, generator) for name, tensor in model.state_dict().items()}
    directory = TemporaryDirectory()
    save_file(tensors, Path(directory.name) / "model.safetensors")
    return Model(json.loads(config.to_json_string(use_diff=False)), tensors, directory)


def check(family: str, changes: Mapping[str, Any]) -> None:
    """Logits or a refusal. Where transformers itself fails, ours may be what it gives without the harmless changes, or
    without any."""
    model = model_of(family)
    found = model.refusal_or_logits(model.config | changes)
    if isinstance(found, str):
        assert "\n" not in found
        inner = {key for value in changes.values() if isinstance(value, dict) for key in value}
        assert changes.keys() & STRUCTURAL or any(key in found for key in {*changes, *inner} - {""}), (changes, found)
        return
    harmful = {key: value for key, value in changes.items() if key not in HARMLESS.split()}
    for understood in (changes, harmful, {}):
        try:
            expected = model.reference(model.config | understood)
            break
        except Exception:  # noqa: BLE001 (whatever it is)
            assert understood, "it fails at its own config"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


# ---- keys ------------------------------------------------------------------------------------------------------------


class Watched(Mapping[str, Any]):
    """A mapping that notes which keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_of, self.asked = values, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.values_of[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)


def keys_transformers_asks_for(family: str) -> set[str]:
    """From making the config to the last logit."""
    name, changes = FAMILIES[family]
    config_class, asked = getattr(transformers, f"{name}Config"), set[str]()

    class Spy(config_class):  # type: ignore[misc, valid-type]
        def __getattribute__(self, key: str) -> Any:
            asked.add(key)
            return super().__getattribute__(key)

    config = Spy(**copy.deepcopy(SIZES | changes))
    getattr(transformers, f"{name}ForCausalLM")(config).eval()(torch.tensor([TOKENS]))
    return {key for key in asked if not key.startswith("__") and not callable(getattr(config_class, key, None))}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_asks_for_is_honoured_refused_or_known_to_be_harmless(family: str) -> None:
    config = Watched(model_of(family).config | {"rope_parameters": LLAMA3})
    architecture_from_config(config, "model")
    asked = keys_transformers_asks_for(family)
    assert {"rope_parameters", "rms_norm_eps", "is_causal"} <= asked & config.asked
    assert sorted(asked - config.asked - {*HARMLESS.split(), *WORKINGS.split()}) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key_has_the_value_that_transformers_gives_it(family: str) -> None:
    for key in model_of(family).config.keys() - {"model_type"}:
        config = {other: value for other, value in model_of(family).config.items() if other != key}
        found = model_of(family).refusal_or_logits(config)
        if isinstance(found, str):
            assert key in found or "tensor" in found, (key, found)
        else:
            torch.testing.assert_close(found, model_of(family).reference(config), atol=1e-4, rtol=1e-4)


# ---- values ----------------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(0, 64), st.integers(), st.just(10**12), st.floats())
words = st.sampled_from(
    ["silu", "gelu", "llama", "mistral", "linear", "llama3", "yarn", "default", "sliding_attention"]
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), words),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | words, inner, max_size=3),
    max_leaves=6,
)
bases = st.sampled_from([100.0, 500, 1e4, 5e5])
lengths = st.sampled_from([16, 24, 32, 64])
ropes = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"]),
        "type": st.sampled_from(["default", "linear", "llama3", "dynamic"]),
        "rope_theta": bases,
        "factor": st.sampled_from([2, 4.0, 8.0]),
        "low_freq_factor": st.sampled_from([1, 1.5]),
        "high_freq_factor": st.sampled_from([4, 3.0]),
        "original_max_position_embeddings": lengths,
        "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
    },
)
whole_ropes = st.builds(dict.__or__, st.just(LLAMA3), ropes) | st.builds(dict.__or__, st.just(LINEAR), ropes)
# What files may well say, several keys at a time: most of it is honoured.
likely = st.fixed_dictionaries(
    {},
    optional={
        "rope_parameters": st.none() | whole_ropes,
        "rope_scaling": st.none() | whole_ropes,
        "rope_theta": bases,
        "original_max_position_embeddings": lengths,
        "max_position_embeddings": st.sampled_from([24, 64]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-2, 0.1]),
        "hidden_act": st.sampled_from(["silu", "swish"]),
        "sliding_window": st.sampled_from([None, 24, 32]),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.integers(0, 3),
        "layer_types": st.none()
        | st.lists(st.sampled_from(["full_attention"] * 9 + ["sliding_attention"]), min_size=2, max_size=2),
        "pad_token_id": st.sampled_from([None, 0, 7]),
        "pretraining_tp": st.sampled_from([1, 2]),
    },
)
OTHERS = ["rope_scaling", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "is_causal"]
OTHERS += ["quantization_config", "per_layer_config", "text_config", "attention_chunk_size", "sliding_window"]
OTHERS += ["layer_types", "use_sliding_window", "max_window_layers", "mlp_bias", "attention_bias", "some_other_key"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_at_any_key_gives_the_logits_of_transformers_or_a_refusal_that_names_it(family: str) -> None:
    keys = st.sampled_from(sorted({*model_of(family).config, *OTHERS}))

    @settings(max_examples=120)
    @given(likely | st.dictionaries(keys, anything, min_size=1, max_size=2))
    def run(changes: dict[str, Any]) -> None:
        check(family, changes)

    run()
