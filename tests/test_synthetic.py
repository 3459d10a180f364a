"""The synthetic laws: samples against closed forms, supports, the clauses of Definition 2.1, refusals.

Moments are compared within 4.5 standard errors, two-sided: a false-alarm rate of 7e-6 for each number. Seeds are fixed.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from labelaug.data.synthetic import (
    Box,
    Elliptical,
    EllipticalTask,
    TwoFeatureTask,
    counterexample_task,
    sample,
    sample_seeds,
)

N = 20_000
COV3 = ((2.0, 0.6, -0.3), (0.6, 1.0, 0.2), (-0.3, 0.2, 0.5))
BALL5 = tuple(tuple(row) for row in np.eye(5).tolist())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(task, n=N, seed=0):
    return sample(task, n, generator=seeded(seed), dtype=torch.float64)


def deviations(values, mean, covariance):
    """Largest deviation of sample mean and of sample covariance (about the given mean), in standard errors.

    Numbers whose standard error is zero (constant coordinates) must be met exactly, up to rounding.
    """
    centred = values - mean
    products = centred[:, :, None] * centred[:, None, :]
    found = []
    for terms, expected in ((values, mean), (products, covariance)):
        difference = (terms.mean(0) - expected).abs()
        error = terms.std(0) / len(values) ** 0.5
        found.append((difference / error.clamp(min=1e-12)).max().item())  # 1e-12: rounding in the mean of n numbers
    return found


def closed_form(task, y):
    """Mean and covariance of U given Y = y, written out for the boxes of this file."""
    law = task.high if y > 0 or task.high_negative is None else task.high_negative
    mean = [task.gamma] * task.num_low + [(law.low + law.high) / 2] * task.num_high
    variance = [task.low_noise**2 / 3] * task.num_low + [(law.high - law.low) ** 2 / 12] * task.num_high
    return torch.tensor(mean, dtype=torch.float64), torch.diag(torch.tensor(variance, dtype=torch.float64))


BOX_TASKS = {
    "default": TwoFeatureTask(),
    "low noise": TwoFeatureTask(low_noise=0.03),
    "unequal parts": TwoFeatureTask(gamma=1.0, high=Box(2.0, 12.0), num_low=1, num_high=4),
    "asymmetric": TwoFeatureTask(high=Box(-1.0, 11.0), high_negative=Box(2.0, 8.0), num_low=2, num_high=3),
    "counterexample": counterexample_task(),
}


@pytest.mark.parametrize("name", BOX_TASKS)
@pytest.mark.parametrize("y", [1, -1])
def test_class_moments_of_boxes(name, y):
    """Given the class, mean y·E[U] and covariance of x are the closed forms; a scaled-up covariance is not."""
    task = BOX_TASKS[name]
    x, labels = draw(task)
    u = y * x[labels == (y + 1) // 2]
    mean, covariance = closed_form(task, y)
    assert_close(task.mean(y), mean, rtol=1e-15, atol=0)
    assert_close(task.covariance(y), covariance, rtol=1e-14, atol=0)
    assert max(deviations(u, mean, covariance)) < 4.5
    assert deviations(u, mean, 1.1 * covariance)[1] > 4.5
    assert deviations(-u, mean, covariance)[0] > 4.5  # label 1 stands for Y = +1


@pytest.mark.parametrize("radial", ["gaussian", "ellipse"])
@pytest.mark.parametrize("y", [1, -1])
def test_class_moments_of_elliptical_laws(radial, y):
    """Correlated laws have the mean and covariance that they are given, as a task and as the high part of one."""
    law = Elliptical((0.5, 1.0, -1.0), COV3, radial)
    cov = torch.tensor(COV3, dtype=torch.float64)
    whole = EllipticalTask(law, num_low=1)
    part = TwoFeatureTask(high=law, num_low=2, num_high=3)
    for task, mean, covariance in (
        (whole, [0.5, 1.0, -1.0], cov),
        (part, [0.1, 0.1, 0.5, 1.0, -1.0], torch.block_diag(torch.zeros(2, 2), cov)),
    ):
        x, labels = draw(task)
        u = y * x[labels == (y + 1) // 2]
        assert_close(task.mean(y), torch.tensor(mean, dtype=torch.float64))
        assert_close(task.covariance(y), covariance.double())
        assert max(deviations(u, task.mean(y), task.covariance(y))) < 4.5
        uncorrelated = torch.diag(task.covariance(y).diagonal())
        assert deviations(u, task.mean(y), uncorrelated)[1] > 4.5


def test_labels_are_balanced():
    """Binomial(n, ½) within 4.5 standard errors, and both labels int64 in {0, 1}."""
    labels = draw(TwoFeatureTask())[1]
    assert labels.dtype == torch.int64 and set(labels.tolist()) == {0, 1}
    assert abs(labels.double().mean() - 0.5) < 4.5 * 0.5 / N**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_coordinates_are_exactly_gamma_y(dtype):
    """Zero conditional variance, clause 1 of the definition, to the last bit; with noise it is gone."""
    task = TwoFeatureTask(gamma=0.1, num_low=3, num_high=2)
    x, labels = sample(task, 500, generator=seeded(), dtype=dtype)
    assert x.dtype == dtype and x.shape == (500, 5)
    gamma = torch.tensor(0.1, dtype=dtype)
    assert torch.equal(x[:, task.low], torch.where(labels[:, None] == 1, gamma, -gamma).expand(500, 3))
    noisy = sample(TwoFeatureTask(low_noise=0.03), 500, generator=seeded(), dtype=dtype)[0]
    assert (noisy[:, :5].abs() - gamma).abs().min() > 0 and (noisy[:, :5].abs() - gamma).abs().max() <= 0.03 + 1e-7


def test_supports_of_boxes():
    """U fills its box and stays in it: n·d draws miss the outer 0.1 % of a side with probability e^-50 or less."""
    task = TwoFeatureTask(high=Box(-1.0, 11.0), high_negative=Box(2.0, 8.0))
    x, labels = draw(task)
    for y, (low, high) in ((1, (-1.0, 11.0)), (-1, (2.0, 8.0))):
        u = y * x[labels == (y + 1) // 2][:, task.high_coordinates]
        assert low <= u.min() < low + 0.001 * (high - low)
        assert high >= u.max() > high - 0.001 * (high - low)


def test_support_of_the_solid_ellipse():
    """Uniform on {μ + Σ^½ v, |v| ≤ √(d+2)}: (|v|/√(d+2))^d is uniform on [0, 1] (Kolmogorov-Smirnov, rate 1e-4).

    The control: the sphere of radius √d has the same covariance, and the normal law has it too; both must fail.
    """
    d = 3
    mean, cov = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64), torch.tensor(COV3, dtype=torch.float64)

    def level(radial):
        task = EllipticalTask(Elliptical((0.5, 1.0, -1.0), COV3, radial))
        x, labels = draw(task)
        u = (2.0 * labels[:, None] - 1) * x - mean
        return ((u @ torch.linalg.inv(cov)) * u).sum(1)

    inside = level("ellipse")
    assert d + 2 >= inside.max() - 1e-9 and inside.max() > 0.999 * (d + 2)
    assert stats.kstest(((inside / (d + 2)) ** (d / 2)).numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest((inside / (d + 2)).numpy(), "uniform").pvalue < 1e-10  # radius √r instead of r^(1/d)
    normal = level("gaussian")
    assert stats.kstest(normal.numpy(), stats.chi2(d).cdf).pvalue > 1e-4
    assert normal.max() > d + 2


def regression_gaps(u, mean, covariance, weight, bins=8):
    """How far E[U - μ - Σw (s - ⟨w, μ⟩)/⟨w, Σw⟩ | s in a bin], s = ⟨w, U⟩, is from zero: largest, in its errors."""
    s = u @ weight
    rest = u - mean - (s - mean @ weight)[:, None] * (covariance @ weight) / (weight @ covariance @ weight)
    parts = rest[s.argsort()].chunk(bins)
    errors = [(part.std(0) / len(part) ** 0.5).clamp(min=1e-12) for part in parts]  # 1e-12: rounding
    return max((part.mean(0).abs() / error).max().item() for part, error in zip(parts, errors, strict=True))


@pytest.mark.parametrize("radial", ["gaussian", "ellipse"])
def test_elliptical_conditional_mean_is_linear(radial):
    """For an elliptical law E[U | ⟨w, U⟩] is linear in ⟨w, U⟩, for each w; for a box of the same moments it is not."""
    law = Elliptical((0.5, 1.0, -1.0), COV3, radial)
    x, labels = draw(EllipticalTask(law))
    u = (2.0 * labels[:, None] - 1) * x
    for weight in ((1.0, 0.0, 0.0), (0.3, -2.0, 1.0), (1.0, 1.0, 1.0)):
        w = torch.tensor(weight, dtype=torch.float64)
        assert regression_gaps(u, law.mean(3), law.covariance(3), w) < 4.5
    box = Box(-1.0, 1.0).sample(N, 3, generator=seeded(), dtype=torch.float64)
    w = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    assert regression_gaps(box, torch.zeros(3).double(), torch.eye(3).double() / 3, w) > 4.5


def test_degenerate_covariance_is_a_law_too():
    """Rank one: U runs along one line through the mean."""
    cov = ((1.0, 2.0), (2.0, 4.0))
    u = Elliptical((1.0, -1.0), cov).sample(200, 2, generator=seeded(), dtype=torch.float64)
    assert_close(u[:, 1] + 1, 2 * (u[:, 0] - 1), rtol=0, atol=1e-7)  # the zero eigenvalue is met to √ulp
    assert u.std(0).min() > 0.5


def test_def_two_feature_holds_for_the_counterexample():
    """Every clause of Definition 2.1, on the closed forms: mean zero, clauses 1 to 3; yet U_H takes both signs."""
    task = counterexample_task()
    assert task.departures() == ()
    class_means = [y * task.mean(y) for y in (1, -1)]
    assert (class_means[0] + class_means[1]).abs().max() == 0  # E[X] = 0 with balanced classes
    for y in (1, -1):
        covariance = task.covariance(y)
        assert covariance[0, 0] == 0 and task.mean(y)[0] == 0.1  # clause 1, with a ≠ 0
        assert covariance[1, 1] > 0  # clause 2
    # Clause 3: X_H given +1 on [-1, 11], given -1 on [-8, -2], so the distance is 1 > 2γ = 0.2.
    assert task.support_distance() == 1.0
    x, labels = draw(task)
    positive, negative = x[labels == 1, 1], x[labels == 0, 1]
    assert -1 <= positive.min() < -0.9 and 10.9 < positive.max() <= 11
    assert -8 <= negative.min() < -7.9 and -2.1 < negative.max() <= -2
    # The supports are disjoint but not on different sides of the origin, which the model without bias would need.
    assert positive.min() > negative.max() and positive.min() < 0 and negative.max() < 0


@pytest.mark.parametrize(
    ("low", "high", "minus_low", "minus_high", "distance"),
    [
        (0.2, 10.2, 0.2, 10.2, 0.4),
        (-1.0, 11.0, 2.0, 8.0, 1.0),
        (-11.0, -1.0, -8.0, 0.5, 0.5),  # the classes on each other's side: [-11, -1] and [-0.5, 8]
        (-1.0, 11.0, -1.0, 11.0, 0.0),
        (0.0, 1.0, 0.0, 1.0, 0.0),
    ],
)
def test_support_distance(low, high, minus_low, minus_high, distance):
    """Distance of two boxes: √d times the gap of one coordinate; checked by projection and by samples."""
    task = TwoFeatureTask(high=Box(low, high), high_negative=Box(minus_low, minus_high), num_low=1, num_high=4)
    assert task.support_distance() == pytest.approx(2 * distance)
    plus = Box(low, high).sample(4_000, 4, generator=seeded(), dtype=torch.float64)
    minus = -Box(minus_low, minus_high).sample(4_000, 4, generator=seeded(1), dtype=torch.float64)
    nearest = torch.cdist(plus, minus).min()
    assert nearest >= task.support_distance()
    # Projecting a point of the one box on the other, and back, finds a nearest pair of two boxes.
    end = plus[0].clamp(-minus_high, -minus_low)
    assert (end - end.clamp(low, high)).norm() == pytest.approx(2 * distance)


DEPARTURES = {
    "lower end at gamma": (TwoFeatureTask(gamma=0.2, high=Box(0.2, 10.2)), "not the more separable"),
    "lower end below gamma": (TwoFeatureTask(gamma=0.5, high=Box(0.2, 10.2)), "not the more separable"),
    "overlapping supports": (TwoFeatureTask(gamma=0.01, high=Box(-1.0, 10.0)), "not the more separable"),
    "mean not zero": (TwoFeatureTask(high_negative=Box(0.2, 12.2)), "mean of X is not zero"),
    "not compact": (
        TwoFeatureTask(high=Elliptical((9.0,) * 5, BALL5)),
        "support of the high-variance feature is not compact",
    ),
    "low noise": (TwoFeatureTask(low_noise=0.01), r"low-variance feature has variance (noise of half-width 0.01)"),
    "singular covariance": (
        TwoFeatureTask(high=Elliptical((9.0, 9.0), ((1.0, 1.0), (1.0, 1.0)), "ellipse"), num_high=2),
        "covariance of the high-variance feature is not positive definite",
    ),
}


@pytest.mark.parametrize("name", DEPARTURES)
def test_departures_names_each_violation(name):
    """One violation gives one sentence, about that clause."""
    task, sentence = DEPARTURES[name]
    found = task.departures()
    assert len(found) == 1 and sentence in found[0]


def test_departures_is_empty_inside_and_adds_up():
    for gamma in (0.05, 0.1, 0.199):
        assert TwoFeatureTask(gamma=gamma, high=Box(0.2, 10.2)).departures() == ()
    assert TwoFeatureTask(high=Elliptical((9.0,) * 5, BALL5, "ellipse")).departures() == ()
    # The distance grows with √dim, so two coordinates of γ are outweighed by eight of the box, not by one.
    assert TwoFeatureTask(gamma=0.2, high=Box(0.15, 1.0), num_low=2, num_high=8).departures() == ()
    assert len(TwoFeatureTask(gamma=0.2, high=Box(0.15, 1.0), num_low=2, num_high=1).departures()) == 1
    everything = TwoFeatureTask(gamma=5.0, high=Box(0.2, 1.0), high_negative=Box(0.2, 2.0), low_noise=0.1)
    assert len(everything.departures()) == 3


def test_departures_sees_ellipses_that_come_too_near():
    """Clause 3 for a ball of radius √(d+2) around c and its mirror image: 2(|c| - √7) > 2γ√5 at d = 5."""
    for surplus, inside in ((-5.0, False), (-0.01, False), (0.01, True)):
        centre = torch.ones(5, dtype=torch.float64) / 5**0.5 * max(0.0, 7**0.5 + 0.1 * 5**0.5 + surplus)
        task = TwoFeatureTask(gamma=0.1, high=Elliptical(tuple(centre.tolist()), BALL5, "ellipse"))
        assert (task.departures() == ()) is inside
        assert all("not the more separable" in sentence for sentence in task.departures())


def test_sampling_depends_on_the_generator_alone():
    for task in (TwoFeatureTask(low_noise=0.1), counterexample_task(), EllipticalTask(Elliptical((1.0,) * 3, COV3))):
        torch.manual_seed(0)
        first = sample(task, 50, generator=seeded(7))
        torch.manual_seed(1)
        again = sample(task, 50, generator=seeded(7))
        other = sample(task, 50, generator=seeded(8))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[0], other[0])


def test_sample_seeds():
    """Row s is the sample of seed s, whatever its company."""
    task = TwoFeatureTask()
    x, labels = sample_seeds(task, 30, seeds=[4, 2, 9], dtype=torch.float64)
    assert x.shape == (3, 30, 10) and labels.shape == (3, 30)
    alone = sample_seeds(task, 30, seeds=[2], dtype=torch.float64)
    assert torch.equal(x[1], alone[0][0]) and torch.equal(labels[1], alone[1][0])
    assert torch.equal(x[1], draw(task, 30, seed=2)[0])
    assert not torch.equal(x[0], x[1])


def test_noise_leaves_labels_and_high_part_alone():
    """Tasks that differ in γ or noise share their labels and high coordinates, so that a sweep over them is paired."""
    plain, noisy = (sample(TwoFeatureTask(low_noise=noise), 50, generator=seeded(3)) for noise in (0.0, 0.05))
    assert torch.equal(plain[1], noisy[1])
    assert torch.equal(plain[0][:, 5:], noisy[0][:, 5:])
    assert not torch.equal(plain[0][:, :5], noisy[0][:, :5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoFeatureTask(gamma=0.0), "gamma must be positive, got 0.0"),
        (lambda: TwoFeatureTask(gamma=-0.1), "gamma must be positive, got -0.1"),
        (lambda: TwoFeatureTask(gamma=float("nan")), "gamma must be positive, got nan"),
        (lambda: TwoFeatureTask(low_noise=-0.1), "low_noise must be at least 0, got -0.1"),
        (lambda: TwoFeatureTask(low_noise=float("nan")), "low_noise must be at least 0, got nan"),
        (lambda: TwoFeatureTask(num_low=0), "got num_low=0, num_high=5"),
        (lambda: TwoFeatureTask(num_high=0), "num_high=0"),
        (lambda: Box(1.0, 1.0), r"high > low, got \[1.0, 1.0\]"),
        (lambda: Box(float("nan"), 1.0), r"got \[nan, 1.0\]"),
        (lambda: Elliptical((0.0, 0.0), ((1.0, 0.5), (0.4, 1.0))), "symmetric 2 x 2"),
        (lambda: Elliptical((0.0, 0.0), ((1.0,),)), r"symmetric 2 x 2 matrix, got shape \(1, 1\)"),
        (lambda: Elliptical((0.0, 0.0), ((1.0, 2.0), (2.0, 1.0))), "negative eigenvalue -1"),
        (lambda: Elliptical((0.0,), ((1.0,),), radial="cauchy"), "'gaussian' or 'ellipse', got 'cauchy'"),
        (lambda: TwoFeatureTask(high=Elliptical((0.0,), ((1.0,),))), "has 1 dimensions, not 5"),
        (lambda: TwoFeatureTask(high_negative=Elliptical((0.0,), ((1.0,),))), "has 1 dimensions, not 5"),
        (lambda: EllipticalTask(Elliptical((0.0, 1.0, 2.0), COV3), num_low=0), r"num_low must be in 1..2, got 0"),
        (lambda: EllipticalTask(Elliptical((0.0, 1.0, 2.0), COV3), num_low=3), r"num_low must be in 1..2, got 3"),
        (lambda: sample(TwoFeatureTask(), 0, generator=seeded()), "n must be at least 1, got 0"),
        (lambda: sample(TwoFeatureTask(), -3, generator=seeded()), "n must be at least 1, got -3"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
