"""The stochastic toy against its closed form, against autograd one seed at a time, and when it diverges."""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom

from labelaug.data.teacher import TeacherDraws, TeacherTask, draw_teachers, labelled_moments, population_moments
from labelaug.paths import PROJECT
from labelaug.theory.population import BetaLaw
from labelaug.theory.random_features import decay, risk, spectrum, weights_at
from labelaug.training.toy import LAM, PARTNER, ToySetting, ToyTraining, train_toy

SMALL = TeacherTask(num_inputs=4, width=3, num_features=15)
COMPANY = (
    ToySetting(),
    ToySetting(lam=0.5),
    ToySetting(lam=0.2),
    ToySetting(alpha=1.0),
    ToySetting(alpha=0.4),
    ToySetting(lam=0.5, switch=30),
    ToySetting(alpha=1.0, switch=45),
    ToySetting(lam=0.3, pairing="all"),
    ToySetting(alpha=1.0, pairing="all"),
)


def closed_form(draws, lam, times, *, start, rate):
    labels = ("originals", "true") if lam is None else ("pairs", "mixup")
    train = labelled_moments(draws, ((lam or 0.0,), (1.0,)), inputs=labels[0], labels=labels[1])
    return weights_at(train.moment, train.cross, start, times, learning_rate=rate, discrete=True)


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_runs_without_chance_are_the_closed_form(factor):
    draws = draw_teachers(TeacherTask(num_features=40), 8, seeds=range(3))
    training = ToyTraining(epochs=400, every=100, learning_rate=0.1 / (2 * factor), loss_factor=factor, start_std=0.3)
    lams = {ToySetting(): None, ToySetting(lam=0.5, pairing="all"): 0.5, ToySetting(lam=0.15, pairing="all"): 0.15}
    runs = train_toy(draws, list(lams), training)
    assert runs.epochs == (0, 100, 200, 300, 400) and runs.weights.shape == (3, 3, 5, 40)
    for i, lam in enumerate(lams.values()):
        exact = closed_form(draws, lam, runs.epochs, start=0.3 * draws.start, rate=0.1)
        # The same iteration by eigenvectors: 400 float64 steps lose far less than 1e-9.
        assert np.abs(runs.weights[:, i] - exact).max() < 1e-9
        other = closed_form(draws, lam, runs.epochs, start=0.3 * draws.start, rate=0.101)
        assert np.abs(runs.weights[:, i] - other).max() > 1e-4


def by_autograd(draws, s, setting, training):
    """One seed, one setting: torch.nn.Linear and torch.optim, from the same streams."""
    seed = draws.seeds[s]
    partner_rng, lam_rng = np.random.default_rng([seed, PARTNER]), np.random.default_rng([seed, LAM])
    first, x, y = (torch.as_tensor(a[s]) for a in (draws.first, draws.x, draws.y))
    layer = torch.nn.Linear(len(first), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(training.start_std * torch.as_tensor(draws.start[s])[None])
    optimiser = torch.optim.SGD(layer.parameters(), lr=training.learning_rate)
    for epoch in range(training.epochs):
        partner, u = torch.from_numpy(partner_rng.permutation(len(x))), lam_rng.random()
        inputs, targets = x, y
        if setting.mixes and (setting.switch is None or epoch < setting.switch):
            lam = setting.lam if setting.alpha is None else beta.ppf(u, setting.alpha, setting.alpha)
            own, other = torch.arange(len(x)), partner
            if setting.pairing == "all":
                own, other = (part.flatten() for part in torch.meshgrid(own, own, indexing="ij"))
            inputs = lam * x[own] + (1 - lam) * x[other]
            targets = lam * y[own] + (1 - lam) * y[other]
        loss = training.loss_factor * (layer(torch.tanh(inputs @ first.T))[:, 0] - targets).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.weight.detach()[0].numpy()


@pytest.mark.parametrize("setting", COMPANY, ids=str)
def test_every_setting_is_autograd_one_at_a_time(setting):
    draws, training = draw_teachers(SMALL, 6, seeds=[4, 9]), ToyTraining(epochs=60, every=60, start_std=0.5)
    found = train_toy(draws, COMPANY, training).weights[:, COMPANY.index(setting), -1]
    for s in range(2):
        # 60 float64 steps in another order of summation.
        assert np.abs(found[s] - by_autograd(draws, s, setting, training)).max() < 1e-11
    other = by_autograd(draws, 0, setting, replace(training, loss_factor=0.55))
    assert np.abs(found[0] - other).max() > 1e-4


def test_member_alone_equals_member_in_company():
    draws, training = draw_teachers(SMALL, 6, seeds=[3, 7, 11]), ToyTraining(epochs=1100, every=50)
    company, alone = train_toy(draws, COMPANY, training), draw_teachers(SMALL, 6, seeds=[7])
    for i, setting in enumerate(COMPANY):
        one = train_toy(alone, [setting], training)
        # Kernels may differ with the size of the batch; the steps contract, so rounding does not pile up.
        assert np.allclose(one.weights[0, 0], company.weights[1, i], rtol=0, atol=1e-11), setting
    longer = train_toy(draws, COMPANY[:4], replace(training, epochs=2100))
    assert np.allclose(longer.weights[:, :, :23], company.weights[:, :4], rtol=0, atol=1e-11)
    assert not np.allclose(company.weights[0], company.weights[1], atol=1e-2)


def test_single_precision_is_enough_for_the_risk():
    draws, training = draw_teachers(TeacherTask(), 20, seeds=range(3)), ToyTraining(epochs=2000, every=500)
    test, settings = population_moments(draws), COMPANY[:4]
    double, single = (
        train_toy(draws, settings, training, dtype=dtype).weights for dtype in (torch.float64, torch.float32)
    )
    found = [risk(w, test.moment[:, None], test.cross[:, None], test.power[:, None]) for w in (double, single)]
    # 2^-24 a rounding, a few thousand of them, on weights of order one in 100 coordinates.
    assert 0 < np.abs(found[1] / found[0] - 1).max() < 1e-3


@pytest.mark.parametrize("setting", [ToySetting(lam=0.5), ToySetting(lam=0.2), ToySetting(alpha=1.0)], ids=str)
def test_prop_permutation_mean(setting):
    """The mean over many pairings of one draw is the run on all pairs; without self-pairs it would not be."""
    copies, one = 1500, draw_teachers(SMALL, 4, seeds=[2])
    fields = (one.hidden, one.outer, one.first, one.start, one.x, one.y)
    many = TeacherDraws(tuple(range(copies)), *(np.repeat(array, copies, axis=0) for array in fields))
    runs = train_toy(many, [setting], ToyTraining(epochs=40, every=8, start_std=0.5))
    law = ((setting.lam,), (1.0,)) if setting.alpha is None else BetaLaw(1.0).rule(16)
    train = labelled_moments(one, law, inputs="pairs", labels="mixup")
    start, found = 0.5 * one.start, runs.weights[:, 0]
    exact = weights_at(train.moment, train.cross, start, runs.epochs, learning_rate=0.1, discrete=True)[0]
    error = found.std(axis=0, ddof=1) / math.sqrt(copies)
    # 75 correlated t-values; 5 standard errors: odds below 75 · 6e-7 = 5e-5.
    assert (np.abs(found.mean(0) - exact)[1:] < 5 * error[1:] + 1e-12).all()
    # E R = R(E θ) + tr(Σ Cov θ), an identity of the sample with its own moments.
    test = population_moments(one, tolerance=1e-12)
    risks = risk(found, test.moment, test.cross, test.power)
    mean = risk(found.mean(0)[None], test.moment, test.cross, test.power)[0]
    last = np.cov(found[:, -1].T, bias=True)
    assert risks[:, -1].mean() == pytest.approx(mean[-1] + np.trace(test.moment[0] @ last), abs=1e-9)
    # Negative control: the closed form of distinct pairs only is off by many standard errors.
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    nodes = zip(*law, strict=True)
    moment, cross = np.zeros((15, 15)), np.zeros(15)
    for lam, weight in nodes:
        for i, j in pairs:
            feature = np.tanh(one.first[0] @ (lam * one.x[0, i] + (1 - lam) * one.x[0, j]))
            moment += weight * np.outer(feature, feature) / len(pairs)
            cross += weight * feature * (lam * one.y[0, i] + (1 - lam) * one.y[0, j]) / len(pairs)
    wrong = weights_at(moment, cross, start[0], runs.epochs, learning_rate=0.1, discrete=True)
    assert (np.abs(found.mean(0) - wrong) / (error + 1e-12))[1:].max() > 10


def test_prop_forgetting(rng):
    draws, times = draw_teachers(SMALL, 6, seeds=[0, 1]), np.array([0, 3, 30, 300, 3000])
    test = population_moments(draws, tolerance=1e-12)
    for lam in (None, 0.5, 0.2):
        inputs, labels = ("originals", "true") if lam is None else ("pairs", "mixup")
        train = labelled_moments(draws, ((lam or 0.0,), (1.0,)), inputs=inputs, labels=labels)
        values, vectors = spectrum(train.moment)
        along = (vectors * (test.moment @ vectors)).sum(1)
        kept = decay(values, times, learning_rate=0.1, discrete=True)
        term = (kept**2 * along[:, None]).sum(-1)
        assert (np.diff(term, axis=1) <= 1e-12).all()
        # The mean over the start, exactly: ± each axis of length √d has the moments of N(0, I).
        starts = 0.7 * math.sqrt(15) * np.concatenate([np.eye(15), -np.eye(15)])[:, None]
        runs = weights_at(train.moment, train.cross, starts, times, learning_rate=0.1, discrete=True)
        zero = weights_at(train.moment, train.cross, np.zeros((2, 15)), times, learning_rate=0.1, discrete=True)
        mean = risk(runs, test.moment, test.cross, test.power).mean(0)
        learnt = risk(zero, test.moment, test.cross, test.power)
        assert np.allclose(mean, learnt + 0.49 * term, atol=1e-9)
        assert not np.allclose(mean, learnt + 0.49 * term / 2, atol=1e-3)
        projection = (vectors * (values == 0)[:, None]) @ vectors.swapaxes(1, 2)
        limit = np.trace(test.moment @ projection, axis1=1, axis2=2)
        far = decay(values, np.array([1e9]), learning_rate=0.1)[:, 0]
        assert np.allclose((far**2 * along).sum(-1), limit, atol=1e-9)
        assert ((values == 0).sum(1) >= 15 - 6).all() == (lam is None)


def test_divergence_is_reported_and_stays_apart():
    wild = TeacherTask(first_std=1.0)
    draws, settings = draw_teachers(wild, 20, seeds=range(6)), [ToySetting(), ToySetting(lam=0.5), ToySetting(lam=0.1)]
    runs = train_toy(draws, settings, ToyTraining(epochs=1500, every=50, loss_factor=1.0, start_std=1.0))
    erm = labelled_moments(draws, ((1.0,), (1.0,)), inputs="originals", labels="true")
    unstable = 0.2 * np.linalg.eigvalsh(erm.moment)[:, -1] >= 2
    assert unstable.all()  # the paper's squared error on all N(0, 1) weights
    assert np.array_equal(~runs.kept(settings[0]), unstable)
    assert (runs.diverged[:, 0] % 50 == 0).all() and (runs.diverged[:, 0] > 0).all()
    for s in range(6):
        at = runs.epochs.index(runs.diverged[s, 0])
        assert np.isnan(runs.weights[s, 0, at:]).all() and np.isfinite(runs.weights[s, 0, :at]).all()
    with pytest.raises(ValueError, match=r"learning_rate 0\.2 with μ_max 1\d\.\d+, product [23]\.\d+"):
        weights_at(erm.moment, erm.cross, draws.start, [10], learning_rate=0.2, discrete=True)
    # A tame seed in the company of wild ones is what it is alone.
    mixed = replace(draws, first=np.concatenate([draws.first[:5], 0.2 * draws.first[5:]]))
    training = ToyTraining(epochs=600, every=200, loss_factor=1.0, start_std=1.0)
    company = train_toy(mixed, settings, training)
    assert company.diverged[5].tolist() == [0, 0, 0] and (company.diverged[:5, 0] > 0).all()
    alone = TeacherDraws((5,), *(getattr(mixed, f)[5:] for f in ("hidden", "outer", "first", "start", "x", "y")))
    assert np.allclose(company.weights[5:], train_toy(alone, settings, training).weights, atol=1e-11)


def test_bad_input_is_refused():
    draws = draw_teachers(SMALL, 4, seeds=[0])
    for lam in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"λ must lie in \[0, 1\], got"):
            ToySetting(lam=lam)
    with pytest.raises(ValueError, match=r"fixed or random, got lam=0\.5 and alpha=1"):
        ToySetting(lam=0.5, alpha=1.0)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        ToySetting(alpha=0.0)
    with pytest.raises(ValueError, match="switch is a number of epochs"):
        ToySetting(switch=10)
    with pytest.raises(ValueError, match="pairing must be one of"):
        ToySetting(lam=0.5, pairing="batch")
    for change in ({"epochs": 0}, {"every": 0}, {"learning_rate": 0}, {"loss_factor": -1}, {"start_std": -0.1}):
        with pytest.raises(ValueError, match=f"got .*{next(iter(change.values()))}"):
            ToyTraining(**change)
    with pytest.raises(ValueError, match="settings must be distinct"):
        train_toy(draws, [ToySetting(), ToySetting()], ToyTraining(epochs=1))
    for name in ("x", "y", "first", "start"):  # no run has diverged where the data are broken
        broken = getattr(draws, name).copy()
        broken.flat[0] = math.nan
        with pytest.raises(ValueError, match=f"draws must be finite, and {name} has 1 values that are not"):
            train_toy(replace(draws, **{name: broken}), [ToySetting()], ToyTraining(epochs=1))
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        train_toy(replace(draws, x=draws.x[:, :1], y=draws.y[:, :1]), [ToySetting()], ToyTraining(epochs=1))


def test_erm_is_flat_and_half_rises():
    """The event is fixed beforehand: the risk at 10,000 is more than 1 % above that at 1000.

    Under "at most half of the draws rise" risers are at most Bin(40, ½): 30 or more have probability 1.1e-3, the
    false-alarm rate. With nine in ten rising the power is above .998.
    """
    assert binom.sf(29, 40, 0.5) < 1.2e-3 and binom.sf(29, 40, 0.9) > 0.998
    draws = draw_teachers(TeacherTask(), 20, seeds=range(100, 140))
    test, start = population_moments(draws), 0.25 * draws.start
    times = [50, 1000, 10_000]
    rise = {}
    for lam in (None, 0.5):
        weights = closed_form(draws, lam, times, start=start, rate=0.1)
        found = risk(weights, test.moment, test.cross, test.power)
        rise[lam] = found[:, 2] / found[:, 1] - 1
    assert (rise[None] > 0.01).sum() == 0 and (rise[0.5] > 0.01).sum() >= 30


def test_benchmark_times_the_same_computation():
    spec = importlib.util.spec_from_file_location("benchmarks_toy", PROJECT / "benchmarks" / "toy.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    draws, training = draw_teachers(TeacherTask(), 20, seeds=[0, 1]), ToyTraining(epochs=200)
    ours = train_toy(draws, [ToySetting()], training, dtype=torch.float32).weights[1, 0, -1]
    theirs = benchmark.autograd_loop(draws, 1, ToySetting(), training, epochs=200, generator=torch.Generator())
    assert np.abs(ours - theirs.numpy()).max() < 1e-4  # single precision, 200 steps
    # Mixup's random runs agree in the mean; here: that the loop mixes at all, and towards the same place.
    generator = torch.Generator().manual_seed(0)
    mixed = benchmark.autograd_loop(draws, 1, ToySetting(lam=0.5), training, epochs=200, generator=generator).numpy()
    exact = closed_form(draws, 0.5, [200], start=0.25 * draws.start, rate=0.1)[1, 0]
    assert np.linalg.norm(mixed - exact) < 0.5 * np.linalg.norm(mixed - ours)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train_toy(draw_teachers(SMALL, 4, seeds=[0]), [ToySetting()], ToyTraining(epochs=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
