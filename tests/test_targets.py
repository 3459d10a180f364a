"""Targets against their closed form, and against the targets that torch's own label smoothing implies."""

import pytest
import torch
from torch.testing import assert_close

from labelaug.targets import binary_targets, one_hot_targets, smooth_targets

F64 = torch.float64


def test_one_hot_targets():
    """Rows of the identity, for labels with leading axes too."""
    labels = torch.tensor([[0, 2], [1, 1], [2, 0]])
    targets = one_hot_targets(labels, 3, dtype=F64)
    assert torch.equal(targets, torch.eye(3, dtype=F64)[labels])
    assert targets.shape == (3, 2, 3)
    assert one_hot_targets(labels, 3).dtype == torch.float32


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("smoothing", [-0.3, 0.0, 0.1, 0.75, 1.0])
def test_eq_smooth_target(num_classes, smoothing):
    """Mass 1 - ε + ε/K on the true class and ε/K on each other; ε/(K-1) is a different convention."""
    labels = torch.arange(num_classes).repeat(2)
    targets = smooth_targets(labels, num_classes, smoothing=smoothing, dtype=F64)
    for row, label in zip(targets.tolist(), labels.tolist(), strict=True):
        expected = [smoothing / num_classes] * num_classes
        expected[label] = 1 - smoothing * (num_classes - 1) / num_classes
        assert row == pytest.approx(expected, abs=1e-15)  # a few roundings of numbers below 2
    assert_close(targets.sum(-1), torch.ones(len(labels), dtype=F64), rtol=0, atol=1e-14)
    if smoothing:
        other = torch.full((num_classes, num_classes), smoothing / (num_classes - 1), dtype=F64)
        other.fill_diagonal_(1 - smoothing)
        assert (targets - other[labels]).abs().max() > 0.01


def test_torch_implies_the_same_targets():
    """torch's smoothed loss is -⟨q, log p⟩ for an unknown q: its gradient at equal logits, p = 1/K, gives q = p - ∇."""
    num_classes, smoothing = 5, 0.3
    labels = torch.tensor([3])

    def implied(smoothing):
        logits = torch.zeros(1, num_classes, dtype=F64, requires_grad=True)
        torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels).backward()
        return 1 / num_classes - logits.grad

    ours = smooth_targets(labels, num_classes, smoothing=smoothing, dtype=F64)
    assert_close(ours, implied(smoothing), rtol=0, atol=1e-15)
    other = smooth_targets(labels, num_classes, smoothing=smoothing * num_classes / (num_classes - 1), dtype=F64)
    assert (other - implied(smoothing)).abs().max() > 0.05


@pytest.mark.parametrize("smoothing", [-0.4, 0.0, 0.1, 0.75, 1.9])
def test_eq_ls_binary(smoothing):
    """The binary target is the second column of the two-class target: 1 - ε/2 on the true class, not 1 - ε."""
    labels = torch.tensor([0, 1, 1, 0])
    ours = binary_targets(labels, smoothing=smoothing, dtype=F64)
    assert_close(ours, smooth_targets(labels, 2, smoothing=smoothing, dtype=F64)[:, 1], rtol=0, atol=1e-15)
    assert ours.tolist() == pytest.approx([smoothing / 2, 1 - smoothing / 2, 1 - smoothing / 2, smoothing / 2])
    if smoothing:
        assert ours[1].item() != pytest.approx(1 - smoothing, abs=0.01)
    assert torch.equal(binary_targets(labels), torch.tensor([0.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("num_classes", [2, 4, 10])
def test_smoothing_limit(num_classes):
    """The true class carries mass up to K/(K-1), and the most of it up to 1; from K/(K-1) on smoothing is refused."""
    limit = num_classes / (num_classes - 1)
    labels = torch.tensor([1])
    below = smooth_targets(labels, num_classes, smoothing=limit - 1e-9, dtype=F64)[0]
    assert below[1].item() == pytest.approx(1e-9 / limit, rel=1e-6)
    for smoothing, most in ((1 - 1e-9, True), (1 + 1e-9, False)):
        target = smooth_targets(labels, num_classes, smoothing=smoothing, dtype=F64)[0]
        assert bool(target[1] > target[0]) is most
    for smoothing in (limit, limit + 0.5, float("nan")):
        with pytest.raises(ValueError, match=rf"below K/\(K-1\) = {limit:.4g} for K = {num_classes}, got {smoothing}"):
            smooth_targets(labels, num_classes, smoothing=smoothing)
    with pytest.raises(ValueError, match="smoothing must be below"):
        binary_targets(labels, smoothing=2.0)


@pytest.mark.parametrize("labels", [[1, 2], [-1, 1], [0, 255], [0.0, 1.0]])
def test_labels_that_are_none_are_refused(labels):
    """Of K = 2 classes: by us, or by torch where a check of ours would wait for the device at each step."""
    binary_targets(torch.tensor([0, 1])), one_hot_targets(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match=r"labels must be integers in 0\.\.1, got torch"):
        binary_targets(torch.tensor(labels))
    with pytest.raises(RuntimeError, match=r"Class values must be|applicable to index tensor"):
        one_hot_targets(torch.tensor(labels), 2)
    with pytest.raises(RuntimeError, match=r"Class values must be|applicable to index tensor"):
        smooth_targets(torch.tensor(labels), 2, smoothing=0.1)
