"""The data models of paper 1: one low-variance and one high-variance feature, as frozen descriptions and a sampler.

A description speaks of ``U = Y·X``, the input turned so that the correct side is positive; Y in {-1, +1} with equal
probability. Labels are returned as int64 in {0, 1} (1 stands for Y = +1), examples as rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Independent uniform coordinates, each on [low, high], in units of x."""

    low: float
    high: float

    def __post_init__(self):
        if not self.high > self.low:
            raise ValueError(f"a box needs high > low, got [{self.low}, {self.high}]")

    def mean(self, dim: int) -> Tensor:
        """Mean ``[dim]``."""
        return torch.full((dim,), 0.5 * (self.low + self.high), dtype=torch.float64)

    def covariance(self, dim: int) -> Tensor:
        """Covariance ``[dim, dim]``: (high - low)²/12 on the diagonal."""
        return torch.eye(dim, dtype=torch.float64) * (self.high - self.low) ** 2 / 12

    def reach(self, direction: np.ndarray) -> float:
        """How far the support extends from the mean: the maximum of ⟨direction, U - mean⟩."""
        return (self.high - self.low) / 2 * np.abs(direction).sum()

    def sample(self, n: int, dim: int, *, generator: torch.Generator, dtype) -> Tensor:
        """``[n, dim]``."""
        return self.low + (self.high - self.low) * torch.rand(n, dim, generator=generator, dtype=dtype)


@dataclass(frozen=True)
class Elliptical:
    """An elliptical law: centre + cov^½ · (spherical vector of identity covariance).

    ``radial="gaussian"`` is the normal law; ``radial="ellipse"`` is uniform on the solid ellipsoid with that covariance
    (compact and convex). ``centre`` is the mean, d entries; ``cov`` has d rows of d entries.
    """

    centre: tuple[float, ...]
    cov: tuple[tuple[float, ...], ...]
    radial: str = "gaussian"

    def __post_init__(self):
        matrix = np.asarray(self.cov, dtype=float)
        d = len(self.centre)
        if matrix.shape != (d, d) or not np.allclose(matrix, matrix.T):
            raise ValueError(f"cov must be a symmetric {d} x {d} matrix, got shape {matrix.shape}")
        if np.linalg.eigvalsh(matrix).min() < -1e-12:
            raise ValueError(f"cov has a negative eigenvalue {np.linalg.eigvalsh(matrix).min():.3g}")
        if self.radial not in ("gaussian", "ellipse"):
            raise ValueError(f"radial must be 'gaussian' or 'ellipse', got {self.radial!r}")

    def mean(self, dim: int) -> Tensor:
        """Mean ``[dim]``."""
        self._check(dim)
        return torch.tensor(self.centre, dtype=torch.float64)

    def covariance(self, dim: int) -> Tensor:
        """Covariance ``[dim, dim]``."""
        self._check(dim)
        return torch.tensor(self.cov, dtype=torch.float64)

    def reach(self, direction: np.ndarray) -> float:
        """How far the support extends from the mean: the maximum of ⟨direction, U - mean⟩."""
        if self.radial == "gaussian":
            return np.inf
        return np.sqrt((len(direction) + 2) * max(direction @ np.asarray(self.cov) @ direction, 0.0))

    def sample(self, n: int, dim: int, *, generator: torch.Generator, dtype) -> Tensor:
        """``[n, dim]``."""
        self._check(dim)
        values, vectors = torch.linalg.eigh(self.covariance(dim))
        root = (vectors * values.clamp(min=0).sqrt()).to(dtype)
        sphere = torch.randn(n, dim, generator=generator, dtype=dtype)
        if self.radial == "ellipse":  # uniform in the ball of radius √(d+2), which has identity covariance
            radius = torch.rand(n, 1, generator=generator, dtype=dtype) ** (1 / dim) * (dim + 2) ** 0.5
            sphere = radius * sphere / sphere.norm(dim=1, keepdim=True)
        return self.mean(dim).to(dtype) + sphere @ root.T

    def _check(self, dim: int) -> None:
        if dim != len(self.centre):
            raise ValueError(f"this elliptical law has {len(self.centre)} dimensions, not {dim}")


class _TwoFeatures:
    """The first ``num_low`` of ``dim`` coordinates form the low-variance feature, the others the high-variance one."""

    @property
    def low(self) -> slice:
        """Coordinates of the low-variance feature."""
        return slice(0, self.num_low)

    @property
    def high_coordinates(self) -> slice:
        """Coordinates of the high-variance feature."""
        return slice(self.num_low, self.dim)


@dataclass(frozen=True)
class TwoFeatureTask(_TwoFeatures):
    """A low-variance feature ``x_i = γy (+ noise)``, i < num_low, then a high-variance one of num_high coordinates.

    Args: num_low, num_high: dimensions of the two features; gamma: γ > 0, margin of each low coordinate;
        high: law of U on the high coordinates given Y = +1; high_negative: the same given Y = -1 (None: equal, so that
        the two classes are mirror images); low_noise: half-width of the uniform noise on each low coordinate.
    Raises: ValueError with the offending value. A task that leaves the definition of the paper is allowed:
        :meth:`departures` says in which points.
    Source: paper 1, Definitions 2.1 and 4.1; book def-two-feature, def-synthetic.
    """

    gamma: float = 0.1
    high: Box | Elliptical = Box(0.2, 10.2)
    high_negative: Box | Elliptical | None = None
    low_noise: float = 0.0
    num_low: int = 5
    num_high: int = 5

    def __post_init__(self):
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")
        if not self.low_noise >= 0:
            raise ValueError(f"low_noise must be at least 0, got {self.low_noise}")
        if min(self.num_low, self.num_high) < 1:
            raise ValueError(f"each feature needs a coordinate, got num_low={self.num_low}, num_high={self.num_high}")
        for law in (self.high, self.law(-1)):
            law.mean(self.num_high)

    @property
    def dim(self) -> int:
        """Number of coordinates d."""
        return self.num_low + self.num_high

    def law(self, y: int) -> Box | Elliptical:
        """Law of U = Y·X on the high coordinates given Y = y."""
        return self.high if y > 0 or self.high_negative is None else self.high_negative

    def mean(self, y: int) -> Tensor:
        """E[U | Y = y], float64 ``[d]``; the class mean of X is y times this."""
        low = torch.full((self.num_low,), self.gamma, dtype=torch.float64)
        return torch.cat([low, self.law(y).mean(self.num_high)])

    def covariance(self, y: int) -> Tensor:
        """Cov(X | Y = y) = Cov(U | Y = y), float64 ``[d, d]``."""
        low = torch.eye(self.num_low, dtype=torch.float64) * self.low_noise**2 / 3
        return torch.block_diag(low, self.law(y).covariance(self.num_high))

    def departures(self) -> tuple[str, ...]:
        """The points in which this task leaves Definition 2.1, one sentence each; empty when it is inside."""
        found = []
        if self.low_noise > 0:
            found.append(f"the low-variance feature has variance (noise of half-width {self.low_noise:g})")
        if not torch.allclose(self.mean(1), self.mean(-1)):
            found.append("the mean of X is not zero")
        for y in (1, -1):
            law = self.law(y)
            if isinstance(law, Elliptical) and law.radial == "gaussian":
                found.append("the support of the high-variance feature is not compact")
                break
            if torch.linalg.eigvalsh(law.covariance(self.num_high)).min() <= 0:
                found.append("the covariance of the high-variance feature is not positive definite")
                break
        distance, needed = self.support_distance(), 2 * self.gamma * self.num_low**0.5
        if distance is not None and not distance > needed:
            found.append(
                f"the high-variance feature is not the more separable one: its class supports are {distance:.3g} "
                f"apart, those of the low-variance feature {needed:.3g}"
            )
        return tuple(found)

    def support_distance(self) -> float | None:
        """Distance of the two class supports of the high-variance feature; None where they are unbounded.

        Between other laws than two boxes it is the widest margin, concave in its direction u:
        the maximum over |u| ≤ 1 of min ⟨u, S_1⟩ - max ⟨u, S_-1⟩.
        """
        plus, minus = self.high, self.law(-1)
        if isinstance(plus, Box) and isinstance(minus, Box):
            # X_H given -1 lies in [-minus.high, -minus.low] per coordinate.
            gap = max(0.0, plus.low + minus.low, -plus.high - minus.high)
            return gap * self.num_high**0.5
        between = (plus.mean(self.num_high) + minus.mean(self.num_high)).numpy()
        if not np.isfinite([plus.reach(between), minus.reach(between)]).all():
            return None
        if not between.any():
            return 0.0
        found = minimize(
            lambda u: plus.reach(u) + minus.reach(u) - u @ between,
            between / np.linalg.norm(between),
            constraints={"type": "ineq", "fun": lambda u: 1 - u @ u},
            method="SLSQP",
        )
        return max(0.0, -found.fun)


@dataclass(frozen=True)
class EllipticalTask(_TwoFeatures):
    """Both classes share one elliptical law of U = Y·X over all coordinates, correlations between features included.

    Args: law: an :class:`Elliptical` of d dimensions; num_low: how many leading coordinates form the low feature.
    Source: book, the elliptical law.
    """

    law: Elliptical
    num_low: int = 1

    def __post_init__(self):
        if not 1 <= self.num_low < self.dim:
            raise ValueError(f"num_low must be in 1..{self.dim - 1}, got {self.num_low}")

    @property
    def dim(self) -> int:
        """Number of coordinates d."""
        return len(self.law.centre)

    def mean(self, y: int) -> Tensor:
        """E[U | Y = y], float64 ``[d]``, the same for both classes."""
        return self.law.mean(self.dim)

    def covariance(self, y: int) -> Tensor:
        """Cov(X | Y = y), float64 ``[d, d]``, the same for both classes."""
        return self.law.covariance(self.dim)


def counterexample_task() -> TwoFeatureTask:
    """Satisfies every clause of Definition 2.1, yet its max-margin direction has no high-variance part.

    X_H given +1 is uniform on [-1, 11], given -1 on [-8, -2]; γ = 0.1. Source: book, the repaired hypothesis.
    """
    return TwoFeatureTask(gamma=0.1, high=Box(-1.0, 11.0), high_negative=Box(2.0, 8.0), num_low=1, num_high=1)


def sample(
    task: TwoFeatureTask | EllipticalTask, n: int, *, generator: torch.Generator, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """n examples of a task. Returns: x ``[n, d]``, labels int64 ``[n]`` in {0, 1}.

    Raises: ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    labels = torch.randint(2, (n,), generator=generator)
    positive = (labels == 1)[:, None]
    y = 2.0 * labels.to(dtype)[:, None] - 1.0
    if isinstance(task, EllipticalTask):
        return y * task.law.sample(n, task.dim, generator=generator, dtype=dtype), labels
    noise = 2.0 * torch.rand(n, task.num_low, generator=generator, dtype=dtype) - 1.0
    low = task.gamma * y + task.low_noise * noise
    high = task.high.sample(n, task.num_high, generator=generator, dtype=dtype)
    if task.high_negative is not None:
        other = task.high_negative.sample(n, task.num_high, generator=generator, dtype=dtype)
        high = torch.where(positive, high, other)
    return torch.cat([low, y * high], dim=1), labels


def sample_seeds(
    task: TwoFeatureTask | EllipticalTask, n: int, *, seeds: Sequence[int], dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """One data set a seed, each from a generator of that seed alone: x ``[seeds, n, d]``, labels ``[seeds, n]``."""
    drawn = [sample(task, n, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]
    return torch.stack([x for x, _ in drawn]), torch.stack([labels for _, labels in drawn])
