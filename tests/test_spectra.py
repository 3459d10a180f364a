"""Marchenko–Pastur against quadrature and random matrices; ranks and spectra of mixed features."""

import numpy as np
import pytest
from scipy.integrate import quad

from labelaug.theory.random_features import mix_pairs
from labelaug.theory.spectra import MarchenkoPastur, kolmogorov_distance

RATIOS = (0.05, 0.2, 0.9, 1.0, 2.0, 5.0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_def_marchenko_pastur(ratio):
    """Mass 1 with the point mass, and moments, by adaptive quadrature (1e-6: its roots at the edges)."""
    law = MarchenkoPastur(ratio)
    low, high = law.edges
    inside = quad(law.density, low, high, limit=500)[0]
    assert inside + law.atom == pytest.approx(1.0, abs=1e-6)
    for order in (1, 2, 3, 4):
        found = quad(lambda u, k=order: u**k * float(law.density(u)), low, high, limit=500)[0]
        assert found == pytest.approx(law.moment(order), rel=1e-6)
    assert law.moment(0) == 1.0
    assert law.density([high + 1e-9, low / 2 - 1e-12]) == pytest.approx(0.0)
    if ratio > 1:
        assert abs(inside - 1.0) > 0.1  # without the point mass


@pytest.mark.parametrize("ratio", RATIOS)
def test_prop_mp_inverse(ratio):
    """Distribution function against quadrature, and E[1/μ] = 1/(1 - γ)."""
    law = MarchenkoPastur(ratio)
    low, high = law.edges
    for mu in np.linspace(low, high, 9):
        assert law.cdf(mu) - law.atom == pytest.approx(quad(law.density, low, mu, limit=500)[0], abs=1e-6)
    assert law.cdf([-1.0, high + 1.0]) == pytest.approx([0.0, 1.0])
    assert law.cdf(0.0) == pytest.approx(law.atom)
    if ratio < 1:
        inverse = quad(lambda u: float(law.density(u)) / u, low, high, limit=500)[0]
        assert law.inverse_moment == pytest.approx(inverse, rel=1e-6)
        assert abs(inverse - 1 / (1 + ratio)) > 0.01  # the wrong sign
    else:
        assert law.inverse_moment == np.inf


@pytest.mark.parametrize(("d", "m"), [(200, 1000), (200, 250), (200, 80)])
def test_marchenko_pastur_random_matrices(d, m):
    """Spectra of Gaussian and of ±1 matrices lie within 6/d of their law and far from that of another ratio."""
    rng = np.random.default_rng(d + m)
    for phi in (rng.normal(size=(d, m)), rng.choice([-1.0, 1.0], size=(d, m))):
        seen = np.linalg.eigvalsh(phi @ phi.T / m)
        # Eigenvalues repel: the distribution function errs by a few steps of 1/d, not by 1/√d.
        assert kolmogorov_distance(seen, MarchenkoPastur(d / m), zero=1e-9) < 6 / d
        assert kolmogorov_distance(seen, MarchenkoPastur(1.5 * d / m), zero=1e-9) > 0.05
        low, high = MarchenkoPastur(d / m).edges
        alive = seen[seen > 1e-9]
        assert low - 0.15 < alive.min()
        assert alive.max() < high + 0.3  # edges are met at the rate d^(-2/3)
        assert len(alive) == min(d, m)


def test_kolmogorov_distance_by_grid():
    """Against a fine grid of both distribution functions, and with the mass at 0 missing on one side."""
    rng = np.random.default_rng(0)
    grid = np.linspace(-0.5, 12, 400001)
    for ratio, values in ((0.4, rng.gamma(2.0, 0.5, size=23)), (3.0, np.r_[np.zeros(5), rng.gamma(2.0, 2.0, size=6)])):
        law = MarchenkoPastur(ratio)
        steps = np.searchsorted(np.sort(values), grid, side="right") / len(values)
        found = np.abs(steps - law.cdf(grid)).max()
        assert kolmogorov_distance(values, law) == pytest.approx(found, abs=1e-3)  # the step of the grid
    law = MarchenkoPastur(4.0)
    assert kolmogorov_distance([20.0], law) == pytest.approx(1.0)
    assert kolmogorov_distance(np.r_[np.zeros(3), 4.0], law) < 0.25
    assert kolmogorov_distance([1e-12, 1e-12, 1e-12, 4.0], law, zero=1e-9) < 0.25
    assert kolmogorov_distance([1e-12, 1e-12, 1e-12, 4.0], law) == pytest.approx(0.75)


@pytest.mark.parametrize("lam", [0.5, 0.2, (0.1, 0.7)])
def test_prop_linear_mixup(lam):
    """M of all pairs against the formula, its rank, interlacing, and the law of ratio d/n instead of d/n²."""
    rng = np.random.default_rng(1)
    d, n = 12, 8
    x = rng.normal(size=(n, d)) + 0.5
    mixed, _ = mix_pairs(x, np.zeros(n), lam=lam)
    kappa = np.mean([a * (1 - a) for a in np.atleast_1d(lam)])
    pairs = mixed.T @ mixed / len(mixed)
    mean = x.mean(0)
    formula = (1 - 2 * kappa) * x.T @ x / n + 2 * kappa * np.outer(mean, mean)
    np.testing.assert_allclose(pairs, formula, rtol=0, atol=1e-12)  # sums of products below ten
    assert np.abs(pairs - x.T @ x / n).max() > 0.05  # the shrinking is there
    assert np.linalg.matrix_rank(mixed) == n
    ours = np.linalg.eigvalsh(pairs)[::-1] / (1 - 2 * kappa)
    base = np.linalg.eigvalsh(x.T @ x / n)[::-1]
    assert (ours >= base - 1e-12).all()
    assert (ours[1:] <= base[:-1] + 1e-12).all()

    x = rng.normal(size=(240, 80))
    s = x.T @ x / 240
    seen = np.linalg.eigvalsh((1 - 2 * kappa) * s + 2 * kappa * np.outer(x.mean(0), x.mean(0))) / (1 - 2 * kappa)
    assert kolmogorov_distance(seen, MarchenkoPastur(80 / 240)) < 7 / 80  # 6/d as above, and 1/d for the mean
    assert kolmogorov_distance(seen, MarchenkoPastur(80 / 240**2)) > 0.4


@pytest.mark.parametrize(("lam", "points"), [(0.5, 10), (0.3, 16)])
def test_thm_tanh_rank(lam, points):
    """n = 4 examples, d from 1 to 20: rank min(d, number of distinct points); linear features stop at 4."""
    rng = np.random.default_rng(2)
    mixed, _ = mix_pairs(rng.normal(size=(4, 6)), np.zeros(4), lam=lam)
    for d in (1, 5, 9, 10, 11, 16, 20):
        w = 2 * rng.normal(size=(d, 6))
        # singular values of generic tanh features at this scale are above 1e-6; the rest is at 1e-16
        assert np.linalg.matrix_rank(np.tanh(mixed @ w.T), tol=1e-9) == min(d, points)
        assert np.linalg.matrix_rank(mixed @ w.T, tol=1e-9) == min(d, 4)
    doubled = np.concatenate([mixed, -mixed])  # opposite points add nothing, tanh is odd
    assert np.linalg.matrix_rank(np.tanh(doubled @ w.T), tol=1e-9) == points


@pytest.mark.parametrize("ratio", [0.0, -1.0, np.nan, np.inf])
def test_refuses_ratio(ratio):
    with pytest.raises(ValueError, match="ratio d/m must be positive and finite"):
        MarchenkoPastur(ratio)


@pytest.mark.parametrize("values", [[], [[1.0]], [np.nan], [-1.0]])
def test_refuses_values(values):
    with pytest.raises(ValueError, match=r"values must be \[d\]"):
        kolmogorov_distance(values, MarchenkoPastur(0.5))


def test_refuses_order():
    with pytest.raises(ValueError, match="order must be at least 0, got -1"):
        MarchenkoPastur(0.5).moment(-1)
