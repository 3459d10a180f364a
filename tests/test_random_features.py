"""Least squares on fixed features: Runge–Kutta, iterated descent, random starts and loops as oracles."""

import itertools

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar

from labelaug.theory.random_features import (
    decay,
    mix_pairs,
    mode_minimum,
    moments,
    risk,
    risk_bound,
    risk_parts,
    sgd_moments,
    spectrum,
    turning_times,
    weights_at,
)

RATE = 0.1
# Sums of at most a few hundred products of numbers below 100 in float64.
ROUNDING = 1e-10


def problem(seed, *, m=40, d=6, rank=None):
    """Random features [m, d] of the rank, clean labels, noise and a start."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(m, d)) if rank is None else rng.normal(size=(m, rank)) @ rng.normal(size=(rank, d)) / 2
    return phi, rng.normal(size=m), 0.5 * rng.normal(size=m), rng.normal(size=d)


def toy(seed, *, n=8, d=12, inputs=4, lam=0.5, test_points=60):
    """A teacher–student toy: mixed features, labels, true labels at the mixed inputs, test features and labels."""
    rng = np.random.default_rng(seed)
    inner, outer, student = rng.normal(size=(3, inputs)), rng.normal(size=3), 0.7 * rng.normal(size=(d, inputs))
    x, test = rng.normal(size=(n, inputs)), rng.normal(size=(test_points, inputs))
    true = lambda v: np.tanh(v @ inner.T) @ outer  # noqa: E731
    mixed, labels = mix_pairs(x, true(x), lam=lam)
    return np.tanh(mixed @ student.T), labels, true(mixed), np.tanh(test @ student.T), true(test)


def by_steps(phi, y, start, steps, rate=RATE):
    """Iterated full-batch descent from the definition: one residual a point."""
    theta = start.copy()
    for _ in range(steps):
        theta = theta - rate * np.mean([p * (p @ theta - v) for p, v in zip(phi, y, strict=True)], axis=0)
    return theta


@pytest.mark.parametrize(("m", "rank"), [(40, None), (3, None), (40, 2)], ids=["full", "few points", "low rank"])
def test_lem_gradient_flow(m, rank):
    """lem-gradient-flow against Runge–Kutta (1e-9: the integrator is asked for 1e-12 a step) at any rank."""
    phi, clean, noise, start = problem(0, m=m, rank=rank)
    y, times = clean + noise, np.array([0.0, 0.3, 4.0, 60.0])
    moment, cross, _ = moments(phi, y)
    ours = weights_at(moment, cross, start, times, learning_rate=RATE)
    options = {"method": "DOP853", "t_eval": times, "rtol": 1e-12, "atol": 1e-13}
    path = solve_ivp(lambda _, t: -RATE * phi.T @ (phi @ t - y) / m, (0, 60), start, **options).y.T
    np.testing.assert_allclose(ours, path, rtol=0, atol=1e-9)

    # The split into clean pattern and noise pattern, from the pseudo-inverse of the features.
    star, extra = np.linalg.pinv(phi) @ clean, np.linalg.pinv(phi) @ noise
    values, vectors = np.linalg.eigh(moment)
    left = (vectors * np.exp(-RATE * values * times[-1])) @ vectors.T
    split = star + left @ (start - star) + extra - left @ extra
    np.testing.assert_allclose(ours[-1], split, rtol=0, atol=1e-9)
    # Negative controls: the other sign of the noise, and the start's null space forgotten.
    assert np.abs(ours[-1] - star - (left @ (start - star) - extra + left @ extra)).max() > 1e-2
    frozen = (np.eye(6) - np.linalg.pinv(phi) @ phi) @ start
    if rank or m < 6:
        np.testing.assert_allclose((np.eye(6) - np.linalg.pinv(phi) @ phi) @ ours[-1], frozen, rtol=0, atol=1e-9)
        assert np.abs(frozen).max() > 1e-2  # so a formula without it fails


def test_lem_gradient_flow_wrong_side():
    """The Gram matrix of the points, ΦᵀΦ/m in place of ΦΦᵀ/m, has the same shape for m = d and is wrong."""
    phi, clean, _, start = problem(1, m=6)
    moment, cross, _ = moments(phi, clean)
    right = weights_at(moment, cross, start, [3.0], learning_rate=RATE)[0]
    wrong = weights_at(phi @ phi.T / 6, cross, start, [3.0], learning_rate=RATE)[0]
    path = solve_ivp(lambda _, t: -RATE * (moment @ t - cross), (0, 3), start, rtol=1e-11, atol=1e-12).y[:, -1]
    assert np.abs(right - path).max() < 1e-8
    assert np.abs(wrong - path).max() > 1e-2


@pytest.mark.parametrize(("m", "rank"), [(40, None), (3, None), (40, 2)], ids=["full", "few points", "low rank"])
def test_lem_gradient_flow_descent(m, rank):
    """The discrete form against iterated descent over points (1e-9), also with 1 < η μ < 2."""
    phi, clean, noise, start = problem(2, m=m, rank=rank)
    y = clean + noise
    moment, cross, _ = moments(phi, y)
    for rate in (RATE, 1.7 / spectrum(moment)[0].max()):
        ours = weights_at(moment, cross, start, [0, 1, 7, 150], learning_rate=rate, discrete=True)
        for k, steps in enumerate((0, 1, 7, 150)):
            np.testing.assert_allclose(ours[k], by_steps(phi, y, start, steps, rate), rtol=0, atol=1e-9)
    flow = weights_at(moment, cross, start, [7.0], learning_rate=rate)[0]
    assert np.abs(flow - ours[2]).max() > 1e-3  # flow is not descent


def test_weights_at_batches():
    """A member alone equals the member in company, leading axes broadcast."""
    parts = [problem(s) for s in range(4)]
    moment, cross = (np.stack(a) for a in zip(*(moments(p, c + z)[:2] for p, c, z, _ in parts), strict=True))
    start = np.stack([s for *_, s in parts])
    together = weights_at(moment, cross, start, [0.0, 5.0], learning_rate=RATE)
    assert together.shape == (4, 2, 6)
    alone = weights_at(moment[2], cross[2], start[2], [0.0, 5.0], learning_rate=RATE)
    np.testing.assert_allclose(together[2], alone, rtol=0, atol=ROUNDING)
    many = weights_at(moment[0], cross[0], start, [5.0], learning_rate=RATE)
    np.testing.assert_allclose(many[0, 0], together[0, 1], rtol=0, atol=ROUNDING)


def test_def_random_features():
    """The quadratic form equals the mean squared error over points; half of it is a different number."""
    phi, clean, noise, start = problem(3)
    weights = np.stack([start, 2 * start])
    found = risk(weights, *moments(phi, clean + noise))
    errors = [np.mean((phi @ w - clean - noise) ** 2) for w in weights]
    np.testing.assert_allclose(found, errors, rtol=0, atol=ROUNDING)
    assert np.abs(found / 2 - errors).max() > 0.1


def test_mix_pairs_by_loops():
    """All ordered pairs, self-pairs included, λ slowest; λ weighs the anchor."""
    rng = np.random.default_rng(4)
    x, y, lams = rng.normal(size=(3, 2)), rng.normal(size=3), (0.2, 0.5)
    mixed, labels = mix_pairs(x, y, lam=lams)
    order = list(itertools.product(lams, range(3), range(3)))
    np.testing.assert_allclose(mixed, [a * x[i] + (1 - a) * x[j] for a, i, j in order], rtol=0, atol=1e-15)
    np.testing.assert_allclose(labels, [a * y[i] + (1 - a) * y[j] for a, i, j in order], rtol=0, atol=1e-15)
    stacked = mix_pairs(np.stack([x, -x]), np.stack([y, -y]), lam=0.2)[0]
    np.testing.assert_array_equal(stacked[1], -mixed[:9])
    assert np.abs(mix_pairs(x, y, lam=0.8)[0] - mixed[:9]).max() > 0.1  # the partner's weight is another law of pairs


def test_moments_weights():
    """Weighted moments equal those of repeated points."""
    phi, y, _, _ = problem(5, m=4)
    weights = np.array([0.5, 0.25, 0.25, 0.0])
    again = np.repeat(np.arange(4), (2, 1, 1, 0))
    for ours, theirs in zip(moments(phi, y, weights), moments(phi[again], y[again]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING)


def bound_of(seed, times, *, lam, start_std, budget=False, parts=False):
    """Exact expected risk by an average over starts ± one axis each, and the bound, for one toy."""
    features, labels, clean, shown, test = toy(seed, lam=lam)
    moment, cross, _ = moments(features, labels)
    sigma, cross_test, power = moments(shown, test)
    values, vectors = spectrum(moment)
    d = len(values)
    # A start of ±ξ √d along each axis, 2 d starts, has mean zero and covariance ξ² I.
    starts = start_std * np.sqrt(d) * np.concatenate([np.eye(d), -np.eye(d)])
    path = weights_at(moment, cross, starts, times, learning_rate=RATE)
    exact = risk(path, sigma, cross_test, power).mean(0)
    star = np.linalg.pinv(features) @ clean
    star_risk = np.mean((shown @ star - test) ** 2)
    limits = {
        "feature_bound": 2 * (shown**2).sum(1).max(),
        "noise_bound": ((labels - clean) ** 2).max(),
        "clean_risk": star_risk,
    }
    flow = {"learning_rate": RATE, "start_std": start_std}
    return exact, risk_bound(values, vectors.T @ star, times, **flow, **limits, budget=budget), limits


@pytest.mark.parametrize("lam", [0.5, 0.3, 0.05])
def test_thm_risk_bound(lam):
    """thm-risk-bound and prop-noise-budget are never violated, and without the noise term they are."""
    times = np.r_[0.0, np.logspace(-1, 7, 33)]
    for seed, start_std in itertools.product(range(25), (0.0, 0.3, 2.0)):
        exact, bound, _ = bound_of(seed, times, lam=lam, start_std=start_std)
        shared = bound_of(seed, times, lam=lam, start_std=start_std, budget=True)[1]
        assert (exact <= bound * (1 + ROUNDING)).all(), (seed, start_std, (exact / bound).max())
        assert (exact <= shared * (1 + ROUNDING)).all(), (seed, start_std, (exact / shared).max())
        assert (shared <= bound * (1 + ROUNDING)).all()


def test_thm_risk_bound_needs_its_terms():
    """One feature: with C₂ or ξ too small the bound is exceeded, so |Z| is each point's noise and ξ counts."""
    flow = {"learning_rate": 1.0, "start_std": 0.0}
    limits = {"feature_bound": 2.0, "clean_risk": 0.0}
    late = [50.0]
    # φ = 1, f = 0, Z = 1 at each of m points: θ_∞ = 1, risk 1, the bound 2 · C₂.
    assert risk_bound([1.0], [0.0], late, **flow, **limits, noise_bound=1.0)[0] == pytest.approx(2.0, abs=1e-12)
    assert risk_bound([1.0], [0.0], late, **flow, **limits, noise_bound=0.25)[0] < 1.0
    # Four such points: C₂/m = 1/4, the reading of |Z| as the length of a noise vector, fails as seen above.
    early = [0.0]
    start = {"learning_rate": 1.0, "start_std": 2.0}
    assert risk_bound([1.0], [0.0], early, **start, **limits, noise_bound=1.0)[0] == pytest.approx(8.0)
    assert risk_bound([1.0], [0.0], early, **flow, **limits, noise_bound=1.0)[0] < 4.0  # E θ_0² = 4


def test_thm_risk_bound_null_space():
    """Zeros among the eigenvalues: the frozen start counts, the noise does not; nothing is infinite."""
    flow = {"learning_rate": 1.0, "start_std": 1.5, "feature_bound": 2.0, "noise_bound": 1.0, "clean_risk": 0.0}
    bound = risk_bound([0.0, 1.0], [0.0, 0.0], [80.0], **flow)
    assert bound[0] == pytest.approx(2.0 * (1.5**2 + 1.0))


def test_prop_noise_budget():
    """Σ μ_k ν_k² <= E Z² on random toys, met by noise in the range; a single mode may take all of it."""
    for seed in range(20):
        features, labels, clean, _, _ = toy(seed)
        values, vectors = spectrum(moments(features, clean)[0])
        nu = vectors.T @ (np.linalg.pinv(features) @ (labels - clean))
        assert (values * nu**2).sum() <= np.mean((labels - clean) ** 2) * (1 + ROUNDING)
        inside = features @ vectors[:, -1]  # noise along the largest mode
        nu = vectors.T @ (np.linalg.pinv(features) @ inside)
        assert (values * nu**2).sum() == pytest.approx(np.mean(inside**2), rel=1e-9)
        assert (values * nu**2).max() > (1 - 1e-9) * np.mean(inside**2)


def test_cor_turning_time():
    """t*_k is where a numerical search finds the minimum; decreasing in μ, C₂ and η, increasing in ξ."""
    rng = np.random.default_rng(7)
    for _ in range(50):
        mu, signal, noise, rate = np.exp(rng.normal(size=4))
        curve = lambda t: signal * np.exp(-2 * rate * mu * t) + noise / mu * (1 - np.exp(-rate * mu * t)) ** 2  # noqa: B023, E731
        ours = float(turning_times(mu, signal, noise, learning_rate=rate))
        found = minimize_scalar(curve, bounds=(0, 4 * ours + 1), method="bounded", options={"xatol": 1e-10}).x
        assert ours == pytest.approx(found, rel=1e-5, abs=1e-6)  # a minimum is found to the root of the rounding
        half = signal * noise / mu / (signal + noise / mu)
        assert curve(ours) == pytest.approx(half, rel=1e-12)
        for more in ((2 * mu, signal, noise, rate), (mu, signal, 2 * noise, rate), (mu, signal, noise, 2 * rate)):
            assert turning_times(*more[:3], learning_rate=more[3]) < ours
        assert turning_times(mu, signal + 1.0, noise, learning_rate=rate) > ours


def test_prop_mode_minimum():
    """The stated minimum against a grid; where none is stated the grid is monotone."""
    rng = np.random.default_rng(8)
    s = np.linspace(0, 1, 20001)
    found = {True: 0, False: 0}
    for _ in range(300):
        clean, noise = rng.normal(size=2)
        start = float(rng.choice([0.0, 0.5, 2.0]))
        curve = start**2 * s**2 + ((1 - s) * noise - s * clean) ** 2
        ours = float(mode_minimum(clean, noise, start))
        found[np.isnan(ours)] += 1
        if np.isnan(ours):
            slope = np.diff(curve)
            # the end intervals of a minimum within one step of an end are left out
            assert (slope[1:-1] >= -1e-12).all() or (slope[1:-1] <= 1e-12).all(), (clean, noise, start)
        else:
            assert abs(s[curve.argmin()] - ours) <= 0.5 / 20000 + 1e-9
            if start == 0:
                assert clean * noise > 0
    assert min(found.values()) > 50
    assert np.isnan(mode_minimum(1.0, -0.5, 0.0))
    assert mode_minimum(1.0, 0.5, 0.0) == pytest.approx(1 / 3)


def test_prop_bound_shape():
    """The two examples of the statement, from their training laws by Runge–Kutta-free exact paths on a fine grid."""
    times = np.linspace(0.0, 30.0, 3001)
    curves, bounds = [], []
    for nu in (0.5, -0.5):
        moment, cross, _ = moments(np.ones((3, 1)), np.full(3, 1 + nu))
        theta = weights_at(moment, cross, [0.0], times, learning_rate=1.0)
        curves.append(risk(theta, *moments(np.ones((1, 1)), np.ones(1))))
        limits = {"feature_bound": 2.0, "noise_bound": nu**2, "clean_risk": 0.0}
        bounds.append(risk_bound([1.0], [1.0], times, learning_rate=1.0, start_std=0.0, **limits))
    np.testing.assert_array_equal(bounds[0], bounds[1])
    assert 0 < bounds[0].argmin() < 3000
    assert 0 < curves[0].argmin() < 3000
    assert curves[0][-1] > curves[0].min() + 0.2
    assert (np.diff(curves[1]) <= 1e-15).all()

    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=2)))
    phi, star = signs * [1.0, 0.01], np.array([3.0, 25.0])
    noise = signs @ [3.0, 0.3]
    moment, cross, _ = moments(phi, phi @ star + noise)
    times = np.logspace(-2, 5, 1401)
    theta = weights_at(moment, cross, np.zeros(2), times, learning_rate=1.0)
    curve = risk(theta, *moments(signs, signs @ star))
    limits = {"feature_bound": 4.0, "noise_bound": (noise**2).max(), "clean_risk": 0.0}
    values, vectors = spectrum(moment)
    bound = risk_bound(values, vectors.T @ star, times, learning_rate=1.0, start_std=0.0, **limits)
    for one in (curve, bound):
        down = np.sign(np.diff(one))
        assert (np.diff(down[down != 0]) > 0).sum() == 2, "two minima"
        assert (curve <= bound * (1 + ROUNDING)).all()


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_thm_exact_risk(discrete, few):
    """thm-exact-risk against 20,000 random starts at four times, ranks full and not.

    4.9 standard errors on 16 means: a false alarm once in 60,000 runs if means are normal; seeds are fixed.
    """
    features, labels, clean, shown, test = toy(11)
    keep = slice(0, 7) if few else slice(None)
    features, labels, clean = features[keep], labels[keep], clean[keep]
    moment, cross, _ = moments(features, labels)
    sigma, cross_test, power = moments(shown, test)
    best = np.linalg.solve(sigma, cross_test)
    times = np.array([0.0, 3.0, 40.0, 1000.0])
    parts = risk_parts(
        moment,
        moments(features, clean)[1],
        moments(features, labels - clean)[1],
        times,
        learning_rate=RATE,
        start_std=0.8,
        moment_test=sigma,
        best=best,
        discrete=discrete,
    )
    least = risk(best[None], sigma, cross_test, power)[0]
    exact = least + sum(parts.values())
    starts = 0.8 * np.random.default_rng(12).normal(size=(20000, 12))
    drawn = risk(
        weights_at(moment, cross, starts, times, learning_rate=RATE, discrete=discrete), sigma, cross_test, power
    )
    error = np.maximum(drawn.std(0, ddof=1) / np.sqrt(len(starts)), 1e-9)
    assert (np.abs(drawn.mean(0) - exact) < 4.9 * error).all(), (drawn.mean(0), exact, error)
    # Negative controls: a lost cross term and ξ in place of ξ² are seen.
    lost = exact - parts["sample x noise"]
    assert np.abs(lost - drawn.mean(0))[-1] > 10 * error[-1]
    assert np.abs(least + sum(parts.values()) - parts["start"] * (1 - 1 / 0.8) - drawn.mean(0))[0] > 10 * error[0]
    if few:
        assert parts["start"][-1] > 0.01  # the frozen null space


def test_thm_exact_risk_any_minimiser():
    """With a singular test moment the excess is the same for each choice of θ°; its square pieces are not."""
    features, labels, clean, shown, test = toy(13, test_points=5)
    sigma = moments(shown, test)[0]
    best = np.linalg.pinv(shown) @ test
    values, vectors = np.linalg.eigh(sigma)
    other = best + 3 * vectors[:, 0]
    assert values[0] < 1e-12
    args = (moments(features, clean)[0], moments(features, clean)[1], moments(features, labels - clean)[1], [5.0])
    flow = {"learning_rate": RATE, "start_std": 0.4, "moment_test": sigma}
    one, two = (risk_parts(*args, **flow, best=b) for b in (best, other))
    assert sum(one.values())[0] == pytest.approx(sum(two.values())[0], abs=1e-9)
    assert abs(one["unlearnt"][0] - two["unlearnt"][0]) > 1e-4


def test_cor_start_scale():
    """The minimiser of R_0 + ξ² S never moves to the left as ξ grows, for 40 toys on one grid."""
    times = np.r_[0.0, np.logspace(-1, 6, 150)]
    moved = 0
    for seed in range(40):
        features, labels, clean, shown, test = toy(seed)
        sigma, cross_test, _ = moments(shown, test)
        args = (moments(features, clean)[0], moments(features, clean)[1], moments(features, labels - clean)[1], times)
        flow = {"learning_rate": RATE, "moment_test": sigma, "best": np.linalg.solve(sigma, cross_test)}
        at = [sum(risk_parts(*args, **flow, start_std=xi).values()).argmin() for xi in (0.0, 0.1, 0.5, 1.0, 3.0)]
        assert (np.diff(at) >= 0).all(), (seed, at)
        moved += at[-1] > at[0]
    assert moved > 30


def test_cor_start_scale_is_strict():
    """One mode, solved by hand: strictly later where the risk turns inside, and 0 for both where it never falls.

    R = (θ° - (1 - s)(θ° + ν))² + ξ²s² with s = e^{-ηt} is least at s = ν(θ° + ν)/((θ° + ν)² + ξ²): smaller s, later.
    """
    sizes = np.array([0.0, 0.3, 1.0, 3.0])
    for star, nu in ((1.0, 0.5), (2.0, 0.01)):
        least = nu * (star + nu) / ((star + nu) ** 2 + sizes**2)
        grid = np.linspace(0, 40, 400_001)
        s = np.exp(-0.5 * grid)
        found = []
        for xi, by_hand in zip(sizes, least, strict=True):
            parts = risk_parts(
                np.eye(1), np.array([star]), np.array([nu]), grid, learning_rate=0.5, start_std=xi,
                moment_test=np.eye(1), best=np.array([star]),
            )  # fmt: skip
            curve = sum(parts.values())
            assert np.allclose(curve, (star - (1 - s) * (star + nu)) ** 2 + xi**2 * s**2, atol=1e-12)
            found.append(grid[curve.argmin()])
            assert found[-1] == pytest.approx(-np.log(by_hand) / 0.5, abs=2e-4)  # two steps of the grid
        assert (np.diff(found) > 0.01).all()  # strictly: "not earlier" would allow equal times
    # The risk (3 - s)² + ξ²s² only rises: both minima are at 0.
    for xi in (0.0, 0.5):
        parts = risk_parts(
            np.eye(1), np.zeros(1), np.array([1.0]), np.linspace(0, 40, 4001), learning_rate=0.5, start_std=xi,
            moment_test=np.eye(1), best=np.array([-2.0]),
        )  # fmt: skip
        assert sum(parts.values()).argmin() == 0


def test_prop_learning_rate():
    """Flow with a cut schedule, by Runge–Kutta in t, is the flow of rate 1 at ∫η; descent with the same Ση is not."""
    phi, clean, noise, start = problem(14)
    y = clean + noise
    moment, cross, _ = moments(phi, y)
    eta = lambda t: 0.3 if t < 2 else 0.03  # noqa: E731
    options = {"rtol": 1e-11, "atol": 1e-12, "method": "DOP853"}
    first = solve_ivp(lambda t, v: -0.3 * (moment @ v - cross), (0, 2), start, **options).y[:, -1]
    last = solve_ivp(lambda t, v: -eta(t) * (moment @ v - cross), (2, 9), first, **options).y[:, -1]
    ours = weights_at(moment, cross, start, [0.3 * 2 + 0.03 * 7], learning_rate=1.0)[0]
    np.testing.assert_allclose(ours, last, rtol=0, atol=1e-8)
    one = weights_at(moment, cross, start, [3], learning_rate=0.4, discrete=True)[0]
    two = weights_at(moment, cross, start, [12], learning_rate=0.1, discrete=True)[0]
    assert np.abs(one - two).max() > 1e-3


def test_prop_sgd_noise():
    """Mean, covariance and risk of SGD against all batches enumerated, and against 40,000 simulated runs.

    Enumeration is exact (1e-12). Simulation: 4.9 standard errors on 6 risks, a false alarm once in 170,000.
    """
    phi, clean, noise, _ = problem(15, m=4, d=3)
    y, weights, rates = clean + noise, np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.2, 0.05])
    # Two steps of batches of 2 from a fixed start (ξ = 0): all 16 x 16 ways with their probabilities.
    paths = {(): (np.zeros(3), 1.0)}
    for rate in rates:
        paths = {
            (*key, i, j): (
                theta - rate * (phi[i] * (phi[i] @ theta - y[i]) + phi[j] * (phi[j] @ theta - y[j])) / 2,
                p * weights[i] * weights[j],
            )
            for key, (theta, p) in paths.items()
            for i in range(4)
            for j in range(4)
        }
    ends, chance = (np.array(a) for a in zip(*paths.values(), strict=True))
    mean, cov = sgd_moments(phi, y, weights, 0.0, rates, batch=2, records=[0, 2])
    centre = chance @ ends
    np.testing.assert_allclose(mean[1], centre, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cov[1], (ends - centre).T * chance @ (ends - centre), rtol=0, atol=1e-12)
    assert np.abs(cov[0]).max() == 0

    rng = np.random.default_rng(16)
    features, labels, _, shown, test = toy(17, n=3, d=5)
    runs, steps = 40000, 40
    rates = np.where(np.arange(steps) < 20, 0.2, 0.02)
    theta = 0.5 * rng.normal(size=(runs, 5, 1))
    seen = {}
    for step in range(steps + 1):
        if step in (1, 5, 20, 40):
            seen[step] = ((theta[..., 0] @ shown.T - test) ** 2).mean(1)
        if step < steps:
            pick = rng.integers(0, 9, size=(runs, 2))
            chosen, target = features[pick], labels[pick][..., None]
            theta = theta - rates[step] * np.swapaxes(chosen, 1, 2) @ (chosen @ theta - target) / 2
    mean, cov = sgd_moments(features, labels, np.full(9, 1 / 9), 0.5, rates, batch=2, records=list(seen))
    sigma, cross_test, power = moments(shown, test)
    ours = risk(mean, sigma, cross_test, power) + (cov * sigma).sum((1, 2))
    for k, values in enumerate(seen.values()):
        assert abs(values.mean() - ours[k]) < 4.9 * values.std(ddof=1) / np.sqrt(runs), (k, values.mean(), ours[k])
    # The same with full batches is descent; SGD lies above it, by much more than rounding.
    moment = moments(features, labels)[0]
    full = by_steps(features, labels, np.zeros(5), 20, 0.2)
    np.testing.assert_allclose(mean[2], full, rtol=0, atol=1e-12)
    values_, vectors = spectrum(moment)
    kept = decay(values_, [20], learning_rate=0.2, discrete=True)[0]
    descent = 0.25 * (vectors * kept**2) @ vectors.T
    assert (np.linalg.eigvalsh(cov[2] - descent) > -1e-12).all()
    assert ((cov[2] - descent) * sigma).sum() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2.0, "discrete": True, "times": [3]}, r"learning_rate 2 with μ_max 1\.5, product 3"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0"),
        ({"learning_rate": np.nan}, "learning_rate must be positive"),
        ({"times": [-1.0]}, "times must be .* at least 0"),
        ({"times": [0.5], "discrete": True}, "step counts"),
        ({"moment": np.zeros((2, 2))}, "rank zero"),
        ({"moment": np.array([[1.0, 2.0], [0.0, 1.0]])}, "symmetric"),
        ({"moment": np.diag([1.0, -1.0])}, "negative eigenvalue, got -1"),
        ({"moment": np.full((2, 2), np.nan)}, "finite"),
        ({"moment": np.ones((2, 3))}, r"\[..., d, d\]"),
        ({"start": np.zeros(3)}, r"got \[2, 2\], \[2\] and \[3\]"),
    ],
)
def test_weights_at_refuses(change, message):
    """Bad input is named with its value; η μ_max >= 2 with both numbers."""
    good = {"moment": np.diag([1.5, 0.5]), "cross": np.ones(2), "start": np.zeros(2), "times": [1.0]}
    given = good | {"learning_rate": 0.1} | change
    args = [given.pop(k) for k in good]
    with pytest.raises(ValueError, match=message):
        weights_at(*args, **given)


def test_stable_up_to_two():
    """Just below η μ_max = 2 is accepted and contracts; at 2 it is refused."""
    args = (np.eye(1), [0.0], [1.0], [400])
    assert abs(weights_at(*args, learning_rate=1.98, discrete=True)[0, 0]) < 1e-3
    with pytest.raises(ValueError, match="product 2"):
        weights_at(*args, learning_rate=2.0, discrete=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mix_pairs(np.ones((1, 2)), [1.0], lam=0.5), "n >= 2 examples, got 1"),
        (lambda: mix_pairs(np.ones((2, 2)), [1.0, 2.0], lam=1.2), r"lam must lie in \[0, 1\], got \[1.2\]"),
        (lambda: mix_pairs(np.ones((2, 2)), [1.0, 2.0], lam=-0.1), r"\[0, 1\]"),
        (lambda: mix_pairs(np.ones((2, 2)), [1.0, 2.0], lam=np.nan), r"\[0, 1\]"),
        (lambda: mix_pairs(np.ones((2, 2)), [1.0], lam=0.5), "x must be"),
        (lambda: moments(np.ones((2, 2)), [1.0]), "features must be"),
        (lambda: moments(np.ones((2, 2)), [1.0, 1.0], [0.5, 0.6]), "sum 1"),
        (lambda: risk(np.ones(2), np.eye(2), np.ones(2), 1.0), "weights"),
        (lambda: risk(np.ones((1, 2)), np.eye(3), np.ones(2), 1.0), "moment_test"),
        (lambda: decay([1.0], [1.0], learning_rate=-1.0), "positive"),
        (lambda: turning_times([0.0], [1.0], 1.0, learning_rate=1.0), "μ > 0"),
        (
            lambda: risk_parts(
                np.eye(1), [0.0], [0.0], [1.0], learning_rate=1.0, start_std=-1.0, moment_test=np.eye(1), best=[0.0]
            ),
            "start_std must be at least 0, got -1",
        ),
        (
            lambda: risk_bound(
                [0.0],
                [0.0],
                [1.0],
                learning_rate=1.0,
                start_std=0.0,
                feature_bound=1.0,
                noise_bound=1.0,
                clean_risk=0.0,
            ),
            "rank zero",
        ),
        (
            lambda: risk_bound(
                [1.0],
                [0.0],
                [1.0],
                learning_rate=1.0,
                start_std=0.0,
                feature_bound=1.0,
                noise_bound=-1.0,
                clean_risk=0.0,
            ),
            "at least 0",
        ),
        (lambda: sgd_moments(np.eye(2), [1.0, 1.0], None, 0.0, [0.1], batch=0, records=[0]), "batch >= 1"),
        (lambda: sgd_moments(np.eye(2), [1.0, 1.0], [0.5, 0.5], 0.0, [0.1], batch=1, records=[0, 2]), "within 0 to 1"),
        (
            lambda: sgd_moments(np.eye(2), [1.0, 1.0], [0.5, 0.5], 1.0, [1e60] * 9, batch=1, records=[9]),
            "diverges: at step",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message), np.errstate(over="ignore", invalid="ignore"):
        call()
