"""Rows of the paged KV cache: block tables of sequences, rollback, moves between slots, scratch slots of a tree.

`kv[layer, 2, slot, head, dim]`; slot = block * block_size + offset. Knows no models and no schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ext import ops
from cuda_ext.ops import upload_, uploaded
from ssd_runtime.errors import DeviceFault
from ssd_runtime.kv.pool import BlockAllocator


class BlockTable:
    """The KV rows of one sequence, in order of position.

    Args:
        allocator: where blocks come from and go back to.
        block_size: slots in one block.
        max_length: most rows the sequence may ever hold.
        device: where `slots` lives.

    Attributes:
        block_size: as given.
        slots: int64 [max_length]; entry p is the slot of position p, valid for p < `capacity`. Made when it is first
            needed: whoever waits for admission takes nothing of the device.
        length: rows that hold a token of the sequence.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, max_length: int, device: torch.device) -> None:
        self._allocator = allocator
        self.block_size = block_size
        self._blocks: list[int] = []
        self._padded = -(-max_length // block_size) * block_size
        self._device = device
        self.length = 0

    @functools.cached_property
    def slots(self) -> Tensor:
        return torch.zeros(self._padded, dtype=torch.int64, device=self._device)

    @property
    def capacity(self) -> int:
        return len(self._blocks) * self.block_size

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self._blocks)

    def reserve(self, length: int) -> None:
        """Make room for rows up to `length`, without changing `length`."""
        first = self.capacity
        if length <= first:
            return
        try:
            while self.capacity < length:
                self._blocks.append(self._allocator.allocate())
        finally:  # also of what it got before the pool was exhausted
            upload_(self.slots[first : self.capacity], self.slots_of(first, self.capacity))

    def take_over(self, other: BlockTable, length: int) -> None:
        """Begin with the first `length` rows of another table, whole blocks, held by both: neither may write there."""
        assert not self._blocks, "rows are taken over by an empty table"
        assert length % self.block_size == 0, "only whole blocks are shared"
        assert length <= other.length, "only rows that are there are shared"
        self._blocks = other._blocks[: length // self.block_size]
        for block in self._blocks:
            self._allocator.retain(block)
        self.slots[:length] = other.slots[:length]
        self.length = length

    def slot(self, position: int) -> int:
        """The slot of a position inside the capacity, computed on the host."""
        return self._blocks[position // self.block_size] * self.block_size + position % self.block_size

    def slots_of(self, start: int, end: int) -> list[int]:
        """The slots of the positions from `start` to before `end`, computed on the host."""
        size, slots = self.block_size, list[int]()
        for index in range(start // size, -(-end // size)):
            shift = (self._blocks[index] - index) * size
            slots += range(max(start, index * size) + shift, min(end, (index + 1) * size) + shift)
        return slots

    def rollback(self, length: int) -> None:
        """Keep the first `length` rows and give back every whole block behind them."""
        self.length = length
        needed = -(-length // self.block_size)
        while len(self._blocks) > needed:
            self._allocator.release(self._blocks.pop())

    def release(self) -> None:
        """Give everything back."""
        self.rollback(0)


class ScratchSlots:
    """Slots for the rows of a tree, taken from the same pool in whole blocks and given back when none is in use.

    Args:
        max_blocks: how much of the pool may be used for them; the rest is for sequences.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, max_blocks: int) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._blocks: list[int] = []
        self._free: list[int] = []

    @property
    def room(self) -> int:
        """Slots that may still be taken."""
        return len(self._free) + (self._max_blocks - len(self._blocks)) * self._block_size

    def take(self) -> int:
        if not self._free:
            block = self._allocator.allocate()
            self._blocks.append(block)
            self._free.extend(range((block + 1) * self._block_size - 1, block * self._block_size - 1, -1))
        return self._free.pop()

    def give_back(self, slots: Sequence[int]) -> None:
        self._free.extend(slots)

    def release(self) -> None:
        """Give every block back, whatever is still taken."""
        for block in self._blocks:
            self._allocator.release(block)
        self._blocks, self._free = [], []


def copy_branch(kv: Tensor, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
    """Move rows between slots, keys and values of all layers; safe when sources and targets overlap.

    Args:
        kv: [layer, 2, slot, head, dim], changed in place.
        source_slots, target_slots: of equal length; targets distinct.
    """
    if not source_slots:
        return
    source_N, target_N = uploaded([*source_slots, *target_slots], kv.device).view(2, -1)
    ops.copy_branch_(kv, source_N, target_N)


def raise_faults(kv: Tensor) -> None:
    """Raise DeviceFault where a kernel on kv's device has met a slot outside the pool since the last call.

    Device kernels leave such a row alone and record it, since a launch cannot look at values. Waits for the device, so
    it belongs where results have just been read. CPU kernels check before they write: nothing to do there.
    """
    if kv.device.type == "cpu":
        return
    try:
        ops.raise_faults(kv)
    except RuntimeError as fault:
        raise DeviceFault(str(fault)) from None


def copy_branch_oracle(kv: Tensor, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
    """`copy_branch` by definition: remember every source row, then write row by row."""
    rows = [kv[:, :, slot].clone() for slot in source_slots]
    for slot, row in zip(target_slots, rows, strict=True):
        kv[:, :, slot] = row
