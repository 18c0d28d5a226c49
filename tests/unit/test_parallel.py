"""The shard plan: the parts make the whole, no rank reads another's part, and what does not divide is told so."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from cuda_ext import ops
from ssd_runtime.comm.collective import TargetGroup
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.header import open_weights
from ssd_runtime.model.files.source import WHOLE, Part, WeightSource, expected_tensors
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.model.parallel import ShardedWeights, ShardPlan
from tests.target_ranks import on_every_rank
from tests.tiny_models import CPU, PagedRun, RandomWeights, tiny_architecture
from tests.unit.test_model_logits import convert_to_gguf, save_random

TOKENS = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(7)).tolist()
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-no-groups": {"num_kv_heads": 4},
    "one-kv-head": {"num_kv_heads": 1},
    "padded-vocabulary": {"vocab_size": 97},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 16},
    "every-bias": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
}


def source_of(name: str) -> RandomWeights:
    return RandomWeights(tiny_architecture(**ARCHITECTURES[name]), seed=3)


def pieces(decoder: Any) -> Tensor:
    """A prompt in two chunks, then token by token."""
    run = PagedRun(decoder, seed=1)
    spans = ((0, 7), (7, 30), *((i, i + 1) for i in range(30, 40)))
    return torch.cat([run.trunk(TOKENS[start:end], start) for start, end in spans])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ranks_that_share_a_model_give_its_logits(name: str, size: int) -> None:
    source = source_of(name)
    expected = pieces(decoder_from_weights(source, "fp32", CPU))
    found = on_every_rank(size, lambda group: pieces(decoder_from_weights(source, "fp32", CPU, group=group)))
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(logits, found[0])


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 0.02), ("int8", 0.04)])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3", "every-bias"])
def test_lower_precisions_stay_as_close_to_the_whole_model_as_it_is_to_fp32(name: str, dtype: Any, most: float) -> None:
    changes = ARCHITECTURES[name] | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    source = RandomWeights(tiny_architecture(**changes), seed=4)
    calibration = TOKENS[:20] if dtype == "int8" else None
    expected = pieces(decoder_from_weights(source, dtype, CPU, calibration=calibration))

    def logits(group: TargetGroup) -> Tensor:
        return pieces(decoder_from_weights(source, dtype, CPU, calibration=calibration, group=group))

    first, second = on_every_rank(2, logits)
    assert torch.equal(first, second)
    error = ((first - expected).norm() / expected.norm()).item()
    assert error < most, f"relative error {error:.3f}"


@pytest.mark.skipif(ops.backend() != "compiled", reason="plain operators do not promise it")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: Any) -> None:
    """Three ranks and more: an all-reduce would add in an order that depends on where the row lies."""
    source = RandomWeights(tiny_architecture(), seed=5)

    def both(group: TargetGroup) -> tuple[Tensor, Tensor]:
        decoder = decoder_from_weights(source, dtype, CPU, group=group)
        together, alone = PagedRun(decoder), PagedRun(decoder)
        for run in (together, alone):
            run.trunk(TOKENS[:30])
        one_by_one = [alone.trunk([token], position) for position, token in enumerate(TOKENS[30:], 30)]
        return together.trunk(TOKENS[30:], 30), torch.cat(one_by_one)

    for together, one_by_one in on_every_rank(4, both):
        assert torch.equal(together, one_by_one)


def test_only_wanted_rows_get_logits() -> None:
    source = source_of("llama")
    expected = PagedRun(decoder_from_weights(source, "fp32", CPU)).trunk(TOKENS, logit_rows=[5, 39])

    def rows(group: TargetGroup) -> tuple[Tensor, Tensor]:
        decoder = decoder_from_weights(source, "fp32", CPU, group=group)
        return PagedRun(decoder).trunk(TOKENS, logit_rows=[5, 39]), PagedRun(decoder).trunk(TOKENS, logit_rows=[])

    for wanted, none in on_every_rank(2, rows):
        torch.testing.assert_close(wanted, expected, atol=1e-4, rtol=0)
        assert none.shape == (0, 96)


def test_each_rank_keeps_its_own_heads_in_its_kv_pool() -> None:
    source = source_of("llama")
    shapes = on_every_rank(2, lambda group: decoder_from_weights(source, "fp32", CPU, group=group).new_kv(10).shape)
    assert shapes == [(2, 2, 10, 1, 8)] * 2


# ---- reading ---------------------------------------------------------------------------------------------------------


class CountingWeights:
    """Counts how often each value of each tensor is read."""

    def __init__(self, source: WeightSource) -> None:
        self.path, self.architecture, self._source = source.path, source.architecture, source
        self.reads: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.int64) for name, shape in expected_tensors(source.architecture).items()
        }

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        part.of(self.reads[name]).add_(1)
        return self._source.read(name, part)

    def rope_factors(self) -> Tensor | None:
        return self._source.rope_factors()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_value_of_a_matrix_is_read_by_one_rank_and_norms_by_all(name: str) -> None:
    source = source_of(name)
    totals: dict[str, Tensor] = defaultdict(lambda: torch.tensor(0))
    for rank in range(2):
        counting = CountingWeights(source)
        sharded = ShardedWeights(counting, ShardPlan(source.architecture, rank, 2))
        for tensor, shape in expected_tensors(sharded.architecture).items():
            assert sharded.read(tensor).shape == shape
        for tensor, reads in counting.reads.items():
            totals[tensor] = totals[tensor] + reads
    one_kv_head = source.architecture.num_kv_heads == 1
    for tensor, reads in totals.items():
        by_all = "norm" in tensor or tensor.endswith(("o_proj.bias", "down_proj.bias"))  # one rank adds these
        by_all = by_all or (one_kv_head and ("k_proj" in tensor or "v_proj" in tensor))
        assert reads.unique().tolist() == [2 if by_all else 1], tensor


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_rank_never_touches_the_others_values_on_disk(tmp_path: Path, dtype: Any) -> None:
    """Both ranks load from copies of the model in which every value that is not theirs is NaN."""
    save_random(tmp_path / "whole", "qwen3")
    source = open_weights(str(tmp_path / "whole"))
    calibration = TOKENS[:20] if dtype == "int8" else None
    for rank in range(2):
        mine = tmp_path / f"rank{rank}"
        shutil.copytree(tmp_path / "whole", mine)
        tensors = load_file(mine / "model.safetensors")
        plan = ShardPlan(source.architecture, rank, 2)
        for name, tensor in tensors.items():
            poisoned = torch.full_like(tensor, float("nan"))
            part = plan.part(name.removeprefix("model."))
            part.of(poisoned).copy_(part.of(tensor))
            tensors[name] = poisoned
        save_file(tensors, mine / "model.safetensors")

    def logits(group: TargetGroup) -> Tensor:
        own = open_weights(str(tmp_path / f"rank{group.rank}"))
        return pieces(decoder_from_weights(own, dtype, CPU, calibration=calibration, group=group))

    def clean(group: TargetGroup) -> Tensor:
        return pieces(decoder_from_weights(source, dtype, CPU, calibration=calibration, group=group))

    assert torch.equal(on_every_rank(2, logits)[0], on_every_rank(2, clean)[0])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_parts_are_parts_of_the_whole(tmp_path: Path, family: str) -> None:
    """Heads of the Llama family are stored interleaved; a part between heads is put straight as the whole is."""
    save_random(tmp_path / "hf", family)
    directory = open_weights(str(tmp_path / "hf"))
    file = open_weights(convert_to_gguf(tmp_path / "model.gguf", directory))
    for size in (2, 4):
        for rank in range(size):
            plan = ShardPlan(file.architecture, rank, size)
            for name in expected_tensors(file.architecture):
                assert torch.equal(file.read(name, plan.part(name)), plan.part(name).of(directory.read(name))), name


def test_of_quantized_gguf_only_the_blocks_of_a_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssd_runtime.model.files import gguf_weights

    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((24, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "llama")
    writer.add_tensor(
        "blk.0.ffn_down.weight",
        quantize(matrix, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = object.__new__(gguf_weights.GgufWeights)  # one tensor is no model
    source.file = gguf_weights.open_gguf(str(tmp_path / "q8.gguf"))
    source.architecture = tiny_architecture()
    values = 0

    def counting(blocks: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        nonlocal values
        out: np.ndarray = gguf.quants.dequantize(blocks, kind)
        values += out.size
        return out

    monkeypatch.setattr(gguf_weights, "dequantize", counting)
    whole = source.read("layers.0.mlp.down_proj.weight")
    for part, most in (
        (Part(columns=(0, 128)), 24 * 128),
        (Part(columns=(40, 70)), 24 * 64),
        (Part(rows=(5, 9)), 4 * 256),
        (Part(rows=(23, 24), columns=(255, 256)), 32),
    ):
        values = 0
        assert torch.equal(source.read("layers.0.mlp.down_proj.weight", part), part.of(whole))
        assert values == most


# ---- what does not divide --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "size", "possible"),
    [
        ({"num_heads": 9, "num_kv_heads": 3, "intermediate_size": 48}, 2, "1, 3"),
        ({}, 3, "1, 2, 4"),
        ({}, 8, "1, 2, 4"),
        ({"intermediate_size": 50}, 4, "1, 2"),
        ({"num_heads": 12, "num_kv_heads": 6, "intermediate_size": 96}, 4, "1, 2, 3, 6, 12"),
    ],
)
def test_a_model_that_does_not_divide_is_told_what_is_possible(changes: dict, size: int, possible: str) -> None:
    with pytest.raises(ConfigError, match=rf"do not divide among target.tensor_parallel = {size} .*are {possible}$"):
        ShardPlan(tiny_architecture(**changes), 0, size)
