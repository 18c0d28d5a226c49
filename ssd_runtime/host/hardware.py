"""The GPUs of this host as NVML describes them: memory, what joins them, which CPU cores are near; its adapters for
RDMA. Plans nothing.

Field meanings: NVML API reference (nvmlDeviceGetTopologyCommonAncestor, nvmlDeviceGetP2PStatus,
nvmlDeviceGetCpuAffinity, nvmlDeviceGetMemoryAffinity). Tested with a recording's worth of answers; on a host without
GPUs there is simply nothing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Joint = Literal["same", "nvlink", "switch", "bridge", "numa", "socket", "network"]
INFINIBAND = Path("/sys/class/infiniband")
WORD_BITS = 64
MASK_WORDS = 64  # masks of up to 4096 cores or NUMA nodes


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: NVML's, in the order of the bus.
        uuid: GPU-...
        memory_total, memory_free: bytes.
        nvlinks: active NVLink lanes.
        numa: NUMA nodes whose memory is near; empty where NVML does not know.
        cores: CPU cores that are near; empty where NVML does not know.
    """

    index: int
    name: str
    uuid: str
    memory_total: int
    memory_free: int
    nvlinks: int = 0
    numa: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class Hardware:
    """The GPUs that this process may use, in CUDA's order, and what joins each pair.

    Attributes:
        joints: (a, b) with a < b, positions in `gpus` -> the closest thing that both hang on: NVLink, one PCIe switch,
            several of them ("bridge" is one host bridge), the NUMA node, or only the link between sockets.
        why_none: why there are no GPUs.
    """

    gpus: tuple[Gpu, ...] = ()
    joints: Mapping[tuple[int, int], Joint] = field(default_factory=dict)
    why_none: str = ""

    def joint(self, a: int, b: int) -> Joint:
        """What joins two GPUs."""
        return "same" if a == b else self.joints.get((min(a, b), max(a, b)), "socket")


def read(nvml: Any = None, environ: Mapping[str, str] = os.environ) -> Hardware:
    """Ask NVML. Never fails: a host that cannot be asked has no GPUs, and `why_none` says why.

    Args:
        nvml: the module pynvml, or what answers like it.
        environ: CUDA_VISIBLE_DEVICES narrows and orders the GPUs.
    """
    try:
        nvml = importlib.import_module("pynvml") if nvml is None else nvml
        nvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - no module, no library, no driver: all mean that there is nothing to see
        return Hardware(why_none=f"{type(error).__name__}: {error}")
    try:
        everything = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        gpus = [_gpu(nvml, handle, index) for index, handle in enumerate(everything)]
        chosen = visible(gpus, environ.get("CUDA_VISIBLE_DEVICES"))
        handles = [everything[gpu.index] for gpu in chosen]
        pairs = [(a, b) for b in range(len(chosen)) for a in range(b)]
        joints = {(a, b): _joint(nvml, handles[a], handles[b]) for a, b in pairs}
        return Hardware(tuple(chosen), joints, "" if chosen else "no GPU is visible")
    except nvml.NVMLError as error:
        return Hardware(why_none=f"NVML cannot be asked: {error}")
    finally:
        nvml.nvmlShutdown()


def rdma_adapters(infiniband: Path = INFINIBAND) -> tuple[str, ...]:
    """The InfiniBand and RoCE adapters of this host, as Linux names them in sysfs."""
    return tuple(sorted(entry.name for entry in infiniband.iterdir())) if infiniband.is_dir() else ()


def visible(gpus: Sequence[Gpu], setting: str | None) -> list[Gpu]:
    """The GPUs that CUDA shows, in its order: all, or those named by number or by the beginning of a UUID, up to the
    first name that is none (CUDA programming guide, CUDA_VISIBLE_DEVICES)."""
    if setting is None:
        return list(gpus)
    chosen = []
    for name in (part.strip() for part in setting.split(",")):
        found = [gpu for gpu in gpus if name and (str(gpu.index) == name or gpu.uuid.startswith(name))]
        if len(found) != 1:
            break
        chosen += found
    return chosen


def _gpu(nvml: Any, handle: Any, index: int) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    scope = nvml.NVML_AFFINITY_SCOPE_NODE
    return Gpu(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        nvlinks=_nvlinks(nvml, handle),
        numa=_mask(nvml, lambda: nvml.nvmlDeviceGetMemoryAffinity(handle, MASK_WORDS, scope)),
        cores=_mask(nvml, lambda: nvml.nvmlDeviceGetCpuAffinity(handle, MASK_WORDS)),
    )


def _nvlinks(nvml: Any, handle: Any) -> int:
    active = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += int(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except nvml.NVMLError:  # this GPU has no more links
            break
    return active


def _joint(nvml: Any, a: Any, b: Any) -> Joint:
    try:
        if nvml.nvmlDeviceGetP2PStatus(a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
            return "nvlink"
    except nvml.NVMLError:  # not supported by this GPU: then it is PCIe
        pass
    try:
        level = nvml.nvmlDeviceGetTopologyCommonAncestor(a, b)
    except nvml.NVMLError:
        return "socket"
    if level <= nvml.NVML_TOPOLOGY_MULTIPLE:
        return "switch"
    if level <= nvml.NVML_TOPOLOGY_HOSTBRIDGE:
        return "bridge"
    return "numa" if level <= nvml.NVML_TOPOLOGY_NODE else "socket"


def _mask(nvml: Any, ask: Any) -> tuple[int, ...]:
    """The numbers whose bits are set; none where NVML does not know."""
    try:
        words = ask()
    except nvml.NVMLError:
        return ()
    return tuple(i * WORD_BITS + bit for i, word in enumerate(words) for bit in range(WORD_BITS) if word >> bit & 1)
