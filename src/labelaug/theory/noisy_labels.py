"""How wrong Mixup's labels are: against a known law of the label, a known regression function, or neighbours.

p is the law of the label at the mixed input, q = λ f(X) + (1 - λ) f(X') the one that Mixup uses there; λ weighs the
anchor X.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp, softmax

ROLES = ("major", "minor", "third")
_SIMPLEX = 1e-9  # how far a row may leave the simplex: rounding, and nothing that changes a digit shown


def total_variation(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """``TV(p, q) = 1 - Σ_k min(p_k, q_k) = max_E |p(E) - q(E)|``: ``[..., K]`` twice -> ``[...]``.

    Raises: ValueError if a row is not a law. Source: book thm-noisy-labels.
    """
    p, q = _laws(p, q)
    return 0.5 * np.abs(p - q).sum(-1)


def printed_bound(f_mixed: ArrayLike, f_first: ArrayLike, f_second: ArrayLike, lam: float) -> np.ndarray:
    """``½ max_k |f_k(X̃) - [(1 - λ) f_k(X) + λ f_k(X')]|``, the right-hand side of paper 2's Theorem 5.1 as printed.

    λ and 1 - λ are exchanged in it against its own definition of the mixed label: laws ``[..., K]`` -> ``[...]``.
    Raises: ValueError if a row is not a law or λ leaves [0, 1].
    """
    f_mixed, mixed = _laws(f_mixed, mix_laws(f_first, f_second, 1 - lam))
    return 0.5 * np.abs(f_mixed - mixed).max(-1)


def mix_laws(f_first: ArrayLike, f_second: ArrayLike, lam: float) -> np.ndarray:
    """``q = λ f(X) + (1 - λ) f(X')``. Raises: ValueError if a row is not a law or λ leaves [0, 1]."""
    f_first, f_second = _laws(f_first, f_second)
    _check_lam(lam)
    return lam * f_first + (1 - lam) * f_second


def maximal_coupling(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """A joint law ``[..., K, K]`` of two labels with margins p (rows) and q (columns) that differ with chance TV(p, q).

    ``diag(min(p, q)) + (p - q)₊ (q - p)₊ᵀ / TV``. Raises: ValueError if a row is not a law.
    Source: book thm-noisy-labels.
    """
    p, q = _laws(p, q)
    distance = total_variation(p, q)[..., None, None]
    apart = np.maximum(p - q, 0)[..., :, None] * np.maximum(q - p, 0)[..., None, :]
    same = np.minimum(p, q)[..., None] * np.eye(p.shape[-1])
    return same + apart / np.where(distance > 0, distance, 1.0)


def top_margin(p: ArrayLike) -> np.ndarray:
    """Largest entry minus second largest: ``[..., K]`` -> ``[...]``. Source: book prop-argmax-margin."""
    ordered = np.sort(np.asarray(p, float), axis=-1)
    return ordered[..., -1] - ordered[..., -2]


def mixing_noise(f: Callable[[np.ndarray], np.ndarray], first: ArrayLike, second: ArrayLike, lam: float) -> np.ndarray:
    """``Z = λ f(X) + (1 - λ) f(X') - f(λX + (1 - λ)X')``: points ``[..., d]`` twice -> ``[...]``.

    Raises: ValueError if λ leaves [0, 1]. Source: paper 2, section 5.2; book prop-mixing-noise.
    """
    _check_lam(lam)
    first, second = np.asarray(first, float), np.asarray(second, float)
    return lam * f(first) + (1 - lam) * f(second) - f(lam * first + (1 - lam) * second)


def second_order_noise(
    hessian: Callable[[np.ndarray], np.ndarray], first: ArrayLike, second: ArrayLike, lam: float, *, centroid: bool
) -> np.ndarray:
    """``½ λ(1 - λ) ΔᵀH Δ`` with Δ = X - X' and H at the mixed point, or at the centroid of X, X' and the mixed point.

    Args: hessian: ``[..., d] -> [..., d, d]``; first, second: ``[..., d]``; centroid: its error is of order |Δ|⁴ at
        every λ; without it of order |Δ|³, at λ = ½ of order |Δ|⁴.
    Raises: ValueError if λ leaves [0, 1]. Source: book prop-mixing-noise.
    """
    _check_lam(lam)
    first, second = np.asarray(first, float), np.asarray(second, float)
    mixed = lam * first + (1 - lam) * second
    at = (first + second + mixed) / 3 if centroid else mixed
    apart = first - second
    return 0.5 * lam * (1 - lam) * np.einsum("...i,...ij,...j->...", apart, hessian(at), apart)


def curve_posterior(x: ArrayLike, centres: ArrayLike, noise: float) -> np.ndarray:
    """P(class | x) where class c is equally likely as the others and x | c ~ N(a random row of centres[c], δ²I).

    Args: x: ``[..., d]``; centres: ``[C, T, d]``; noise: δ > 0.
    Returns: ``[..., C]``. Raises: ValueError for a noise that is not positive.
    """
    x, centres = np.asarray(x, float), np.asarray(centres, float)
    if not noise > 0:
        raise ValueError(f"noise must be positive, got {noise}")
    square = ((x[..., None, None, :] - centres) ** 2).sum(-1)
    return softmax(logsumexp(-square / (2 * noise**2), axis=-1), axis=-1)


def squared_distances(x: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """``‖x_i - r_j‖²`` by one matrix product in float32, both centred first: ``[n, d]``, ``[m, d]`` -> ``[n, m]``."""
    reference = np.asarray(reference, np.float32)
    centre = reference.mean(0)
    a, b = np.asarray(x, np.float32) - centre, reference - centre
    square = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * (a @ b.T)
    return np.maximum(square, 0, out=square)


def mixed_distances(to_first: np.ndarray, to_second: np.ndarray, between: np.ndarray, lam: float) -> np.ndarray:
    """``‖λa + (1-λ)b - r‖² = λ‖a - r‖² + (1-λ)‖b - r‖² - λ(1-λ)‖a - b‖²``, no mixed point needed.

    Args: to_first, to_second: squared distances of the parents to the reference points, ``[n, m]``; between: of the
        parents to each other, ``[n]``; lam: λ in [0, 1].
    Raises: ValueError if λ leaves [0, 1]. Source: book lem-mixed-distance.
    """
    _check_lam(lam)
    return lam * to_first + (1 - lam) * to_second - np.asarray(lam * (1 - lam) * between, to_first.dtype)[:, None]


def neighbour_label(square: np.ndarray, labels: np.ndarray, *, neighbours: int) -> np.ndarray:
    """The label most frequent among the nearest points, ties to the label whose nearest point is nearest.

    Args: square: squared distances ``[n, m]``, inf for a point that must not count; labels: integers ``[m]``.
    Returns: integers ``[n]``.
    Raises: ValueError for a distance that is NaN, or unless 1 <= neighbours <= finite entries of every row.
    """
    if np.isnan(square).any():
        raise ValueError(f"distances must be numbers, and {np.isnan(square).sum()} of {square.size} are NaN")
    usable = np.isfinite(square).sum(1).min() if len(square) else square.shape[1]
    if not 1 <= neighbours <= usable:
        raise ValueError(f"neighbours must lie in 1..{usable}, the points that count, got {neighbours}")
    if neighbours == 1:
        return labels[square.argmin(1)]
    chosen = np.argpartition(square, neighbours - 1, axis=1)[:, :neighbours]
    order = np.argsort(np.take_along_axis(square, chosen, 1), axis=1)
    near = labels[np.take_along_axis(chosen, order, 1)]
    votes = (near[:, :, None] == near[:, None, :]).sum(2)  # of each neighbour's label, nearest first
    return near[np.arange(len(near)), votes.argmax(1)]


def intrusion(
    x: ArrayLike,
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *,
    lams: Sequence[float],
    neighbours: Sequence[int],
) -> list[tuple[float, int, str, str, float]]:
    """Whose class the nearest of the points x have, at λ x_first + (1 - λ) x_second; the role of :func:`role_shares`.

    Args: x: ``[m, d]``; labels: integers ``[m]``; first, second: indices of the pairs ``[n]``; lams: values of λ, at
        least ½ where "major" is to mean the anchor; neighbours: numbers of neighbours that vote.
    Returns: rows λ, neighbours, "kept" or "left out" (whether the parents count as neighbours), role, share.
    Raises: ValueError for a λ outside [0, 1] or too many neighbours.
    """
    x, pair = np.asarray(x, np.float32), np.arange(len(first))
    to_first, to_second = squared_distances(x[first], x), squared_distances(x[second], x)
    rows = []
    for lam in lams:
        square = mixed_distances(to_first, to_second, to_first[pair, second], lam)
        for parents in ("kept", "left out"):
            if parents == "left out":
                square[pair, first] = square[pair, second] = np.inf
            for count in neighbours:
                found = neighbour_label(square, labels, neighbours=count)
                shares = role_shares(found, labels[first], labels[second])
                rows += [(lam, count, parents, role, float(shares[role])) for role in ROLES]
    return rows


def role_shares(found: np.ndarray, major: np.ndarray, minor: np.ndarray) -> dict[str, float]:
    """Shares of the labels found that are the major parent's, the minor parent's, and neither's ("third").

    Where both parents have one label it counts as the major parent's. Args: all integers ``[n]``.
    """
    is_major = found == major
    is_minor = (found == minor) & ~is_major
    return dict(zip(ROLES, (is_major.mean(), is_minor.mean(), (~is_major & ~is_minor).mean()), strict=True))


def _laws(p: ArrayLike, q: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    p, q = np.asarray(p, float), np.asarray(q, float)
    if p.shape[-1:] != q.shape[-1:]:
        raise ValueError(f"both laws need the same classes, got {list(p.shape)} and {list(q.shape)}")
    for rows in (p, q):
        if not ((rows >= -_SIMPLEX).all() and (np.abs(rows.sum(-1) - 1) < _SIMPLEX).all()):
            raise ValueError(
                f"a law must have entries of at least 0 with sum 1, got one of sum {rows.sum(-1).ravel()[:3]}"
            )
    return p, q


def _check_lam(lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
