"""What a model takes of a device's memory, and how many KV blocks fit beside it. Bytes everywhere.

Arithmetic on a model's header and the configuration: for whoever plans, before anything is loaded, and for the rank
that sizes its pool when its model is. Knows no devices and makes no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ssd_runtime.config import Config, Coupling, Device, Dtype, EngineConfig, SpeculationConfig
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import Role
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.files.source import expected_tensors

GIB = 2**30
CONTEXT = 3 * GIB // 4  # of a process on a GPU before its first tensor: CUDA's context and kernels. An estimate.
LIBRARIES = GIB // 2  # NCCL's buffers, cuBLAS's workspace, what the allocator cannot use. An estimate.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.625}  # int4: with a scale and a minimum for 32
INT4_HEAD_BYTES = 1.125  # the head of a model in int4 has 8 bits, in the same groups
MOST_SCORES = 2**24  # elements of a tensor of rows times context, as cuda_ext/reference/attention.py has it
ATTENTION = 3 * 4 * MOST_SCORES  # three of those in float32
ROW_BYTES = 64  # a token of the vocabulary while one row is sampled from in plain torch


@dataclass(frozen=True)
class Demand:
    """What one model takes where a rank has it.

    Attributes:
        weights: of this rank's part.
        block: of one KV block.
        tree_blocks: blocks of a draft's trees, beside those of sequences.
        scratch: working memory of its largest forward, with what libraries take.
    """

    weights: int
    block: int
    tree_blocks: int
    scratch: int

    def pool(self, blocks: int) -> int:
        """Of a pool with so many blocks for sequences."""
        return (blocks + self.tree_blocks) * self.block


def demand(config: Config, role: Role, arch: Architecture, device: Device) -> Demand:
    """What a model of this role takes at each rank that has it.

    Args:
        arch: of the whole model.
    """
    model, engine, speculation = getattr(config, role), config.engine, config.speculation
    part = arch.part(model.tensor_parallel)
    is_draft = role == "draft"
    forwards = draft_forwards(engine, speculation) if is_draft else target_forwards(engine, speculation)
    layers = forward_bytes(
        part, model.dtype, max(rows for rows, _ in forwards), engine.max_model_len, model.tensor_parallel
    )
    copies = logit_copies(role, speculation.coupling, model.tensor_parallel)
    logits = logit_bytes(arch.vocab_size, max(wanted for _, wanted in forwards), copies)
    return Demand(
        weights=weight_bytes(part, model.dtype, device),
        block=block_bytes(part, engine.block_size, model.dtype),
        tree_blocks=tree_blocks(engine, speculation) if is_draft else 0,
        scratch=LIBRARIES + table_bytes(engine) + max(layers, logits),
    )


# -- what stays -----------------------------------------------------------------------------------------------------


def weight_bytes(part: Architecture, dtype: Dtype, device: Device) -> int:
    """Of the weights of one rank's part: matrices of the layers and the head in `dtype`, the rest in bf16 (fp32 for
    fp32). On a GPU a tied table is the head's matrix too; on a CPU the head is packed apart.

    As the compiled operators pack them: in plain torch a code of int4 has a byte.
    """
    other = 4 if dtype == "fp32" else 2
    head = INT4_HEAD_BYTES if dtype == "int4" else WEIGHT_BYTES[dtype]
    total = 0.0
    for name, shape in expected_tensors(part).items():
        in_layer = name.startswith("layers.") and len(shape) == 2
        each = WEIGHT_BYTES[dtype] if in_layer else head if name == "lm_head.weight" else other
        total += math.prod(shape) * each
    if part.tie_word_embeddings and device == "cpu":
        total += part.vocab_size * part.hidden_size * head
    return math.ceil(total)


def block_bytes(part: Architecture, block_size: int, dtype: Dtype) -> int:
    """Of one KV block at one rank: keys and values of all layers."""
    return block_size * part.num_layers * 2 * part.num_kv_heads * part.head_dim * _activation(dtype)


def tree_blocks(engine: EngineConfig, speculation: SpeculationConfig) -> int:
    """Blocks for two generations of trees, those of a draft beside its sequences' own."""
    nodes = 2 * (speculation.budget * (speculation.lookahead + 2) + chain_nodes(speculation))
    return engine.max_num_seqs * -(-nodes // engine.block_size) + 1


def chain_nodes(speculation: SpeculationConfig) -> int:
    """Most nodes of one chain with all bets on it: a trunk with its root, or a branch drafted just in time."""
    return (1 + 2 * speculation.recycle) * (speculation.lookahead + 2)


# -- what a forward takes -------------------------------------------------------------------------------------------


def target_forwards(engine: EngineConfig, speculation: SpeculationConfig) -> list[tuple[int, int]]:
    """Rows, and rows with logits, of the largest forwards of a target: a chunk of a prompt, and a verification."""
    verified = engine.max_num_seqs * (speculation.lookahead + 1)
    return [(min(engine.prefill_chunk, engine.max_model_len), 1), (verified, verified)]


def draft_forwards(engine: EngineConfig, speculation: SpeculationConfig) -> list[tuple[int, int]]:
    """The same of a draft: a chunk of prompts and a step of all trees at once."""
    bets = 2 * speculation.recycle
    nodes = engine.max_num_seqs * (speculation.budget + speculation.lookahead + 1 + bets)
    return [(min(engine.prefill_chunk, engine.max_num_seqs * engine.max_model_len) + nodes, nodes)]


def forward_bytes(part: Architecture, dtype: Dtype, rows: int, reach: int, ranks: int = 1) -> int:
    """Of the layers of a forward in plain torch, as a GPU runs them: the operator that needs most decides.

    Args:
        rows: of the forward, all sequences together.
        reach: the longest sequence. Attention has its keys and values gathered once, in float32, and beside these
            tensors of a bounded size.
    """
    size, floats = _activation(dtype), 4
    hidden, inner = part.hidden_size, part.intermediate_size
    queries, keys = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
    stays = 2 * hidden * size + 4 * part.head_dim * floats  # a row, its residual, cosines and sines
    norm = 5 * hidden * floats
    attention = (2 * queries + 2 * keys) * size + 4 * queries * floats
    mlp = 3 * inner * size + 5 * inner * floats
    summed = hidden * (ranks * size + 3 * floats) if ranks > 1 else 0
    gathered = reach * 2 * keys
    attending = max(gathered * (size + floats), gathered * floats + ATTENTION)
    return rows * stays + max(rows * norm, rows * attention + attending, rows * mlp, rows * summed)


def table_bytes(engine: EngineConfig) -> int:
    """Of the slots of all sequences, which each keeps in a tensor, and of a forward's copy of them."""
    return 2 * 8 * engine.max_num_seqs * engine.sequence_blocks * engine.block_size


def logit_copies(role: Role, coupling: Coupling, ranks: int) -> int:
    """How often the logits of a forward are there at a time: the model's, brought together from ranks, in the columns
    that both models share, processed, and as what a draft samples from."""
    if role == "draft":
        return 5 if coupling == "rejection" else 3
    return 4 if ranks > 1 else 2


def logit_bytes(vocab_size: int, wanted: int, copies: int) -> int:
    """Of the logits of a forward, float32, and of choosing from them."""
    return vocab_size * (wanted * copies * 4 + ROW_BYTES)


def _activation(dtype: Dtype) -> int:
    """Bytes of a number between the layers, and in the KV cache."""
    return 4 if dtype == "fp32" else 2


# -- what fits ------------------------------------------------------------------------------------------------------


def demands_of_rank(config: Config, role: Role, models: Mapping[Role, Architecture]) -> list[Demand]:
    """Of the models in the process of one rank: its own, and the draft that a target may hold."""
    device: Device = getattr(config, role).device
    demands = [demand(config, role, models[role], device)]
    if role == "target" and config.deployment.holds_draft(config.speculation.mode):
        demands.append(demand(config, "draft", models["draft"], device))
    return demands


def shares_gpu(config: Config) -> bool:
    """Whether drafts have processes of their own on the target's GPU."""
    return config.deployment.share_gpu and config.speculation.mode in ("sd", "ssd")


def blocks_that_fit(config: Config, role: Role, models: Mapping[Role, Architecture], free: int, total: int) -> int:
    """Blocks of sequences in each pool of a rank on a GPU: engine.num_blocks, or of what can be used what fits.

    Where roles share a GPU each of them computes what all of them can have, from what is the same for all.

    Args:
        models: of the role, of a draft that the target's process holds, of both roles where they share a GPU.
        free: bytes once the models of this rank are loaded.
        total: bytes of the GPU.
    """
    engine = config.engine
    if engine.num_blocks:
        return engine.num_blocks
    demands = demands_of_rank(config, role, models)
    available = math.floor(engine.kv_memory * free)
    if shares_gpu(config):
        ranks = config.target.tensor_parallel  # whose GPUs the drafts take in turn
        processes = [demands_of_rank(config, "target", models)]
        processes += [demands_of_rank(config, "draft", models)] * -(-config.deployment.drafts // ranks)
        demands = [one for process in processes for one in process]
        taken = CONTEXT * len(processes) + sum(one.weights for one in demands)
        available = math.floor(engine.kv_memory * total) - taken
    room = available - sum(one.scratch + one.pool(0) for one in demands)
    return max(0, min(engine.most_blocks, room // sum(one.block for one in demands)))


def with_pool(engine: EngineConfig, blocks: int) -> EngineConfig:
    """The engine with pools of so many blocks for sequences.

    Raises:
        ConfigError: not even one sequence of max_model_len fits, though no number of blocks was asked for.
    """
    tokens = blocks * engine.block_size
    if blocks < engine.sequence_blocks and not engine.num_blocks:
        few = f"there is room for {tokens} tokens of KV cache beside the weights and the working memory of a forward"
        other = "raise target.tensor_parallel, or lower engine.prefill_chunk"
        remedy = f"lower engine.max_model_len to {tokens}" if tokens > 1 else other
        raise ConfigError(f"{few}, and one sequence may have {engine.max_model_len}: {remedy}")
    return replace(engine, num_blocks=blocks)


def about_pool(engine: EngineConfig, blocks: int) -> str:
    """One line for people: the pool that a rank takes, and what limits it."""
    limit = "as many as engine.max_num_seqs sequences can use"
    if engine.num_blocks:
        limit = "as engine.num_blocks says"
    elif blocks < engine.most_blocks:
        limit = f"of {engine.most_blocks} that could be used; engine.kv_memory = {engine.kv_memory:g} leaves no more"
    return f"{blocks} KV blocks ({blocks * engine.block_size} tokens), {limit}"
