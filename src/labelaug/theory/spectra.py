"""The Marchenko–Pastur law of eigenvalues, and the distance of a spectrum from it."""

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class MarchenkoPastur:
    """Limit law of the eigenvalues of ΦΦᵀ/m, Φ ``[d, m]`` with independent entries of mean 0 and variance 1, d/m → γ.

    Density ``√((γ₊ - μ)(μ - γ₋)) / (2π γ μ)`` on ``[γ₋, γ₊]``, ``γ± = (1 ± √γ)²``, and for γ > 1 the mass 1 - 1/γ at 0.
    Args: ratio: γ > 0. Raises: ValueError if it is not positive and finite. Source: Marčenko and Pastur (1967); book
    def-marchenko-pastur.
    """

    ratio: float

    def __post_init__(self):
        if not (np.isfinite(self.ratio) and self.ratio > 0):
            raise ValueError(f"ratio d/m must be positive and finite, got {self.ratio}")

    @property
    def edges(self) -> tuple[float, float]:
        """γ₋ and γ₊, the ends of the continuous part."""
        root = np.sqrt(self.ratio)
        return float((1 - root) ** 2), float((1 + root) ** 2)

    @property
    def atom(self) -> float:
        """Mass at 0, ``max(0, 1 - 1/γ)``: the null space of features with fewer points than dimensions."""
        return max(0.0, 1.0 - 1.0 / self.ratio)

    def density(self, mu: ArrayLike) -> np.ndarray:
        """Density of the continuous part at μ ``[...]`` (mass ``min(1, 1/γ)``; infinite at 0 if γ = 1)."""
        mu = np.asarray(mu, float)
        low, high = self.edges
        inside = (mu > 0) & (mu >= low) & (mu <= high)
        root = np.sqrt(np.where(inside, (high - mu) * (mu - low), 0.0))
        shape = np.divide(root, 2 * np.pi * self.ratio * mu, out=np.zeros_like(mu), where=inside)
        return np.where((mu == 0) & (low == 0), np.inf, shape)

    def cdf(self, mu: ArrayLike) -> np.ndarray:
        """P(eigenvalue <= μ), the mass at 0 included; ``[...]``.

        With ``μ = 1 + γ - 2√γ cos φ`` the density times dμ is ``(2/π) sin²φ / μ dφ``, whose integral is elementary.
        """
        mu = np.asarray(mu, float)
        root = np.sqrt(self.ratio)
        phi = np.arccos(np.clip((1 + self.ratio - mu) / (2 * root), -1.0, 1.0))
        slope = np.sin(phi / 2) * (1 + root), np.cos(phi / 2) * abs(1 - root)
        inner = np.arctan2(*slope) if root != 1 else 0.0
        continuous = (2 * root * np.sin(phi) + (1 + self.ratio) * phi - 2 * abs(1 - self.ratio) * inner) / (
            2 * np.pi * self.ratio
        )
        return np.where(mu < 0, 0.0, self.atom + continuous)

    def moment(self, order: int) -> float:
        """``E μ^k = Σ_{r<k} γ^r/(r + 1) · C(k, r) C(k - 1, r)`` for k >= 1; 1 for k = 0.

        Raises: ValueError if the order is negative.
        """
        if order < 0:
            raise ValueError(f"order must be at least 0, got {order}")
        return float(
            sum(self.ratio**r / (r + 1) * comb(order, r) * comb(order - 1, r) for r in range(order)) if order else 1.0
        )

    @property
    def inverse_moment(self) -> float:
        """``E[1/μ] = 1/(1 - γ)`` for γ < 1, infinite from γ = 1 on."""
        return 1.0 / (1.0 - self.ratio) if self.ratio < 1 else np.inf


def kolmogorov_distance(values: ArrayLike, law: MarchenkoPastur, *, zero: float = 0.0) -> float:
    """``sup_μ |F_d(μ) - F(μ)|`` between the empirical law of the eigenvalues ``[d]`` and a Marchenko–Pastur law.

    Both laws may have mass at 0, so the supremum is taken from both sides of each eigenvalue.
    Args: zero: eigenvalues up to here count as 0. Raises: ValueError if values are not ``[d]``, finite and at least
    -zero.
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all() or (values < -zero).any():
        raise ValueError(f"values must be [d], finite and at least {-zero:g}, got {values}")
    values = np.where(np.sort(values) <= zero, 0.0, np.sort(values))
    at = np.unique(values)
    below, upto = (np.searchsorted(values, at, side=side) / values.size for side in ("left", "right"))
    before = np.where(at == 0, 0.0, law.cdf(at))  # the only jump of the law is at 0
    zero_first = abs(law.cdf(0.0)) if at[0] > 0 else 0.0  # an atom that the eigenvalues lack
    return float(max(np.abs(upto - law.cdf(at)).max(), np.abs(below - before).max(), zero_first))
