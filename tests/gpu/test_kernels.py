"""The suite of tests/unit/test_cuda_emulated.py on a device, then under CUDA graph capture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests import cuda_cases

pytestmark = pytest.mark.gpu
CASES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@CASES
@given(cuda_cases.copies())
def test_copy_branch(kernels, case):
    cuda_cases.check_copy(kernels, case)


@pytest.mark.parametrize("num_rows", [1500, 3072, 3073, 7000, 24576])
def test_copy_branch_of_so_many_rows_that_less_of_each_fits_a_block(kernels, num_rows):
    cuda_cases.check_copy_of_many_rows(kernels, num_rows)


def test_copy_branch_refuses_more_rows_than_a_block_holds(kernels):
    cuda_cases.check_copy_refuses_more_rows_than_a_block_holds(kernels)


@CASES
@given(cuda_cases.writes())
def test_write_kv(kernels, case):
    cuda_cases.check_write(kernels, case)


@CASES
@given(cuda_cases.rollbacks())
def test_rollback(kernels, case):
    cuda_cases.check_rollback(kernels, case)


@CASES
@given(cuda_cases.matches())
def test_match_outcomes(kernels, case):
    cuda_cases.check_match(kernels, case)


@CASES
@given(cuda_cases.samples())
def test_sample_shared_noise(kernels, case):
    cuda_cases.check_sample(kernels, case)


def test_wrong_values_become_faults_and_never_wild_writes(kernels):
    cuda_cases.check_wrong_values_become_faults(kernels)


def test_wrong_dtypes_and_shapes_are_refused(kernels):
    cuda_cases.check_refusals(kernels)


def test_tensors_on_two_devices_are_refused(kernels):
    kv = kernels.on(torch.zeros(1, 2, 4, 1, 2))
    with pytest.raises(RuntimeError, match="source_slots must be on the device of the first argument"):
        kernels.ops.copy_branch_(kv, torch.tensor([0]), kernels.on(torch.tensor([1])))


def test_one_graph_holds_a_round_and_replays_it_on_new_values(kernels):
    """All five operators, captured once; then with other values in the same memory."""
    turn = cuda_cases.Round(kernels)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        turn.run(kernels.ops)  # warm up
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = turn.run(kernels.ops)
    for seed in range(3):
        turn.set(seed)
        graph.replay()
        turn.check(seed, results)
    kernels.ops.raise_faults(turn.kv)


def test_copy_branch_moves_bytes_at_a_good_share_of_the_copy_rate(kernels):
    """32 layers of 8 heads of 128 in bfloat16, 64 sequences of 7 rows: 58 MB read and as much written."""
    kv = torch.randn(32, 2, 8192, 8, 128, dtype=torch.bfloat16, device=kernels.device)
    order = torch.randperm(8192, device=kernels.device)
    source, target = order[:448].clone(), order[448:896].clone()
    plain = torch.empty(32 * 2 * 448 * 8 * 128, dtype=torch.bfloat16, device=kernels.device)
    copied = torch.empty_like(plain)

    def seconds(run) -> float:
        for _ in range(3):
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 20e3

    share = seconds(lambda: copied.copy_(plain)) / seconds(lambda: kernels.ops.copy_branch_(kv, source, target))
    print(f"copy_branch_ at {share:.0%} of the device-to-device copy rate")  # noqa: T201
    assert share > 0.3
