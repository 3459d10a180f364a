"""Mixup: the draw of λ and of the partner, and the arithmetic, apart from each other.

Conventions, because papers differ: λ weighs the *anchor* (the example itself), 1 - λ its partner; the partner is a
permutation of the batch (an example may meet itself); λ is one number per batch or one per example.
"""

import numpy as np
import torch
from torch import Tensor

PER = ("batch", "example")


def draw_lam(n: int, alpha: float, *, per: str, rng: np.random.Generator) -> Tensor:
    """λ ~ Beta(α, α), float64: ``[]`` for per="batch", ``[n]`` for per="example".

    Raises: ValueError unless α > 0. No mixing is not a value of α: it is the absence of this draw (λ = 1); the
        midpoint method is λ = 0.5, given as a number.
    """
    check_alpha(alpha)
    if per not in PER:
        raise ValueError(f"per must be one of {PER}, got {per!r}")
    return torch.as_tensor(rng.beta(alpha, alpha, size=n if per == "example" else None), dtype=torch.float64)


def draw_partner(n: int, *, rng: np.random.Generator) -> Tensor:
    """A uniformly random permutation of 0..n-1, int64 ``[n]``."""
    return torch.from_numpy(rng.permutation(n))


def mix(x: Tensor, lam: Tensor | float, partner: Tensor) -> Tensor:
    """``λ_i x_i + (1 - λ_i) x_π(i)`` along the first axis; for inputs, targets and (linear models) logits alike.

    Args: x: ``[n, ...]``; lam: scalar or ``[n]`` in [0, 1]; partner: int64 ``[n]``.
    Raises: ValueError if the shapes do not fit. Source: paper 1 (2.5); Zhang et al. (2018); book eq-mixup-point.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}: turn labels into targets first")
    lam = torch.as_tensor(lam, dtype=x.dtype, device=x.device)
    if partner.shape != x.shape[:1] or lam.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"x has {x.shape[0]} examples; partner must have shape [{x.shape[0]}] and lam [] or [{x.shape[0]}], "
            f"got {list(partner.shape)} and {list(lam.shape)}"
        )
    lam = lam.reshape(lam.shape + (1,) * (x.ndim - lam.ndim))
    return lam * x + (1 - lam) * x[partner]


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless α > 0."""
    if not alpha > 0:
        raise ValueError(f"alpha of Beta(alpha, alpha) must be positive, got {alpha}")
