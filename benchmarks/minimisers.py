"""Exact minimisers: Newton on reduced quadrature against scipy's general optimiser on the unreduced loss, in one run.

The synthetic task of the book with noise on the low-variance feature, at the strengths of its sweep. "First" builds the
quadrature rules, "again" finds them in the cache, as along a path of strengths. The general optimiser works on the same
integral as a weighted sum in the plane (for Mixup over all pairs of 12 x 24 nodes and 40 values of λ), not in ten
dimensions, where the sum would not fit in memory.

Run by ``labelaug bench``.
"""

import time

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from labelaug.data.synthetic import TwoFeatureTask
from labelaug.theory import population
from labelaug.theory.population import Objective, method_objective, minimise

WANTED_MS = {"weight decay": 20, "label smoothing": 20, "label smoothing + weight decay": 20, "mixup": 200}
OBJECTIVES = {
    "weight decay": [method_objective("weight decay", s) for s in (1e-3, 1e-2, 1e-1)],
    "label smoothing": [method_objective("label smoothing", s) for s in (0.05, 0.1, 0.5)],
    "label smoothing + weight decay": [Objective(smoothing=0.1, weight_decay=s) for s in (1e-3, 1e-2, 1e-1)],
    "mixup": [method_objective("mixup", s) for s in (0.2, 1.0, 4.0)],
}


def forget() -> None:
    """Empty the caches of quadrature rules."""
    for rule in (population._standard_rule, population._mixed_standard, population._radial_rule):
        rule.cache_clear()


def milliseconds(task: TwoFeatureTask, objectives: list[Objective], *, warm: bool) -> float:
    """Mean time of a minimiser."""
    total = 0.0
    for objective in objectives:
        forget()
        for _ in range(2 if warm else 1):
            began = time.perf_counter()
            minimise(task, objective)
            seconds = time.perf_counter() - began
        total += seconds
    return 1e3 * total / len(objectives)


def general(task: TwoFeatureTask, objective: Objective) -> float:
    """Milliseconds of BFGS on the plain sum."""
    began = time.perf_counter()
    high, chance = np.polynomial.legendre.leggauss(24)
    low, chance_low = np.polynomial.legendre.leggauss(12)
    low, high = task.gamma + task.low_noise * low, task.high.low + (task.high.high - task.high.low) * (high + 1) / 2
    u = np.stack(np.meshgrid(low, high, indexing="ij"), -1).reshape(-1, 2)
    weights, targets = np.outer(chance_low, chance).ravel() / 4, np.ones(len(u))
    if objective.mixing is not None:
        lam, mass = objective.mixing.rule(40)
        sides = [
            (
                lam[:, None, None, None] * u[:, None] + sign * (1 - lam)[:, None, None, None] * u,
                lam + (1 - lam) * (sign > 0),
            )
            for sign in (1, -1)
        ]
        pairs = 0.5 * mass[:, None, None] * (weights[:, None] * weights)
        targets = np.concatenate([np.broadcast_to(t[:, None, None], pairs.shape).ravel() for _, t in sides])
        u = np.concatenate([points.reshape(-1, 2) for points, _ in sides])
        weights = np.tile(pairs.ravel(), 2)
    targets = (1 - objective.smoothing) * targets + objective.smoothing / 2

    def value(w):
        z = u @ w
        loss = weights @ (np.logaddexp(0, z) - targets * z) + objective.weight_decay / 2 * w @ w
        return loss, (weights * (expit(z) - targets)) @ u + objective.weight_decay * w

    minimize(value, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-10})
    return 1e3 * (time.perf_counter() - began)


def measure(*, quick: bool) -> list[dict]:
    """One row a kind of loss."""
    plane = TwoFeatureTask(low_noise=0.05, num_low=1, num_high=1)
    ten = TwoFeatureTask(low_noise=0.05)
    found = []
    for name, objectives in OBJECTIVES.items():
        found.append(
            {
                "loss": name,
                "first_ms": milliseconds(ten, objectives, warm=False),
                "again_ms": milliseconds(ten, objectives, warm=True),
                "plane_ms": milliseconds(plane, objectives, warm=True),
                "general_ms": general(plane, objectives[1]) if not (quick and name == "mixup") else None,
                "wanted_ms": WANTED_MS[name],
            }
        )
    return found


def main(*, quick: bool) -> None:
    """Print the table."""
    print(f"{'loss':32s}{'d = 10, first':>15s}{'again':>10s}{'d = 2':>10s}{'BFGS, d = 2':>14s}{'wanted':>10s}")
    for row in measure(quick=quick):
        other = "not run" if row["general_ms"] is None else f"{row['general_ms']:.0f} ms"
        times = "".join(
            f"{row[key]:>{width}.1f} ms"[1:] for key, width in (("first_ms", 13), ("again_ms", 8), ("plane_ms", 8))
        )
        print(f"{row['loss']:32s}  {times}{other:>14s}{row['wanted_ms']:>7d} ms")
