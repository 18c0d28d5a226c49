"""Results of a device, brought to the host together: each read of its own waits for all that is queued there."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(*results: Tensor) -> tuple[Tensor, ...]:
    """The same tensors on the CPU, by one copy; on the CPU themselves. They may differ in shape and dtype."""
    if results[0].device.type == "cpu":
        return results
    widest_first = sorted(results, key=lambda result: -result.itemsize)  # so each begins where its dtype may
    parts = [result.flatten().contiguous().view(torch.uint8) for result in widest_first]
    copied = torch.cat(parts).cpu().split([part.numel() for part in parts])
    found = {
        id(result): flat.view(result.dtype).view(result.shape)
        for result, flat in zip(widest_first, copied, strict=True)
    }
    return tuple(found[id(result)] for result in results)
