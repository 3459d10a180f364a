"""A number with its interval over seeds."""

import numpy as np
from scipy import stats


def mean_interval(series, level: float = 0.95) -> tuple[float, float, float]:
    """Mean over seeds and Student's t interval: mean ± t_{n-1} s/√n with the unbiased variance s².

    Raises: ValueError for fewer than two values (say so in ``requires``) or a value that is not finite.
    """
    x = _sample(series, 2)
    half = stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def median_interval(series, level: float = 0.95) -> tuple[float, float, float]:
    """Median over seeds and its sign-test interval [x_(k+1), x_(n-k)], free of any distribution.

    k is the largest with 2·P(Bin(n, ½) ≤ k) ≤ 1 - level, so that it covers at least ``level``.
    Raises: ValueError where no such k exists (95 % need six values) or a value is not finite.
    """
    x = np.sort(_sample(series, 1))
    k = int(stats.binom.ppf((1 - level) / 2, len(x), 0.5))  # the least k with P(≤ k) ≥ (1 - level)/2
    if 2 * stats.binom.cdf(k, len(x), 0.5) > 1 - level:
        k -= 1
    if k < 0:
        raise ValueError(f"{len(x)} values give no {level:.0%} interval of the median")
    return np.median(x), x[k], x[len(x) - 1 - k]


def _sample(series, least: int) -> np.ndarray:
    x = np.asarray(series, dtype=float)
    if x.ndim != 1 or len(x) < least or not np.isfinite(x).all():
        raise ValueError(f"an interval needs at least {least} finite values, got {x.tolist()}")
    return x
