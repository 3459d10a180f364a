"""The statements on exact minimisers and of paper 1's theorems, one test each, named as its label.

The oracle is scipy's general optimiser on a loss written out here, over all examples or all pairs of a small sample (a
finite law is a law, and most statements hold for any), never the solver of the package alone.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq, minimize
from scipy.special import entr, expit, logsumexp, softmax

from labelaug.data.synthetic import Box, Elliptical, TwoFeatureTask, counterexample_task
from labelaug.theory.laws import mixup_margin, smoothing_margin
from labelaug.theory.population import (
    AtInfinity,
    BetaLaw,
    DiscreteLaw,
    Minimiser,
    Objective,
    Sample,
    gradient_flow,
    max_margin,
    minimise,
    population_loss,
)

BOXES = TwoFeatureTask(gamma=0.1, high=Box(0.2, 10.2), num_low=1, num_high=1)


def two_feature_sample(rng, n=24, a=(1.0,), start=0.5, width=2.0, num_high=2, positives=None):
    """X_L = Ya exactly, X_H = Y·(uniform on a box): n examples, ``positives`` of them of class 1 (half)."""
    labels = (np.arange(n) < (n // 2 if positives is None else positives)).astype(int)
    y = 2.0 * labels - 1
    return np.column_stack([np.outer(y, a), y[:, None] * rng.uniform(start, start + width, (n, num_high))]), labels


def written_out(x, labels, *, smoothing=0.0, lam=None, chance=None, weight_decay=0.0):
    """Loss and gradient over examples, or over all pairs and values of λ."""
    y = 2.0 * labels - 1
    if lam is None:
        points, targets, weights = x, labels.astype(float), np.full(len(y), 1 / len(y))
    else:
        shape = (len(lam), len(y), len(y))
        mixed = np.asarray(lam)[:, None, None]
        points = (mixed[..., None] * x[:, None] + (1 - mixed[..., None]) * x).reshape(-1, x.shape[1])
        targets = np.broadcast_to(mixed * labels[:, None] + (1 - mixed) * labels, shape).ravel()
        weights = np.broadcast_to(np.asarray(chance)[:, None, None] / len(y) ** 2, shape).ravel()
    targets = (1 - smoothing) * targets + smoothing / 2

    def value(w):
        z = points @ w
        loss = weights @ (np.logaddexp(0, z) - targets * z) + weight_decay / 2 * w @ w
        return loss, (weights * (expit(z) - targets)) @ points + weight_decay * w

    return value


def general(value, dim):
    return minimize(value, np.zeros(dim), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000}).x


def share(w, high):
    return (w[high] ** 2).sum() / (w**2).sum()


# --- exact minimisers ----------------------------------------------------------------------------------------------


def test_prop_existence():
    rng = np.random.default_rng(0)
    overlapping = rng.normal(size=(30, 2)), np.arange(30) % 2
    separable, labels = two_feature_sample(rng, num_high=1)
    # Overlapping classes: finite, unique, the same from the general optimiser.
    value = written_out(*overlapping)
    assert np.allclose(minimise(Sample(*overlapping), Objective()).weights, general(value, 2), atol=1e-6)
    # Separable ones: the loss falls along the reported direction beyond any bound, and eq-escape holds for it.
    escape = minimise(Sample(separable, labels), Objective())
    assert isinstance(escape, AtInfinity)
    assert ((2 * labels - 1) * (separable @ escape.direction) >= 0).all()
    falling = [written_out(separable, labels)(c * escape.direction)[0] for c in (1, 10, 100, 1000)]
    assert (np.diff(falling) < 0).all() and falling[-1] < 1e-6
    # The lower bound of the proof, on random logits and targets; with the two slopes exchanged it must fail.
    z, t = rng.normal(size=1000) * 10, rng.uniform(size=1000)
    loss, up, down = np.logaddexp(0, z) - t * z, np.maximum(z, 0), np.maximum(-z, 0)
    assert (loss >= (1 - t) * up + t * down - 1e-12).all()
    assert (loss < t * up + (1 - t) * down).any()
    # Orthogonal to the span nothing changes; the minimiser of least norm has no part there.
    flat = np.column_stack([overlapping[0], overlapping[0] @ [1.0, 1.0]])
    found = minimise(Sample(flat, overlapping[1]), Objective())
    assert found.null_space.shape[1] == 1 and abs(found.weights @ found.null_space).max() < 1e-12
    moved = written_out(flat, overlapping[1])(found.weights + 5 * found.null_space[:, 0])[0]
    assert moved == pytest.approx(found.loss, abs=1e-12)


def test_cor_at_infinity():
    rng = np.random.default_rng(1)
    separable = Sample(*two_feature_sample(rng))
    margins_differ = two_feature_sample(rng)
    margins_differ = Sample(margins_differ[0] * np.where(margins_differ[1] == 1, 1.0, 2.0)[:, None], margins_differ[1])
    half = DiscreteLaw((0.0, 0.5, 1.0), (0.2, 0.5, 0.3))
    for e in (0.01, 0.5, 1.0):
        assert isinstance(minimise(separable, Objective(smoothing=e)), Minimiser)
    for mixing in (BetaLaw(0.3), DiscreteLaw((0.9,), (1.0,)), DiscreteLaw((0.5, 0.500001), (0.5, 0.5))):
        assert isinstance(minimise(separable, Objective(mixing=mixing)), Minimiser)
    at_half = minimise(separable, Objective(mixing=half))
    assert at_half.infimum == pytest.approx(0.5 * 0.5 * np.log(2)) and np.allclose(at_half.direction, [1, 0, 0])
    value = written_out(separable.x, separable.labels, lam=half.values, chance=half.weights)
    assert value(60 * at_half.direction)[0] == pytest.approx(at_half.infimum, abs=1e-12)
    # No direction of one margin for all: the minimiser is finite, and the general optimiser finds it.
    found = minimise(margins_differ, Objective(mixing=half))
    value = written_out(margins_differ.x, margins_differ.labels, lam=half.values, chance=half.weights)
    assert isinstance(found, Minimiser) and np.allclose(found.weights, general(value, 3), atol=1e-5)
    # Mixup with λ in {0, 1} is ERM.
    ends = minimise(separable, Objective(mixing=DiscreteLaw((0.0, 1.0), (0.5, 0.5))))
    assert isinstance(ends, AtInfinity) and np.allclose(ends.direction, minimise(separable, Objective()).direction)
    # Unequal class frequencies enter the infimum as P(Y1 ≠ Y2).
    uneven = Sample(*two_feature_sample(rng, positives=6))
    assert minimise(uneven, Objective(mixing=DiscreteLaw())).infimum == pytest.approx(2 * 0.25 * 0.75 * np.log(2))


def test_prop_symmetric_weights():
    """All permutations of a block applied to a sample make its law symmetric; the unreduced minimiser then is."""
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=(12, 3)) + 0.7 * np.where(np.arange(12) % 2, 1.0, -1.0)[:, None], np.arange(12) % 2
    orders = [(0, 1, 2), (0, 2, 1)]
    whole, repeated = np.concatenate([x[:, order] for order in orders]), np.tile(labels, 2)
    for arguments in ({"smoothing": 0.2}, {"weight_decay": 0.1}, {"lam": (0.2, 0.7), "chance": (0.5, 0.5)}):
        w = general(written_out(whole, repeated, **arguments), 3)
        assert abs(w[1] - w[2]) < 1e-6 and abs(w[0] - w[1]) > 1e-3
        lonely = general(written_out(x, labels, **arguments), 3)
        assert abs(lonely[1] - lonely[2]) > 1e-3  # without the symmetry of the law there is none of the weights


def log_loss(points, mass, w):
    """log E log(1 + e^{-s}), where the loss itself may be too small for a float."""
    s = points @ w
    far = s > 30  # log(1 + e^{-s}) is e^{-s} there, to twelve digits
    return logsumexp(np.where(far, -s, np.log(np.logaddexp(0, -np.where(far, 0, s)))), b=mass)


def crowded_box(start, width, panels=60):
    """Nodes of a uniform law on [start, start + width], crowded at both ends, where large weights put the loss."""
    nodes, chance = np.polynomial.legendre.leggauss(12)
    edges = np.geomspace(1e-7, 0.5, panels)
    edges = np.concatenate([[0], edges, (1 - edges[::-1])[1:], [1]])
    width_of = np.diff(edges)
    inside = edges[:-1, None] + width_of[:, None] * (nodes + 1) / 2
    return start + width * inside.ravel(), np.outer(width_of, chance / 2).ravel()


def test_thm_widest_margin():
    """The comparison of the proof on a law that is no finite sample: the box, whose corner has no mass."""
    high, mass = crowded_box(0.2, 10.0)
    points = np.column_stack([np.full_like(high, 0.1), high])
    widest, margin = np.array([0.1, 0.2]) / 0.05**0.5, 0.05**0.5  # the corner, {eq}`eq-max-margin` in closed form
    assert np.allclose(max_margin(BOXES), widest / margin)
    turns = np.linspace(0, 2 * np.pi, 181)
    others = np.stack([np.cos(turns), np.sin(turns)], 1)
    assert ((others @ points.T).min(1) <= margin + 1e-9).all()
    for a in (0.05, 0.3, 1.0):
        delta = a * margin / 2
        radius = np.log(2 / (delta / 10)) / delta  # a ball about the corner, on the edge: mass δ/10; others have more
        for r in (radius, 3 * radius):
            ahead = log_loss(points, mass, (1 + a) * r * widest)
            assert (ahead <= [log_loss(points, mass, r * v) for v in others]).all()
    # Without the factor 1 + a it fails: of all weights of one norm those along the widest margin are not the best,
    # and close to the origin it fails with the factor too.
    for decay in (1e-3, 1e-5):
        w = minimise(BOXES, Objective(weight_decay=decay)).weights
        assert log_loss(points, mass, w) < log_loss(points, mass, np.linalg.norm(w) * widest) - 1e-3
    assert log_loss(points, mass, np.array([0.0, 0.3])) < log_loss(points, mass, 0.3 * 1.05 * widest)


@pytest.mark.parametrize("start", [(0.0, 0.0), (30.0, -1.0), (-5.0, 2.0)])
def test_thm_widest_margin_from_any_start(start):
    """The flow in the box, in log time by scipy: the inequality that is integrated, and the direction it forces."""
    high, mass = crowded_box(0.2, 10.0, panels=30)
    points = np.column_stack([np.full_like(high, 0.1), high])
    widest = np.array([0.1, 0.2]) / 0.05**0.5

    def velocity(log_time, w):
        return np.exp(log_time) * (mass * expit(-points @ w)) @ points

    at = np.log(np.logspace(-3, 12, 31))
    run = solve_ivp(velocity, (at[0], at[-1]), start, method="LSODA", t_eval=at, rtol=1e-9, atol=1e-10)
    assert run.success
    norms, along = np.linalg.norm(run.y, axis=0), widest @ run.y
    a, delta = 1.0, 0.05**0.5 / 2
    late = norms > np.log(2 / (delta / 10)) / delta  # the norms for which the inequality is proved
    assert late.sum() > 6
    assert (np.diff(along[late]) >= np.diff(norms[late]) / (1 + a)).all()
    angle = np.arccos(along / norms)[-9:]  # over the last four decades of time
    # An angle to another limit would not fall like 1/‖w‖; a quarter covers the logarithm of ‖w‖ beside it.
    assert (np.diff(angle) < 0).all() and angle[-1] / angle[0] == pytest.approx(norms[-9] / norms[-1], rel=0.25)
    mean = points.T @ mass / np.linalg.norm(points.T @ mass)
    elsewhere = np.arccos(mean @ run.y / norms)[-9:]  # the direction of the mean, of large weight decay, is left
    assert elsewhere[-1] > 0.3 and (np.diff(np.abs(elsewhere - np.arccos(mean @ widest))) < 0).all()


def test_thm_widest_margin_by_gradient_descent():
    """Steps below 2/B arrive, from two starts and up to the bound; beyond it the loss can rise, against the proof."""
    x, labels = two_feature_sample(np.random.default_rng(3), n=12, a=(0.5,), start=0.6, num_high=1)
    u, value = (2.0 * labels - 1)[:, None] * x, written_out(x, labels)
    goal = max_margin(Sample(x, labels))
    goal /= np.linalg.norm(goal)
    bound = 2 / np.linalg.eigvalsh(x.T @ x / len(x) / 4)[-1]

    def descend(w, rate, steps, value=value):
        path = [w]
        for _ in range(steps):
            path.append(path[-1] - rate * value(path[-1])[1])
        return np.array(path)

    for rate in (0.2 * bound, 0.95 * bound):
        for begin in (np.zeros(2), np.array([3.0, -2.0])):
            path = descend(begin, rate, 20_000)
            assert (np.diff([value(w)[0] for w in path[::20]]) < 0).all() and (u @ path[-1] > 0).all()
            norms, along = np.linalg.norm(path, axis=1), path @ goal
            angle = np.arccos(along / norms.clip(1e-300))[[200, 2000, 20_000]]
            assert (np.diff(angle) < 0).all() and angle[-1] < 0.3
            # All that the norm gains in the last tenfold of steps it gains along the widest margin, to 5 %.
            assert along[-1] - along[2000] > 0.95 * (norms[-1] - norms[2000]) > 0.5
    opposed = np.array([[0.5, 3.0], [-0.5, 2.9]])  # separable by the first coordinate, at odds in the second
    value, bound = written_out(opposed, np.array([1, 0])), 2 / np.linalg.eigvalsh(opposed.T @ opposed / 2 / 4)[-1]
    for factor, rises in ((0.95, False), (8.0, True)):
        losses = [value(w)[0] for w in descend(np.array([0.0, 1.0]), factor * bound, 20, value)]
        assert (max(np.diff(losses)) > 0) == rises


def test_least_margin_of_mixup():
    """Exercise 2 on exact minimisers: no law of λ asks for less than 3.146, so that ε above .0825 is out of reach."""

    def zero(lam, chance):
        return brentq(mixup_low_slope, 0, 1000, args=(lam, chance), xtol=1e-12)

    fixed = {lam: zero((lam,), (1.0,)) for lam in np.linspace(0.505, 0.995, 491)}
    best = min(fixed, key=fixed.get)
    assert fixed[best] == pytest.approx(3.1459, abs=1e-4) and best == pytest.approx(0.79, abs=0.002)
    assert 2 * expit(-fixed[best]) == pytest.approx(0.0825, abs=5e-5)
    # Laws of several values, 0, ½ and 1 among them: none is below, to the resolution of the grid.
    rng = np.random.default_rng(0)
    for _ in range(300):
        lam = np.where(rng.random(4) < 0.2, rng.choice([0, 0.5, 1], 4), rng.uniform(0, 1, 4))
        lam[0] = rng.uniform(0.05, 0.95)
        chance = rng.dirichlet(np.ones(4))
        assert zero(lam, chance) > fixed[best] - 1e-6
    # ε = 0.1 asks for less than that; ε = 0.05 is met by one value of λ on either side, on the minimisers themselves.
    asked = smoothing_margin(0.05).value
    assert smoothing_margin(0.1).value < fixed[best] < asked
    x, labels = two_feature_sample(np.random.default_rng(8), n=10)
    for ends, there in (((0.55, best), 0.634), ((best, 0.99), 0.930)):
        lam = brentq(lambda v: zero((v,), (1.0,)) - asked, *ends)
        assert lam == pytest.approx(there, abs=5e-4)
        mixed = minimise(Sample(x, labels), Objective(mixing=DiscreteLaw((lam,), (1.0,)))).weights
        assert np.allclose(mixed, minimise(Sample(x, labels), Objective(smoothing=0.05)).weights, atol=1e-7)
        assert not np.allclose(mixed, minimise(Sample(x, labels), Objective(smoothing=0.1)).weights, atol=0.5)


# --- weight decay and the widest margin ----------------------------------------------------------------------------

boxes = st.tuples(st.floats(0.05, 1.0), st.floats(1.05, 3.0), st.floats(0.5, 8.0))


@given(boxes, st.floats(1.05, 3.0), st.floats(-6, 1))
def test_thm_weight_decay(box, other, log_decay):
    """Any two boxes that both start beyond γ have the key inequality; the share stays above one half."""
    gamma, start, width = box
    task = TwoFeatureTask(
        gamma=gamma,
        high=Box(start * gamma, start * gamma + width),
        high_negative=Box(other * gamma, other * gamma + 1.0),
        num_low=1,
        num_high=1,
    )
    w = minimise(task, Objective(weight_decay=10**log_decay)).weights
    assert w[1] > w[0] > 0
    # The exchange of the proof, made on the weights of another method: it must raise every margin and lower the loss.
    low_first = np.array([2.0, 0.5])
    losses = population_loss(task, Objective(weight_decay=10**log_decay), np.array([low_first, low_first[::-1]]))
    assert losses[1] < losses[0]


def test_thm_weight_decay_needs_no_bounded_support():
    """X_H = Y(ℓ + an exponential variable): a first moment and the key inequality, by scipy on Gauss–Laguerre nodes."""
    nodes, mass = np.polynomial.laguerre.laggauss(60)
    for start, above in ((0.15, True), (0.0, False)):  # γ = 0.1: the second has no key inequality
        u = np.column_stack([np.full(60, 0.1), start + 0.08 * nodes])
        for decay in (1e-1, 1e-3, 1e-5):

            def value(w, u=u, decay=decay):
                s = u @ w
                return mass @ np.logaddexp(0, -s) + decay / 2 * w @ w, decay * w - (mass * expit(-s)) @ u

            w = general(value, 2)
            assert np.linalg.norm(value(w)[1]) < 1e-6
            assert not above or w[1] > w[0]
        assert above or w[1] < w[0]


def test_thm_weight_decay_fails_without_the_key_inequality():
    """The printed hypotheses hold for the counterexample; the conclusion does not, by scipy's optimiser as well."""
    task = counterexample_task()
    assert task.departures() == ()
    nodes = np.linspace(0, 1, 401)
    x = np.column_stack([np.repeat([0.1, -0.1], 401), np.concatenate([-1 + 12 * nodes, -8 + 6 * nodes])])
    labels = np.repeat([1, 0], 401)
    for decay, above in ((1e-1, True), (1e-3, False), (1e-4, False)):
        w = general(written_out(x, labels, weight_decay=decay), 2)
        exact = minimise(task, Objective(weight_decay=decay)).weights
        assert np.allclose(w, exact, rtol=0.02)  # 401 points a class against the integral
        assert (share(exact, slice(1, 2)) > 0.5) == above == (share(w, slice(1, 2)) > 0.5)


def test_def_key_inequality():
    """Intervals: the widest margin through 0 is the nearer of the two starts, if they lie on the right sides."""
    labels = np.array([1, 1, 0, 0])
    for plus, minus in (((0.2, 10.2), (0.3, 4.0)), ((0.2, 10.2), (0.05, 4.0))):
        x = np.array([*plus, *(-np.array(minus))])[:, None]
        widest = 1 / np.linalg.norm(max_margin(Sample(x, labels)))
        assert widest == pytest.approx(min(plus[0], minus[0]))
        distance = plus[0] + minus[0]  # what the printed clause bounds: half of it is not the margin
        assert (distance / 2 > 0.1) and (widest > 0.1) == (min(plus[0], minus[0]) > 0.1)
    u = np.array([[-1.0], [11.0], [2.0], [8.0]])
    with pytest.raises(ValueError, match="no max-margin"):  # the counterexample's high feature does not separate alone
        max_margin(Sample(u * np.array([[1], [1], [-1], [-1]]), labels))


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_prop_mirror_images(seed):
    """S_1 the hull of random points, S_-1 = -S_1: the widest slab is the widest margin through 0."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(6, 2)) + 4 * np.array([np.cos(seed), np.sin(seed)])
    try:
        through_origin = 1 / np.linalg.norm(max_margin(Sample(np.r_[points, -points], np.repeat([1, 0], 6))))
    except ValueError:
        return  # the hull contains the origin: distance 0, nothing to compare

    def distance(weights):  # between the hulls, over convex combinations
        return np.linalg.norm((softmax(weights[:6]) + softmax(weights[6:])) @ points)

    found = min(minimize(distance, rng.normal(size=12), method="BFGS").fun for _ in range(3))
    assert found >= 2 * through_origin - 1e-9
    assert found == pytest.approx(2 * through_origin, rel=0.05)  # softmax weights only approach the hull's edge
    shifted = np.r_[points + 0.5, -points]  # not mirror images: the slab need not pass through the origin
    assert not np.allclose(shifted[:6], -shifted[6:])


@given(boxes)
def test_cor_max_margin(box):
    gamma, start, width = box
    task = TwoFeatureTask(
        gamma=gamma, high=Box(start * gamma, start * gamma + width), num_low=1, num_high=1, low_noise=0.0
    )
    w = max_margin(task)
    assert w[1] > w[0] > 0
    assert w[1] / w[0] == pytest.approx(start)  # closed form: only the corner (γ, ℓ) binds
    # With equality in the key inequality the norms are equal: the strict one is needed for the strict conclusion.
    w = max_margin(TwoFeatureTask(gamma=gamma, high=Box(gamma, gamma + width), num_low=1, num_high=1))
    assert w[1] == pytest.approx(w[0])


@pytest.mark.parametrize("seed", range(5))
def test_cor_max_margin_in_more_dimensions(seed):
    """Random samples, two coordinates a feature, by scipy's quadratic program; and all the way from the origin."""
    rng = np.random.default_rng(seed)
    low = rng.normal(size=2)
    low *= 0.4 / np.linalg.norm(low)
    labels = np.arange(20) % 2
    turn = rng.uniform(0, 2 * np.pi)
    v = np.array([np.cos(turn), np.sin(turn)])
    high = rng.uniform(0.41, 3, (20, 1)) * v + rng.normal(size=(20, 1)) * 3 * np.array([-v[1], v[0]])
    u = np.column_stack([np.tile(low, (20, 1)), high])  # ⟨v, u_H⟩ > |a|: the key inequality
    found = minimize(
        lambda w: w @ w,
        np.r_[low, 3 * v],
        jac=lambda w: 2 * w,
        constraints={"type": "ineq", "fun": lambda w: u @ w - 1, "jac": lambda w: u},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    ).x
    x = (2.0 * labels - 1)[:, None] * u
    assert np.allclose(found, max_margin(Sample(x, labels)), atol=1e-5)
    assert share(found, slice(2, 4)) > 0.5
    value = written_out(x, labels)
    shares = {}
    for name, begin in (("origin", np.zeros(4)), ("elsewhere", np.r_[5 * low, 0 * v])):
        w, path = begin, []
        for _ in range(300):
            w = w - 10 ** rng.uniform(-2, 1.5) * value(w)[1]  # any learning rates
            path.append(share(w, slice(2, 4)))
        shares[name] = np.array(path)
    assert shares["origin"].min() > 0.5 > shares["elsewhere"][0]
    # Without the key inequality the norms cross on the way: the same descent on the counterexample's corners.
    corners = np.array([[0.1, -1.0], [0.1, 11.0], [0.1, 2.0], [0.1, 8.0]])
    w, path = np.zeros(2), []
    for _ in range(20_000):
        w = w + 0.1 * (expit(-corners @ w) / 4) @ corners
        path.append(share(w, slice(1, 2)))
    assert path[0] > 0.99 and path[-1] < 0.5


def test_cor_max_margin_is_where_gradient_flow_goes():
    flow = gradient_flow(BOXES, Objective(), np.logspace(2, 14, 4))
    shares = [share(w, slice(1, 2)) for w in flow]
    assert (np.diff(shares) < 0).all() and 0.8 < shares[-1] < 0.87
    bad = gradient_flow(counterexample_task(), Objective(), np.logspace(1, 8, 3))
    assert share(bad[0], slice(1, 2)) > 0.9 and share(bad[-1], slice(1, 2)) < 1e-3
    assert share(max_margin(counterexample_task()), slice(1, 2)) < 1e-12


def test_prop_strong_decay():
    for task in (BOXES, counterexample_task()):
        mean = (task.mean(1) + task.mean(-1)).numpy() / 2
        for decay in (1e3, 1e5):
            scaled = decay * minimise(task, Objective(weight_decay=decay)).weights
            # σ(-s) - 1/2 = O(|s|) = O(E|X|²/λ): 50/λ covers both laws
            assert np.allclose(scaled, mean / 2, rtol=50 / decay)
        assert abs(mean[1]) > abs(mean[0])
    assert not np.allclose(minimise(BOXES, Objective(weight_decay=1.0)).weights, (BOXES.mean(1) / 2).numpy(), rtol=0.1)


@given(st.floats(0.3, 2), st.floats(0.01, 0.5), st.floats(0.55, 0.98), st.floats(-6, 1))
def test_prop_flipped(gamma, start, end, log_decay):
    inside = TwoFeatureTask(gamma=gamma, high=Box(start * gamma, end * gamma), num_low=1, num_high=1)
    w = minimise(inside, Objective(weight_decay=10**log_decay)).weights
    assert w[0] > w[1]
    # Only the margin turned around, not the whole support: strong decay still follows the mean of H.
    wide = TwoFeatureTask(gamma=gamma, high=Box(start * gamma, 20 * gamma), num_low=1, num_high=1)
    assert max_margin(wide)[0] > max_margin(wide)[1]
    w = minimise(wide, Objective(weight_decay=1e3)).weights
    assert w[1] > w[0]


# --- label smoothing -----------------------------------------------------------------------------------------------


@given(st.floats(0.02, 1.0), st.floats(0.2, 2), st.floats(-2, 1), st.floats(0.5, 4), st.booleans())
def test_thm_smoothing(smoothing, gamma, start, width, elliptical):
    """Separable or not, balanced means or not: no part on H, margin c*."""
    high = Elliptical((start,), ((width,),)) if elliptical else Box(start, start + width)
    task = TwoFeatureTask(gamma=gamma, high=high, high_negative=Box(0.5, 2.0), num_low=1, num_high=1)
    found = minimise(task, Objective(smoothing=smoothing))
    cstar = np.log((2 - smoothing) / smoothing)
    assert found.weights[0] * gamma == pytest.approx(cstar, abs=1e-8)
    assert abs(found.weights[1]) < 1e-8 * (1 + cstar / gamma)
    assert found.loss == pytest.approx(entr(smoothing / 2) + entr(1 - smoothing / 2), abs=1e-12)
    # Noise on L breaks the hypothesis and the conclusion (but at ε = 1, where w = 0 always).
    if 0.05 < smoothing < 0.9 and not elliptical:
        noisy = TwoFeatureTask(gamma=gamma, high=Box(1.0, 3.0), low_noise=0.8 * gamma, num_low=1, num_high=1)
        assert abs(minimise(noisy, Objective(smoothing=smoothing)).weights[1]) > 1e-4


@pytest.mark.parametrize(("n", "positives"), [(24, 12), (30, 5)])
def test_cor_smoothing_sample(n, positives):
    rng = np.random.default_rng(n)
    x, labels = two_feature_sample(rng, n=n, a=(0.5, -0.3), positives=positives)
    cstar = smoothing_margin(0.1).value
    w = general(written_out(x, labels, smoothing=0.1), 4)
    assert np.abs(w[2:]).max() < 1e-6 and w[:2] @ [0.5, -0.3] == pytest.approx(cstar, abs=1e-6)
    exact = minimise(Sample(x, labels), Objective(smoothing=0.1))
    assert np.abs(exact.weights[2:]).max() < 1e-10 and exact.null_space.shape == (4, 1)
    assert np.allclose(exact.weights[:2], cstar * np.array([0.5, -0.3]) / 0.34, atol=1e-9)
    # One example a class in three dimensions of H: no covariance within a class, and the conclusion does not hold.
    few, few_labels = two_feature_sample(rng, n=2, num_high=3)
    assert np.abs(minimise(Sample(few, few_labels), Objective(smoothing=0.1)).weights[1:]).max() > 1e-3


# --- Mixup ---------------------------------------------------------------------------------------------------------


def mixup_low_slope(c, lam, chance):
    """F' of eq-mixup-slope for a finite law of λ."""
    lam, chance = np.asarray(lam), np.asarray(chance)
    gap = 2 * lam - 1
    return -0.5 * expit(-c) + 0.5 * chance @ (gap * (expit(gap * c) - lam))


@given(st.floats(0.05, 0.45), st.floats(0.55, 1.0), st.floats(0.05, 0.9), st.integers(0, 1000))
def test_thm_mixup(first, second, chance, seed):
    """Any law of λ that mixes, on finite laws with all pairs: case 1 against the general optimiser and F' = 0."""
    lam, weights = (first, second), (chance, 1 - chance)
    x, labels = two_feature_sample(np.random.default_rng(seed), n=10, start=-0.5)
    found = minimise(Sample(x, labels), Objective(mixing=DiscreteLaw(lam, weights)))
    margin = brentq(mixup_low_slope, 0, 200, args=(lam, weights), xtol=1e-12)
    assert found.weights[0] == pytest.approx(margin, abs=1e-8) and np.abs(found.weights[1:]).max() < 1e-8
    if margin < 8:  # farther out the general optimiser is too slow to be an oracle
        w = general(written_out(x, labels, lam=lam, chance=weights), 3)
        assert np.allclose(w, found.weights, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_thm_mixup_with_beta_laws(alpha):
    found = minimise(BOXES, Objective(mixing=BetaLaw(alpha)))
    lam, chance = BetaLaw(alpha).rule(48)
    assert mixup_low_slope(0.0, lam, chance) < 0
    margin = brentq(mixup_low_slope, 0, 50, args=(lam, chance), xtol=1e-13)
    assert found.weights[0] * 0.1 == pytest.approx(margin, abs=1e-9) and abs(found.weights[1]) < 1e-9
    assert mixup_margin(BetaLaw(alpha)).value == pytest.approx(margin, abs=1e-10)
    # The midpoint convention for both orders of a pair matters: the target 1 - λ in place of λ has another zero.
    wrong = -0.5 * expit(-margin) + 0.5 * chance @ ((2 * lam - 1) * (expit((2 * lam - 1) * margin) - (1 - lam)))
    assert abs(wrong) > 1e-2


def test_thm_mixup_at_the_midpoint():
    """Case 2: the best weight on H tends to zero as the weight on L grows; case 3, ERM: it does not."""
    x, labels = two_feature_sample(np.random.default_rng(5), n=16, a=(0.1,), num_high=1)

    def best(low, lam, chance):
        value = written_out(x, labels, lam=lam, chance=chance)
        return minimize(lambda h: value(np.array([low, h[0]]))[0], [0.1], method="Nelder-Mead").x[0]

    path = [best(low, (0.5,), (1.0,)) for low in (1, 100, 1000)]
    assert path[0] > 0.1 > path[1] > 1e-4 > abs(path[2])
    mixture = [best(low, (0.0, 0.5, 1.0), (0.3, 0.4, 0.3)) for low in (1, 1000)]
    assert mixture[0] > 0.1 and abs(mixture[1]) < 1e-4
    value = written_out(x, labels, lam=(0.0, 0.5, 1.0), chance=(0.3, 0.4, 0.3))
    assert value(np.array([1000.0, 0.0]))[0] == pytest.approx(0.4 / 2 * np.log(2), abs=1e-10)
    assert value(np.array([1000.0, 0.5]))[0] > 0.4 / 2 * np.log(2) + 1e-3  # staying away from 0 on H costs for ever
    assert best(30, (0.0, 1.0), (0.5, 0.5)) > 1  # ERM pays for weight on H at every weight on L
    erm = minimise(Sample(x, labels), Objective(mixing=DiscreteLaw((0.0, 1.0), (0.5, 0.5))))
    assert abs(erm.direction[1]) > 0.5  # the law that the printed hypothesis admits


def test_thm_mixup_without_mixing():
    """Case 3 with H unbounded: any weight on H is met by weights on L, but only after it is fixed."""
    deviates = np.linspace(-12, 12, 4001)
    chance = np.exp(-(deviates**2) / 2) / np.exp(-(deviates**2) / 2).sum()

    def normal(t, h):  # U_L = 1, U_H ~ N(1, 4): Mixup with λ in {0, 1}, which is ERM
        return chance @ np.logaddexp(0, -(t + h * (1 + 2 * deviates)))

    for h in (-1.0, 3.0):
        assert (np.diff([normal(t, h) for t in (1, 10, 100)]) < 0).all() and normal(100, h) < 1e-12
    ends, half = ((0.0, 1.0), (0.3, 0.7)), ((0.0, 0.5, 1.0), (0.2, 0.5, 0.3))
    x, labels = two_feature_sample(np.random.default_rng(6), n=12, num_high=1)
    for t, h in ((60.0, -4.0), (60.0, 10.0)):
        w = np.array([t, h])
        assert written_out(x, labels, lam=ends[0], chance=ends[1])(w)[0] < 1e-6
        # With mass at ½ the same weights stay above the infimum by what the weight on H costs.
        assert written_out(x, labels, lam=half[0], chance=half[1])(w)[0] > 0.25 * np.log(2) + 0.05

    # A law of ξ = -U_H ≥ e with P(ξ > x) = ½ (log x)^(-3/2)/x: the mean is finite, E(ξ - b)⁺ = (log b)^(-1/2). Along
    # (t, log t) the loss is at least log t·E(ξ - t/log t)⁺ and tends to infinity; at any fixed weight it tends to 0.
    def heavy(t, h):
        """E g(ξ) = g(e) + ∫ g'(x) P(ξ > x) dx with g(x) = log(1 + e^{hx-t}) and x = e^y."""
        middle = np.log(t / h)
        end = middle + 5  # beyond it σ(hx - t) is 1 to double precision, and the integral of the tail is known
        body = quad(lambda y: expit(h * np.exp(y) - t) * 0.5 * y**-1.5, 1, end, points=[middle], limit=500)[0]
        return np.logaddexp(0, h * np.e - t) + h * (body + end**-0.5)

    times = np.array([1e2, 1e4, 1e8, 1e16])
    for h in (1.0, 5.0):
        fixed = [heavy(t, h) for t in times]
        assert np.allclose(fixed, h / np.sqrt(np.log(times / h)), rtol=0.02) and (np.diff(fixed) < 0).all()
    growing = [heavy(t, np.log(t)) for t in times]
    assert (np.diff(growing) > 0).all() and growing[-1] > 5
    light = [normal(t, np.log(t)) for t in (10.0, 100.0, 1000.0)]
    assert (np.diff(light) < 0).all() and light[-1] < 1e-12


def test_prop_unbalanced():
    rng = np.random.default_rng(7)
    noise = rng.uniform(-1, 1, (6, 1))
    noise -= noise.mean()

    def law(positive, ratio_low, ratio_high, share):
        x = np.r_[np.c_[np.full(6, ratio_low), noise + ratio_high * 1.5], -np.c_[np.ones(6), noise + 1.5]]
        return Sample(x, np.repeat([1, 0], 6), np.repeat([share / 6, (1 - share) / 6], 6))

    objectives = (Objective(smoothing=0.1), Objective(mixing=BetaLaw(1.0)))
    for pi in (0.3, 0.8):
        for r in (1.0, (1 - pi) / pi, 0.4):  # mirror means, mean zero, and any other common ratio
            for objective in objectives:
                assert abs(minimise(law(1, r, r, pi), objective).weights[1]) < 1e-8
        smooth, mixed = (minimise(law(1, 1.0, 0.4, pi), o).weights for o in objectives)
        assert abs(smooth[1]) < 1e-8 < 1e-3 < abs(mixed[1])  # X_L = ±a saves label smoothing alone
        assert min(abs(minimise(law(1, 0.5, 1.0, pi), o).weights[1]) for o in objectives) > 1e-3
    assert abs(minimise(law(1, 1.0, 0.4, 0.5), objectives[1]).weights[1]) < 1e-8  # balanced: thm-mixup


# --- a little variance, and norms ----------------------------------------------------------------------------------


@given(st.floats(0.01, 3), st.floats(0.1, 1), st.floats(-1, 1), st.floats(0.5, 5), st.booleans())
def test_thm_small_variance(ratio, gamma, start, width, smooth):
    task = TwoFeatureTask(gamma=gamma, high=Box(start, start + width), low_noise=ratio * gamma, num_low=1, num_high=1)
    objective = Objective(smoothing=0.2) if smooth else Objective(mixing=DiscreteLaw((0.2, 0.8), (0.5, 0.5)))
    margin = smoothing_margin(0.2).value if smooth else brentq(mixup_low_slope, 0, 50, args=((0.2, 0.8), (0.5, 0.5)))
    w = minimise(task, objective).weights
    largest = abs(w[0]) * gamma * (1 + ratio) + abs(w[1]) * max(abs(start), abs(start + width))
    slope = expit(largest) * expit(-largest)
    bound = margin**2 * (ratio * gamma) ** 2 / 3 / (4 * slope * gamma**2 * width**2 / 12)
    assert w[1] ** 2 <= bound
    # Without the curvature's factor the bound would be a claim about squared error, which fails somewhere: below.


@pytest.mark.parametrize("method", ["smoothing", "mixup"])
def test_cor_small_variance(method):
    """Bounded inputs: w tends to (c/μ_L, 0), M to c, the bound to 0. A far, rare point on H: M grows without end."""
    if method == "smoothing":
        objective, margin = Objective(smoothing=0.1), smoothing_margin(0.1).value
    else:
        lam, chance = (0.2, 0.8), (0.5, 0.5)
        objective, margin = (
            Objective(mixing=DiscreteLaw(lam, chance)),
            brentq(mixup_low_slope, 0, 50, args=(lam, chance)),
        )

    def minimiser(noise, far):
        """μ_L = 1, noise ±σ_L; U_H is 0 or 2, or ``far`` with chance far⁻³, so that its variance is above 1 always."""
        high, rare = np.array([0.0, 2.0, far]), far**-3.0
        mass = np.array([(1 - rare) / 2, (1 - rare) / 2, rare])
        u = np.array([[1 + sign * noise, h] for sign in (1, -1) for h in high])
        law = Sample(np.r_[u, -u], np.repeat([1, 0], 6), np.tile(mass, 4) / 4)
        w = minimise(law, objective).weights
        largest = np.abs(u @ w).max()
        variance = mass @ (high - mass @ high) ** 2
        slope = expit(largest) * expit(-largest)
        return w, largest, margin**2 * noise**2 / (4 * slope * variance)

    noises = np.array([0.3, 0.1, 0.03, 0.01])
    found = [minimiser(noise, 4.0) for noise in noises]
    bounds = np.array([bound for *_, bound in found])
    assert all(w[1] ** 2 <= bound for w, _, bound in found)
    assert np.allclose(found[-1][0], [margin, 0], atol=0.01) and found[-1][1] == pytest.approx(margin, rel=0.02)
    assert bounds[2] / bounds[3] == pytest.approx(9, rel=0.1)  # of order σ_L²: M has settled
    # The same laws with the far point at σ_L⁻³, beyond any common R: the weight vanishes as well, the bound does not.
    rare = [minimiser(noise, noise**-3.0) for noise in noises[:3]]
    assert (np.diff([abs(w[1]) for w, *_ in rare]) < 0).all()
    assert (np.diff([largest for _, largest, _ in rare]) > 0).all() and rare[-1][1] > 10 * margin
    assert rare[-1][2] > rare[0][2] and all(w[1] ** 2 <= bound for w, _, bound in rare)


def test_thm_small_variance_needs_its_factors():
    """A bound smaller by the square of its looseness at one point is violated there: it is not vacuous."""
    task = TwoFeatureTask(gamma=0.5, high=Box(0.5, 1.5), low_noise=1.5, num_low=1, num_high=1)
    w = minimise(task, Objective(smoothing=0.9)).weights
    margin = smoothing_margin(0.9).value
    # ε near 1: logits are small, σ' is 1/4 throughout, and the bound is c²σ_L²/(|μ|²σ_H²) up to a few per cent.
    near = margin**2 * 1.5**2 / 3 / (0.5**2 / 12)
    assert w[1] ** 2 <= near
    assert w[1] ** 2 > near / 1e4  # within two digits of the weight itself, and
    assert w[1] ** 2 > margin**2 * (0.1 * 1.5) ** 2 / 3 / (0.5**2 / 12) / 100  # not met with a tenth of the noise


@settings(max_examples=25)
@given(st.floats(0.2, 12))
def test_prop_norm_ball(radius):
    """ERM in a ball by scipy's constrained optimiser, and by the multiplier: the same weights, more on H."""
    nodes, chance = np.polynomial.legendre.leggauss(64)
    u = np.column_stack([np.full(64, 0.1), 0.2 + 5 * (nodes + 1)])

    def loss(w):
        z = u @ w
        return chance / 2 @ np.logaddexp(0, -z), -(chance / 2 * expit(-z)) @ u

    ball = {"type": "ineq", "fun": lambda w: radius**2 - w @ w, "jac": lambda w: -2 * w}
    held = minimize(loss, np.full(2, radius / 2), jac=True, constraints=ball, method="SLSQP", options={"ftol": 1e-14}).x
    assert np.linalg.norm(held) == pytest.approx(radius, rel=1e-4) and held[1] > held[0]

    def gap(log_decay):
        return np.linalg.norm(minimise(BOXES, Objective(weight_decay=np.exp(log_decay))).weights) - radius

    w = minimise(BOXES, Objective(weight_decay=np.exp(brentq(gap, np.log(1e-9), np.log(1e3))))).weights
    assert np.allclose(w, held, atol=0.02 * radius) and w[1] > w[0]
    cstar = 0.1 * radius  # label smoothing of the same norm: w = (c*/γ, 0)
    smoothing = 2 / (1 + np.exp(cstar))
    other = minimise(BOXES, Objective(smoothing=smoothing)).weights
    assert np.linalg.norm(other) == pytest.approx(radius, rel=1e-8) and abs(other[1]) < 1e-9
