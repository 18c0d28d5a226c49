"""What a model file says of itself: its header and its tokenizer, checked whole. Makes no tensors.

Commands read it before they start ranks, and torch takes seconds to import: nothing here needs it, and the weight
formats import it where a tensor is made. What a format or a tokenizer needs is imported where one is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.files.opening import look
from ssd_runtime.model.files.source import WeightSource
from ssd_runtime.model.random.models import random_model
from ssd_runtime.model.random.weights import RandomWeights
from ssd_runtime.model.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says of itself."""

    format: Literal["hf", "gguf", "random"]
    arch: Architecture
    eos_token_ids: tuple[int, ...]
    vocabulary: Vocabulary


def open_weights(path: str) -> WeightSource:
    """Open a Hugging Face directory, a GGUF file or a random model and check it whole, reading headers only.

    Raises:
        ConfigError: missing, truncated, damaged or unsupported; one line with the remedy.
    """
    if (model := random_model(path)) is not None:
        return RandomWeights(model)
    if look(path) is None:
        remedy = "pass a Hugging Face directory, a GGUF file or the name of an embedded model"
        raise ConfigError(f"model {path} does not exist; {remedy}")
    if Path(path).is_dir():
        from ssd_runtime.model.files.hf_weights import HfWeights

        return HfWeights(path)
    from ssd_runtime.model.files.gguf_weights import GgufWeights

    return GgufWeights(path)


def inspect_model(path: str) -> ModelHeader:
    """Read and check headers and tokenizer, no weights.

    Raises:
        ConfigError: as `open_weights`; or a tokenizer that is missing, damaged or another model's.
    """
    from ssd_runtime.model.text.tokenizer import Tokenizer

    source = open_weights(path)
    tokenizer = Tokenizer.from_model(path)
    if tokenizer.vocab_size > source.architecture.vocab_size:
        raise ConfigError(
            f"model {path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding table only "
            f"{source.architecture.vocab_size}; the tokenizer belongs to another model"
        )
    return ModelHeader(
        format="random" if random_model(path) else "hf" if Path(path).is_dir() else "gguf",
        arch=source.architecture,
        eos_token_ids=tokenizer.eos_token_ids,
        vocabulary=tokenizer.vocabulary(),
    )
