"""The CUDA kernels run on the host, block by block, against plain torch. No GPU is involved, nor proven by this."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_ext import ops
from ssd_runtime.engine import runner
from ssd_runtime.errors import DeviceFault
from ssd_runtime.kv import table as paged
from ssd_runtime.speculation.sampling.ranking import Choice, rank_tokens, rank_tokens_oracle
from ssd_runtime.speculation.types import SamplingParams
from tests import cuda_cases, emulator
from tests.cuda_cases import Kernels
from tests.engines import in_process, request
from tests.tiny_models import tiny_decoder

CASES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
THREADS, SEEDS = st.sampled_from([1, 4, 32]), st.integers(0, 2**32)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    emulator.build(tmp_path_factory.mktemp("emulator"))
    return Kernels(torch.ops.ssd_emulated, torch.device("cpu"))


@CASES
@given(cuda_cases.copies(), THREADS, SEEDS)
def test_copy_branch(kernels, case, threads, seed):
    kernels.ops.configure(threads, seed)
    cuda_cases.check_copy(kernels, case)


@pytest.mark.parametrize("num_rows", [1500, 3072, 3073, 7000, 24576])
def test_copy_branch_of_so_many_rows_that_less_of_each_fits_a_block(kernels, num_rows):
    kernels.ops.configure(32, num_rows)
    cuda_cases.check_copy_of_many_rows(kernels, num_rows)


def test_copy_branch_refuses_more_rows_than_a_block_holds(kernels):
    cuda_cases.check_copy_refuses_more_rows_than_a_block_holds(kernels)


@CASES
@given(cuda_cases.writes(), THREADS, SEEDS)
def test_write_kv(kernels, case, threads, seed):
    kernels.ops.configure(threads, seed)
    cuda_cases.check_write(kernels, case)


@CASES
@given(cuda_cases.rollbacks(), THREADS, SEEDS)
def test_rollback(kernels, case, threads, seed):
    kernels.ops.configure(threads, seed)
    cuda_cases.check_rollback(kernels, case)


@CASES
@given(cuda_cases.matches(), THREADS, SEEDS)
def test_match_outcomes(kernels, case, threads, seed):
    kernels.ops.configure(threads, seed)
    cuda_cases.check_match(kernels, case)


@CASES
@given(cuda_cases.samples(), THREADS, SEEDS)
def test_sample_shared_noise(kernels, case, threads, seed):
    kernels.ops.configure(threads, seed)
    cuda_cases.check_sample(kernels, case)


def test_a_round_of_all_operators_gives_what_plain_torch_gives(kernels):
    """The round that tests/gpu captures in a CUDA graph."""
    kernels.ops.configure(32, 3)
    turn = cuda_cases.Round(kernels)
    for seed in range(3):
        turn.set(seed)
        turn.check(seed, turn.run(kernels.ops))
    kernels.ops.raise_faults(turn.kv)


def test_wrong_values_become_faults_and_never_wild_writes(kernels):
    kernels.ops.configure(32, 0)
    cuda_cases.check_wrong_values_become_faults(kernels)


def test_the_runtime_ranks_tokens_with_the_kernel_as_the_oracle_does(kernels, monkeypatch):
    kernels.ops.configure(32, 1)
    monkeypatch.setattr(ops, "sample_shared_noise", kernels.ops.sample_shared_noise)
    monkeypatch.setattr(ops, "compiled_for", lambda device: True)
    choices = [
        Choice(SamplingParams(temperature=0.8, seed=2**64 - 3), 11),
        Choice(SamplingParams(temperature=0.0), 4),
        Choice(SamplingParams(temperature=1.2, top_k=9, top_p=0.8, min_p=0.01, seed=5), 2),
    ]
    logits = cuda_cases.random(0, 3, 300) * 3
    expected = rank_tokens_oracle(logits, choices, 12)
    for own, plain in zip(rank_tokens(logits, choices, 12), expected, strict=True):
        assert own.tokens == plain.tokens
        assert own.margins == pytest.approx(plain.margins, rel=1e-9, abs=1e-9)


def test_the_next_round_of_an_engine_reports_what_a_kernel_has_met(kernels, monkeypatch):
    """As on a GPU, where the kernels of a round leave a fault behind and nothing else."""
    on_device, here = torch.empty(1, device="meta"), torch.empty(1)
    monkeypatch.setattr(ops, "raise_faults", lambda kv: kernels.ops.raise_faults(here))
    monkeypatch.setattr(runner, "raise_faults", lambda kv: paged.raise_faults(on_device))
    decoder = tiny_decoder(0)
    process = in_process(decoder, decoder)
    process.engine.add(request((1, 2, 3), "ar"))
    process.engine.step()
    outside = cuda_cases.ints([99])
    kernels.ops.copy_branch_(torch.zeros(1, 2, 4, 1, 2), outside, outside)
    with pytest.raises(DeviceFault, match=r"source slot outside the pool.*cannot be trusted"):
        process.engine.step()
    process.engine.step()


def test_wrong_dtypes_and_shapes_are_refused(kernels):
    cuda_cases.check_refusals(kernels)
