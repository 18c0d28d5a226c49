"""Percentiles and ratios, against numpy and at the edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.metrics import Percentiles, percentile, percentiles, ratio

FINITE = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=50), st.floats(min_value=0, max_value=1))
def test_percentile_is_numpys(values: list[float], fraction: float) -> None:
    assert percentile(values, fraction) == pytest.approx(float(np.percentile(values, 100 * fraction)), abs=1e-6)


def test_an_empty_series_has_no_percentiles() -> None:
    assert percentiles([]) == Percentiles(None, None)


def test_percentiles_do_not_depend_on_order() -> None:
    assert percentiles([3.0, 1.0, 2.0]) == percentiles([1.0, 2.0, 3.0])
    assert percentiles(iter([3.0, 1.0, 2.0])).p50 == 2.0


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        percentile([1.0], fraction)


def test_a_ratio_of_nothing_is_none_and_not_zero() -> None:
    assert ratio(0, 0) is None
    assert ratio(0, 4) == 0.0
