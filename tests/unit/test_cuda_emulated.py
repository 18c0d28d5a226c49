"""The CUDA kernels run on the host, block by block, against plain torch. No GPU is involved, nor proven by this."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import cuda_cases, emulator
from tests.cuda_cases import Kernels

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
@given(cuda_cases.lookups(), THREADS, SEEDS)
def test_lookup_branches(kernels, case, threads, seed):
    kernels.ops.configure(threads, seed)
    cuda_cases.check_lookup(kernels, case)


@CASES
@given(cuda_cases.samples(), THREADS, SEEDS)
def test_sample_shared_noise(kernels, case, threads, seed):
    kernels.ops.configure(threads, seed)
    cuda_cases.check_sample(kernels, case)


def test_wrong_values_become_faults_and_never_wild_writes(kernels):
    kernels.ops.configure(32, 0)
    cuda_cases.check_wrong_values_become_faults(kernels)


def test_wrong_dtypes_and_shapes_are_refused(kernels):
    cuda_cases.check_refusals(kernels)
