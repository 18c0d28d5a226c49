"""The shape of a Llama-family model as plain data. Knows no file formats and no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssd_runtime.errors import ConfigError

_SIZES = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size")
_RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 64)  # worth naming in a remedy


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long texts.

    Attributes:
        kind: "linear" divides all frequencies by `factor`; "llama3" only the low ones, with a smooth passage;
            "factors" divides each by its own number, kept beside the weights (GGUF's rope_freqs tensor).
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Everything the decoder must know besides the weights.

    Attributes:
        family: "llama", "qwen2", "qwen3" or "mistral"; for messages only.
        vocab_size: rows of the embedding table; may exceed the tokenizer's vocabulary (padding).
        qkv_bias: whether the q, k and v projections have a bias.
        qk_norm: whether queries and keys are normalised by head before the rotation.
        max_position: longest text the model was made for.
        sliding_window: tokens a row sees; None is all. The decoder always sees all: `check_length`.
    """

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position: int = 2048
    sliding_window: int | None = None

    def check(self, who: str) -> None:
        """Raise ConfigError when the numbers cannot describe a decoder of this project; `who` begins the message."""
        for name in _SIZES:
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{who}: {name} is {value}; the model description is damaged, fetch it again")
        if self.num_heads % self.num_kv_heads:
            heads = f"{self.num_heads} query heads do not divide among {self.num_kv_heads} key-value heads"
            raise ConfigError(f"{who}: {heads}; the model description is damaged, fetch it again")
        if self.head_dim % 2:
            raise ConfigError(f"{who}: head_dim {self.head_dim} is odd, the rotary embedding needs pairs")

    def check_length(self, length: int, who: str) -> None:
        """Raise ConfigError when texts of `length` tokens are more than the model can see."""
        if length > self.max_position:
            raise ConfigError(
                f"{who}: made for {self.max_position} tokens; set engine.max_model_len to at most that, not {length}"
            )
        if self.sliding_window is not None and length > self.sliding_window:
            raise ConfigError(
                f"{who}: its sliding window of {self.sliding_window} tokens is not supported on longer texts; "
                f"set engine.max_model_len to at most {self.sliding_window}, not {length}"
            )

    def check_divides(self, ranks: int, who: str) -> None:
        """Raise ConfigError unless the model divides among so many ranks (model/parallel.py says how)."""
        if self._divides(ranks):
            return
        possible = ", ".join(str(other) for other in _RANKS if self._divides(other))
        parts = (
            f"{self.num_heads} heads, {self.num_kv_heads} key-value heads and {self.intermediate_size} inner features"
        )
        raise ConfigError(
            f"{who}: {parts} do not divide among target.tensor_parallel = {ranks} ranks; possible are {possible}"
        )

    def _divides(self, ranks: int) -> bool:
        few, many = sorted((self.num_kv_heads, ranks))
        return ranks >= 1 and not (self.num_heads % ranks or self.intermediate_size % ranks or many % few)
