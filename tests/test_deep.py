"""The one-trial trainer against a plain torch loop, its streams, its records, its states, and runs that diverge."""

import copy
import hashlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from labelaug.measure import class_error
from labelaug.methods import ERM, Mixup
from labelaug.models import mlp
from labelaug.theory.bounds import mixup_floor, permutation_floor
from labelaug.training import deep
from labelaug.training.deep import COLUMNS, DeepSetting, draw_moves, gather, init_generator, train
from labelaug.training.gradients import gradient_norms
from labelaug.training.linear import LAM, ORDER, PARTNER

BASE = DeepSetting(0.05, epochs=3, batch_size=8, smoothing=0.1)
F64 = torch.float64


def nothing(model):
    return {}


def data(n=20, d=3, num_classes=3):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, d, generator=generator), torch.arange(n) % num_classes


def images(n=10):
    """Neither square nor black anywhere, so that an exchange of axes, or of a border with a pixel, shows."""
    generator = torch.Generator().manual_seed(6)
    return torch.randint(1, 256, (n, 3, 6, 5), dtype=torch.uint8, generator=generator), torch.arange(n) % 3


def network(seed=0, d=3, num_classes=3, dtype=torch.float32):
    return mlp(d, (7, 5), num_classes, generator=init_generator(seed)).to(dtype)


class Convolutional(nn.Module):
    """Pixels in 0..255 to logits: one convolution, batch normalisation, one dense layer. Works in its own dtype."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.utils.skip_init(nn.Conv2d, 3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.utils.skip_init(nn.Linear, 4 * 6 * 5, 3),
        ).to(dtype)
        generator = init_generator(seed)
        with torch.no_grad():
            for layer in (self.layers[0], self.layers[4]):
                for parameter in layer.parameters():
                    parameter.copy_(0.4 * torch.rand(parameter.shape, generator=generator) - 0.2)

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight.dtype) / 255)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def final(setting, *, seed=0, measure=nothing, model=None, **options):
    model = model or network(seed)
    frame = train(model, *data(), setting=setting, seed=seed, measure=measure, **options)
    return weights_of(model), frame


def running(frame, metric="running_loss"):
    return frame.loc[frame["metric"] == metric, "value"].to_numpy()


def teacher(x):
    """A fixed linear teacher: probabilities that no one-hot or smoothed target equals."""
    weight = torch.linspace(-2, 2, 9, dtype=x.dtype).reshape(3, 3)[:, [1, 2, 0]]
    return (x @ weight).softmax(-1)


def plain_loop(setting, seed, *, pictures=False, teacher=None):
    """The same trial in float64 as a reader would write it: example by example, torch's own loss, plain optimisers.

    Returns: the weights, and the means over each epoch of the loss, without the penalty, and of the targets' entropy.
    """
    x, labels = images() if pictures else data()
    model, n = (Convolutional if pictures else network)(seed, dtype=F64), len(x)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[setting.optimiser]
    optimiser = kind(model.parameters(), lr=1.0, **({"momentum": setting.momentum} if setting.momentum else {}))
    epochs = []
    for epoch in range(setting.epochs):
        order, partner, lam, moves = (
            np.random.default_rng([seed, purpose, epoch]) for purpose in (ORDER, PARTNER, LAM, 5)
        )
        passed = [m for m in setting.milestones if m <= epoch]
        optimiser.param_groups[0]["lr"] = setting.learning_rate * math.prod(setting.decay for _ in passed)
        mixup = setting.method if setting.switch_epoch is None or epoch < setting.switch_epoch else ERM
        shuffled, moves, means = order.permutation(n), moves.integers(0, [9, 9, 2], size=(n, 3)), np.zeros(2)
        for begin in range(0, n, setting.batch_size):
            inputs, targets = [], []
            for place, i in list(enumerate(shuffled))[begin : begin + setting.batch_size]:
                one = x[i].double()
                if setting.augmentation == "crop-flip":
                    top, left, flip = moves[place]
                    one = nn.functional.pad(one, (4, 4, 4, 4))[:, top : top + 6, left : left + 5]
                    one = one.flip(2) if flip else one
                share = torch.full((3,), setting.smoothing / 3, dtype=F64)
                share[labels[i]] += 1 - setting.smoothing
                inputs.append(one)
                targets.append(share)
            size = len(inputs)
            if mixup != ERM:
                pick = partner.permutation(size)
                if mixup.lam is not None:
                    weight = [mixup.lam] * size
                elif mixup.per == "example":
                    weight = lam.beta(mixup.alpha, mixup.alpha, size)
                else:
                    weight = [lam.beta(mixup.alpha, mixup.alpha)] * size
                clean, each = list(inputs), list(targets)
                for k in range(size):
                    targets[k] = weight[k] * each[k] + (1 - weight[k]) * each[pick[k]]
                    if mixup.inputs:
                        inputs[k] = weight[k] * clean[k] + (1 - weight[k]) * clean[pick[k]]
            inputs, targets = torch.stack(inputs), torch.stack(targets)
            if setting.labels == "teacher":
                targets = teacher(inputs)
            outputs = model(inputs)
            if setting.loss == "squared-error":
                loss = ((outputs - targets) ** 2).sum() / size
            else:
                loss = nn.functional.cross_entropy(outputs, targets)
            means += np.array([loss.item(), torch.special.entr(targets).sum().item() / size]) * size / n
            penalty = 0.5 * setting.weight_decay * sum(p.square().sum() for p in model.parameters())
            optimiser.zero_grad()
            (loss + penalty).backward()
            optimiser.step()
        epochs.append(means)
    return weights_of(model), np.array(epochs)


TABLES = {
    "erm": DeepSetting(0.05, 3, 8),
    "smoothing": DeepSetting(0.05, 3, 8, smoothing=0.2),
    "negative smoothing": DeepSetting(0.05, 3, 8, smoothing=-0.4),
    "weight decay": DeepSetting(0.05, 3, 8, weight_decay=0.3),
    "mixup": DeepSetting(0.05, 3, 8, method=Mixup(0.7)),
    "λ an example": DeepSetting(0.05, 3, 8, method=Mixup(0.7, per="example"), smoothing=0.1, weight_decay=0.01),
    "fixed λ": DeepSetting(0.05, 3, 8, method=Mixup(lam=0.3)),
    "mixed targets alone": DeepSetting(0.05, 3, 8, method=Mixup(0.7, inputs=False)),
    "teacher": DeepSetting(0.05, 3, 8, method=Mixup(0.7), labels="teacher"),
    "teacher, unmixed": DeepSetting(0.05, 3, 8, labels="teacher", weight_decay=0.1),
    "switch": DeepSetting(0.05, 4, 8, method=Mixup(0.7), switch_epoch=2),
    "schedule": DeepSetting(0.05, 5, 8, milestones=(1, 4), decay=0.3),
    "sgd": DeepSetting(0.1, 4, 20, optimiser="sgd", method=Mixup(2.0), weight_decay=0.1),
    "sgd with momentum": DeepSetting(0.1, 4, 7, optimiser="sgd", momentum=0.8, milestones=(2,), weight_decay=0.1),
    "squared error": DeepSetting(0.02, 3, 8, optimiser="sgd", loss="squared-error", method=Mixup(0.7, per="example")),
}
PICTURES = {
    "as they are": DeepSetting(0.1, 2, 4, optimiser="sgd"),
    "crop and flip": DeepSetting(0.1, 3, 4, optimiser="sgd", augmentation="crop-flip"),
    "all at once": DeepSetting(
        0.1,
        3,
        4,
        optimiser="sgd",
        momentum=0.5,
        augmentation="crop-flip",
        method=Mixup(1.0, per="example"),
        smoothing=0.1,
        weight_decay=0.01,
        milestones=(1,),
        switch_epoch=2,
    ),
}
CASES = [
    *(pytest.param(setting, False, id=name) for name, setting in TABLES.items()),
    *(pytest.param(setting, True, id=f"images, {name}") for name, setting in PICTURES.items()),
]
OFF = {
    "smoothing": 0.0,
    "weight_decay": 0.0,
    "method": ERM,
    "labels": "data",
    "switch_epoch": None,
    "milestones": (),
    "momentum": 0.0,
    "loss": "cross-entropy",
    "augmentation": "none",
}


@pytest.mark.parametrize(("setting", "pictures"), CASES)
def test_training_is_the_plain_loop(setting, pictures, seed=3):
    """Tables: float64 on both sides, some 12 steps of rounding, Adam dividing by small gradients, stay below 1e-10.

    Images reach the model, and targets the loss, in float32: rounding 6e-8, and some eight steps of SGD. The running
    means keep the precision of the losses. Another seed, and each part switched off, must give other weights.
    """
    advisor = {"teacher": teacher} if setting.labels == "teacher" else {}
    if pictures:
        (x, labels), model, within, of_means = images(), Convolutional(seed, dtype=F64), 2e-6, 1e-6
    else:
        (x, labels), model, within, of_means = data(), network(seed, dtype=F64), 1e-10, 1e-10
        x = x.double()
    frame = train(model, x, labels, setting=setting, seed=seed, measure=nothing, **advisor)
    expected, means = plain_loop(setting, seed, pictures=pictures, **advisor)
    ours = weights_of(model)
    assert_close(ours, expected, rtol=0, atol=within)
    np.testing.assert_allclose(running(frame), means[:, 0], rtol=of_means)
    if setting.loss == "cross-entropy" and setting.smoothing >= 0:
        np.testing.assert_allclose(running(frame, "running_floor"), means[:, 1], rtol=of_means, atol=1e-12)
    else:
        assert len(running(frame, "running_floor")) == 0
    assert frame.iloc[-1][["metric", "value", "epoch"]].tolist() == ["diverged", 0.0, setting.epochs]
    others = [(setting, seed + 1)]
    others += [(replace(setting, **{f: off}), seed) for f, off in OFF.items() if getattr(setting, f) != off]
    if setting.method != ERM:
        per = "batch" if setting.method.per == "example" else "example"
        if not advisor:  # a teacher's labels are never mixed
            others.append((replace(setting, method=replace(setting.method, inputs=not setting.method.inputs)), seed))
        others += (
            [(replace(setting, method=Mixup(setting.method.alpha, per=per)), seed)] if setting.method.alpha else []
        )
    for other, another in others:
        difference = (ours - plain_loop(other, another, pictures=pictures, **advisor)[0]).abs().max()
        assert difference > 1e-4, (other, another)


def test_uint8_images_are_cropped_and_flipped_as_by_hand():
    """Every crop with its flip against torch's own padding and slicing, bit for bit; in channels-last memory."""
    x, chosen = images()[0], torch.tensor([7, 2])
    stored = x.permute(0, 2, 3, 1).contiguous()
    for top in range(9):
        for left in range(9):
            moves = torch.tensor([[top, left, 0], [left, top, 1]])
            found = gather(stored, chosen, moves)
            one, other = nn.functional.pad(x[chosen].float(), (4, 4, 4, 4))
            expected = one[:, top : top + 6, left : left + 5], other[:, left : left + 6, top : top + 5].flip(-1)
            assert torch.equal(found, torch.stack(expected)) and found.dtype == torch.float32
            assert found.is_contiguous(memory_format=torch.channels_last)
    still = torch.tensor([[4, 4, 0], [4, 4, 0]])
    assert torch.equal(gather(stored, chosen, still), x[chosen].float())
    assert torch.equal(gather(stored, chosen), x[chosen].float())
    assert torch.equal(gather(x.double(), chosen), x[chosen].double())


def test_moves_are_uniform():
    """All 162 crops with flips, chi-square at a false-alarm rate of 1e-4; the offsets reach both ends."""
    from scipy import stats

    moves = draw_moves(20_000, rng=np.random.default_rng(1))
    assert moves.dtype == torch.int64 and moves.amin(0).tolist() == [0, 0, 0] and moves.amax(0).tolist() == [8, 8, 1]
    codes = (moves * torch.tensor([18, 2, 1])).sum(1)
    assert stats.chisquare(torch.bincount(codes, minlength=162).numpy()).pvalue > 1e-4
    assert stats.chisquare(torch.bincount(codes // 2 * 2, minlength=162).numpy() + 1).pvalue < 1e-10  # no flips


NEUTRAL = {
    "λ = 1": ({"method": Mixup(lam=1.0)}, {"method": Mixup(lam=0.99)}),
    "λ = 1, targets alone": ({"method": Mixup(lam=1.0, inputs=False)}, {"method": Mixup(lam=0.99, inputs=False)}),
    "switched at once": (
        {"method": Mixup(0.7, per="example"), "switch_epoch": 0},
        {"method": Mixup(0.7, per="example"), "switch_epoch": 1},
    ),
    "no smoothing": ({"smoothing": 0.0}, {"smoothing": 0.01}),
    "no penalty": ({"weight_decay": 0.0}, {"weight_decay": 0.01}),
    "decay 1": ({"milestones": (1, 2), "decay": 1.0}, {"milestones": (1, 2), "decay": 0.9}),
    "a milestone at the end": ({"milestones": (3,)}, {"milestones": (2,)}),
    "no momentum": ({"momentum": 0.0}, {"momentum": 0.1}),
}


@pytest.mark.parametrize(("neutral", "near"), NEUTRAL.values(), ids=NEUTRAL)
def test_a_method_at_its_neutral_strength_is_erm_bit_for_bit(neutral, near):
    """Weights and every row but the name; a little off that strength they differ."""
    erm = DeepSetting(0.05, 3, 8, optimiser="sgd", record_epochs=(0, 1, 2, 3))

    def trained(fields):
        def measure(model):
            return {"test": {"logit": model(data()[0])[0, 0]}}

        weights, frame = final(replace(erm, **fields), measure=measure)
        return weights, frame.drop(columns="key")

    weights, frame = trained({})
    assert torch.equal(trained(neutral)[0], weights)
    pd.testing.assert_frame_equal(trained(neutral)[1], frame, check_exact=True)
    assert not torch.equal(trained(near)[0], weights)


def test_running_loss_is_the_mean_over_the_epochs_examples():
    """Of a model that hardly moves it is the loss on the whole set, each of 20 examples counted once."""
    x, labels = data()
    _, frame = final(DeepSetting(1e-12, 2, 8, optimiser="sgd"))
    loss = nn.functional.cross_entropy(network()(x), labels).item()
    assert running(frame) == pytest.approx([loss, loss], rel=1e-6)
    with torch.no_grad():
        order = np.random.default_rng([0, ORDER, 0]).permutation(20)
        batches = [nn.functional.cross_entropy(network()(x[c]), labels[c]) for c in np.split(order, [8, 16])]
    assert abs(np.mean(batches) - loss) > 1e-4  # the mean of batches, the smaller one counted like the others


def test_running_loss_adds_nothing_to_the_rounding_of_the_losses():
    """500 minibatches of one example, whose losses in float32 are two numbers: their mean, to float64's rounding."""
    labels = torch.arange(500) % 2
    model = mlp(1, (), 2, generator=init_generator(0))
    each = nn.functional.cross_entropy(model(torch.zeros(2, 1)), torch.tensor([0, 1]), reduction="none").tolist()
    setting = DeepSetting(1e-30, 1, 1, optimiser="sgd")  # a step that float32 does not see
    frame = train(model, torch.zeros(500, 1), labels, setting=setting, seed=0, measure=nothing)
    assert running(frame) == pytest.approx([(each[0] + each[1]) / 2], rel=1e-13)
    one_by_one = np.float32(0)
    for i in np.random.default_rng([0, ORDER, 0]).permutation(500):
        one_by_one += np.float32(each[i % 2]) * np.float32(1 / 500)
    assert abs(one_by_one / running(frame)[0] - 1) > 1e-8  # what a sum in float32 would give


@pytest.mark.parametrize("per", ["batch", "example"])
def test_running_floor_is_mixups_floor(per):
    """Over 200 epochs the mean is permutation_floor, within 4.5 standard errors (false alarm 7e-6).

    That is (n - m)/(n - 1) times mixup_floor for m minibatches, here 20/23 of it: the control is many errors away.
    """
    labels = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)
    x = torch.zeros(24, 1)
    setting = DeepSetting(1e-9, 200, 6, optimiser="sgd", method=Mixup(0.5, per=per))
    frame = train(mlp(1, (), 3, generator=init_generator(0)), x, labels, setting=setting, seed=1, measure=nothing)
    floors = running(frame, "running_floor")
    error = floors.std(ddof=1) / len(floors) ** 0.5
    independent = mixup_floor([1 / 2, 1 / 3, 1 / 6], alpha=0.5)
    expected = permutation_floor([12, 8, 4], batch_size=6, alpha=0.5)
    assert expected == pytest.approx(20 / 23 * independent)
    assert len(floors) == 200 and abs(floors.mean() - expected) < 4.5 * error
    assert abs(floors.mean() - independent) > 4.5 * error


def test_the_same_description_and_seed_give_the_same_bits():
    setting = replace(BASE, method=Mixup(1.0))
    first, second = final(setting)[0], final(setting)[0]
    assert torch.equal(first, second)
    assert not torch.equal(first, final(setting, seed=1)[0])
    torch.manual_seed(123)  # the global stream is not used
    np.random.seed(123)  # noqa: NPY002 - nor is NumPy's
    assert torch.equal(first, final(setting)[0])


def test_records_and_measures_leave_the_training_bits_alone():
    """A measure that draws, changes modes and takes gradients, at more records, moves nothing; dropout included."""

    def nosy(model):
        torch.randn(10)
        model.train()
        with torch.enable_grad():
            model(data()[0]).sum().backward()
        return {"train": {"x": 1.0}}

    def with_dropout():
        return nn.Sequential(network(), nn.Dropout(0.5), nn.Linear(3, 3))

    for build in (network, with_dropout):
        found = []
        for records, measure in ((None, nothing), ((0, 1, 2, 3), nosy)):
            torch.manual_seed(0)
            model = build()
            found.append(final(replace(BASE, record_epochs=records), model=model, measure=measure)[0])
            assert model.training
        assert torch.equal(*found)


def test_what_a_measure_does_to_the_model_is_undone():
    """One that runs the network in training mode moves its running means: later records do not see it."""

    def logit(model):
        return {"test": {"logit": model(images()[0].float())[0, 0]}}

    def nosy(model):
        found = logit(model)
        with torch.enable_grad():
            model.train()(10 * images()[0].float()).sum().backward()
        return found

    setting, found = DeepSetting(0.05, 3, 5, optimiser="sgd", record_epochs=(0, 1, 2, 3)), []
    for measure in (logit, nosy):
        model = Convolutional()
        frame = train(model, *images(), setting=setting, seed=0, measure=measure)
        found.append((frame, model.state_dict()))
    pd.testing.assert_frame_equal(found[0][0], found[1][0], check_exact=True)
    assert_close(found[0][1], found[1][1], rtol=0, atol=0)


def test_streams_are_apart():
    """The order of the examples is the same with and without mixing: seen through a model that notes its inputs."""
    x, labels = torch.arange(20.0)[:, None], torch.arange(20) % 2

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(1, 2), []

        def forward(self, x):
            if self.training:
                self.seen.append(x.detach().clone())
            return self.linear(x)

    seen = []
    for setting in (BASE, replace(BASE, method=Mixup(1e-9))):  # so small that λ is 0 or 1 to rounding
        model = Noting()
        train(model, x, labels, setting=setting, seed=2, measure=nothing)
        seen.append(torch.cat(model.seen))
    expected = np.concatenate([np.random.default_rng([2, ORDER, epoch]).permutation(20) for epoch in range(3)])
    assert torch.equal(seen[0][:, 0], torch.from_numpy(expected).float())
    for begin in (0, 8, 16, 20, 28, 36):  # each mixed batch holds only examples of the plain batch
        size = 4 if begin % 20 == 16 else 8
        plain, mixed = (set(s[begin : begin + size, 0].tolist()) for s in seen)
        assert len(plain) == size and mixed <= plain
    assert not torch.equal(*seen)


def test_rows_are_tidy():
    def measure(model):
        assert not model.training and not torch.is_grad_enabled()
        return {"train": {"error": 0.5, "loss": 1}, "test": {"error": torch.tensor(0.25)}}

    setting = replace(BASE, record_epochs=(0, 2))
    _, frame = final(setting, seed=4, measure=measure)
    assert list(frame.columns) == COLUMNS == ["key", "seed", "step", "epoch", "split", "metric", "value"]
    assert set(frame["key"]) == {setting.key} and set(frame["seed"]) == {4}
    rows = frame[["step", "epoch", "split", "metric", "value"]].to_numpy().tolist()
    record = [["train", "error", 0.5], ["train", "loss", 1.0], ["test", "error", 0.25]]
    means = [["train", "running_loss"], ["train", "running_floor"]]
    # 20 examples in minibatches of 8: three steps an epoch, the last of 4 examples.
    assert [row[:4] if row[3].startswith("running") else row for row in rows] == [
        *([0, 0, *r] for r in record),
        *([3, 1, *r] for r in means),
        *([6, 2, *r] for r in [*means, *record]),
        *([9, 3, *r] for r in means),
        [9, 3, "train", "diverged", 0.0],
    ]
    last = final(BASE, measure=measure)[1]
    assert last.loc[last["metric"] == "error", "epoch"].unique().tolist() == [3]


def offered(setting, model, x, labels, **options):
    """The frame of a whole trial, and the bytes of the state after each of its epochs."""
    states = {}

    def after_epoch(epoch, state):
        file = io.BytesIO()
        torch.save(state(), file)
        states[epoch] = file.getvalue()

    frame = train(model, x, labels, setting=setting, seed=2, after_epoch=after_epoch, **options)
    return frame, states


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_a_trial_goes_on_from_any_epoch_bit_for_bit(optimiser):
    """Rows, weights, buffers and the later states, through a file's bytes; the model brings another start."""
    x, labels = images()
    setting = DeepSetting(
        0.02,
        4,
        4,
        method=Mixup(0.7, per="example"),
        switch_epoch=3,
        augmentation="crop-flip",
        optimiser=optimiser,
        momentum=0.9 if optimiser == "sgd" else 0.0,
        milestones=(2,),
        weight_decay=0.01,
        record_epochs=(0, 1, 3),
    )

    def measure(model):
        return {"test": {"logit": model(x.float())[0, 0]}}

    whole = Convolutional()
    frame, states = offered(setting, whole, x, labels, measure=measure)
    assert list(states) == [1, 2, 3, 4]
    for epoch, state in states.items():
        resume = torch.load(io.BytesIO(state), weights_only=True)
        model = Convolutional(seed=9)
        again, later = offered(setting, model, x, labels, measure=measure, resume=resume)
        pd.testing.assert_frame_equal(again, frame, check_exact=True)
        assert list(later) == list(range(epoch + 1, 5))
        assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)
        for e in later:
            one, other = (torch.load(io.BytesIO(s[e]), weights_only=True)["optimiser"] for s in (states, later))
            assert_close(other["state"], one["state"], rtol=0, atol=0)
            assert other["param_groups"] == one["param_groups"]
    # Control: with the weights alone, a fresh optimiser gives another curve.
    resume = torch.load(io.BytesIO(states[1]), weights_only=True)
    resume["optimiser"]["state"] = {}
    other = train(Convolutional(), x, labels, setting=setting, seed=2, measure=measure, resume=resume)
    assert not np.array_equal(running(other), running(frame))


def test_a_state_of_another_trial_is_refused():
    frame, states = offered(BASE, network(), *data(), measure=nothing)
    resume = torch.load(io.BytesIO(states[1]), weights_only=True)
    for change in ({"setting": replace(BASE, smoothing=0.2)}, {"setting": replace(BASE, epochs=4)}, {"seed": 1}):
        arguments = {"setting": BASE, "seed": 2, "resume": resume} | change
        with pytest.raises(ValueError, match=f"the state is that of setting {BASE.key}, seed 2"):
            final(**arguments)
    pd.testing.assert_frame_equal(final(BASE, seed=2, resume=resume)[1], frame, check_exact=True)


@pytest.fixture
def compilations(monkeypatch):
    """What torch.compile was asked for, one entry for each graph; the graphs run uncompiled, to keep it short."""
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs, **options):
        graphs.append([tuple(i.shape) for i in inputs if i.shape[:1] != () and not isinstance(i, nn.Parameter)])
        return graph.forward

    def counting(function, *, mode, dynamic):
        assert (mode, dynamic) == ("default", False)
        return compile_(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", counting)
    for clean in (deep._compiled_forward.cache_clear, torch.compiler.reset):
        clean()
    yield graphs
    for clean in (deep._compiled_forward.cache_clear, torch.compiler.reset):
        clean()


def test_compiled_is_the_same_trial_compiled_once(compilations):
    """One graph for two seeds and two methods, whose models differ; another for another size of minibatch, but none
    for the smaller last one.

    The counting backend runs torch's own kernels, so that the bits are those of the uncompiled trial; an inductor's
    kernels would differ by rounding, which the test on a GPU bounds.
    """
    for seed in (0, 1):
        for method in (ERM, Mixup(0.7)):
            setting = replace(BASE, batch_size=10, method=method, record_epochs=(0, 3))
            (weights, frame), (expected, plain) = (final(setting, seed=seed, compiled=c) for c in (True, False))
            assert torch.equal(weights, expected)
            pd.testing.assert_frame_equal(frame, plain, check_exact=True)
    assert len(compilations) == 1
    final(replace(BASE, epochs=1), compiled=True)
    assert len(compilations) == 2  # for minibatches of 8; the last one, of 4, is not compiled


def test_bfloat16_is_float32_but_for_its_rounding():
    """Weights move as in float32 to within 4 %, ten roundings of 2^-8 between input and gradient; never exactly so."""
    setting = DeepSetting(0.2, 5, 8, optimiser="sgd", method=Mixup(0.7), smoothing=0.1)
    start, model = weights_of(network()), network()
    weights, frame = final(setting)
    half, other = final(replace(setting, precision="bfloat16"), model=model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved = (weights - start).norm()
    assert moved > 0.1 and 1e-4 * moved < (half - weights).norm() < 0.04 * moved
    assert np.abs(running(other) / running(frame) - 1).max() < 0.01
    assert np.array_equal(running(other, "running_floor"), running(frame, "running_floor"))


def test_draws_are_moved_whole():
    """As they were, whatever their shapes and types, and on the device ("meta" stands for one)."""
    draws = [(torch.tensor(n / 7, dtype=F64), torch.arange(n), torch.arange(2.0 * n).reshape(n, 2)) for n in (4, 4, 3)]
    for before, after in zip(draws, deep._moved(draws, torch.device("cpu")), strict=True):
        assert_close(after, before, rtol=0, atol=0)
    assert {part.device.type for one in deep._moved(draws, torch.device("meta")) for part in one} == {"meta"}
    assert deep._moved([(), ()], torch.device("meta")) == [(), ()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor's advice against float32
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # the one with which torch sets up its pool of memory
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_the_curve_of_a_cpu(compiled):
    """Same draws, other kernels: float32 without TF32 agrees to 1e-4, with images, crops, Mixup and a smaller batch."""
    x, labels = images()
    setting, found = replace(PICTURES["all at once"], record_epochs=(0, 3)), []
    for device in ("cpu", "cuda"):
        model, there = Convolutional(seed=1).to(device), x.to(device)

        def measure(model, there=there):
            return {"test": {"logit": model(there.float())[0, 0]}}

        on_gpu = compiled and device == "cuda"
        frame = train(model, there, labels.to(device), setting=setting, seed=1, measure=measure, compiled=on_gpu)
        found.append((frame, weights_of(model).cpu()))
    (one, ours), (other, theirs) = found
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - weights_of(Convolutional(seed=1))).abs().max() > 0.01


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_run_that_diverges_says_so_and_stops(optimiser):
    setting = replace(BASE, learning_rate=1e30, optimiser=optimiser, epochs=50, record_epochs=(0, 1, 49, 50))
    calls, epochs = [], []

    def measure(model):
        calls.append(1)
        logits = model(data()[0])
        return {"train": {"loss": nn.functional.cross_entropy(logits, data()[1]).item()}}

    _, frame = final(setting, measure=measure, after_epoch=lambda epoch, state: epochs.append(epoch))
    last = frame.iloc[-1]
    assert (last["metric"], last["value"]) == ("diverged", 1.0)
    assert last["epoch"] < 10 and last["step"] == 3 * last["epoch"]  # it did not go on to the end
    assert np.isfinite(frame["value"]).all() and (frame["metric"] == "loss").sum() <= len(calls) <= 2
    assert epochs == list(range(1, last["epoch"] + 1))  # the broken epoch is not offered as a state
    healthy = final(replace(setting, learning_rate=0.01), measure=measure)[1]
    assert healthy.iloc[-1]["value"] == 0.0 and (healthy["metric"] == "loss").sum() == 4


@pytest.mark.parametrize("poisoned", [1, 5, 9])
def test_a_run_ends_with_its_last_whole_epoch(poisoned):
    """One minibatch in nine has an infinite loss: its epoch of three steps leaves no row and is not offered."""

    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.calls = network(), 0

        def forward(self, x):
            self.calls += self.training
            return self.inside(x) * (float("inf") if self.training and self.calls == poisoned else 1.0)

    model, epochs, whole = Poisoned(), [], (poisoned - 1) // 3
    setting = replace(BASE, record_epochs=(0, 1, 2, 3))
    measured = {"measure": lambda model: {"test": {"x": 1.0}}}
    _, frame = final(setting, model=model, after_epoch=lambda epoch, state: epochs.append(epoch), **measured)
    assert frame.iloc[-1][["step", "epoch", "metric", "value"]].tolist() == [3 * whole, whole, "diverged", 1.0]
    assert model.calls == 3 * whole + 3 and epochs == list(range(1, whole + 1))
    _, healthy = final(setting, **measured)
    pd.testing.assert_frame_equal(frame[:-1], healthy[healthy["epoch"] <= whole][: len(frame) - 1], check_exact=True)
    assert frame.loc[frame["metric"] == "x", "epoch"].tolist() == list(range(whole + 1))


def test_parameters_that_are_not_finite_end_a_run():
    """The last step of an epoch may break the weights after every loss was finite."""

    class Breaks(nn.Module):
        """Its loss is finite, its gradient is not: √ at 0."""

        def __init__(self):
            super().__init__()
            self.inside, self.extra = network(), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.inside(x) + self.extra.sqrt()

    _, frame = final(replace(BASE, batch_size=20), model=Breaks())
    assert frame[["step", "epoch", "metric", "value"]].to_numpy().tolist() == [[0, 0, "diverged", 1.0]]


def test_a_loss_that_is_not_finite_ends_a_run():
    """Even where it leaves the weights finite: the square of 1e25 is infinite in float32, its derivative is not."""

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = network()

        def forward(self, x):
            return self.inside(x) + 1e25

    setting = replace(BASE, learning_rate=1e-30, optimiser="sgd", loss="squared-error")
    weights, frame = final(setting, model=Far())
    assert frame[["step", "epoch", "metric", "value"]].to_numpy().tolist() == [[0, 0, "diverged", 1.0]]
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_teacher_whose_probabilities_are_not_finite_ends_a_run(broken):
    """The run says that it has diverged, and nothing is scored."""

    def mad(x):
        return teacher(x).index_fill(1, torch.tensor([1]), broken)

    setting = replace(BASE, smoothing=0.0, labels="teacher", record_epochs=(1, 2, 3))
    _, frame = final(setting, teacher=mad, measure=lambda model: {"train": {"error": 0.5}})
    assert frame[["step", "epoch", "metric", "value"]].to_numpy().tolist() == [[0, 0, "diverged", 1.0]]
    _, sound = final(setting, teacher=teacher, measure=lambda model: {"train": {"error": 0.5}})
    assert sound.iloc[-1]["value"] == 0.0 and (sound["metric"] == "error").sum() == 3


def test_a_value_that_is_not_finite_is_never_a_row():
    """It is told of and left out; the training, whose loss and parameters are finite, goes on as if not measured."""
    setting = replace(BASE, record_epochs=(2, 3))
    measured = {"train": {"ratio": math.nan, "loss": 1.5}, "test": {"ratio": math.inf}}
    with pytest.warns(UserWarning, match=r"epoch [23]: ratio on (train is nan|test is inf) and has no row") as told:
        weights, frame = final(setting, measure=lambda model: measured)
    assert len(told) == 4
    expected, plain = final(setting, measure=lambda model: {"train": {"loss": 1.5}})
    assert torch.equal(weights, expected)
    pd.testing.assert_frame_equal(frame, plain, check_exact=True)
    assert (frame["metric"] == "loss").sum() == 2 and frame["value"].iloc[-1] == 0.0


def test_the_network_learns_what_a_linear_one_cannot():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    errors = {}
    for widths in ((16, 16), ()):
        model = mlp(2, widths, 2, generator=init_generator(0))
        train(model, x, labels, setting=DeepSetting(0.02, 40, 20), seed=0, measure=nothing)
        errors[widths] = class_error(model(x).detach(), labels).item()
    assert errors[16, 16] < 0.05 and errors[()] > 0.3


def test_the_key_names_the_description():
    assert BASE.key == DeepSetting(0.05, 3, 8, smoothing=0.1).key
    changes = [{"smoothing": 0.2}, {"method": Mixup(1.0)}, {"method": Mixup(lam=1.0)}, {"epochs": 4}]
    assert len({BASE.key, *(replace(BASE, **change).key for change in changes)}) == 5
    # Frozen: a field added later, with a neutral default, must leave the names of old results alone.
    assert DeepSetting(0.001, 100, 500).key == "42617b19614c"
    setting = DeepSetting(0.01, 2, 8, optimiser="sgd", method=Mixup(1.0, per="example"), record_epochs=(1, 2))
    by_hand = {
        "type": "DeepSetting",
        "learning_rate": 0.01,
        "epochs": 2,
        "batch_size": 8,
        "optimiser": "sgd",
        "method": {"type": "Mixup", "alpha": 1, "per": "example"},
        "record_epochs": [1, 2],
    }
    digest = hashlib.sha256(json.dumps(by_hand, sort_keys=True).encode()).hexdigest()
    assert setting.key == digest[:12] == "d39798fb00c1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite, got inf"),
        ({"epochs": 0}, "at least 1, got 0 and 8"),
        ({"batch_size": 0}, "at least 1, got 3 and 0"),
        ({"labels": "teacher"}, "neither smoothed nor mixed"),  # BASE smooths
        ({"optimiser": "lbfgs"}, "optimiser must be one of .* got 'lbfgs'"),
        ({"loss": "hinge"}, "loss must be one of .* got 'hinge'"),
        ({"precision": "float16"}, "precision must be one of .* got 'float16'"),
        ({"augmentation": "flip"}, "augmentation must be one of .* got 'flip'"),
        ({"labels": "none"}, "labels must be one of .* got 'none'"),
        ({"switch_epoch": 4}, r"switch_epoch must lie in 0\.\.3, got 4"),
        ({"switch_epoch": -1}, r"switch_epoch must lie in 0\.\.3, got -1"),
        ({"smoothing": 2.0}, "smoothing must be below .* got 2.0"),
        ({"smoothing": math.nan}, "smoothing must be below .* got nan"),
        ({"momentum": 0.9}, "momentum .* belongs to sgd, got 0.9, adam"),
        ({"momentum": 1.0, "optimiser": "sgd"}, "got 1.0, sgd"),
        ({"momentum": -0.1, "optimiser": "sgd"}, "got -0.1, sgd"),
        ({"milestones": (2, 1)}, r"milestones must increase within 1\.\.3"),
        ({"milestones": (0,)}, "milestones must increase"),
        ({"milestones": (4,)}, "milestones must increase"),
        ({"milestones": (1, 1)}, "milestones must increase"),
        ({"decay": 0.0}, r"decay lie in \(0, 1\]"),
        ({"decay": 1.5}, r"decay lie in \(0, 1\]"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0 and finite, got nan"),
        ({"record_epochs": (2, 1)}, r"record_epochs must increase within 0\.\.3, got \(2, 1\)"),
        ({"record_epochs": (4,)}, r"within 0\.\.3, got \(4,\)"),
        ({"record_epochs": ()}, r"record_epochs must increase .* got \(\)"),
    ],
)
def test_a_bad_description_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **fields)


CROPPED = replace(BASE, augmentation="crop-flip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(19, dtype=torch.int64)}, r"\[20, 3\] and torch.int64 \[19\]"),
        ({"labels": torch.zeros(20)}, "int64 labels"),
        ({"x": torch.zeros(0, 3), "labels": torch.zeros(0, dtype=torch.int64)}, "n > 0"),
        ({"labels": torch.full((20,), -1)}, "at least 0, got -1"),
        ({"x": torch.tensor([0.0, math.nan, math.inf]).expand(20, 3)}, "x must be finite, and 40 of its 60 values"),
        ({"labels": torch.full((20,), 3)}, r"K > 3\], got \[1, 3\]"),
        ({"x": torch.zeros(20, dtype=torch.uint8)}, r"uint8 images .* got torch.uint8 \[20\]"),
        ({"x": torch.zeros(20, 3, dtype=torch.int64)}, r"x must be floats .* got torch.int64 \[20, 3\]"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"setting": replace(BASE, smoothing=1.7)}, "below K/.K-1. = 1.5 for K = 3, got 1.7"),
        ({"setting": CROPPED}, r"crop-flip needs uint8 images .* got torch.float32 \[20, 3\]"),
        ({"setting": CROPPED, "x": torch.zeros(20, 3, 5, 5)}, "crop-flip needs uint8 images"),
        ({"setting": replace(BASE, smoothing=0.0, labels="teacher")}, "labels='teacher' and no teacher do not fit"),
        ({"teacher": teacher}, "labels='data' and a teacher do not fit"),
    ],
)
def test_bad_data_is_named(change, message):
    x, labels = data()
    arguments = {"x": x, "labels": labels, "setting": BASE, "seed": 0, "measure": nothing} | change
    with pytest.raises(ValueError, match=message):
        train(network(), **arguments)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        init_generator(-1)


@pytest.mark.parametrize(("n", "batch_size"), [(21, 20), (1, 8), (20, 1), (9, 8)])
def test_a_minibatch_of_one_is_refused_where_the_model_cannot_take_it(n, batch_size):
    """Batch normalisation of features without pixels; nothing of the model moves, nor does torch's random state."""
    x, labels = (part[torch.arange(n) % 20] for part in data())
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    setting = replace(BASE, batch_size=batch_size)
    arguments = {"setting": setting, "seed": 0, "measure": lambda model: pytest.fail("it was measured")}
    with pytest.raises(ValueError, match=f"{n} examples in minibatches of {batch_size} leave a minibatch of one, on"):
        train(model, x, labels, **arguments)
    with pytest.raises(ValueError, match="leave a minibatch of one"):
        gradient_norms(model, x, labels, num_classes=3, setting=setting, seed=0, epoch=0, draws=2)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training and torch.equal(torch.get_rng_state(), stream)
    frame = train(network(), x, labels, **arguments | {"measure": nothing})  # which normalises nothing
    assert frame.iloc[-1][["metric", "value"]].tolist() == ["diverged", 0.0]


def test_threads_are_given_back():
    """After a trial, and after one that whoever watches it has stopped."""

    def stop(epoch, state):
        raise KeyboardInterrupt(f"after {epoch}")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, frame = final(BASE, measure=lambda model: {"train": {"threads": torch.get_num_threads()}})
        assert frame.loc[frame["metric"] == "threads", "value"].tolist() == [1.0] and torch.get_num_threads() == 2
        with pytest.raises(KeyboardInterrupt, match="after 1"):
            final(BASE, after_epoch=stop)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
