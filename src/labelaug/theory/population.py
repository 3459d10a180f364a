"""Exact minimisers of the population loss of a linear model: quadrature, Newton's method, and a certificate with each.

The loss is E[log(1 + e^z) - t z] + (λ_wd/2)‖w‖² over the law of a logit z = ⟨w, x⟩ and its target t. Three exact
reductions of the law of the data keep the integral low-dimensional:

- independent equal coordinates: the loss is convex and blind to their order, so a minimiser has one weight for all of
  them, and only the law of their sum matters (a B-spline);
- an elliptical law: ⟨w, U⟩ = ⟨w, μ⟩ + √(wᵀΣw)·R with one fixed law of R, and integration by parts in R gives gradient
  and Hessian by the same nodes, for any dimension;
- Mixup: given λ the mixed coordinate is again a scalar, and its law is replaced by its own Gauss rule.

A finite, possibly weighted sample is a law as well; Mixup is then over all its pairs, in n × n arrays in any dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.integrate import solve_ivp
from scipy.interpolate import BSpline
from scipy.linalg import block_diag
from scipy.optimize import nnls
from scipy.special import roots_jacobi, roots_legendre

from labelaug.data.synthetic import Box, Elliptical, EllipticalTask, TwoFeatureTask
from labelaug.mixing import check_alpha

GRADIENT = 1e-10  # the certificate: a larger gradient is not returned as a minimiser
STEP = 1e-6  # nor one from which Newton's next step is longer than this, relative to 1 + ‖w‖
LEAST_LOSS = 1e-24  # below it the loss rests on a tail of the normal law that the nodes do not reach
STABLE = 1e-10  # how little the minimiser may move, relative to 1 + ‖w‖, when the rule is refined
MOST_NUMBERS = 2**24  # of the finest rule: nodes times coordinates; of a sample: pairs times nodes of λ
BLOCK = 2**15  # pairs at once: arrays that stay in the processor's cache
COARSE = 2**14  # of the finest rule on which Newton's method may fail without the failure being final


class ConvergenceError(ArithmeticError):
    """Newton's method or the quadrature did not reach its tolerance; there is no number to return."""


@dataclass(frozen=True)
class BetaLaw:
    """λ ~ Beta(α, α), α > 0. Below 1 the density is singular at both ends; its Gauss–Jacobi nodes do not mind."""

    alpha: float

    def __post_init__(self):
        check_alpha(self.alpha)

    def rule(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """Gauss–Jacobi nodes and weights ``[order]`` of the law."""
        nodes, weights = roots_jacobi(order, self.alpha - 1, self.alpha - 1)
        return (nodes + 1) / 2, weights / weights.sum()

    def mass(self, value: float) -> float:
        """P(λ = value)."""
        return 0.0


@dataclass(frozen=True)
class DiscreteLaw:
    """λ takes ``values`` in [0, 1] with probabilities ``weights``; (0.5,) with (1.0,) is midpoint Mixup."""

    values: tuple[float, ...] = (0.5,)
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if len(self.values) != len(self.weights) or not self.values:
            raise ValueError(f"a law of λ needs a weight for each value, got {self.values} and {self.weights}")
        if not all(0 <= value <= 1 for value in self.values):
            raise ValueError(f"λ must lie in [0, 1], got the values {self.values}")
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"each value of λ may stand once, got {self.values}")
        if not all(weight > 0 for weight in self.weights) or abs(sum(self.weights) - 1) > 1e-12:
            raise ValueError(f"the weights of λ must be positive and sum to 1, got {self.weights}")

    def rule(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and weights; exact whatever the order."""
        return np.array(self.values, dtype=float), np.array(self.weights, dtype=float)

    def mass(self, value: float) -> float:
        """P(λ = value)."""
        return sum(w for v, w in zip(self.values, self.weights, strict=True) if v == value)


def folded_rule(law: BetaLaw | DiscreteLaw, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of max(λ, 1 - λ) and their weights: over all ordered pairs λ and 1 - λ give the same loss."""
    lam, mass = law.rule(order)
    lam = np.maximum(lam, 1 - lam)
    _, first, inverse = np.unique(np.round(lam, 14), return_index=True, return_inverse=True)
    return lam[first], np.bincount(inverse, weights=mass)


@dataclass(frozen=True)
class Objective:
    """What is minimised. All at their defaults: the plain cross-entropy (ERM).

    Args: smoothing: ε in (0, 1], or 0 for hard labels; mixing: law of Mixup's λ, None for no mixing (with both, the
        mixed target is smoothed); weight_decay: λ_wd ≥ 0 of (λ_wd/2)‖w‖².
    Raises: ValueError with the value. Source: paper 1, (2.1), (2.4), (2.8); book eq-weight-decay, eq-ls-binary.
    """

    smoothing: float = 0.0
    mixing: BetaLaw | DiscreteLaw | None = None
    weight_decay: float = 0.0

    def __post_init__(self):
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be in (0, 1], or 0 for hard labels, got {self.smoothing}")
        if not 0 <= self.weight_decay < np.inf:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")

    @property
    def mixes(self) -> bool:
        """Whether any input is mixed: with λ in {0, 1} the loss is that without mixing."""
        return self.mixing is not None and self.mixing.mass(0.0) + self.mixing.mass(1.0) < 1 - 1e-12

    @property
    def asks_for_infinity(self) -> bool:
        """Whether all its targets are 0 or 1, so that separable data have no minimiser."""
        return self.smoothing == 0 and self.weight_decay == 0 and not self.mixes


def method_objective(method: str, strength: float) -> Objective:
    """What one method of a sweep minimises at one strength: λ_wd, ε, or the α of Beta(α, α). Strength 0 is ERM.

    Raises: ValueError for another method than "weight decay", "label smoothing" and "mixup".
    """
    if method not in ("weight decay", "label smoothing", "mixup"):
        raise ValueError(f"method must be 'weight decay', 'label smoothing' or 'mixup', got {method!r}")
    if strength == 0:
        return Objective()
    if method == "mixup":
        return Objective(mixing=BetaLaw(strength))
    return Objective(**{"weight_decay" if method == "weight decay" else "smoothing": strength})


@dataclass(frozen=True, eq=False)
class Sample:
    """A finite sample as a law: rows ``x [n, d]``, labels ``[n]`` in {0, 1}, probabilities ``weights [n]`` (None: 1/n).

    Mixup takes all n² pairs, an example with itself included: two independent draws of this law.
    """

    x: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self):
        x, labels = np.asarray(self.x, dtype=float), np.asarray(self.labels)
        if x.ndim != 2 or labels.shape != x.shape[:1]:
            raise ValueError(f"x must be [n, d] with labels [n], got {x.shape} and {labels.shape}")
        if set(np.unique(labels)) != {0, 1}:
            raise ValueError(f"labels must be 0 and 1, both present, got {np.unique(labels)}")
        if not np.isfinite(x).all():
            raise ValueError(f"x must be finite, and {(~np.isfinite(x)).any(1).sum()} of its {len(x)} rows are not")
        if not x.any():
            raise ValueError("x must not be all zero: no weights matter to a law at the origin")
        weights = np.full(len(x), 1 / len(x)) if self.weights is None else np.asarray(self.weights, dtype=float)
        if weights.shape != labels.shape or not (weights > 0).all() or abs(weights.sum() - 1) > 1e-12:
            raise ValueError(
                f"weights must be [n], positive and sum to 1, got shape {weights.shape}, sum {weights.sum()}"
            )
        for name, value in (("x", x), ("labels", labels), ("weights", weights)):
            object.__setattr__(self, name, value)

    @property
    def dim(self) -> int:
        """Number of coordinates d."""
        return self.x.shape[1]

    @property
    def turned(self) -> np.ndarray:
        """U = Y·X, ``[n, d]``."""
        return (2.0 * self.labels - 1.0)[:, None] * self.x


Source = TwoFeatureTask | EllipticalTask | Sample


@dataclass(frozen=True, eq=False)
class Minimiser:
    """The minimiser of least norm, and what certifies it.

    weights ``[d]``; loss in nats; gradient_norm ≤ 1e-10; least_curvature: smallest eigenvalue of the Hessian on the
    span of the data (within the symmetric weights where the law is symmetric), positive; next_step ≤ 1e-6: length of
    Newton's next step over 1 + ‖w‖, how far off the weights may be (1e-12 unless the loss is flat); null_space
    ``[d, r]``: orthonormal directions that no input has, which may be added to the weights without changing the loss
    when there is no weight decay; nodes: of the finest quadrature rule.
    """

    weights: np.ndarray
    loss: float
    gradient_norm: float
    least_curvature: float
    next_step: float
    null_space: np.ndarray
    nodes: int


@dataclass(frozen=True, eq=False)
class AtInfinity:
    """There is no minimiser: the loss tends to ``infimum`` along c·``direction [d]`` (unit norm) as c → ∞."""

    direction: np.ndarray
    infimum: float


def minimise(source: Source, objective: Objective) -> Minimiser | AtInfinity:
    """The minimiser of E[loss] for one law and one objective, or the report that it lies at infinity.

    Raises: ValueError for a law without the symmetry that the reduction needs; ConvergenceError where the certificate
        or the stability of the quadrature cannot be reached. Source: book prop-existence, prop-symmetric-weights.
    """
    infinite = _at_infinity(source, objective)
    if infinite is not None:
        return infinite
    space, found, moved = _space(source), None, np.inf
    for order in _orders(objective):
        nodes = _nodes(source, objective, order).project(space.basis)
        try:
            last, found = found, _newton(nodes, objective.weight_decay, start=found)
        except ConvergenceError:  # of a rule so coarse that its loss and its gradient disagree
            if nodes.count * space.basis.shape[1] > COARSE or _is_finite(source, objective):
                raise
            found = None
            continue
        if last is not None:
            moved = np.linalg.norm(found - last) / (1 + np.linalg.norm(found))
        if moved <= STABLE or _is_finite(source, objective):
            break
    loss, gradient, hessian = nodes.derivatives(found, objective.weight_decay)
    norm, curvature = float(np.linalg.norm(gradient)), float(np.linalg.eigvalsh(hessian)[0])
    step = np.linalg.norm(_step(gradient, hessian, found)) / (1 + np.linalg.norm(found))
    if not (norm <= GRADIENT and curvature > 0 and step <= STEP and loss >= LEAST_LOSS):
        raise ConvergenceError(
            f"no certificate: gradient norm {norm:.1e}, least curvature {curvature:.1e}, next step {step:.1e}, "
            f"loss {loss:.1e}"
        )
    return Minimiser(space.lift @ found, loss, norm, curvature, float(step), space.null, nodes.count)


def population_loss(source: Source, objective: Objective, weights: np.ndarray) -> np.ndarray:
    """E[loss] at given weights: ``[..., d]`` -> ``[...]``, by one rule of fixed order (128; 30 for a Beta law).

    Raises: ValueError if the weights differ within a block of exchangeable coordinates (the rule knows only their sum).
    """
    weights = np.asarray(weights, dtype=float)
    frame = _frame(source)
    reduced = weights @ frame
    if not np.allclose(reduced @ frame.T, weights, rtol=0, atol=1e-12 * (1 + np.abs(weights).max())):
        raise ValueError("the weights must be equal within a block of exchangeable coordinates")
    nodes = _nodes(source, objective, 30 if isinstance(objective.mixing, BetaLaw) else 128)
    losses = [nodes.loss(w, objective.weight_decay) for w in reduced.reshape(-1, frame.shape[1])]
    return np.array(losses).reshape(weights.shape[:-1])


def gradient_flow(
    source: Source, objective: Objective, times: np.ndarray, *, start: np.ndarray | None = None, order: int = 256
) -> np.ndarray:
    """Weights of dw/dt = -∇L(w) from ``start`` (None: the origin) at increasing times > 0: ``[times, d]``.

    Integrated in log t by an implicit method, so that times of 1e12 cost as much as times of 10; gradient descent with
    a small step η is at t = ηk after k steps. Raises: ConvergenceError if the integrator stops early.
    """
    times = np.asarray(times, dtype=float)
    if times.ndim != 1 or not times[0] > 0 or (np.diff(times) <= 0).any():
        raise ValueError("times must be positive and increasing")
    frame = _frame(source)
    nodes = _nodes(source, objective, order)
    first = min(1e-6, times[0] / 2)  # before it the gradient is constant to this relative accuracy

    def velocity(log_time, w):
        return -np.exp(log_time) * nodes.derivatives(w, objective.weight_decay)[1]

    def jacobian(log_time, w):
        return -np.exp(log_time) * nodes.derivatives(w, objective.weight_decay)[2]

    begin = np.zeros(frame.shape[1]) if start is None else np.asarray(start, dtype=float) @ frame
    begin = begin - first * nodes.derivatives(begin, objective.weight_decay)[1]
    span, at = (np.log(first), np.log(times[-1])), np.log(times)
    run = solve_ivp(velocity, span, begin, method="Radau", jac=jacobian, t_eval=at, rtol=1e-8, atol=1e-10)
    if not run.success:
        raise ConvergenceError(f"gradient flow stopped early: {run.message}")
    return run.y.T @ frame.T


def max_margin(source: Source) -> np.ndarray:
    """The weights of least norm with y⟨w, x⟩ ≥ 1 on the whole support, ``[d]``.

    A quadratic program with one constraint a point of the support; only points that bind are ever written down (cutting
    planes), and each small program is solved exactly, as a least-distance problem by non-negative least squares.

    Raises: ValueError where no weights separate the support. Source: paper 1 (2.2); book eq-max-margin.
    """
    allowed = _bounded_directions(source)
    points = _worst(source, _mean(source)) @ allowed
    for _ in range(1000):
        weights = _least_norm(points)
        if weights is None:
            raise ValueError("no weights separate the two classes: there is no max-margin solution")
        worst = _worst(source, weights) @ allowed
        rounding = 1e-15 * (weights @ weights) * np.abs(points).max() ** 2  # of the least-norm weights
        if (worst @ weights).min() >= 1 - 1e-11 - rounding:
            return weights
        points = np.concatenate([points, worst])
    raise ConvergenceError(f"cutting planes did not close: the least margin is {(worst @ weights).min():.3g}, not 1")


# --- the law as weighted nodes -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Weighted points of a logit and its target: z = linear·w + Σ_g radius_g·√(Σ_e reach_ge wᵀ scatter_e w).

    weight, target ``[N]``; linear ``[N, k]``; scatter ``[E, k, k]``; radius ``[G, N]`` and reach ``[G, E, N]``: a group
    for each radial variable; kernel ``[E, N]`` and pair ``[E, E, N]`` hold what integration by parts leaves of one and
    of two factors of them.
    """

    weight: np.ndarray
    target: np.ndarray
    linear: np.ndarray
    scatter: np.ndarray
    radius: np.ndarray
    reach: np.ndarray
    kernel: np.ndarray
    pair: np.ndarray

    @property
    def count(self) -> int:
        """Number of nodes N."""
        return len(self.weight)

    def project(self, basis: np.ndarray) -> "_Nodes":
        """The same nodes in the coordinates of orthonormal columns ``basis [k, r]``."""
        return replace(self, linear=self.linear @ basis, scatter=basis.T @ self.scatter @ basis)

    def start(self, weight_decay: float) -> np.ndarray:
        """Where Newton's method may begin: zero, ``[k]``."""
        return np.zeros(self.linear.shape[1])

    def logits(self, w: np.ndarray) -> np.ndarray:
        """z at each node, ``[N]``."""
        z = self.linear @ w
        variances = np.maximum(w @ self.scatter @ w, 0.0)
        for radius, reach in zip(self.radius, self.reach, strict=True):
            z = z + radius * np.sqrt(variances @ reach)
        return z

    def loss(self, w: np.ndarray, weight_decay: float) -> float:
        """Loss at w, weight decay included."""
        value, _, _ = _cross_entropy(self.logits(w), self.target)
        return float(self.weight @ value + 0.5 * weight_decay * (w @ w))

    def derivatives(self, w: np.ndarray, weight_decay: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Loss, gradient ``[k]`` and Hessian ``[k, k]`` at w, weight decay included."""
        z, pulled = self.logits(w), self.scatter @ w  # Σ_e w
        value, residual, tail = _cross_entropy(z, self.target)
        slope = self.weight * tail * (1 - tail)  # of σ
        gradient = self.linear.T @ (self.weight * residual)
        hessian = (self.linear * slope[:, None]).T @ self.linear
        if len(self.scatter):
            third = slope * np.where(z > 0, 2 * tail - 1, 1 - 2 * tail)
            fourth = slope * (1 - 6 * tail * (1 - tail))
            first = self.kernel @ slope
            gradient = gradient + first @ pulled
            cross = (self.linear.T @ (third * self.kernel).T) @ pulled
            hessian = hessian + cross + cross.T + np.einsum("e,ekl->kl", first, self.scatter)
            hessian = hessian + pulled.T @ (self.pair @ fourth) @ pulled
        loss = float(self.weight @ value + 0.5 * weight_decay * (w @ w))
        return loss, gradient + weight_decay * w, hessian + weight_decay * np.eye(len(w))


@dataclass(frozen=True, eq=False)
class _Pairs:
    """All ordered pairs of a sample's examples at each λ: z_ij = λ⟨w, x_i⟩ + (1-λ)⟨w, x_j⟩, n × n numbers.

    weight ``[n]``; linear: the x_i, ``[n, k]``; lam, mass ``[Λ]``; target ``[n]``: the loss is linear in the t_ij, and
    summed over both places in the pair, the partner and λ, what multiplies x_i is E[λ² + (1-λ)²]·t_i + 2E[λ(1-λ)]·E[t].
    """

    weight: np.ndarray
    target: np.ndarray
    linear: np.ndarray
    lam: np.ndarray
    mass: np.ndarray

    @property
    def count(self) -> int:
        """Number of pairs times values of λ."""
        return len(self.lam) * len(self.weight) ** 2

    def project(self, basis: np.ndarray) -> "_Pairs":
        """The same pairs in the coordinates of orthonormal columns ``basis [k, r]``."""
        return replace(self, linear=self.linear @ basis)

    def start(self, weight_decay: float) -> np.ndarray:
        """Newton's step from zero, which cannot overshoot: σ' is nowhere larger than its 1/4 at zero."""
        weighted, own = self.weight[:, None] * self.linear, self.mass @ (self.lam**2 + (1 - self.lam) ** 2)
        moment, mean = weighted.T @ self.linear, weighted.sum(0)
        hessian = 0.25 * (own * moment + (1 - own) * np.outer(mean, mean)) + weight_decay * np.eye(len(mean))
        return np.linalg.solve(hessian, (self.target - 0.5) @ weighted)

    def loss(self, w: np.ndarray, weight_decay: float) -> float:
        """Loss at w, weight decay included."""
        return self.derivatives(w, weight_decay)[0]

    def derivatives(self, w: np.ndarray, weight_decay: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Loss, gradient ``[k]`` and Hessian ``[k, k]`` at w, weight decay included."""
        x, p, pull = self.linear, self.weight, 2 * self.target - 1
        z, weighted = x @ w, p[:, None] * x
        loss = np.log(2) + 0.5 * (weight_decay * (w @ w) - (p * pull) @ z)
        gradient, hessian = weight_decay * w - 0.5 * pull @ weighted, weight_decay * np.eye(len(w))
        places, shares = np.tile(np.arange(len(p)), len(self.lam)), np.repeat(self.lam, len(p))
        masses, rows = np.outer(self.mass, p).ravel(), max(1, BLOCK // len(p))
        for start in range(0, len(places), rows):  # a row for each λ and i
            block = slice(start, start + rows)
            lam, mass, first = shares[block], masses[block], x[places[block]]
            rest = 1 - lam
            half = 0.5 * ((lam * z[places[block]])[:, None] + rest[:, None] * z)
            tanh = np.tanh(half)  # σ(z) = (1 + tanh)/2, and log(1 + e^z) - z/2 = log 2 + |z|/2 - log(1 + |tanh|)
            loss += mass @ ((np.abs(half) - np.log(1 + np.abs(tanh))) @ p)
            gradient += 0.5 * ((mass * lam * (tanh @ p)) @ first + ((mass * rest) @ tanh) @ weighted)
            slope = 1 - tanh * tanh  # 4σ'
            cross = (first * (mass * lam * rest)[:, None]).T @ (slope @ weighted)
            own = (first * (mass * lam**2 * (slope @ p))[:, None]).T @ first
            others = (weighted * ((mass * rest**2) @ slope)[:, None]).T @ x
            hessian += 0.25 * (cross + cross.T + own + others)
        return float(loss), gradient, hessian


def _cross_entropy(z: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss log(1 + e^z) - t z, residual σ(z) - t and tail σ(-|z|) at each logit, small ones without cancellation."""
    positive, size = z > 0, np.abs(z)
    odds = np.exp(-size)
    tail = odds / (1 + odds)
    other = np.where(positive, 1 - target, target)  # probability of the class that z speaks against
    gap = other - tail
    return np.log1p(odds) + other * size, np.where(positive, gap, -gap), tail


@dataclass(frozen=True)
class _Scalar:
    """centre + scale·V, V of a standard symmetric law: ``(V_1 + … + V_count)/√count`` of uniforms on [-1, 1], or R."""

    centre: float
    scale: float
    law: str = "uniform"
    count: int = 1

    @property
    def standard(self) -> tuple[str, int]:
        return (self.law, self.count) if self.scale else ("point", 1)

    def rule(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        points, weights = _standard_rule(*self.standard, order)
        return self.centre + self.scale * points, weights


@dataclass(frozen=True)
class _Law:
    """One class of U in reduced coordinates: independent scalars first, then one elliptical block (perhaps absent)."""

    scalars: tuple[_Scalar, ...]
    ellipse: Elliptical | None

    @property
    def dim(self) -> int:
        return len(self.scalars) + (0 if self.ellipse is None else len(self.ellipse.centre))

    def centre(self) -> np.ndarray:
        """Mean of the elliptical block, zero on the scalars, ``[k]``."""
        block = () if self.ellipse is None else self.ellipse.centre
        return np.concatenate([np.zeros(len(self.scalars)), block])

    def scatter(self) -> np.ndarray:
        """Covariance of the elliptical block, zero on the scalars, ``[k, k]``."""
        full = np.zeros((self.dim, self.dim))
        full[len(self.scalars) :, len(self.scalars) :] = self.ellipse.cov
        return full


def _laws(source: TwoFeatureTask | EllipticalTask) -> tuple[_Law, _Law]:
    """The two classes in reduced coordinates, Y = +1 first."""
    if isinstance(source, EllipticalTask):
        return (_Law((), source.law),) * 2
    low = _block(source.gamma, source.low_noise, source.num_low)
    highs = (source.law(1), source.law(-1))
    if source.num_high > 1 and len({type(high) for high in highs}) > 1:
        raise ValueError(
            f"a box in one class and an ellipse in the other share no symmetry in {source.num_high} coordinates; "
            "give num_high=1, or a sample"
        )
    return tuple(_law(low, high, source.num_high) for high in highs)


def _block(centre: float, half_width: float, count: int) -> _Scalar:
    """``count`` equal uniform coordinates along the unit vector of their block."""
    return _Scalar(centre * count**0.5, half_width, "uniform", count)


def _law(low: _Scalar, high: Box | Elliptical, num_high: int) -> _Law:
    if isinstance(high, Box):
        return _Law((low, _block((high.low + high.high) / 2, (high.high - high.low) / 2, num_high)), None)
    if num_high == 1:
        return _Law((low, _Scalar(high.centre[0], high.cov[0][0] ** 0.5, high.radial)), None)
    return _Law((low,), high)


def _frame(source: Source) -> np.ndarray:
    """Orthonormal columns ``[d, k]``: the weights that the reduction can express."""
    if not isinstance(source, TwoFeatureTask):
        return np.eye(source.dim)
    low, high = np.zeros((source.dim, 1)), np.zeros((source.dim, 1))
    low[source.low], high[source.high_coordinates] = source.num_low**-0.5, source.num_high**-0.5
    if isinstance(source.high, Elliptical):
        high = np.eye(source.dim)[:, source.high_coordinates]
    return np.concatenate([low, high], axis=1)


@dataclass(frozen=True, eq=False)
class _Space:
    """Span of the data: ``basis [k, r]`` in the reduced coordinates, ``lift [d, r]`` in all; ``null``: what is left."""

    basis: np.ndarray
    lift: np.ndarray
    null: np.ndarray


def _space(source: Source) -> _Space:
    frame, moment = _frame(source), _second_moment(source)
    values, vectors = np.linalg.eigh(moment)
    null = vectors[:, values <= 1e-13 * values[-1]]
    values, basis = np.linalg.eigh(frame.T @ moment @ frame)
    basis = basis[:, values > 1e-13 * values[-1]]
    return _Space(basis, frame @ basis, null)


def _second_moment(source: Source) -> np.ndarray:
    """E[UUᵀ] = E[XXᵀ], ``[d, d]``."""
    if isinstance(source, Sample):
        return (source.x * source.weights[:, None]).T @ source.x
    each = [source.covariance(y).numpy() + np.outer(source.mean(y), source.mean(y)) for y in (1, -1)]
    return (each[0] + each[1]) / 2


def _mean(source: Source) -> np.ndarray:
    """E[U], ``[d]``."""
    if isinstance(source, Sample):
        return source.weights @ source.turned
    return ((source.mean(1) + source.mean(-1)) / 2).numpy()


def _orders(objective: Objective) -> Iterator[int]:
    """Orders of ever finer rules: by doubling, and by half as much again where the cost grows faster."""
    order = 32 if objective.mixing is None else 20
    while True:
        yield order
        order = 2 * order if objective.mixing is None else 3 * order // 2


def _is_finite(source: Source, objective: Objective) -> bool:
    """Whether the loss is a finite sum, so that no rule needs refining."""
    return isinstance(source, Sample) and not isinstance(objective.mixing, BetaLaw)


def _nodes(source: Source, objective: Objective, order: int) -> _Nodes | _Pairs:
    """The law of logit and target as nodes, in the coordinates of ``_frame``; an anchor is turned to its own side."""
    mixing = objective.mixing if objective.mixes else None
    if isinstance(source, Sample):
        nodes = _sample_nodes(source, mixing, order)
    else:
        plus, minus = _laws(source)
        ellipses = list(dict.fromkeys(law.ellipse for law in (plus, minus) if law.ellipse is not None))
        if mixing is None:
            classes = [plus] if plus == minus else [plus, minus]
            parts = [_class_nodes(law, ellipses, order) for law in classes]
        else:
            pairs = [(plus, plus, True), (plus, minus, False)]
            if plus != minus:
                pairs += [(minus, minus, True), (minus, plus, False)]
            parts = [_pair_nodes(*pair, mixing, ellipses, order) for pair in pairs]
        nodes = _join(parts)
    return replace(nodes, target=(1 - objective.smoothing) * nodes.target + objective.smoothing / 2)


def _sample_nodes(sample: Sample, mixing: BetaLaw | DiscreteLaw | None, order: int) -> _Nodes | _Pairs:
    u, weights = sample.turned, sample.weights
    if mixing is None:
        return _Nodes(weights, np.ones(len(u)), u, *_no_ellipse(len(u), sample.dim))
    lam, mass = folded_rule(mixing, order)
    if len(lam) * len(u) ** 2 > MOST_NUMBERS:
        raise ConvergenceError(f"all pairs of {len(u)} examples at {len(lam)} values of λ are too many numbers to hold")
    own = mass @ (lam**2 + (1 - lam) ** 2)
    target = own * sample.labels + (1 - own) * (weights @ sample.labels)
    return _Pairs(weights, target, sample.x, lam, mass)


def _no_ellipse(n: int, k: int) -> tuple[np.ndarray, ...]:
    return np.zeros((0, k, k)), np.zeros((0, n)), np.zeros((0, 0, n)), np.zeros((0, n)), np.zeros((0, 0, n))


def _class_nodes(law: _Law, ellipses: list[Elliptical], order: int) -> _Nodes:
    """One class, unmixed: target 1."""
    one = np.ones(1)
    scalars = [tuple(part[None] for part in scalar.rule(order)) for scalar in law.scalars]
    moving = [] if law.ellipse is None else [(law.ellipse, one)]
    return _assemble(one, one, scalars, law.centre()[None], moving, ellipses, order)


def _pair_nodes(first: _Law, second: _Law, same: bool, mixing, ellipses: list[Elliptical], order: int) -> _Nodes:
    """Mixed pairs of an anchor and a partner, turned to the anchor's side: λU₁ ± (1-λ)U₂ with target λ or 1."""
    lam, mass = mixing.rule(order)
    sign = 1.0 if same else -1.0
    scalars = [
        _mixed_rule(one, two, mixing, sign, order) for one, two in zip(first.scalars, second.scalars, strict=True)
    ]
    centre = lam[:, None] * first.centre() + sign * (1 - lam)[:, None] * second.centre()
    moving = [] if first.ellipse is None else [(first.ellipse, lam), (second.ellipse, 1 - lam)]
    return _assemble(mass, lam + (1 - lam) * same, scalars, centre, moving, ellipses, order)


def _assemble(mass, target, scalars, centre, moving, ellipses, order) -> _Nodes:
    """Product of independent parts. mass, target ``[Λ]``; scalars: (points, weights) ``[Λ, q]``; centre ``[Λ, k]``.

    moving: the elliptical parts of the input, each with its coefficient ``[Λ]``; ellipses: the distinct ones at all.
    """
    chance, *radial = _radial_parts(moving, ellipses, len(mass), order)
    shape = (len(mass), *(points.shape[1] for points, _ in scalars), len(chance))
    if np.prod(shape) * centre.shape[1] > MOST_NUMBERS:
        raise ConvergenceError(f"the quadrature has not settled, and its next rule would have {np.prod(shape):,} nodes")
    weight = np.broadcast_to(mass.reshape(-1, *[1] * (len(shape) - 1)) * chance, shape).copy()
    linear = np.empty((*shape, centre.shape[1]))
    linear[...] = centre.reshape(len(mass), *[1] * (len(shape) - 1), -1)
    for i, (points, weights) in enumerate(scalars):
        place = [1] * len(shape)
        place[0], place[1 + i] = points.shape
        weight *= weights.reshape(place)
        linear[..., i] = points.reshape(place)

    def spread(array):  # [..., Λ, R] over the scalars
        middle = array.reshape(*array.shape[:-1], *[1] * len(scalars), array.shape[-1])
        return np.broadcast_to(middle, (*array.shape[:-2], *shape)).reshape(*array.shape[:-2], weight.size)

    target = np.broadcast_to(target.reshape(-1, *[1] * (len(shape) - 1)), shape).ravel()
    k = centre.shape[1]
    scatter = np.zeros((len(ellipses), k, k))
    for e, ellipse in enumerate(ellipses):
        scatter[e, len(scalars) :, len(scalars) :] = ellipse.cov
    return _Nodes(weight.ravel(), target, linear.reshape(-1, k), scatter, *(spread(array) for array in radial))


def _radial_parts(moving, ellipses, count, order) -> tuple[np.ndarray, ...]:
    """Nodes of the radial parts of Σ_i κ_i N_i: chance ``[R]``; radius ``[G, Λ, R]``, reach ``[G, E, Λ, R]``, kernel
    ``[E, Λ, R]``, pair ``[E, E, Λ, R]``. Normal parts add up to a normal one and share a group.
    """
    normal = [part for part in moving if part[0].radial == "gaussian"]
    groups = [[part] for part in moving if part[0].radial != "gaussian"] + ([normal] if normal else [])
    rules = [_radial_rule(group[0][0].radial, len(group[0][0].centre), order) for group in groups]
    grids = [[g.ravel() for g in np.meshgrid(*column, indexing="ij")] for column in zip(*rules, strict=True)]
    r, chances, h, hh = grids if rules else ([], [np.ones(1)], [], [])
    chance = np.prod(chances, axis=0)
    radius = np.zeros((len(groups), count, len(chance)))
    reach = np.zeros((len(groups), len(ellipses), count, len(chance)))
    kernel, pair = np.zeros(reach.shape[1:]), np.zeros((len(ellipses), *reach.shape[1:]))
    for i, group in enumerate(groups):
        radius[i] = r[i]
        for ellipse, kappa in group:
            reach[i, ellipses.index(ellipse)] += kappa[:, None] ** 2
    for i in range(len(groups)):
        kernel += reach[i] * h[i]
        for j in range(len(groups)):
            pair += reach[i][:, None] * reach[j] * (hh[i] if i == j else h[i] * h[j])
    return chance, radius, reach, kernel, pair


def _join(parts: list[_Nodes]) -> _Nodes:
    """Equally likely parts as one law; a part with fewer radial variables than another gets idle ones."""
    groups = max(len(part.radius) for part in parts)
    arrays = {}
    for name in ("weight", "target", "linear", "radius", "reach", "kernel", "pair"):
        pieces = [getattr(part, name) for part in parts]
        if name in ("radius", "reach"):
            pieces = [np.pad(p, [(0, groups - len(p))] + [(0, 0)] * (p.ndim - 1)) for p in pieces]
        arrays[name] = np.concatenate(pieces, axis=0 if name in ("weight", "target", "linear") else -1)
    arrays["weight"] /= len(parts)
    return _Nodes(scatter=parts[0].scatter, **arrays)


@lru_cache(maxsize=256)
def _radial_rule(radial: str, dim: int, order: int) -> tuple[np.ndarray, ...]:
    """Nodes r, weights, and the kernels h and h₂ of one coordinate R (unit variance) of a spherical vector in ``dim``.

    E[f(R)R] = E[f'(R)h(R)] and E[f(R)R h(R)] = E[f'(R)h₂(R)]. For the normal law both are 1, and the rule is the
    trapezoid rule, which beats Gauss–Hermite nodes when f varies on a scale below one. For the uniform law in the ball
    of radius ρ = √(dim + 2) the density is (ρ² - r²)^((dim-1)/2), h = (ρ² - r²)/(dim + 1), h₂ = h(ρ² - r²)/(dim + 3).
    """
    if radial == "gaussian":
        r = np.linspace(-14, 14, 4 * order + 1)  # beyond lies 1e-43 of the mass
        weights = np.exp(-(r**2) / 2)
        return r, weights / weights.sum(), np.ones_like(r), np.ones_like(r)
    nodes, weights = roots_jacobi(order, (dim - 1) / 2, (dim - 1) / 2)
    rest = (dim + 2) * (1 - nodes**2)
    h = rest / (dim + 1)
    return np.sqrt(dim + 2) * nodes, weights / weights.sum(), h, h * rest / (dim + 3)


@lru_cache(maxsize=256)
def _standard_rule(law: str, count: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a standard symmetric law. A sum of uniforms has a B-spline for its density."""
    if law == "point":
        return np.zeros(1), np.ones(1)
    if law != "uniform":
        return _radial_rule(law, 1, order)[:2]
    nodes, weights = roots_legendre(order)
    if count == 1:
        return nodes, weights / 2
    places = (np.arange(count)[:, None] + (nodes + 1) / 2).ravel()
    mass = BSpline.basis_element(np.arange(count + 1), extrapolate=False)(places) * np.tile(weights / 2, count)
    points, weights = _gauss((2 * places - count)[None] / count**0.5, mass[None] / mass.sum(), order)
    return points[0], weights[0]


def _mixed_rule(first: _Scalar, second: _Scalar, mixing, sign: float, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss rules of λ·first + sign·(1-λ)·second, one a node of λ: points and weights ``[Λ, q]``, q ≤ order."""
    lam, _ = mixing.rule(order)
    widest = max(first.scale, second.scale) or 1.0
    ratios = (first.scale / widest, second.scale / widest)
    points, weights = _mixed_standard(first.standard, second.standard, ratios, mixing, order)
    return (lam * first.centre + sign * (1 - lam) * second.centre)[:, None] + widest * points, weights


@lru_cache(maxsize=256)
def _mixed_standard(first, second, scales, mixing, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for two standard laws times ``scales``; both are symmetric, so the second's sign is of no matter."""
    lam, _ = mixing.rule(order)
    (a, p), (b, q) = _standard_rule(*first, order), _standard_rule(*second, order)
    points = lam[:, None, None] * scales[0] * a[:, None] + (1 - lam)[:, None, None] * scales[1] * b
    weights = np.broadcast_to(p[:, None] * q, points.shape)
    return _gauss(points.reshape(len(lam), -1), weights.reshape(len(lam), -1), order)


def _gauss(points: np.ndarray, weights: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss rules of ``order`` nodes of discrete laws ``[B, N]`` (Lanczos, reorthogonalised); itself if N ≤ order."""
    if points.shape[1] <= order:
        return points, weights
    middle = (points * weights).sum(1, keepdims=True)
    scale = np.abs(points - middle).max(1, keepdims=True)
    x = (points - middle) / scale
    basis = np.zeros((len(x), order, x.shape[1]))
    diagonal, off = np.zeros((len(x), order)), np.zeros((len(x), order))
    vector = np.sqrt(weights)
    for j in range(order):
        basis[:, j] = vector / np.linalg.norm(vector, axis=1, keepdims=True)
        vector = x * basis[:, j]
        diagonal[:, j] = (vector * basis[:, j]).sum(1)
        for _ in range(2):
            known = basis[:, : j + 1]
            vector = vector - ((known @ vector[:, :, None])[:, None, :, 0] @ known)[:, 0]
        off[:, j] = np.linalg.norm(vector, axis=1)
    matrix = np.zeros((len(x), order, order))
    index = np.arange(order)
    matrix[:, index, index] = diagonal
    matrix[:, index[1:], index[:-1]] = matrix[:, index[:-1], index[1:]] = off[:, :-1]
    nodes, vectors = np.linalg.eigh(matrix)
    return middle + scale * nodes, vectors[:, 0, :] ** 2


# --- solvers -------------------------------------------------------------------------------------------------------


def _newton(nodes: _Nodes | _Pairs, weight_decay: float, *, start: np.ndarray | None) -> np.ndarray:
    """Damped Newton steps until the step itself is negligible; a small gradient may only mean a flat loss."""
    w = nodes.start(weight_decay) if start is None else start
    here = nodes.derivatives(w, weight_decay)
    for _ in range(300):
        loss, gradient, hessian = here
        step = _step(gradient, hessian, w)
        if np.linalg.norm(step) <= 1e-14 * (1 + np.linalg.norm(w)):
            return w
        promised, norm = gradient @ step, np.linalg.norm(gradient)
        if promised < 1e-13 * abs(loss):  # below the rounding of the loss: trust the quadratic model once
            return w - step
        length = 1.0
        while True:
            here = nodes.derivatives(w - length * step, weight_decay)
            if here[0] <= loss - 1e-4 * length * promised or np.linalg.norm(here[1]) <= norm / 2:
                break
            length /= 2
            if length < 1e-12:
                raise ConvergenceError(f"no descent along the Newton step at gradient norm {norm:.1e}")
        w = w - length * step
    raise ConvergenceError(
        f"300 Newton steps left a gradient of norm {norm:.1e}: there is no minimiser nearby, or none at all (supports "
        "that touch without overlapping have none under hard labels)"
    )


def _step(gradient: np.ndarray, hessian: np.ndarray, w: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(hessian, gradient)
    except np.linalg.LinAlgError as error:
        raise ConvergenceError(f"the Hessian has become singular at |w| = {np.linalg.norm(w):.3g}") from error


def _at_infinity(source: Source, objective: Objective) -> AtInfinity | None:
    """Direction and infimum where the loss has no minimiser, else None; book prop-existence."""
    if objective.weight_decay > 0 or objective.smoothing > 0:
        return None
    if objective.asks_for_infinity:
        try:
            direction = max_margin(source)
        except ValueError:  # not separable: the minimiser is finite
            return None
        return AtInfinity(direction / np.linalg.norm(direction), 0.0)
    half = objective.mixing.mass(0.5)
    if objective.mixing.mass(0.0) + half + objective.mixing.mass(1.0) < 1 - 1e-12:
        return None
    direction, infimum = _constant_margin(source), _opposite_pairs(source) * half * np.log(2)
    return None if direction is None else AtInfinity(direction / np.linalg.norm(direction), infimum)


def _constant_margin(source: Source) -> np.ndarray | None:
    """The direction of least norm in which every signed margin is the same positive number, if there is one."""
    mean, moment = _mean(source), _second_moment(source)
    values, vectors = np.linalg.eigh(moment - np.outer(mean, mean))
    still = vectors[:, values <= 1e-13 * np.linalg.eigvalsh(moment)[-1]]
    direction = still @ (still.T @ mean)
    return direction if np.linalg.norm(direction) > 1e-6 * np.linalg.norm(mean) else None


def _opposite_pairs(source: Source) -> float:
    """P(Y₁ ≠ Y₂)."""
    share = 0.5 if not isinstance(source, Sample) else source.weights[source.labels == 1].sum()
    return 2 * share * (1 - share)


def _worst(source: Source, weights: np.ndarray) -> np.ndarray:
    """A point of U of least margin in each class, ``[2, d]``; the centre stands for a normal law."""
    if isinstance(source, Sample):
        u, margins = source.turned, source.turned @ weights
        return np.array([u[c][margins[c].argmin()] for c in (source.labels == 1, source.labels == 0)])
    if isinstance(source, EllipticalTask):
        return np.array([_worst_high(source.law, weights)] * 2)
    low = source.gamma - source.low_noise * np.sign(weights[source.low])
    return np.array(
        [np.concatenate([low, _worst_high(source.law(y), weights[source.high_coordinates])]) for y in (1, -1)]
    )


def _worst_high(law: Box | Elliptical, weights: np.ndarray) -> np.ndarray:
    if isinstance(law, Box):
        return np.where(weights > 0, law.low, law.high)
    centre, pulled = np.asarray(law.centre), np.asarray(law.cov) @ weights
    spread = np.sqrt(max(weights @ pulled, 0.0))
    if law.radial == "gaussian" or spread == 0:
        return centre
    return centre - np.sqrt(len(centre) + 2) * pulled / spread


def _bounded_directions(source: Source) -> np.ndarray:
    """Projection ``[d, d]`` onto the weights of bounded margin: those without variance under a normal law."""
    if isinstance(source, Sample):
        return np.eye(source.dim)
    whole = isinstance(source, EllipticalTask)
    laws = {source.law} if whole else {source.law(1), source.law(-1)}
    spread = sum(np.asarray(law.cov) for law in laws if isinstance(law, Elliptical) and law.radial == "gaussian")
    if np.ndim(spread) == 0:
        return np.eye(source.dim)
    values, vectors = np.linalg.eigh(spread)
    still = vectors[:, values <= 1e-13 * max(values[-1], 1e-300)]
    return still @ still.T if whole else block_diag(np.eye(source.num_low), still @ still.T)


def _least_norm(points: np.ndarray) -> np.ndarray | None:
    """The w of least norm with points·w ≥ 1, by Lawson and Hanson's least-distance program; None if there is none."""
    scale = np.abs(points).max() or 1.0
    matrix = np.concatenate([points.T / scale, np.ones((1, len(points)))])
    goal = np.append(np.zeros(points.shape[1]), 1.0)
    multipliers, _ = nnls(matrix, goal, maxiter=100 * len(points))
    residual = matrix @ multipliers - goal
    if -residual[-1] < 1e-12:
        return None
    return residual[:-1] / -residual[-1] / scale
