"""The benchmark of the operators: each call on memory of its own, seconds of one call, numbers for whoever asks."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from ops.bench import kv

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LAYERS": 2, "SLOTS": 16, "SEQUENCES": 2, "SHAPES": ((2, 8),), "VOCABULARY": 300}.items():
        monkeypatch.setattr(kv, name, value)


def test_every_operator_has_a_speed_in_every_shape(small):
    speeds = list(kv.measure(CPU, turns=2))
    assert [speed.what.split()[0] for speed in speeds] == ["copy_branch_"] * 2 + ["sample_shared_noise"] * 3
    for speed in speeds:
        assert speed.bytes_per_s > 0
        assert speed.share_of_copy > 0
        assert [len(times) for times in (speed.times.plain, speed.times.own, speed.times.copy)] == [2, 2, 2]


@pytest.mark.parametrize("num_bytes", [1, 5_000_000, 300_000_000])
def test_the_calls_of_a_turn_touch_more_than_a_gpus_cache_holds(num_bytes, monkeypatch):
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    calls = kv.calls_of_a_turn(num_bytes, GPU)
    assert calls >= 20
    assert calls * num_bytes >= 4 * properties.L2_cache_size
    assert kv.calls_of_a_turn(num_bytes, CPU) == 1


def test_no_call_of_a_turn_touches_a_row_of_another(small, monkeypatch):
    touched: list[torch.Tensor] = []
    monkeypatch.setattr(kv, "calls_of_a_turn", lambda num_bytes, device: 3)
    monkeypatch.setattr(kv.compiled, "copy_branch_", lambda cache, *slots: touched.extend(slots))
    kv.copy_speed(CPU, torch.float32, heads=2, head_dim=8, turns=1)
    one_turn = torch.cat(touched[: len(touched) // 2])
    assert len(one_turn) == len(one_turn.unique()) == 3 * 2 * kv.LOOKAHEAD * kv.SEQUENCES


@pytest.mark.parametrize("captured", [True, False])
def test_a_turn_on_a_gpu_is_timed_by_events_and_told_as_seconds_of_one_call(captured, monkeypatch):
    done: list[object] = []
    event = SimpleNamespace(
        record=lambda: done.append("event"), synchronize=lambda: None, elapsed_time=lambda end: 50.0
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    seconds = kv.timer(done.append, 5, GPU, captured)
    done.clear()
    assert seconds() == pytest.approx(0.010)
    assert done == ["event", *(["replay"] if captured else range(5)), "event"]
