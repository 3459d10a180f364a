"""How many examples a loss needs to find Fisher's direction: the limit variance by quadrature, and counts on samples.

The model is y·x ~ N(μ, Σ/κ) with μᵀΣ⁻¹μ = 1: the separation κ is the squared signal-to-noise ratio. Angles are those
of the inner product ⟨v, w⟩ = vᵀΣw, which no linear change of the inputs alters, so that Σ = I and μ = e₁ here.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from labelaug.theory.population import Objective, Sample, folded_rule

REACH = 9.0  # standard deviations that the trapezoidal rule covers on either side


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
    if objective.smoothing == 1:
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
    if not objective.mixes:
        spot, weight = _normal(separation, 4001)
        return objective.smoothing / 2 - expit(-c * spot), weight, spot
    spot, weight = _normal(separation, 201)
    lam, mass = folded_rule(objective.mixing, order)
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


def squared_tangent(weights: np.ndarray) -> float:
    """tan² of the angle to e₁; infinite for weights that point backwards."""
    return float((weights[1:] ** 2).sum() / weights[0] ** 2) if weights[0] > 0 else np.inf


def needed_examples(counts: np.ndarray, squared: np.ndarray, target: float) -> float:
    """The n from which on the median over seeds is at most ``target``; straight in log n and log median between counts.

    Args: counts ``[L]``, increasing; squared ``[L, seeds]``: tan² at each; target > 0.
    Returns: the last crossing (the curve need not fall everywhere); the first count if no median is above the target,
        so that it is an upper bound; infinity if the last median is.
    Raises: ValueError if a value is NaN, which no comparison would show.
    """
    if np.isnan(squared).any():
        raise ValueError(f"squared must be numbers, and {np.isnan(squared).sum()} of {np.size(squared)} are NaN")
    medians = np.median(squared, axis=1)
    above = np.flatnonzero(medians > target)
    if not len(above):
        return float(counts[0])
    if above[-1] == len(counts) - 1:
        return np.inf
    step = slice(above[-1], above[-1] + 2)
    x, y = np.log(counts[step]), np.log(medians[step])
    return float(np.exp(x[0] + (np.log(target) - y[0]) * (x[1] - x[0]) / (y[1] - y[0])))
