"""The bytes of tensors made inside a `with`, and their peak. Knows no models.

On the CPU and on the meta device, where a forward of any shape costs nothing. Seen is what operators return: memory
that an operator takes for itself and gives back (a library's workspace, a compiled operator's) is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from tests.operator_watch import OperatorWatch


class LiveBytes(OperatorWatch):
    """Counts storages from the operator that made them to the end of the last tensor that uses them.

    A view adds nothing, nor does what was there before.

    Attributes:
        now: bytes that are alive.
        peak: the most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def watched(self, func: Any, given: object, result: object) -> None:
        before = {id(storage) for storage in _storages(given)}
        for storage in _storages(result):
            if id(storage) not in before and storage not in self._counted:
                self._count(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._counted.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size


def peak_bytes(work: Callable[[], object]) -> int:
    """The peak of what `work` makes; what it returns counts until the end."""
    with LiveBytes() as live:
        work()
    return live.peak


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
