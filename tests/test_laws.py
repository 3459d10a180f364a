"""The laws E1 to E4: one test for each labelled statement, with oracles that share no code with theory.laws."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, root
from scipy.special import expit, log_softmax, softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from labelaug.data.synthetic import Elliptical, EllipticalTask
from labelaug.theory import laws, population
from labelaug.theory.population import BetaLaw, DiscreteLaw, Objective
from labelaug.theory.softmax import gaussian_nodes, softmax_minimiser

MEAN, COV = np.array([0.5, 1.2]), np.array([[0.3, 0.2], [0.2, 1.5]])
THREE = DiscreteLaw((0.1, 0.6, 0.75), (0.2, 0.5, 0.3))
RULE = settings(max_examples=15, deadline=None, derandomize=True)


# --- oracles ------------------------------------------------------------------------------------------------------


def spherical(radial: str, fine: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A tensor rule of a spherical law of identity covariance in the plane: points ``[n, 2]`` and weights."""
    if radial == "gaussian":
        t, w = np.polynomial.hermite_e.hermegauss(2 * fine)
        points, chance = np.array([(a, b) for a in t for b in t]), np.outer(w, w).ravel()
    else:  # uniform in the disc of radius 2: Gauss in the radius, equal steps in the angle
        r, w = np.polynomial.legendre.leggauss(fine)
        r, angle = 1 + r, np.arange(2 * fine) * np.pi / fine
        points = np.array([(a * np.cos(h), a * np.sin(h)) for a in r for h in angle])
        chance = np.repeat(r * w, 2 * fine)
    return points, chance / chance.sum()


def unmixed(u, chance, smoothing=0.0):
    """Points, targets and weights of a law of U = YX without mixing (the loss only sees U)."""
    return u, np.full(len(u), 1 - smoothing / 2), chance


def mixed(x, y, chance, lam, mass, smoothing=0.0):
    """All pairs of a finite law of (X, Y), Y = ±1, and all values of λ: points, targets, weights."""
    points, targets, weights = [], [], []
    for value, m in zip(lam, mass, strict=True):
        points.append((value * x[:, None] + (1 - value) * x[None]).reshape(-1, x.shape[1]))
        label = (value * (y[:, None] > 0) + (1 - value) * (y[None] > 0)).ravel()
        targets.append((1 - smoothing) * label + smoothing / 2)
        weights.append(m * np.outer(chance, chance).ravel())
    return np.concatenate(points), np.concatenate(targets), np.concatenate(weights)


def least(points, targets, weights, *, decay=0.0, start=None) -> np.ndarray:
    """Minimiser of Σ weights·ℓ(⟨w, points⟩, targets) + (decay/2)‖w‖² by scipy, polished by scipy's root finder."""

    def gradient(w):
        return (weights * (expit(points @ w) - targets)) @ points + decay * w

    def loss(w):
        z = points @ w
        return weights @ (np.logaddexp(0, z) - targets * z) + 0.5 * decay * w @ w

    start = np.zeros(points.shape[1]) if start is None else start
    rough = minimize(loss, start, jac=gradient, method="BFGS", options={"gtol": 1e-7}).x

    def hessian(w):
        s = weights * expit(points @ w) * expit(-(points @ w))
        return (points * s[:, None]).T @ points + decay * np.eye(len(w))

    found = root(gradient, rough, jac=hessian, method="hybr", options={"xtol": 1e-14}).x
    assert np.linalg.norm(gradient(found)) < 1e-11
    return found


def both_classes(u, chance):
    """The law of (X, Y) from one law of U for both classes."""
    return np.concatenate([u, -u]), np.repeat([1, -1], len(u)), np.concatenate([chance, chance]) / 2


def unit(w):
    return w / np.linalg.norm(w)


def slope(errors, scales):
    return np.diff(np.log(errors))[-1] / np.diff(np.log(scales))[-1]


# --- E1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radial", laws.RADIAL)
def test_lem_elliptical_regression(radial):
    """E[Z | s] is the stated line: what is left is orthogonal to every function of s (polynomials up to 5, tanh)."""
    points, chance = spherical(radial)
    a, b, w = -0.4, 0.7, np.array([0.8, -0.3])

    def residual(base):
        z = a * MEAN + math.sqrt(b) * base @ np.linalg.cholesky(COV).T
        s = z @ w
        line = a * MEAN + np.outer((s - a * (w @ MEAN)) / (w @ COV @ w), COV @ w)
        tests = [s**k for k in range(6)] + [np.tanh(s)]
        return max(np.abs((chance * f) @ (z - line)).max() for f in tests)

    assert residual(points) < 1e-11  # the rule is exact to rounding
    square = points**3  # coordinates still uncorrelated, but no longer spherical
    square /= math.sqrt(chance @ square[:, 0] ** 2)
    assert residual(square) > 1e-2


@pytest.mark.parametrize("radial", laws.RADIAL)
@pytest.mark.parametrize(
    ("smoothing", "decay", "mixing"),
    [
        (0.1, 0.0, None),
        (0.5, 0.0, None),
        (0.0, 0.1, None),
        (0.0, 0.003, None),
        (0.1, 0.01, None),
        (0.0, 0.0, THREE),
        (0.2, 0.05, THREE),
        (0.0, 0.0, DiscreteLaw()),
    ],
)
def test_thm_elliptical_law(radial, smoothing, decay, mixing):
    points, chance = spherical(radial, 40 if mixing is None else 5)
    root_cov = np.linalg.cholesky(COV)
    # Mixed pairs need four dimensions of noise: a coarse rule and a smaller covariance, so that it is still exact.
    scale = 1.0 if mixing is None else 0.3
    u = MEAN + scale * points @ root_cov.T
    cov = scale**2 * COV
    if mixing is None:
        law = unmixed(u, chance, smoothing)
    else:
        law = mixed(*both_classes(u, chance), mixing.values, mixing.weights, smoothing)
    exact = least(*law, decay=decay)
    kind = {"radial": radial, "smoothing": smoothing, "mixing": mixing}
    found = laws.elliptical_law(MEAN, cov, weight_decay=decay, **kind)
    # 2e-6: the oracle's coarse rule for pairs; 1e-8 (a gradient of 1e-11 over a curvature above 1e-3) otherwise.
    tolerance = 2e-6 if mixing is not None else 1e-8
    assert np.linalg.norm(found.weights - exact) < tolerance * np.linalg.norm(exact)
    tau = laws.ridge(exact, MEAN, cov, weight_decay=decay, **kind)
    assert tau == pytest.approx(found.ridge, abs=20 * tolerance)
    eye = np.eye(2)
    assert np.linalg.norm(unit(np.linalg.solve(cov + tau * eye, MEAN)) - unit(exact)) < 20 * tolerance
    # Negative controls: a ridge of the wrong sign, and the direction of least variance in place of signal-to-noise.
    if decay:
        assert np.linalg.norm(unit(np.linalg.solve(cov - tau * eye, MEAN)) - unit(exact)) > 1e-2
    else:
        assert np.linalg.norm(laws.fisher_direction(MEAN, cov) - unit(exact)) < 20 * tolerance
        quietest = np.linalg.eigh(cov)[1][:, 0]
        assert abs(quietest @ unit(exact)) < 0.99


@st.composite
def elliptical_cases(draw):
    d = draw(st.integers(1, 4))
    number = st.floats(-1, 1, allow_subnormal=False)
    mean = np.array(draw(st.lists(number, min_size=d, max_size=d)))
    factor = np.array(draw(st.lists(number, min_size=d * d, max_size=d * d))).reshape(d, d)
    cov = factor @ factor.T + draw(st.floats(0.1, 1)) * np.eye(d)
    assume(np.linalg.norm(mean) > 0.1)
    values = draw(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=2, unique=True))
    mass = draw(st.floats(0.1, 0.9))
    return {
        "mean": mean,
        "cov": (cov + cov.T) / 2,
        "radial": draw(st.sampled_from(laws.RADIAL)),
        "smoothing": draw(st.sampled_from([0.0, 0.02, 0.3, 0.9])),
        "mixing": draw(st.sampled_from([None, DiscreteLaw(tuple(values), (mass, 1 - mass)), BetaLaw(0.5)])),
        "weight_decay": draw(st.sampled_from([0.0, 1e-3, 0.1, 2.0])),
    }


@RULE
@given(case=elliptical_cases())
def test_thm_elliptical_law_of_random_descriptions(case):
    """Against Newton's method on the d-dimensional loss, which knows nothing of the law."""
    mean, cov, radial = case["mean"], case["cov"], case["radial"]
    hard = case["smoothing"] == case["weight_decay"] == 0 and case["mixing"] is None
    assume(not hard)
    if case["mixing"] is not None and radial == "ellipse":
        case |= {"mixing": THREE, "weight_decay": 0.0}  # a rule in two radial variables is slow: few λ, no search for τ
    objective = Objective(case["smoothing"], case["mixing"], case["weight_decay"])
    law = laws.elliptical_law(**case)
    if len(mean) == 1:
        exact = None  # the task needs two features; one is checked by its stationarity alone
    else:
        task = EllipticalTask(Elliptical(tuple(mean), tuple(map(tuple, cov)), radial=radial))
        exact = population.minimise(task, objective).weights
        assert np.linalg.norm(law.weights - exact) < 1e-7 * np.linalg.norm(exact)
    assert law.weights @ mean > 0 and law.ridge >= 4 * case["weight_decay"]
    assert law.ridge == 0 if case["weight_decay"] == 0 else law.ridge > 0


def test_cor_shares():
    mean, std_high = np.array([0.1, 0.7]), 0.3
    change = laws.changeover_noise(mean[0], mean[1], std_high)

    def ratio(std_low, **kind):
        cov = np.diag([std_low**2, std_high**2])
        found = laws.elliptical_law(mean, cov, **kind)
        w = found.weights
        stated = mean[1] / mean[0] * (std_low**2 + found.ridge) / (std_high**2 + found.ridge)
        assert w[1] / w[0] == pytest.approx(stated, rel=1e-9)
        return w[1] / w[0]

    assert ratio(change, smoothing=0.1) * mean[1] / mean[0] == pytest.approx(1, rel=1e-9)
    # Equal variance is not the change-over.
    assert ratio(std_high, smoothing=0.1) * mean[1] / mean[0] > 10
    path = [ratio(0.02, smoothing=0.1, weight_decay=v) for v in (0.0, 1e-4, 1e-3, 1e-2, 1.0)]
    assert np.all(np.diff(path) > 0) and path[-1] < mean[1] / mean[0]
    assert ratio(1e-4, smoothing=0.1) < 1e-5


@pytest.mark.parametrize("radial", ["gaussian", "ellipse"])
@pytest.mark.parametrize(
    "kind", [{"smoothing": 0.1}, {"mixing": THREE}, {"mixing": DiscreteLaw((0.0, 0.5), (0.5, 0.5))}]
)
def test_cor_shares_weight_of_the_high_feature(kind, radial):
    """As σ_L → 0, w_H falls with σ_L under label smoothing and Mixup, also at the midpoint; the proof's bound holds."""
    mean, std_high, stds = np.array([0.1, 0.7]), 0.3, np.array([0.1, 0.01, 0.001])
    points, chance = spherical(radial)
    size = chance @ np.abs(points[:, 0])  # E|⟨e, S⟩|
    if "mixing" in kind:  # E min(t, 1 - t), over pairs of two classes
        doubt = 0.5 * np.dot(
            kind["mixing"].weights, np.minimum(kind["mixing"].values, 1 - np.array(kind["mixing"].values))
        )
    else:
        doubt = kind["smoothing"] / 2
    found = []
    for std_low in stds:
        cov = np.diag([std_low**2, std_high**2])
        w = laws.elliptical_law(mean, cov, radial=radial, **kind).weights
        bound = 2 * math.log(2) / (size * doubt)  # of the spread of the logit
        assert math.sqrt(w @ cov @ w) < bound
        assert w[1] < bound * mean[1] / std_high**2 * std_low / mean[0]
        found.append(w[1])
    assert found[1] < 0.2 * found[0] and found[2] < 0.05 * found[1]


def test_cor_shares_erm_keeps_the_high_feature():
    """Gaussian classes, hard labels: the ratio goes to 0 and the weight stays at 2μ_H/σ_H²."""
    mean, std_high = np.array([0.1, 0.7]), 0.3
    for std_low in (0.1, 0.05, 1e-2, 1e-4):
        w = laws.elliptical_law(mean, np.diag([std_low**2, std_high**2])).weights
        assert w[1] == pytest.approx(2 * mean[1] / std_high**2, rel=1e-12)
        assert w[1] / w[0] == pytest.approx(mean[1] / mean[0] * (std_low / std_high) ** 2, rel=1e-12)
        if std_low >= 0.05:  # scipy's minimiser on a tensor rule of 160² points; less noise needs a finer one
            u, chance = spherical("gaussian", fine=80)
            exact = least(*unmixed(mean + u * [std_low, std_high], chance), start=w)
            assert np.allclose(exact, w, rtol=1e-6)


@RULE
@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True).filter(
        lambda v: any(abs(x - 0.5) > 0.02 for x in v)
    ),
    st.floats(0.0, 0.95),
)
def test_skew_coefficient_is_negative_and_above_minus_one(values, smoothing):
    """Exercise of the section: κ = 0 never happens. By a sum over both labels, and against mixup_margin."""
    law = DiscreteLaw(tuple(values), tuple(np.full(len(values), 1 / len(values))))
    margin = laws.mixup_margin(law, smoothing=smoothing)
    above = below = 0.0
    for lam in values:
        for one in (1, -1):
            for two in (1, -1):
                s = expit(margin.value * (lam * one + (1 - lam) * two))
                above += s * (1 - s) * (1 - 2 * s) * (lam**3 * one + (1 - lam) ** 3 * two)
                below += s * (1 - s) * (lam**2 + (1 - lam) ** 2)
    assert margin.skew == pytest.approx(above / below, rel=1e-9)
    assert -1 < margin.skew < 0
    assert laws.smoothing_margin(max(smoothing, 0.01)).skew == max(smoothing, 0.01) - 1


def test_cor_ridge_range():
    mean, cov = np.array([1.0, 3.0]), np.array([[0.06, 0.02], [0.02, 0.5]])
    for decay in (1e-4, 1e-2, 1.0, 30.0):
        for kind in ({}, {"smoothing": 0.3}, {"mixing": THREE}, {"radial": "ellipse"}):
            assert laws.elliptical_law(mean, cov, weight_decay=decay, **kind).ridge >= 4 * decay
    tiny = laws.elliptical_law(0.2 * mean, cov, weight_decay=1e-9).ridge
    assert tiny < 1e-7  # Gaussian: the ridge goes
    w, tau = laws.widest_margin_ridge(mean, cov)

    def margin(v, reach=2.0):
        return v @ mean - reach * math.sqrt(v @ cov @ v)

    start = np.linalg.solve(cov, mean)
    constraint = {"type": "ineq", "fun": lambda v: margin(v) - 1}
    program = minimize(
        lambda v: v @ v, start / margin(start), jac=lambda v: 2 * v, constraints=[constraint], method="SLSQP", tol=1e-14
    ).x
    assert np.linalg.norm(w - program) < 1e-6 * np.linalg.norm(w)  # SLSQP's own accuracy, the root of its tolerance
    assert margin(w) == pytest.approx(1, abs=1e-10)
    path = [laws.elliptical_law(mean, cov, radial="ellipse", weight_decay=10.0**-k) for k in (1, 3, 5, 7)]
    ridges = np.array([found.ridge for found in path])
    assert (np.diff(ridges) < 0).all() and ridges[-1] > tau and ridges[-1] < 2.5 * tau
    away = [np.linalg.norm(unit(found.weights) - unit(w)) for found in path]
    assert (np.diff(away) < 0).all()
    # Negative control: with the Gaussian law of the same moments the ridge falls far below τ₀.
    assert laws.elliptical_law(mean, cov, weight_decay=1e-7).ridge < 0.2 * tau


def test_cor_ridge_range_needs_separable_support():
    with pytest.raises(ValueError, match=r"must exceed d \+ 2 = 4"):
        laws.widest_margin_ridge(np.array([0.1, 0.1]), np.eye(2))


# --- E2 -----------------------------------------------------------------------------------------------------------

BOX = np.array([[0.3, 0.0], [0.25, 0.8]])


def corners():
    """Symmetric noise on 8 points: a rule of two independent symmetric coordinates, mixed by BOX."""
    base = np.array([(a, b) for a in (-1.5, 0.0, 1.5) for b in (-1.0, 1.0)])
    return base @ BOX.T, np.repeat([2 / 9, 5 / 9, 2 / 9], 2) / 2


def moments(noise, chance):
    return np.einsum("n,ni,nj->ij", chance, noise, noise), np.einsum("n,ni,nj,nk->ijk", chance, noise, noise, noise)


def small_noise_errors(noises, method, scales):
    """Distances of the exact direction from the law and the corrected law, and of the margin from second order."""
    (first, p), (second, q) = noises
    cov, third = ((a + b) / 2 for a, b in zip(moments(first, p), moments(second, q), strict=True))
    margin = laws.smoothing_margin(0.2) if method == "smoothing" else laws.mixup_margin(THREE)
    start = laws.small_noise_law(MEAN, cov, margin=margin)
    term = laws.skew_correction(MEAN, cov, third, margin=margin)
    rows = []
    for delta in scales:
        x = np.concatenate([MEAN + delta * first, -(MEAN + delta * second)])
        y, chance = np.repeat([1, -1], [len(first), len(second)]), np.concatenate([p, q]) / 2
        if method == "smoothing":
            law = unmixed(x * y[:, None], chance, 0.2)
        else:
            law = mixed(x, y, chance, THREE.values, THREE.weights)
        w = least(*law, start=start)
        better = laws.small_noise_law(MEAN, cov, margin=margin, noise=delta)
        rows.append(
            (
                np.linalg.norm(unit(w) - unit(start)),
                np.linalg.norm(unit(w) - unit(start + delta * term)),
                abs(w @ MEAN - better @ MEAN),
            )
        )
    return np.array(rows).T


SCALES = (0.04, 0.02, 0.01)


@pytest.mark.parametrize("method", ["smoothing", "mixup"])
def test_thm_small_noise(method):
    """Slopes at the two smallest scales; 0.12 is how far the next order bends them, and 1 and 2 are told apart."""
    even = small_noise_errors([corners(), (0.5 * corners()[0], corners()[1])], method, SCALES)
    skewed = [laws.two_point_noise([3.0, 0.5], BOX), laws.two_point_noise([0.4, 2.0], 0.5 * BOX)]
    odd = small_noise_errors(skewed, method, SCALES)
    assert slope(even[0], SCALES) == pytest.approx(2, abs=0.12)
    assert slope(odd[0], SCALES) == pytest.approx(1, abs=0.12)
    assert slope(odd[1], SCALES) == pytest.approx(2, abs=0.12)
    assert slope(even[2], SCALES) == pytest.approx(4, abs=0.2)  # the margin is even in δ, and right to second order
    assert slope(odd[2], SCALES) == pytest.approx(3, abs=0.2)
    # Negative control: the correction with the other sign leaves the error first order, and doubles it.
    assert odd[0][-1] > 5 * odd[1][-1]


def test_thm_small_noise_margins():
    """c, κ and ρ by finite differences of F and of ℓ, for laws of λ that are not symmetric too."""
    for mixing, smoothing in ((THREE, 0.0), (THREE, 0.3), (BetaLaw(0.4), 0.0), (DiscreteLaw((1.0,), (1.0,)), 0.2)):
        lam, mass = mixing.rule(laws.LAM_NODES)

        def slope_of(c, lam=lam, mass=mass, smoothing=smoothing):
            total = 0.0
            for y1 in (1, -1):
                for y2 in (1, -1):
                    a = lam * y1 + (1 - lam) * y2
                    q = smoothing / 2 + (1 - smoothing) * (lam * (y1 > 0) + (1 - lam) * (y2 > 0))
                    total += 0.25 * mass @ (a * (expit(a * c) - q))
            return total

        margin = laws.mixup_margin(mixing, smoothing=smoothing)
        assert abs(slope_of(margin.value)) < 1e-13 and margin.value > 0
    plain = laws.smoothing_margin(0.2)
    assert (margin.value, margin.skew, margin.shrinkage) == pytest.approx((plain.value, plain.skew, plain.shrinkage))
    # κ = φ'''/φ'' by central differences of φ' = σ - 1 + ε/2; step 1e-3 gives 1e-6.
    h, c = 1e-3, plain.value
    second = (expit(c + h) - expit(c - h)) / (2 * h)
    third = (expit(c + h) - 2 * expit(c) + expit(c - h)) / h**2
    assert plain.skew == pytest.approx(third / second, abs=1e-5)
    for bad in (DiscreteLaw(), DiscreteLaw((0.0, 0.5, 1.0), (0.2, 0.5, 0.3))):
        with pytest.raises(ValueError, match="no finite margin"):
            laws.mixup_margin(bad)


def test_prop_decay_small_noise():
    noise, chance = laws.two_point_noise([3.0, 0.5], BOX)
    decay = 0.05
    k = root(lambda k: decay * k - expit(-k * MEAN @ MEAN), 0.5).x[0]
    scales = (0.08, 0.04, 0.02)
    found = [least(*unmixed(MEAN + d * noise, chance), decay=decay) for d in scales]
    errors = [np.linalg.norm(w - k * MEAN) for w in found]
    assert slope(errors, scales) == pytest.approx(2, abs=0.1)
    # Fisher's direction is not approached: the small-noise law does not cover weight decay.
    assert np.linalg.norm(unit(found[-1]) - laws.fisher_direction(MEAN, moments(noise, chance)[0])) > 0.3


# --- E3 -----------------------------------------------------------------------------------------------------------


@st.composite
def finite_samples(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d = draw(st.integers(6, 14)), draw(st.integers(1, 3))
    y = np.where(np.arange(n) % 3 == 0, 1, -1)
    x = y[:, None] * rng.uniform(0.2, 1, d) + rng.normal(size=(n, d))
    a = rng.normal(size=(d, d)) + 2 * np.eye(d)
    assume(np.linalg.cond(a) < 30)
    return x, y, a, draw(st.sampled_from([0.05, 0.3, 0.9]))


@RULE
@given(case=finite_samples())
def test_prop_equivariance(case):
    x, y, a, smoothing = case
    chance = np.full(len(x), 1 / len(x))

    def smoothed(inputs, decay=0.0):
        return least(*unmixed(inputs * y[:, None], chance, smoothing), decay=decay)

    def mixup(inputs):
        return least(*mixed(inputs, y, chance, THREE.values, THREE.weights))

    for loss in (smoothed, mixup):
        before, after = x @ loss(x), (x @ a.T) @ loss(x @ a.T)
        # Gradients of 1e-11 over curvatures above 1e-4, times the condition number of A.
        assert np.abs(expit(before) - expit(after)).max() < 1e-5
    # Weight decay: equal under rotation and scaling with λ/c², and as the stated penalty; else it moves.
    q, c, decay = np.linalg.qr(a)[0], 3.0, 0.2
    w = smoothed(x, decay / c**2)
    assert np.allclose((c * x @ q.T) @ smoothed(c * x @ q.T, decay), x @ w, atol=1e-6)
    # The penalty wᵀ(AᵀA)⁻¹w on X: the gradient of that loss vanishes at the mapped weights.
    mapped = a.T @ smoothed(x @ a.T, decay)
    u = x * y[:, None]
    gradient = chance * (expit(u @ mapped) - 1 + smoothing / 2) @ u + decay * np.linalg.solve(a.T @ a, mapped)
    assert np.linalg.norm(gradient) < 1e-8


def test_prop_equivariance_moves_weight_decay_and_whitening_makes_it_fisher():
    points, chance = spherical("gaussian")
    u = MEAN + points @ np.linalg.cholesky(COV).T
    values, vectors = np.linalg.eigh(COV)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    fisher = laws.fisher_direction(MEAN, COV)
    for decay in (1e-3, 0.1, 3.0):
        read = whiten.T @ least(*unmixed(u @ whiten.T, chance), decay=decay)
        assert np.linalg.norm(unit(read) - fisher) < 1e-7
    raw = least(*unmixed(u, chance), decay=0.1)
    assert np.linalg.norm(unit(raw) - fisher) > 0.1  # negative control: not without whitening
    scaled = np.diag([10.0, 1.0])
    read = scaled.T @ least(*unmixed(u @ scaled.T, chance), decay=0.1)
    tau = 0.1 / (chance @ (expit(u @ read) * expit(-(u @ read))))  # Gaussian: τ = λ_wd/E ℓ''
    stated = np.linalg.solve(COV + tau * np.linalg.inv(scaled.T @ scaled), MEAN)
    assert np.linalg.norm(unit(read) - unit(stated)) < 1e-7


@RULE
@given(
    mean=st.lists(st.floats(0.1, 2), min_size=2, max_size=4),
    variance=st.floats(0.05, 3),
    decay=st.sampled_from([0.0, 1e-3, 1.0]),
    radial=st.sampled_from(laws.RADIAL),
)
def test_cor_uniform_variance(mean, variance, decay, radial):
    mean = np.array(mean)
    cov = variance * np.eye(len(mean))
    found = laws.elliptical_law(mean, cov, radial=radial, smoothing=0.1, weight_decay=decay)
    assert np.linalg.norm(unit(found.weights) - unit(mean)) < 1e-9
    cov[0, 0] *= 2  # negative control: unequal variances, and weight decay moves the direction
    two = [laws.elliptical_law(mean, cov, radial=radial, smoothing=0.1, weight_decay=v).weights for v in (0.0, 0.5)]
    assert np.linalg.norm(unit(two[0]) - unit(two[1])) > 1e-4


@RULE
@given(
    mean=st.lists(st.floats(0.1, 2), min_size=2, max_size=2),
    std=st.lists(st.floats(0.2, 2), min_size=2, max_size=2),
    decay=st.sampled_from([1e-3, 0.1, 5.0]),
    radial=st.sampled_from(laws.RADIAL),
)
def test_cor_standardised(mean, std, decay, radial):
    mean, std = np.array(mean), np.array(std)
    ratio = mean / std
    assume(abs(math.log(ratio[0] / ratio[1])) > 1e-3)
    scale = 1 / np.sqrt(mean**2 + std**2)
    found = laws.elliptical_law(scale * mean, np.diag((scale * std) ** 2), radial=radial, weight_decay=decay).weights
    assert found.argmax() == (found * scale * mean).argmax() == ratio.argmax()


def test_cor_standardised_fails_in_other_units():
    mean, std = (
        np.array([0.1, 5.0]),
        np.array([0.02, 2.9]),
    )  # the first has the larger ratio, the second the larger mean
    raw = laws.elliptical_law(mean, np.diag(std**2), weight_decay=0.001).weights
    assert (raw * mean).argmax() == 1
    scale = 1 / np.sqrt(mean**2 + std**2)
    points, chance = spherical("gaussian")
    w = least(*unmixed(scale * (mean + std * points), chance), decay=0.001)
    assert (w * scale * mean).argmax() == 0


# --- E4 -----------------------------------------------------------------------------------------------------------


def cross(cov):
    """Symmetric noise of covariance cov on 2d points."""
    root_cov = np.linalg.cholesky(cov) * math.sqrt(len(cov))
    return np.concatenate([root_cov.T, -root_cov.T]), np.full(2 * len(cov), 1 / (2 * len(cov)))


def least_softmax(x, target, chance, *, bias) -> tuple[np.ndarray, np.ndarray]:
    """Softmax minimiser by scipy's BFGS and hybr; the last row is minus the sum of the others."""
    inputs = np.column_stack([x, np.ones(len(x))]) if bias else x
    k, d = target.shape[1], inputs.shape[1]
    free = np.vstack([np.eye(k - 1), -np.ones(k - 1)])

    def logits(v):
        return inputs @ (free @ v.reshape(k - 1, d)).T

    def loss(v):
        return -(chance[:, None] * target * log_softmax(logits(v), axis=1)).sum()

    def gradient(v):
        return (free.T @ (chance[:, None] * (softmax(logits(v), axis=1) - target)).T @ inputs).ravel()

    rough = minimize(loss, np.zeros((k - 1) * d), jac=gradient, method="BFGS", options={"gtol": 1e-6}).x
    found = root(gradient, rough, method="hybr", options={"xtol": 1e-14, "maxfev": 4000}).x
    assert np.linalg.norm(gradient(found)) < 1e-10
    full = free @ found.reshape(k - 1, d)
    return (full[:, :-1], full[:, -1]) if bias else (full, np.zeros(k))


def class_sample(means, noise, chance, delta, prior, smoothing):
    """Finite law of K classes: inputs, smoothed targets and weights."""
    k = means.shape[1]
    x = np.concatenate([m + delta * noise for m in means.T])
    target = (1 - smoothing) * np.eye(k).repeat(len(noise), axis=0) + smoothing / k
    return x, target, np.concatenate([p * chance for p in prior])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prior", [(1 / 3, 1 / 3, 1 / 3), (0.2, 0.3, 0.5)])
def test_prop_multiclass_law(bias, prior):
    rng = np.random.default_rng(3)
    means, factor = rng.normal(size=(4, 3)) + np.eye(4)[:, :3], rng.normal(size=(4, 4))  # d > K, or Σ has no say
    cov = factor @ factor.T / 4 + 0.3 * np.eye(4)
    law, offset = laws.multiclass_law(means, cov, smoothing=0.2, bias=bias)
    noise, chance = cross(cov)
    skewed, skew_chance = laws.two_point_noise([3.0, 0.5, 2.0, 0.4], np.linalg.cholesky(cov))
    scales, even, odd = (0.02, 0.01), [], []

    def exact(points, p, delta):
        w, b = least_softmax(*class_sample(means, points, p, delta, prior, 0.2), bias=bias)
        return np.column_stack([w, b])

    for delta in scales:
        even.append(np.linalg.norm(exact(noise, chance, delta) - np.column_stack([law, offset])))
        both = [exact(skewed, skew_chance, sign * delta) for sign in (1, -1)]
        odd.append(np.linalg.norm(both[0] - both[1]))  # twice the odd part of the expansion in δ
    # The next orders, δ⁴ and δ³, bend the slopes by less than 0.1 at these scales.
    assert slope(even, scales) == pytest.approx(2, abs=0.1)
    assert slope(odd, scales) == pytest.approx(1, abs=0.1)  # so the error is of first order, no better
    # The logits at the class means are the targets', and the rows sum to zero.
    size = math.log((1 - 0.2 + 0.2 / 3) / (0.2 / 3))
    assert np.allclose(law @ means + offset[:, None], size * (np.eye(3) - 1 / 3), atol=1e-10)
    assert np.allclose(law.sum(0), 0, atol=1e-10)
    # Negative control: discriminant analysis' directions are not these.
    lda = np.linalg.solve(cov, means).T
    assert abs(unit(law[0] - law[1]) @ unit(lda[0] - lda[1])) < 0.995


def test_prop_multiclass_law_for_two_classes_is_the_small_noise_law():
    w, b = laws.multiclass_law(np.column_stack([MEAN, -MEAN]), COV, smoothing=0.1, bias=True)
    binary = laws.small_noise_law(MEAN, COV, margin=laws.smoothing_margin(0.1))
    assert np.allclose(w[0] - w[1], binary, atol=1e-12) and np.allclose(b, 0, atol=1e-12)


def test_cor_multiclass_lda():
    rng = np.random.default_rng(4)
    factor = rng.normal(size=(4, 4))
    cov = factor @ factor.T / 4 + 0.3 * np.eye(4)
    root_cov = np.linalg.cholesky(cov)
    pairs = [(0, 1), (1, 2), (0, 2)]

    def cosines(means):
        w, b = laws.multiclass_law(means, cov, smoothing=0.1, bias=True)
        lda = np.linalg.solve(cov, means)
        basis = np.column_stack([lda[:, 0] - lda[:, 1], lda[:, 1] - lda[:, 2]])
        for j, k in pairs:
            row = w[j] - w[k]
            inside = basis @ np.linalg.lstsq(basis, row, rcond=None)[0]
            assert np.linalg.norm(inside - row) < 1e-10 * np.linalg.norm(row)  # part 1: the subspace
            assert abs(row @ (means[:, j] + means[:, k]) / 2 + b[j] - b[k]) < 1e-10  # and the midpoint
        return np.array([unit(w[j] - w[k]) @ unit(lda[:, j] - lda[:, k]) for j, k in pairs])

    simplex = root_cov @ np.linalg.qr(rng.normal(size=(4, 3)))[0] + rng.normal(size=(4, 1))
    assert np.allclose(cosines(simplex), 1, atol=1e-10)
    assert cosines(rng.normal(size=(4, 3))).min() < 0.99  # negative control: no simplex
    # Part 3, in the plane: any covariance gives the same classifier, and its boundaries are the medians.
    plane = np.array([[0.0, 2.4, 0.4], [0.0, 0.2, 1.3]])
    first, offset = laws.multiclass_law(plane, np.eye(2), smoothing=0.1, bias=True)
    second, other = laws.multiclass_law(plane, COV, smoothing=0.1, bias=True)
    assert np.allclose(first, second) and np.allclose(offset, other)
    for j, k, i in ((0, 1, 2), (1, 2, 0), (0, 2, 1)):
        on_median = 0.3 * plane[:, i] + 0.7 * (plane[:, j] + plane[:, k]) / 2
        assert abs((first[j] - first[k]) @ on_median + offset[j] - offset[k]) < 1e-12


def test_fisher_direction_is_that_of_scikit_learn():
    """On a finite sample with pooled covariance; scikit-learn's own solver is the oracle."""
    rng = np.random.default_rng(5)
    y = np.repeat([1, -1], 50)
    x = y[:, None] * MEAN + rng.normal(size=(100, 2)) @ np.linalg.cholesky(COV).T
    means = np.array([x[y == c].mean(0) for c in (1, -1)])
    pooled = sum(np.cov(x[y == c].T, bias=True) for c in (1, -1)) / 2
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
    assert np.allclose(laws.fisher_direction((means[0] - means[1]) / 2, pooled), unit(lda.coef_[0]), atol=1e-10)


def test_softmax_minimiser():
    rng = np.random.default_rng(6)
    x, labels = rng.normal(size=(30, 2)), np.arange(30) % 3
    for bias in (False, True):
        found = softmax_minimiser(x, labels, num_classes=3, smoothing=0.3, bias=bias)
        target = 0.7 * np.eye(3)[labels] + 0.1
        w, b = least_softmax(x, target, np.full(30, 1 / 30), bias=bias)
        assert np.allclose(found.weights, w, atol=1e-8) and np.allclose(found.bias, b, atol=1e-8)
        assert found.gradient_norm <= 1e-10 and found.least_curvature > 0
        loss = -(target * log_softmax(x @ w.T + b, axis=1)).sum(1).mean()
        assert found.loss == pytest.approx(loss, abs=1e-12)
    flat = np.column_stack([x[:, 0], 2 * x[:, 0]])  # a direction without data: the weights of least norm
    w = softmax_minimiser(flat, labels, num_classes=3, smoothing=0.3).weights
    assert np.allclose(w @ [2.0, -1.0], 0, atol=1e-9)


def test_shapes_have_their_moments():
    for exponent, fourth in ((2.0, 2.0), (math.inf, 9 / 5)):
        points, weights = laws.superellipse_nodes(exponent, 12, 6)
        assert np.allclose(np.einsum("n,ni,nj->ij", weights, points, points), np.eye(2), atol=1e-12)
        assert weights @ points[:, 0] ** 4 == pytest.approx(fourth, abs=1e-6)  # of a disc; of an interval
        edge = laws.superellipse_edge(exponent, 9)
        radius = {2.0: 2.0, math.inf: math.sqrt(3)}[exponent]
        assert np.allclose(np.linalg.norm(edge, ord=exponent, axis=1), radius, atol=1e-6)
    points, chance = laws.two_point_noise([3.0, 0.5], np.eye(2))
    cov, third = moments(points, chance)
    assert np.allclose(cov, np.eye(2)) and np.allclose(chance @ points, 0)
    assert third[0, 0, 0] == pytest.approx(3 - 1 / 3) and third[1, 1, 1] == pytest.approx(0.5 - 2)
    x, labels, weights = gaussian_nodes(np.array([[0.0, 1.0], [2.0, 0.0]]), COV, noise=0.5, count=4)
    one = labels == 1
    centred = x[one] - [1.0, 0.0]
    assert np.allclose(2 * np.einsum("n,ni,nj->ij", weights[one], centred, centred), 0.25 * COV)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: laws.fisher_direction(MEAN, np.diag([1.0, 0.0])), "positive definite, its least eigenvalue is 0"),
        (lambda: laws.elliptical_law(MEAN, np.ones((2, 2)), smoothing=0.1), "positive definite"),
        (lambda: laws.elliptical_law(np.zeros(2), COV, smoothing=0.1), "non-zero of shape"),
        (lambda: laws.elliptical_law(MEAN, COV, smoothing=1.0), r"in \[0, 1\), got 1.0"),
        (lambda: laws.elliptical_law(MEAN, COV, smoothing=-0.1), r"got -0.1"),
        (lambda: laws.elliptical_law(MEAN, COV, weight_decay=-1.0), "at least 0, got -1.0"),
        (lambda: laws.elliptical_law(MEAN, COV, radial="box", smoothing=0.1), "radial must be one of"),
        (lambda: laws.elliptical_law(9 * MEAN, COV, radial="ellipse"), "minimiser is at infinity"),
        (lambda: laws.smoothing_margin(0.0), r"in \(0, 1\], got 0.0"),
        (lambda: laws.smoothing_margin(1.2), r"got 1.2"),
        (lambda: laws.mixup_margin(THREE, smoothing=1.0), r"got 1.0"),
        (lambda: laws.changeover_noise(0.0, 1.0, 1.0), "must be positive, got 0.0"),
        (lambda: laws.two_point_noise([0.0, 1.0], np.eye(2)), "must be positive"),
        (lambda: laws.superellipse_nodes(0.5, 4, 4), "at least 1, got 0.5"),
        (lambda: laws.multiclass_law(np.eye(3)[:, :2] @ [[1, 0, 1], [0, 1, 1]], np.eye(3), smoothing=0.1), "rank is 2"),
        (lambda: laws.multiclass_law(np.array([[0.0, 1.0, 2.0]]), np.eye(1), smoothing=0.1, bias=True), "affinely"),
        (lambda: laws.multiclass_law(np.eye(2), np.eye(2), smoothing=1.5), r"in \(0, 1\], got 1.5"),
        (lambda: softmax_minimiser(np.eye(2), np.arange(2), num_classes=2, smoothing=0.0), "at infinity"),
        (lambda: softmax_minimiser(np.eye(2), np.arange(2) - 1, num_classes=2, smoothing=0.1), r"2 integers in 0\.\.1"),
        (lambda: softmax_minimiser(np.eye(2), np.arange(2) + 1, num_classes=2, smoothing=0.1), r"2 integers in 0\.\.1"),
        (lambda: softmax_minimiser(np.eye(2), np.eye(2)[0], num_classes=2, smoothing=0.1), "integers .* got float64"),
        (
            lambda: softmax_minimiser(np.full((2, 2), np.inf), np.arange(2), num_classes=2, smoothing=0.1),
            "x must be finite, and 2",
        ),
    ],
)
def test_bad_input_names_the_value_and_the_condition(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_quadrature_that_has_not_settled_raises():
    with pytest.raises(population.ConvergenceError):
        laws.elliptical_law(10 * MEAN, COV, radial="ellipse", weight_decay=1e-30)
