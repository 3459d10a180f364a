"""Exact training dynamics and exact risk of least squares on fixed features, in gradient flow and in gradient descent.

The predictor is f(x) = φ(x)ᵀθ with φ(x) in R^d. Trained is *half* the mean squared error over the training law, whose
gradient is Mθ - c with M = E φφᵀ and c = E φ y; reported risks are E (φᵀθ - y)², without the half.
"""

import numpy as np
from numpy.typing import ArrayLike

SYMMETRY = 1e-10  # relative: moments are averages of φφᵀ, symmetric up to rounding


def weights_at(
    moment: ArrayLike,
    cross: ArrayLike,
    start: ArrayLike,
    times: ArrayLike,
    *,
    learning_rate: float,
    discrete: bool = False,
) -> np.ndarray:
    """``θ_t = e^{-ηMt} θ_0 + (I - e^{-ηMt}) M⁺ c``; discrete: ``e^{-ηMt}`` becomes ``(I - ηM)^t``, t full-batch steps.

    Any rank: along eigenvectors of M below ``d · 2.2e-16`` of the largest eigenvalue nothing ever moves. ``c`` is taken
    to lie in the range of M, as every E φ y does; what it has outside (rounding) is left out.
    Args: moment: M ``[..., d, d]``, symmetric and at least 0; cross: c ``[..., d]``; start: θ_0 ``[..., d]``, leading
        axes broadcast; times: ``[T]``, at least 0, whole numbers if discrete.
    Returns: ``[..., T, d]``. Raises: ValueError if shapes or ranges do not fit, features have rank zero, or a discrete
    step is unstable, ``η μ_max >= 2``. Source: Liu et al. (2023) Lemma 5.1; book lem-gradient-flow.
    """
    moment, cross, start, times = (np.asarray(a, float) for a in (moment, cross, start, times))
    _check_times(times, learning_rate, discrete)
    values, vectors = spectrum(moment)
    if cross.shape[-1:] != moment.shape[-1:] or start.shape[-1:] != moment.shape[-1:]:
        raise ValueError(
            f"moment [..., d, d] needs cross and start [..., d], got {list(moment.shape)}, {list(cross.shape)} "
            f"and {list(start.shape)}"
        )
    if discrete and learning_rate * values.max() >= 2:
        raise ValueError(
            f"gradient descent needs learning_rate · μ_max < 2, got learning_rate {learning_rate:g} with "
            f"μ_max {values.max():g}, product {learning_rate * values.max():g}"
        )
    kept = decay(values, times, learning_rate=learning_rate, discrete=discrete)  # [..., T, d]
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)
    theta0, end = _coordinates(vectors, start), _coordinates(vectors, cross) * inverse
    in_modes = kept * theta0[..., None, :] + (1.0 - kept) * end[..., None, :]
    return in_modes @ np.swapaxes(vectors, -1, -2)


def risk(weights: ArrayLike, moment_test: ArrayLike, cross_test: ArrayLike, power: ArrayLike) -> np.ndarray:
    """``E (φᵀθ - y)² = θᵀΣθ - 2 θᵀc + E y²`` under the test law, without a factor ½.

    Args: weights: ``[..., T, d]``; moment_test: Σ = E φφᵀ ``[..., d, d]``; cross_test: E φ y ``[..., d]``; power: E y²
        ``[...]``. Returns: ``[..., T]``. Raises: ValueError if shapes do not fit. Source: book eq-risk-quadratic.
    """
    weights, moment, cross, power = (np.asarray(a, float) for a in (weights, moment_test, cross_test, power))
    d = weights.shape[-1] if weights.ndim >= 2 else None
    if d is None or moment.shape[-2:] != (d, d) or cross.shape[-1:] != (d,):
        raise ValueError(
            f"weights [..., T, d] need moment_test [..., d, d] and cross_test [..., d], got {list(weights.shape)}, "
            f"{list(moment.shape)} and {list(cross.shape)}"
        )
    return ((weights @ moment) * weights).sum(-1) - 2 * (weights @ cross[..., None])[..., 0] + power[..., None]


def spectrum(moment: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues ``[..., d]``, ascending, with those of the null space set to exactly 0, and eigenvectors in columns.

    An eigenvalue counts as 0 below ``d · 2.2e-16`` times the largest, the usual bound of what rounding leaves there.
    Raises: ValueError if the matrix is not square, finite, symmetric and at least 0, or if it is zero.
    """
    moment = np.asarray(moment, float)
    if moment.ndim < 2 or moment.shape[-1] != moment.shape[-2] or moment.shape[-1] == 0:
        raise ValueError(f"moment must be [..., d, d] with d >= 1, got {list(moment.shape)}")
    if not np.isfinite(moment).all():
        raise ValueError("moment must be finite, got nan or infinity")
    size = np.abs(moment).max((-1, -2), keepdims=True)
    skew = np.abs(moment - np.swapaxes(moment, -1, -2)).max((-1, -2), keepdims=True)
    if (skew > SYMMETRY * size).any():
        raise ValueError(f"moment must be symmetric, got entries that differ by {skew.max():g}")
    if (size == 0).any():
        raise ValueError("features of rank zero: the moment is the zero matrix, so training moves nothing")
    values, vectors = np.linalg.eigh(moment)
    top = values[..., -1:]
    if (values < -SYMMETRY * top).any():
        raise ValueError(f"moment must have no negative eigenvalue, got {values.min():g}")
    floor = moment.shape[-1] * np.finfo(float).eps * top
    return np.where(values <= floor, 0.0, values), vectors


def decay(values: ArrayLike, times: ArrayLike, *, learning_rate: float, discrete: bool = False) -> np.ndarray:
    """``s_k(t) = e^{-ημ_k t}``, or ``(1 - ημ_k)^t`` in gradient descent: what is left of the start in each mode.

    Args: values: eigenvalues ``[..., d]``; times: ``[T]``. Returns: ``[..., T, d]``. Raises: ValueError on a bad time
    or learning rate.
    """
    values, times = np.asarray(values, float), np.asarray(times, float)
    _check_times(times, learning_rate, discrete)
    rate = learning_rate * values[..., None, :]
    return (1.0 - rate) ** times[:, None] if discrete else np.exp(-rate * times[:, None])


def moments(
    features: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``M = E φφᵀ``, ``c = E φ y`` and ``E y²`` of a finite law of points.

    Args: features: ``[..., m, d]``; y: ``[..., m]``; weights: of the points, ``[m]``, at least 0 with sum 1 (None:
        1/m). Returns: ``[..., d, d]``, ``[..., d]``, ``[...]``. Raises: ValueError if shapes do not fit or weights are
        not a law.
    """
    features, y = np.asarray(features, float), np.asarray(y, float)
    if features.ndim < 2 or y.shape != features.shape[:-1] or features.shape[-2] == 0:
        raise ValueError(f"features must be [..., m, d] with y [..., m], m >= 1, got {features.shape} and {y.shape}")
    m = features.shape[-2]
    weights = np.full(m, 1.0 / m) if weights is None else np.asarray(weights, float)
    if weights.shape != (m,) or not (weights >= 0).all() or abs(weights.sum() - 1.0) > 1e-9:
        raise ValueError(f"weights must be {m} numbers at least 0 with sum 1, got {weights}")
    weighted = np.swapaxes(features * weights[:, None], -1, -2)
    return weighted @ features, (weighted @ y[..., None])[..., 0], (weights * y**2).sum(-1)


def mix_pairs(x: ArrayLike, y: ArrayLike, *, lam: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs ``λx_i + (1-λ)x_j`` and ``λy_i + (1-λ)y_j``, each point with itself included.

    Args: x: ``[..., n, p]``; y: ``[..., n]``; lam: λ, a number or ``[L]``; λ weighs the anchor i. Returns:
        ``[..., L n², p]`` and ``[..., L n²]``, λ slowest, then i, then j. Raises: ValueError if n < 2, λ leaves
        [0, 1] or shapes do not fit. Source: Zhang et al. (2018) eq. 1; book def-random-features.
    """
    x, y, lam = np.asarray(x, float), np.asarray(y, float), np.atleast_1d(np.asarray(lam, float))
    if x.ndim < 2 or y.shape != x.shape[:-1] or lam.ndim != 1:
        raise ValueError(f"x must be [..., n, p] with y [..., n] and lam [L], got {x.shape}, {y.shape} and {lam.shape}")
    if x.shape[-2] < 2:
        raise ValueError(f"mixing needs n >= 2 examples, got {x.shape[-2]}")
    if not ((lam >= 0) & (lam <= 1)).all():
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    own = lam[:, None, None]

    def mixed(a):
        pairs = own[..., None] * a[..., None, :, None, :] + (1 - own[..., None]) * a[..., None, None, :, :]
        return pairs.reshape(*a.shape[:-2], -1, a.shape[-1])

    return mixed(x), mixed(y[..., None])[..., 0]


def risk_parts(
    moment: ArrayLike,
    clean: ArrayLike,
    noise: ArrayLike,
    times: ArrayLike,
    *,
    learning_rate: float,
    start_std: float,
    moment_test: ArrayLike,
    best: ArrayLike,
    discrete: bool = False,
) -> dict[str, np.ndarray]:
    """Parts of ``E R_t - R° = Δ̄ᵀΣΔ̄ + ξ² tr(Σ E_t²)``, ``Δ̄_t = -E_t θ° + (I - E_t)(θ* - θ°) + (I - E_t) θ_noise``.

    ``E_t = e^{-ηMt}`` or ``(I - ηM)^t``; the start is N(0, ξ² I). Keys: start, unlearnt, sample, noise (the squares)
    and the cross terms "unlearnt x sample", "unlearnt x noise", "sample x noise", each with its factor 2. Their sum is
    the expected risk above R°.
    Args: moment: M ``[..., d, d]``; clean: E φ y* and noise: E φ Z over the training law ``[..., d]``; times ``[T]``;
        start_std: ξ; moment_test: Σ ``[..., d, d]``; best: θ°, any minimiser of the test risk ``[..., d]``.
    Returns: ``[..., T]`` each. Raises: ValueError as weights_at, or if start_std is negative.
    Source: book thm-exact-risk.
    """
    if not start_std >= 0:
        raise ValueError(f"start_std must be at least 0, got {start_std}")
    best, sigma = np.asarray(best, float), np.asarray(moment_test, float)
    zero = np.zeros_like(best)
    path = {"learning_rate": learning_rate, "discrete": discrete}
    unlearnt = -weights_at(moment, zero, best, times, **path)
    pieces = {
        "unlearnt": unlearnt,
        # (I - E)(θ* - θ°) = (I - E)θ* - θ° + Eθ°
        "sample": weights_at(moment, clean, zero, times, **path) - best[..., None, :] - unlearnt,
        "noise": weights_at(moment, noise, zero, times, **path),
    }
    values, vectors = spectrum(moment)
    along = ((np.swapaxes(vectors, -1, -2) @ sigma) * np.swapaxes(vectors, -1, -2)).sum(-1)  # v_kᵀ Σ v_k
    kept = decay(values, np.asarray(times, float), **path)
    parts = {"start": start_std**2 * (kept**2 * along[..., None, :]).sum(-1)}
    pushed = {name: piece @ sigma for name, piece in pieces.items()}
    parts |= {name: (pushed[name] * piece).sum(-1) for name, piece in pieces.items()}
    for one, two in (("unlearnt", "sample"), ("unlearnt", "noise"), ("sample", "noise")):
        parts[f"{one} x {two}"] = 2.0 * (pushed[one] * pieces[two]).sum(-1)
    return parts


def sgd_moments(
    features: ArrayLike,
    y: ArrayLike,
    weights: ArrayLike,
    start_std: float,
    rates: ArrayLike,
    *,
    batch: int,
    records: ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and covariance of SGD's weights: the mean is gradient descent, each batch adds ``η² Cov(g)/B``.

    A step draws B points independently from the training law and goes down their mean gradient, so
    ``θ̄' = θ̄ - η(Mθ̄ - c)`` and ``C' = (I - ηM) C (I - ηM) + (η²/B)(E φφᵀ E(φᵀθ - y)² - ḡḡᵀ - M C M)``.
    Args: features: ``[..., m, d]``; y: ``[..., m]``; weights: of the points ``[m]``; start_std: θ_0 ~ N(0, ξ² I);
        rates: η of each step ``[..., K]``; batch: B; records: ascending step counts ``[T]``, 0 to K.
    Returns: mean ``[..., T, d]`` and covariance ``[..., T, d, d]``. Raises: ValueError if ranges or shapes do not fit,
    or if a covariance grows beyond float64. Source: book prop-sgd-noise.
    """
    moment, cross, _ = moments(features, y, weights)
    features, y, weights, rates = (np.asarray(a, float) for a in (features, y, weights, rates))
    records = np.asarray(records)
    if batch < 1 or not (rates > 0).all() or not start_std >= 0:
        raise ValueError(f"need batch >= 1, rates > 0 and start_std >= 0, got {batch}, {rates.min():g}, {start_std}")
    if (np.diff(records) <= 0).any() or records[0] < 0 or records[-1] > rates.shape[-1]:
        raise ValueError(f"records must ascend within 0 to {rates.shape[-1]}, got {records}")
    mean = np.zeros_like(cross)
    cov = np.broadcast_to(start_std**2 * np.eye(cross.shape[-1]), moment.shape)
    kept = []
    for step in range(records[-1] + 1):
        if step in records:
            kept.append((mean, cov))
        if step == records[-1]:
            break
        rate = rates[..., step, None]
        gradient = (moment @ mean[..., None])[..., 0] - cross
        residual = (features @ mean[..., None])[..., 0] - y
        square = weights * (residual**2 + ((features @ cov) * features).sum(-1))  # E(φᵀθ - y)², each point's share
        spread = np.swapaxes(features * square[..., None], -1, -2) @ features
        spread = spread - gradient[..., None] * gradient[..., None, :] - moment @ cov @ moment
        shrink = np.eye(cross.shape[-1]) - rate[..., None] * moment
        mean, cov = mean - rate * gradient, shrink @ cov @ shrink + rate[..., None] ** 2 / batch * spread
        if not np.isfinite(cov).all():
            raise ValueError(f"the covariance of SGD diverges: at step {step + 1} it is beyond float64")
    return np.stack([one for one, _ in kept], -2), np.stack([one for _, one in kept], -3)


def risk_bound(
    values: ArrayLike,
    clean: ArrayLike,
    times: ArrayLike,
    *,
    learning_rate: float,
    start_std: float,
    feature_bound: float,
    noise_bound: float,
    clean_risk: ArrayLike,
    budget: bool = False,
) -> np.ndarray:
    """Upper bound of E R_t: ``R* + C_1 Σ_k [A_k s_k² + B_k (1 - s_k)²] + 2 √(C_1 R* ζ)``.

    ``A_k = ξ² + θ*_k²``, ``B_k = C_2/μ_k`` (0 where μ_k = 0), ``s_k = e^{-ημ_k t}``, ``ζ = Σ_k max(A_k, B_k)``. With
    budget the modes share one noise: ``max_k B_k (1 - s_k)²`` for the sum, ζ at most ``Σ_k A_k + max_k B_k``.
    Args: values: eigenvalues μ_k of M ``[..., d]``, zeros for the null space; clean: coordinates θ*_k along the same
        eigenvectors ``[..., d]``; times ``[T]``; start_std: ξ; feature_bound: C_1, at least 2 sup ‖φ‖²; noise_bound:
        C_2, at least sup Z²; clean_risk: R*, the risk of θ* ``[...]``. Returns: ``[..., T]``.
    Raises: ValueError if no value is positive or a bound is negative. Source: Liu et al. (2023) Theorem 5.2; book
    thm-risk-bound, prop-noise-budget.
    """
    values, clean = np.asarray(values, float), np.asarray(clean, float)
    first, second, clean_risk = (np.asarray(a, float) for a in (feature_bound, noise_bound, clean_risk))
    if not (values > 0).any(-1).all():
        raise ValueError("features of rank zero: no eigenvalue is positive, so training moves nothing")
    if (first < 0).any() or (second < 0).any() or (clean_risk < 0).any():
        raise ValueError(f"bounds must be at least 0, got C1 {first}, C2 {second}, R* {clean_risk}")
    signal = start_std**2 + clean**2
    noise = np.divide(second[..., None], values, out=np.zeros_like(values), where=values > 0)
    kept = decay(values, times, learning_rate=learning_rate)
    growing = noise[..., None, :] * (1.0 - kept) ** 2
    falling = (signal[..., None, :] * kept**2).sum(-1)
    if budget:
        distance = falling + growing.max(-1)
        zeta = np.minimum(signal.sum(-1) + noise.max(-1), np.maximum(signal, noise).sum(-1))
    else:
        distance, zeta = falling + growing.sum(-1), np.maximum(signal, noise).sum(-1)
    return (clean_risk + 2.0 * np.sqrt(first * clean_risk * zeta))[..., None] + first[..., None] * distance


def turning_times(values: ArrayLike, signal: ArrayLike, noise_bound: ArrayLike, *, learning_rate: float) -> np.ndarray:
    """``t*_k = ln(1 + μ_k A_k / C_2)/(η μ_k)``, where mode k of the bound is least; A_k = ξ² + θ*_k², C_2 > 0.

    Args: values: positive eigenvalues ``[...]``; signal: A_k, at least 0; noise_bound: C_2 > 0; ``[...]`` each.
    Returns: ``[...]``. Raises: ValueError if a range is left. Source: book cor-turning-time.
    """
    values, signal, noise_bound = (np.asarray(a, float) for a in (values, signal, noise_bound))
    if not ((values > 0).all() and (signal >= 0).all() and (noise_bound > 0).all() and learning_rate > 0):
        raise ValueError(
            f"turning times need μ > 0, A >= 0, C_2 > 0 and η > 0, got μ {values}, A {signal}, C_2 {noise_bound} "
            f"and η {learning_rate}"
        )
    return np.log1p(values * signal / noise_bound) / (learning_rate * values)


def mode_minimum(clean: ArrayLike, noise: ArrayLike, start_std: float) -> np.ndarray:
    """The s in (0, 1) at which ``ξ²s² + ((1 - s)ν - sθ*)²`` is least, ``ν(ν + θ*)/(ξ² + (ν + θ*)²)``; nan if none is.

    There is one exactly if ``ν(ν + θ*) > 0`` and ``ξ² + θ*(ν + θ*) > 0``.
    Args: clean: θ*_k and noise: ν_k ``[...]``; start_std: ξ. Returns: ``[...]``. Source: book prop-mode-minimum.
    """
    clean, noise = np.asarray(clean, float), np.asarray(noise, float)
    both = clean + noise
    inside = (noise * both > 0) & (start_std**2 + clean * both > 0)
    return np.divide(noise * both, start_std**2 + both**2, out=np.full(both.shape, np.nan), where=inside)


def _coordinates(vectors: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Coordinates Vᵀx ``[..., d]`` along the columns of V."""
    return (np.swapaxes(vectors, -1, -2) @ x[..., None])[..., 0]


def _check_times(times: np.ndarray, learning_rate: float, discrete: bool) -> None:
    if not np.isfinite(learning_rate) or learning_rate <= 0:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if times.ndim != 1 or not np.isfinite(times).all() or (times < 0).any():
        raise ValueError(f"times must be [T], finite and at least 0, got {times}")
    if discrete and (times != np.floor(times)).any():
        raise ValueError(f"times are step counts in gradient descent, got {times}")
