"""Label noise of Mixup: couplings by linear programming, distances by loops, orders by halving, near misses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from labelaug.theory.noisy_labels import (
    curve_posterior,
    intrusion,
    maximal_coupling,
    mix_laws,
    mixed_distances,
    mixing_noise,
    neighbour_label,
    printed_bound,
    role_shares,
    second_order_noise,
    squared_distances,
    top_margin,
    total_variation,
)

ROUNDING = 1e-12  # sums of at most a dozen numbers below 1


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@st.composite
def laws(draw):
    """Two laws on the same classes, corners and near-ties included."""
    k = draw(st.integers(2, 8))
    entry = st.one_of(st.just(0.0), st.integers(1, 5).map(float), st.floats(1e-6, 1.0))
    rows = []
    for _ in range(2):
        row = np.array(draw(st.lists(entry, min_size=k, max_size=k).filter(any)))
        rows.append(row / row.sum())
    return rows


def least_disagreement(p, q) -> float:
    """min P(i ≠ j) over all joint laws with margins p and q, as a linear programme."""
    k = len(p)
    margins = np.concatenate([np.kron(np.eye(k), np.ones(k)), np.kron(np.ones(k), np.eye(k))])
    solved = linprog((1 - np.eye(k)).ravel(), A_eq=margins, b_eq=np.concatenate([p, q]))
    assert solved.status == 0, solved.message
    return solved.fun


@settings(max_examples=60, deadline=None)
@given(laws())
def test_thm_noisy_labels(pair):
    p, q = pair
    tv = float(total_variation(p, q))
    # The solver's feasibility tolerance is 1e-7.
    assert tv == pytest.approx(least_disagreement(p, q), abs=1e-6)
    events = [sum(p[list(e)]) - sum(q[list(e)]) for e in _subsets(len(p))]
    assert tv == pytest.approx(max(events), abs=ROUNDING)
    assert np.abs(p - q).max() <= tv + ROUNDING
    assert tv <= 1 - p @ q + ROUNDING
    joint = maximal_coupling(p, q)
    assert (joint >= 0).all()
    np.testing.assert_allclose(joint.sum(1), p, atol=ROUNDING)
    np.testing.assert_allclose(joint.sum(0), q, atol=ROUNDING)
    assert 1 - np.trace(joint) == pytest.approx(tv, abs=ROUNDING)
    one_sided = min((p - q > 1e-9).sum(), (q - p > 1e-9).sum()) <= 1
    assert one_sided == (np.abs(p - q).max() > tv - 1e-8)


def _subsets(k):
    return [[i for i in range(k) if code >> i & 1] for code in range(2**k)]


def test_thm_noisy_labels_by_sampling_and_near_misses(rng):
    """Independent labels differ with chance 1 - Σ p q; TV with a factor 2, or the sum of differences, is no bound."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    n = 40000
    differ = (rng.choice(3, n, p=p) != rng.choice(3, n, p=q)).mean()
    chance = 1 - p @ q
    assert abs(differ - chance) < 4.5 * math.sqrt(chance * (1 - chance) / n)
    joint = maximal_coupling(p, q)
    pairs = rng.choice(9, n, p=joint.ravel())
    apart = (pairs // 3 != pairs % 3).mean()
    assert abs(apart - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / n)
    assert apart < np.abs(p - q).sum() - 0.2


def test_prop_argmax_counterexample():
    """The first inequality of Theorem 5.1 fails, the second as printed; the corrected ones hold on the same numbers."""
    p, one, two = (0.9, 0.1), (1.0, 0.0), (0.2, 0.8)
    q = mix_laws(one, two, 0.5)
    np.testing.assert_allclose(q, (0.6, 0.4), atol=ROUNDING)
    left = float(np.argmax(p) != q.argmax())
    assert left == 0.0
    assert total_variation(p, q) == pytest.approx(0.3) and printed_bound(p, one, two, 0.5) == pytest.approx(0.15)
    assert left < printed_bound(p, one, two, 0.5) < total_variation(p, q)
    assert 1 - np.trace(maximal_coupling(p, q)) == pytest.approx(0.3)

    one, two = (1.0, 0.0), (0.0, 1.0)
    q = mix_laws(one, two, 0.9)
    assert total_variation(p, q) == pytest.approx(0.0, abs=ROUNDING)
    assert printed_bound(p, one, two, 0.9) == pytest.approx(0.4)
    assert np.abs(np.subtract(p, q)).max() == pytest.approx(0.0, abs=ROUNDING)  # λ on its own side
    # With λ and 1-λ in the places that define q the second inequality holds, on any numbers.
    generator = np.random.default_rng(0)
    for p, one, two in generator.dirichlet(np.ones(3), (2000, 3)):
        lam = generator.random()
        assert printed_bound(p, two, one, lam) <= total_variation(p, mix_laws(one, two, lam)) + ROUNDING


@settings(max_examples=300, deadline=None)
@given(laws())
def test_prop_argmax_margin(pair):
    p, q = pair
    if p.argmax() != q.argmax() and top_margin(p) > 1e-9 and top_margin(q) > 1e-9:
        assert total_variation(p, q) >= (top_margin(p) + top_margin(q)) / 2 - ROUNDING
    if total_variation(p, q) > 1 - 1 / len(p) + ROUNDING:
        assert p.argmax() != q.argmax()


def test_prop_argmax_margin_is_sharp(rng):
    p = np.array([0.6, 0.4])
    assert total_variation(p, p[::-1]) == pytest.approx(top_margin(p))  # equality, labels differ
    near = np.array([0.5 - 1e-9, 0.5 + 1e-9])
    assert near.argmax() != p.argmax()
    assert total_variation(p, near) == pytest.approx(top_margin(p) / 2, abs=1e-8)
    # With factor 1 in place of ½ the claim is false, and by far not only at the edge.
    p, q = (rng.dirichlet(np.ones(4), 5000) for _ in range(2))
    differ = p.argmax(1) != q.argmax(1)
    assert (differ & (total_variation(p, q) < top_margin(p) + top_margin(q))).any()
    assert not (differ & (total_variation(p, q) < (top_margin(p) + top_margin(q)) / 2)).any()


@pytest.mark.parametrize("k", [2, 3, 10, 200])
def test_prop_argmax_margin_ends_at_one_less_the_kth_part(k, rng):
    """TV alone forces the tops apart above 1 - 1/K, and only there."""
    for t in (0.3, 1 - 1 / k - 1e-6):
        q = np.r_[1 - t, np.full(k - 1, t / (k - 1))]
        assert top_margin(q) > 0 and q.argmax() == 0 and total_variation(np.eye(k)[0], q) == pytest.approx(t)
    # Far apart at random: sparse laws, of which a good part lies above the threshold, all with different tops.
    p, q = (rng.dirichlet(np.full(k, 1 / k), 20_000) for _ in range(2))
    far = total_variation(p, q) > 1 - 1 / k
    same = p.argmax(1) == q.argmax(1)
    assert far.sum() > 100 and not same[far].any()
    if k < 10:  # "while TV < 1" would ask for equal tops there too; just below the threshold they occur
        assert same[total_variation(p, q) > 0.8 * (1 - 1 / k)].any()


def test_prop_noise_free(rng):
    """An affine map into the simplex on a triangle makes no noise; a bent one does; λ = ½ decides for continuous f."""
    corners = rng.dirichlet(np.ones(4), 3)

    def affine(x):  # barycentric coordinates on the triangle (0,0), (1,0), (0,1)
        return np.stack([1 - x.sum(-1), x[..., 0], x[..., 1]], -1) @ corners

    def bent(x):
        weight = affine(x) ** 2
        return weight / weight.sum(-1, keepdims=True)

    one, two = (rng.dirichlet(np.ones(3), 500)[:, :2] for _ in range(2))
    for lam in (0.1, 0.5, 0.8):
        mixed = lam * one + (1 - lam) * two
        assert total_variation(affine(mixed), mix_laws(affine(one), affine(two), lam)).max() < ROUNDING
        assert total_variation(bent(mixed), mix_laws(bent(one), bent(two), lam)).max() > 1e-3
    # Item 3: the affine map leaves the simplex on every line along which it is not constant.
    far = 1e3 * rng.normal(size=(50, 2))
    assert (affine(far).min(-1) < 0).all()
    # Item 2: the weights that can be reached from 0 and 1 by mixing with λ = 0.3 are dense.
    reached = {0.0, 1.0}
    for _ in range(4):
        reached |= {0.3 * s + 0.7 * t for s in reached for t in reached}
    assert np.diff(sorted(reached)).max() < 0.02


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_prop_certain_labels(lam):
    one = np.eye(4)
    for a in range(3):
        for b in range(3):
            for c in range(3):
                q = mix_laws(one[a], one[b], lam)
                expected = 1.0 if c not in (a, b) else 0.0 if a == b else 1 - lam if c == a else lam
                assert total_variation(one[c], q) == pytest.approx(expected, abs=ROUNDING)
                independent = 1 - one[c] @ q
                assert independent == pytest.approx(expected, abs=ROUNDING)  # a certain label has one coupling
                if a != b and c in (a, b) and lam != 0.5:
                    assert (q.argmax() != c) == ((lam if c == a else 1 - lam) < 0.5)


def test_lem_mixed_distance(rng):
    a, b, r = rng.normal(size=(3, 6, 5))
    for lam in (0.0, 0.3, 0.5, 1.0):
        square = [[((lam * a[i] + (1 - lam) * b[i] - r[j]) ** 2).sum() for j in range(6)] for i in range(6)]
        to_a, to_b = (((t[:, None] - r) ** 2).sum(-1) for t in (a, b))
        found = mixed_distances(to_a, to_b, ((a - b) ** 2).sum(1), lam)
        np.testing.assert_allclose(found, square, atol=1e-12)
    assert np.abs(0.3 * to_a + 0.7 * to_b - square).max() > 0.1  # without the last term


def test_prop_intrusion_ball(rng):
    a, b, r = rng.normal(size=(3, 3000, 3))
    to_a, to_b, between = ((t**2).sum(1) for t in (a - r, b - r, a - b))
    for lam in (0.2, 0.5, 0.7):
        mixed = lam * a + (1 - lam) * b
        nearer = ((mixed - r) ** 2).sum(1) <= np.minimum(((mixed - a) ** 2).sum(1), ((mixed - b) ** 2).sum(1))
        claimed = lam * to_a + (1 - lam) * to_b <= min(lam, 1 - lam) * between
        assert (nearer == claimed).all() and 10 < nearer.sum() < 2990
        if lam == 0.5:
            assert (nearer == (((a - r) * (b - r)).sum(1) <= 0)).all()  # the angle at r
    assert (nearer != (to_a + to_b <= between)).any()  # λ = 0.7 is not λ = ½


def strongly_convex(rho, rng):
    tilt = rng.normal(size=4)
    return lambda x: rho / 2 * (x**2).sum(-1) + np.logaddexp(x @ tilt, 0.0) + np.abs(x).sum(-1)  # not smooth


def test_prop_mixing_noise(rng):
    rho, f = 0.8, strongly_convex(0.8, rng)
    one, two = rng.normal(size=(2, 4000, 4))
    for lam in (0.0, 0.1, 0.5, 1.0):
        bound = rho / 2 * lam * (1 - lam) * ((one - two) ** 2).sum(-1)
        assert (mixing_noise(f, one, two, lam) >= bound - ROUNDING * 10).all()
        square = mixing_noise(lambda x: rho / 2 * (x**2).sum(-1) + x @ np.arange(4) - 3, one, two, lam)
        np.testing.assert_allclose(square, bound, atol=1e-11)
        if 0 < lam < 1:
            assert not (square >= 1.01 * bound).any()


def smooth(x):
    return np.sin(x[..., 0] + 2 * x[..., 1]) + x[..., 0] * np.exp(0.5 * x[..., 1])


def smooth_hessian(x):
    s, e = -np.sin(x[..., 0] + 2 * x[..., 1]), np.exp(0.5 * x[..., 1])
    cross = 2 * s + 0.5 * e
    return np.stack([np.stack([s, cross], -1), np.stack([cross, 4 * s + 0.25 * x[..., 0] * e], -1)], -2)


def order_of(lam, centroid, rng):
    centre, apart = rng.normal(size=(2, 100, 2))
    errors = []
    for scale in (0.1, 0.05):
        pair = centre + scale * apart / 2, centre - scale * apart / 2
        error = mixing_noise(smooth, *pair, lam) - second_order_noise(smooth_hessian, *pair, lam, centroid=centroid)
        errors.append(np.sqrt((error**2).mean()))
    return math.log2(errors[0] / errors[1])


def test_prop_mixing_noise_orders(rng):
    """Error of second order by halving the distance: 3 at the mixed point, 4 at λ = ½ and at the centroid."""
    # The next order is smaller by the scale 0.1 and its square: slopes within 0.3 and 0.1.
    assert order_of(0.2, False, rng) == pytest.approx(3, abs=0.3)
    assert order_of(0.5, False, rng) == pytest.approx(4, abs=0.1)
    assert order_of(0.2, True, rng) == pytest.approx(4, abs=0.3)
    assert order_of(0.9, True, rng) == pytest.approx(4, abs=0.3)


def test_prop_mixing_noise_has_a_mean_value_on_the_segment(rng):
    for _ in range(50):
        one, two = rng.normal(size=(2, 2))
        lam = rng.uniform(0.1, 0.9)
        t = np.linspace(0, 1, 2001)[:, None]
        curvature = np.einsum("i,tij,j->t", one - two, smooth_hessian(two + t * (one - two)), one - two)
        needed = mixing_noise(smooth, one, two, lam) / (0.5 * lam * (1 - lam))
        assert curvature.min() - 1e-3 <= needed <= curvature.max() + 1e-3  # grid of the segment


def test_prop_noise_bias(rng):
    d, rho, n = 6, 1.3, 60000
    one, two = rng.normal(size=(2, n, d))

    def f(x):
        return rho / 2 * (x**2).sum(-1)

    z = mixing_noise(f, one, two, 0.5)
    error = 4.5 * z.std() / math.sqrt(n)
    assert abs(z.mean() - rho * d / 4) < error and z.mean() > error  # not zero-mean
    assert z.mean() ** 2 / (z**2).mean() == pytest.approx(d / (d + 2), abs=0.01)  # 4.5 errors: 0.006
    # E[Z | mixed point] is the same everywhere: no trend along the mixed point's norm.
    size = (((one + two) / 2) ** 2).sum(1)
    assert abs(np.corrcoef(size, z)[0, 1]) < 4.5 / math.sqrt(n)
    assert mixing_noise(f, one, two, 0.5).tobytes() == z.tobytes()  # a function of the pair
    lam = 0.3
    f_mixed = f(lam * one + (1 - lam) * two)
    third = mixing_noise(f, one, two, lam)
    assert third.mean() == pytest.approx((lam * f(one) + (1 - lam) * f(two) - f_mixed).mean())
    assert abs(third.mean() - rho * lam * (1 - lam) * d) < 4.5 * third.std() / math.sqrt(n)


def test_curve_posterior(rng):
    centres = rng.normal(size=(3, 4, 2))
    x = rng.normal(size=(5, 2))
    for point, found in zip(x, curve_posterior(x, centres, 0.7), strict=True):
        density = [sum(math.exp(-((point - c) @ (point - c)) / (2 * 0.49)) for c in curve) for curve in centres]
        np.testing.assert_allclose(found, np.array(density) / sum(density), rtol=1e-10)
    assert np.isfinite(curve_posterior(np.full((1, 2), 1e4), centres, 0.01)).all()  # far away: no 0/0
    with pytest.raises(ValueError, match="noise must be positive, got 0"):
        curve_posterior(x, centres, 0)


def test_squared_distances_in_float32(rng):
    x, reference = rng.random((20, 300)), rng.random((30, 300))
    exact = np.array([[((a - b) ** 2).sum() for b in reference] for a in x])
    found = squared_distances(x, reference)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5)  # terms of 25 and a distance of 50: some 1e-7 each
    shifted = squared_distances(x + 100, reference + 100)
    np.testing.assert_allclose(shifted, exact, rtol=1e-3)  # inputs round at 8e-6; centring keeps the rest
    assert squared_distances(reference, reference).min() >= 0


def test_neighbour_label_votes_and_breaks_ties_by_the_nearest():
    labels = np.array([2, 0, 0, 1, 1])
    square = np.array([[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]])
    assert neighbour_label(square, labels, neighbours=1).tolist() == [2, 1]
    assert neighbour_label(square, labels, neighbours=3).tolist() == [0, 1]
    assert neighbour_label(square, labels, neighbours=2).tolist() == [2, 1]  # one vote each: the nearest
    assert neighbour_label(square, labels, neighbours=5).tolist() == [0, 1]  # two each: the nearer pair
    square[0, 1] = np.inf
    assert neighbour_label(square, labels, neighbours=4).tolist() == [1, 1]
    with pytest.raises(ValueError, match="2 of 10 are NaN"):  # else the first of them would pass for the nearest
        neighbour_label(np.where(square == square[1, 1], np.nan, square), labels, neighbours=1)
    with pytest.raises(ValueError, match=r"neighbours must lie in 1\.\.4, the points that count, got 5"):
        neighbour_label(square, labels, neighbours=5)
    with pytest.raises(ValueError, match="got 0"):
        neighbour_label(square, labels, neighbours=0)


def test_role_shares():
    found, major, minor = np.array([0, 1, 2, 0]), np.array([0, 0, 0, 0]), np.array([1, 1, 1, 0])
    assert role_shares(found, major, minor) == {"major": 0.5, "minor": 0.25, "third": 0.25}


def test_intrusion_finds_the_planted_third_class(rng):
    """Class 2 sits on the midpoint of the others; parents kept or left out is the difference at λ = 1."""
    centre = np.array([[-1.0, 0], [1.0, 0], [0.0, 0]])
    labels = np.arange(60) % 3
    x = centre[labels] + 0.05 * rng.normal(size=(60, 2))
    first, second = np.flatnonzero(labels == 0)[:10], np.flatnonzero(labels == 1)[:10]
    rows = intrusion(x, labels, first, second, lams=(0.5, 1.0), neighbours=(1, 3))
    found = {row[:4]: row[4] for row in rows}
    assert found[0.5, 1, "left out", "third"] == found[0.5, 3, "kept", "third"] == 1.0
    assert found[1.0, 1, "left out", "major"] == found[1.0, 1, "kept", "major"] == 1.0
    # Independent oracle: mix, measure, mask, one pair at a time; classes that overlap.
    x = rng.normal(size=(60, 2))
    rows = intrusion(x, labels, first, second, lams=(0.7,), neighbours=(1,))
    for parents in ("kept", "left out"):
        thirds = 0
        for i, j in zip(first, second, strict=True):
            distance = np.linalg.norm(0.7 * x[i] + 0.3 * x[j] - x, axis=1)
            if parents == "left out":
                distance[[i, j]] = np.inf
            thirds += labels[distance.argmin()] == 2
        assert {row[:4]: row[4] for row in rows}[0.7, 1, parents, "third"] == pytest.approx(thirds / 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: total_variation([0.5, 0.6], [0.5, 0.5]), "sum 1"),
        (lambda: total_variation([1.5, -0.5], [0.5, 0.5]), "at least 0"),
        (lambda: total_variation([1.0], [0.5, 0.5]), "same classes"),
        (lambda: mix_laws([1.0, 0.0], [0.0, 1.0], 1.1), r"lam must lie in \[0, 1\], got 1.1"),
        (lambda: mixing_noise(smooth, np.zeros(2), np.ones(2), -0.1), "got -0.1"),
        (lambda: second_order_noise(smooth_hessian, np.zeros(2), np.ones(2), 2, centroid=True), "got 2"),
        (lambda: mixed_distances(np.ones((1, 1)), np.ones((1, 1)), np.ones(1), 2.0), "got 2.0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
