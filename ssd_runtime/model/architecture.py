"""The shape of a Llama-family model as plain data. Knows no file formats and no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from ssd_runtime.errors import ConfigError

LARGEST_VOCABULARY = 1 << 26

# What a number may be, far beyond every model there is: what it costs to believe a file stays small.
_RANGES: dict[str, tuple[float, float]] = {
    "num_layers": (1, 10_000),
    "num_heads": (1, 1 << 16),
    "num_kv_heads": (1, 1 << 16),
    "head_dim": (2, 1 << 16),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 24),
    "vocab_size": (1, LARGEST_VOCABULARY),
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e15),
    "max_position": (1, 1 << 40),
    "sliding_window": (1, 1 << 40),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "original_max_position": (1, 1 << 40),
}
_RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 64)  # worth naming in a remedy


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long texts.

    Attributes:
        kind: "linear" divides all frequencies by `factor`; "llama3" only the low ones, with a smooth passage;
            "factors" divides each by `factor` and its own number, kept beside the weights (GGUF's rope_freqs tensor).
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
        attention_out_bias: whether the projection after attention has one.
        mlp_bias: whether the three matrices of the MLP have one.
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
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position: int = 2048
    sliding_window: int | None = None

    def check(self, who: str, keys: Mapping[str, str]) -> None:
        """Raise ConfigError when the numbers cannot describe a decoder of this project.

        Args:
            who: begins the message.
            keys: what the file calls our fields, where it has another name.
        """
        damaged = "the model description is damaged, fetch it again"
        for part in (self, self.rope_scaling):
            for name in (field.name for field in fields(part) if field.name in _RANGES) if part else ():
                value, (low, high) = getattr(part, name), _RANGES[name]
                if value is not None and not low <= value <= high:
                    raise ConfigError(f"{who}: {keys.get(name, name)} is {value}, not {low:g} to {high:g}; {damaged}")
        if self.num_heads % self.num_kv_heads:
            heads, kv_heads = (keys.get(name, name) for name in ("num_heads", "num_kv_heads"))
            numbers = f"{self.num_heads} query heads do not divide among {self.num_kv_heads} key-value heads"
            raise ConfigError(f"{who}: {numbers} ({heads}, {kv_heads}); {damaged}")
        if self.head_dim % 2:
            name = keys.get("head_dim", "head_dim")
            raise ConfigError(f"{who}: {name} {self.head_dim} is odd, the rotary embedding needs pairs; {damaged}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ConfigError(
                f"{who}: {keys.get('high_freq_factor', 'high_freq_factor')} {scaling.high_freq_factor} is no more than "
                f"low_freq_factor {scaling.low_freq_factor}; {damaged}"
            )

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

    def part(self, ranks: int) -> Architecture:
        """The shape of what one of `ranks` holds of a model that divides among them (model/parallel.py says how)."""
        return replace(
            self,
            num_heads=self.num_heads // ranks,
            num_kv_heads=max(1, self.num_kv_heads // ranks),
            intermediate_size=self.intermediate_size // ranks,
            vocab_size=-(-self.vocab_size // ranks),
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
