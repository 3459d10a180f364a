"""Exact minimisers of the softmax model on weighted points: Newton's method with a certificate, float64."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import log_softmax, softmax

from labelaug.theory.population import ConvergenceError


@dataclass(frozen=True)
class SoftmaxMinimiser:
    """``weights`` [K, d] and ``bias`` [K], both with columns that sum to zero, and the certificate.

    gradient_norm is taken on that subspace; least_curvature is the Hessian's least eigenvalue on the span of the data.
    """

    weights: np.ndarray
    bias: np.ndarray
    loss: float
    gradient_norm: float
    least_curvature: float


def gaussian_nodes(means: np.ndarray, cov: np.ndarray, *, noise: float, count: int = 8):
    """Gauss-Hermite nodes of K balanced classes N(μ_k, δ²Σ): x ``[n, d]``, labels ``[n]``, weights ``[n]``.

    Args: means ``[d, K]``; noise: δ; count: nodes a dimension (n = K·count^d).
    """
    d, num_classes = np.shape(means)
    points, mass = np.polynomial.hermite_e.hermegauss(count)
    grid = np.array(list(product(points, repeat=d)))
    weights = np.array([np.prod(w) for w in product(mass / mass.sum(), repeat=d)])
    x = np.concatenate([mean + noise * grid @ np.linalg.cholesky(cov).T for mean in np.transpose(means)])
    return x, np.repeat(np.arange(num_classes), len(grid)), np.tile(weights / num_classes, num_classes)


def softmax_minimiser(
    x: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    num_classes: int,
    smoothing: float,
    bias: bool = False,
) -> SoftmaxMinimiser:
    """Minimise Σ_i weights_i ℓ(W x_i + b, q_i) with q = (1-ε)·1[k = y] + ε/K, the rows of W summing to zero.

    Where the points do not span R^d the minimiser of least norm is returned.

    Args: x ``[n, d]``; labels: int ``[n]`` in 0..K-1; weights: ``[n]``, positive, scaled to sum to one (None: equal).
    Raises: ValueError unless 0 < ε ≤ 1 (hard labels may have their minimiser at infinity), x is finite and labels are
        integers in 0..K-1; ConvergenceError if the
        gradient is not below 1e-10 after 100 steps.
    """
    if not 0 < smoothing <= 1:
        raise ValueError(f"smoothing must be in (0, 1], got {smoothing}: the minimiser may be at infinity without it")
    x, labels, n = np.asarray(x, dtype=float), np.asarray(labels), len(x)
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be {n} integers in 0..{num_classes - 1}, got {labels.dtype} {labels[:5]}")
    if not np.isfinite(x).all():
        raise ValueError(f"x must be finite, and {(~np.isfinite(x)).any(1).sum()} of its {n} rows are not")
    mass = np.full(n, 1 / n) if weights is None else np.asarray(weights, dtype=float) / np.sum(weights)
    if mass.min() < 0:
        raise ValueError(f"weights must not be negative, got {mass.min():.3g}")
    target = (1 - smoothing) * np.eye(num_classes)[labels] + smoothing / num_classes
    inputs = np.column_stack([x, np.ones(n)]) if bias else x
    # Coordinates: W = CV with C an orthonormal basis of the vectors that sum to zero.
    basis = np.linalg.svd(np.eye(num_classes) - 1 / num_classes)[0][:, :-1]

    def loss_at(v):
        return -(mass[:, None] * target * log_softmax(inputs @ v.T @ basis.T, axis=1)).sum()

    v = np.zeros((num_classes - 1, inputs.shape[1]))
    for _ in range(100):
        p = softmax(inputs @ v.T @ basis.T, axis=1)
        gradient = basis.T @ ((mass[:, None] * (p - target)).T @ inputs)
        c = p @ basis
        curvature = np.einsum("ni,ka,kb,nk->nab", np.ones((n, 1)), basis, basis, p) - c[:, :, None] * c[:, None, :]
        hessian = np.einsum("n,nab,ni,nj->aibj", mass, curvature, inputs, inputs, optimize=True)
        hessian = hessian.reshape(v.size, v.size)
        size = np.linalg.norm(gradient)
        if size <= 1e-12:
            break
        step = np.linalg.lstsq(hessian, -gradient.ravel(), rcond=1e-13)[0].reshape(v.shape)
        before, along, t = loss_at(v), (gradient * step).sum(), 1.0
        while t > 1e-9 and loss_at(v + t * step) > before + 1e-4 * t * along + 1e-15:
            t *= 0.5
        v = v + t * step
        if size <= 1e-10 and np.linalg.norm(step) <= 1e-14 * (1 + np.linalg.norm(v)):
            break
    if not size <= 1e-10:
        raise ConvergenceError(f"Newton's method stopped at a gradient of norm {size:.3g}, above 1e-10")
    values = np.linalg.eigvalsh(hessian)
    full = basis @ v
    found, offset = (full[:, :-1], full[:, -1]) if bias else (full, np.zeros(num_classes))
    least = float(values[values > 1e-13 * values[-1]].min())
    return SoftmaxMinimiser(found, offset, float(loss_at(v)), float(size), least)
