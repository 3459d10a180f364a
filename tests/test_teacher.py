"""The teacher-student toy: its draws, its training laws, and the exact moments of its test law."""

import dataclasses
import math

import numpy as np
import pytest

from labelaug.data import teacher
from labelaug.data.teacher import (
    TeacherTask,
    draw_teachers,
    labelled_moments,
    pairs,
    population_moments,
    sample_moments,
    tanh_overlaps,
)
from labelaug.theory.population import BetaLaw
from labelaug.theory.random_features import risk, risk_parts, spectrum, weights_at

MIDPOINT = ((0.5,), (1.0,))
SMALL = TeacherTask(num_inputs=4, width=3, num_features=12)


def plane_integral(u, v, *, step=0.02, reach=9.0):
    """E tanh<u, g> tanh<v, g> by the trapezoidal rule in the plane of u and v, which knows nothing of Hermite."""
    g = np.arange(-reach, reach + step / 2, step)
    mass = np.exp(-(g**2) / 2) * step / math.sqrt(2 * math.pi)
    a, b = np.linalg.norm(u), np.linalg.norm(v)
    rho = u @ v / a / b
    second = rho * g[:, None] + math.sqrt(max(0.0, 1 - rho**2)) * g
    return ((mass[:, None] * mass) * np.tanh(a * g)[:, None] * np.tanh(b * second)).sum()


def test_def_toy():
    task = TeacherTask(first_std=1.0)
    draws = draw_teachers(task, 20, seeds=range(60))
    assert draws.x.shape == (60, 20, 10) and draws.first.shape == (60, 100, 10) and draws.hidden.shape == (60, 5, 10)
    one = sum(draws.outer[3, k] * math.tanh(draws.hidden[3, k] @ draws.x[3, 7]) for k in range(5))
    assert draws.y[3, 7] == pytest.approx(one, abs=1e-12)
    assert draws.features(draws.x)[3, 7, 11] == pytest.approx(math.tanh(draws.first[3, 11] @ draws.x[3, 7]), abs=1e-12)
    for array in (draws.x, draws.first, draws.hidden, draws.outer, draws.start):
        # Mean square of N independent N(0, 1) has standard error √(2/N); 4.5 of them, two-sided odds 7e-6 each.
        assert abs(np.square(array).mean() - 1) < 4.5 * math.sqrt(2 / array.size)
    half = draw_teachers(TeacherTask(), 20, seeds=range(60))
    assert np.allclose(half.first, draws.first / 2)  # s₁ scales, and touches nothing else
    assert np.array_equal(half.y, draws.y)


def test_streams_are_apart():
    draws = draw_teachers(SMALL, 8, seeds=[3, 7, 11])
    alone, fewer = draw_teachers(SMALL, 8, seeds=[7]), draw_teachers(SMALL, 5, seeds=[3, 7, 11])
    wider = draw_teachers(TeacherTask(num_inputs=4, width=3, num_features=20), 8, seeds=[3, 7, 11])
    for name in ("hidden", "outer", "first", "start", "x", "y"):
        assert np.array_equal(getattr(draws, name)[1], getattr(alone, name)[0]), name
    assert np.array_equal(fewer.x, draws.x[:, :5])
    assert np.array_equal(wider.first[:, :12], draws.first) and np.array_equal(wider.x, draws.x)
    assert not np.array_equal(draws.x[0], draws.x[1])


def test_teacher_inside_the_student():
    draws = draw_teachers(TeacherTask(borrowed_from="teacher"), 20, seeds=[0, 1])
    theta = np.zeros((2, 100))
    theta[:, :5] = draws.outer
    assert np.allclose((draws.features(draws.x) @ theta[..., None])[..., 0], draws.y, atol=1e-12)
    test = population_moments(draws)
    assert np.abs(risk(theta[:, None], test.moment, test.cross, test.power)).max() < 1e-7  # 1e-8 an entry
    outside = population_moments(draw_teachers(TeacherTask(), 20, seeds=[0, 1]))
    assert risk(theta[:, None], outside.moment, outside.cross, outside.power).min() > 0.1


def test_units_of_a_stranger_have_the_law_of_the_teachers_and_are_not_his():
    seeds = range(60)
    own, borrowed, strange = (
        draw_teachers(TeacherTask(teacher_std=2.0, borrowed_from=lender), 20, seeds=seeds)
        for lender in ("nobody", "teacher", "stranger")
    )
    for name in ("hidden", "outer", "start", "x", "y"):
        assert np.array_equal(getattr(own, name), getattr(strange, name)), name
    assert np.array_equal(own.first[:, 5:], strange.first[:, 5:])
    assert np.array_equal(borrowed.first[:, :5], own.hidden)
    lent = strange.first[:, :5] / 2
    # 3000 numbers: their mean square has standard error √(2/3000), their product with the teacher's 1/√3000; 4.5 each.
    assert abs(np.square(lent).mean() - 1) < 4.5 * math.sqrt(2 / 3000)
    for other in (own.hidden / 2, 2 * own.first[:, :5], own.x[:, :5], own.start[:, :50].reshape(60, 5, 10)):
        assert abs((lent * other).mean()) < 4.5 / math.sqrt(3000)
    # The least risk: 0 for the teacher's own units (to 1e-8 an entry), far from it for a stranger's.
    least = {}
    for name, draws in (("teacher", borrowed), ("stranger", strange)):
        test = population_moments(draws, tolerance=1e-10)
        best = np.linalg.solve(test.moment, test.cross[..., None])[..., 0]
        least[name] = risk(best[:, None], test.moment, test.cross, test.power)[:, 0] / test.power
    assert least["teacher"].max() < 1e-6 < 0.02 < least["stranger"].min()


@pytest.mark.parametrize("norm", [0.3, 1.5, 3.2, 6.0])
def test_overlaps_against_an_integral_in_the_plane(norm, rng):
    units = rng.standard_normal((1, 4, 6))
    units *= norm / np.linalg.norm(units, axis=-1, keepdims=True) * np.array([0.5, 1, 1, 1.5])[:, None]
    found = tanh_overlaps(units, tolerance=1e-9)[0]
    for i, j in [(0, 1), (1, 2), (2, 3), (0, 3)]:
        # The series stops with at most 1e-9 to go; the integrals in the plane are good to 1e-12 at this step.
        assert found[i, j] == pytest.approx(plane_integral(units[0, i], units[0, j]), abs=1e-9)
    assert found[1, 1] == pytest.approx(plane_integral(units[0, 1], units[0, 1]), abs=1e-9)
    wrong = units[0, 0] * 1.05
    assert abs(found[0, 1] - plane_integral(wrong, units[0, 1])) > 1e-5 * abs(found[0, 1])


def test_overlaps_of_parallel_units():
    u = np.array([1.0, 2.0, 0.5])
    found = tanh_overlaps(np.stack([u, -u, 0.3 * u])[None], tolerance=1e-9)[0]
    assert found[0, 1] == pytest.approx(-found[0, 0], abs=1e-12)
    assert found[0, 2] == pytest.approx(plane_integral(u, 0.3 * u), abs=1e-9)
    with pytest.raises(ValueError, match=r"nearly parallel.*> 1e-09"):
        tanh_overlaps(np.stack([10 * u, 10 * u + [0, 0, 1e-3]])[None] / 3, tolerance=1e-9)
    with pytest.raises(ValueError, match=r"at most 20, got 45\.8"):
        tanh_overlaps(20 * u[None, None], tolerance=1e-9)


def test_population_moments_against_a_large_sample(rng):
    draws = draw_teachers(SMALL, 4, seeds=[5])
    for variance in (1.0, 0.5):
        x = math.sqrt(variance) * rng.standard_normal((1, 200_000, 4))
        exact, sample = population_moments(draws, variance=variance), sample_moments(draws.features(x), draws.labels(x))
        # Entries are means of 2e5 numbers of size at most 1 (5 with the label): 4.5 standard errors.
        assert np.abs(exact.moment - sample.moment).max() < 4.5 / math.sqrt(200_000)
        assert np.abs(exact.cross - sample.cross).max() < 4.5 * np.abs(draws.outer).sum() / math.sqrt(200_000)
        assert np.abs(exact.power - sample.power).max() < 4.5 * np.abs(draws.outer).sum() ** 2 / math.sqrt(200_000)
    assert np.abs(population_moments(draws).moment - exact.moment).max() > 0.05  # the variance matters
    with pytest.raises(ValueError, match="variance must be positive, got 0"):
        population_moments(draws, variance=0)


def by_hand(draws, lam, s):
    """Moments over all pairs of one seed, by two loops."""
    points = []
    for i in range(draws.n):
        for j in range(draws.n):
            x = lam * draws.x[s, i] + (1 - lam) * draws.x[s, j]
            feature = np.tanh(draws.first[s] @ x)
            clean = draws.outer[s] @ np.tanh(draws.hidden[s] @ x)
            points.append((feature, lam * draws.y[s, i] + (1 - lam) * draws.y[s, j], clean))
    return (np.array(part) for part in zip(*points, strict=True))


@pytest.mark.parametrize("lam", [0.5, 0.2, 1.0])
def test_pair_moments_by_hand(lam):
    draws = draw_teachers(SMALL, 6, seeds=[0, 1])
    features, mixed, clean = by_hand(draws, lam, 1)
    for labels, y in (("mixup", mixed), ("true", clean)):
        found = labelled_moments(draws, ((lam,), (1.0,)), inputs="pairs", labels=labels)
        assert np.allclose(found.moment[1], features.T @ features / 36, atol=1e-13)
        assert np.allclose(found.cross[1], features.T @ y / 36, atol=1e-13)
        assert found.power[1] == pytest.approx((y**2).mean(), abs=1e-13)
    if lam == 1:  # all pairs at λ = 1 are the examples, n times over
        erm = labelled_moments(draws, MIDPOINT, inputs="originals", labels="true")
        assert np.allclose(erm.moment, found.moment, atol=1e-13) and np.allclose(erm.cross, found.cross, atol=1e-13)


def test_random_lambda_is_a_mean_over_lambda(rng):
    draws = draw_teachers(SMALL, 5, seeds=[0, 1])
    by_rule = labelled_moments(draws, BetaLaw(1.0).rule(16), inputs="pairs", labels="mixup")
    finer = labelled_moments(draws, BetaLaw(1.0).rule(40), inputs="pairs", labels="mixup")
    assert np.abs(by_rule.moment - finer.moment).max() < 1e-8
    u = rng.random(2000)
    drawn = labelled_moments(draws, (u, np.full(2000, 1 / 2000)), inputs="pairs", labels="mixup")
    spread = np.abs(by_rule.moment - drawn.moment).max()
    assert spread < 4.5 / math.sqrt(2000)  # entries of size at most 1
    ends = labelled_moments(draws, ((0.0, 1.0), (0.5, 0.5)), inputs="pairs", labels="mixup")
    assert np.abs(by_rule.moment - ends.moment).max() > 1e-2


def test_shuffled_noise_is_the_same_noise_elsewhere():
    draws, lam = draw_teachers(SMALL, 7, seeds=[0, 1]), 0.3
    first, second = pairs(draws)
    x = lam * first + (1 - lam) * second
    noise = lam * draws.labels(first) + (1 - lam) * draws.labels(second) - draws.labels(x)
    square, moved = noise.reshape(2, 7, 7), teacher._shuffled(noise, draws).reshape(2, 7, 7)
    assert not moved[:, np.arange(7), np.arange(7)].any()  # self-pairs have no noise
    above = np.triu_indices(7, 1)
    for s in range(2):
        there, back = square[s][above], square[s].T[above]
        found, found_back = moved[s][above], moved[s].T[above]
        # The same values less their mean in another order, and the order of the mirrored pairs is the same one.
        order = np.argsort(there)[np.argsort(np.argsort(found))]
        assert np.allclose(found, there[order] - there.mean(), atol=1e-14)
        assert np.allclose(found_back, back[order] - back.mean(), atol=1e-14)
        assert (order != np.arange(21)).mean() > 0.5
        assert abs(there.mean()) > 1e-3 and abs(there.mean() - back.mean()) > 1e-4  # centring, and twice, matters
    true, shuffled = (
        labelled_moments(draws, ((lam,), (1.0,)), inputs="pairs", labels=labels) for labels in ("true", "shuffled")
    )
    by_rows = sample_moments(draws.features(x), draws.labels(x) + moved.reshape(2, 49))
    assert np.array_equal(true.moment, shuffled.moment)
    assert np.allclose(by_rows.cross, shuffled.cross, atol=1e-14) and not np.allclose(true.cross, by_rows.cross)


def test_fresh_inputs_have_the_laws_that_are_said(rng):
    draws = draw_teachers(TeacherTask(num_inputs=3, width=2, num_features=4), 60, seeds=range(4))
    first, second = teacher._fresh_pairs(draws)
    at = (0.3 * first + 0.7 * second).reshape(4, 60, 60, 3)
    i, j = np.triu_indices(60, 1)
    # 4·1770·3 independent squares; standard error of their mean √2/√21240 of the variance; 4.5 of them.
    assert abs(np.square(at[:, i, j]).mean() / (0.3**2 + 0.7**2) - 1) < 4.5 * math.sqrt(2 / 21240)
    own = at[:, np.arange(60), np.arange(60)]
    assert abs(np.square(own).mean() - 1) < 4.5 * math.sqrt(2 / 720)
    half = (first + second).reshape(4, 60, 60, 3)
    assert np.array_equal(half, half.swapaxes(1, 2))  # at λ = 1/2, (i, j) and (j, i) are one input
    assert len(np.unique(half[0, ..., 0])) == 60 * 61 // 2
    # As inputs, n(n + 1)/2 points of the test law come near its moments, and mixed ones do not.
    test = population_moments(draws)
    fresh = labelled_moments(draws, MIDPOINT, inputs="fresh", labels="true")
    mixed = labelled_moments(draws, MIDPOINT, inputs="fresh pairs", labels="true")
    assert np.abs(fresh.moment - test.moment).max() < 4.5 / math.sqrt(1830) < np.abs(mixed.moment - test.moment).max()


def test_bad_input_is_refused():
    draws = draw_teachers(SMALL, 4, seeds=[0])
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        draw_teachers(SMALL, 1, seeds=[0])
    with pytest.raises(ValueError, match="distinct"):
        draw_teachers(SMALL, 4, seeds=[0, 0])
    with pytest.raises(ValueError, match="first_std must be positive, got 0"):
        TeacherTask(first_std=0)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        TeacherTask(width=0)
    for lender in ("teacher", "stranger"):
        with pytest.raises(ValueError, match="a student of 3 features cannot borrow 5"):
            TeacherTask(num_features=3, borrowed_from=lender)
    with pytest.raises(ValueError, match=r"borrowed_from must be one of .*, got 'twin'"):
        TeacherTask(borrowed_from="twin")
    for lam in (-0.1, 1.2, math.nan):
        with pytest.raises(ValueError, match=r"λ must lie in \[0, 1\]"):
            labelled_moments(draws, ((lam,), (1.0,)), inputs="pairs", labels="mixup")
    with pytest.raises(ValueError, match="must be a probability"):
        labelled_moments(draws, ((0.5, 0.2), (0.5, 0.2)), inputs="pairs", labels="mixup")
    with pytest.raises(ValueError, match="inputs must be one of"):
        labelled_moments(draws, MIDPOINT, inputs="all", labels="mixup")
    with pytest.raises(ValueError, match="are not mixed"):
        labelled_moments(draws, MIDPOINT, inputs="fresh", labels="mixup")


# ---------------------------------------------------------------------------------------------------------------------
# Statements of 15_is_it_noise


def test_prop_no_turn():
    """Part 1 on toys, part 3, and that the conditions of both are needed."""
    task = TeacherTask(num_inputs=5, width=4, num_features=30, borrowed_from="teacher")
    draws, times = draw_teachers(task, 6, seeds=range(5)), np.arange(0, 3000, 7)
    best = np.zeros((5, 30))
    best[:, :4] = draws.outer
    test = population_moments(draws, tolerance=1e-10)
    top = np.linalg.eigvalsh(test.moment)[:, -1:]
    start = 0.5 * draws.start
    for inputs in ("pairs", "fresh", "originals"):
        train = labelled_moments(draws, MIDPOINT, inputs=inputs, labels="true")
        weights = weights_at(train.moment, train.cross, start, times, learning_rate=0.1, discrete=True)
        distance = np.linalg.norm(weights - best[:, None], axis=-1)
        assert (np.diff(distance, axis=1) <= 1e-12).all()
        found = risk(weights, test.moment, test.cross, test.power)
        assert (found <= top * distance**2 + 1e-9).all()
    # The risk itself rises on the way, on the originals in this toy.
    assert (np.diff(found, axis=1) > 1e-3).any()
    # The limit: ERM has n = 6 < d, so the null space keeps its part of θ_0 - θ°.
    values, vectors = spectrum(train.moment)
    kept = (vectors * (values == 0)[:, None]) @ (vectors.swapaxes(1, 2) @ (start - best)[..., None])
    limit = (kept.swapaxes(1, 2) @ test.moment @ kept)[:, 0, 0]
    far = weights_at(train.moment, train.cross, start, [1e9], learning_rate=0.1)
    assert np.allclose(risk(far, test.moment, test.cross, test.power)[:, 0], limit, atol=1e-8) and limit.min() > 1e-3
    # Part 3, and its two conditions: noise, or another law of inputs, and the teacher outside.
    outside = draw_teachers(TeacherTask(num_inputs=5, width=4, num_features=30), 6, seeds=range(5))
    test = population_moments(outside, tolerance=1e-12)
    flow = weights_at(test.moment, test.cross, start, times, learning_rate=0.1, discrete=True)
    assert (np.diff(risk(flow, test.moment, test.cross, test.power), axis=1) <= 1e-12).all()
    for labels in ("true", "mixup"):
        train = labelled_moments(outside, MIDPOINT, inputs="pairs", labels=labels)
        run = weights_at(train.moment, train.cross, 0 * start, times, learning_rate=0.1, discrete=True)
        found = risk(run, test.moment, test.cross, test.power)
        assert (found[:, -1] > 1.05 * found.min(1)).any()


@pytest.mark.parametrize("m", [0.0, 1e-7, 1e-5])
def test_prop_no_turn_leaves_the_risk_free_to_rise(m):
    """Part 2: descent on the four points of the example, step by step; then test moments that commute with M."""
    x = np.array([[a, b * math.sqrt(m)] for a in (1, -1) for b in (1, -1)])
    best, sigma = np.array([2.0, 3.0]), np.array([[1, 0.98], [0.98, 1]])
    start = best + np.array([1.0, -1.0])
    labels, theta, risks, distances = x @ best, start, [], []
    for _ in range(101):
        error = theta - best
        risks.append(error @ sigma @ error)
        distances.append(error @ error)
        theta = theta - 0.1 * x.T @ (x @ theta - labels) / 4
    assert (np.diff(distances) <= 1e-13).all()  # the distance falls while the risk rises
    assert risks[0] == pytest.approx(0.04, abs=1e-12) and risks[100] > 0.99
    moment = x.T @ x / 4
    end = weights_at(moment, moment @ best, start, [1e10], learning_rate=0.1)[0] - best
    assert end @ sigma @ end == pytest.approx(0.0 if m else 1.0, abs=1e-9)
    # Commuting: the same run, its risk under any diagonal test moment, and M = Σ with the teacher inside.
    path = weights_at(moment, moment @ best, start, range(300), learning_rate=0.1, discrete=True) - best
    for diagonal in ([1.0, 1.0], [0.01, 5.0], [5.0, 0.01]):
        assert (np.diff((path**2) @ diagonal) <= 1e-12).all()


def test_with_the_teacher_inside_true_labels_turn_at_few_inputs_only():
    """At the 210 mixed inputs, more than the 100 features, no draw turns; at the 20 examples some end well above."""
    draws = draw_teachers(TeacherTask(num_features=100, first_std=0.5, borrowed_from="teacher"), 20, seeds=range(12))
    test, times = population_moments(draws), np.unique(np.round(np.geomspace(1, 10_001, 30)) - 1)
    rise = {}
    for inputs in ("pairs", "originals"):
        train = labelled_moments(draws, MIDPOINT, inputs=inputs, labels="true")
        weights = weights_at(train.moment, train.cross, 0.25 * draws.start, times, learning_rate=0.1, discrete=True)
        found = risk(weights, test.moment, test.cross, test.power)
        rise[inputs] = found[:, -1] / found.min(1) - 1
    # Exactly zero: the last epoch is the least. At the examples prop-no-turn forbids no rise.
    assert (rise["pairs"] == 0).all() and rise["originals"].max() > 0.05


def test_prop_label_noise(rng):
    task = TeacherTask(num_inputs=5, width=4, num_features=20)
    draws, times = draw_teachers(task, 6, seeds=[0, 1, 2]), np.array([1, 10, 100, 1000])
    test = population_moments(draws, tolerance=1e-12)
    true, mixed = (labelled_moments(draws, MIDPOINT, inputs="pairs", labels=kind) for kind in ("true", "mixup"))
    best = np.linalg.solve(test.moment, test.cross[..., None])[..., 0]

    def expected(cross):
        """Risk averaged over the start: from zero, plus 0.3² tr(ΣE_t²) with E_t a matrix power."""
        mean = weights_at(true.moment, cross, np.zeros((3, 20)), times, learning_rate=0.1, discrete=True)
        left = [np.linalg.matrix_power(np.eye(20) - 0.1 * true.moment, int(t)) for t in times]
        start = 0.09 * np.stack([np.trace(test.moment @ e @ e, axis1=1, axis2=2) for e in left], axis=1)
        return risk(mean, test.moment, test.cross, test.power) + start, mean

    with_noise, _ = expected(mixed.cross)
    without, mean = expected(true.cross)
    noise = weights_at(
        true.moment, mixed.cross - true.cross, np.zeros((3, 20)), times, learning_rate=0.1, discrete=True
    )
    square = ((noise @ test.moment) * noise).sum(-1)
    product = 2 * ((noise @ test.moment) * (mean - best[:, None])).sum(-1)
    assert np.allclose(with_noise - without, square + product, atol=1e-9)
    assert np.abs(product).max() > 0.1 * square.max()  # leaving it out would show
    parts = risk_parts(
        true.moment, true.cross, mixed.cross - true.cross, times, learning_rate=0.1, start_std=0.3,
        moment_test=test.moment, best=best, discrete=True,
    )  # fmt: skip
    assert np.allclose(parts["unlearnt x noise"] + parts["sample x noise"], product, atol=1e-9)
    # Mixup's noise on the fifteen pairs i < j, which at λ = 1/2 are inputs of equal weight; the mean over all rotations
    # of its values, in which each input has each value once, exactly.
    first, second = pairs(draws)
    features = draws.features(0.5 * (first + second))
    z = 0.5 * (draws.labels(first) + draws.labels(second)) - draws.labels(0.5 * (first + second))
    z = z.reshape(3, 6, 6)[:, *np.triu_indices(6, 1)]

    def products(values):
        """The second term for each rotation ``[15, 3 draws, T]``."""
        found = []
        for shift in range(15):
            table = np.zeros((3, 6, 6))
            table[:, *np.triu_indices(6, 1)] = np.roll(values, shift, axis=1)
            cross = sample_moments(features, (table + table.swapaxes(1, 2)).reshape(3, 36)).cross
            pushed = weights_at(true.moment, cross, np.zeros((3, 20)), times, learning_rate=0.1, discrete=True)
            found.append(2 * ((pushed @ test.moment) * (mean - best[:, None])).sum(-1))
        return np.array(found)

    centred = products(z - z.mean(1, keepdims=True))
    assert np.abs(centred.mean(0)).max() < 1e-11 < 1e-3 < np.abs(centred).max()  # rounding against single terms
    assert np.abs(products(z).mean(0)).max() > 1e-3  # not without the centring
    # The labels "shuffled" are one such permutation: in the mean over many they leave no noise at any pair.
    noise = np.zeros((3, 6, 6))
    noise[:, *np.triu_indices(6, 1)] = z
    noise = (noise + noise.swapaxes(1, 2)).reshape(3, 36)[:1]
    many = teacher._shuffled(np.repeat(noise, 4000, 0), dataclasses.replace(draws, seeds=tuple(range(4000))))
    # 15 pairs, 4.5 standard errors each: false alarm 1e-4; without centring the mean is off by more than six.
    error = z[0].std() / math.sqrt(4000)
    assert np.abs(many.mean(0)).max() < 4.5 * error < 6 * error < abs(z[0].mean())
