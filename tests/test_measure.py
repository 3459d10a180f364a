"""Measures against NumPy on the same numbers, and their invariances."""

import numpy as np
import pytest
import torch

from labelaug.measure import block_norm, entry_ratio, error_rate, logit_share, norm_share


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
