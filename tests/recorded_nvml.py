"""NVML as it would answer on a machine that is not here: the calls that hardware.py makes, from a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

RECORDINGS = Path(__file__).with_name("recordings")
H100 = RECORDINGS / "nvml_8xh100.json"


class RecordedNvml:
    """Answers like the module pynvml; a handle is a GPU's number.

    Args:
        path: of the recording.
        changes: replace parts of it.
    """

    NVMLError = pynvml.NVMLError

    def __init__(self, path: Path = H100, **changes: Any) -> None:
        self.recording = json.loads(path.read_text()) | changes
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVML_"):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.recording["devices"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, gpu: int) -> str:  # noqa: N802
        return str(self.recording["devices"][gpu]["name"])

    def nvmlDeviceGetUUID(self, gpu: int) -> str:  # noqa: N802
        return str(self.recording["devices"][gpu]["uuid"])

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(**self.recording["devices"][gpu]["memory"])

    def nvmlDeviceGetNvLinkState(self, gpu: int, link: int) -> int:  # noqa: N802
        if link >= self.recording["devices"][gpu]["nvlink_active"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return 1

    def nvmlDeviceGetMemoryAffinity(self, gpu: int, words: int, scope: int) -> list[int]:  # noqa: N802
        assert scope == pynvml.NVML_AFFINITY_SCOPE_NODE
        return [1 << self.recording["devices"][gpu]["numa_node"], *[0] * (words - 1)]

    def nvmlDeviceGetCpuAffinity(self, gpu: int, words: int) -> list[int]:  # noqa: N802
        mask = self.recording["cpu_affinity_by_numa_node"][self.recording["devices"][gpu]["numa_node"]]
        return [int(word, 16) for word in mask] + [0] * (words - len(mask))

    def nvmlDeviceGetTopologyCommonAncestor(self, a: int, b: int) -> int:  # noqa: N802
        return int(self.recording["topology_common_ancestor"][a][b])

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, what: int) -> int:  # noqa: N802
        assert what == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        return int(self.recording["p2p_status_nvlink"][a][b])
