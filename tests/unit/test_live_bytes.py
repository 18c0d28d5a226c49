"""The instrument itself: what it counts, what it leaves out."""

from __future__ import annotations

import pytest
import torch

from tests.live_bytes import LiveBytes, peak_bytes

DEVICES = ("cpu", "meta")
KIB = 1024


@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_holds_what_was_alive_at_once_and_not_what_was_made_in_all(device: str) -> None:
    with LiveBytes() as live:
        for _ in range(5):
            first = torch.ones(KIB, dtype=torch.uint8, device=device)
            second = first + first
            del first
            third = second + second
            del second, third
    assert (live.now, live.peak) == (0, 2 * KIB)


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_and_a_change_in_place_add_nothing_but_a_view_keeps_its_storage_alive(device: str) -> None:
    with LiveBytes() as live:
        whole = torch.ones(KIB, dtype=torch.uint8, device=device)
        part = whole.reshape(32, 32)[3].detach()
        whole.add_(1)
        del whole
        assert (live.now, live.peak) == (KIB, KIB)
        del part
        assert live.now == 0


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_there_before_is_not_counted_nor_are_views_of_it(device: str) -> None:
    weight = torch.ones(KIB, dtype=torch.uint8, device=device)
    assert peak_bytes(lambda: weight.reshape(32, 32)[:, 1:].mul_(2)) == 0


@pytest.mark.parametrize("inference", [False, True])
def test_operators_made_of_others_are_taken_apart(inference: bool) -> None:
    """The first operand is copied on the way, since its summed dimension lies between two others."""
    left, right = torch.ones(2, 16, 3, 16, device="meta"), torch.ones(2, 3, 5, device="meta")
    with torch.inference_mode(inference):
        peak = peak_bytes(lambda: torch.einsum("aibj,abk->aijk", left, right))
    result = 4 * 2 * 16 * 16 * 5
    assert peak == result + 4 * left.numel()
