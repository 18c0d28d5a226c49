"""The second rank of the target that nccl_target.py measures, and how both meet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from launcher.ranks import nccl
from ssd_runtime.comm.collective import TargetGroup, meet_target_gpus, meet_target_ranks
from ssd_runtime.config import Dtype
from ssd_runtime.leader.replay import Follower
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.load import decoder_from_weights
from tests.tiny_models import RandomWeights

BLOCK, DEADLINE_S = 16, 60.0


@contextlib.contextmanager
def groups(port: int, rank: int, device: torch.device) -> Iterator[tuple[TargetGroup, TargetGroup]]:
    """Frames and tensors of a target of two; on a CPU both are one group, of Gloo."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    with contextlib.ExitStack() as held:
        frames = meet_target_ranks(dist.PrefixStore("frames", store), rank, 2, "127.0.0.1", DEADLINE_S)
        held.callback(frames.close)
        tensors = frames
        if device.type == "cuda":
            tensors = meet_target_gpus(dist.PrefixStore("tensors", store), rank, 2, device, DEADLINE_S)
            held.callback(tensors.close)
        yield frames, tensors


def follow(port: int, arch: Architecture, dtype: Dtype, device: torch.device) -> None:
    """The second rank, in a process of its own."""
    torch.set_num_threads(1)
    nccl.apply()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with groups(port, 1, device) as (frames, tensors):
        Follower(decoder_from_weights(RandomWeights(arch), dtype, device, group=tensors), frames, BLOCK).run()
