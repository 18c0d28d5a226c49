"""Percentiles and ratios, against numpy and at the edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.comm.control.client_messages import MOST_SAMPLES
from ssd_runtime.engine.sequence import Samples
from ssd_runtime.metrics import Percentiles, percentiles, ratio

FINITE = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=50))
def test_percentiles_are_numpys(values: list[float]) -> None:
    found = percentiles(values)
    assert [found.p50, found.p95] == pytest.approx(np.percentile(values, [50, 95]).tolist(), abs=1e-6)


def test_an_empty_series_has_no_percentiles() -> None:
    assert percentiles([]) == Percentiles(None, None)


def test_percentiles_do_not_depend_on_order() -> None:
    assert percentiles([3.0, 1.0, 2.0]) == percentiles([1.0, 2.0, 3.0])
    assert percentiles(iter([3.0, 1.0, 2.0])).p50 == 2.0


def test_a_ratio_of_nothing_is_none_and_not_zero() -> None:
    assert ratio(0, 0) is None
    assert ratio(0, 4) == 0.0


@given(st.lists(FINITE, max_size=50))
def test_a_short_series_is_kept_whole(values: list[float]) -> None:
    samples = Samples()
    for value in values:
        samples.append(value)
    assert samples.kept == values
    assert (samples.count, samples.most) == (len(values), max(values, default=None))
    assert samples.mean == (pytest.approx(sum(values) / len(values)) if values else None)


@pytest.mark.parametrize("count", [MOST_SAMPLES, MOST_SAMPLES + 1, 3 * MOST_SAMPLES, 100 * MOST_SAMPLES])
def test_of_a_long_series_evenly_spaced_values_are_kept(count: int) -> None:
    samples = Samples()
    for value in range(count):
        samples.append(float(value))
    assert MOST_SAMPLES / 2 <= len(samples.kept) <= MOST_SAMPLES
    assert len(set(np.diff(samples.kept))) == 1
    assert (samples.count, samples.mean, samples.most) == (count, (count - 1) / 2, count - 1)
    assert percentiles(samples.kept).p95 == pytest.approx(0.95 * count, rel=0.01)


@given(st.lists(st.integers(0, 3 * MOST_SAMPLES), max_size=6))
def test_several_series_together_weigh_what_they_count(sizes: list[int]) -> None:
    parts = []
    for number, size in enumerate(sizes):
        parts.append(Samples())
        for _ in range(size):
            parts[-1].append(float(number))
    together = Samples.together(parts)
    assert together.count == sum(sizes)
    assert len(together.kept) <= MOST_SAMPLES
    assert together.most == max((number for number, size in enumerate(sizes) if size), default=None)
    for number, size in enumerate(sizes):
        share = sum(value == number for value in together.kept) / max(1, len(together.kept))
        assert share == pytest.approx(size / max(1, sum(sizes)), abs=0.01)
