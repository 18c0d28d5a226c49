"""Small real models for tests: random weights in memory, as Hugging Face directories and as GGUF files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from cuda_ext.ops import Span
from ssd_runtime.config import Dtype
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.files.source import WHOLE, Part, expected_tensors
from ssd_runtime.model.load import decoder_from_weights

if TYPE_CHECKING:
    import gguf

CPU = torch.device("cpu")
TRAINING_TEXT = "the quick brown fox jumps over the lazy dog; 1234 naïve café, print(x) # ok\n"


def tiny_architecture(**changes: Any) -> Architecture:
    """Two layers, four heads over two; a few thousand forwards a second."""
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "hidden_size": 32}
    sizes |= {"intermediate_size": 48, "vocab_size": 96, "max_position": 4096}
    return Architecture(**({"family": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0} | sizes | changes))


class RandomWeights:
    """A `WeightSource` of random numbers; the same seed gives the same model."""

    path = "random"

    def __init__(self, arch: Architecture, seed: int = 0) -> None:
        self.architecture = arch
        generator = torch.Generator().manual_seed(seed)
        self._tensors = {
            name: random_weight(name, shape, generator) for name, shape in sorted(expected_tensors(arch).items())
        }

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        return part.of(self._tensors[name])

    def rope_factors(self) -> Tensor | None:
        return None


def random_weight(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Norms near one, matrices that keep the size of what flows through them."""
    noise = torch.randn(*shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.2 * noise
    return noise * (1.0 if "embed" in name or name.endswith("bias") else 1.5 / shape[-1] ** 0.5)


def tiny_decoder(seed: int = 0, dtype: Dtype = "fp32", **changes: Any) -> Decoder:
    """A random decoder; `changes` are fields of `Architecture`."""
    return decoder_from_weights(RandomWeights(tiny_architecture(**changes), seed), dtype, CPU)


def tiny_tokenizer(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, vocab_size: int = 300
) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on a sentence, with two special tokens at the end."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TRAINING_TEXT] * 20, trainer)
    tokenizer.add_special_tokens(
        [AddedToken("<|endoftext|>", normalized=False), AddedToken("<|im_end|>", normalized=False)]
    )
    return tokenizer


def write_hf(directory: Path, seed: int = 0, noise: float = 0.0, **changes: Any) -> str:
    """Write a tiny Llama as a Hugging Face directory, with a tokenizer and a chat template.

    Layers after the second hardly change the text, so a model of two layers drafts well for a deeper one.

    Args:
        seed: of the weights, together with a tensor's name.
        noise: how far the weights are from those of the seed, in their standard deviations: a relative of that model.
        changes: fields of `Architecture`.
    """
    arch = tiny_architecture(**({"vocab_size": 300} | changes))
    tensors = {}
    for name, shape in expected_tensors(arch).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        tensor = random_weight(name, shape, generator)
        tensor += noise * tensor.std() * torch.randn(shape, generator=generator)
        late = name.startswith("layers.") and int(name.split(".")[1]) > 1
        tensors[name] = 0.02 * tensor if late and name.endswith(("o_proj.weight", "down_proj.weight")) else tensor
    tensors["lm_head.weight"][-2:] = 0.0  # the special tokens: greedy answers go on to their limit
    directory.mkdir(parents=True)
    save_file(
        {name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in tensors.items()},
        directory / "model.safetensors",
    )
    config = {"model_type": "llama", "vocab_size": arch.vocab_size, "num_hidden_layers": arch.num_layers}
    config |= {"hidden_size": arch.hidden_size, "intermediate_size": arch.intermediate_size}
    config |= {"num_attention_heads": arch.num_heads, "num_key_value_heads": arch.num_kv_heads}
    config |= {"head_dim": arch.head_dim, "max_position_embeddings": arch.max_position, "eos_token_id": 298}
    config |= {"rms_norm_eps": arch.rms_norm_eps, "rope_theta": arch.rope_theta}
    (directory / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(vocab_size=arch.vocab_size).save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return str(directory)


def write_gguf(
    path: Path,
    arch: Architecture,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any] | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    pre: str = "gpt-2",
) -> str:
    """Write a GGUF file of one architecture; tensors go by GGUF names, in GGUF layout."""
    import gguf  # not everywhere where this file is used

    writer = gguf.GGUFWriter(path, arch.family)
    writer.add_block_count(arch.num_layers)
    writer.add_context_length(arch.max_position)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_rope_dimension_count(arch.head_dim)
    writer.add_layer_norm_rms_eps(arch.rms_norm_eps)
    writer.add_rope_freq_base(arch.rope_theta)
    if tokenizer is not None:
        add_byte_level_tokenizer(writer, tokenizer, pre)
    for key, value in (metadata or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add |= {list: writer.add_array}
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer, pre: str) -> None:
    """The metadata llama.cpp's converter would write."""
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in added else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokenizer.token_to_id("<|endoftext|>"))


@dataclass
class PagedRun:
    """One sequence at a time over slots in random order, in a pool full of NaN: the simplest use of a decoder."""

    decoder: Decoder
    num_slots: int = 128
    seed: int = 0
    kv: Tensor = field(init=False)
    slots: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.kv = self.decoder.new_kv(self.num_slots).fill_(float("nan"))
        self.slots = torch.randperm(self.num_slots, generator=torch.Generator().manual_seed(self.seed))

    def trunk(self, tokens: Sequence[int], start: int = 0, logit_rows: Sequence[int] | None = None) -> Tensor:
        """Forward the tokens at positions start, start + 1, ... of the sequence."""
        return self.decoder.forward(self.batch(tokens, start, logit_rows), self.kv)

    def batch(self, tokens: Sequence[int], start: int = 0, logit_rows: Sequence[int] | None = None) -> ForwardBatch:
        """The rows of `trunk`."""
        count = len(tokens)
        positions = torch.arange(start, start + count)
        rows = None if logit_rows is None else torch.tensor(logit_rows, dtype=torch.int64)
        none = torch.empty(count, 0, dtype=torch.int64)
        sequence = torch.zeros(count, dtype=torch.int64)
        return ForwardBatch(
            torch.tensor(tokens),
            positions,
            self.slots[positions],
            sequence,
            self.slots[None],
            positions + 1,
            none,
            (Span(count, start + count),),
            rows,
        )
