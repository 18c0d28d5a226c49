"""Token identity where rounding decides: bf16 and int8, with logits so close together that the last bit matters.

The compiled operators round a row by itself. Plain torch does not, so there `numerics = "invariant"` has to see to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_ext import ops
from ssd_runtime.config import Dtype, EngineConfig, Numerics, SpeculationConfig
from ssd_runtime.engine import engine
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.runner import needs_windows
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import in_process, random_steps, request
from tests.tiny_models import CPU, RandomWeights, tiny_architecture

VOCAB = 512
MODES = ("sd", "sd-colocated", "ssd")


def close_calls(dtype: Dtype) -> tuple[Decoder, Decoder]:
    """A target whose tokens come in eights that all but tie, and a draft that is its relative."""
    arch = tiny_architecture(vocab_size=VOCAB, hidden_size=32)
    found = []
    for noise in (0.0, 0.03):
        weights = RandomWeights(arch, seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, tensor in weights._tensors.items():
            weights._tensors[name] = tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        head = weights._tensors["lm_head.weight"][: VOCAB // 8].repeat_interleave(8, 0)
        weights._tensors["lm_head.weight"] = head + 1e-3 * torch.randn(head.shape, generator=generator)
        found.append(decoder_from_weights(weights, dtype, CPU))
    return found[0], found[1]


def requests(modes: tuple[str, ...]) -> list[Request]:
    """Several at once, greedy and sampled, of different lengths and lookaheads."""
    shapes = [(7, 5, 0.0), (16, 3, 0.0), (33, 4, 1.0), (21, 1, 0.7)]
    return [
        request(
            tuple((31 * length + 7 * i) % VOCAB for i in range(length)),
            mode,
            lookahead=0 if mode == "ar" else lookahead,
            max_tokens=36,
            params=SamplingParams(temperature=temperature, seed=length),
            request_id=f"{mode}-{length}",
        )
        for (length, lookahead, temperature), mode in zip(shapes, itertools.cycle(modes), strict=False)
    ]


def outputs(
    models: tuple[Decoder, Decoder], numerics: Numerics, asked: list[Request], chunk: int = 11
) -> list[tuple[int, ...]]:
    """What requests get that are served together."""
    sizes = EngineConfig(max_model_len=104, block_size=8, prefill_chunk=chunk, numerics=numerics)
    process = in_process(*models, sizes, SpeculationConfig(lookahead=5, budget=6), random_steps(len(asked)))
    sequences = process.run(asked)
    process.assert_all_blocks_are_back()
    return [tuple(sequence.tokens[sequence.num_prompt :]) for sequence in sequences]


def alone(models: tuple[Decoder, Decoder], numerics: Numerics) -> list[tuple[int, ...]]:
    """What plain decoding gives each of them by itself."""
    return [outputs(models, numerics, [one])[0] for one in requests(("ar",))]


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp32"])
def test_every_mode_gives_the_same_tokens(operators: str, dtype: Dtype) -> None:
    models = close_calls(dtype)
    expected = alone(models, "invariant")
    for modes in (MODES, ("ssd",), ("ar", *MODES)):
        assert outputs(models, "invariant", requests(modes)) == expected, modes


def test_compiled_operators_need_nothing_for_it(operators: str) -> None:
    decoder, _ = close_calls("bf16")
    assert needs_windows(decoder, "invariant") == (operators == "plain")
    assert not needs_windows(decoder, "fast")


def nudged(operator: Callable[..., Tensor], width: bool) -> Callable[..., Tensor]:
    """An operator that rounds each row by the number of rows, by its place and, for attention, by the longest reach."""

    def apply(x_N: Tensor, *arguments: Tensor) -> Tensor:
        reach = int(arguments[3].max()) if width else 0
        result = operator(x_N, *arguments)
        places = torch.arange(len(x_N), dtype=torch.float32)
        nudge_N = 1 + 0.02 * torch.sin(places * 37.0 + len(x_N) * 11.0 + reach * 5.0)
        return (result.float() * nudge_N.view(-1, *[1] * (result.dim() - 1))).to(result.dtype)

    return apply


@pytest.mark.parametrize(
    ("dtype", "name"), [("bf16", "linear_bf16"), ("int8", "linear_int8"), ("bf16", "paged_attention")]
)
def test_rounding_by_shape_shows_without_it_and_not_with_it(
    plain_operators: None, monkeypatch: pytest.MonkeyPatch, dtype: Dtype, name: str
) -> None:
    models = close_calls(dtype)
    operator = nudged(getattr(ops, name), width=name == "paged_attention")
    monkeypatch.setattr(ops, name, operator)  # plain torch as the worst library would be
    assert outputs(models, "fast", requests(("ssd",))) != alone(models, "fast")
    assert outputs(models, "fast", requests(("ar",))) != alone(models, "fast")
    expected = alone(models, "invariant")
    for modes in (("ssd",), ("ar", *MODES)):
        assert outputs(models, "invariant", requests(modes)) == expected, modes


def of_one_prompt(mode: str) -> list[Request]:
    """Three outputs of a request whose prompt is two chunks of 16 and a rest."""
    first = request(tuple(31 * i % VOCAB for i in range(41)), mode, lookahead=4, max_tokens=30, request_id="r")
    return [replace(first, params=SamplingParams(temperature=0.7, seed=i), index=i) for i in range(3)]


def test_outputs_that_share_their_prompt_are_rounded_as_each_alone(operators: str) -> None:
    models = close_calls("bf16")
    expected = [outputs(models, "invariant", [one], 16)[0] for one in of_one_prompt("ar")]
    assert outputs(models, "invariant", of_one_prompt("ssd"), 16) == expected


def test_where_rounding_goes_by_shape_only_whole_chunks_of_a_prompt_are_shared(
    plain_operators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = close_calls("bf16")
    monkeypatch.setattr(ops, "linear_bf16", nudged(ops.linear_bf16, width=False))
    expected = [outputs(models, "invariant", [one], 16)[0] for one in of_one_prompt("ar")]
    assert outputs(models, "invariant", of_one_prompt("ssd"), 16) == expected
    monkeypatch.setattr(engine, "share_unit", lambda decoder, config: config.block_size)
    assert outputs(models, "invariant", of_one_prompt("ssd"), 16) != expected
