"""Targets: one-hot, label-smoothed, and their binary forms."""

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot_targets(labels: Tensor, num_classes: int, *, dtype=torch.float32) -> Tensor:
    """Targets ``q_k = 1[k = y]``: labels int64 ``[..., n]`` in 0..K-1 -> ``[..., n, K]``; torch refuses others."""
    return F.one_hot(labels, num_classes).to(dtype)


def smooth_targets(labels: Tensor, num_classes: int, *, smoothing: float, dtype=torch.float32) -> Tensor:
    """Label-smoothed targets ``q_k = (1 - ε)·1[k = y] + ε/K``: the mass ε goes to all K classes, the true one included.

    Some papers spread ε over the K - 1 wrong classes; that is this with ε' = εK/(K - 1).

    Args: labels: int64 ``[..., n]`` in 0..K-1; smoothing: ε < K/(K-1); negative values sharpen the target.
    Returns: ``[..., n, K]``, rows sum to one.
    Raises: ValueError if ε ≥ K/(K-1): there the true class would carry no mass, or a negative one.
    Source: Szegedy et al. (2016), section 7; book eq-smooth-target.
    """
    check_smoothing(smoothing, num_classes)
    return (1.0 - smoothing) * one_hot_targets(labels, num_classes, dtype=dtype) + smoothing / num_classes


def binary_targets(labels: Tensor, *, smoothing: float = 0.0, dtype=torch.float32) -> Tensor:
    """Probability of class 1 under label smoothing with K = 2: ``1 - ε/2`` where the label is 1, else ``ε/2``.

    Args: labels: int64 ``[..., n]`` in {0, 1}; smoothing: ε < 2.
    Returns: ``[..., n]``. Raises: ValueError for another label or ε ≥ 2. Source: paper 1 (2.4); book eq-ls-binary.
    """
    check_smoothing(smoothing, 2)
    check_labels(labels, 2)
    return (1.0 - smoothing) * labels.to(dtype) + smoothing / 2


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError unless there are labels and all are integers in 0..K-1. Waits for the device."""
    if labels.is_floating_point() or labels.numel() == 0 or not 0 <= labels.min() <= labels.max() < num_classes:
        found = sorted(set(labels.flatten().tolist()))[:5]
        raise ValueError(f"labels must be integers in 0..{num_classes - 1}, got {labels.dtype}, such as {found}")


def check_smoothing(smoothing: float, num_classes: int) -> None:
    """Raise ValueError unless ε < K/(K-1)."""
    limit = num_classes / (num_classes - 1)
    if not smoothing < limit:
        raise ValueError(f"smoothing must be below K/(K-1) = {limit:.4g} for K = {num_classes}, got {smoothing}")
