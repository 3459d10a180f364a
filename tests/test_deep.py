"""The one-trial trainer against a plain torch loop, its streams, its records, and what it does when a run diverges."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from labelaug.measure import class_error, mixed_logits, relative_variance, within_class_variance
from labelaug.models import mlp
from labelaug.training.deep import COLUMNS, DeepSetting, init_generator, train
from labelaug.training.linear import LAM, ORDER, PARTNER

BASE = DeepSetting(0.05, epochs=3, batch_size=8, smoothing=0.1)


def data(n=20, d=3, num_classes=3):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, d, generator=generator), torch.arange(n) % num_classes


def network(seed=0, d=3, num_classes=3, dtype=torch.float32):
    return mlp(d, (7, 5), num_classes, generator=init_generator(seed)).to(dtype)


def final(setting, *, seed=0, measure=lambda model: {}, model=None):
    model = model or network(seed)
    frame = train(model, *data(), setting=setting, seed=seed, measure=measure)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), frame


def plain_loop(setting, seed):
    """The same trial in float64 as a reader would write it: torch's own loss and unfused optimiser, soft labels."""
    x, labels = data()
    x = x.double()
    model = network(seed, dtype=torch.float64)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[setting.optimiser]
    optimiser = kind(model.parameters(), lr=setting.learning_rate)
    order, partner, lam = (np.random.default_rng([seed, stream]) for stream in (ORDER, PARTNER, LAM))
    for _ in range(setting.epochs):
        shuffled = order.permutation(20)
        for begin in range(0, 20, setting.batch_size):
            chosen = shuffled[begin : begin + setting.batch_size]
            xb, yb = x[chosen], labels[chosen]
            one, other, weight = xb, yb, torch.ones(len(yb), dtype=torch.float64)
            if setting.mixup_alpha is not None:
                size = len(chosen) if setting.lam_per == "example" else None
                drawn = lam.beta(setting.mixup_alpha, setting.mixup_alpha, size)
                weight = torch.as_tensor(drawn, dtype=torch.float64).expand(len(yb))
                pick = torch.from_numpy(partner.permutation(len(chosen)))
                one, other = weight[:, None] * xb + (1 - weight)[:, None] * xb[pick], yb[pick]
            logits = model(one)
            first, second = (
                nn.functional.cross_entropy(logits, y, label_smoothing=setting.smoothing, reduction="none")
                for y in (yb, other)
            )
            loss = (weight * first + (1 - weight) * second).mean()
            loss = loss + 0.5 * setting.weight_decay * sum(p.square().sum() for p in model.parameters())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


CASES = [
    DeepSetting(0.05, 3, 8),
    DeepSetting(0.05, 3, 8, smoothing=0.2),
    DeepSetting(0.05, 3, 8, weight_decay=0.3),
    DeepSetting(0.05, 3, 8, mixup_alpha=0.7),
    DeepSetting(0.05, 3, 8, mixup_alpha=0.7, lam_per="example", smoothing=0.1, weight_decay=0.01),
    DeepSetting(0.1, 4, 20, optimiser="sgd", mixup_alpha=2.0, weight_decay=0.1),
    DeepSetting(0.1, 2, 7, optimiser="sgd", smoothing=0.3),
]


@pytest.mark.parametrize("setting", CASES, ids=lambda s: s.key)
@pytest.mark.parametrize("seed", [0, 3])
def test_training_is_the_plain_loop(setting, seed):
    """float64 on both sides: some 12 steps of rounding, Adam dividing by small gradients, stay below 1e-10."""
    x, labels = data()
    model = network(seed, dtype=torch.float64)
    train(model, x.double(), labels, setting=setting, seed=seed, measure=lambda model: {})
    ours = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(ours, plain_loop(setting, seed), rtol=0, atol=1e-10)
    # Another seed, and each part switched off, must give other weights.
    assert (ours - plain_loop(setting, seed + 1)).abs().max() > 1e-3
    for field, off in (("smoothing", 0.0), ("weight_decay", 0.0), ("mixup_alpha", None)):
        if getattr(setting, field):
            assert (ours - plain_loop(replace(setting, **{field: off}), seed)).abs().max() > 1e-4


def test_the_same_description_and_seed_give_the_same_bits():
    setting = replace(BASE, mixup_alpha=1.0)
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
        for records, measure in ((None, lambda model: {}), ((0, 1, 2, 3), nosy)):
            torch.manual_seed(0)
            model = build()
            found.append(final(replace(BASE, record_epochs=records), model=model, measure=measure)[0])
            assert model.training
        assert torch.equal(*found)


def test_streams_are_apart():
    """The order of the examples is the same with and without mixing: seen through a model that notes its inputs."""
    x, labels = torch.arange(20.0)[:, None], torch.arange(20) % 2

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(1, 2), []

        def forward(self, x):
            self.seen.append(x.detach().clone())
            return self.linear(x)

    seen = []
    for setting in (BASE, replace(BASE, mixup_alpha=1e-9)):  # so small that λ is 0 or 1 to rounding
        model = Noting()
        train(model, x, labels, setting=setting, seed=2, measure=lambda model: {})
        seen.append(torch.cat(model.seen))
    order = np.random.default_rng([2, ORDER])
    expected = np.concatenate([order.permutation(20) for _ in range(3)])
    assert torch.equal(seen[0][:, 0], torch.from_numpy(expected).float())
    batches = [list(map(set, (s[i : i + 4, 0].tolist() for i in range(0, 60, 20)))) for s in seen]
    assert all(len(b) == 4 for b in batches[0])
    for begin in (0, 8, 16, 20, 28, 36):  # each mixed batch holds only examples of the plain batch
        size = 4 if begin % 20 == 16 else 8
        plain, mixed = (set(s[begin : begin + size, 0].tolist()) for s in seen)
        assert mixed <= plain


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
    # 20 examples in minibatches of 8: three steps an epoch, the last of 4 examples.
    assert rows == [
        *([0, 0, *r] for r in record),
        *([6, 2, *r] for r in record),
        [9, 3, "train", "diverged", 0.0],
    ]
    assert final(BASE, measure=measure)[1]["epoch"].unique().tolist() == [3]


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_run_that_diverges_says_so_and_stops(optimiser):
    setting = replace(BASE, learning_rate=1e30, optimiser=optimiser, epochs=50, record_epochs=(0, 1, 49, 50))
    calls = []

    def measure(model):
        calls.append(1)
        logits = model(data()[0])
        return {"train": {"loss": nn.functional.cross_entropy(logits, data()[1]).item()}}

    _, frame = final(setting, measure=measure)
    last = frame.iloc[-1]
    assert (last["metric"], last["value"]) == ("diverged", 1.0)
    assert last["step"] < 30 and last["epoch"] < 10  # it did not go on to the end
    assert np.isfinite(frame["value"]).all() and (frame["metric"] == "loss").sum() <= len(calls) <= 2
    healthy = final(replace(setting, learning_rate=0.01), measure=measure)[1]
    assert healthy.iloc[-1]["value"] == 0.0 and (healthy["metric"] == "loss").sum() == 4


def test_a_loss_that_is_not_finite_is_not_stepped_on():
    """The fifth minibatch has an infinite loss: four steps are made, one epoch is whole, the parameters stay finite."""

    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.calls = network(), 0

        def forward(self, x):
            self.calls += 1
            return self.inside(x) * (float("inf") if self.calls == 5 else 1.0)

    model = Poisoned()
    weights, frame = final(replace(BASE, record_epochs=(0,)), model=model)
    assert frame[["step", "epoch", "value"]].to_numpy().tolist() == [[4, 1, 1.0]]
    assert model.calls == 5 and torch.isfinite(weights).all()


def test_a_value_that_is_not_finite_is_never_a_row():
    _, frame = final(replace(BASE, record_epochs=(1, 2, 3)), measure=lambda model: {"train": {"loss": math.nan}})
    assert frame[["epoch", "metric", "value"]].to_numpy().tolist() == [[1, "diverged", 1.0]]


def test_the_network_learns_what_a_linear_one_cannot():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    errors = {}
    for widths in ((16, 16), ()):
        model = mlp(2, widths, 2, generator=init_generator(0))
        train(model, x, labels, setting=DeepSetting(0.02, 40, 20), seed=0, measure=lambda model: {})
        errors[widths] = class_error(model(x).detach(), labels).item()
    assert errors[16, 16] < 0.05 and errors[()] > 0.3


def test_mlp_has_linears_own_start_and_its_own_stream():
    model = mlp(50, (40,), 3, generator=torch.Generator().manual_seed(1))
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in model.parameters()] == [(40, 50), (40,), (3, 40), (3,)]
    for layer, fan_in in ((model[0], 50), (model[2], 40)):
        for p in layer.parameters():
            assert p.abs().max() <= fan_in**-0.5
        # 4.5 standard errors of the mean square a²/3 of 2,000 or 120 uniform values (standard deviation 0.298 a²).
        spread = layer.weight.square().mean().item() * fan_in
        assert abs(spread - 1 / 3) < 4.5 * 0.298 / layer.weight.numel() ** 0.5
    before = torch.get_rng_state()
    mlp(5, (4,), 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    again = mlp(50, (40,), 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model[2].weight, again[2].weight)
    assert not torch.equal(network(0)[0].weight, network(1)[0].weight)


def test_the_key_names_the_description():
    assert BASE.key == DeepSetting(0.05, 3, 8, smoothing=0.1).key
    others = [replace(BASE, **change) for change in ({"smoothing": 0.2}, {"mixup_alpha": 1.0}, {"epochs": 4})]
    assert len({BASE.key, *(s.key for s in others)}) == 4
    # Frozen: a field added later, with a neutral default, must leave the names of old results alone.
    assert DeepSetting(0.001, 100, 500).key == "42617b19614c"
    assert DeepSetting(0.01, 2, 8, optimiser="sgd", mixup_alpha=1.0, record_epochs=(1, 2)).key == "bcb61381a955"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite, got inf"),
        ({"epochs": 0}, "at least 1, got 0 and 8"),
        ({"batch_size": 0}, "at least 1, got 3 and 0"),
        ({"optimiser": "lbfgs"}, "optimiser must be one of .* got 'lbfgs'"),
        ({"smoothing": 2.0}, "smoothing must be below .* got 2.0"),
        ({"smoothing": -0.1}, "smoothing must be at least 0, got -0.1"),
        ({"mixup_alpha": 0.0}, "alpha .* must be positive, got 0.0"),
        ({"lam_per": "epoch"}, "lam_per must be one of .* got 'epoch'"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(19, dtype=torch.int64)}, r"\[20, 3\] and torch.int64 \[19\]"),
        ({"labels": torch.zeros(20)}, "int64 labels"),
        ({"x": torch.zeros(0, 3), "labels": torch.zeros(0, dtype=torch.int64)}, "n > 0"),
        ({"labels": torch.full((20,), -1)}, "at least 0, got -1"),
        ({"labels": torch.full((20,), 3)}, r"K > 3\], got \[8, 3\]"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"setting": replace(BASE, smoothing=1.7)}, "below K/.K-1. = 1.5 for K = 3, got 1.7"),
    ],
)
def test_bad_data_is_named(change, message):
    x, labels = data()
    arguments = {"x": x, "labels": labels, "setting": BASE, "seed": 0, "measure": lambda model: {}} | change
    with pytest.raises(ValueError, match=message):
        train(network(), **arguments)
    with pytest.raises(ValueError, match="classes at least 2"):
        mlp(3, (4,), 1, generator=init_generator(0))
    with pytest.raises(ValueError, match="seed must be at least 0"):
        init_generator(-1)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, frame = final(BASE, measure=lambda model: {"train": {"threads": torch.get_num_threads()}})
        assert frame.loc[frame["metric"] == "threads", "value"].tolist() == [1.0] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_within_class_variance_is_the_trace_of_the_biased_covariance():
    outputs, labels = torch.randn(2, 9, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    found = within_class_variance(outputs, labels)
    for one, value in zip(outputs.numpy(), found, strict=True):
        parts = [one[labels.numpy() == y] for y in range(3)]
        by_hand = sum(len(p) / 9 * np.trace(np.cov(p.T, bias=True)) for p in parts)
        assert value.item() == pytest.approx(by_hand)
        unbiased = sum(len(p) / 9 * np.trace(np.cov(p.T)) for p in parts)
        assert abs(value.item() - unbiased) > 0.1
    for wrong in (labels[:8], labels[:0]):
        with pytest.raises(ValueError, match="n > 0"):
            within_class_variance(outputs, wrong)


def test_relative_variance_is_free_of_scale_and_shift():
    outputs, labels = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    found = relative_variance(outputs, labels).item()
    means = torch.stack([outputs[labels == y].mean(0) for y in range(3)])[labels]
    assert found == pytest.approx(((outputs - means).square().sum() / (means - outputs.mean(0)).square().sum()).item())
    assert relative_variance(7 * outputs + 3, labels).item() == pytest.approx(found)
    assert abs(within_class_variance(7 * outputs, labels).item() - within_class_variance(outputs, labels).item()) > 1


def test_class_error_counts():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, -1.0], [0.0, 0.5]])
    assert class_error(logits, torch.tensor([0, 1, 1, 1])).item() == 0.25
    with pytest.raises(ValueError, match=r"got \[4, 2\], \[3\]"):
        class_error(logits, torch.tensor([0, 1, 1]))


def test_mixed_logits_are_those_of_each_pair():
    x, _ = data(n=4)
    model = network()
    lams = [0.3, 1.0]
    found = mixed_logits(model, x, lams=lams)
    assert found.shape == (2, 4, 4, 3) and found.dtype == torch.float64 and not found.requires_grad
    for a, lam in enumerate(lams):
        for i in range(4):
            for j in range(4):
                alone = model((lam * x[i] + (1 - lam) * x[j])[None])[0]
                # float32: batches of another size sum in another order.
                assert torch.allclose(found[a, i, j].float(), alone.detach(), atol=1e-6)
    assert (found[0, 0, 1] - found[0, 1, 0]).abs().max() > 1e-3  # λ weighs the first
    for bad in ([], [1.1]):
        with pytest.raises(ValueError, match="lams must be"):
            mixed_logits(model, x, lams=bad)
