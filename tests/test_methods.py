"""What a method draws and what its loss is made of; and that another method needs no change of the trainer."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from labelaug.methods import ERM, Erm, Mixup
from labelaug.mixing import draw_lam, draw_partner, mix
from labelaug.models import mlp
from labelaug.training.deep import DeepSetting, init_generator, train
from labelaug.training.linear import LAM, ORDER, PARTNER

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


# Two methods that the package does not have, as a reader would add them.


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
    [(CutMix(1.0, (3, 4)), cutmix_by_hand), (RegMixup(0.7, eta=0.5), regmixup_by_hand)],
    ids=["cutmix", "regmixup"],
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
    # float64 and nine steps: rounding. The running means are kept in float32.
    assert_close(weights, expected, rtol=0, atol=1e-12)
    rows = frame[frame["metric"] != "diverged"].pivot(index="epoch", columns="metric", values="value")
    np.testing.assert_allclose(rows[["running_loss", "running_floor"]], running, rtol=1e-6)
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
