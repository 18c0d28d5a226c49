"""The process groups that links and tensor-parallel targets travel by: Gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssd_runtime.comm.link.gloo_ports import heard_while_built


def gloo_group(store: Any, rank: int, local_host: str, timeout: timedelta, size: int = 2) -> Any:
    """A group between CPUs. It listens at `local_host` while it is built."""
    with heard_while_built(lambda: dist.ProcessGroupGloo.create_device(hostname=local_host)) as device:
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout, options._threads = [device], timeout, 1
        return dist.ProcessGroupGloo(store, rank, size, options)


def nccl_group(
    store: Any, rank: int, device: torch.device, timeout: timedelta, size: int = 2, small: bool = False
) -> Any:
    """A group between GPUs with a non-blocking communicator.

    Args:
        timeout: torch itself ends an operation that takes longer.
        small: for few words beside a forward: one block of threads, before the forward's where there is a choice.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout, options.config.blocking = timeout, 0
    if small:
        options.is_high_priority_stream, options.config.max_ctas = True, 1
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that torch appends."""
    return (str(error).splitlines() or [type(error).__name__])[0]
