"""From a path to a `Decoder`. Knows no configuration of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ssd_runtime import environment
from ssd_runtime.config import Dtype
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.decoder import Decoder, Layer, Linear, PlainLinear, rope_frequencies
from ssd_runtime.model.files.header import open_weights
from ssd_runtime.model.files.source import WeightSource
from ssd_runtime.model.parallel import ALONE, Collective, Shard, ShardedWeights, ShardPlan
from ssd_runtime.model.quantize import activation_dtype, check_dtype, make_head, make_linear
from ssd_runtime.model.random.models import random_model
from ssd_runtime.model.random.script import ScriptedDecoder
from ssd_runtime.model.random.weights import RandomWeights
from ssd_runtime.model.smoothing import CALIBRATION_TEXT, Smoother

Progress = Callable[[float], None]


def load_decoder(
    path: str,
    dtype: Dtype,
    device: torch.device,
    progress: Progress | None = None,
    group: Collective = ALONE,
) -> Decoder:
    """Load a model, layer by layer: besides the result, one layer (or the embedding table) is in memory at a time.

    A random model ("random:llama-8b", "random:llama-1b@0.85") is made on the device itself, without a copy on the host,
    on "meta" too. Its forwards are computed, and some of their logits replaced (script.py).

    Args:
        path: what `catalogue.resolve` returns: of a directory or file, or the name of a random model.
        progress: called with the part done, 0 to 1, in the loading thread.
        group: ranks that share the model; each calls this, reads its own part only and gets a decoder of that part.

    Raises:
        PeerLost: a rank of the group is gone.
        ConfigError: as `open_weights`; a model that does not divide among the group; a dtype that does not run on the
            device; or operators asked for that do not run here.
    """
    environment.check_operators()
    check_dtype(dtype, device)
    if (model := random_model(path)) is not None:
        scripted = partial(ScriptedDecoder, model.agreement)
        return decoder_from_weights(RandomWeights(model, device), dtype, device, progress, group=group, make=scripted)
    source = open_weights(path)
    calibration = _calibration(path) if dtype == "int8" else None
    return decoder_from_weights(source, dtype, device, progress, calibration, group)


def _calibration(path: str) -> list[int]:
    from ssd_runtime.model.text.tokenizer import Tokenizer  # no other dtype needs one

    return Tokenizer.from_model(path).encode(CALIBRATION_TEXT)


def decoder_from_weights(
    source: WeightSource,
    dtype: Dtype,
    device: torch.device,
    progress: Progress | None = None,
    calibration: Sequence[int] | None = None,
    group: Collective = ALONE,
    make: Callable[..., Decoder] = Decoder,
) -> Decoder:
    """As `load_decoder`, from weights already opened.

    Args:
        calibration: tokens of a text on which to smooth the layers; None leaves them as they are.
        make: a decoder of its parts.
    """
    shard = None
    if group.size > 1:
        source.architecture.check_divides(group.size, f"model {source.path}")
        shard = Shard(ShardPlan(source.architecture, group.rank, group.size), group)
        source = ShardedWeights(source, shard.plan)
    return _Loader(source, dtype, device, progress or (lambda part: None), calibration, shard).run(make)


class _Loader:
    """Reads a `WeightSource` into a `Decoder`."""

    def __init__(
        self,
        source: WeightSource,
        dtype: Dtype,
        device: torch.device,
        progress: Progress,
        calibration: Sequence[int] | None,
        shard: Shard | None,
    ) -> None:
        self.source, self.dtype, self.device, self.progress = source, dtype, device, progress
        self.calibration, self.shard = calibration, shard
        self.kind = activation_dtype(dtype)

    @torch.inference_mode()
    def run(self, make: Callable[..., Decoder]) -> Decoder:
        arch, smoother = self.source.architecture, None
        self.progress(0.0)
        steps = arch.num_layers + 2  # the embedding table and the head count as a layer each
        factors_P = self.source.rope_factors()
        if factors_P is not None:  # x / x: NaN for 0 too
            check_finite(factors_P / factors_P, f"model {self.source.path}: tensor rope_freqs.weight, divisors")
        frequencies_P = rope_frequencies(arch.head_dim, arch.rope_theta, arch.rope_scaling, factors_P)
        table_VE = self._matrix("embed_tokens.weight")
        embedding_VE = table_VE.to(self.device, self.kind)
        if self.calibration:
            smoother = self._smoother(table_VE, list(self.calibration), frequencies_P)
        if not arch.tie_word_embeddings:
            del table_VE
            table_VE = self._matrix("lm_head.weight")
        lm_head = make_head(table_VE, self.dtype, self.device)
        del table_VE
        self.progress(2 / steps)
        layers = []
        for index in range(arch.num_layers):
            layer = self._read_layer(f"layers.{index}.")
            layers.append(self._as_computed(smoother.smooth(layer) if smoother else layer))
            self.progress((index + 3) / steps)
        norm_E = self._vector(self._read("norm.weight"))
        return make(arch, embedding_VE, layers, norm_E, lm_head, frequencies_P, self.shard)

    def _smoother(self, table_VE: torch.Tensor, tokens: list[int], frequencies_P: torch.Tensor) -> Smoother:
        arch = self.source.architecture
        if self.shard is None:
            return Smoother(arch, table_VE[tokens], frequencies_P)
        return Smoother(arch, self.shard.embed(table_VE, torch.tensor(tokens)), frequencies_P, self.shard.group)

    def _read_layer(self, prefix: str) -> Layer[PlainLinear]:
        attention, mlp, arch = f"{prefix}self_attn.", f"{prefix}mlp.", self.source.architecture
        return Layer(
            input_norm_I=self._read(f"{prefix}input_layernorm.weight"),
            qkv=self._fused([f"{attention}{name}_proj" for name in "qkv"], arch.qkv_bias),
            q_norm_D=self._read(f"{attention}q_norm.weight") if arch.qk_norm else None,
            k_norm_D=self._read(f"{attention}k_norm.weight") if arch.qk_norm else None,
            attention_out=self._fused([f"{attention}o_proj"], arch.attention_out_bias),
            mlp_norm_I=self._read(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._fused([f"{mlp}{name}_proj" for name in ("gate", "up")], arch.mlp_bias),
            down=self._fused([f"{mlp}down_proj"], arch.mlp_bias),
        )

    def _as_computed(self, read: Layer[PlainLinear]) -> Layer[Linear]:
        return Layer(
            input_norm_I=self._vector(read.input_norm_I),
            qkv=self._linear(read.qkv),
            q_norm_D=None if read.q_norm_D is None else self._vector(read.q_norm_D),
            k_norm_D=None if read.k_norm_D is None else self._vector(read.k_norm_D),
            attention_out=self._linear(read.attention_out),
            mlp_norm_I=self._vector(read.mlp_norm_I),
            gate_up=self._linear(read.gate_up),
            down=self._linear(read.down),
        )

    def _matrix(self, name: str) -> torch.Tensor:
        """In float32, which int8 and int4 are best made from; but bfloat16 where that is what will be kept anyway.

        On its device at once: what the layers make of it is made there, without another copy here, and what is used
        twice, as the table of tied embeddings is, is there once.
        """
        return self._read(name, torch.bfloat16 if self.dtype == "bf16" else torch.float32).to(self.device)

    def _fused(self, names: Sequence[str], has_bias: bool) -> PlainLinear:
        """Linear layers of one input as one."""
        weights = [self._matrix(f"{name}.weight") for name in names]
        bias_O = torch.cat([self._read(f"{name}.bias") for name in names]) if has_bias else None
        return PlainLinear(torch.cat(weights) if len(weights) > 1 else weights[0], bias_O)

    def _read(self, name: str, kind: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor as `kind`. Raises ConfigError when that leaves something in it that is no number."""
        tensor = self.source.read(name).to(kind)
        kept = tensor if tensor.dim() == 2 else tensor.to(self.kind)  # vectors are rounded later
        check_finite(kept, f"model {self.source.path}: tensor {name}")
        return tensor

    def _vector(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device, self.kind)

    def _linear(self, plain: PlainLinear) -> Linear:
        return make_linear(plain.weight_OI, plain.bias_O, self.dtype, self.device)


def check_finite(tensor: torch.Tensor, who: str) -> None:
    """Raise ConfigError when something in it is no number, beginning with `who`.

    The sum of a tensor with NaN or infinity in it is one of these, and costs a reading of the memory; the converse does
    not hold, sums overflow.
    """
    if not tensor.is_meta and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ConfigError(f"{who}: NaN or infinity ({tensor.dtype}); the weights are damaged, fetch the model again")
