"""Exact minimisers against integrals and optimisers that share nothing with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize as scipy_minimize
from scipy.optimize import nnls, root

from labelaug.data.synthetic import Box, Elliptical, EllipticalTask, TwoFeatureTask, counterexample_task, sample
from labelaug.theory import population
from labelaug.theory.population import (
    AtInfinity,
    BetaLaw,
    ConvergenceError,
    DiscreteLaw,
    Minimiser,
    Objective,
    Sample,
    gradient_flow,
    max_margin,
    method_objective,
    minimise,
    population_loss,
)

ONE = dict(num_low=1, num_high=1)
SQUARE = TwoFeatureTask(gamma=0.1, high=Box(0.2, 10.2), **ONE)


def lam_rule(mixing, points=121):
    """Nodes and weights of λ by the double-exponential rule, which does not mind a singular density at the ends."""
    if isinstance(mixing, DiscreteLaw):
        return np.array(mixing.values), np.array(mixing.weights)
    t = np.linspace(-4.5, 4.5, points)
    odds = np.pi * np.sinh(t)
    log_lam, log_rest = -np.logaddexp(0, -odds), -np.logaddexp(0, odds)
    weights = np.exp(mixing.alpha * (log_lam + log_rest)) * np.cosh(t)
    return np.exp(log_lam), weights / weights.sum()


def plane_law(task, q=32, q_low=12):
    """All points of (y, x_low, x_high) of a task with two coordinates, by numpy's Gauss–Legendre rule."""
    nodes, weights = np.polynomial.legendre.leggauss(q)
    narrow, narrow_weights = (
        np.polynomial.legendre.leggauss(q_low) if task.low_noise else (np.zeros(1), np.full(1, 2.0))
    )
    x, labels, mass = [], [], []
    for y in (1, -1):
        box = task.law(y)
        high = box.low + (box.high - box.low) * (nodes + 1) / 2
        low = task.gamma + task.low_noise * narrow
        grid = np.stack(np.meshgrid(low, high, indexing="ij"), -1).reshape(-1, 2)
        x.append(y * grid)
        labels.append(np.full(len(grid), (y + 1) // 2))
        mass.append(0.5 * np.outer(narrow_weights / 2, weights / 2).ravel())
    return np.concatenate(x), np.concatenate(labels), np.concatenate(mass)


def direct_loss(x, labels, mass, objective):
    """Loss and gradient of the definition: every pair and every λ written out, nothing reduced."""
    if objective.mixing is None:
        points, targets, weights = x, labels.astype(float), mass
    else:
        lam, chance = lam_rule(objective.mixing)
        lam = lam[:, None, None]
        points = (lam[..., None] * x[:, None] + (1 - lam[..., None]) * x).reshape(-1, x.shape[1])
        targets = (lam * labels[:, None] + (1 - lam) * labels).ravel()
        weights = (chance[:, None, None] * mass[:, None] * mass).ravel()
    targets = targets * (1 - objective.smoothing) + objective.smoothing / 2

    def value(w):
        z = points @ w
        decay = objective.weight_decay
        residual = 1 / (1 + np.exp(-z)) - targets
        loss = weights @ (np.logaddexp(0, z) - targets * z) + decay / 2 * w @ w
        return loss, (weights * residual) @ points + decay * w

    return value


def general_minimiser(value, dim):
    """scipy's quasi-Newton method, then its root finder on the gradient."""
    rough = scipy_minimize(value, np.zeros(dim), jac=True, method="BFGS", options={"gtol": 1e-9})
    fine = root(lambda w: value(w)[1], rough.x, tol=1e-14)
    assert np.linalg.norm(value(fine.x)[1]) < 1e-11
    return fine.x


def random_description(rng, kind):
    """A task in the plane or a small sample, and an objective with a finite minimiser."""
    objective = [
        lambda: Objective(smoothing=rng.uniform(0.02, 0.9)),
        lambda: Objective(weight_decay=10 ** rng.uniform(-3, 0)),
        lambda: Objective(mixing=BetaLaw(10 ** rng.uniform(-0.7, 1))),
        lambda: Objective(mixing=DiscreteLaw((0.2, 0.5, 0.9), tuple(rng.dirichlet(np.ones(3))))),
        lambda: Objective(smoothing=rng.uniform(0.02, 0.9), weight_decay=10 ** rng.uniform(-3, 0)),
        lambda: Objective(mixing=BetaLaw(10 ** rng.uniform(-0.7, 1)), weight_decay=10 ** rng.uniform(-3, 0)),
    ][kind % 6]()
    if kind % 4 == 3:
        n, d = int(rng.integers(8, 40)), int(rng.integers(1, 5))
        labels = np.arange(n) % 2
        return Sample(rng.normal(size=(n, d)) + np.outer(2 * labels - 1, rng.normal(size=d)), labels), objective
    gamma, start = rng.uniform(0.3, 1), rng.uniform(-0.5, 1)
    other = Box(start - rng.uniform(0, 0.5), start + rng.uniform(1, 3)) if kind % 2 else None
    noise = rng.uniform(0, 1.5) if kind % 3 == 0 else 0.0
    task = TwoFeatureTask(
        gamma=gamma, high=Box(start, start + rng.uniform(0.5, 3)), high_negative=other, low_noise=noise, **ONE
    )
    return task, objective


@pytest.mark.parametrize("kind", range(60))
def test_minimisers_agree_with_a_general_optimiser(kind):
    """60 random descriptions; 1e-8 relative to 1 + |w| is what two double-precision routes can be asked for here."""
    source, objective = random_description(np.random.default_rng(kind), kind)
    small = objective.mixing is None
    law = (
        (source.x, source.labels, source.weights)
        if isinstance(source, Sample)
        else plane_law(source, q=40 if small else 12, q_low=16 if small else 8)
    )
    ours = minimise(source, objective)
    theirs = general_minimiser(direct_loss(*law, objective), len(ours.weights))
    assert np.linalg.norm(ours.weights - theirs) < 1e-8 * (1 + np.linalg.norm(theirs))
    assert ours.gradient_norm <= 1e-10 and ours.least_curvature > 0
    value = direct_loss(*law, objective)
    assert ours.loss == pytest.approx(value(theirs)[0], abs=1e-12)
    if objective.mixing is not None and not isinstance(objective.mixing, DiscreteLaw):
        # Negative control: another law of λ must move the minimiser by far more than the tolerance.
        other = direct_loss(
            *law, Objective(objective.smoothing, BetaLaw(1.3 * objective.mixing.alpha), objective.weight_decay)
        )
        assert np.linalg.norm(other(ours.weights)[1]) > 1e-6


def test_ten_dimensions_are_the_plane_of_their_sums():
    """The unreduced gradient in d = 10, by Monte Carlo, vanishes at the symmetric minimiser and not at a tilted one."""
    task = TwoFeatureTask(gamma=0.3, high=Box(0.4, 2.0), low_noise=0.2)
    n = 200_000
    x, labels = (t.numpy() for t in sample(task, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    rng = np.random.default_rng(0)
    for objective in (Objective(smoothing=0.1), Objective(weight_decay=0.01), Objective(mixing=BetaLaw(0.5))):
        w = minimise(task, objective).weights
        points, targets = x, labels * (1 - objective.smoothing) + objective.smoothing / 2
        if objective.mixing is not None:
            half = n // 2  # disjoint pairs are independent
            lam = rng.beta(0.5, 0.5, half)
            points = lam[:, None] * x[:half] + (1 - lam)[:, None] * x[half:]
            targets = lam * labels[:half] + (1 - lam) * labels[half:]

        def standardised(weights, points=points, targets=targets, decay=objective.weight_decay):
            each = (1 / (1 + np.exp(-points @ weights)) - targets)[:, None] * points + decay * weights
            return np.abs(each.mean(0) / (each.std(0) / len(each) ** 0.5)).max()

        # Ten coordinates, three objectives: all 30 normal deviates stay below 5 but for odds of 2e-5.
        assert standardised(w) < 5
        assert standardised(w + np.linspace(-0.2, 0.2, 10)) > 20


@pytest.mark.parametrize("radial", ["gaussian", "ellipse"])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(smoothing=0.1, weight_decay=0.05),
        Objective(weight_decay=0.1),
        Objective(mixing=BetaLaw(0.7), weight_decay=0.05),
        Objective(mixing=DiscreteLaw((0.3, 1.0), (0.5, 0.5))),
    ],
)
def test_elliptical_laws_against_monte_carlo(radial, objective):
    """Integration by parts in the radial variable: the gradient by sampling vanishes, in any dimension."""
    rng = np.random.default_rng(1)
    root_cov = rng.normal(size=(4, 4)) / 2
    task = EllipticalTask(Elliptical((0.5, 1.0, -0.3, 0.2), tuple(map(tuple, root_cov @ root_cov.T)), radial))
    n = 200_000
    u = task.law.sample(n, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy()
    sign = np.where(rng.random(n) < 0.5, 1.0, -1.0)
    found = minimise(task, objective)
    points, targets = u, np.ones(n)
    if objective.mixing is not None:
        half = n // 2
        lam_values, chance = lam_rule(objective.mixing) if isinstance(objective.mixing, DiscreteLaw) else (None, None)
        lam = rng.choice(lam_values, half, p=chance) if lam_values is not None else rng.beta(0.7, 0.7, half)
        points = lam[:, None] * u[:half] + ((1 - lam) * sign[:half])[:, None] * u[half:]
        targets = lam + (1 - lam) * (sign[:half] > 0)
    targets = targets * (1 - objective.smoothing) + objective.smoothing / 2
    each = (1 / (1 + np.exp(-points @ found.weights)) - targets)[:, None] * points
    each = each + objective.weight_decay * found.weights
    # 32 deviates over all parametrisations: odds of any beyond 5 are 2e-5.
    assert np.abs(each.mean(0) / (each.std(0) / len(each) ** 0.5)).max() < 5
    step = 1e-5
    for i in range(4):  # the Hessian's diagonal by differences of a second route would be circular: check convexity
        nudge = np.zeros(4)
        nudge[i] = step
        up, down = (population_loss(task, objective, found.weights + s * nudge) for s in (1, -1))
        assert up > found.loss - 1e-13 and down > found.loss - 1e-13


def test_derivatives_agree_with_finite_differences():
    task = TwoFeatureTask(
        gamma=0.3,
        high=Elliptical((1.0, 2.0), ((1.0, 0.3), (0.3, 0.5)), "ellipse"),
        high_negative=Elliptical((1.0, 2.0), ((0.5, -0.1), (-0.1, 0.7)), "gaussian"),
        num_low=2,
        num_high=2,
    )
    for objective in (
        Objective(smoothing=0.1, weight_decay=0.1),
        Objective(mixing=DiscreteLaw((0.3, 0.8), (0.5, 0.5))),
    ):
        nodes = population._nodes(task, objective, 48)
        w = np.array([0.7, 0.4, -0.2])
        _, gradient, hessian = nodes.derivatives(w, objective.weight_decay)
        step = 1e-5
        for i, nudge in enumerate(step * np.eye(3)):
            (up, gradient_up, _), (down, gradient_down, _) = (
                nodes.derivatives(w + s * nudge, objective.weight_decay) for s in (1, -1)
            )
            # central differences: error step² plus rounding/step
            assert (up - down) / (2 * step) == pytest.approx(gradient[i], abs=1e-9)
            assert np.allclose((gradient_up - gradient_down) / (2 * step), hessian[i], rtol=0, atol=1e-8)


@pytest.mark.parametrize("radial", ["gaussian", "ellipse"])
def test_classes_with_different_ellipses(radial):
    """Unequal covariances, a noisy low feature, Mixup: the gradient by sampling vanishes."""
    covs = (((1.0, 0.3), (0.3, 0.5)), ((0.5, -0.1), (-0.1, 0.7)))
    task = TwoFeatureTask(
        gamma=0.3,
        high=Elliptical((1.0, 2.0), covs[0], radial),
        high_negative=Elliptical((0.8, 2.0), covs[1], "gaussian"),
        low_noise=0.2 if radial == "gaussian" else 0.0,
        num_low=1,
        num_high=2,
    )
    found = minimise(task, Objective(mixing=BetaLaw(1.0), weight_decay=0.01))
    n = 200_000
    x, labels = (
        t.numpy() for t in sample(task, 2 * n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    )
    lam = np.random.default_rng(3).uniform(size=n)
    points = lam[:, None] * x[:n] + (1 - lam)[:, None] * x[n:]
    targets = lam * labels[:n] + (1 - lam) * labels[n:]

    def deviates(w):
        each = (1 / (1 + np.exp(-points @ w)) - targets)[:, None] * points + 0.01 * w
        return np.abs(each.mean(0) / (each.std(0) / n**0.5)).max()

    assert deviates(found.weights) < 5 < 20 < deviates(found.weights + 0.2)  # six deviates: odds of 4e-6 beyond 5


def test_gauss_rules_keep_all_moments():
    lam = DiscreteLaw((0.05, 0.5, 0.9), (0.2, 0.3, 0.5))
    scalar = population._Scalar(1.0, 0.5, "uniform", 5)
    points, weights = population._mixed_rule(scalar, scalar, lam, -1.0, 12)
    generator = np.random.default_rng(0)
    v = 1.0 + 0.5 * generator.uniform(-1, 1, (2, 100_000, 5)).sum(-1) / 5**0.5
    for row, chance, value in zip(points, weights, lam.values, strict=True):
        mixed = value * v[0] - (1 - value) * v[1]
        assert chance.min() >= 0 and chance.sum() == pytest.approx(1, abs=1e-13)
        for power in range(1, 5):
            error = (mixed**power).std() / 100_000**0.5
            assert abs(chance @ row**power - (mixed**power).mean()) < 5 * error
    # exact: the variance of the standardised sum is 1/3 of the squared half-width, whatever the count
    plain, mass = population._standard_rule("uniform", 5, 12)
    assert mass @ plain**2 == pytest.approx(1 / 3, abs=1e-14)
    assert mass @ plain**4 == pytest.approx((3 * 5 * 4 / 9 + 5 / 5) / 25, abs=1e-14)


laws_of_lam = st.one_of(
    st.builds(BetaLaw, st.floats(0.1, 10)),
    st.builds(lambda v, p: DiscreteLaw((v, 0.5), (p, 1 - p)), st.floats(0.05, 0.45), st.floats(0.1, 0.9)),
)


@settings(max_examples=40)
@given(
    st.floats(0.1, 2),
    st.floats(0.2, 3),
    st.floats(0.2, 5),
    st.one_of(
        st.builds(lambda e: Objective(smoothing=e), st.floats(0.01, 1)),
        st.builds(lambda m: Objective(mixing=m), laws_of_lam),
    ),
)
def test_without_noise_the_high_feature_gets_nothing(gamma, start, width, objective):
    task = TwoFeatureTask(gamma=gamma, high=Box(start, start + width), **ONE)
    found = minimise(task, objective)
    assert abs(found.weights[1]) < 1e-9 * (1 + abs(found.weights[0]))


def test_null_space_is_reported_and_avoided():
    found = minimise(TwoFeatureTask(num_low=3, num_high=2), Objective(smoothing=0.1))
    assert found.null_space.shape == (5, 2)
    assert np.allclose(found.null_space.T @ found.weights, 0, atol=1e-10)
    assert np.allclose(found.null_space[3:], 0, atol=1e-9) and np.allclose(found.null_space[:3].sum(0), 0, atol=1e-9)
    assert minimise(TwoFeatureTask(num_low=3, low_noise=0.01), Objective(smoothing=0.1)).null_space.shape[1] == 0
    x = np.array([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [2.0, 4.0, 0.0], [-3.0, -6.0, 0.0]])
    flat = minimise(Sample(x, np.array([1, 0, 0, 1])), Objective(smoothing=0.2))
    assert flat.null_space.shape == (3, 2) and flat.weights[1] == pytest.approx(2 * flat.weights[0])
    singular = EllipticalTask(Elliptical((1.0, 1.0, 0.0), ((1.0, 1.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.0, 0.0))))
    assert minimise(singular, Objective(smoothing=0.1)).null_space.shape == (3, 2)


def test_minimisers_at_infinity_are_reported():
    midpoint = minimise(SQUARE, Objective(mixing=DiscreteLaw()))
    assert isinstance(midpoint, AtInfinity)
    assert midpoint.infimum == pytest.approx(np.log(2) / 2) and np.allclose(midpoint.direction, [1, 0])
    mixture = minimise(SQUARE, Objective(mixing=DiscreteLaw((0.0, 0.5, 1.0), (0.3, 0.4, 0.3))))
    assert mixture.infimum == pytest.approx(0.4 * np.log(2) / 2)
    for objective in (Objective(mixing=DiscreteLaw()), Objective()):
        found = minimise(SQUARE, objective)
        losses = [population_loss(SQUARE, objective, c * found.direction) for c in (30, 100, 300)]
        assert losses[0] > losses[1] > losses[2] > found.infimum and losses[2] - found.infimum < 1e-3
    erm = minimise(SQUARE, Objective())
    assert np.allclose(erm.direction, np.array([0.1, 0.2]) / np.hypot(0.1, 0.2)) and erm.infimum == 0
    # A little weight elsewhere in the law of λ, noise in every direction, or weight decay: the minimiser is finite.
    for source, objective in (
        (SQUARE, Objective(mixing=DiscreteLaw((0.4, 0.5), (0.01, 0.99)))),
        (TwoFeatureTask(low_noise=0.05, **ONE), Objective(mixing=DiscreteLaw())),
        (SQUARE, Objective(mixing=DiscreteLaw(), weight_decay=1e-4)),
        (TwoFeatureTask(high=Box(-1.0, 3.0), low_noise=0.3, **ONE), Objective()),
    ):
        assert isinstance(minimise(source, objective), Minimiser)


def test_a_feature_without_noise_separates_beside_an_unbounded_one():
    task = TwoFeatureTask(gamma=0.5, high=Elliptical((1.0,), ((2.0,),)), low_noise=0.2, **ONE)
    assert np.allclose(max_margin(task), [1 / 0.3, 0])
    found = minimise(task, Objective())
    assert isinstance(found, AtInfinity) and np.allclose(found.direction, [1, 0])
    assert minimise(TwoFeatureTask(gamma=0.5, high=task.high, low_noise=0.6, **ONE), Objective()).weights[1] > 0


def test_method_objective_names_the_sweeps():
    assert {method_objective(m, 0) for m in ("weight decay", "label smoothing", "mixup")} == {Objective()}
    assert method_objective("mixup", 0.3) == Objective(mixing=BetaLaw(0.3))
    assert method_objective("label smoothing", 0.3) == Objective(smoothing=0.3)
    assert method_objective("weight decay", 0.3) == Objective(weight_decay=0.3)


def test_smoothing_of_one_asks_for_nothing():
    assert np.allclose(minimise(SQUARE, Objective(smoothing=1.0)).weights, 0, atol=1e-12)


def test_max_margin_against_closed_forms_and_slsqp():
    assert np.allclose(max_margin(SQUARE), np.array([0.1, 0.2]) / 0.05)
    assert np.allclose(max_margin(counterexample_task()), [10, 0], atol=1e-9)
    ten = max_margin(TwoFeatureTask())
    assert np.allclose(ten[5:] / ten[:5], 2) and (TwoFeatureTask().gamma * ten[:5]).sum() + 0.2 * ten[
        5:
    ].sum() == pytest.approx(1)
    rng = np.random.default_rng(3)
    for _ in range(5):
        labels = np.arange(20) % 2
        x = rng.normal(size=(20, 3)) + np.outer(2 * labels - 1, [3.0, 2.0, 0.0])
        u = (2 * labels - 1)[:, None] * x
        ours = max_margin(Sample(x, labels))
        theirs = scipy_minimize(
            lambda w: w @ w,
            3 * ours + 0.1,
            jac=lambda w: 2 * w,
            constraints={"type": "ineq", "fun": lambda w, u=u: u @ w - 1, "jac": lambda w, u=u: u},
            method="SLSQP",
            options={"ftol": 1e-15},
        ).x
        assert np.allclose(ours, theirs, atol=1e-6) and (u @ ours).min() == pytest.approx(1, abs=1e-10)
    mean, cov = np.array([3.0, 1.0]), np.array([[1.0, 0.2], [0.2, 1.0]])
    ellipse = EllipticalTask(Elliptical(tuple(mean), tuple(map(tuple, cov)), "ellipse"))
    w = max_margin(ellipse)
    assert mean @ w - 2 * np.sqrt(w @ cov @ w) == pytest.approx(1, abs=1e-9)
    # stationary: w is parallel to the gradient of its margin
    pull = mean - 2 * cov @ w / np.sqrt(w @ cov @ w)
    assert w @ pull / np.linalg.norm(w) / np.linalg.norm(pull) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("seed", [1615, 2962, 2993])  # of 3,000 Gaussian samples those with the longest weights
def test_max_margin_of_barely_separable_samples(seed):
    """The least margin can be met to rounding only, which grows with the squared norm of the weights."""
    generator, labels = np.random.default_rng(seed), np.repeat([1, 0], 32)
    u = generator.normal(size=(64, 5)) / 6**0.5 + np.eye(5)[0]
    w = max_margin(Sample(np.where(labels, 1, -1)[:, None] * u, labels))
    margins = u @ w
    assert margins.min() == pytest.approx(1, abs=1e-7) and np.linalg.norm(w) > 400
    # no shorter weights: w is a nonnegative combination of the points that bind
    assert nnls(u[margins < 1 + 1e-6].T, w)[1] < 1e-6 * np.linalg.norm(w)


@pytest.mark.parametrize(
    "source",
    [
        TwoFeatureTask(high=Box(-1.0, 3.0), low_noise=0.3, **ONE),
        EllipticalTask(Elliptical((1.0, 1.0), ((4.0, 0.0), (0.0, 4.0)), "ellipse")),
        EllipticalTask(Elliptical((1.0, 1.0), ((1.0, 0.0), (0.0, 1.0)))),
        Sample(np.array([[1.0], [2.0], [-1.0], [1.5]]), np.array([1, 0, 0, 1])),
    ],
)
def test_without_a_separating_direction_only_max_margin_fails(source):
    with pytest.raises(ValueError, match="no max-margin solution"):
        max_margin(source)
    for objective in (Objective(weight_decay=0.1), Objective(smoothing=0.1), Objective()):
        assert minimise(source, objective).gradient_norm <= 1e-10


def test_weight_decay_tends_to_the_widest_margin():
    """Direction at λ → 0; the rate is logarithmic, so the tolerance is loose and the trend is what is asked."""
    goal = max_margin(SQUARE) / np.linalg.norm(max_margin(SQUARE))
    angles = []
    for decay in (1e-2, 1e-4, 1e-6, 1e-8):
        w = minimise(SQUARE, Objective(weight_decay=decay)).weights
        angles.append(np.arccos(w @ goal / np.linalg.norm(w)))
    assert (np.diff(angles) < 0).all() and angles[-1] < 0.15 < angles[0]


def test_gradient_flow_against_small_steps():
    times = np.array([1.0, 10.0, 50.0])
    flow = gradient_flow(SQUARE, Objective(), times)
    x, labels, mass = plane_law(SQUARE, q=40)
    value = direct_loss(x, labels, mass, Objective())
    rough = {}
    for step in (0.01, 0.005):
        w, path = np.zeros(2), []
        for k in range(1, round(50 / step) + 1):
            w = w - step * value(w)[1]
            if k in [round(t / step) for t in times]:
                path.append(w)
        rough[step] = np.array(path)
    richardson = 2 * rough[0.005] - rough[0.01]  # Euler's error is of first order in the step
    assert np.allclose(flow, richardson, rtol=1e-4)
    assert not np.allclose(flow, rough[0.01][::-1], rtol=1e-2)
    finite = gradient_flow(SQUARE, Objective(weight_decay=0.1), np.array([1e6]))
    assert np.allclose(finite[0], minimise(SQUARE, Objective(weight_decay=0.1)).weights, rtol=1e-6)


def test_units_move_weight_decay_alone():
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    x = rng.normal(size=(24, 3)) + np.outer(2 * labels - 1, [0.5, 1.0, 0.0])
    matrix = rng.normal(size=(3, 3))
    for objective, equivariant in (
        (Objective(smoothing=0.1), True),
        (Objective(mixing=BetaLaw(1.0)), True),
        (Objective(weight_decay=0.1), False),
    ):
        before, after = minimise(Sample(x, labels), objective), minimise(Sample(x @ matrix.T, labels), objective)
        assert np.allclose(x @ before.weights, x @ matrix.T @ after.weights, atol=1e-8) == equivariant


BAD = [
    (lambda: DiscreteLaw((0.2, 0.5), (0.5, 0.4)), "sum to 1"),
    (lambda: DiscreteLaw((0.2, 1.5), (0.5, 0.5)), r"\[0, 1\].*1\.5"),
    (lambda: DiscreteLaw((0.2, 0.5), (1.5, -0.5)), "positive"),
    (lambda: DiscreteLaw((0.2, 0.2), (0.5, 0.5)), "once"),
    (lambda: DiscreteLaw((), ()), "a weight for each value"),
    (lambda: BetaLaw(0.0), "must be positive, got 0"),
    (lambda: Objective(smoothing=1.2), r"\(0, 1\].*1\.2"),
    (lambda: Objective(smoothing=-0.1), r"\(0, 1\].*-0\.1"),
    (lambda: Objective(weight_decay=-1.0), "at least 0, got -1"),
    (lambda: Objective(weight_decay=float("nan")), "at least 0, got nan"),
    (lambda: Sample(np.ones((3, 2)), np.array([1, 1, 1])), "both present"),
    (lambda: Sample(np.ones((2, 2)), np.array([1, 2])), r"0 and 1, both present, got \[1 2\]"),
    (lambda: Sample(np.array([[1.0, np.nan], [1.0, 0.0]]), np.array([1, 0])), "x must be finite, and 1 of its 2 rows"),
    (lambda: Sample(np.array([[1.0, np.inf], [1.0, 0.0]]), np.array([1, 0])), "x must be finite, and 1 of its 2 rows"),
    (lambda: Sample(np.ones((2, 2)), np.array([1, 0]), np.array([np.nan, 0.5])), "positive and sum to 1"),
    (lambda: Sample(np.ones((3, 2)), np.array([1, 0])), r"\[n, d\] with labels \[n\]"),
    (lambda: Sample(np.ones((2, 2)), np.array([1, 0]), np.array([0.5, 0.4])), "sum to 1"),
    (lambda: Sample(np.zeros((2, 2)), np.array([1, 0])), "must not be all zero"),
    (lambda: Sample(np.array([[1.0], [np.nan]]), np.array([1, 0])), "must be finite"),
    (lambda: population_loss(TwoFeatureTask(), Objective(), np.arange(10.0)), "equal within a block"),
    (lambda: gradient_flow(SQUARE, Objective(), np.array([1.0, 0.5])), "increasing"),
    (lambda: method_objective("cutmix", 0.1), "cutmix"),
    (
        lambda: minimise(
            TwoFeatureTask(
                high=Box(1.0, 2.0), high_negative=Elliptical((1.0, 1.0), ((1.0, 0.0), (0.0, 1.0))), num_high=2
            ),
            Objective(smoothing=0.1),
        ),
        "share no symmetry",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_quadrature_that_has_not_converged_raises(monkeypatch):
    monkeypatch.setattr(population, "MOST_NUMBERS", 200)
    with pytest.raises(ConvergenceError, match="not settled"):
        minimise(SQUARE, Objective(weight_decay=1e-4))
    monkeypatch.undo()
    monkeypatch.setattr(population, "GRADIENT", 0.0)
    with pytest.raises(ConvergenceError, match="no certificate"):
        minimise(TwoFeatureTask(low_noise=0.05, **ONE), Objective(weight_decay=1e-4))


@pytest.mark.parametrize("snr", [2.0, 4.0, 6.0, 7.0, 8.0, 9.5, 12.0, 20.0])
def test_normal_classes_far_apart_are_solved_or_refused(snr):
    """ERM on N(μ, I) has its minimiser at 2μ. Curvatures fall to 1e-80 here, so that a small gradient says nothing."""
    task = EllipticalTask(Elliptical((snr, 0.5), ((1.0, 0.0), (0.0, 1.0))))
    try:
        found = minimise(task, Objective())
    except ConvergenceError:
        assert snr > 6  # a Bayes error below 1e-9
    else:
        assert np.allclose(found.weights, [2 * snr, 1.0], rtol=1e-7)


def test_touching_supports_have_no_certificate():
    """Weakly separable: no margin, yet ERM's loss falls for ever. No number may come back."""
    boxes = TwoFeatureTask(gamma=0.5, high=Box(0.0, 1.0), low_noise=0.5, **ONE)
    ellipse = EllipticalTask(
        Elliptical((2.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), "ellipse")
    )  # radius 2: it meets the origin
    for touching in (boxes, ellipse):
        with pytest.raises(ConvergenceError, match="none at all"):
            minimise(touching, Objective())
