"""How many examples a loss needs to find Fisher's direction: the limit variance by quadrature, and fits to samples.

The model is y·x ~ N(μ, Σ/κ) with μᵀΣ⁻¹μ = 1: the separation κ is the squared signal-to-noise ratio. Angles are those
of the inner product ⟨v, w⟩ = vᵀΣw, which no linear change of the inputs alters, so that Σ = I and μ = e₁ here.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, nnls
from scipy.special import expit

from labelaug.theory.population import ConvergenceError, Objective, Sample

REACH = 9.0  # standard deviations that the trapezoidal rule covers on either side
GRADIENT = 1e-10  # at which Newton's method on a sample stops


@dataclass(frozen=True)
class Spread:
    """n·tan²(angle to Fisher's direction) tends in law to ``constant``·χ²(d-1); ``margin``: c of the minimiser c·e₁."""

    constant: float
    margin: float


def direction_spread(separation: float, objective: Objective, *, order: int = 16) -> Spread:
    """A = E[ρ²] / (κ·E[Yρ]²) at the population minimiser, ρ being the residual an example carries into the gradient.

    Args: separation: κ > 0; objective: weight decay in units of inputs with ‖μ‖ = 1; order: nodes of the law of λ.
    Returns: constant and margin, to eight digits without mixing (trapezoidal rule on an analytic integrand).
    Raises: ValueError if κ is not positive, or there is no direction because the minimiser is zero (ε = 1).
    Source: book thm-direction-variance, eq-spread.
    """
    if not separation > 0:
        raise ValueError(f"separation must be positive, got {separation}")
    if objective.smoothing == 1 and objective.mixing is None:
        raise ValueError("label smoothing with ε = 1 has its minimiser at zero: there is no direction")

    def stationarity(c: float) -> float:
        """Derivative of the loss along e₁, from the moments of the residual alone: it never sees a Hessian."""
        carried, weight, spot = _carried(c, separation, objective, order)
        return weight @ (carried * spot) + objective.weight_decay * c

    high = 1.0
    while stationarity(high) < 0:
        high *= 2
    c = brentq(stationarity, 0.0, high, xtol=1e-13, rtol=1e-14)
    carried, weight, _ = _carried(c, separation, objective, order)
    return Spread(float(weight @ carried**2 / (separation * (weight @ carried) ** 2)), float(c))


def _carried(
    c: float, separation: float, objective: Objective, order: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Yρ on nodes of the example's first coordinate, their weights, and that coordinate turned to its own side."""
    if objective.mixing is None:
        spot, weight = _normal(separation, 4001)
        return objective.smoothing / 2 - expit(-c * spot), weight, spot
    spot, weight = _normal(separation, 201)
    lam, mass = _folded(objective.mixing, order)
    carried = np.zeros_like(spot)
    for sign in (1.0, -1.0):  # the partner's side, the example standing on +1
        target = 0.5 * (1 + sign)
        for anchor, chance in zip(lam, mass, strict=True):
            for share in (anchor, 1 - anchor):
                z = c * (share * spot[:, None] + sign * (1 - share) * spot)
                t = share + (1 - share) * target
                t = (1 - objective.smoothing) * t + objective.smoothing / 2
                carried += 0.5 * chance * share * ((expit(z) - t) @ weight)
    return carried, weight, spot


def _normal(separation: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Trapezoidal rule for N(1, 1/κ), from REACH deviations below the origin to REACH above the mean."""
    deviates = np.linspace(-np.sqrt(separation) - REACH, REACH, count)
    weight = np.exp(-0.5 * deviates**2)
    return 1 + deviates / np.sqrt(separation), weight / weight.sum()


def _folded(law, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of λ folded onto [1/2, 1]: over all ordered pairs λ and 1 - λ give the same loss."""
    lam, mass = law.rule(order)
    lam, inverse = np.unique(np.round(np.maximum(lam, 1 - lam), 14), return_inverse=True)
    return lam, np.bincount(inverse, weights=mass)


def draw_classes(n: int, dim: int, separation: float, *, rng: np.random.Generator) -> Sample:
    """n examples, half of each class, with y·x = e₁ + g/√κ, g standard normal in ``dim`` dimensions.

    Raises: ValueError unless n is even and at least 2.
    """
    if n < 2 or n % 2:
        raise ValueError(f"n must be even and at least 2, got {n}")
    labels = np.arange(n) % 2
    turned = rng.standard_normal((n, dim)) / np.sqrt(separation)
    turned[:, 0] += 1
    return Sample((2.0 * labels - 1.0)[:, None] * turned, labels)


def fit(sample: Sample, objective: Objective, *, order: int = 8) -> np.ndarray:
    """Weights ``[d]`` that minimise the loss on a sample of equal weights; the max-margin weights where ERM has none.

    Mixup is over all n² pairs, by the n x n structure of its gradient and Hessian; order: nodes of the law of λ.
    Raises: ConvergenceError if Newton's method does not reach a gradient of 1e-10.
    """
    if objective.asks_for_infinity:
        widest = _widest_margin(sample.turned)
        if widest is not None:
            return widest
    slopes = _unmixed(sample, objective) if objective.mixing is None else _all_pairs(sample, objective, order)
    w = 2 * np.linalg.lstsq(sample.turned, np.ones(len(sample.x)), rcond=None)[0]  # near equal margins of 2
    gradient, hessian = slopes(w)
    for _ in range(200):
        norm = np.linalg.norm(gradient)
        if norm <= GRADIENT:
            return w
        move, stride = np.linalg.solve(hessian, gradient), 1.0
        while True:  # Newton's step also descends the norm of the gradient, at the rate 1
            gradient, hessian = slopes(w - stride * move)
            if np.linalg.norm(gradient) <= (1 - 0.1 * stride) * norm or stride < 1e-6:
                break
            stride /= 2
        w = w - stride * move
    raise ConvergenceError(f"Newton's method stopped at a gradient of {np.linalg.norm(gradient):.1e}")


def _widest_margin(turned: np.ndarray) -> np.ndarray | None:
    """Least w with turned·w ≥ 1, None where no w separates: Lawson and Hanson's least-distance program."""
    matrix = np.vstack([turned.T, np.ones(len(turned))])
    goal = np.eye(len(matrix))[-1]
    multipliers, _ = nnls(matrix, goal, maxiter=10 * len(turned) + 100)
    residual = goal - matrix @ multipliers
    return -residual[:-1] / residual[-1] if residual[-1] > 1e-12 else None


def _unmixed(sample: Sample, objective: Objective):
    """Gradient and Hessian as a function of the weights, without mixing."""
    turned, decay = sample.turned, objective.weight_decay

    def slopes(w):
        wrong = expit(-(turned @ w))
        gradient = (objective.smoothing / 2 - wrong) @ turned / len(turned)
        hessian = (turned * (wrong * (1 - wrong))[:, None]).T @ turned / len(turned)
        return gradient + decay * w, hessian + decay * np.eye(len(w))

    return slopes


def _all_pairs(sample: Sample, objective: Objective, order: int):
    """Gradient and Hessian as a function of the weights, over all pairs."""
    x, decay = sample.x, objective.weight_decay
    t = (1 - objective.smoothing) * sample.labels + objective.smoothing / 2
    lam, mass = _folded(objective.mixing, order)

    def slopes(w):
        z = x @ w
        residual, curvature, diagonal = np.zeros(len(x)), np.zeros((len(x), len(x))), np.zeros(len(x))
        for share, chance in zip(lam, mass / len(x) ** 2, strict=True):
            p = expit(share * z[:, None] + (1 - share) * z)
            residual += chance * (share * p.sum(1) + (1 - share) * p.sum(0))
            residual -= chance * len(x) * ((share**2 + (1 - share) ** 2) * t + 2 * share * (1 - share) * t.mean())
            slope = p * (1 - p)
            curvature += chance * share * (1 - share) * slope
            diagonal += chance * (share**2 * slope.sum(1) + (1 - share) ** 2 * slope.sum(0))
        hessian = x.T @ (curvature + curvature.T) @ x + (x * diagonal[:, None]).T @ x
        return x.T @ residual + decay * w, hessian + decay * np.eye(len(w))

    return slopes


def squared_tangent(weights: np.ndarray) -> float:
    """tan² of the angle to e₁; infinite for weights that point backwards."""
    return float((weights[1:] ** 2).sum() / weights[0] ** 2) if weights[0] > 0 else np.inf


def needed_examples(counts: np.ndarray, squared: np.ndarray, target: float) -> float:
    """The n from which on the median over seeds is at most ``target``; straight in log n and log median between counts.

    Args: counts ``[L]``, increasing; squared ``[L, seeds]``: tan² at each; target > 0.
    Returns: the last crossing (the curve need not fall everywhere); the first count if no median is above the target,
        so that it is an upper bound; infinity if the last median is.
    """
    medians = np.median(squared, axis=1)
    above = np.flatnonzero(medians > target)
    if not len(above):
        return float(counts[0])
    if above[-1] == len(counts) - 1:
        return np.inf
    step = slice(above[-1], above[-1] + 2)
    x, y = np.log(counts[step]), np.log(medians[step])
    return float(np.exp(x[0] + (np.log(target) - y[0]) * (x[1] - x[0]) / (y[1] - y[0])))
