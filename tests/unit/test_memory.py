"""What models take of a device's memory, and the pools that fit: the arithmetic, and against models that are loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssd_runtime.config import Config, Dtype, EngineConfig, load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import Role
from ssd_runtime.model import memory
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.decoder import PlainLinear
from ssd_runtime.model.load import decoder_from_weights
from ssd_runtime.model.memory import GIB, blocks_that_fit, demand, demands_of_rank, weight_bytes
from ssd_runtime.model.parallel import ShardPlan
from tests.live_bytes import LiveBytes
from tests.tiny_models import RandomWeights, tiny_architecture

META = torch.device("meta")


def llama(layers: int, hidden: int, inner: int, heads: int, tied: bool = False) -> Architecture:
    """As published; memory is the same for another max_position."""
    return Architecture(
        "llama", layers, heads, 8, hidden // heads, hidden, inner, 128256, 1e-5, 5e5, tie_word_embeddings=tied
    )


LLAMA_70B, LLAMA_8B = llama(80, 8192, 28672, 64), llama(32, 4096, 14336, 32)
LLAMA_1B = llama(16, 2048, 8192, 32, tied=True)
MODELS: dict[Role, Architecture] = {"target": LLAMA_8B, "draft": LLAMA_1B}


def on_gpus(*overrides: str) -> Config:
    return load_config(None, ["target.device=cuda", "draft.device=cuda", "draft.dtype=bf16", *overrides])


def test_weights_and_blocks_are_those_of_the_published_models() -> None:
    assert weight_bytes(LLAMA_70B, "bf16", "cuda") == pytest.approx(2 * 70.55e9, rel=0.001)
    assert weight_bytes(LLAMA_1B, "bf16", "cuda") == pytest.approx(2 * 1.236e9, rel=0.001)
    assert weight_bytes(LLAMA_70B.part(4), "bf16", "cuda") == pytest.approx(2 * 70.55e9 / 4, rel=0.001)
    assert weight_bytes(LLAMA_70B, "int8", "cpu") < 0.53 * weight_bytes(LLAMA_70B, "bf16", "cpu")
    assert memory.block_bytes(LLAMA_70B, 16, "bf16") == 16 * 327_680  # 320 KiB a token
    assert memory.block_bytes(LLAMA_70B.part(4), 16, "bf16") == 4 * 327_680
    assert memory.block_bytes(LLAMA_70B.part(16), 16, "bf16") == 2 * 327_680  # a key-value head at least


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_part_by_its_shape_is_what_the_shard_plan_reads(size: int) -> None:
    arch = tiny_architecture(vocab_size=97)
    for rank in range(size):
        plan = ShardPlan(arch, rank, size)
        (first, last), (start, end) = plan.heads, plan.inner
        assert arch.part(size).num_heads == last - first
        assert arch.part(size).intermediate_size == end - start
        assert arch.part(size).num_kv_heads == plan.kv_heads[1] - plan.kv_heads[0]


# Matrices that outweigh what they are packed with.
MIDDLING = tiny_architecture(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=1024)


def tensors_of(held: object) -> list[Tensor]:
    """Those of a layer, a linear layer or packed weights."""
    if isinstance(held, Tensor):
        return [held]
    if not dataclasses.is_dataclass(held):
        return []
    return [tensor for field in dataclasses.fields(held) for tensor in tensors_of(getattr(held, field.name))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_a_model_on_the_cpu_holds_the_weights_that_are_computed(dtype: Dtype, tied: bool) -> None:
    arch = replace(MIDDLING, tie_word_embeddings=tied)
    decoder = decoder_from_weights(RandomWeights(arch), dtype, torch.device("cpu"))
    held = [decoder._embedding_VE, *tensors_of(decoder._lm_head)]
    held += [tensor for layer in decoder._layers for tensor in tensors_of(layer)]
    assert sum(tensor.nbytes for tensor in held) == pytest.approx(weight_bytes(arch, dtype, "cpu"), rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_on_a_gpu_holds_tied_embeddings_once(dtype: Dtype, tied: bool) -> None:
    arch = replace(MIDDLING, tie_word_embeddings=tied)
    source = RandomWeights(arch)
    with LiveBytes() as live:
        decoder = decoder_from_weights(source, dtype, META)
        assert live.now == pytest.approx(weight_bytes(arch, dtype, "cuda"), rel=0.001)
    head = decoder._lm_head
    assert isinstance(head, PlainLinear)
    assert (head.weight_OI.untyped_storage()._cdata == decoder._embedding_VE.untyped_storage()._cdata) == tied


@given(
    free=st.integers(0, 80 * GIB),
    share=st.floats(0.05, 1.0),
    sequences=st.integers(1, 256),
    length=st.integers(2, 1 << 14),
    held=st.booleans(),
)
def test_the_largest_pool_is_taken_that_leaves_room_for_a_forward(
    free: int, share: float, sequences: int, length: int, held: bool
) -> None:
    engine = EngineConfig(max_model_len=length, max_num_seqs=sequences, kv_memory=share)
    config = replace(on_gpus(f"deployment.colocated={str(held).lower()}"), engine=engine)
    demands = demands_of_rank(config, "target", MODELS)
    blocks = blocks_that_fit(config, "target", MODELS, free, 80 * GIB)
    assert len(demands) == 1 + held
    assert 0 <= blocks <= engine.most_blocks

    def taken(count: int) -> int:
        return sum(one.pool(count) + one.scratch for one in demands)

    assert blocks == 0 or taken(blocks) <= share * free
    assert blocks == engine.most_blocks or taken(blocks + 1) > share * free - 1
    assert blocks_that_fit(replace(config, engine=replace(engine, num_blocks=7)), "target", MODELS, free, 0) == 7


@given(total=st.integers(24 * GIB, 80 * GIB), frees=st.tuples(st.integers(0, 80 * GIB), st.integers(0, 80 * GIB)))
@pytest.mark.parametrize("more", [(), ("deployment.drafts=2",), ("deployment.colocated=true",)])
def test_roles_on_one_gpu_compute_the_same_pool_and_fit_together(
    more: tuple[str, ...], total: int, frees: tuple[int, int]
) -> None:
    config = on_gpus("deployment.share_gpu=true", "engine.max_num_seqs=1024", *more)
    roles: tuple[Role, Role] = ("target", "draft")
    target, draft = (
        blocks_that_fit(config, role, MODELS, free, total) for role, free in zip(roles, frees, strict=True)
    )
    assert target == draft
    ranks = [demands_of_rank(config, "target", MODELS)]
    ranks += [demands_of_rank(config, "draft", MODELS)] * config.deployment.drafts
    taken = sum(memory.CONTEXT for _ in ranks)
    taken += sum(one.weights + one.scratch + one.pool(target) for rank in ranks for one in rank)
    assert target == 0 or taken <= 0.9 * total


def test_plain_decoding_has_a_shared_gpu_to_itself() -> None:
    config = on_gpus("deployment.share_gpu=true", "speculation.mode=ar", "engine.max_num_seqs=1024")
    assert blocks_that_fit(config, "target", {"target": LLAMA_8B}, 20 * GIB, 0) > 0


def test_a_pool_without_room_for_one_sequence_is_refused_with_the_length_that_fits() -> None:
    engine = EngineConfig(max_model_len=1000, block_size=16)
    assert memory.with_pool(engine, 63).pool_blocks == 63
    with pytest.raises(ConfigError, match=r"room for 992 tokens .* may have 1000: lower engine\.max_model_len to 992$"):
        memory.with_pool(engine, 62)
    with pytest.raises(ConfigError, match=r"room for 0 tokens .*: raise target\.tensor_parallel"):
        memory.with_pool(engine, 0)
    asked = replace(engine, num_blocks=20)
    assert memory.with_pool(asked, 20) == asked


@pytest.mark.parametrize(
    ("engine", "blocks", "says"),
    [
        (EngineConfig(), 512, "512 KV blocks (8192 tokens), as many as engine.max_num_seqs sequences can use"),
        (EngineConfig(), 300, "300 KV blocks (4800 tokens), of 512 that could be used; engine.kv_memory = 0.9 leaves"),
        (EngineConfig(num_blocks=300), 300, "300 KV blocks (4800 tokens), as engine.num_blocks says"),
    ],
)
def test_the_pool_is_told_with_what_limits_it(engine: EngineConfig, blocks: int, says: str) -> None:
    assert memory.about_pool(engine, blocks).startswith(says)


def test_a_draft_s_trees_have_blocks_beside_those_of_sequences() -> None:
    config = on_gpus()
    target, draft = demand(config, "target", LLAMA_1B, "cuda"), demand(config, "draft", LLAMA_1B, "cuda")
    assert target.pool(10) == 10 * target.block
    assert draft.pool(10) - draft.pool(0) == 10 * draft.block
    assert draft.pool(0) == memory.tree_blocks(config.engine, config.speculation) * draft.block > 0
