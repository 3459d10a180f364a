"""What is measured on trained models; the leading axes of the weights (records, seeds, settings) survive."""

import torch
from torch import Tensor


def block_norm(weights: Tensor, coordinates: slice) -> Tensor:
    """Euclidean norm of the weights on some coordinates, ‖w_S‖: ``[..., d]`` -> ``[...]``."""
    return weights[..., coordinates].norm(dim=-1)


def norm_share(weights: Tensor, coordinates: slice) -> Tensor:
    """Share of the squared norm on some coordinates, ‖w_S‖²/‖w‖² in [0, 1]: ``[..., d]`` -> ``[...]``."""
    return weights[..., coordinates].square().sum(-1) / weights.square().sum(-1)


def entry_ratio(weights: Tensor) -> Tensor:
    """``|w_1| / ‖w_2:‖``, the first entry against all others: ``[..., d]`` -> ``[...]``. Source: paper 1, 4.2."""
    return weights[..., 0].abs() / weights[..., 1:].norm(dim=-1)


def error_rate(weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Share of examples on the wrong side of ⟨w, x⟩ = 0: ``[..., d]``, x ``[n, d]``, labels ``[n]`` -> ``[...]``.

    A logit of exactly 0 is read as label 0.
    """
    if x.shape[-1] != weights.shape[-1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"x must be [n, {weights.shape[-1]}] with labels [n], got {list(x.shape)} and {list(labels.shape)}"
        )
    wrong = (weights.reshape(-1, weights.shape[-1]) @ x.T > 0) != (labels == 1)
    return wrong.to(torch.float64).mean(-1).reshape(weights.shape[:-1])


def logit_share(weights: Tensor, mean: Tensor, coordinates: slice) -> Tensor:
    """Share of the mean signed logit that some coordinates carry, ⟨w_S, μ_S⟩/⟨w, μ⟩: ``[..., d]`` -> ``[...]``.

    Unlike a norm it does not depend on the units of the features. Args: mean: μ = E[YX], ``[d]``.
    """
    mean = mean.to(weights.dtype)
    return weights[..., coordinates] @ mean[coordinates] / (weights @ mean)
