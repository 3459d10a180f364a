"""The statements of the section on related work, and the functions behind them."""

import math

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.integrate import quad
from scipy.special import expit

from labelaug.data.synthetic import Elliptical, EllipticalTask
from labelaug.theory import population
from labelaug.theory.population import (
    AtInfinity,
    BetaLaw,
    DiscreteLaw,
    Objective,
    Sample,
    folded_rule,
    max_margin,
    minimise,
)
from labelaug.theory.sample_complexity import direction_spread, draw_classes, needed_examples, squared_tangent

UNIFORM = Objective(mixing=BetaLaw(1.0))
SKEWED = Objective(mixing=DiscreteLaw((0.2, 0.9), (0.3, 0.7)))  # λ and 1 - λ not alike
OBJECTIVES = {
    "erm": Objective(),
    "smoothing": Objective(smoothing=0.1),
    "decay": Objective(weight_decay=0.3),
    "mixup": UNIFORM,
    "skewed": SKEWED,
    "both": Objective(smoothing=0.2, mixing=DiscreteLaw((0.3, 0.7), (0.5, 0.5)), weight_decay=0.05),
}


def direction(sample: Sample, objective: Objective) -> np.ndarray:
    """Weights of the minimiser; where there is none, those of a least margin of 1 along the way to infinity."""
    found = minimise(sample, objective)
    if not isinstance(found, AtInfinity):
        return found.weights
    return found.direction / (sample.turned @ found.direction).min()


def cstar(smoothing: float) -> float:
    return math.log((2 - smoothing) / smoothing)


def laws(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of λ by a rule of our own: 40 Gauss–Legendre nodes for the uniform law, the atoms else, 1 for no mixing."""
    if objective.mixing is None:
        return np.ones(1), np.ones(1)
    if isinstance(objective.mixing, BetaLaw):
        nodes, weights = np.polynomial.legendre.leggauss(40)
        return (nodes + 1) / 2, weights / 2
    return np.array(objective.mixing.values), np.array(objective.mixing.weights)


def pair_moments(c: float, kappa: float, objective: Objective) -> dict[str, float]:
    """Stationarity, curvature across, E[ρ²] and E[r²] at c·e₁ by Gauss–Hermite, straight from the definitions."""
    nodes, mass = np.polynomial.hermite_e.hermegauss(140)
    mass = mass / mass.sum()
    lam, chance = laws(objective)
    slope, curvature, square, carried = 0.0, objective.weight_decay, 0.0, {1: 0.0, -1: 0.0}
    for y in (1, -1):
        for other in (1, -1):
            x, partner = (y + nodes / kappa**0.5)[:, None], (other + nodes / kappa**0.5)[None, :]
            for a, p in zip(lam, chance, strict=True):
                for share, role in ((a, "anchor"), (1 - a, "partner")):
                    mixed, side = share * x + (1 - share) * partner, share * y + (1 - share) * other
                    target = 0.5 + 0.5 * (1 - objective.smoothing) * side
                    residual = expit(c * mixed) - target
                    carried[y] = carried[y] + 0.5 * p * share * (residual @ mass)
                    if role == "anchor":
                        joint = 0.25 * p * np.outer(mass, mass)
                        slope += (joint * residual * mixed).sum()
                        bend = expit(c * mixed) * expit(-c * mixed)
                        curvature += (joint * bend).sum() * (share**2 + (1 - share) ** 2) / kappa
                        square += (joint * residual**2).sum()
    second = sum(0.5 * mass @ carried[y] ** 2 for y in (1, -1))
    return {"slope": slope + objective.weight_decay * c, "curvature": curvature, "rho2": second, "r2": square}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kappa", [0.7, 4.0])
def test_thm_direction_variance(name, kappa):
    objective = OBJECTIVES[name]
    spread = direction_spread(kappa, objective)
    moments = pair_moments(spread.margin, kappa, objective)
    assert abs(moments["slope"]) < 1e-7  # 140 Gauss–Hermite nodes; the poles of σ are 1.6 deviations away or further
    sandwich = moments["rho2"] / kappa / (spread.margin * moments["curvature"]) ** 2
    assert spread.constant == pytest.approx(sandwich, rel=1e-5)  # the same rule: the Hessian never enters our formula
    # Without a penalty no loss is below the normal discriminant; with one it can be, as the strong one here.
    assert spread.constant > 1 / kappa + (objective.weight_decay == 0)
    assert direction_spread(kappa, Objective(weight_decay=3.0)).constant < 1 + 1 / kappa
    if objective.mixing is not None:  # pairs are not independent: with E[r²], as if they were, the constant is wrong
        assert abs(moments["r2"] / moments["rho2"] - 1) > 0.2


@pytest.mark.parametrize(("name", "n", "dim", "repeats"), [
    ("erm", 1500, 21, 40), ("smoothing", 1500, 21, 40), ("decay", 1500, 21, 40), ("mixup", 200, 13, 16),
])  # fmt: skip
def test_thm_direction_variance_on_samples(name, n, dim, repeats):
    """n·tan²/(d-1) has mean A and relative deviation √(2/(d-1)) a sample; 4.5 of them over the repeats: one false alarm
    in 10⁵. The limit leaves out a relative (d+1)/n, allowed twice."""
    kappa = 4.0
    drawn = [draw_classes(n, dim, kappa, rng=np.random.default_rng([7, r])) for r in range(repeats)]
    few = DiscreteLaw(*(tuple(part.tolist()) for part in BetaLaw(1.0).rule(8)))  # of λ, for the time it takes
    objective = Objective(mixing=few) if name == "mixup" else OBJECTIVES[name]
    seen = np.mean([squared_tangent(direction(sample, objective)) for sample in drawn]) * n / (dim - 1)
    allowed = 4.5 * math.sqrt(2 / (dim - 1) / repeats) + 2 * (dim + 1) / n
    assert abs(seen / direction_spread(kappa, OBJECTIVES[name]).constant - 1) < allowed
    wrong = "smoothing" if name == "erm" else "erm"  # the constant of another loss must not fit
    assert abs(seen / direction_spread(kappa, OBJECTIVES[wrong]).constant - 1) > allowed


@pytest.mark.parametrize("name", ["erm", "smoothing", "mixup"])
def test_thm_direction_variance_minimiser_is_fishers(name):
    cov = np.array([[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]])
    mu = np.array([0.4, -0.2, 0.3])
    kappa = mu @ np.linalg.solve(cov, mu)  # Σ/κ = cov, and μᵀΣ⁻¹μ = 1
    found = minimise(EllipticalTask(Elliptical(tuple(mu), tuple(map(tuple, cov)))), OBJECTIVES[name]).weights
    fisher = np.linalg.solve(cov, mu) / kappa
    # 1e-7: the other quadrature's own stability, and the brackets of ours.
    assert np.allclose(found, direction_spread(kappa, OBJECTIVES[name], order=32).margin * fisher, atol=1e-7)
    decayed = minimise(EllipticalTask(Elliptical(tuple(mu), tuple(map(tuple, cov)))), OBJECTIVES["decay"]).weights
    assert decayed @ fisher / np.linalg.norm(decayed) / np.linalg.norm(fisher) < 0.99  # Σ not a multiple of I


def test_cor_separability():
    for kappa in (0.5, 2.0, 8.0, 30.0):
        spread = direction_spread(kappa, Objective())
        assert spread.margin == pytest.approx(2 * kappa, rel=1e-7)

        def tilted(s, kappa=kappa):  # σ'(s) under N(2κ, 4κ), the factor e^{-κ/2} left out
            return math.exp(-(s**2) / (8 * kappa)) / (4 * math.cosh(s / 2)) / math.sqrt(8 * math.pi * kappa)

        slope = 2 * quad(tilted, 0, 200)[0]
        assert spread.constant == pytest.approx(math.exp(kappa / 2) / (4 * kappa * slope), rel=1e-6)
        assert spread.constant >= math.sqrt(2 / math.pi / kappa) * math.exp(kappa / 2)
    far = direction_spread(200.0, Objective()).constant
    # Relative corrections are of order 1/κ: π²/8κ in the integral, 1/κ in Mills' ratio.
    assert far / (math.sqrt(2 / math.pi / 200) * math.exp(100)) == pytest.approx(1, abs=0.01)
    assert far * math.pi * 200 * stats.norm.sf(math.sqrt(200)) == pytest.approx(1, abs=0.02)
    for objective in (Objective(smoothing=0.1), Objective(smoothing=0.9), UNIFORM, Objective(mixing=BetaLaw(0.3))):
        near = [direction_spread(kappa, objective).constant - 1 for kappa in (1e2, 1e4)]
        assert abs(near[1]) < 1e-3 and 50 < near[0] / near[1] < 200, near  # of order 1/κ
    # λ in {0, 1} is ERM: the hypothesis on the law of λ is needed.
    ends = Objective(mixing=DiscreteLaw((0.0, 1.0), (0.5, 0.5)))
    assert direction_spread(20.0, ends).constant == pytest.approx(
        direction_spread(20.0, Objective()).constant, rel=1e-4
    )


def test_cor_separability_agrees_with_efron():
    """The normal discriminant has A = 1 + 1/κ: squared error to equal margins, whose A is the same quotient."""
    for kappa in (1.0, 4.0):
        g = np.random.default_rng(0).standard_normal((60, 1000, 5)) / math.sqrt(kappa)
        g[:, :, 0] += 1
        fits = [np.linalg.lstsq(u, np.ones(len(u)), rcond=None)[0] for u in g]
        seen = np.mean([1000 * squared_tangent(w) / 4 for w in fits])
        assert seen == pytest.approx(1 + 1 / kappa, rel=4.5 * math.sqrt(2 / 4 / 60))  # one false alarm in 10⁵


def quotient(slope, kappa: float) -> tuple[float, float]:
    """A of a loss with this slope, and A by item 1 of prop-curved-margin: trapezoidal rule, kinks allowed for."""
    g = np.linspace(-12, 12, 400_001)
    weight = np.exp(-0.5 * g**2)
    weight /= weight.sum()

    def stationarity(c):
        return weight @ (slope(c * (1 + g / kappa**0.5)) * (1 + g / kappa**0.5))

    c = optimize.brentq(stationarity, 1e-3, 50, xtol=1e-13)
    d = slope(c * (1 + g / kappa**0.5))
    return weight @ d**2 / kappa / (weight @ d) ** 2, weight @ d**2 / (weight @ (d * g)) ** 2


def test_prop_curved_margin():
    bent = {
        "smoothing": lambda s: 0.15 - expit(-s),
        "huber": lambda s: np.clip(s - 2, -0.5, 0.5),
        "uneven": lambda s: np.tanh(s - 2) + 0.3 * np.tanh(s - 2) ** 2,  # of different slopes on either side
    }
    for name, slope in bent.items():
        values = [quotient(slope, kappa) for kappa in (1.0, 1e1, 1e2, 1e4)]
        for kappa, (direct, other) in zip((1.0, 1e1, 1e2, 1e4), values, strict=True):
            assert direct == pytest.approx(other, rel=1e-4) and direct > (1 + 1 / kappa) * (1 - 1e-9), name
        assert values[-1][0] == pytest.approx(1, abs=2e-3), name
    assert quotient(bent["smoothing"], 4.0)[0] == pytest.approx(
        direction_spread(4.0, Objective(smoothing=0.3)).constant
    )
    # Squared error to equal margins attains the bound: the normal discriminant.
    for kappa in (1.0, 5.0, 40.0):
        assert quotient(lambda s: s - 1, kappa)[0] == pytest.approx(1 + 1 / kappa, rel=1e-8)
    # The limits without a bend: a kink, a flatter bottom (finite, not 1).
    # 5e-3: the kink lies between two nodes, and A divides by a mean of order κ^(-1/2).
    assert quotient(lambda s: np.sign(s - 2), 1e4)[1] == pytest.approx(math.pi / 2, rel=5e-3)
    assert quotient(lambda s: np.clip((s - 2) ** 3, -1, 1), 1e4)[0] == pytest.approx(5 / 3, rel=5e-3)


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (1.0, 4.0)])
def test_prop_curved_margin_flat_between_two_margins(low, high):
    """Item 3: c and A of a loss with slopes -1 below, 0 between and 1 above, by hand from the normal tails."""

    def by_hand(kappa):
        root = math.sqrt(kappa)

        def slope_in_c(c):
            below, above = root * (1 - low / c), root * (high / c - 1)
            tails = stats.norm.sf(above) - stats.norm.sf(below)
            return tails + (stats.norm.pdf(below) + stats.norm.pdf(above)) / root

        c = optimize.brentq(slope_in_c, low, high, xtol=1e-15)
        ends = np.array([root * (1 - low / c), root * (high / c - 1)])
        return c, stats.norm.sf(ends).sum() / stats.norm.pdf(ends).sum() ** 2

    for kappa in (10.0, 40.0):
        direct, other = quotient(lambda s: 1.0 * (s > high) - (s < low), kappa)
        # 2e-3: the kinks lie between two nodes; A divides by a mean that is smaller still.
        assert direct == pytest.approx(by_hand(kappa)[1], rel=2e-3)
        assert other == pytest.approx(by_hand(kappa)[1], rel=2e-3)
    (_, first), (c, second) = by_hand(300.0), by_hand(1000.0)
    assert c == pytest.approx((low + high) / 2, abs=4 / 1000)  # the way to the middle is of order 1/κ
    # A is of order κ^(-1/2) times the exponential: tails are densities over √κ. The next order is 1/κ.
    exponent = (math.log(second / first) + 0.5 * math.log(1000 / 300)) / 700
    expected = ((high - low) / (high + low)) ** 2 / 2
    assert exponent == pytest.approx(expected, rel=1e-3)
    assert expected < 0.2  # ERM's exponent is one half
    # Slopes that begin at 0 have the same exponent (1/κ is large here, hence 10 %), and ERM's is refused.
    soft = [quotient(lambda s: np.clip(s - high, 0, 1) - np.clip(low - s, 0, 1), kappa)[1] for kappa in (40.0, 80.0)]
    assert math.log(soft[1] / soft[0] * math.sqrt(2)) / 40 == pytest.approx(expected, rel=0.1)
    # With 0 among the minima the slope at any c > 0 is positive: the minimiser is w = 0.
    g = np.linspace(-8, 8, 4001)
    for c in (0.5, 1.0, 2.0):
        for start in (-low, 0.0):
            u = 1 + g / 2
            assert np.exp(-0.5 * g**2) @ (u * (1.0 * (c * u > high) - (c * u < start))) > 0


def test_midpoint_mixup_is_within_a_percent_of_the_normal_discriminant():
    midpoint = Objective(mixing=DiscreteLaw())
    for kappa in (0.5, 1.0, 3.0, 9.0, 50.0):
        assert 1 < direction_spread(kappa, midpoint).constant / (1 + 1 / kappa) < 1.01
    assert direction_spread(5.0, UNIFORM).constant / (1 + 1 / 5) > 1.05  # no other law of λ here is that close


def test_prop_one_example_in_other_units():
    """Where Σ is no multiple of I the single example of widest margin points along μ, not along Fisher's direction."""
    n, kappa = 20, 1e8
    units = np.array([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    cov, mu = units @ units.T, units[:, 0]
    for change, expected in ((units, mu @ cov @ mu / (mu @ mu) ** 2 - 1), (3 * np.eye(3), 0.0)):
        seen = []
        for r in range(20):
            drawn = draw_classes(n, 3, kappa, rng=np.random.default_rng([3, r]))
            sample = Sample(drawn.x @ change.T, drawn.labels)
            widest = max_margin(sample)
            nearest = sample.turned[(sample.turned @ change[:, 0]).argmin()]
            assert np.allclose(widest, nearest / (nearest @ nearest), rtol=0, atol=1e-7)
            seen.append(squared_tangent(widest @ change))
        assert np.allclose(seen, expected, atol=0.01)  # of order κ^(-1/2), times 5 standard deviations of 5
    assert mu @ cov @ mu / (mu @ mu) ** 2 - 1 > 0.2


def test_prop_one_example():
    n, dim, kappa, repeats = 20, 4, 1e8, 400
    angle, slopes_seen = [], []
    for r in range(repeats):
        sample = draw_classes(n, dim, kappa, rng=np.random.default_rng([1, r]))
        widest, nearest = max_margin(sample), sample.turned[sample.turned[:, 0].argmin()]
        assert np.allclose(widest, nearest / (nearest @ nearest), rtol=0, atol=1e-7)
        angle.append(kappa * squared_tangent(widest))
        slopes_seen.append(sample.turned)
    # Kolmogorov and Smirnov at 1e-4; n examples averaged would be χ²/n, and must be refused.
    assert stats.kstest(angle, stats.chi2(dim - 1).cdf).pvalue > 1e-4
    assert stats.kstest(np.array(angle) * n, stats.chi2(dim - 1).cdf).pvalue < 1e-10

    no_intercept = []
    for turned in slopes_seen[:10]:
        g = (turned - np.eye(dim)[0]) * math.sqrt(kappa)
        with_intercept = np.linalg.lstsq(np.c_[np.ones(n), g[:, 1:]], g[:, 0], rcond=None)[0][1:]
        without = np.linalg.lstsq(g[:, 1:], g[:, 0], rcond=None)[0]
        labels = np.arange(n) % 2
        seen = squared_tangent(
            direction(Sample((2.0 * labels - 1)[:, None] * turned, labels), Objective(smoothing=0.1))
        )
        assert seen == pytest.approx(with_intercept @ with_intercept, rel=2e-3)  # order κ^{-1/2} = 1e-4
        no_intercept.append(abs(seen / (without @ without) - 1))
    assert max(no_intercept) > 0.1


def test_prop_one_example_mean_slope():
    """E‖β‖² = (d-1)/(n-d-1), within 4.5 standard errors: one false alarm in 10⁵; (d-1)/n is refused."""
    n, dim = 16, 5
    g = np.random.default_rng(5).standard_normal((4000, n, dim))
    g -= g.mean(1, keepdims=True)
    across = g[:, :, 1:]
    slopes = np.linalg.solve(across.swapaxes(1, 2) @ across, across.swapaxes(1, 2) @ g[:, :, :1])
    squares = (slopes**2).sum((1, 2))
    error = 4.5 * squares.std(ddof=1) / math.sqrt(len(squares))
    assert abs(squares.mean() - (dim - 1) / (n - dim - 1)) < error
    assert abs(squares.mean() - (dim - 1) / n) > error


def test_prop_one_example_separable():
    n, kappa, repeats = 40, 6.0, 300
    separable = 0
    for r in range(repeats):
        sample = draw_classes(n, 3, kappa, rng=np.random.default_rng([2, r]))
        separable += not (sample.turned @ direction(sample, Objective()) < 1 - 1e-9).any()
    bound = 1 - n * stats.norm.sf(math.sqrt(kappa))
    assert separable / repeats > bound - 4.5 * math.sqrt(0.25 / repeats)
    assert separable < repeats  # and the bound is not idle


@pytest.mark.parametrize("seed", range(6))
def test_prop_views(seed):
    rng = np.random.default_rng(seed)
    a, smoothing, gamma = rng.uniform(0.3, 3, 2), rng.uniform(0.02, 0.9), rng.uniform(0.01, 0.5)
    q = rng.dirichlet([1, 1, 1])
    turned = np.array([[a[0], 0, gamma], [0, a[1], gamma], [a[0], a[1], gamma]])

    def loss(w, rows, chance):
        s = rows @ w
        return chance @ (np.logaddexp(0, -s) + smoothing / 2 * s)

    def solve(rows, chance):
        return optimize.minimize(loss, np.ones(rows.shape[1]), (rows, chance), method="BFGS", options={"gtol": 1e-9}).x

    together = solve(turned[:, :2], q) * a
    assert (together > 1e-3).all() and (together < cstar(smoothing)).all() and together.sum() > cstar(smoothing)
    apart = solve(turned[:2, :2], np.array([0.98, 0.02])) * a  # one view rare: no matter
    assert np.allclose(apart, cstar(smoothing), atol=1e-4)  # BFGS by differences

    labels = np.array([1, 1, 1, 0, 0, 0])
    law = Sample(np.concatenate([turned, -turned]), labels, np.tile(q, 2) / 2)
    found = minimise(law, Objective(smoothing=smoothing)).weights
    # 1e-6: a gradient of 1e-10 over the least curvature.
    assert np.allclose(found * turned[2], [0, 0, cstar(smoothing)], atol=1e-6)
    # q12 > 0 is needed: without it the two views alone do as well.
    views_only = np.array([*(cstar(smoothing) / a), 0.0])
    constant_only = np.array([0, 0, cstar(smoothing) / gamma])
    apart = [loss(w, turned[:2], np.array([0.5, 0.5])) for w in (views_only, constant_only)]
    assert apart[0] == pytest.approx(apart[1], abs=1e-12)
    assert loss(views_only, turned, q) > loss(constant_only, turned, q) + 1e-6
    # Hard labels keep the views: the widest margin has its larger part on them.
    widest = max_margin(law) * turned[2]
    assert widest[:2].sum() > widest[2]


def mixup_margin(law: BetaLaw) -> float:
    """The zero of F', its integral by scipy's adaptive rule."""
    density = stats.beta(law.alpha, law.alpha).pdf

    def slope(c):
        mixed = quad(lambda lam: (2 * lam - 1) * (expit((2 * lam - 1) * c) - lam) * density(lam), 0, 1)[0]
        return -0.5 * expit(-c) + 0.5 * mixed

    return optimize.brentq(slope, 0.1, 30)


@pytest.mark.parametrize(("n", "dim", "seed"), [(6, 6, 0), (8, 12, 1), (8, 12, 2), (6, 90, 3), (6, 120, 4)])
def test_prop_equal_margins(n, dim, seed):
    labels = np.arange(n) % 2
    turned = np.random.default_rng(seed).standard_normal((n, dim)) + 0.3
    sample = Sample((2.0 * labels - 1)[:, None] * turned, labels)
    v = np.linalg.pinv(turned) @ np.ones(n)
    # 1e-6: a gradient of 1e-10 over the least curvature on the span of the data.
    assert np.allclose(minimise(sample, Objective(smoothing=0.1)).weights, cstar(0.1) * v, atol=1e-6)
    law = BetaLaw(2.0)
    assert np.allclose(minimise(sample, Objective(mixing=law)).weights, mixup_margin(law) * v, atol=1e-6)
    multipliers = np.linalg.solve(turned @ turned.T, np.ones(n))
    same = np.allclose(max_margin(sample), v, atol=1e-8)
    assert same == (multipliers >= 0).all()


def test_prop_equal_margins_both_cases_and_unequal_classes():
    draws = [np.random.default_rng(seed).standard_normal((8, 12)) + 0.3 for seed in range(1, 3)]
    wide = [np.random.default_rng(seed).standard_normal((6, 120)) + 0.3 for seed in range(4, 6)]
    signs = [(np.linalg.solve(u @ u.T, np.ones(len(u))) >= 0).all() for u in draws + wide]
    assert {bool(sign) for sign in signs} == {True, False}  # the equivalence above was tried on both sides
    labels = np.array([1, 1, 1, 1, 1, 0])
    sample = Sample((2.0 * labels - 1)[:, None] * wide[0], labels)
    margins = sample.turned @ minimise(sample, Objective(mixing=BetaLaw(2.0))).weights
    assert abs(margins[0] - margins[-1]) > 0.1  # equally many of each class is needed
    assert np.ptp(margins[:5]) < 1e-6


def written_out(sample: Sample, objective: Objective):
    """Loss, gradient and Hessian of the definition as a function of w: every pair at every λ, nothing folded."""
    lam, chance = laws(objective)
    lam = lam[:, None, None]
    points = (lam[..., None] * sample.x[:, None] + (1 - lam[..., None]) * sample.x).reshape(-1, sample.dim)
    target = (lam * sample.labels[:, None] + (1 - lam) * sample.labels).ravel()
    target = (1 - objective.smoothing) * target + objective.smoothing / 2
    weight = (chance[:, None, None] * sample.weights[:, None] * sample.weights).ravel()
    decay = objective.weight_decay

    def derivatives(w):
        z = points @ w
        slope = weight * expit(z) * expit(-z)
        return (
            weight @ (np.logaddexp(0, z) - target * z) + decay / 2 * w @ w,
            (weight * (expit(z) - target)) @ points + decay * w,
            (points * slope[:, None]).T @ points + decay * np.eye(len(w)),
        )

    return derivatives


def uneven(n: int, dim: int, kappa: float) -> Sample:
    """Unequal probabilities and unequal classes."""
    rng = np.random.default_rng(0)
    drawn = draw_classes(n, dim, kappa, rng=rng)
    keep = np.arange(n) >= n // 4 * 2 * (drawn.labels == 1)
    return Sample(drawn.x[keep], drawn.labels[keep], rng.dirichlet(np.full(keep.sum(), 3.0)))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["even", "uneven"])
def test_minimise_agrees_with_all_pairs_written_out(name, kind):
    """Overlapping classes, so that ERM has a minimiser too. Newton's method from elsewhere, on the definition."""
    sample = draw_classes(30, 4, 0.6, rng=np.random.default_rng(0)) if kind == "even" else uneven(40, 4, 0.6)
    assert (np.ptp(sample.weights) > 0.01 and sample.labels.mean() < 0.4) == (kind == "uneven")
    derivatives = written_out(sample, OBJECTIVES[name])
    found = minimise(sample, OBJECTIVES[name])
    root = optimize.root(lambda w: derivatives(w)[1], found.weights + 0.2, jac=lambda w: derivatives(w)[2], tol=1e-13)
    assert np.allclose(found.weights, root.x, rtol=0, atol=1e-8)  # gradients of 1e-10 in both, curvatures above 0.01
    assert found.loss == pytest.approx(derivatives(root.x)[0], abs=1e-13)
    other = written_out(sample, OBJECTIVES["both" if name == "decay" else "decay"])
    assert np.linalg.norm(other(found.weights)[1]) > 1e-3  # another loss is not at rest there


def test_minimise_on_a_sample_that_separates():
    """ERM, with or without pairs that never mix: the direction of widest margin, by one program over all examples."""
    sample = draw_classes(12, 4, 30.0, rng=np.random.default_rng(0))
    rows = np.vstack([sample.turned.T, np.ones(12)])
    residual = np.eye(5)[4] - rows @ optimize.nnls(rows, np.eye(5)[4])[0]
    widest = -residual[:-1] / residual[-1]
    assert np.allclose(max_margin(sample), widest, atol=1e-9)
    for objective in (Objective(), Objective(mixing=DiscreteLaw((0.0, 1.0), (0.5, 0.5)))):
        assert np.allclose(direction(sample, objective), widest, atol=1e-9)


def test_minimise_where_the_sample_is_barely_separable():
    """A least norm above 50: the direction must still be feasible and optimal, which Newton's path would not be."""
    found = 0
    for seed in range(300):
        sample = draw_classes(128, 5, 6.0, rng=np.random.default_rng(seed))
        w = direction(sample, Objective())
        if (sample.turned @ w).min() < 1 - 1e-6 or np.linalg.norm(w) < 50:
            continue
        found += 1
        margins = sample.turned @ w
        assert margins.min() == pytest.approx(1, abs=1e-6)
        multipliers, residual = optimize.nnls(sample.turned[margins < 1 + 1e-6].T, w)
        assert residual < 1e-6 * np.linalg.norm(w) and multipliers.sum() == pytest.approx(w @ w, rel=1e-6)
    assert found > 0


def test_derivatives_over_pairs(monkeypatch):
    """Each is the slope of the one before; blocks of pairs of any size give the same sums."""
    sample, w, decay = uneven(20, 3, 2.0), np.array([0.7, -0.4, 0.2]), 0.1
    for objective in (SKEWED, Objective(smoothing=0.2, mixing=BetaLaw(0.4))):
        pairs = population._nodes(sample, objective, 8)
        loss, gradient, hessian = pairs.derivatives(w, decay)
        assert loss == pairs.loss(w, decay)
        step = 1e-5 * np.eye(3)
        up, down = ([pairs.derivatives(w + s * h, decay) for h in step] for s in (1, -1))
        slopes = np.array([(a[0] - b[0]) / 2e-5 for a, b in zip(up, down, strict=True)])
        bends = np.array([(a[1] - b[1]) / 2e-5 for a, b in zip(up, down, strict=True)])
        # Central differences: error of order step², and rounding over step.
        assert np.allclose(gradient, slopes, rtol=0, atol=1e-9) and np.allclose(hessian, bends, rtol=0, atol=1e-9)
        with monkeypatch.context() as small:
            small.setattr(population, "BLOCK", 40)
            for whole, parts in zip((loss, gradient, hessian), pairs.derivatives(w, decay), strict=True):
                assert np.allclose(whole, parts, rtol=0, atol=1e-14)


def test_folded_rule_keeps_what_is_even_about_one_half():
    for law in (BetaLaw(0.3), DiscreteLaw((0.2, 0.5, 0.8, 0.9), (0.1, 0.2, 0.3, 0.4))):
        (lam, mass), (folded, weights) = law.rule(7), folded_rule(law, 7)
        assert (folded >= 0.5).all() and len(folded) < len(lam) and weights.sum() == pytest.approx(1, abs=1e-14)
        for power in (2, 4, 6):
            assert weights @ (folded - 0.5) ** power == pytest.approx(mass @ (lam - 0.5) ** power, rel=1e-12)


def test_pairs_beyond_memory_are_refused(monkeypatch):
    monkeypatch.setattr(population, "MOST_NUMBERS", 2 * 20**2 - 1)
    sample = draw_classes(20, 3, 1.0, rng=np.random.default_rng(0))
    with pytest.raises(population.ConvergenceError, match="20 examples at 2 values"):
        minimise(sample, SKEWED)


def test_needed_examples():
    counts = np.array([8, 16, 32, 64, 128])
    law = np.array([[0.5], [1.0], [2.0]]).T * (10.0 / counts)[:, None]  # median 10/n
    assert needed_examples(counts, law, 0.2) == pytest.approx(50, rel=1e-12)
    assert needed_examples(counts, law, 5.0) == 8
    assert needed_examples(counts, law, 0.01) == np.inf
    with pytest.raises(ValueError, match="3 of 15 are NaN"):  # else the last count would pass for good enough
        needed_examples(counts, np.where(law == law[-1, -1], np.nan, law), 0.01)
    bumpy = np.array([[0.1], [0.3], [0.4], [0.1], [0.05]])  # below, above, below: from which n on
    assert needed_examples(counts, bumpy, 0.2) == pytest.approx(32 * 2**0.5, rel=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match=r"positive, got 0\.0"):
        direction_spread(0.0, Objective())
    with pytest.raises(ValueError, match="ε = 1"):
        direction_spread(1.0, Objective(smoothing=1.0))
    with pytest.raises(ValueError, match="ε = 1"):
        direction_spread(1.0, Objective(smoothing=1.0, mixing=BetaLaw(1.0)))
    for n in (0, 7):
        with pytest.raises(ValueError, match=f"even and at least 2, got {n}"):
            draw_classes(n, 3, 1.0, rng=np.random.default_rng(0))
    assert squared_tangent(np.array([-1.0, 0.1])) == np.inf
