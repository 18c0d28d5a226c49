"""What every weight format offers the loader. Knows no format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ssd_runtime.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor: rows and columns from the first number up to, not including, the second; None is all."""

    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a whole tensor, a view."""
        if self.rows is not None:
            tensor = tensor[slice(*self.rows)]
        return tensor if self.columns is None else tensor[:, slice(*self.columns)]


WHOLE = Part()


class WeightSource(Protocol):
    """An opened model file. Tensors go by their Hugging Face names, without "model." in front."""

    path: str
    architecture: Architecture

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        """The tensor in float32 or the file's own floating type, in Hugging Face layout; reads only this part of it.

        Parts of q and k projections begin and end between heads.
        """

    def rope_factors(self) -> Tensor | None:
        """Divisors of the rotary frequencies (head_dim / 2), for rope scaling of kind "factors"."""


def expected_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a model of this architecture must have (biases included where declared)."""
    hidden, inner, head = arch.hidden_size, arch.intermediate_size, arch.head_dim
    q_size, kv_size = arch.num_heads * head, arch.num_kv_heads * head
    tensors: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (arch.vocab_size, hidden), "norm.weight": (hidden,)}
    if not arch.tie_word_embeddings:
        tensors["lm_head.weight"] = (arch.vocab_size, hidden)
    for i in range(arch.num_layers):
        layer = f"layers.{i}."
        for name, rows in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            tensors[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
            if arch.qkv_bias:
                tensors[f"{layer}self_attn.{name}.bias"] = (rows,)
        if arch.qk_norm:
            tensors[f"{layer}self_attn.q_norm.weight"] = (head,)
            tensors[f"{layer}self_attn.k_norm.weight"] = (head,)
        tensors[f"{layer}self_attn.o_proj.weight"] = (hidden, q_size)
        if arch.attention_out_bias:
            tensors[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            tensors[f"{layer}mlp.{name}_proj.weight"] = (rows, columns)
            if arch.mlp_bias:
                tensors[f"{layer}mlp.{name}_proj.bias"] = (rows,)
        tensors[f"{layer}input_layernorm.weight"] = (hidden,)
        tensors[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    return tensors
