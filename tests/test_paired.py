"""Paired differences against the formula by hand and against SciPy's own test."""

import math

import numpy as np
import pytest
from scipy import stats

from fedssl.report.paired import Difference, paired_difference


def test_three_common_seeds_by_hand() -> None:
    """Differences -0.01, +0.01, -0.03: mean -0.01, standard deviation 0.02; t(0.975, 2) = 4.30265."""
    ours = {0: 0.95, 1: 0.97, 2: 0.93, 7: 0.5}
    reference = {0: 0.96, 1: 0.96, 2: 0.96, 8: 0.1}
    found = paired_difference(ours, reference)
    half = 4.30265 * 0.02 / math.sqrt(3)
    assert found is not None
    assert found.num_seeds == 3
    assert found.mean == pytest.approx(-0.01)
    assert (found.low, found.high) == pytest.approx((-0.01 - half, -0.01 + half), abs=1e-6)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_as_scipy_has_it(n: int) -> None:
    a, b = np.random.default_rng(n).normal(size=(2, n))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_equal_differences_have_an_interval_without_width() -> None:
    found = paired_difference({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5})
    assert found == Difference(num_seeds=2, mean=0.25, low=0.25, high=0.25)
    assert found.constant
    rounded = paired_difference({0: 0.95, 1: 0.96, 2: 0.1 + 0.2}, {0: 0.93, 1: 0.94, 2: 0.28})
    assert rounded is not None
    assert rounded.constant  # 0.02 each, but for the last binary digit
    wide = paired_difference({0: 0.95, 1: 0.9601}, {0: 0.93, 1: 0.94})
    assert wide is not None
    assert not wide.constant


@pytest.mark.parametrize(("ours", "reference"), [({0: 1.0}, {0: 1.0}), ({0: 1.0, 1: 1.0}, {1: 0.5, 2: 0.5}), ({}, {})])
def test_fewer_than_two_common_seeds_say_nothing(ours: dict[int, float], reference: dict[int, float]) -> None:
    assert paired_difference(ours, reference) is None
