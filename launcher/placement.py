"""The plan of a run on one host: which rank on which GPU, what its memory holds, and what is wrong with it.

Arithmetic on what hardware.py read and what the models' headers say; touches no device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ssd_runtime.config import Config, ModelConfig
from ssd_runtime.cores import Role, listed
from ssd_runtime.hardware import Gpu, Hardware, Joint, near_cores
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.source import expected_tensors
from ssd_runtime.topology import cores_of_ranks

GIB = 2**30
# Left free on each GPU: CUDA's context, NCCL's buffers, activations of a prefill chunk, logits. An estimate.
RESERVE = 3 * GIB
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.625}  # int4: with a scale and a minimum for 32
JOINTS: dict[Joint, str] = {
    "same": "one GPU",
    "nvlink": "NVLink",
    "switch": "PCIe switches",
    "bridge": "a PCIe host bridge",
    "numa": "the NUMA node",
    "socket": "the link between sockets",
}


@dataclass(frozen=True)
class RankPlan:
    """One rank.

    Attributes:
        gpu: position among the visible GPUs; None on a CPU.
        weights: bytes of its part of the model.
        kv_blocks: blocks of its pool, scratch included.
        kv_bytes: bytes of these.
        blocks_left: blocks that fit beside the weights; None on a CPU.
        cores: CPU cores it is pinned to; empty means not pinned here.
    """

    role: Role
    rank: int
    gpu: int | None
    weights: int
    kv_blocks: int
    kv_bytes: int
    blocks_left: int | None
    cores: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The ranks of one host, what joins them, and what to mend."""

    ranks: tuple[RankPlan, ...]
    target_joint: Joint | None
    link_joint: Joint | None
    warnings: tuple[str, ...]


def plan(
    config: Config,
    hardware: Hardware,
    target: Architecture,
    draft: Architecture,
    num_ranks: int,
    allowed: Sequence[int],
) -> Plan:
    """Place the ranks of a world on this host; ranks take the GPUs in order, targets first.

    Args:
        target, draft: of the models.
        num_ranks: of the world; the first target.tensor_parallel are targets.
        allowed: CPU cores of this process.
    """
    ranks = []
    for rank, cores in cores_of_ranks(config, range(num_ranks), allowed).items():
        role: Role = "target" if rank < config.target.tensor_parallel else "draft"
        one = _rank(config, hardware, role, rank, target if role == "target" else draft)
        near = () if one.gpu is None else near_cores(hardware, one.gpu, allowed)
        ranks.append(replace(one, cores=cores or near))
    targets = [one.gpu for one in ranks if one.role == "target" and one.gpu is not None]
    drafts = [one.gpu for one in ranks if one.role == "draft" and one.gpu is not None]
    between = [hardware.joint(a, b) for i, a in enumerate(targets) for b in targets[:i]]
    links = [hardware.joint(targets[0], gpu) for gpu in drafts] if targets else []
    found = Plan(tuple(ranks), _worst(between), _worst(links), ())
    return Plan(found.ranks, found.target_joint, found.link_joint, tuple(_warnings(config, hardware, found)))


def describe(one: RankPlan, block_size: int) -> str:
    """One rank's plan in a line."""
    where = "cpu" if one.gpu is None else f"GPU {one.gpu}"
    cores = f", cores {listed(one.cores)}" if one.cores else ""
    room = "" if one.blocks_left is None else f"; room for {one.blocks_left} ({one.blocks_left * block_size} tokens)"
    kv = f"{one.kv_blocks} KV blocks in {one.kv_bytes / GIB:.2f} GiB{room}"
    return f"{where}{cores}: {one.weights / GIB:.2f} GiB of weights, {kv}"


def weight_bytes(arch: Architecture, dtype: str, share: int = 1) -> int:
    """Bytes of one of `share` equal parts: matrices of the layers in `dtype`, the rest in bf16 (fp32 for fp32).

    Vectors are not divided, but they do not count for much.
    """
    other = 4 if dtype == "fp32" else 2
    total = 0.0
    for name, shape in expected_tensors(arch).items():
        in_layer = name.startswith("layers.") and len(shape) == 2
        total += math.prod(shape) * (WEIGHT_BYTES[dtype] if in_layer else other)
    return math.ceil(total / share)


def block_bytes(arch: Architecture, block_size: int, dtype: str, share: int = 1) -> int:
    """Bytes of one KV block at one of `share` ranks: keys and values of all layers, a head at least."""
    heads = max(1, arch.num_kv_heads // share)
    return block_size * arch.num_layers * 2 * heads * arch.head_dim * (4 if dtype == "fp32" else 2)


def _rank(config: Config, hardware: Hardware, role: Role, rank: int, arch: Architecture) -> RankPlan:
    """The plan of one rank, but for its cores."""
    model: ModelConfig = config.target if role == "target" else config.draft
    share = config.target.tensor_parallel if role == "target" else 1
    weights = weight_bytes(arch, model.dtype, share)
    block = block_bytes(arch, config.engine.block_size, model.dtype, share)
    blocks = config.engine.pool_blocks
    if role == "draft":  # the rows of its trees have a pool of their own
        rows = config.engine.max_num_seqs * (config.speculation.budget + 1) * (config.speculation.lookahead + 1)
        blocks += -(-rows // config.engine.block_size)
    gpu: int | None = None
    left: int | None = None
    if model.device == "cuda" and hardware.gpus:
        gpu = min(rank, len(hardware.gpus) - 1)
        left = max(0, (hardware.gpus[gpu].memory_free - RESERVE - weights) // block)
    return RankPlan(role, rank, gpu, weights, blocks, blocks * block, left, ())


def _worst(joints: Sequence[Joint]) -> Joint | None:
    return max(joints, key=list(JOINTS).index, default=None)


def _warnings(config: Config, hardware: Hardware, found: Plan) -> list[str]:
    warnings = []
    on_gpus = [one for one in found.ranks if one.gpu is not None]
    for one in on_gpus:
        warnings += _memory(one, hardware.gpus[one.gpu or 0], config.engine.block_size)
        remote = set(one.cores) - set(hardware.gpus[one.gpu or 0].cores)
        if remote and hardware.gpus[one.gpu or 0].cores:
            warnings.append(
                f"{one.role} rank {one.rank} is pinned to cores {listed(remote)}, which are far from GPU {one.gpu} "
                f"(near: {listed(hardware.gpus[one.gpu or 0].cores)}); leave {one.role}.cores empty"
            )
    users: dict[int, list[RankPlan]] = {}
    for one in on_gpus:
        users.setdefault(one.gpu or 0, []).append(one)
    for gpu, sharing in users.items():
        if len(sharing) > 1:
            who = ", ".join(f"{one.role} rank {one.rank}" for one in sharing)
            warnings.append(f"{who} share GPU {gpu}: drafting cannot hide behind verification; use more GPUs")
    if found.target_joint not in (None, "same", "nvlink"):
        how = JOINTS[found.target_joint]
        place = "sockets" if found.target_joint == "socket" else "NVLink islands"
        warnings.append(
            f"target ranks are spread over {place} (joined by {how}): they exchange activations twice a layer; "
            "choose GPUs of one island with CUDA_VISIBLE_DEVICES"
        )
    return warnings


def _memory(one: RankPlan, gpu: Gpu, block_size: int) -> list[str]:
    who = f"{one.role} rank {one.rank}"
    free = f"GPU {one.gpu} has {gpu.memory_free / GIB:.1f} GiB free"
    if one.weights + RESERVE > gpu.memory_free:
        remedy = "raise target.tensor_parallel" if one.role == "target" else "take a smaller draft"
        return [f"{who} does not fit: {one.weights / GIB:.1f} GiB of weights, and {free}; {remedy}"]
    if one.blocks_left is not None and one.kv_blocks > one.blocks_left:
        return [
            f"the KV cache of {who} does not fit: {one.kv_blocks} blocks ({one.kv_bytes / GIB:.1f} GiB), and beside "
            f"the weights there is room for {one.blocks_left}; {free}; lower engine.num_blocks, max_num_seqs "
            f"or max_model_len ({one.blocks_left * block_size} tokens fit)"
        ]
    return []
