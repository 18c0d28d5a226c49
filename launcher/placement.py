"""The plan of a run: which rank on which node and GPU, what its memory holds, and what is wrong with it, but that GPUs
are missing (`topology.devices_of`).

Arithmetic on what hardware.py read and what the models' headers say; touches no device, and takes the other nodes for
copies of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.nodes import Seat
from ssd_runtime.config import Config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.allotment import cores_of, gpus_of, model_of
from ssd_runtime.host.cores import Role, listed
from ssd_runtime.host.hardware import Gpu, Hardware, Joint
from ssd_runtime.model import memory
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.memory import GIB

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
        gpu: position among the visible GPUs; None on a CPU, and where there are none.
        weights: bytes of its part of the model, and of the draft that a target may hold.
        kv_blocks: blocks of its pool, for sequences.
        kv_bytes: bytes of these and of those for a draft's trees.
        scratch: bytes of working memory; 0 on a CPU, where nothing is kept for it.
        left: bytes that stay free beside all this and CUDA's own; None on a CPU.
        cores: CPU cores it is pinned to; empty means not pinned here.
        node: of the world.
    """

    role: Role
    rank: int
    gpu: int | None
    weights: int
    kv_blocks: int
    kv_bytes: int
    scratch: int
    left: int | None
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
        models: of the roles that have a seat, and of those that are on their GPUs too.
        seats: the ranks, in order.
        allowed: CPU cores of this process.
        rdma: adapters of this host over which GPUs of other nodes are reached.
    """
    ranks = []
    for node in sorted({seat.node for seat in seats}):
        here = [seat for seat in seats if seat.node == node]
        roles = [seat.role for seat in here]
        gpus, cores = gpus_of(config, roles), cores_of(config, roles, allowed, hardware)
        for seat, gpu, mine in zip(here, gpus, cores, strict=False):
            ranks.append(replace(_rank(config, hardware, seat, gpu, models), cores=mine))
    ranks = _with_pools(config, hardware, models, ranks)
    targets = [one for one in ranks if one.role == "target"]
    drafts = [one for one in ranks if one.role == "draft"]
    between = [_joint(hardware, a, b) for i, a in enumerate(targets) for b in targets[:i]]
    links = [_joint(hardware, targets[0], one) for one in drafts] if targets else []
    found = Plan(tuple(ranks), _worst(between), _worst(links), (), tuple(_notes(config, ranks)))
    return replace(found, warnings=tuple(_warnings(config, hardware, found, rdma)))


def describe(config: Config, one: RankPlan, *, with_node: bool = False) -> str:
    """One rank's plan in a line."""
    without = "cpu" if model_of(config, one.role).device == "cpu" else "no GPU"
    where = (without if one.gpu is None else f"GPU {one.gpu}") + (f" of node {one.node}" if with_node else "")
    cores = f", cores {listed(one.cores)}" if one.cores else ""
    kv = (
        f"{one.kv_blocks} KV blocks ({one.kv_blocks * config.engine.block_size} tokens) in {one.kv_bytes / GIB:.2f} GiB"
    )
    rest = "" if one.left is None else f", {one.scratch / GIB:.2f} GiB of scratch, {one.left / GIB:.2f} GiB left"
    return f"{where}{cores}: {one.weights / GIB:.2f} GiB of weights, {kv}{rest}"


def _rank(
    config: Config, hardware: Hardware, seat: Seat, wanted: int | None, models: Mapping[Role, Architecture]
) -> RankPlan:
    """The plan of one rank as if it were alone; without its cores, and without what is left."""
    demands = memory.demands_of_rank(config, seat.role, models)
    weights, scratch = sum(one.weights for one in demands), sum(one.scratch for one in demands)
    if wanted is None or not hardware.gpus:
        return RankPlan(seat.role, seat.rank, None, weights, config.engine.pool_blocks, 0, 0, None, (), seat.node)
    index = min(wanted, len(hardware.gpus) - 1)
    gpu = hardware.gpus[index]
    free = gpu.memory_free - memory.CONTEXT - weights
    blocks = memory.blocks_that_fit(config, seat.role, models, free, gpu.memory_total)
    return RankPlan(seat.role, seat.rank, index, weights, blocks, 0, scratch, None, (), seat.node)


def _with_pools(
    config: Config, hardware: Hardware, models: Mapping[Role, Architecture], ranks: Sequence[RankPlan]
) -> list[RankPlan]:
    """The same with pools, equal ones at the target's ranks, and with what all ranks of a GPU leave of it."""
    least = min((one.kv_blocks for one in ranks if one.role == "target"), default=0)
    found = []
    for one in ranks:
        blocks = least if one.role == "target" else one.kv_blocks
        pools = [each.pool(blocks) for each in memory.demands_of_rank(config, one.role, models)]
        found.append(replace(one, kv_blocks=blocks, kv_bytes=sum(pools)))
    return [replace(one, left=_left(hardware, one, found)) for one in found]


def _left(hardware: Hardware, one: RankPlan, ranks: Sequence[RankPlan]) -> int | None:
    if one.gpu is None:
        return None
    here = [other for other in ranks if (other.node, other.gpu) == (one.node, one.gpu)]
    taken = sum(memory.CONTEXT + other.weights + other.scratch + other.kv_bytes for other in here)
    return hardware.gpus[one.gpu].memory_free - taken


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
        warnings += _memory(config, one, hardware.gpus[one.gpu or 0])
        remote = set(one.cores) - set(hardware.gpus[one.gpu or 0].cores)
        if remote and hardware.gpus[one.gpu or 0].cores and model_of(config, one.role).cores:
            warnings.append(
                f"{one.role} rank {one.rank} is pinned to cores {listed(remote)}, which are far from GPU {one.gpu} "
                f"(near: {listed(hardware.gpus[one.gpu or 0].cores)}); leave {one.role}.cores empty"
            )
    warnings += _pools_differ(found.ranks)
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


def _memory(config: Config, one: RankPlan, gpu: Gpu) -> list[str]:
    """What does not fit. A pool that is smaller than it could be is no fault."""
    who = f"{one.role} rank {one.rank}"
    free = f"GPU {one.gpu} has {gpu.memory_free / GIB:.1f} GiB free"
    if one.weights + one.scratch + memory.CONTEXT > gpu.memory_free:
        remedy = "raise target.tensor_parallel" if one.role == "target" else "take a smaller draft"
        sizes = f"{one.weights / GIB:.1f} GiB of weights, {one.scratch / GIB:.1f} GiB of scratch"
        return [f"{who} does not fit: {sizes}, and {free}; {remedy}"]
    try:
        memory.with_pool(config.engine, one.kv_blocks)
    except ConfigError as error:
        return [f"{who}: {free}; {error}"]
    if one.left is not None and one.left < 0:
        pool = f"{one.kv_blocks} blocks ({one.kv_bytes / GIB:.1f} GiB)"
        remedy = "lower engine.num_blocks, or set it to 0" if config.engine.num_blocks else "use more GPUs"
        return [f"the KV cache of {who} does not fit: {pool}, and {free}; {remedy}"]
    return []


def _pools_differ(ranks: Sequence[RankPlan]) -> list[str]:
    """Drafts that the target would refuse."""
    targets = [one.kv_blocks for one in ranks if one.role == "target"]
    least = min((one.kv_blocks for one in ranks if one.role == "draft"), default=0)
    if not targets or least >= targets[0] or least == 0:
        return []
    return [f"a draft has room for {least} KV blocks and the target for {targets[0]}: set engine.num_blocks = {least}"]
