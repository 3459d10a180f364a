"""Closed forms for the direction of the minimiser: the elliptical law, the small-noise law, and the law for K classes.

All functions are pure and work in float64. ``mean`` is μ = E[U | Y] of U = YX, ``cov`` is Σ = Cov(X | Y), the same in
both classes unless a docstring says otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, roots_jacobi, roots_legendre

from labelaug.theory.population import BetaLaw, ConvergenceError, DiscreteLaw

RADIAL = ("gaussian", "ellipse")
LAM_NODES = 48  # Gauss-Jacobi nodes of a Beta law: exact for polynomials of degree 95


def fisher_direction(mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """Unit vector along Σ⁻¹μ, ``[d]``: the direction of greatest signal-to-noise ratio ⟨w, μ⟩/√(wᵀΣw).

    Raises: ValueError if Σ is not positive definite or μ is 0. Source: Fisher (1936); book thm-elliptical-law.
    """
    mean, cov = _check(mean, cov)
    direction = np.linalg.solve(cov, mean)
    return direction / np.linalg.norm(direction)


def changeover_noise(mean_low: float, mean_high: float, std_high: float) -> float:
    """Standard deviation σ_L = μ_L σ_H/μ_H at which both features have the same signal-to-noise ratio.

    There two uncorrelated features share the mean logit equally under Fisher's direction. Source: book cor-shares.
    """
    if not (mean_low > 0 and mean_high > 0 and std_high > 0):
        raise ValueError(f"means and std_high must be positive, got {mean_low}, {mean_high} and {std_high}")
    return mean_low * std_high / mean_high


# --------------------------------------------------------------------------------------------------------------------
# The elliptical law


@dataclass(frozen=True)
class EllipticalMinimiser:
    """Where the elliptical law puts the minimiser: ``weights`` [d] ∝ (Σ + τI)⁻¹μ, with τ = ``ridge``."""

    weights: np.ndarray
    ridge: float
    nodes: int


def elliptical_law(
    mean: np.ndarray,
    cov: np.ndarray,
    *,
    radial: str = "gaussian",
    smoothing: float = 0.0,
    mixing: BetaLaw | DiscreteLaw | None = None,
    weight_decay: float = 0.0,
) -> EllipticalMinimiser:
    """Minimiser of E ℓ + (λ_wd/2)‖w‖² for an elliptical law of U, from two scalar equations and 1-D quadrature.

    On the ray w = k(Σ + τI)⁻¹μ the slope of the penalised loss in k is increasing: its zero is k(τ). The ridge is the
    root of τ = λ_wd/B(τ), with B the mean curvature that :func:`ridge` divides by. No gradient in d dimensions is
    taken, so that this is a route apart from theory.population. Gaussian classes with hard labels, unmixed and without
    penalty, have w = 2Σ⁻¹μ, the true posterior, which is beyond any quadrature where they hardly overlap.

    Args: mean ``[d]``, cov ``[d, d]``; radial: "gaussian" or "ellipse" (uniform on the solid ellipsoid);
        smoothing: ε in [0, 1); mixing: law of Mixup's λ; weight_decay: λ_wd ≥ 0.
    Returns: weights, ridge τ (0 without weight decay), number of quadrature nodes.
    Raises: ValueError for a degenerate covariance, ε outside [0, 1), or a minimiser at infinity (bounded and separable
        support, no penalty, hard labels). ConvergenceError if the quadrature does not settle to 1e-10.
    Source: book thm-elliptical-law.
    """
    mean, cov = _check(mean, cov)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}: at 1 the minimiser is w = 0")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    plain = mixing is None or mixing.mass(0.0) + mixing.mass(1.0) > 1 - 1e-12
    if radial == "ellipse" and plain and smoothing == weight_decay == 0:
        reach = math.sqrt(len(mean) + 2)
        if mean @ np.linalg.solve(cov, mean) >= reach**2:
            raise ValueError("the support is bounded and separable: without penalty the minimiser is at infinity")
    if radial == "gaussian" and plain and smoothing == weight_decay == 0:
        return EllipticalMinimiser(2 * np.linalg.solve(cov, mean), 0.0, 0)
    previous, counts = None, (24, 48, 96) if mixing is not None and radial == "ellipse" else (200, 400, 800, 1600)
    for doubling, count in enumerate(counts):
        nodes = _nodes(radial, len(mean), smoothing, mixing, count, 24 * 2**doubling)
        tau = _solve_ridge(mean, cov, nodes, weight_decay)
        weights = _on_ray(mean, cov, nodes, weight_decay, tau)[0]
        if previous is not None and np.linalg.norm(weights - previous) <= 1e-10 * np.linalg.norm(weights):
            return EllipticalMinimiser(weights, tau, len(nodes[0]))
        previous = weights
    raise ConvergenceError(f"quadrature over {len(nodes[0])} nodes has not settled: the logits vary too much")


def ridge(
    weights: np.ndarray,
    mean: np.ndarray,
    cov: np.ndarray,
    *,
    radial: str = "gaussian",
    smoothing: float = 0.0,
    mixing: BetaLaw | DiscreteLaw | None = None,
    weight_decay: float,
    count: int = 800,
) -> float:
    """τ = λ_wd·wᵀΣw / E[ℓ'(s)(s - E s)], the ridge that belongs to given weights ``[d]`` (λ_wd/E ℓ''(s) for Gaussians).

    E s is the mean given λ and both labels. Source: book eq-ridge.
    """
    mean, cov = _check(mean, cov)
    if mixing is not None and radial == "ellipse":
        count = min(count, 96)
    p, a, n, q = _nodes(radial, len(mean), smoothing, mixing, count)
    spread = math.sqrt(weights @ cov @ weights)
    slope = expit(a * (weights @ mean) + spread * n) - q
    return weight_decay * spread / (p @ (slope * n))


def widest_margin_ridge(mean: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, float]:
    """Widest margin of a law uniform on a solid ellipsoid: w ``[d]`` with margin 1 and the ridge τ₀ it belongs to.

    w minimises ‖w‖² subject to ⟨w, μ⟩ - r√(wᵀΣw) ≥ 1 with r = √(d+2); τ₀ = √(wᵀΣw)/(r‖w‖²) is the limit of weight
    decay's ridge as λ_wd → 0. Raises: ValueError if the support is not separable. Source: book cor-ridge-range.
    """
    mean, cov = _check(mean, cov)
    reach, eye = math.sqrt(len(mean) + 2), np.eye(len(mean))
    if mean @ np.linalg.solve(cov, mean) <= reach**2:
        raise ValueError(f"no margin: μᵀΣ⁻¹μ must exceed d + 2 = {len(mean) + 2}")

    def excess(log_tau):
        u = np.linalg.solve(cov + math.exp(log_tau) * eye, mean)
        spread = math.sqrt(u @ cov @ u)
        return math.exp(log_tau) * (u @ u) * reach - spread * (u @ mean - reach * spread), u, spread

    # At τ₀ the ridge equals v/(r‖w‖²) for w = u/(⟨u, μ⟩ - r v_u); the difference is negative below and positive above.
    low = high = math.log(np.trace(cov) / len(mean))
    while excess(low)[0] > 0:
        low -= 2
    while excess(high)[0] < 0:
        high += 2
    root = brentq(lambda x: excess(x)[0], low, high, xtol=1e-14, rtol=1e-14)
    _, u, spread = excess(root)
    return u / (u @ mean - reach * spread), math.exp(root)


def _nodes(radial, dim, smoothing, mixing, count, lam_count=LAM_NODES):
    """Weights p, centre a (in units of μ), standardised noise n and target q of the logit, one entry a node.

    A mixed pair has centre λ ± (1-λ) and, for Gaussians, noise √(λ² + (1-λ)²) times one standard normal. Flipping both
    labels changes the sign of logit and target alike, so that the anchor may be taken positive.
    """
    if radial not in RADIAL:
        raise ValueError(f"radial must be one of {RADIAL}, got {radial!r}")
    if radial == "gaussian":
        t = np.linspace(-10, 10, count + 1)  # trapezoidal rule: exponential order for analytic integrands
        f = np.exp(-0.5 * t**2)
    else:
        t, f = roots_jacobi(count, (dim - 1) / 2, (dim - 1) / 2)  # marginal of the uniform law in a ball
        t = t * math.sqrt(dim + 2)
    f = f / f.sum()
    if mixing is None:
        return f, np.ones_like(t), t, np.full_like(t, 1 - smoothing / 2)
    lam, mass = mixing.rule(lam_count)
    if radial == "gaussian":
        first, noise = f[None], np.sqrt(lam**2 + (1 - lam) ** 2)[:, None] * t
    else:
        first = (f[:, None] * f).reshape(1, -1)
        noise = (lam[:, None, None] * t[:, None] + (1 - lam)[:, None, None] * t).reshape(len(lam), -1)
    p = 0.5 * mass[:, None] * first
    same, other = np.ones_like(noise), np.broadcast_to((2 * lam - 1)[:, None], noise.shape)
    target_other = np.broadcast_to((smoothing / 2 + (1 - smoothing) * lam)[:, None], noise.shape)
    parts = ((p, same, noise, np.full_like(noise, 1 - smoothing / 2)), (p, other, noise, target_other))
    return tuple(np.concatenate([part[i].ravel() for part in parts]) for i in range(4))


def _on_ray(mean, cov, nodes, weight_decay, tau):
    """Least penalised loss on the ray along (Σ + τI)⁻¹μ: the weights there, and B = E[ℓ'(s)(s - E s)]/wᵀΣw."""
    p, a, n, q = nodes
    u = np.linalg.solve(cov + tau * np.eye(len(mean)), mean)
    spread, square = math.sqrt(u @ cov @ u), u @ u
    step = a * (u @ mean) + spread * n

    def slope(k):
        return p @ ((expit(k * step) - q) * step) + weight_decay * k * square

    top = 1 / (u @ mean)
    while slope(top) < 0:
        top *= 2
    k = brentq(slope, 0, top, xtol=1e-15 * top, rtol=1e-14)
    return k * u, p @ ((expit(k * step) - q) * n) / (k * spread)


def _solve_ridge(mean, cov, nodes, weight_decay) -> float:
    """Root of τ·B(τ) = λ_wd. B is a mean of ℓ'' ≤ ¼, so the root is at least 4λ_wd."""
    if weight_decay == 0:
        return 0.0

    def excess(log_tau):
        return math.exp(log_tau) * _on_ray(mean, cov, nodes, weight_decay, math.exp(log_tau))[1] / weight_decay - 1

    low = math.log(4 * weight_decay)
    high = low + 1
    while excess(high) < 0:
        high += 2
        if high > 300:
            raise ConvergenceError("the mean curvature underflows: weight decay is too small for this quadrature")
    return math.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-14))


# --------------------------------------------------------------------------------------------------------------------
# The small-noise law


@dataclass(frozen=True)
class Margin:
    """What a loss asks for when the noise is small: the margin c, and two coefficients of its expansion there.

    With a = λY₁ + (1-λ)Y₂ and b = λ² + (1-λ)² (a = b = 1 without mixing) and all derivatives of σ at ac,
    ``skew`` κ = E[σ''(λ³Y₁ + (1-λ)³Y₂)]/E[σ'b] and ``shrinkage`` ρ = (E[σ'b] + ½c E[σ''ab])/E[σ'a²].
    """

    value: float
    skew: float
    shrinkage: float


def smoothing_margin(smoothing: float) -> Margin:
    """c* = log((2-ε)/ε), κ = φ'''(c*)/φ''(c*) = ε - 1 and ρ = 1 + κc*/2.

    Raises: ValueError unless 0 < ε ≤ 1. Source: book thm-small-noise.
    """
    if not 0 < smoothing <= 1:
        raise ValueError(f"smoothing must be in (0, 1], got {smoothing}: without it the margin is infinite")
    value = math.log((2 - smoothing) / smoothing)
    return Margin(value, smoothing - 1, 1 + 0.5 * (smoothing - 1) * value)


def mixup_margin(mixing: BetaLaw | DiscreteLaw, *, smoothing: float = 0.0) -> Margin:
    """The zero c_D of F', where F(c) is Mixup's loss without noise (eq-mixup-low), with κ and ρ of :class:`Margin`.

    Raises: ValueError if ε = 0 and the law of λ lies within {0, ½, 1} (F decreases for ever), or ε is outside [0, 1).
    Source: book thm-small-noise.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    lam, mass = mixing.rule(LAM_NODES)
    if smoothing == 0 and np.isin(lam, (0.0, 0.5, 1.0)).all():
        raise ValueError("a law of λ within {0, ½, 1} asks for no finite margin: F decreases for ever")
    # Flipping both labels leaves every term as it is: the anchor is positive, its partner of either class.
    lam, partner = np.concatenate([lam, lam]), np.repeat([1.0, -1.0], len(lam))
    mass = 0.5 * np.concatenate([mass, mass])
    a, b = lam + (1 - lam) * partner, lam**2 + (1 - lam) ** 2
    q = smoothing / 2 + (1 - smoothing) * (lam + (1 - lam) * (partner > 0))

    def slope(c):
        return mass @ (a * (expit(a * c) - q))

    top = 1.0
    while slope(top) < 0:
        top *= 2
    c = brentq(slope, 0, top, xtol=1e-15, rtol=1e-14)
    one = expit(a * c)
    first, second = mass * one * (1 - one), mass * one * (1 - one) * (1 - 2 * one)
    skew = second @ (lam**3 + (1 - lam) ** 3 * partner) / (first @ b)
    shrinkage = (first @ b + 0.5 * c * (second @ (a * b))) / (first @ a**2)
    return Margin(c, float(skew), float(shrinkage))


def small_noise_law(mean: np.ndarray, cov: np.ndarray, *, margin: Margin, noise: float = 0.0) -> np.ndarray:
    """Minimiser for U = μ + δN, Cov N = Σ, at small δ: ``w = c(1 - ρδ²/Q) Σ⁻¹μ/Q`` with Q = μᵀΣ⁻¹μ, ``[d]``.

    Direction up to O(δ) (O(δ²) for third moments of zero), mean margin ⟨w, μ⟩ up to O(δ³). Where the class covariances
    differ, ``cov`` is their mean.

    Args: mean ``[d]``; cov ``[d, d]`` of N; margin: of :func:`smoothing_margin` or :func:`mixup_margin`; noise: δ.
    Raises: ValueError if Σ is not positive definite. Source: book thm-small-noise.
    """
    mean, cov = _check(mean, cov)
    direction = np.linalg.solve(cov, mean)
    ratio = mean @ direction
    return margin.value * (1 - margin.shrinkage * noise**2 / ratio) * direction / ratio


def skew_correction(mean: np.ndarray, cov: np.ndarray, third: np.ndarray, *, margin: Margin) -> np.ndarray:
    """First-order term w₁ ``[d]`` of w = w₀ + δw₁ + O(δ²) under skewed noise.

    w₁ = -(κ/2)[Σ⁻¹t - (μᵀΣ⁻¹t/μᵀΣ⁻¹μ)Σ⁻¹μ] with t = E[⟨w₀, N⟩²N]; it is orthogonal to μ.

    Args: third: E[N_i N_j N_k], ``[d, d, d]``, the mean of both classes where they differ; margin: c and κ.
    Source: book eq-skew-correction.
    """
    mean, cov = _check(mean, cov)
    start = small_noise_law(mean, cov, margin=margin)
    t = np.einsum("ijk,i,j->k", third, start, start)
    along, across = np.linalg.solve(cov, mean), np.linalg.solve(cov, t)
    return -0.5 * margin.skew * (across - (mean @ across) / (mean @ along) * along)


# --------------------------------------------------------------------------------------------------------------------
# Laws of other shapes, as weighted points


def two_point_noise(values: Sequence[float], mixing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Skewed noise N = AE on 2^d points: points ``[2^d, d]`` and their probabilities.

    The E_i are independent, v_i with probability 1/(1 + v_i²) and -1/v_i otherwise: mean 0, variance 1, third moment
    v_i - 1/v_i. Args: values: v_i > 0; mixing: A ``[d, d]``. Raises: ValueError unless all v_i > 0.
    """
    if not min(values) > 0:
        raise ValueError(f"values must be positive, got {list(values)}")
    points = np.array(list(product(*((v, -1 / v) for v in values))))
    chances = np.array([math.prod(p) for p in product(*((1 / (1 + v**2), v**2 / (1 + v**2)) for v in values))])
    return points @ np.asarray(mixing).T, chances


def superellipse_nodes(exponent: float, angular: int, radial: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes ``[8·angular·radial, 2]`` and weights of the uniform law on |x|^p + |y|^p ≤ 1, covariance scaled to I.

    Gauss-Legendre in the angle within each octant and in the squared radius. p = 2 is the disc, p = ∞ the square.

    Raises: ValueError unless p ≥ 1.
    """
    angle, chance = _octants(exponent, angular)
    square, mass = roots_legendre(radial)
    points = (np.sqrt(0.5 * (1 + square))[:, None, None] * _edge(exponent, angle)).reshape(-1, 2)
    weights = (mass[:, None] * chance).ravel()
    weights /= weights.sum()
    return points / math.sqrt(weights @ points[:, 0] ** 2), weights


def superellipse_edge(exponent: float, angular: int) -> np.ndarray:
    """Points ``[8·angular + 8, 2]`` on the boundary of the law of :func:`superellipse_nodes`, the corners included."""
    angle, chance = _octants(exponent, 64)
    edge = _edge(exponent, angle)  # the second moment over the radius is half of that on the boundary
    scale = math.sqrt(0.5 * (chance @ edge[:, 0] ** 2) / chance.sum())
    return _edge(exponent, np.linspace(0, 2 * np.pi, 8 * angular + 8, endpoint=False)) / scale


def _octants(exponent, count):
    """Angles and weights of an integral over the area element R(θ)²dθ."""
    if not exponent >= 1:
        raise ValueError(f"the exponent must be at least 1, got {exponent}")
    node, mass = roots_legendre(count)
    angle = (np.arange(8)[:, None] + 0.5 * (1 + node)).ravel() * np.pi / 4
    return angle, np.tile(mass, 8) * (_edge(exponent, angle) ** 2).sum(1)


def _edge(exponent, angle):
    direction = np.column_stack([np.cos(angle), np.sin(angle)])
    return direction / np.linalg.norm(direction, ord=exponent, axis=1, keepdims=True)


# --------------------------------------------------------------------------------------------------------------------
# More than two classes


def multiclass_law(
    means: np.ndarray, cov: np.ndarray, *, smoothing: float, bias: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax minimiser of label smoothing as the noise within classes vanishes: W ``[K, d]`` and b ``[K]``.

    Without bias W = T(MᵀΣ⁻¹M)⁻¹MᵀΣ⁻¹, with one W = T(M̄ᵀΣ⁻¹M̄)⁺M̄ᵀΣ⁻¹, M̄ the means less their average; the logits at the
    class means are T = log((1-ε+ε/K)/(ε/K))·(I - 11ᵀ/K). Rows of W sum to zero.

    Args: means: μ_k as columns, ``[d, K]``; cov: Σ common to the classes, ``[d, d]``; smoothing: ε in (0, 1].
    Raises: ValueError for a degenerate covariance, ε outside (0, 1], or means that are linearly (with a bias: affinely)
        dependent. Source: book thm-multiclass-law.
    """
    means, cov = np.asarray(means, dtype=float), _check_cov(cov)
    num_classes = means.shape[1]
    if not 0 < smoothing <= 1:
        raise ValueError(f"smoothing must be in (0, 1], got {smoothing}")
    centring = np.eye(num_classes) - 1 / num_classes
    target = math.log((1 - smoothing + smoothing / num_classes) / (smoothing / num_classes)) * centring
    basis = means @ centring if bias else means
    needed = num_classes - bool(bias)
    rank = np.linalg.matrix_rank(basis, tol=1e-10 * np.linalg.norm(basis))
    if rank < needed:
        kind = "affinely" if bias else "linearly"
        raise ValueError(
            f"the {num_classes} class means must be {kind} independent, their rank is {rank}, not {needed}"
        )
    across = np.linalg.solve(cov, basis)
    weights = target @ np.linalg.pinv(basis.T @ across, rcond=1e-12, hermitian=True) @ across.T
    offset = (target - weights @ means).mean(axis=1) if bias else np.zeros(num_classes)
    return weights, offset


def _check(mean, cov):
    mean, cov = np.asarray(mean, dtype=float), _check_cov(cov)
    if mean.shape != cov.shape[:1] or not np.any(mean):
        raise ValueError(f"mean must be non-zero of shape [{len(cov)}], got {mean.tolist()}")
    return mean, cov


def _check_cov(cov):
    cov = np.asarray(cov, dtype=float)
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1] or not np.allclose(cov, cov.T):
        raise ValueError(f"cov must be a symmetric matrix, got shape {list(cov.shape)}")
    values = np.linalg.eigvalsh(cov)
    if not values[0] > 1e-14 * values[-1]:
        raise ValueError(f"cov must be positive definite, its least eigenvalue is {values[0]:.3g}")
    return cov
