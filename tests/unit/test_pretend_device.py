"""The pretend device does what a GPU does, refuses what a GPU refuses, and counts what makes the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_ext import reference
from cuda_ext.ops import to_host
from tests.pretend_device import CUDA_KERNELS, DEVICE, Impossible, PretendDevice


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with PretendDevice() as device:
        yield device


def numbers() -> Tensor:
    return torch.arange(12.0, device=DEVICE).view(3, 4)


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0, 0].item(),
    "int": lambda x: int(x[1, 1]),
    "bool": lambda x: bool((x > 3).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "copy to the host": lambda x: torch.empty(3, 4).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "index by a mask": lambda x: x[x > 3],
    "masked_select": lambda x: x.masked_select(x > 3),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "an index on the device, where a number is wanted": lambda x: x[x[0, 1].long()],
}
NO_READS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(-1).sum(),
    "a number of the host": lambda x: x + torch.tensor(1.0),
    "gather": lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64, device=DEVICE)),
    "shapes": lambda x: (len(x), x.shape, x.stride(), x.reshape(-1).split([5, 7])),
    "another dtype": lambda x: x.double(),
    "where": lambda x: x.where(x > 3, 0.0).masked_fill_(x > 5, 1.0),
    "best": lambda x: (x.topk(2), x.sort(stable=True), x.max(dim=-1)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", READS)
def test_whatever_the_host_waits_for_is_one_read(what: str, inference: bool, device: PretendDevice) -> None:
    x = numbers()
    with device.tallied() as tally, torch.inference_mode(inference):
        READS[what](x)
    assert (tally.reads.total(), tally.uploads.total()) == (1, 0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", NO_READS)
def test_what_stays_on_the_device_is_no_read(what: str, inference: bool, device: PretendDevice) -> None:
    x = numbers()
    with device.tallied() as tally, torch.inference_mode(inference):
        NO_READS[what](x)
    assert (tally.reads.total(), tally.uploads.total()) == (0, 0)


def test_whatever_the_host_brings_is_one_upload(device: PretendDevice) -> None:
    x = numbers()
    for bring in (
        lambda: torch.tensor([1, 2], device=DEVICE),
        lambda: torch.ones(2).to(DEVICE),
        lambda: x.copy_(torch.ones(4)),
        lambda: x[[0, 2]],
        lambda: x.index_fill_(0, torch.tensor([1], device=DEVICE), 0.0),
    ):
        with device.tallied() as tally:
            bring()
        assert (tally.reads.total(), tally.uploads.total()) == (0, 1)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.ones(4) + x,
        lambda x: torch.cat([x, torch.ones(3, 4)]),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x[torch.tensor([0])],
        lambda x: torch.nn.functional.linear(x, torch.ones(2, 4)),
        lambda x: torch.zeros(12).add_(x.flatten()),
        lambda x: torch.tensor(1.0).add_(x.sum()),
    ],
)
def test_an_operator_on_tensors_of_both_sides_is_refused(mix: Callable[[Tensor], Any], device: PretendDevice) -> None:
    with pytest.raises(Impossible, match="takes tensors of pretend:0, and of the CPU"):
        mix(numbers())


def test_a_refusal_names_the_operator_and_the_line_of_the_product(device: PretendDevice) -> None:
    with pytest.raises(Impossible, match=r"^cuda_ext/reference/layers.py:\d+: aten.mul.Tensor "):
        reference.rms_norm(numbers(), torch.ones(4), 1e-5)


def test_reads_are_counted_by_line_of_the_product(device: PretendDevice) -> None:
    ranked = torch.zeros(2, 4, device=DEVICE), torch.ones(2, dtype=torch.int64, device=DEVICE)
    with device.tallied() as tally:
        reference.rollback_(ranked[0].long(), ranked[1], ranked[1], ranked[1], 2)
    assert tally.reads
    assert all(line.startswith("cuda_ext/reference/cache.py:") for line in tally.reads)
    assert all(line in tally.table() for line in tally.reads)


@pytest.mark.parametrize("look", [lambda x: x.numpy(), lambda x: x.data_ptr(), np.asarray])
def test_its_memory_cannot_be_looked_into(look: Callable[[Tensor], Any], device: PretendDevice) -> None:
    with pytest.raises(Impossible, match="look into the memory"):
        look(numbers())


def test_what_changes_in_a_view_changes_in_the_whole(device: PretendDevice) -> None:
    x = numbers()
    first, second = x.chunk(2, dim=-1)
    first.mul_(0)
    second[1] = -1.0
    assert x.add_(1) is x
    assert x.tolist() == [[1, 1, 3, 4], [1, 1, 0, 0], [1, 1, 11, 12]]


def test_nothing_happens_on_it_while_it_is_not_there() -> None:
    with PretendDevice():
        x = numbers()
    with pytest.raises(Impossible, match="outside of"):
        x + 1


def test_the_operators_with_cuda_kernels_are_known() -> None:
    assert {"copy_branch_", "sample_shared_noise", "raise_faults"} <= CUDA_KERNELS
    assert not {"rms_norm", "paged_attention", "decoder_layers_"} & CUDA_KERNELS


def test_results_of_any_shape_and_dtype_come_by_one_copy(device: PretendDevice) -> None:
    made = [
        torch.tensor([True, False, True]),
        torch.arange(6).view(2, 3),
        torch.tensor(2.5, dtype=torch.float64),
        torch.randn(2, 5).bfloat16(),
        torch.randn(3, 4).t(),
        torch.empty(0, 3),
    ]
    there = [tensor.to(DEVICE) for tensor in made]
    with device.tallied() as tally:
        back = to_host(*there)
    assert (tally.reads.total(), tally.uploads.total()) == (1, 0)
    for sent, came in zip(made, back, strict=True):
        assert came.dtype == sent.dtype
        assert came.device.type == "cpu"
        assert torch.equal(came, sent)
    assert all(came is sent for came, sent in zip(to_host(*made), made, strict=True))
