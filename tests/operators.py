"""Other operators than a process would pick, for the length of a test."""

from __future__ import annotations

from types import ModuleType

import pytest

from cuda_ext import ops, reference


def use_operators(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType = reference) -> None:
    """From here on `cuda_ext.ops` has these, those that were called before too."""
    monkeypatch.setattr(ops, "_kernels", lambda: kernels)
    for name in reference.__all__:
        monkeypatch.setitem(vars(ops), name, getattr(kernels, name))
