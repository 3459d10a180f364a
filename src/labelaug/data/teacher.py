"""The teacher-student toy of paper 2: frozen description, draws, and the moments that decide its dynamics.

The teacher is ``f(x) = Σ_k a_k tanh<v_k, x>``, the student ``Σ_j θ_j tanh<w_j, x>`` with fixed ``w_j``; x ~ N(0, I), no
biases. f and the features are odd, so that E f(X) = 0 and Var(Y) = E f(X)². Arrays are float64, seeds on axis 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

# Each seed has one stream for each purpose, so that another n or another control leaves the rest alone.
TEACHER, STUDENT, START, INPUTS, FRESH, SHUFFLE, STRANGER = range(7)
INPUT_KINDS = ("originals", "pairs", "fresh pairs", "fresh")
LABEL_KINDS = ("mixup", "true", "shuffled")
LENDERS = ("nobody", "teacher", "stranger")
STEP, REACH, TERMS = 0.02, 12.0, 240  # grid of the Hermite coefficients, and how many odd ones there are
LARGEST_NORM = 20.0


@dataclass(frozen=True)
class TeacherTask:
    """Laws of teacher and student; all weights are independent and normal.

    Args: num_inputs: dimension of x; width: hidden units of the teacher; teacher_std: standard deviation of its hidden
        weights (its outer weights are N(0, 1)); num_features: d, hidden units of the student; first_std: s₁, standard
        deviation of the student's hidden weights; borrowed_from: whose hidden units the student's first ones are:
        "teacher" (so that the student can represent it), "stranger" (another teacher of the same law: the student's
        features have the same law as with "teacher", and it cannot), "nobody" (they are like its other ones).
    Raises: ValueError with the offending value. Source: paper 2, 6.1 and appendix C; book def-toy.
    """

    num_inputs: int = 10
    width: int = 5
    teacher_std: float = 1.0
    num_features: int = 100
    first_std: float = 0.5
    borrowed_from: str = "nobody"

    def __post_init__(self):
        for name in ("num_inputs", "width", "num_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("teacher_std", "first_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.borrowed_from not in LENDERS:
            raise ValueError(f"borrowed_from must be one of {LENDERS}, got {self.borrowed_from!r}")
        if self.borrowed_from != "nobody" and self.width > self.num_features:
            raise ValueError(f"a student of {self.num_features} features cannot borrow {self.width} of them")


@dataclass(frozen=True)
class TeacherDraws:
    """One toy a seed.

    Args: hidden: v, ``[S, width, p]``; outer: a, ``[S, width]``; first: w, ``[S, d, p]``; start: direction of the
        student's start, N(0, I) ``[S, d]``, to be multiplied by s₂; x ``[S, n, p]``; y = f(x) ``[S, n]``.
    """

    seeds: tuple[int, ...]
    hidden: np.ndarray
    outer: np.ndarray
    first: np.ndarray
    start: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @property
    def n(self) -> int:
        """Number of training examples."""
        return self.x.shape[1]

    def features(self, x: np.ndarray) -> np.ndarray:
        """φ(x) = tanh<w_j, x>: ``[S, m, p]`` -> ``[S, m, d]``."""
        return np.tanh(x @ self.first.swapaxes(-1, -2))

    def labels(self, x: np.ndarray) -> np.ndarray:
        """The teacher's f(x): ``[S, m, p]`` -> ``[S, m]``."""
        return teacher_labels(self.hidden, self.outer, x)


@dataclass(frozen=True)
class Moments:
    """``moment = E φφᵀ [S, d, d]``, ``cross = E φy [S, d]``, ``power = E y² [S]`` of a law of (x, y)."""

    moment: np.ndarray
    cross: np.ndarray
    power: np.ndarray


def teacher_labels(hidden: np.ndarray, outer: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``Σ_k a_k tanh<v_k, x>`` ``[..., m]`` of hidden ``[..., k, p]``, outer ``[..., k]``, x ``[..., m, p]``."""
    return (np.tanh(x @ hidden.swapaxes(-1, -2)) @ outer[..., None])[..., 0]


def stream(seed: int, purpose: int) -> np.random.Generator:
    """The generator of one seed for one purpose."""
    return np.random.default_rng([seed, purpose])


def draw_teachers(task: TeacherTask, n: int, *, seeds: Sequence[int]) -> TeacherDraws:
    """Teacher, student, start and n examples for each seed; the first n examples do not depend on how many follow.

    Raises: ValueError for n < 2 (nothing to mix), no seed or a seed that stands twice.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct, at least one, got {list(seeds)}")
    drawn = [_draw(task, n, int(seed)) for seed in seeds]
    hidden, outer, first, start, x = (np.stack(parts) for parts in zip(*drawn, strict=True))
    return TeacherDraws(tuple(seeds), hidden, outer, first, start, x, teacher_labels(hidden, outer, x))


def _draw(task: TeacherTask, n: int, seed: int) -> tuple[np.ndarray, ...]:
    rng = stream(seed, TEACHER)
    hidden = task.teacher_std * rng.standard_normal((task.width, task.num_inputs))
    outer = rng.standard_normal(task.width)
    first = task.first_std * stream(seed, STUDENT).standard_normal((task.num_features, task.num_inputs))
    if task.borrowed_from == "teacher":
        first[: task.width] = hidden
    elif task.borrowed_from == "stranger":
        first[: task.width] = task.teacher_std * stream(seed, STRANGER).standard_normal(hidden.shape)
    start = stream(seed, START).standard_normal(task.num_features)
    return hidden, outer, first, start, stream(seed, INPUTS).standard_normal((n, task.num_inputs))


# ---------------------------------------------------------------------------------------------------------------------
# Moments of a sample: the training laws


def labelled_moments(draws: TeacherDraws, law, *, inputs: str, labels: str) -> Moments:
    """Moments of a training law: which inputs, and whose labels at them.

    Args: law: (values ``[L]``, weights ``[L]``) of λ, as ``theory.population`` laws give by ``rule``; inputs:
        "originals" (the n examples: ERM), "pairs" (all n² mixed pairs, self-pairs included), "fresh pairs" (a new pair
        of points for each unordered pair, used in both orders, n of them self-pairs: at each λ as many different inputs
        as "pairs" has, each with the law of a mixed one), "fresh" (those, scaled to the test law N(0, I));
        labels: "mixup" (λ y + (1 - λ) y'), "true" (f at the input), "shuffled" (f plus Mixup's noise less its mean,
        permuted over the pairs of different examples; self-pairs have none).
    Raises: ValueError for an unknown kind, labels "mixup" or "shuffled" where no pair is mixed, or a bad law.
    """
    values, weights = check_law(law)
    if inputs not in INPUT_KINDS or labels not in LABEL_KINDS:
        raise ValueError(f"inputs must be one of {INPUT_KINDS} and labels of {LABEL_KINDS}, got {inputs!r}, {labels!r}")
    if inputs in ("originals", "fresh") and labels != "true":
        raise ValueError(f"inputs {inputs!r} are not mixed and have labels 'true' only, got {labels!r}")
    if inputs == "originals":
        return sample_moments(draws.features(draws.x), draws.y)
    first, second = pairs(draws) if inputs == "pairs" else _fresh_pairs(draws)
    own = np.arange(draws.n) * (draws.n + 1)  # rows of the self-pairs
    ends = None if labels == "true" else (draws.labels(first), draws.labels(second))
    total = None
    for lam, weight in zip(values, weights, strict=True):
        x = lam * first + (1 - lam) * second
        if inputs == "fresh":
            scale = np.full(draws.n**2, np.hypot(lam, 1 - lam))
            scale[own] = 1.0
            x = x / scale[:, None]
        y = draws.labels(x) if labels != "mixup" else lam * ends[0] + (1 - lam) * ends[1]
        if labels == "shuffled":
            y = y + _shuffled(lam * ends[0] + (1 - lam) * ends[1] - y, draws)
        part = sample_moments(draws.features(x), y)
        terms = [weight * array for array in (part.moment, part.cross, part.power)]
        total = terms if total is None else [a + b for a, b in zip(total, terms, strict=True)]
    return Moments(*total)


def sample_moments(features: np.ndarray, labels: np.ndarray) -> Moments:
    """Means over the examples: features ``[S, m, d]``, labels ``[S, m]``."""
    m = features.shape[-2]
    turned = features.swapaxes(-1, -2)
    return Moments(turned @ features / m, (turned @ labels[..., None])[..., 0] / m, np.square(labels).mean(-1))


def pairs(draws: TeacherDraws) -> tuple[np.ndarray, np.ndarray]:
    """Anchor and partner of all n² ordered pairs, two ``[S, n², p]``; row i·n + j has anchor i and partner j."""
    return np.repeat(draws.x, draws.n, axis=1), np.tile(draws.x, (1, draws.n, 1))


def check_law(law) -> tuple[np.ndarray, np.ndarray]:
    """The law of λ as two arrays. Raises: ValueError unless values lie in [0, 1] and weights are a probability."""
    values, weights = (np.atleast_1d(np.asarray(part, dtype=float)) for part in law)
    if values.shape != weights.shape or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"λ must lie in [0, 1], with one weight each, got {values.tolist()} and {weights.tolist()}")
    if not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-9:
        raise ValueError(f"the weights of λ must be a probability, got {weights.tolist()}")
    return values, weights


def _fresh_pairs(draws: TeacherDraws) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`pairs`, but no two unordered pairs share a point."""
    n, p = draws.n, draws.x.shape[2]
    new = np.stack([stream(seed, FRESH).standard_normal((2, n, n, p)) for seed in draws.seeds])
    upper = np.triu(np.ones((n, n), dtype=bool), 1)[..., None]
    first, second = new[:, 0], new[:, 1]
    anchors = np.where(upper, first, second.swapaxes(1, 2))
    partners = np.where(upper, second, first.swapaxes(1, 2))
    i = np.arange(n)
    partners[:, i, i] = anchors[:, i, i]
    return anchors.reshape(-1, n * n, p), partners.reshape(-1, n * n, p)


def _shuffled(noise: np.ndarray, draws: TeacherDraws) -> np.ndarray:
    """Noise of all pairs ``[S, n²]`` permuted among the pairs i < j; (j, i) goes with its (i, j), self-pairs have none.

    First the mean is taken away, of the pairs i < j and of the pairs i > j, so that over permutations the noise at each
    input has mean zero (book prop-label-noise).
    """
    n = draws.n
    i, j = np.triu_indices(n, 1)
    moved = np.zeros_like(noise)
    for s, seed in enumerate(draws.seeds):
        order = stream(seed, SHUFFLE).permutation(len(i))
        for rows in (i * n + j, j * n + i):
            moved[s, rows] = noise[s, rows[order]] - noise[s, rows].mean()
    return moved


# ---------------------------------------------------------------------------------------------------------------------
# Moments of the population: the test law, and inputs of another variance


def population_moments(draws: TeacherDraws, *, variance: float = 1.0, tolerance: float = 1e-8) -> Moments:
    """E φφᵀ, E φf, E f² for x ~ N(0, variance·I), each entry of E φφᵀ to ``tolerance``; variance 1 is the test law.

    Source: book eq-toy-moments. Raises: ValueError as :func:`tanh_overlaps`, or unless variance > 0.
    """
    if not variance > 0:
        raise ValueError(f"variance must be positive, got {variance}")
    units = np.sqrt(variance) * np.concatenate([draws.first, draws.hidden], axis=1)
    gram, d = tanh_overlaps(units, tolerance=tolerance), draws.first.shape[1]
    outer = draws.outer[..., None]
    power = (outer.swapaxes(-1, -2) @ gram[:, d:, d:] @ outer)[:, 0, 0]
    return Moments(gram[:, :d, :d], (gram[:, :d, d:] @ outer)[..., 0], power)


def tanh_overlaps(units: np.ndarray, *, tolerance: float) -> np.ndarray:
    """``E tanh<u_i, g> tanh<u_j, g>``, g ~ N(0, I): units ``[S, k, p]`` -> ``[S, k, k]``.

    With ρ the cosine of u_i and u_j this is ``Σ_m c_m(‖u_i‖) c_m(‖u_j‖) ρ^m`` over odd m, c_m the coefficients of
    tanh(‖u‖·) in normalised Hermite polynomials (Mehler). What m > M leaves is at most |ρ|^(M+2) √(T_i T_j), with
    T = E tanh² - Σ_{m ≤ M} c_m²; the sum ends when that is below ``tolerance`` for every pair. Parallel units are done
    by one integral.
    Raises: ValueError for a norm above 20, or where 240 terms do not reach the tolerance (units nearly parallel).
    """
    norms = np.linalg.norm(units, axis=-1)
    if not norms.max() <= LARGEST_NORM:
        raise ValueError(f"norms of hidden weights must be at most {LARGEST_NORM:g}, got {norms.max():.3g}")
    grid, basis, weight = _hermite_rule()
    values = np.tanh(norms[..., None] * grid)
    coefficients = values @ basis
    square = (values**2) @ weight
    directions = units / np.maximum(norms, 1e-300)[..., None]
    rho = np.clip(directions @ directions.swapaxes(-1, -2), -1, 1)
    parallel = np.abs(rho) > 1 - 1e-10
    power, factor = np.where(parallel, 0.0, rho), np.where(parallel, 0.0, rho**2)
    total, term = np.zeros_like(rho), np.empty_like(rho)
    left = square.copy()
    for m in range(TERMS):
        c = coefficients[..., m]
        np.multiply(c[..., :, None], c[..., None, :], out=term)
        term *= power
        total += term
        power *= factor
        left = np.maximum(left - c**2, 0.0)
        if m % 8 == 7 and np.abs(power).max() * left.max() < tolerance:
            break
    else:
        worst = (np.abs(power) * np.sqrt(left[..., :, None] * left[..., None, :])).max()
        if worst > tolerance:
            raise ValueError(
                f"hidden units are too nearly parallel: the series is off by {worst:.1g} > {tolerance:.1g}"
            )
    s, i, j = np.nonzero(parallel)
    total[s, i, j] = np.sign(rho[s, i, j]) * ((values[s, i] * values[s, j]) @ weight)
    return total


@cache
def _hermite_rule() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grid g > 0, odd normalised Hermite polynomials times the weight ``[G, TERMS]``, and the weight of 2∫φ(g)dg.

    The trapezoidal rule: its error for tanh(a·) decays as exp(-π²/(a·STEP)), below 1e-10 for a ≤ 20.
    """
    grid = np.arange(STEP, REACH + STEP / 2, STEP)
    half = np.exp(-(grid**2) / 4)
    weight = 2 * STEP / np.sqrt(2 * np.pi)
    before, now, odd = np.zeros_like(grid), half.copy(), []
    for m in range(2 * TERMS):
        before, now = now, (grid * now - np.sqrt(m) * before) / np.sqrt(m + 1)
        if m % 2 == 0:
            odd.append(now * half * weight)
    return grid, np.stack(odd, axis=1), weight * half**2
