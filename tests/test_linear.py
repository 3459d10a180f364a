"""The trainer of all linear models at once, held against one model at a time by autograd and torch.optim."""

import importlib.util
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch.utils.data import DataLoader, TensorDataset

from labelaug.data.synthetic import Box, TwoFeatureTask, sample
from labelaug.losses import binary_soft_cross_entropy, l2_penalty
from labelaug.mixing import mix
from labelaug.paths import PROJECT
from labelaug.targets import binary_targets
from labelaug.training import linear
from labelaug.training.linear import (
    INIT,
    LAM,
    METHODS,
    ORDER,
    PARTNER,
    LinearSetting,
    LinearTraining,
    method_setting,
    strength_sweep,
    train_linear,
)

F64 = torch.float64
SETTINGS = {
    "erm": LinearSetting(0.05),
    "weight decay": LinearSetting(0.05, weight_decay=0.1),
    "label smoothing": LinearSetting(0.05, smoothing=0.2),
    "mixup": LinearSetting(0.05, mixup_alpha=0.5),
    "mixup, another alpha": LinearSetting(0.05, mixup_alpha=4.0),
    "decoupled decay": LinearSetting(0.05, decoupled_decay=0.3),
    "smoothing and weight decay": LinearSetting(0.05, smoothing=0.2, weight_decay=0.1),
    "mixup and weight decay": LinearSetting(0.05, mixup_alpha=0.5, weight_decay=0.1),
    "mixup and decoupled decay": LinearSetting(0.05, mixup_alpha=0.5, decoupled_decay=0.3),
    "mixup and smoothing": LinearSetting(0.05, mixup_alpha=0.5, smoothing=0.2),
    "everything": LinearSetting(0.02, smoothing=0.3, mixup_alpha=1.0, weight_decay=0.05, decoupled_decay=0.1),
    "negative smoothing": LinearSetting(0.05, smoothing=-0.3),
    "mixup and negative smoothing": LinearSetting(0.05, mixup_alpha=0.5, smoothing=-0.3),
    "slower": LinearSetting(0.001, smoothing=0.2),
    "faster": LinearSetting(0.5, smoothing=0.2),
}
COMPANY = list(SETTINGS.values())
TRAINING = LinearTraining(epochs=20, batch_size=5)  # 23 examples: five steps an epoch, the last of three examples


def data(n=23, d=6, seed=0, dtype=F64):
    """Overlapping classes: the minimiser is finite, so that no weight runs away."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    return x, (x[:, 0] + torch.randn(n, generator=generator, dtype=dtype) > 0).long()


def one_at_a_time(x, labels, setting, *, seed, training):
    """What a reader would write: one model, mixed inputs formed, autograd, torch's own optimiser.

    Only the draws are taken over: one stream of the seed for each purpose.
    """
    n, d = x.shape
    order, partner, lam, start = (np.random.default_rng([seed, p]) for p in (ORDER, PARTNER, LAM, INIT))
    bound = training.init_scale / d**0.5
    weight = torch.tensor(start.uniform(-bound, bound, d), dtype=x.dtype, requires_grad=True)
    if setting.decoupled_decay:
        optimiser = torch.optim.AdamW([weight], lr=setting.learning_rate, weight_decay=setting.decoupled_decay)
    else:
        optimiser = torch.optim.Adam([weight], lr=setting.learning_rate)
    records = []
    for epoch in range(1, training.epochs + 1):
        for chosen in torch.from_numpy(order.permutation(n)).split(training.batch_size):
            inputs = x[chosen]
            targets = binary_targets(labels[chosen], smoothing=setting.smoothing, dtype=x.dtype)
            if setting.mixup_alpha is not None:
                pairs = torch.from_numpy(partner.permutation(len(chosen)))
                size = len(chosen) if training.lam_per == "example" else None
                share = torch.as_tensor(lam.beta(setting.mixup_alpha, setting.mixup_alpha, size=size), dtype=F64)
                inputs, targets = mix(inputs, share, pairs), mix(targets, share, pairs)
            loss = F.binary_cross_entropy_with_logits(inputs @ weight, targets)
            loss = loss + l2_penalty(weight, weight_decay=setting.weight_decay)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if epoch in training.records:
            records.append(weight.detach().clone())
    return torch.stack(records)


def close(actual, expected, relative):
    """Largest difference of two members, relative to the largest weight of each."""
    scale = expected.abs().amax(-1, keepdim=True)
    return bool(((actual - expected).abs() <= relative * scale).all())


@pytest.mark.parametrize("lam_per", ["batch", "example"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_one_at_a_time(name, lam_per):
    """After 100 steps in float64 within 1e-6 of the largest weight; in company of all other settings and two seeds.

    Both are the same sums in another order, some 1e-15 apart; 1e-6 leaves room for a gradient that passes near zero,
    where Adam's quotient magnifies its rounding.
    """
    x, labels = data()
    training = replace(TRAINING, lam_per=lam_per, record_epochs=(1, 10, 20))
    sweep = train_linear(x, labels, COMPANY, seeds=[3, 8], training=training)
    assert sweep.weights.shape == (3, 2, len(COMPANY), 6) and sweep.weights.dtype == F64
    for s, seed in enumerate((3, 8)):
        expected = one_at_a_time(x, labels, SETTINGS[name], seed=seed, training=training)
        member = sweep.weights[:, s, COMPANY.index(SETTINGS[name])]
        assert close(member, expected, 1e-6)
        # Neither another setting nor another seed comes near.
        others = sweep.weights[-1].flatten(0, 1)
        assert sum(close(other, expected[-1], 1e-3) for other in others) == 1


def test_each_seed_may_have_its_own_data():
    """x [seeds, n, d] and labels [seeds, n]: seed s meets the data of row s, at both sizes of problem."""
    pairs = [data(seed=seed) for seed in (1, 2, 3)]
    x, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    for batch_size in (5, 10_000):
        training = replace(TRAINING, batch_size=batch_size)
        sweep = train_linear(x, labels, COMPANY, seeds=[4, 0, 9], training=training)
        for s, seed in enumerate((4, 0, 9)):
            expected = one_at_a_time(*pairs[s], COMPANY[9], seed=seed, training=training)
            assert close(sweep.weights[:, s, 9], expected, 1e-6)
            strange = one_at_a_time(*pairs[s - 1], COMPANY[9], seed=seed, training=training)
            assert not close(sweep.weights[:, s, 9], strange, 1e-3)


def test_shared_labels_with_own_inputs():
    """x [seeds, n, d] with labels [n]."""
    x, labels = data()
    own = torch.stack([x, x.flip(1)])
    sweep = train_linear(own, labels, COMPANY[:4], seeds=[4, 0], training=TRAINING)
    assert close(sweep.weights[:, 1, 2], one_at_a_time(x.flip(1), labels, COMPANY[2], seed=0, training=TRAINING), 1e-6)


@pytest.mark.parametrize("lam_per", ["batch", "example"])
def test_seeds_stacked_or_one_by_one(lam_per):
    """A batch as large as the data is the same computation below and above the size at which grouping changes.

    Batch 30 × 6 is small (seeds stacked), batch 10,000 × 6 is large (a seed at a time); both are full batches of 30.
    """
    x, labels = data(n=30)
    trainings = [LinearTraining(epochs=40, batch_size=batch_size, lam_per=lam_per) for batch_size in (30, 10_000)]
    stacked, single = (train_linear(x, labels, COMPANY, seeds=[1, 2, 5], training=t).weights for t in trainings)
    assert close(stacked, single, 1e-9)
    assert not close(stacked[:, :1], single[:, 1:2], 1e-3)


@pytest.mark.parametrize(("dtype", "relative"), [(F64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("lam_per", ["batch", "example"])
def test_member_alone_equals_member_in_company(dtype, relative, lam_per):
    """A setting and a seed alone meet the same draws; only the order of sums inside a matrix product may differ.

    Float32: a rounding of 6e-8 in a gradient that is 1e-2 of its terms is 6e-6 of it, and of Adam's step; all hundred
    steps in one direction would add up to some 1e-5 of a weight. A different draw gives 1e-1.
    """
    x, labels = data(dtype=dtype)
    training = replace(TRAINING, lam_per=lam_per)
    company = train_linear(x, labels, COMPANY, seeds=[3, 7, 11], training=training).weights
    for k, setting in enumerate(COMPANY):
        alone = train_linear(x, labels, [setting], seeds=[7], training=training).weights
        assert close(alone[:, 0, 0], company[:, 1, k], relative)
        assert not close(alone[:, 0, 0], company[:, 2, k], 10 * relative)


def test_order_of_settings_and_seeds_does_not_matter():
    """Members follow their setting and seed through any reordering."""
    x, labels = data()
    forward = train_linear(x, labels, COMPANY, seeds=[3, 7, 11], training=TRAINING)
    order = np.random.default_rng(0).permutation(len(COMPANY)).tolist()
    shuffled = train_linear(x, labels, [COMPANY[k] for k in order], seeds=[11, 3, 7], training=TRAINING)
    assert close(shuffled.weights, forward.weights[:, [2, 0, 1]][:, :, order], 1e-9)
    assert not close(shuffled.weights, forward.weights, 1e-3)
    assert shuffled.settings == tuple(COMPANY[k] for k in order) and shuffled.seeds == (11, 3, 7)


@pytest.mark.parametrize("lam_per", ["batch", "example"])
def test_records_and_length_leave_the_path_alone(lam_per):
    """More records, or more epochs, are the same path to the last bit."""
    x, labels = data()
    training = replace(TRAINING, lam_per=lam_per)

    def run(**change):
        return train_linear(x, labels, COMPANY, seeds=[3, 7], training=replace(training, **change))

    last, often = run(), run(record_epochs=(1, 2, 7, 20))
    longer = run(epochs=30, record_epochs=(20, 30))
    assert torch.equal(last.weights[0], often.weights[-1])
    assert torch.equal(last.weights[0], longer.weights[0])
    assert torch.equal(run(epochs=7).weights[0], often.weights[2])
    assert not torch.equal(longer.weights[0], longer.weights[1])
    assert often.epochs == (1, 2, 7, 20) and last.epochs == (20,)


def test_training_leaves_torch_alone():
    """Same numbers whatever torch's global state, which stays as it was; inputs and number of threads too."""
    x, labels = data()
    before, threads = x.clone(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # small problems use one
    try:
        torch.manual_seed(0)
        first = train_linear(x, labels, COMPANY, seeds=[3], training=TRAINING).weights
        following = torch.rand(1)
        again = train_linear(x, labels, COMPANY, seeds=[3], training=TRAINING).weights
        assert torch.get_num_threads() == threads + 1
        with pytest.raises(RuntimeError):  # torch has no sigmoid in place for integers, seen inside the one thread
            train_linear(torch.ones(23, 6, dtype=torch.int64), labels, COMPANY, seeds=[3], training=TRAINING)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), following)
    assert torch.equal(first, again)
    assert torch.equal(x, before)


def test_single_precision_agrees_loosely_with_double():
    """Float32 follows float64 to 1e-4 of the largest weight over 100 steps, for the reason above."""
    x, labels = data()
    double = train_linear(x, labels, COMPANY, seeds=[3, 7], training=TRAINING).weights
    single = train_linear(x.float(), labels, COMPANY, seeds=[3, 7], training=TRAINING).weights
    assert single.dtype == torch.float32
    assert close(single.double(), double, 1e-4)
    assert not close(single.double(), double, 1e-8)  # they are two precisions


def test_start():
    """Weights start uniform on ±scale/√d, as torch.nn.Linear's do, or at the origin; shared by a seed's settings."""
    x, labels = data(n=4, d=2_000)
    still = [LinearSetting(1e-12), LinearSetting(1e-12, weight_decay=1.0)]

    def start(scale):
        training = LinearTraining(epochs=1, batch_size=4, init_scale=scale)
        return train_linear(x, labels, still, seeds=[0, 1], training=training).weights[0]

    torch.manual_seed(0)
    linear = torch.nn.Linear(2_000, 1).weight.detach().abs()
    one, two = start(1.0), start(2.0)
    # The largest of 2,000 uniform numbers misses the outer 1 % with probability e^-20.
    assert 0.99 / 2_000**0.5 < one.abs().max() <= 1 / 2_000**0.5 and 0.99 < linear.max() * 2_000**0.5 <= 1
    assert abs((one**2).mean() * 2_000 - 1 / 3) < 4.5 * (4 / 45 / 4_000) ** 0.5  # variance of u² is 4/45
    assert close(one[:, 0], one[:, 1], 1e-8) and not close(one[0], one[1], 0.1)
    assert close(two, 2 * one, 1e-8)
    assert start(0.0).abs().max() < 1e-11  # one step of length 1e-12 from the origin


@pytest.fixture(scope="module")
def separable():
    """Forty points of the two-feature task; γ = 1 and U on [1.5, 5.5], so that some thousand steps arrive."""
    task = TwoFeatureTask(gamma=1.0, high=Box(1.5, 5.5), num_low=1, num_high=2)
    x, labels = sample(task, 40, generator=torch.Generator().manual_seed(0), dtype=F64)
    return task, x, labels


def test_arrives_at_the_minimisers(separable):
    """Full batch, 4,000 epochs: label smoothing ends at w_H = 0, ⟨w_L, a⟩ = log((2-ε)/ε), the exact minimiser of the
    sample's loss; weight decay where scipy's BFGS does, with ‖w_H‖² ≥ ½‖w‖²; ERM, without a minimiser, keeps w_H.

    Adam reaches 1e-6 of the weights. Where the gradient has died out, its quotient now and then makes a single larger
    step; the median over the records of the last 1,000 epochs does not see it.
    """
    task, x, labels = separable
    strengths, decays = (0.1, 0.3, 0.75), (0.01, 0.1)
    settings = [LinearSetting(0.05, smoothing=strength) for strength in strengths]
    settings += [LinearSetting(0.05, weight_decay=decay) for decay in decays]
    settings += [LinearSetting(0.05)]
    training = LinearTraining(epochs=4_000, batch_size=40, record_epochs=tuple(range(3_000, 4_001, 20)))
    weights = train_linear(x, labels, settings, seeds=[0, 1], training=training).weights.median(0).values

    def penalised(w, decay):
        w = torch.tensor(w, dtype=F64, requires_grad=True)
        value = binary_soft_cross_entropy(x @ w, labels.double()) + l2_penalty(w, weight_decay=decay)
        (gradient,) = torch.autograd.grad(value, w)
        return value.item(), gradient.numpy()

    for member in weights:
        smoothed, decayed, erm = member.split([len(strengths), len(decays), 1])
        for strength, weight in zip(strengths, smoothed, strict=True):
            gap = np.log((2 - strength) / strength)
            assert weight[task.high_coordinates].norm() < 1e-4 * gap
            assert weight[0].item() == pytest.approx(gap, rel=1e-4)
            assert abs(weight[0].item() - np.log(abs(1 - strength) / strength)) > 0.02  # ε all on the other class
        for decay, weight in zip(decays, decayed, strict=True):
            found = minimize(penalised, np.zeros(3), args=(decay,), jac=True, method="BFGS", options={"gtol": 1e-10})
            assert close(weight, torch.from_numpy(found.x), 1e-4)
            assert weight[task.high_coordinates].square().sum() >= 0.5 * weight.square().sum()
        assert erm[0, task.high_coordinates].norm() > 1


def test_mixup_drives_the_high_feature_out(separable):
    """The other end of the comparison: under Mixup w_H shrinks far below ERM's, on the same sample."""
    task, x, labels = separable
    settings = [LinearSetting(0.02), LinearSetting(0.02, mixup_alpha=1.0)]
    weights = train_linear(x, labels, settings, seeds=[0], training=LinearTraining(2_000, 40)).weights[-1, 0]
    erm, mixed = weights[:, task.high_coordinates].norm(dim=1)
    assert mixed < 0.2 * erm


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_is_erm(method):
    """Strength 0 is the very setting ERM, and the least strengths approach it.

    So does Mixup as α → 0 with one λ per batch: λ is 0 or 1, and a batch or its permutation has the same loss. With
    one λ per example it does not: an example may then be met twice.
    """
    x, labels = data()
    zero, least, some = (method_setting(method, strength, learning_rate=0.05) for strength in (0.0, 1e-9, 0.5))
    assert zero == LinearSetting(0.05)
    for lam_per in ("batch", "example"):
        training = replace(TRAINING, lam_per=lam_per)
        erm, limit, other = train_linear(x, labels, [zero, least, some], seeds=[2], training=training).weights[-1, 0]
        assert close(limit, erm, 1e-6) == (method != "mixup" or lam_per == "batch")
        assert not close(other, erm, 1e-2)


def test_strength_sweep():
    """Each setting once, and a table with a row for each method and strength; ERM stands in it for every method."""
    strengths = {"weight decay": (0.0, 0.1), "mixup": [0.0, 1, 8.0], "label smoothing": [0.1]}
    settings, table = strength_sweep(strengths, learning_rate=0.05)
    assert settings == [
        LinearSetting(0.05),
        LinearSetting(0.05, weight_decay=0.1),
        LinearSetting(0.05, mixup_alpha=1.0),
        LinearSetting(0.05, mixup_alpha=8.0),
        LinearSetting(0.05, smoothing=0.1),
    ]
    assert len({setting.key for setting in settings}) == 5
    points = [(method, strength) for method, values in strengths.items() for strength in values]
    assert list(zip(table["method"], table["strength"], strict=True)) == points
    by_key = {setting.key: setting for setting in settings}
    for row in table.to_dict("records"):
        assert by_key[row["key"]] == method_setting(row["method"], row["strength"], learning_rate=0.05)
        assert row["weight_decay"] == by_key[row["key"]].weight_decay
    assert (table["key"] == LinearSetting(0.05).key).sum() == 2


def test_method_setting_sets_the_field_of_its_method():
    assert method_setting("weight decay", 0.3, learning_rate=0.1) == LinearSetting(0.1, weight_decay=0.3)
    assert method_setting("label smoothing", 0.3, learning_rate=0.1) == LinearSetting(0.1, smoothing=0.3)
    assert method_setting("mixup", 0.3, learning_rate=0.1) == LinearSetting(0.1, mixup_alpha=0.3)


def test_frame():
    """One row per record, seed, setting and metric, each with the step at which it was taken."""
    x, labels = data()
    training = replace(TRAINING, record_epochs=(2, 20))
    sweep = train_linear(x, labels, COMPANY[:3], seeds=[7, 1], training=training)
    norm, first = sweep.weights.norm(dim=-1), sweep.weights[..., 0]
    frame = sweep.frame(norm=norm, first=first, split="test")
    assert list(frame.columns) == ["key", "seed", "step", "epoch", "split", "metric", "value"]
    assert len(frame) == 2 * 2 * 2 * 3
    assert not frame.duplicated(["key", "seed", "epoch", "metric"]).any()
    assert (frame["step"] == 5 * frame["epoch"]).all() and (frame["split"] == "test").all()
    rows = frame.set_index(["metric", "epoch", "seed", "key"])["value"]
    for (r, epoch), (s, seed), k in itertools.product(enumerate((2, 20)), enumerate((7, 1)), range(3)):
        assert rows["norm", epoch, seed, COMPANY[k].key] == norm[r, s, k].item()
        assert rows["first", epoch, seed, COMPANY[k].key] == first[r, s, k].item()
    assert rows["norm", 2, 7, COMPANY[0].key] != rows["norm", 2, 1, COMPANY[0].key]
    with pytest.raises(ValueError, match=r"metric norm must have shape \[2, 2, 3\], got \[2, 3\]"):
        sweep.frame(norm=norm[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearSetting(0.0), "learning_rate must be positive and finite, got 0.0"),
        (lambda: LinearSetting(float("nan")), "learning_rate must be positive and finite, got nan"),
        (lambda: LinearSetting(0.1, smoothing=2.0), "smoothing must be below .* got 2.0"),
        (lambda: LinearSetting(0.1, mixup_alpha=0.0), "alpha .* must be positive, got 0.0"),
        (lambda: LinearSetting(0.1, mixup_alpha=-1.0), "alpha .* must be positive, got -1.0"),
        (lambda: LinearSetting(float("inf")), "learning_rate must be positive and finite, got inf"),
        (lambda: LinearSetting(0.1, weight_decay=-0.1), "weight_decay must be at least 0 and finite, got -0.1"),
        (lambda: LinearSetting(0.1, weight_decay=float("nan")), "weight_decay must be at least 0 and finite, got nan"),
        (lambda: LinearSetting(0.1, decoupled_decay=-0.1), "decoupled_decay must be at least 0 and finite, got -0.1"),
        (lambda: LinearSetting(0.1, decoupled_decay=float("inf")), "decoupled_decay must be .* finite, got inf"),
        (lambda: method_setting("cutmix", 0.1, learning_rate=0.1), "method must be one of .*'mixup'.*, got 'cutmix'"),
        (lambda: method_setting("mixup", -0.1, learning_rate=0.1), "strength of mixup must be at least 0, got -0.1"),
        (lambda: method_setting("label smoothing", 2.0, learning_rate=0.1), "smoothing must be below .* got 2.0"),
        (lambda: LinearTraining(epochs=0), "epochs and batch_size must be at least 1, got 0 and 500"),
        (lambda: LinearTraining(batch_size=0), "epochs and batch_size must be at least 1, got 100 and 0"),
        (lambda: LinearTraining(lam_per="pixel"), "lam_per must be one of .* got 'pixel'"),
        (lambda: LinearTraining(init_scale=-1.0), "init_scale must be at least 0, got -1.0"),
        (lambda: LinearTraining(init_scale=float("nan")), "init_scale must be at least 0, got nan"),
        (lambda: LinearTraining(record_epochs=(5, 3)), r"must increase within 1..100, got \(5, 3\)"),
        (lambda: LinearTraining(record_epochs=(3, 3)), r"must increase within 1..100, got \(3, 3\)"),
        (lambda: LinearTraining(record_epochs=(0, 3)), r"must increase within 1..100, got \(0, 3\)"),
        (lambda: LinearTraining(record_epochs=(101,)), r"must increase within 1..100, got \(101,\)"),
        (lambda: LinearTraining(record_epochs=()), r"must increase within 1..100, got \(\)"),
    ],
)
def test_descriptions_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


AT = torch.tensor([4]), torch.tensor([2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=torch.ones(23, dtype=torch.int64)), r"both classes 0 and 1, got \[1\]: is a class empty"),
        (dict(labels=torch.arange(23) % 3), r"both classes 0 and 1, got \[0, 1, 2\]"),
        (dict(labels=2 * (torch.arange(23) % 2) - 1), r"both classes 0 and 1, got \[-1, 1\]"),
        (dict(labels=torch.arange(22) % 2), r"n = 23, got \[22\]"),
        (dict(x=torch.zeros(23)), r"x must be \[n, d\] or \[2 seeds, n, d\], got \[23\]"),
        (dict(x=torch.zeros(3, 23, 6)), r"x must be \[n, d\] or \[2 seeds, n, d\], got \[3, 23, 6\]"),
        (
            dict(x=torch.zeros(2, 23, 6), labels=torch.stack([torch.arange(23) % 2, torch.zeros(23).long()])),
            r"both classes 0 and 1, got \[0\]",
        ),
        (dict(x=torch.zeros(23, 6).index_put(AT, torch.tensor(float("nan")))), "x must be finite, and 1 of its 138 "),
        (dict(x=torch.zeros(23, 6).index_put(AT, torch.tensor(float("-inf")))), "x must be finite, and 1 of its 138 "),
        (
            dict(labels=(torch.arange(23) % 2).double().index_put(AT[:1], torch.tensor(float("nan")).double())),
            "got .*nan",
        ),
        (dict(seeds=[3, 3]), r"seeds must be different and at least 0, got \[3, 3\]"),
        (dict(seeds=[3, -1]), r"seeds must be different and at least 0, got \[3, -1\]"),
        (dict(seeds=[]), "nothing to train: 15 settings and 0 seeds"),
        (dict(settings=[]), "nothing to train: 0 settings and 2 seeds"),
    ],
)
def test_train_linear_refuses(change, message):
    x, labels = data()
    arguments = dict(x=x, labels=labels, settings=COMPANY, seeds=[3, 8], training=TRAINING) | change
    with pytest.raises(ValueError, match=message):
        train_linear(**arguments)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_linear", PROJECT / "benchmarks" / "linear.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ordered(torch.utils.data.Sampler):
    """The minibatch order of a seed's stream, as a sampler for a DataLoader."""

    def __init__(self, n, seed):
        self.n, self.stream = n, np.random.default_rng([seed, ORDER])

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter(self.stream.permutation(self.n).tolist())


def test_benchmark_times_the_same_computation(benchmark):
    """Fed our start and order, each competitor ends at our weights: they compute the same thing."""
    x, labels = data()
    settings = [LinearSetting(0.05), LinearSetting(0.05, weight_decay=0.1), LinearSetting(0.05, smoothing=0.2)]
    ours = train_linear(x, labels, settings, seeds=[3], training=TRAINING).weights[-1, 0]
    bound = 1 / 6**0.5
    start = torch.tensor(np.random.default_rng([3, INIT]).uniform(-bound, bound, 6))
    for k, setting in enumerate(settings):
        loader = DataLoader(TensorDataset(x, labels.double()), batch_size=5, sampler=Ordered(23, 3))
        by_loader = benchmark.train_with_loader(loader, setting, start=start, epochs=20)
        order = np.random.default_rng([3, ORDER])
        orders = [torch.from_numpy(order.permutation(23)) for _ in range(20)]
        by_index = benchmark.train_by_index(x, labels, setting, start=start, orders=orders, batch_size=5)
        assert close(by_loader, ours[k], 1e-6) and close(by_index, ours[k], 1e-6)
        assert not close(by_index, ours[k - 1], 1e-3)
    order = np.random.default_rng([3, ORDER])
    orders = [torch.from_numpy(order.permutation(23)) for _ in range(20)]
    starts = torch.stack([start, 2 * start])
    together = benchmark.train_vmap(x, labels, learning_rate=0.05, starts=starts, orders=orders, batch_size=5)
    assert close(together[0], ours[0], 1e-6) and not close(together[1], ours[0], 1e-3)


def test_benchmark_mixup_agrees_in_law(benchmark):
    """The competitors draw Mixup themselves: mean weights of 60 runs agree within 4.5 standard errors, ERM's do not."""
    x, labels = data()
    setting, runs = LinearSetting(0.05, mixup_alpha=1.0), 60
    training = LinearTraining(epochs=8, batch_size=5, init_scale=0.0)
    ours = train_linear(x, labels, [setting, LinearSetting(0.05)], seeds=range(runs), training=training).weights[-1]
    torch.manual_seed(0)
    start = torch.zeros(6, dtype=F64)
    theirs = []
    for _ in range(runs):
        orders = [torch.randperm(23) for _ in range(8)]
        theirs.append(benchmark.train_by_index(x, labels, setting, start=start, orders=orders, batch_size=5))
    theirs = torch.stack(theirs)

    def deviation(a, b):
        return ((a.mean(0) - b.mean(0)).abs() / ((a.var(0) + b.var(0)) / runs).sqrt()).max()

    assert deviation(ours[:, 0], theirs) < 4.5
    assert deviation(ours[:, 1], theirs) > 4.5


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5])
def test_every_member_is_trained_once_however_the_cores_share(cores, num_seeds):
    for small in (True, False):
        units = linear._units(num_seeds, 7, cores, small=small)
        members = [(seed, setting) for group, chosen in units for seed in group for setting in chosen]
        assert sorted(members) == [(seed, setting) for seed in range(num_seeds) for setting in range(7)]


def test_settings_split_over_cores_are_the_same_models(generator):
    """One seed on two threads splits its settings; d is large enough for the branch of large problems."""
    x = torch.randn(40, 3000, generator=generator, dtype=torch.float64)
    labels = torch.arange(40) % 2
    settings = [LinearSetting(0.01), LinearSetting(0.01, mixup_alpha=1.0), LinearSetting(0.01, smoothing=0.1)]
    training = LinearTraining(epochs=5, batch_size=20)
    assert training.batch_size * x.shape[1] >= 50_000
    before, runs = torch.get_num_threads(), []
    try:
        for cores in (1, 2):
            torch.set_num_threads(cores)
            runs.append(train_linear(x, labels, settings, seeds=[4], training=training).weights)
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-9, atol=1e-12)
    assert not torch.equal(runs[0][:, :, 0], runs[0][:, :, 1])
