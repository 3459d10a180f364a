"""Losses in nats, reduced by the mean over examples only: leading axes (seeds, settings) survive."""

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy to a target distribution, ``-Σ_k q_k log softmax(z)_k``: ``[..., n, K]`` twice -> ``[...]``.

    Raises: ValueError if the last two axes differ. Source: book eq-soft-ce.
    """
    _same_tail(logits, targets, axes=2)
    return -(targets * logits.log_softmax(dim=-1)).sum(-1).mean(-1)


def binary_soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same for two classes and one logit: ``log(1 + e^z) - t z`` with t the probability of class 1.

    Equals :func:`soft_cross_entropy` at the logits (0, z) and the targets (1 - t, t).

    Args: logits: z ``[..., n]``; targets: t ``[..., n]``; negative smoothing puts t outside [0, 1].
    Returns: ``[...]``. Source: paper 1 (2.1), (2.4), (2.8); book eq-binary-ce.
    """
    _same_tail(logits, targets, axes=1)
    return (F.softplus(logits) - targets * logits).mean(-1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """``Σ_k (o_k - q_k)²``: sum over outputs, mean over examples, no factor ½; ``[..., n, K]`` twice -> ``[...]``."""
    _same_tail(outputs, targets, axes=2)
    return (outputs - targets).square().sum(-1).mean(-1)


def l2_penalty(weight: Tensor, *, weight_decay: float | Tensor) -> Tensor:
    """``(λ/2)‖w‖²`` over the last axis (gradient λw): ``[..., d]`` -> ``[...]``. Source: paper 1 (2.1)."""
    return 0.5 * weight_decay * weight.square().sum(-1)


def _same_tail(a: Tensor, b: Tensor, *, axes: int) -> None:
    if a.shape[-axes:] != b.shape[-axes:]:
        raise ValueError(f"the last {axes} axes must agree, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
