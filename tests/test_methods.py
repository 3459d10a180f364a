"""What a method draws and what its loss is made of; and that another method needs no change of anything else."""

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.testing import assert_close

from labelaug.cli import main
from labelaug.engine import read_result
from labelaug.methods import ERM, Erm, Mixup
from labelaug.mixing import draw_lam, draw_partner, mix
from labelaug.models import mlp
from labelaug.results import load_study
from labelaug.studies import STUDIES, over_training
from labelaug.training.deep import DeepSetting, init_generator, train
from labelaug.training.linear import LAM, ORDER, PARTNER
from labelaug.trials import Images, Network, run_trial

F64 = torch.float64


def streams():
    return {"lam_rng": np.random.default_rng(1), "partner_rng": np.random.default_rng(2)}


class Seen:
    """Stands in for the model and for the trainer's ``label``; notes what it was asked."""

    def __init__(self):
        self.inputs, self.asked = [], []

    def model(self, x):
        self.inputs.append(x)
        return 2 * x

    def label(self, inputs, targets):
        self.asked.append((inputs, targets))
        return targets + 1


def batch(n=6, d=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator, dtype=F64), torch.rand(n, d, generator=generator, dtype=F64)


def test_erm_draws_nothing_and_leaves_the_minibatch_alone():
    rngs, fresh, seen, (x, targets) = streams(), streams(), Seen(), batch()
    assert ERM == Erm() and ERM.draw(6, **rngs) == ()
    assert all(rngs[name].random() == fresh[name].random() for name in rngs)
    ((outputs, wanted, weight),) = ERM.terms(seen.model, seen.label, x, targets, ())
    assert torch.equal(outputs, 2 * x) and torch.equal(wanted, targets + 1) and weight == 1.0
    assert len(seen.inputs) == 1 and seen.inputs[0] is x
    assert seen.asked[0][0] is x and seen.asked[0][1] is targets


@pytest.mark.parametrize("per", ["batch", "example"])
def test_mixup_draws_each_number_from_its_own_stream(per):
    lam, partner = Mixup(0.7, per=per).draw(6, **streams())
    reader = streams()
    size = 6 if per == "example" else None
    assert lam.dtype == F64 and lam.tolist() == np.asarray(reader["lam_rng"].beta(0.7, 0.7, size)).tolist()
    assert partner.dtype == torch.int64 and partner.tolist() == reader["partner_rng"].permutation(6).tolist()
    assert lam.tolist() != np.asarray(streams()["partner_rng"].beta(0.7, 0.7, size)).tolist()


def test_a_fixed_lam_is_not_drawn():
    rngs = streams()
    lam, partner = Mixup(lam=0.3).draw(6, **rngs)
    assert lam.shape == () and lam.dtype == F64 and lam.item() == 0.3
    assert rngs["lam_rng"].random() == streams()["lam_rng"].random()
    assert partner.tolist() == streams()["partner_rng"].permutation(6).tolist()


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("lam", [0.3, [0.0, 0.1, 0.3, 0.5, 0.9, 1.0]])
def test_mixup_is_example_by_example(lam, inputs):
    """The model and the trainer's labels see the same inputs: mixed, or as they are; the targets are always mixed."""
    seen, (x, targets), partner = Seen(), batch(), torch.tensor([3, 0, 5, 1, 2, 4])
    draw = torch.tensor(lam, dtype=F64), partner
    ((outputs, wanted, weight),) = Mixup(1.0, inputs=inputs).terms(seen.model, seen.label, x, targets, draw)
    each = [lam] * 6 if isinstance(lam, float) else lam
    for i, (a, j) in enumerate(zip(each, partner.tolist(), strict=True)):
        here = a * x[i] + (1 - a) * x[j] if inputs else x[i]
        assert_close(seen.inputs[0][i], here, rtol=1e-15, atol=1e-15)
        assert_close(outputs[i], 2 * here, rtol=1e-15, atol=1e-15)
        assert_close(wanted[i], a * targets[i] + (1 - a) * targets[j] + 1, rtol=1e-15, atol=1e-15)
    assert weight == 1.0 and len(seen.inputs) == len(seen.asked) == 1
    assert seen.asked[0][0] is seen.inputs[0]
    assert (seen.inputs[0] is x) != inputs


def test_mixup_with_lam_one_is_erm_bit_for_bit():
    seen, (x, targets) = Seen(), batch()
    method = Mixup(lam=1.0)
    ((outputs, wanted, _),) = method.terms(seen.model, seen.label, x, targets, method.draw(6, **streams()))
    assert torch.equal(outputs, 2 * x) and torch.equal(wanted, targets + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either alpha or lam, got None and None"),
        ({"alpha": 1.0, "lam": 0.5}, "either alpha or lam, got 1.0 and 0.5"),
        ({"alpha": 0.0}, "alpha .* must be positive, got 0.0"),
        ({"alpha": float("nan")}, "must be positive, got nan"),
        ({"lam": -0.1}, r"lam must lie in \[0, 1\], got -0.1"),
        ({"lam": 1.5}, r"lam must lie in \[0, 1\], got 1.5"),
        ({"lam": float("nan")}, r"lam must lie in \[0, 1\], got nan"),
        ({"alpha": 1.0, "per": "pixel"}, r"per must be one of \('batch', 'example'\), got 'pixel'"),
    ],
)
def test_a_bad_mixup_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Mixup(**fields)


def test_a_method_says_what_it_is():
    """Two methods that differ have two names; the usual Mixup is just that."""
    names = {
        "erm": ERM,
        "mixup": Mixup(1.0),
        "mixup α=0.2": Mixup(0.2),
        "mixup λ=0.5": Mixup(lam=0.5),
        "mixed labels": Mixup(1, inputs=False),
        "mixed labels α=0.2": Mixup(0.2, inputs=False),
        "mixup an example": Mixup(1.0, per="example"),
        "CutMix(alpha=1.0, size=(3, 4))": CutMix(1.0, (3, 4)),
    }
    assert {str(method): method for method in names.values()} == names


# Three methods that the package does not have, as a reader would add them.


@dataclass(frozen=True)
class CutMix:
    """A box of the partner's image in place of one's own; λ is the area that is left. Source: Yun et al. (2019)."""

    alpha: float
    size: tuple[int, int]  # height and width of the images, in pixels

    def draw(self, n, *, lam_rng, partner_rng):
        half = np.sqrt(1 - lam_rng.beta(self.alpha, self.alpha)) / 2
        box = [(c - half * s, c + half * s) for s, c in zip(self.size, lam_rng.integers(self.size), strict=True)]
        ends = [np.clip(np.round(pair), 0, s) for pair, s in zip(box, self.size, strict=True)]
        return torch.tensor(np.array(ends), dtype=torch.int64), draw_partner(n, rng=partner_rng)

    def terms(self, model, label, x, targets, draw):
        ((top, bottom), (left, right)), partner = draw
        cut, area = x.clone(), (bottom - top) * (right - left)
        cut[..., top:bottom, left:right] = x[partner][..., top:bottom, left:right]
        lam = 1 - area.to(x.dtype) / (self.size[0] * self.size[1])
        return [(model(cut), label(cut, mix(targets, lam, partner)), 1.0)]


@dataclass(frozen=True)
class RegMixup:
    """The loss of ERM and, with weight η, that of Mixup. Source: Pinto et al. (2022)."""

    alpha: float
    eta: float

    def draw(self, n, *, lam_rng, partner_rng):
        return draw_lam(n, self.alpha, per="batch", rng=lam_rng), draw_partner(n, rng=partner_rng)

    def terms(self, model, label, x, targets, draw):
        mixed = mix(x, *draw)
        return [
            (model(x), label(x, targets), 1.0),
            (model(mixed), label(mixed, mix(targets, *draw)), self.eta),
        ]


@dataclass(frozen=True)
class ManifoldMixup:
    """Mixes what enters the last dense layer, and the targets alike. Source: Verma et al. (2019)."""

    alpha: float = 2.0

    def draw(self, n, *, lam_rng, partner_rng):
        return draw_lam(n, self.alpha, per="batch", rng=lam_rng), draw_partner(n, rng=partner_rng)

    def terms(self, model, label, x, targets, draw):
        last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
        hook = last.register_forward_pre_hook(lambda layer, inputs: (mix(inputs[0], *draw),))
        try:
            outputs = model(x)
        finally:
            hook.remove()
        return [(outputs, label(x, mix(targets, *draw)), 1.0)]


def cutmix_by_hand(method, model, x, targets, lam, partner):
    """Pixel by pixel: loss and floor of one minibatch."""
    height, width = method.size
    half = (1 - lam.beta(method.alpha, method.alpha)) ** 0.5 / 2
    row, column = lam.integers(0, [height, width])
    rows = [round(min(max(e, 0), height)) for e in (row - half * height, row + half * height)]
    columns = [round(min(max(e, 0), width)) for e in (column - half * width, column + half * width)]
    pick, cut, swapped = partner.permutation(len(x)), x.clone(), 0
    for i in range(*rows):
        for j in range(*columns):
            cut[:, :, i, j] = x[pick][:, :, i, j]
            swapped += 1
    share = swapped / (height * width)
    wanted = (1 - share) * targets + share * targets[pick]
    return nn.functional.cross_entropy(model(cut), wanted), torch.special.entr(wanted).sum() / len(x)


def regmixup_by_hand(method, model, x, targets, lam, partner):
    weight, pick = lam.beta(method.alpha, method.alpha), partner.permutation(len(x))
    clean = nn.functional.cross_entropy(model(x), targets)
    wanted = weight * targets + (1 - weight) * targets[pick]
    mixed = nn.functional.cross_entropy(model(weight * x + (1 - weight) * x[pick]), wanted)
    return clean + method.eta * mixed, method.eta * torch.special.entr(wanted).sum() / len(x)


def manifold_by_hand(method, model, x, targets, lam, partner):
    """Behind the layer that is mixed stands an affine one, so that its outputs may be mixed in its place."""
    weight, pick, outputs = lam.beta(method.alpha, method.alpha), partner.permutation(len(x)), model(x)
    wanted = weight * targets + (1 - weight) * targets[pick]
    loss = nn.functional.cross_entropy(weight * outputs + (1 - weight) * outputs[pick], wanted)
    return loss, torch.special.entr(wanted).sum() / len(x)


def images(n=11):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 1, 3, 4, generator=generator, dtype=F64), torch.arange(n) % 3


def network():
    return nn.Sequential(nn.Flatten(), mlp(12, (5,), 3, generator=init_generator(0))).to(F64)


def trained(method):
    """Weights and running rows of three epochs with a smaller last minibatch."""
    model, setting = network(), DeepSetting(0.2, 3, 4, method=method, optimiser="sgd")
    frame = train(model, *images(), setting=setting, seed=1, measure=lambda model: {})
    return nn.utils.parameters_to_vector(model.parameters()).detach(), frame


@pytest.mark.parametrize(
    ("method", "by_hand"),
    [
        (CutMix(1.0, (3, 4)), cutmix_by_hand),
        (RegMixup(0.7, eta=0.5), regmixup_by_hand),
        (ManifoldMixup(0.7), manifold_by_hand),
    ],
    ids=["cutmix", "regmixup", "manifold"],
)
def test_another_method_is_one_more_class(method, by_hand):
    """The trainer as it stands runs methods it has never seen: weights, running loss and floor are a reader's own."""
    (x, labels), model, running = images(), network(), []
    for epoch in range(3):
        order, lam, partner = (np.random.default_rng([1, purpose, epoch]) for purpose in (ORDER, LAM, PARTNER))
        shuffled, sums = order.permutation(11), np.zeros(2)
        for chosen in (shuffled[:4], shuffled[4:8], shuffled[8:]):
            loss, floor = by_hand(method, model, x[chosen], torch.eye(3, dtype=F64)[labels[chosen]], lam, partner)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= 0.2 * gradient
            sums += np.array([loss.item(), floor.item()]) * len(chosen) / 11
        running.append(sums)
    weights, frame = trained(method)
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    # float64 and nine steps: rounding.
    assert_close(weights, expected, rtol=0, atol=1e-12)
    rows = frame[frame["metric"] != "diverged"].pivot(index="epoch", columns="metric", values="value")
    np.testing.assert_allclose(rows[["running_loss", "running_floor"]], running, rtol=1e-12)
    # The description has a name of its own, and each of its numbers counts.
    others = [ERM, Mixup(0.7), replace(method, alpha=3.0)]
    keys = {DeepSetting(0.2, 3, 4, method=m, optimiser="sgd").key for m in (method, *others)}
    assert len(keys) == 4 and frame["key"].iloc[0] in keys
    for other in others:
        assert (trained(other)[0] - weights).abs().max() > 1e-3


def test_weights_of_terms_multiply_their_loss():
    """RegMixup with η = 0 is ERM bit for bit, and its gradient is linear in η."""
    assert torch.equal(trained(RegMixup(0.7, eta=0.0))[0], trained(ERM)[0])
    start = nn.utils.parameters_to_vector(network().parameters()).detach()

    def step(method):
        model, setting = network(), DeepSetting(0.2, 1, 11, method=method, optimiser="sgd")
        train(model, *images(), setting=setting, seed=1, measure=lambda model: {})
        return nn.utils.parameters_to_vector(model.parameters()).detach() - start

    plain, mixed, both = step(ERM), step(Mixup(0.7)), step(RegMixup(0.7, eta=2.5))
    assert_close(both, plain + 2.5 * mixed, rtol=0, atol=1e-13)
    assert (both - plain - mixed).abs().max() > 1e-3


def study(scale):
    """A study of methods that the package does not have, on few digits, beside ERM and a switch to it."""
    base = over_training("smoke")[0]
    images, network = Images("digits", fraction=0.1, validation=5, test=5), Network("mlp", 8)
    setting = replace(base.setting, epochs=2, record_epochs=(1, 2), milestones=(1,))
    base = replace(base, images=images, network=network, setting=setting, gradient_epochs=(2,))
    trials = [
        replace(base, setting=replace(setting, method=method))
        for method in (CutMix(1.0, (8, 8)), RegMixup(0.7, eta=0.5), ManifoldMixup(), ManifoldMixup(0.5), ERM)
    ]
    return [*trials, replace(trials[0], setting=replace(trials[0].setting, switch_epoch=1))]


def test_a_trial_of_any_method_is_listed_trained_stored_and_read(tmp_path, monkeypatch):
    """From the command line through a worker process to the study's table; the rows are those of a call by hand."""
    monkeypatch.setitem(STUDIES, "methods", study)
    monkeypatch.setenv("LABELAUG_DATA", str(tmp_path))
    trials, runs = study("smoke"), tmp_path / "runs"

    def command(*arguments):
        done = CliRunner().invoke(main, ["train", "methods", "--device", "cpu", "--runs", str(runs), *arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done

    assert all("  to do " in line for line in command("--list").stdout.splitlines())
    said = command().stderr
    listed = command("--list").stdout.splitlines()
    for trial, line in zip(trials, listed, strict=True):
        assert line.startswith(f"{trial.key}  done ") and line.endswith(trial.label) and trial.label in said
        alone = run_trial(trial, data_dir=tmp_path)
        rows, provenance = read_result(trial, runs)
        assert rows.equals(alone[alone["metric"] != "seconds"].reset_index(drop=True))
        assert provenance["description"]["setting"]["method"]["type"] == type(trial.setting.method).__name__
    assert listed[0].endswith("digits 0.1 mlp-8 CutMix(alpha=1.0, size=(8, 8)) seed 0")
    assert len({trial.label for trial in trials}) == len({trial.key for trial in trials}) == 6
    found = load_study("methods", "smoke", folder=runs).trials.set_index("key")
    for trial in trials:
        row, method = found.loc[trial.key], trial.setting.method
        assert row["setting.method.type"] == type(method).__name__
        assert row["setting.method.alpha"] == method.alpha if method != ERM else np.isnan(row["setting.method.alpha"])
    assert found.loc[trials[0].key, "setting.method.size"] == "[8, 8]"
    # A copy that went through a pipe has the name and the words of its original.
    for trial in trials:
        copy = pickle.loads(pickle.dumps(trial))
        assert (copy, copy.key, copy.label) == (trial, trial.key, trial.label)
