"""Fixtures of every suite: one torch thread, and the embedded model, fetched once."""

from __future__ import annotations

import pytest
import torch

from ssd_runtime.model import catalogue, fetch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """The file of the embedded model, brought into the cache if it is not there."""
    fetch.fetch("smollm2-135m-instruct")
    return catalogue.resolve("smollm2-135m-instruct")
