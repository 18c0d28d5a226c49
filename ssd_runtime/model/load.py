"""From a path to a `ModelCard` (headers only) or a `Decoder` (weights too). Knows no configuration of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ssd_runtime.config import Dtype
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.layers import Layer, Linear, rope_frequencies
from ssd_runtime.model.quantize import activation_dtype, check_dtype, make_linear
from ssd_runtime.model.source import WeightSource
from ssd_runtime.model.tokenizer import Tokenizer
from ssd_runtime.model.vocabulary import VocabularyDigest
from ssd_runtime.model.weights_gguf import GgufWeights
from ssd_runtime.model.weights_hf import HfWeights

Progress = Callable[[float], None]


@dataclass(frozen=True)
class ModelCard:
    """What a model file says of itself."""

    path: str
    format: Literal["hf", "gguf"]
    arch: Architecture
    eos_token_ids: tuple[int, ...]
    vocabulary: VocabularyDigest


def open_weights(path: str) -> WeightSource:
    """Open a Hugging Face directory or a GGUF file and check it whole, reading headers only.

    Raises:
        ConfigError: missing, truncated, damaged or unsupported; one line with the remedy.
    """
    if not Path(path).exists():
        remedy = "pass a Hugging Face directory, a GGUF file or the name of an embedded model"
        raise ConfigError(f"model {path} does not exist; {remedy}")
    return HfWeights(path) if Path(path).is_dir() else GgufWeights(path)


def inspect_model(path: str) -> ModelCard:
    """Read and check headers and tokenizer, no weights.

    Raises:
        ConfigError: as `open_weights`; or a tokenizer that is missing, damaged or another model's.
    """
    source = open_weights(path)
    tokenizer = Tokenizer.from_model(path)
    if tokenizer.vocab_size > source.architecture.vocab_size:
        raise ConfigError(
            f"model {path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding table only "
            f"{source.architecture.vocab_size}; the tokenizer belongs to another model"
        )
    return ModelCard(
        path=path,
        format="hf" if Path(path).is_dir() else "gguf",
        arch=source.architecture,
        eos_token_ids=tokenizer.eos_token_ids,
        vocabulary=tokenizer.vocabulary(),
    )


def load_decoder(path: str, dtype: Dtype, device: torch.device, progress: Progress | None = None) -> Decoder:
    """Load a model, layer by layer: besides the result, one layer (or the embedding table) is in memory at a time.

    Args:
        progress: called with the part done, 0 to 1, in the loading thread.

    Raises:
        ConfigError: as `open_weights`; or a dtype that does not run on the device.
    """
    check_dtype(dtype, device)
    return decoder_from_weights(open_weights(path), dtype, device, progress)


def decoder_from_weights(
    source: WeightSource, dtype: Dtype, device: torch.device, progress: Progress | None = None
) -> Decoder:
    """As `load_decoder`, from weights already opened."""
    return _Loader(source, dtype, device, progress or (lambda part: None)).run()


class _Loader:
    """Reads a `WeightSource` into a `Decoder`."""

    def __init__(self, source: WeightSource, dtype: Dtype, device: torch.device, progress: Progress) -> None:
        self.source, self.dtype, self.device, self.progress = source, dtype, device, progress
        self.kind = activation_dtype(dtype)

    @torch.inference_mode()
    def run(self) -> Decoder:
        arch = self.source.architecture
        self.progress(0.0)
        steps = arch.num_layers + 2  # the embedding table and the head count as a layer each
        table_VE = self._matrix("embed_tokens.weight")
        embedding_VE = table_VE.to(self.device, self.kind)
        if arch.tie_word_embeddings:
            lm_head = make_linear(table_VE, None, self.dtype, self.device)
        else:
            del table_VE
            lm_head = make_linear(self._matrix("lm_head.weight"), None, self.dtype, self.device)
        self.progress(2 / steps)
        layers = []
        for index in range(arch.num_layers):
            layers.append(self._layer(f"layers.{index}."))
            self.progress((index + 3) / steps)
        factors_P = self.source.rope_factors()
        frequencies_P = rope_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling, factors_P)
        norm_E = self._vector("norm.weight")
        return Decoder(arch, embedding_VE, layers, norm_E, lm_head, frequencies_P)

    def _layer(self, prefix: str) -> Layer:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qk_norm = self.source.architecture.qk_norm
        return Layer(
            input_norm_I=self._vector(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
            q_norm_D=self._vector(f"{attention}q_norm.weight") if qk_norm else None,
            k_norm_D=self._vector(f"{attention}k_norm.weight") if qk_norm else None,
            attention_out=self._linear(f"{attention}o_proj"),
            mlp_norm_I=self._vector(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._linear(f"{mlp}gate_proj", f"{mlp}up_proj"),
            down=self._linear(f"{mlp}down_proj"),
        )

    def _matrix(self, name: str) -> torch.Tensor:
        """In float32, which int8 is best made from; but bfloat16 where that is what will be kept anyway."""
        return self.source.read(name).to(torch.bfloat16 if self.dtype == "bf16" else torch.float32)

    def _vector(self, name: str) -> torch.Tensor:
        return self.source.read(name).to(self.device, self.kind)

    def _linear(self, *names: str) -> Linear:
        """One linear layer for several of the file, fused along their outputs."""
        weights = [self._matrix(f"{name}.weight") for name in names]
        weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias_O = None
        if self.source.has(f"{names[0]}.bias"):
            bias_O = torch.cat([self.source.read(f"{name}.bias") for name in names])
        return make_linear(weight_OI, bias_O, self.dtype, self.device)
