"""The ranks of a tensor-parallel target as threads of one process, over real Gloo groups."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from ssd_runtime.comm.collective import TargetGroup, meet_target_ranks
from ssd_runtime.config import Dtype
from ssd_runtime.errors import PeerLost
from ssd_runtime.leader.replay import Follower, LeadingDecoder
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.files.source import WeightSource
from ssd_runtime.model.load import decoder_from_weights
from tests.tiny_models import CPU

SOON = 30.0  # a loaded machine
Result = TypeVar("Result")


def on_every_rank(size: int, work: Callable[[TargetGroup], Result], deadline_s: float = SOON) -> list[Result]:
    """What `work` returns at every rank, all at once; whatever a rank raises is raised here."""
    store = dist.HashStore()
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            group = meet_target_ranks(store, rank, size, "127.0.0.1", deadline_s)
            with contextlib.closing(group):
                results[rank] = work(group)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SOON)
        assert not thread.is_alive(), "a rank hangs"
    # A rank that breaks takes the others with it: what broke it says more than that it is gone.
    for error in sorted(errors.values(), key=lambda error: isinstance(error, PeerLost)):
        raise error
    return [results[rank] for rank in range(size)]


@contextlib.contextmanager
def parallel_decoder(
    source: WeightSource, size: int, block_size: int, dtype: Dtype = "fp32"
) -> Iterator[LeadingDecoder]:
    """The leader's decoder of a model spread over `size` ranks; the followers are threads that must end well."""
    store = dist.HashStore()
    ended: list[str] = []

    def follow(rank: int) -> None:
        try:
            with contextlib.closing(meet_target_ranks(store, rank, size, "127.0.0.1", SOON)) as group:
                decoder: Decoder = decoder_from_weights(source, dtype, CPU, group=group)
                Follower(decoder, group, block_size).run()
            ended.append("told to")
        except BaseException as error:  # noqa: BLE001 - asserted on below
            ended.append(repr(error))

    threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    with contextlib.closing(meet_target_ranks(store, 0, size, "127.0.0.1", SOON)) as group:
        leader = LeadingDecoder(decoder_from_weights(source, dtype, CPU, group=group), group, block_size, 5.0)
        leader.start()
        try:
            yield leader
        finally:
            leader.close()
            for thread in threads:
                thread.join(SOON)
    assert ended == ["told to"] * (size - 1)
