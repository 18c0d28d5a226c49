"""How the ranks of one tensor-parallel target meet: on a prefix of torchrun's store, before they load the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launcher.ranks import rendezvous
from ssd_runtime.comm.collective import TargetGroup, meet_target_gpus, meet_target_ranks
from ssd_runtime.config import Config
from ssd_runtime.host import topology


@dataclass(frozen=True)
class SharedTarget:
    """What one rank reaches the others by.

    Attributes:
        frames: between CPUs, for the leader's frames.
        tensors: between the devices of the model; the same group where these are CPUs.
        silence: longest wait for another rank once all have loaded, in seconds.
    """

    frames: TargetGroup
    tensors: TargetGroup
    silence: float

    def all_loaded(self, blocks: int) -> int:
        """Wait until every rank has loaded its part; from here on nobody waits long.

        Args:
            blocks: KV blocks that fit beside this rank's part.

        Returns:
            Those that fit beside every rank's.
        """
        least = int(self.frames.gather(torch.tensor([blocks])).min())
        self.frames.deadline_s = self.tensors.deadline_s = self.silence
        return least


@contextlib.contextmanager
def joined(config: Config, place: topology.Placement, store: Any) -> Iterator[SharedTarget]:
    """Meet the other target ranks; while they load they may take as long as loading may. Raises PeerLost."""
    timeouts = config.timeouts
    patience = timeouts.load + timeouts.handshake
    rank, size = place.rank, place.num_targets
    with contextlib.ExitStack() as groups:
        prefix = dist.PrefixStore("target/frames", store)
        frames = meet_target_ranks(prefix, rank, size, rendezvous.way_to_store(), patience)
        groups.callback(frames.close)
        tensors = frames
        if topology.group_backend(config.target.device) == "nccl":
            prefix = dist.PrefixStore("target/tensors", store)
            tensors = meet_target_gpus(prefix, rank, size, place.device, patience)
            groups.callback(tensors.close)
        yield SharedTarget(frames, tensors, max(timeouts.link, 3 * timeouts.idle_heartbeat))
