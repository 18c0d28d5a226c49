"""The plan of a run: which rank on which node and GPU, what its memory holds, and what is wrong with it.

Arithmetic on what hardware.py read and what the models' headers say; touches no device, and takes the other nodes for
copies of this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.layout import Seat
from ssd_runtime.allotment import gpus_of, lacks_gpus, model_of
from ssd_runtime.config import Config, ModelConfig
from ssd_runtime.cores import Role, listed
from ssd_runtime.hardware import Gpu, Hardware, Joint
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
    "network": "the network between nodes",
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
        node: of the world.
    """

    role: Role
    rank: int
    gpu: int | None
    weights: int
    kv_blocks: int
    kv_bytes: int
    blocks_left: int | None
    cores: tuple[int, ...]
    node: int = 0


@dataclass(frozen=True)
class Plan:
    """The ranks of a world, or of one role, what joins them, what to know and what to mend."""

    ranks: tuple[RankPlan, ...]
    target_joint: Joint | None
    link_joint: Joint | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()


def plan(
    config: Config,
    hardware: Hardware,
    models: Mapping[Role, Architecture],
    seats: Sequence[Seat],
    allowed: Sequence[int],
    rdma: Sequence[str] = (),
) -> Plan:
    """Place ranks on nodes like this host; the ranks of a node take its GPUs in order.

    Args:
        models: of the roles that have a seat.
        seats: the ranks, in order.
        allowed: CPU cores of this process.
        rdma: adapters of this host over which GPUs of other nodes are reached.
    """
    ranks = []
    for node in sorted({seat.node for seat in seats}):
        here = {seat.rank: seat for seat in seats if seat.node == node}
        gpus = gpus_of(config, [seat.role for seat in here.values()])
        cores = cores_of_ranks(config, range(min(here), max(here) + 1), allowed, hardware)
        for seat, gpu in zip(here.values(), gpus, strict=True):
            one = _rank(config, hardware, seat, gpu, models[seat.role])
            ranks.append(replace(one, cores=cores[seat.rank]))
    targets = [one for one in ranks if one.role == "target"]
    drafts = [one for one in ranks if one.role == "draft"]
    between = [_joint(hardware, a, b) for i, a in enumerate(targets) for b in targets[:i]]
    links = [_joint(hardware, targets[0], one) for one in drafts] if targets else []
    found = Plan(tuple(ranks), _worst(between), _worst(links), (), tuple(_notes(config, ranks)))
    return replace(found, warnings=tuple(_warnings(config, hardware, found, rdma)))


def describe(one: RankPlan, block_size: int, *, with_node: bool = False) -> str:
    """One rank's plan in a line."""
    where = ("cpu" if one.gpu is None else f"GPU {one.gpu}") + (f" of node {one.node}" if with_node else "")
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


def _rank(config: Config, hardware: Hardware, seat: Seat, wanted: int | None, arch: Architecture) -> RankPlan:
    """The plan of one rank, but for its cores."""
    role = seat.role
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
    if wanted is not None and hardware.gpus:
        gpu = min(wanted, len(hardware.gpus) - 1)
        left = max(0, (hardware.gpus[gpu].memory_free - RESERVE - weights) // block)
    return RankPlan(role, seat.rank, gpu, weights, blocks, blocks * block, left, (), seat.node)


def _joint(hardware: Hardware, a: RankPlan, b: RankPlan) -> Joint | None:
    """What joins two ranks; None for CPUs of one host."""
    if a.node != b.node:
        return "network"
    return None if a.gpu is None or b.gpu is None else hardware.joint(a.gpu, b.gpu)


def _worst(joints: Sequence[Joint | None]) -> Joint | None:
    return max((joint for joint in joints if joint is not None), key=list(JOINTS).index, default=None)


def _warnings(config: Config, hardware: Hardware, found: Plan, rdma: Sequence[str]) -> list[str]:
    warnings = []
    on_gpus = [one for one in found.ranks if one.gpu is not None]
    for one in on_gpus:
        warnings += _memory(one, hardware.gpus[one.gpu or 0], config.engine.block_size)
        remote = set(one.cores) - set(hardware.gpus[one.gpu or 0].cores)
        if remote and hardware.gpus[one.gpu or 0].cores and model_of(config, one.role).cores:
            warnings.append(
                f"{one.role} rank {one.rank} is pinned to cores {listed(remote)}, which are far from GPU {one.gpu} "
                f"(near: {listed(hardware.gpus[one.gpu or 0].cores)}); leave {one.role}.cores empty"
            )
    for node in sorted({one.node for one in on_gpus}):
        lack = lacks_gpus(config, [one.role for one in found.ranks if one.node == node], len(hardware.gpus))
        warnings += [] if lack is None else [lack]
    if found.target_joint == "network":
        nodes = listed({one.node for one in found.ranks if one.role == "target"})
        on_gpu = config.target.device == "cuda"
        if not (on_gpu and rdma):
            why = "this host has no InfiniBand or RoCE adapter" if on_gpu else "between CPUs that is over TCP"
            warnings.append(
                f"target ranks are spread over nodes {nodes}: they exchange activations twice a layer, and {why}; "
                "keep them on one node (--nproc-per-node), or lower target.tensor_parallel"
            )
    elif found.target_joint not in (None, "same", "nvlink"):
        how = JOINTS[found.target_joint]
        place = "sockets" if found.target_joint == "socket" else "NVLink islands"
        warnings.append(
            f"target ranks are spread over {place} (joined by {how}): they exchange activations twice a layer; "
            "choose GPUs of one island with CUDA_VISIBLE_DEVICES"
        )
    return warnings


def _notes(config: Config, ranks: Sequence[RankPlan]) -> list[str]:
    """What is as it was asked for, and good to know."""
    users: dict[tuple[int, int], list[RankPlan]] = {}
    for one in ranks:
        if config.deployment.share_gpu and one.gpu is not None:
            users.setdefault((one.node, one.gpu), []).append(one)
    return [
        f"{' and '.join(f'{one.role} rank {one.rank}' for one in sharing)} share GPU {gpu} as deployment.share_gpu "
        "says: drafting hides behind verification in part only"
        for (_, gpu), sharing in users.items()
        if len(sharing) > 1
    ]


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
