"""Mixup against torchvision's, its draws against their laws, and what its arithmetic leaves invariant."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from labelaug._torchvision import load
from labelaug.mixing import draw_lam, draw_partner, mix
from labelaug.targets import one_hot_targets

F64 = torch.float64


def images(n, seed=0):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_equals_torchvision_mixup(alpha):
    """Given torchvision's λ and its partner (the example before), inputs and targets are the same numbers."""
    load()
    from torchvision.transforms import v2

    n, num_classes, seed = 7, 4, 11
    x, labels = images(n), torch.arange(n) % num_classes
    torch.manual_seed(seed)
    lam = torch.distributions.Beta(torch.tensor([alpha]), torch.tensor([alpha])).sample(()).item()
    torch.manual_seed(seed)
    their_x, their_targets = v2.MixUp(alpha=alpha, num_classes=num_classes)(x, labels)

    partner = (torch.arange(n) - 1) % n
    targets = one_hot_targets(labels, num_classes)
    assert_close(mix(x, lam, partner), their_x, rtol=1e-13, atol=1e-13)  # two products and a sum in float64
    assert_close(mix(targets, lam, partner), their_targets, rtol=1e-6, atol=1e-6)  # their targets are float32
    for wrong_lam, wrong_partner in ((1 - lam, partner), (lam, (torch.arange(n) + 1) % n)):
        assert (mix(x, wrong_lam, wrong_partner) - their_x).abs().max() > 1e-3


def test_eq_mixup_point():
    """λ_i x_i + (1 - λ_i) x_π(i), example by example; λ weighs the anchor, not the partner."""
    x, lam = images(6), torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 1.0], dtype=F64)
    partner = torch.tensor([3, 0, 5, 1, 2, 4])
    mixed = mix(x, lam, partner)
    for i in range(6):
        expected = lam[i] * x[i] + (1 - lam[i]) * x[partner[i]]
        assert_close(mixed[i], expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(mix(x, 1.0, partner), x)
    assert torch.equal(mix(x, 0.0, partner), x[partner])
    swapped = mix(x, 1 - lam, partner)
    assert (mixed - swapped)[:3].abs().amax((1, 2, 3)).min() > 0.1  # the other convention
    assert torch.equal(swapped[3], mixed[3])  # which λ = ½ cannot tell apart


def test_one_lam_per_batch_is_the_same_lam_per_example():
    x, partner = images(5), torch.tensor([1, 2, 3, 4, 0])
    assert torch.equal(mix(x, 0.3, partner), mix(x, torch.full((5,), 0.3, dtype=F64), partner))
    assert torch.equal(mix(x, torch.tensor(0.3), partner), mix(x, torch.tensor(0.3).item(), partner))
    assert not torch.equal(mix(x, 0.3, partner), mix(x, torch.linspace(0.1, 0.5, 5, dtype=F64), partner))


def test_mixing_commutes_with_a_linear_model():
    """⟨w, λx + (1-λ)x'⟩ = λz + (1-λ)z': logits may be mixed instead of inputs, but not after a nonlinearity."""
    x = images(50).flatten(1)
    weight = torch.randn(48, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    rng = np.random.default_rng(0)
    lam, partner = draw_lam(50, 1.0, per="example", rng=rng), draw_partner(50, rng=rng)
    assert_close(mix(x, lam, partner) @ weight, mix(x @ weight, lam, partner), rtol=1e-12, atol=1e-12)
    bent = mix((x @ weight).tanh(), lam, partner)
    assert ((mix(x, lam, partner) @ weight).tanh() - bent).abs().max() > 0.1


def test_mean_of_a_batch_survives_one_lam_per_batch():
    """A permutation keeps the mean, so mixing a batch with one λ does; a partner that repeats an example does not."""
    x = images(8)
    mixed = mix(x, 0.3, draw_partner(8, rng=np.random.default_rng(0)))
    assert_close(mixed.mean(0), x.mean(0), rtol=0, atol=1e-14)
    assert (mix(x, 0.3, torch.zeros(8, dtype=torch.int64)).mean(0) - x.mean(0)).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_lam_follows_beta(alpha):
    """Kolmogorov-Smirnov against Beta(α, α), per example and per batch; false-alarm rate 1e-4 for each of the six.

    The control: the same draws are not Beta(2α, 2α), nor the max(λ, 1 - λ) that some codes use instead.
    """
    each = draw_lam(20_000, alpha, per="example", rng=np.random.default_rng(1)).numpy()
    rng = np.random.default_rng(2)
    batch = np.array([draw_lam(64, alpha, per="batch", rng=rng).item() for _ in range(5_000)])
    for lam in (each, batch):
        assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-4
        assert stats.kstest(lam, stats.beta(2 * alpha, 2 * alpha).cdf).pvalue < 1e-10
        assert stats.kstest(np.maximum(lam, 1 - lam), stats.beta(alpha, alpha).cdf).pvalue < 1e-10


def test_lam_shapes():
    rng = np.random.default_rng(0)
    each, batch = draw_lam(9, 0.5, per="example", rng=rng), draw_lam(9, 0.5, per="batch", rng=rng)
    assert each.shape == (9,) and batch.shape == ()
    assert each.dtype == batch.dtype == F64
    assert each.unique().numel() == 9
    again = np.random.default_rng(0)
    assert torch.equal(draw_lam(9, 0.5, per="example", rng=again), each)


def test_partner_is_a_uniform_permutation():
    """All 24 orders of four, chi-square at a false-alarm rate of 1e-4; permutations without fixed points must fail."""
    rng = np.random.default_rng(3)
    orders = list(itertools.permutations(range(4)))
    draws = [tuple(draw_partner(4, rng=rng).tolist()) for _ in range(6_000)]
    assert set(draws) == set(orders)
    assert stats.chisquare([draws.count(order) for order in orders]).pvalue > 1e-4
    deranged = [draw for draw in draws if all(place != i for i, place in enumerate(draw))]
    assert stats.chisquare([deranged.count(order) for order in orders]).pvalue < 1e-10
    assert draw_partner(4, rng=rng).dtype == torch.int64


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match=f"must be positive, got {alpha}"):
        draw_lam(4, alpha, per="batch", rng=np.random.default_rng(0))


def test_refusals():
    x, partner = images(4), torch.arange(4)
    with pytest.raises(ValueError, match=r"per must be one of .*, got 'pixel'"):
        draw_lam(4, 1.0, per="pixel", rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"partner must have shape \[4\].*got \[3\]"):
        mix(x, 0.5, partner[:3])
    with pytest.raises(ValueError, match=r"lam \[\] or \[4\], got \[4\] and \[3\]"):
        mix(x, torch.full((3,), 0.5), partner)
    with pytest.raises(ValueError, match=r"got \[4\] and \[4, 1\]"):
        mix(x, torch.full((4, 1), 0.5), partner)


def test_integers_are_not_mixed_silently():
    """λ = 0.7 cast to an integer would be 0 and return the partner alone: labels must become targets first."""
    with pytest.raises(ValueError, match=r"int64"):
        mix(torch.tensor([0, 1, 1]), 0.7, torch.tensor([1, 2, 0]))
