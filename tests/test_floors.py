"""The floor of the Mixup loss: closed forms against integrals, simulations, torch's loss and minimisation by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import digamma, entr, polygamma
from scipy.stats import beta as beta_law

from labelaug.theory.bounds import (
    entropy,
    mixing_entropy,
    mixup_bound,
    mixup_floor,
    mixup_infimum,
    permutation_floor,
)

ROUNDING = 1e-12  # sums of a few hundred terms below 1 in float64
ERRORS = 4.5  # standard errors, two-sided: false alarm 7e-6 a comparison


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def coin(lam):
    return entr(lam) + entr(1 - lam)


def test_lem_mixup_floor(rng):
    """Loss = floor + mean divergence: torch's cross-entropy of the targets themselves, and of smoothed outputs."""
    k, n, alpha = 5, 40000, 0.4
    frequencies = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    first, second = (rng.choice(k, n, p=frequencies) for _ in range(2))
    lam = rng.beta(alpha, alpha, n)[:, None]
    targets = lam * np.eye(k)[first] + (1 - lam) * np.eye(k)[second]

    def losses(outputs):
        return torch.nn.functional.cross_entropy(
            torch.from_numpy(outputs).log(), torch.from_numpy(targets), reduction="none"
        ).numpy()

    floor = mixup_floor(frequencies, alpha=alpha)
    at_target = losses(np.clip(targets, 1e-300, None))
    error = at_target.std() / math.sqrt(n)
    assert abs(at_target.mean() - floor) < ERRORS * error
    assert abs(at_target.mean() - mixup_floor(np.full(k, 0.2), alpha=alpha)) > ERRORS * error  # not balanced
    assert abs(at_target.mean() - mixup_floor(frequencies, alpha=1.0)) > ERRORS * error  # not uniform
    smoothed = 0.9 * targets + 0.1 / k
    divergence = (targets * (np.log(np.clip(targets, 1e-300, None)) - np.log(smoothed))).sum(1)
    assert losses(smoothed).mean() - at_target.mean() == pytest.approx(divergence.mean(), abs=1e-10)
    assert divergence.mean() > 0.01


def test_lem_mixup_floor_is_the_one_of_the_variance_bound(rng):
    """prop-mixup-variance computes E H(p) pair by pair."""
    labels, lams, weights = np.array([0, 2, 1, 0, 0]), [0.1, 0.5, 0.95], [0.2, 0.5, 0.3]
    log_g = np.log(rng.dirichlet(np.ones(3), size=(3, 5, 5)))
    found = mixup_floor(np.bincount(labels) / 5, lams=lams, weights=weights)
    assert found == pytest.approx(mixup_bound(log_g, labels, lams=lams, weights=weights).floor, abs=ROUNDING)


def test_lem_mixup_floor_of_the_paper():
    for k in (2, 10, 100):
        assert mixup_floor(np.full(k, 1 / k), alpha=1.0) == pytest.approx((k - 1) / (2 * k), abs=ROUNDING)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.7, 1.0, 2.0, 8.0, 100.0])
def test_prop_mixing_entropy(alpha):
    """Mean and variance against integrals of the density, and against the integral of the proposition."""

    def expected(f):  # λ = t^(1/α) removes the singularity at 0; the two halves are mirror images
        power = min(alpha, 1.0)

        scale = math.lgamma(2 * alpha) - 2 * math.lgamma(alpha)

        def integrand(t):
            lam = t ** (1 / power)
            log_density = scale + (alpha - power) * math.log(lam) + (alpha - 1) * math.log1p(-lam)
            return f(lam) * math.exp(log_density) / power

        return 2 * quad(integrand, 0, 0.5**power, epsabs=1e-13, epsrel=1e-11, limit=200)[0]

    mean, variance = mixing_entropy(alpha)
    # Adaptive quadrature at 1e-11, of which four digits are left for what it does not promise.
    assert mean == pytest.approx(expected(coin), abs=1e-9)
    assert variance == pytest.approx(expected(lambda lam: (coin(lam) - mean) ** 2), rel=1e-7)
    by_u = quad(lambda u: (1 - u) / (alpha * (u ** (-1 / alpha) - 1)), 0, 1, epsabs=1e-13, limit=200)[0]
    assert mean == pytest.approx(by_u, abs=1e-8)


def test_prop_mixing_entropy_values_order_and_limits():
    means = [mixing_entropy(alpha)[0] for alpha in np.geomspace(1e-3, 1e4, 50)]
    assert (np.diff(means) > 0).all() and 0 < means[0] and means[-1] < math.log(2)
    for alpha in (1, 2, 5):
        series = sum((-1) ** (j + 1) / j for j in range(1, 2 * alpha + 1))
        assert mixing_entropy(alpha)[0] == pytest.approx(series, abs=ROUNDING)
    assert mixing_entropy(1e-4)[0] == pytest.approx(math.pi**2 / 6 * 1e-4, rel=1e-3)  # next order: relative α
    assert math.log(2) - mixing_entropy(1e4)[0] == pytest.approx(0.25e-4, rel=1e-3)
    assert mixing_entropy(1.0)[1] == pytest.approx(5 / 6 - math.pi**2 / 18 - 0.25, abs=ROUNDING)


def difference(alpha):
    """Variance of the entropy as E H² - (E H)², the two derivatives of the Beta function in float64."""
    first, both = (digamma(alpha + a) - digamma(2 * alpha + 2) for a in (2, 1))
    square = (alpha + 1) * (first**2 + polygamma(1, alpha + 2) - polygamma(1, 2 * alpha + 2))
    cross = alpha * (both**2 - polygamma(1, 2 * alpha + 2))
    return (square + cross) / (2 * alpha + 1) - (digamma(2 * alpha + 1) - digamma(alpha + 1)) ** 2


@pytest.mark.parametrize("alpha", [8.0, 15.9, 16.0, 40.0, 1e3, 1e4, 1e5, 1e6, 1e9, 1e12])
def test_prop_mixing_entropy_of_large_alpha(alpha):
    """The variance against a quadrature in units of its own width, to twelve digits."""
    x = np.linspace(-14, 14, 5601) / math.sqrt(2 * alpha)
    x = x[np.abs(x) < 1]
    mass = np.exp((alpha - 1) * np.log1p(-x * x))
    mass /= mass.sum()
    less = x * np.arctanh(x) + 0.5 * np.log1p(-x * x)  # log 2 - H_b((1 + x)/2), which does not cancel at 0
    expected = mass @ (less - mass @ less) ** 2
    # The trapezoidal rule is exact to rounding here: the density has 7 derivatives at ±1 at least, and at most 1e-42
    # of the mass lies beyond. The closed form below 16 loses 8α² roundings, 5e-13.
    assert mixing_entropy(alpha)[1] == pytest.approx(expected, rel=2e-12, abs=0)
    # At the next order the limit: 8α²·variance = 1 - 3/(2α) + O(α⁻²), with room for four times that term at α = 8.
    assert abs(8 * alpha**2 * expected - 1 + 1.5 / alpha) < 2 / alpha**2 + 1e-12


def test_prop_mixing_entropy_has_no_negative_variance():
    alphas = np.geomspace(1e-3, 1e12, 600)
    found = np.array([mixing_entropy(alpha)[1] for alpha in alphas])
    assert (found > 0).all() and (np.diff(found[alphas > 0.5]) < 0).all()
    # Negative control, over many α as the errors are roundings: the difference is off by 1.4 % at α = 1e6.
    late = alphas > 1e6
    errors = np.array([difference(alpha) for alpha in alphas[late]]) / found[late] - 1
    assert np.median(np.abs(errors)) > 1e-2 and (errors < -1).mean() > 0.1


def epochs(labels, batch_size, count, rng):
    """Share of unlike pairs and floor of simulated epochs, batch by batch, α = 1."""
    shares, floors = [], []
    for _ in range(count):
        order, unlike, floor = rng.permutation(labels), 0.0, 0.0
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            here = (batch != batch[rng.permutation(len(batch))]).sum()
            unlike += here
            floor += here * coin(rng.random())
        shares.append(unlike / len(labels))
        floors.append(floor / len(labels))
    return np.array(shares), np.array(floors)


@pytest.mark.parametrize(("counts", "batch_size"), [([6, 3, 1], 4), ([5, 5], 10), ([20, 1, 1, 2], 7), ([4, 3], 1)])
def test_prop_permutation_floor(counts, batch_size, rng):
    labels = np.repeat(np.arange(len(counts)), counts)
    count = 4000
    shares, floors = epochs(labels, batch_size, count, rng)
    expected = permutation_floor(counts, batch_size=batch_size, alpha=1.0)
    assert abs(floors.mean() - expected) <= ERRORS * floors.std() / math.sqrt(count)
    assert abs(shares.mean() - expected / 0.5) <= ERRORS * shares.std() / math.sqrt(count)
    independent = mixup_floor(np.array(counts) / sum(counts), alpha=1.0)
    if batch_size < len(labels):  # fixed points matter
        assert abs(shares.mean() - independent / 0.5) > ERRORS * shares.std() / math.sqrt(count)
    else:  # all examples in one batch: a fixed point is as likely as an equal label is without replacement
        assert expected == pytest.approx(independent, abs=ROUNDING)


def test_prop_permutation_floor_by_enumeration():
    """All orders and permutations of four examples in batches of two; the floor of CIFAR-10 with batches of 128."""
    labels, shares = [0, 0, 0, 1], []
    for order in itertools.permutations(labels):
        for swap_first, swap_second in itertools.product((False, True), repeat=2):
            unlike = 2 * (swap_first and order[0] != order[1]) + 2 * (swap_second and order[2] != order[3])
            shares.append(unlike / 4)
    expected = permutation_floor([3, 1], batch_size=2, lams=[0.5]) / math.log(2)
    assert sum(shares) / len(shares) == pytest.approx(expected, abs=ROUNDING)
    assert permutation_floor([5000] * 10, batch_size=128, alpha=1.0) == pytest.approx(0.45 * (50000 - 391) / 49999)


@pytest.mark.parametrize("n", [640, 600])
def test_prop_epoch_floor(n, rng):
    """The variance of one epoch's floor is at least the bound, and near it; one λ an example has far less.

    With 600 examples the last batch is smaller than the others.
    """
    labels, size, count = np.arange(n) % 4, 64, 3000
    m = -(-n // size)
    shares, floors = epochs(labels, size, count, rng)
    unlike = permutation_floor(np.bincount(labels), batch_size=size, lams=[0.5]) / math.log(2)
    assert unlike == pytest.approx((n - m) / (n - 1) * 0.75, abs=ROUNDING)
    bound = mixing_entropy(1.0)[1] * unlike**2 / m
    error = ERRORS * math.sqrt(2 / count)  # relative error of a variance of nearly normal numbers
    assert floors.var() > bound * (1 - error)
    assert floors.var() < 1.2 * bound  # the shares themselves add a few per cent
    lam = rng.random((count, len(labels)))
    assert (coin(lam).mean(1) * shares.mean()).var() < bound / 10


def test_prop_epoch_floor_needs_the_factor_of_the_batches():
    """Two examples of two classes in batches of one: every example meets itself, and the floor of an epoch is 0.

    Without (n - m)/(n - 1) the bound would be positive; with four in batches of two it is 2/3 of the classes' part.
    """
    assert permutation_floor([1, 1], batch_size=1, alpha=1.0) == 0.0
    unlike = []
    for order in itertools.permutations([0, 0, 1, 1]):
        for swaps in itertools.product((False, True), repeat=2):
            pair = [2 * swap * (order[2 * b] != order[2 * b + 1]) / 2 for b, swap in enumerate(swaps)]
            unlike.append(pair)
    unlike = np.array(unlike)  # share of unlike pairs of each batch, all 96 equally likely
    expected = (4 - 2) / (4 - 1) * 0.5
    assert unlike.mean() == pytest.approx(expected, abs=ROUNDING)
    # Var F of the two-batch epoch, exactly, from the moments of shares and of H: at least the bound.
    mean, variance = mixing_entropy(1.0)
    exact = (unlike**2).mean(0).sum() / 4 * variance + (unlike.mean(1) * mean).var()
    assert exact >= variance * expected**2 / 2
    assert expected < 0.5 - 0.1  # the factor is no rounding


def minimised(x, labels, lams, weights):
    """Least Mixup loss over a table of logits, one row for each distinct mixed input, by Newton-free descent."""
    places, pairs = {}, []
    for lam, weight in zip(lams, weights, strict=True):
        for i in range(len(x)):
            for j in range(len(x)):
                z = tuple(round(lam * a + (1 - lam) * b, 9) + 0.0 for a, b in zip(x[i], x[j], strict=True))
                pairs.append((places.setdefault(z, len(places)), weight / len(x) ** 2, labels[i], labels[j], lam))
    logits = torch.zeros(len(places), max(labels) + 1, dtype=torch.double, requires_grad=True)
    row, mass, one, two, lam = (torch.tensor(column) for column in zip(*pairs, strict=True))
    optimiser = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        log_g = logits.log_softmax(-1)[row]
        picked = [log_g.gather(1, t[:, None])[:, 0] for t in (one, two)]
        value = -(mass * (lam * picked[0] + (1 - lam) * picked[1])).sum()
        value.backward()
        return value

    optimiser.step(loss)
    return loss().item()


@pytest.mark.parametrize(
    ("x", "labels", "lams", "weights"),
    [
        ([[0.0], [1.0], [2.0]], [0, 1, 0], [0.5], [1.0]),
        ([[0.0], [1.0], [2.0], [3.0]], [0, 1, 2, 1], [0.5, 1.0, 0.25], [0.5, 0.2, 0.3]),
        ([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]], [0, 1, 0], [0.5], [1.0]),
    ],
)
def test_prop_mixup_infimum(x, labels, lams, weights):
    found = mixup_infimum(x, labels, lams=lams, weights=weights)
    reached = minimised(x, labels, lams, weights)
    # Approached from above: logits that should be infinite stop at finite ones.
    assert found - 1e-9 < reached < found + 1e-5
    floor = mixup_floor(np.bincount(labels) / len(labels), lams=lams, weights=weights)
    assert found > floor - ROUNDING
    on_line = len(x[0]) == 1
    assert (found > floor + 0.05) == on_line  # contradictions on the line, none in the triangle


def test_prop_mixup_infimum_by_hand_and_scale_free():
    line, labels = np.array([[0.0], [1.0], [2.0]]), np.array([0, 1, 0])
    expected = 4 / 9 * math.log(2) + entropy([2 / 3, 1 / 3]) / 3
    for scale in (1.0, 1e-6, 1e6):
        assert mixup_infimum(scale * line, labels, lams=[0.5]) == pytest.approx(expected, abs=ROUNDING)
    assert mixup_infimum(np.zeros((2, 1)), [0, 1], lams=[0.5]) == pytest.approx(math.log(2))  # all alike, at 0
    # A λ of no weight changes nothing; λ = 1 is ERM, whose infimum on distinct points is 0.
    assert mixup_infimum(line, labels, lams=[0.5, 0.3], weights=[1.0, 0.0]) == pytest.approx(expected, abs=ROUNDING)
    assert mixup_infimum(line, labels, lams=[1.0]) == 0.0


def test_uniform_quantiles_of_the_notebook_have_the_entropy_of_the_law():
    levels = (np.arange(4000) + 0.5) / 4000
    for alpha in (0.2, 1.0, 8.0):
        mean = coin(beta_law(alpha, alpha).ppf(levels)).mean()
        assert mean == pytest.approx(mixing_entropy(alpha)[0], abs=1e-3)  # midpoint rule, kinks at both ends


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixup_floor([0.5, 0.5]), "give lams .* or alpha"),
        (lambda: mixup_floor([0.5, 0.5], lams=[0.5], alpha=1.0), "give lams .* or alpha"),
        (lambda: mixup_floor([0.5, 0.5], weights=[1.0], alpha=1.0), "give lams .* or alpha"),
        (lambda: mixup_floor([0.5, 0.5], lams=[1.5]), r"lams must be \[L\] numbers in \[0, 1\], got \[1.5\]"),
        (lambda: mixup_floor([0.5, 0.5], alpha=0.0), "must be positive, got 0.0"),
        (lambda: mixing_entropy(-1.0), "must be positive, got -1.0"),
        (lambda: permutation_floor([0.5, 0.5], batch_size=2, alpha=1.0), "counts must be .* integers"),
        (lambda: permutation_floor([3, -1], batch_size=2, alpha=1.0), "none negative"),
        (lambda: permutation_floor([1, 0], batch_size=2, alpha=1.0), "sum 2 or more"),
        (lambda: permutation_floor([5, 5], batch_size=0, alpha=1.0), "batch_size must be at least 1, got 0"),
        (lambda: mixup_infimum([[0.0]], [0, 1], lams=[0.5]), r"labels \[n\]"),
        (lambda: mixup_infimum([[np.nan]], [0], lams=[0.5]), "finite"),
        (lambda: mixup_infimum([[0.0]], [-1], lams=[0.5]), "labels must lie in"),
        (lambda: mixup_infimum([[0.0]], [0], lams=[-0.1]), "lams must be"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
