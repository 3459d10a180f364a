"""Measures against NumPy on the same numbers, their invariances, and what is never scored."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from labelaug.measure import (
    block_norm,
    calibration_error,
    class_error,
    entry_ratio,
    error_rate,
    logit_share,
    mixed_logits,
    norm_share,
    outputs_and_activations,
    relative_variance,
    within_class_variance,
)
from labelaug.models import mlp

F64 = torch.float64


@pytest.fixture
def weights():
    return torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_norms_against_numpy(weights):
    w = weights.numpy()
    high = slice(2, 6)
    np.testing.assert_allclose(block_norm(weights, high), np.sqrt((w[..., 2:] ** 2).sum(-1)), rtol=1e-12)
    np.testing.assert_allclose(norm_share(weights, high), (w[..., 2:] ** 2).sum(-1) / (w**2).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(entry_ratio(weights), abs(w[..., 0]) / np.linalg.norm(w[..., 1:], axis=-1), rtol=1e-12)


def test_shares_of_complementary_blocks_add_up(weights):
    mean = torch.arange(1.0, 7.0)
    for share in (norm_share, lambda w, s: logit_share(w, mean, s)):
        total = share(weights, slice(0, 2)) + share(weights, slice(2, 6))
        np.testing.assert_allclose(total, 1.0, rtol=1e-9)


def test_logit_share_does_not_depend_on_units_and_norms_do(weights):
    mean, scale = torch.arange(1.0, 7.0), torch.tensor([1.0, 1, 10, 10, 10, 10])
    high = slice(2, 6)
    in_other_units = logit_share(weights / scale, mean * scale, high)
    np.testing.assert_allclose(in_other_units, logit_share(weights, mean, high), rtol=1e-6)
    assert (block_norm(weights / scale, high) - block_norm(weights, high)).abs().min() > 0.1


def test_error_rate_counts(weights):
    x = torch.tensor([[1.0, 0, 0, 0, 0, 0], [-2.0, 0, 0, 0, 0, 0], [0.0] * 6], dtype=torch.float64)
    positive = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    labels = torch.tensor([1, 0, 0])
    assert error_rate(positive, x, labels) == 0  # a logit of 0 is read as label 0
    assert error_rate(-positive, x, labels) == pytest.approx(2 / 3)
    assert error_rate(weights, x, labels).shape == weights.shape[:3]
    one = error_rate(weights, x, labels)[1, 2, 3]
    assert one == np.mean((x.numpy() @ weights[1, 2, 3].numpy() > 0) != (labels.numpy() == 1))


def test_error_rate_refuses_shapes_that_do_not_fit(weights):
    with pytest.raises(ValueError, match=r"x must be \[n, 6\]"):
        error_rate(weights, torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3))


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
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    model = mlp(3, (7, 5), 3, generator=torch.Generator().manual_seed(0))
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


def test_activations_are_what_enters_the_last_layer():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    outputs, activations = outputs_and_activations(model, x.split(4))
    with torch.no_grad():
        assert torch.allclose(activations, model[:2](x)) and torch.allclose(outputs, model(x))
    assert not model[2]._forward_pre_hooks
    with pytest.raises(ValueError, match="no penultimate"):
        outputs_and_activations(nn.ReLU(), [x])


def calibration_by_hand(logits, labels, bins, *, open_on="left"):
    """Σ_b (n_b/n)·|accuracy_b - confidence_b|, bin by bin as Guo et al. write it."""
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    confidence, right, total = probability.max(1), probability.argmax(1) == labels, 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = (low < confidence) & (confidence <= high)
        if open_on == "right":
            inside = (low <= confidence) & ((confidence < high) | (b == bins - 1))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_calibration_error_is_that_of_fifteen_bins(num_classes):
    """The default is 15, and each other number gives another error: labels are drawn as the logits say."""
    rng = np.random.default_rng(num_classes)
    logits = 2 * rng.standard_normal((400, num_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    found = calibration_error(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    for bins in range(1, 31):
        expected = calibration_by_hand(logits, labels, bins)
        other = calibration_error(torch.from_numpy(logits), torch.from_numpy(labels), bins=bins).item()
        assert other == pytest.approx(expected, abs=1e-12)
        assert (abs(found - expected) < 1e-12) == (bins == 15), bins


@pytest.mark.parametrize(("num_classes", "bins"), [(2, 2), (2, 10), (4, 4), (5, 5), (5, 15), (10, 10), (3, 15)])
def test_bins_are_open_on_the_left(num_classes, bins):
    """Equal logits have the confidence 1/K to the last bit, which is an edge: they belong to the bin below it.

    There they are wrong, and alone; in the bin above they would make up for others that are right.
    """
    logits = np.zeros((8, num_classes))
    logits[4:, 0] = math.log((num_classes - 1) * (2 + 1 / bins) / (2 * num_classes - 2 - 1 / bins))  # 1/K + 1/(2·bins)
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    share = torch.from_numpy(logits).softmax(1).amax(1)
    assert (share[:4] == 1 / num_classes).all() and 1 / num_classes in [b / bins for b in range(bins)]
    found = calibration_error(torch.from_numpy(logits), torch.from_numpy(labels), bins=bins).item()
    assert found == pytest.approx(calibration_by_hand(logits, labels, bins), abs=1e-12)
    assert abs(found - calibration_by_hand(logits, labels, bins, open_on="right")) > 0.01


def test_calibration_error_at_both_ends():
    """A confidence of 1 lies in the last bin, one of 1/K in its own, whatever is open."""
    sure, unsure = torch.tensor([[1000.0, 0.0]] * 2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    assert calibration_error(sure, torch.tensor([0, 1])).item() == 0.5
    assert calibration_error(unsure, torch.tensor([0, 0])).item() == 0.5
    assert calibration_error(unsure, torch.tensor([0, 1])).item() == 0.0


def test_calibration_error_counts():
    """Three examples of confidence 0.8, all right; one of 0.6, wrong: (3·|1 - 0.8| + 1·|0 - 0.6|)/4."""
    probability = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.6, 0.4]], dtype=F64)
    labels = torch.tensor([0, 0, 1, 1])
    assert calibration_error(probability.log(), labels).item() == pytest.approx((3 * 0.2 + 0.6) / 4)
    assert calibration_error(torch.tensor([[50.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(0, abs=1e-12)
    # One bin for all: mean accuracy and mean confidence agree, and the two errors cancel.
    assert calibration_error(probability.log(), labels, bins=1).item() == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# What is never scored


def examples(num_classes=2, n=6):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, n, num_classes, generator=generator, dtype=F64), torch.arange(n) % num_classes


LABELLED = {
    "error_rate": lambda labels: error_rate(torch.ones(4, 3), torch.zeros(6, 3), labels),
    "class_error": lambda labels: class_error(examples()[0], labels),
    "calibration_error": lambda labels: calibration_error(examples()[0][0], labels),
}


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([1, 2, 1, 2, 1, 2], r"integers in 0\.\.1, got torch.int64, such as \[1, 2\]"),
        ([-1, 1, -1, 1, -1, 1], r"integers in 0\.\.1, got torch.int64, such as \[-1, 1\]"),
        ([0, 1, 0, 1, 0, 255], r"integers in 0\.\.1, got torch.int64, such as \[0, 1, 255\]"),
        ([0.0, 1.0, 0.0, 1.0, 0.5, 0.0], r"integers in 0\.\.1, got torch.float32, such as \[0.0, 0.5, 1.0\]"),
        ([0, 1, 0, 1, 0], r"labels \[n\].*\[5\]"),
        ([[0], [1], [0], [1], [0], [1]], r"labels \[n\].*\[6, 1\]"),
    ],
)
def test_labels_that_are_none_are_refused(name, labels, sentence):
    LABELLED[name](torch.arange(6) % 2)
    LABELLED[name]((torch.arange(6) % 2).to(torch.uint8))
    with pytest.raises(ValueError, match=sentence):
        LABELLED[name](torch.tensor(labels))


def test_no_example_has_no_error():
    none = torch.zeros(0, dtype=torch.int64)
    for measure in (
        lambda: error_rate(torch.ones(3), torch.zeros(0, 3), none),
        lambda: class_error(torch.zeros(0, 2), none),
        lambda: calibration_error(torch.zeros(0, 2), none),
        lambda: within_class_variance(torch.zeros(0, 2), none),
    ):
        with pytest.raises(ValueError, match="labels"):
            measure()


def test_a_variance_takes_any_integers_and_no_others():
    outputs, labels = examples(3)
    found = within_class_variance(outputs, labels)
    assert torch.allclose(within_class_variance(outputs, 7 - 9 * labels), found, rtol=1e-14)
    with pytest.raises(ValueError, match="integer labels"):
        within_class_variance(outputs, labels.double())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_data_that_are_not_finite_are_refused(value, weights):
    x, labels = torch.ones(5, 6, dtype=F64), torch.arange(5) % 2
    error_rate(weights, x, labels)
    x[3, 2] = value
    with pytest.raises(ValueError, match="x must be finite, and 1 of its 5 rows are not"):
        error_rate(weights, x, labels)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_that_has_diverged_is_not_scored_and_the_others_are(value, weights):
    """One of 24 linear models, one of three networks: NaN for it, and what each of the others has alone."""
    x, labels = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=F64), torch.arange(7) % 2
    alone = error_rate(weights, x, labels)
    weights[1, 2, 3, 4] = value
    found = error_rate(weights, x, labels)
    assert found[1, 2, 3].isnan() and found.isnan().sum() == 1
    assert torch.equal(
        found.nan_to_num(9), alone.index_put([torch.tensor(i) for i in (1, 2, 3)], torch.tensor(9.0).double())
    )
    for measure in (class_error, within_class_variance, relative_variance):
        outputs, labels = examples(3)
        alone = measure(outputs, labels)
        outputs[1, 4, 2] = value
        found = measure(outputs, labels)
        assert found.isnan().tolist() == [False, True, False]
        assert torch.equal(found[::2], alone[::2])
    assert calibration_error(outputs[1], labels).isnan() and calibration_error(outputs[0], labels).isfinite()
    for measure in (block_norm, norm_share):
        assert not measure(weights, slice(0, 6))[1, 2, 3].isfinite()
