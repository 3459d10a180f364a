"""Losses against torch's own, against each other, and at the points where they are known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from labelaug.losses import binary_soft_cross_entropy, l2_penalty, soft_cross_entropy, squared_error
from labelaug.targets import binary_targets, one_hot_targets, smooth_targets

F64 = torch.float64
# Float64, numbers of order 1..10 and sums of some dozens of them: a few hundred ulp at most.
ROUNDING = dict(rtol=1e-12, atol=1e-12)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.5])
def test_smoothing_gap(num_classes, smoothing):
    """The loss to a smoothed target is least at logit gap log(1 + K(1-ε)/ε), where it is the entropy H(q)."""
    target = smooth_targets(torch.tensor([0]), num_classes, smoothing=smoothing, dtype=F64)

    def slope_and_loss(gap):
        logits = torch.zeros(1, num_classes, dtype=F64)
        logits[0, 0] = gap
        logits.requires_grad_()
        loss = soft_cross_entropy(logits, target)
        return torch.autograd.grad(loss, logits)[0].abs().max().item(), loss.item()

    slope, loss = slope_and_loss(math.log1p(num_classes * (1 - smoothing) / smoothing))
    assert slope < 1e-12  # stationary, and the loss is convex: the minimiser
    assert loss == pytest.approx(-(target * target.log()).sum().item(), abs=1e-12)
    assert slope_and_loss(math.log((1 - smoothing) * (num_classes - 1) / smoothing))[0] > 1e-4  # ε/(K-1) must fail


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_equals_torch_label_smoothing(num_classes, smoothing):
    """torch.nn.CrossEntropyLoss(label_smoothing=ε) spreads ε over all K classes, and so do we."""
    logits = 3 * normal(40, num_classes)
    labels = torch.arange(40) % num_classes
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels)

    def ours(smoothing):
        return soft_cross_entropy(logits, smooth_targets(labels, num_classes, smoothing=smoothing, dtype=F64))

    assert_close(ours(smoothing), theirs, **ROUNDING)
    if smoothing:  # mass ε over the K - 1 wrong classes only
        assert (ours(smoothing * num_classes / (num_classes - 1)) - theirs).abs() > 1e-3


def test_negative_smoothing_is_affine_in_smoothing():
    """The loss is affine in the target, so ε < 0 continues the line through torch's values at ε = 0 and 0.5."""
    logits, labels = 3 * normal(40, 4), torch.arange(40) % 4
    at_zero, at_half = (torch.nn.CrossEntropyLoss(label_smoothing=eps)(logits, labels) for eps in (0.0, 0.5))
    for smoothing in (-0.1, -0.6):
        ours = soft_cross_entropy(logits, smooth_targets(labels, 4, smoothing=smoothing, dtype=F64))
        assert_close(ours, at_zero + (at_half - at_zero) * smoothing / 0.5, **ROUNDING)
        assert (ours - at_zero).abs() > 0.01  # and does not stop at ε = 0


@pytest.mark.parametrize("smoothing", [-0.4, 0.0, 0.1, 1.0, 1.9])
def test_eq_binary_ce(smoothing):
    """One logit z is the two-class loss at logits (0, z) and targets (1 - t, t); at logits (z, 0) it is not."""
    logits, labels = 4 * normal(30), torch.arange(30) % 2
    binary = binary_soft_cross_entropy(logits, binary_targets(labels, smoothing=smoothing, dtype=F64))
    targets = smooth_targets(labels, 2, smoothing=smoothing, dtype=F64)
    zero = torch.zeros_like(logits)
    assert_close(binary, soft_cross_entropy(torch.stack([zero, logits], -1), targets), **ROUNDING)
    if smoothing != 1.0:  # at ε = 1 both classes have mass 1/2 and the loss is even in z
        assert (binary - soft_cross_entropy(torch.stack([logits, zero], -1), targets)).abs() > 0.01


def test_binary_equals_torch_with_logits():
    """F.binary_cross_entropy_with_logits takes the same targets in [0, 1] and has the same mean."""
    logits, targets = 4 * normal(30), normal(30, seed=1).sigmoid()
    ours = binary_soft_cross_entropy(logits, targets)
    assert_close(ours, F.binary_cross_entropy_with_logits(logits, targets), **ROUNDING)
    assert (ours - F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")).abs() > 1


@pytest.mark.parametrize("smoothing", [-0.4, 0.0, 0.3])
def test_gradient_is_sigmoid_minus_target(smoothing):
    """∂(n·loss)/∂z = σ(z) - t, for negative smoothing too, where t leaves [0, 1]."""
    logits = (4 * normal(30)).requires_grad_()
    targets = binary_targets(torch.arange(30) % 2, smoothing=smoothing, dtype=F64)
    (gradient,) = torch.autograd.grad(30 * binary_soft_cross_entropy(logits, targets), logits)
    assert_close(gradient, logits.detach().sigmoid() - targets, **ROUNDING)
    assert (gradient - (targets - logits.detach().sigmoid())).abs().max() > 0.1
    assert (smoothing < 0) == bool(((targets < 0) | (targets > 1)).any())


def test_losses_at_extreme_logits():
    """The limits |z| and 0 are reached without overflow: the loss is evaluated on the scale of logarithms."""
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=F64)
    targets = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=F64)
    one_by_one = binary_soft_cross_entropy(logits[:, None], targets[:, None])
    assert one_by_one.tolist() == [1e4, 1e4, 0.0, 0.0]
    two_class = torch.stack([torch.zeros_like(logits), logits], -1)[:, None]
    assert_close(soft_cross_entropy(two_class, torch.stack([1 - targets, targets], -1)[:, None]), one_by_one)
    assert not torch.isfinite(-(1 - logits[0].sigmoid()).log())  # the formula as it is written in papers


def test_squared_error_is_torchs_times_the_outputs():
    """F.mse_loss divides by n·K, ours by n: the mean over examples of a squared distance."""
    outputs, targets = normal(20, 7), one_hot_targets(torch.arange(20) % 7, 7, dtype=F64)
    ours = squared_error(outputs, targets)
    assert_close(ours, 7 * F.mse_loss(outputs, targets), **ROUNDING)
    assert_close(ours, F.mse_loss(outputs, targets, reduction="sum") / 20, **ROUNDING)
    assert (ours - F.mse_loss(outputs, targets)).abs() > 0.1


def test_l2_penalty_gradient():
    """The gradient of (λ/2)‖w‖² is λw; without the factor ½ it would be twice that."""
    weight = normal(3, 6).requires_grad_()
    decay = torch.tensor([0.5, 0.0, 2.0], dtype=F64)
    penalty = l2_penalty(weight, weight_decay=decay)
    (gradient,) = torch.autograd.grad(penalty.sum(), weight)
    assert_close(gradient, decay[:, None] * weight.detach(), **ROUNDING)
    assert (gradient[0] - 2 * decay[0] * weight.detach()[0]).abs().max() > 0.1
    assert_close(penalty, decay / 2 * torch.linalg.vector_norm(weight.detach(), dim=-1) ** 2, **ROUNDING)
    assert_close(l2_penalty(weight.detach()[0], weight_decay=0.5), penalty.detach()[0], **ROUNDING)


@pytest.mark.parametrize("loss", [soft_cross_entropy, squared_error, binary_soft_cross_entropy])
def test_leading_axes_survive(loss):
    """[seeds, settings, n, …] gives [seeds, settings], each the loss of its own slice; targets may be shared."""
    tail = (9,) if loss is binary_soft_cross_entropy else (9, 3)
    scores = normal(2, 4, *tail)
    targets = normal(*tail, seed=1).sigmoid()
    together = loss(scores, targets)
    assert together.shape == (2, 4)
    for s in range(2):
        for k in range(4):
            assert_close(together[s, k], loss(scores[s, k], targets), **ROUNDING)
    assert together.std() > 0.01  # the slices do differ


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        (soft_cross_entropy, ((5, 3), (5, 2))),
        (squared_error, ((5, 3), (1, 3))),
        (binary_soft_cross_entropy, ((5,), (1,))),
    ],
)
def test_shapes_that_would_broadcast_are_refused(loss, shapes):
    first, second = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="must agree, got shapes") as error:
        loss(first, second)
    assert str(tuple(shapes[0])) in str(error.value) and str(tuple(shapes[1])) in str(error.value)
