"""Intervals over seeds, held against scipy's own and the table of the sign test."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from labelaug.intervals import mean_interval, median_interval


def test_mean_interval_is_students(rng):
    x = rng.normal(2.0, 3.0, 8)
    mean, low, high = mean_interval(pd.Series(x), level=0.9)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    assert np.allclose((mean, low, high), (x.mean(), expected.low, expected.high), rtol=1e-12)
    assert high - low > 1.2 * (stats.norm.ppf(0.95) - stats.norm.ppf(0.05)) * x.std() / math.sqrt(8)  # not the normal's


SIGN_TEST = [(6, 0.95, 0), (8, 0.95, 0), (9, 0.95, 1), (20, 0.95, 5), (6, 0.96875, 0)]


@pytest.mark.parametrize(("n", "level", "k"), SIGN_TEST)
def test_median_interval_is_the_sign_tests(rng, n, level, k):
    """k from the table of the sign test (n = 20: 6th and 15th value); one step further in covers too little."""
    x = rng.permutation(np.arange(n) ** 2.0)
    assert median_interval(x, level) == (np.median(x), np.sort(x)[k], np.sort(x)[n - 1 - k])
    coverage = [1 - 2 * stats.binom.cdf(j, n, 0.5) for j in (k, k + 1)]
    assert coverage[0] >= level > coverage[1]


@pytest.mark.parametrize(
    ("function", "series"),
    [(mean_interval, [1.0]), (mean_interval, [1.0, math.nan]), (median_interval, range(5)),
     (median_interval, [])],
)  # fmt: skip
def test_an_interval_needs_enough_finite_values(function, series):
    with pytest.raises(ValueError, match=r"an interval needs|values give no 95% interval"):
        function(list(series))
