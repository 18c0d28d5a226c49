"""Faults that device kernels leave behind are asked for once a round, by target and draft, and never on the CPU."""

from __future__ import annotations

from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from cuda_ext import ops
from ssd_runtime.draft import drafter
from ssd_runtime.engine import runner
from ssd_runtime.errors import DeviceFault
from ssd_runtime.kv import table as paged
from tests.engines import in_process, request
from tests.tiny_models import tiny_decoder


def test_the_kernels_are_asked_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ops, "raise_faults", lambda kv: asked.append(kv.device.type))
    paged.raise_faults(torch.empty(1, device="meta"))
    paged.raise_faults(torch.empty(1))
    assert asked == ["meta"]


def test_a_fault_says_what_the_kernel_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "raise_faults", Mock(side_effect=RuntimeError("a slot outside the pool")))
    with pytest.raises(DeviceFault, match="a slot outside the pool"):
        paged.raise_faults(torch.empty(1, device="meta"))


@pytest.mark.parametrize("mode", ["ar", "sd", "sd-colocated", "ssd"])
def test_every_round_asks_for_the_faults_of_its_own_cache(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = [], []
    monkeypatch.setattr(runner, "raise_faults", target.append)
    monkeypatch.setattr(drafter, "raise_faults", draft.append)
    model = tiny_decoder(0)
    process = in_process(model, model)
    process.engine.add(request((1, 2, 3), mode, max_tokens=20))
    rounds = 0
    while process.engine.has_work:
        before = len(target)
        process.engine.step()
        rounds += 1
        assert len(target) == before + 1
    assert rounds > 1
    assert len({id(kv) for kv in target}) == 1
    if mode == "ar":
        assert not draft
    else:
        assert len(draft) >= rounds
        assert not {id(kv) for kv in draft} & {id(kv) for kv in target}


@pytest.mark.parametrize(("module", "mode"), [(runner, "ar"), (drafter, "sd-colocated")])
def test_a_fault_ends_the_engine(module: ModuleType, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(kv: Tensor) -> None:
        raise DeviceFault("a kernel has met a slot outside the pool")

    monkeypatch.setattr(module, "raise_faults", fault)
    model = tiny_decoder(0)
    process = in_process(model, model)
    with pytest.raises(DeviceFault, match="slot outside the pool"):
        process.run([request((1, 2, 3), mode)])
