"""What every suite has: one torch thread, no deadline a pause could break, operators, the embedded model, fetched once."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from cuda_ext import ops, reference
from ssd_runtime.model.files import catalogue, fetch

# A loaded machine may pause any process for a second, in the middle of an example or of drawing one. Examples are new
# in every run, so that they find something some day; where CI is set they are the same, as hypothesis itself has it.
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("patient")
ENGINES = ("tests/cluster/", "tests/process/")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # A shell starts what runs in its background with SIGINT ignored, and the programs under test would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Among several workers (pytest -n): all that starts engines stays in one of them, a test at a time; the others
    take file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "engines" if nodeid.startswith(ENGINES) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # in order of collection the longest come first: clusters and processes
    return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def own_garbage_only() -> None:
    """Full collections within a file look at what that file made, as a rank's look at what it made since it loaded:
    over all that a suite has imported and kept, one takes half a second, at a moment of any test's choosing."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """The file of the embedded model, brought into the cache if it is not there."""
    fetch.fetch("smollm2-135m-instruct")
    return catalogue.resolve("smollm2-135m-instruct")


@pytest.fixture
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with SSD_CUDA_EXT=0."""
    monkeypatch.setattr(ops, "_kernels", lambda: reference)


@pytest.fixture(params=["plain", "compiled"])
def operators(request: pytest.FixtureRequest) -> str:
    """As with SSD_CUDA_EXT=0 and =1."""
    if request.param == "plain":
        request.getfixturevalue("plain_operators")
    elif ops.backend() != "compiled":
        pytest.skip("cuda_ext._C is not built")
    return request.param
