"""Random weights of a known shape, made where they are used. Knows no file and no decoder."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

from ssd_runtime.model.files.source import WHOLE, Part, expected_tensors
from ssd_runtime.model.random.models import RandomModel

if TYPE_CHECKING:
    from torch import Tensor, device


class RandomWeights:
    """A `WeightSource` that makes each tensor when it is read and keeps none.

    Matrices are normal with the deviation 1 / sqrt(in features), so that what flows through them keeps its size and
    logits are of the order of one; vectors, which are all of norms, are ones. A tensor depends on the architecture's
    family, its own name and shape, and the kind of device: every generator has numbers of its own. Ranks that read
    parts of it get parts of the same tensor.

    Args:
        device: where tensors are made; None is the CPU. On "meta" they have a shape only.
    """

    def __init__(self, model: RandomModel, device: device | None = None) -> None:
        self.path, self.architecture = model.path, model.arch
        self._device = device
        self._shapes = expected_tensors(model.arch)

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        import torch

        shape, device = self._shapes[name], self._device or torch.device("cpu")
        if len(shape) == 1:
            return part.of(torch.ones(shape, device=device))
        tensor = torch.empty(shape, device=device)
        if device.type != "meta":
            seed = zlib.crc32(f"{self.architecture.family} {name}".encode())
            tensor.normal_(0.0, 1.0 / math.sqrt(shape[-1]), generator=torch.Generator(device).manual_seed(seed))
        return tensor if part == WHOLE else part.of(tensor).clone()  # a view would keep the whole alive

    def rope_factors(self) -> Tensor | None:
        return None
