"""Lower bounds of the cross-entropy through the variance of a model's outputs; they hold for any model and any law.

All are inequalities between expectations under one law, here that of a finite sample with every point (or pair) counted
equally or by given weights. Variances are therefore divided by n, not n - 1, and the inequalities hold up to rounding.
Probabilities come in as their logarithms, so that neither the loss nor a class mean is lost to underflow.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import digamma, entr, expit, logsumexp, polygamma, rel_entr

from labelaug.mixing import check_alpha
from labelaug.targets import check_smoothing


@dataclass(frozen=True)
class VarianceBound:
    """A cross-entropy and the parts of its two lower bounds, in nats; A is the group that decides the target p^A.

    Args: loss: E[-Σ_k p_k log g_k]; floor: E H(p), the least loss of any model; mean_divergence: E KL(p ‖ E[g | A]);
        mean_distance: E ‖p - E[g | A]‖²; variance: E tr Cov(g | A); weighted_variance: E Σ_k p_k Var(g_k | A).
    """

    loss: float
    floor: float
    mean_divergence: float
    mean_distance: float
    variance: float
    weighted_variance: float

    @property
    def taylor(self) -> float:
        """``E H(p) + E KL(p ‖ E[g | A]) + ½ E Σ_k p_k Var(g_k | A)``, at most the loss. Book lem-target-variance."""
        return self.floor + self.mean_divergence + 0.5 * self.weighted_variance

    @property
    def pinsker(self) -> float:
        """``E H(p) + E ‖p - E[g | A]‖² + E tr Cov(g | A)``, at most the loss. Book lem-target-variance."""
        return self.floor + self.mean_distance + self.variance

    @property
    def excess(self) -> float:
        """Loss above the floor, E KL(p ‖ g)."""
        return self.loss - self.floor

    @property
    def slack(self) -> float:
        """Loss less the larger of the two bounds; at least 0 up to rounding."""
        return self.loss - max(self.taylor, self.pinsker)

    def metrics(self) -> dict[str, float]:
        """What a record holds: loss, excess, slack, variance, and both bounds above the floor."""
        above = {name: getattr(self, name) - self.floor for name in ("taylor", "pinsker")}
        return {name: getattr(self, name) for name in ("loss", "excess", "slack", "variance")} | above


def target_bound(
    log_g: ArrayLike, targets: ArrayLike, group: ArrayLike, *, weights: ArrayLike | None = None
) -> VarianceBound:
    """Both bounds for targets that depend on a group only: all points of group a have the target ``targets[a]``.

    Args: log_g: log-probabilities ``[n, K]``; targets: ``[A, K]``, rows in the simplex; group: integers ``[n]`` in
        0..A-1; weights: of the points, ``[n]``, at least 0 with sum 1 (None: 1/n each).
    Raises: ValueError if shapes do not fit, a row of log_g is not one of log-probabilities, a target leaves the simplex
        or weights are not a law. Source: book lem-target-variance.
    """
    log_g, targets, group = np.asarray(log_g, float), np.asarray(targets, float), np.asarray(group)
    if log_g.ndim != 2 or targets.ndim != 2 or targets.shape[1] != log_g.shape[1] or group.shape != log_g.shape[:1]:
        raise ValueError(
            f"log_g must be [n, K] with targets [A, K] and group [n], got {list(log_g.shape)}, "
            f"{list(targets.shape)} and {list(group.shape)}"
        )
    _check_log_probabilities(log_g)
    _check_targets(targets)
    _check_codes("group", group, len(targets))
    weights = _law("weights", weights, len(log_g))
    share = np.bincount(group, weights=weights, minlength=len(targets))
    within = weights / np.where(share[group] > 0, share[group], 1.0)  # the law within each group

    g = np.exp(log_g)
    mean = np.stack([np.bincount(group, weights=within * column, minlength=len(targets)) for column in g.T], axis=1)
    square = (g - mean[group]) ** 2
    filled = share > 0
    share, mean_filled, p = share[filled], mean[filled], targets[filled]
    return VarianceBound(
        loss=float(-weights @ _times_log(targets[group], log_g)),
        floor=float(share @ entropy(p)),
        mean_divergence=float(share @ _divergence(p, mean_filled, log_g, group, within, filled)),
        mean_distance=float(share @ ((p - mean_filled) ** 2).sum(1)),
        variance=float(weights @ square.sum(1)),
        weighted_variance=float(weights @ (targets[group] * square).sum(1)),
    )


def smoothing_bound(log_g: ArrayLike, labels: ArrayLike, *, smoothing: float) -> VarianceBound:
    """Both bounds of the label-smoothed cross-entropy; the group is the label, ``p^y = (1 - ε) e_y + ε/K``.

    Args: log_g: ``[n, K]``; labels: integers ``[n]`` in 0..K-1; smoothing: ε in [0, K/(K-1)), 0 being plain
        cross-entropy.
    Raises: ValueError as :func:`target_bound`, and for ε out of range (a negative one takes p out of the simplex).
    Source: paper 1 (2.3), its third version bounds the loss likewise; book prop-smoothing-variance.
    """
    log_g = np.asarray(log_g, float)
    if log_g.ndim != 2:
        raise ValueError(f"log_g must be [n, K], got {list(log_g.shape)}")
    return target_bound(log_g, _smoothed(log_g.shape[1], smoothing), labels)


def mixup_bound(
    log_g: ArrayLike, labels: ArrayLike, *, lams: ArrayLike, weights: ArrayLike | None = None
) -> VarianceBound:
    """Both bounds of the Mixup cross-entropy over all n² pairs and a finite law of λ; the group is (λ, Y₁, Y₂).

    A law of λ on [½, 1] stands for its mirror image too: the pair (j, i) at λ is the pair (i, j) at 1 - λ.

    Args: log_g: ``[L, n, n, K]``, at ``[l, i, j]`` the log-probabilities of λ_l x_i + (1 - λ_l) x_j; labels: ``[n]``;
        lams: the values of λ, ``[L]`` in [0, 1]; weights: their probabilities (None: 1/L each).
    Raises: ValueError as :func:`target_bound`, and for a λ outside [0, 1].
    Source: paper 1 (2.5) to (2.7); book prop-mixup-variance.
    """
    log_g, labels, lams = np.asarray(log_g, float), np.asarray(labels), _check_lams(lams)
    n = len(labels)
    if log_g.ndim != 4 or log_g.shape[:3] != (len(lams), n, n):
        raise ValueError(f"log_g must be [{len(lams)}, {n}, {n}, K], got {list(log_g.shape)}")
    num_classes = log_g.shape[3]
    _check_codes("labels", labels, num_classes)
    law = _law("weights", weights, len(lams))
    one = np.eye(num_classes)
    lam = lams[:, None, None, None]
    targets = (lam * one[None, :, None] + (1 - lam) * one[None, None, :]).reshape(-1, num_classes)
    pair = labels[:, None] * num_classes + labels[None, :]
    group = np.arange(len(lams))[:, None, None] * num_classes**2 + pair
    points = np.broadcast_to((law / n**2)[:, None, None], group.shape)
    return target_bound(log_g.reshape(-1, num_classes), targets, group.ravel(), weights=points.ravel())


def entropy(p: ArrayLike) -> np.ndarray:
    """``H(p) = -Σ_k p_k log p_k`` in nats, 0 log 0 = 0: ``[..., K]`` -> ``[...]``."""
    return entr(np.asarray(p, float)).sum(-1)


def smoothing_floor(num_classes: int, *, smoothing: float) -> float:
    """The least label-smoothed loss, ``H((1 - ε) e_1 + ε/K)``; 0 at ε = 0. Raises: ValueError for ε out of range."""
    return float(entropy(_smoothed(num_classes, smoothing)[0]))


def mixup_floor(
    frequencies: ArrayLike,
    *,
    lams: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    alpha: float | None = None,
) -> float:
    """``E[H_b(λ)]·(1 - Σ_k p_k²)``, the floor for independent labels; H_b is the binary entropy.

    It bounds the Mixup loss from below; no model need attain it, for one mixed input can have several targets.
    The law of λ is either finite (``lams``) or Beta(α, α) (``alpha``).

    Args: frequencies: p_k = P(Y = k), ``[K]``; lams: values of λ, ``[L]``; weights: their probabilities (None: 1/L
        each); alpha: α.
    Raises: ValueError if one of them is not a law, a λ leaves [0, 1], α is not positive, or not one law of λ is given.
    Source: paper 2, Lemma 3.1 (balanced classes, uniform λ); book lem-mixup-floor.
    """
    frequencies = _law("frequencies", frequencies, np.size(frequencies))
    return _mean_entropy(lams, weights, alpha) * float(1 - frequencies @ frequencies)


def permutation_floor(
    counts: ArrayLike,
    *,
    batch_size: int,
    lams: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    alpha: float | None = None,
) -> float:
    """``(n - m)/(n - 1)`` times :func:`mixup_floor`: the floor where partners are permuted in minibatches.

    n = Σ n_k examples in random order make m = ⌈n/B⌉ batches (a smaller last one is kept); the mean is over examples.

    Args: counts: examples of each class n_k, integers ``[K]``; batch_size: B; the law of λ as in :func:`mixup_floor`.
    Raises: ValueError as :func:`mixup_floor`; unless the counts are integers, none negative, with sum 2 or more; if
        batch_size < 1. Source: book prop-permutation-floor.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 0).any() or counts.sum() < 2:
        raise ValueError(f"counts must be [K] integers, none negative, with sum 2 or more, got {counts}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    n = int(counts.sum())
    batches = -(-n // batch_size)
    return (n - batches) / (n - 1) * mixup_floor(counts / n, lams=lams, weights=weights, alpha=alpha)


def mixing_entropy(alpha: float) -> tuple[float, float]:
    """Mean ``ψ(2α + 1) - ψ(α + 1)`` and variance of the binary entropy of λ ~ Beta(α, α), in nats and nats².

    The variance, close to 1/(8α²) for large α, would be lost there as a difference E H² - (E H)²; from α = 16 on it is
    summed from positive terms. Relative errors are below 1e-12 for α ≥ 0.01; below, both grow as 1e-16/α.

    Raises: ValueError unless α > 0. Source: book prop-mixing-entropy.
    """
    check_alpha(alpha)
    mean = digamma(2 * alpha + 1) - digamma(alpha + 1)
    if alpha >= 16:
        return float(mean), _entropy_variance(alpha)
    # E[λ^a (1-λ)^b], differentiated twice in a, or in a and b, at (a, b) = (2, 0) and (1, 1).
    first = digamma(alpha + 2) - digamma(2 * alpha + 2)
    both = digamma(alpha + 1) - digamma(2 * alpha + 2)
    square = (alpha + 1) * (first**2 + polygamma(1, alpha + 2) - polygamma(1, 2 * alpha + 2))
    cross = alpha * (both**2 - polygamma(1, 2 * alpha + 2))
    return float(mean), float((square + cross) / (2 * alpha + 1) - mean**2)


def _entropy_variance(alpha: float) -> float:
    """``Σ_jk c_j c_k (m_{j+k} - m_j m_k)``, c_k = 1/(2k(2k - 1)), m_k = E(2λ - 1)^{2k}: 64 terms a side, for α ≥ 16.

    All terms are positive, and ``m_{j+k}/(m_j m_k) - 1`` comes from logarithms, so that nothing cancels.
    """
    k, half = np.arange(1, 65)[:, None], np.arange(64) + 0.5
    term = np.exp(-np.log1p(alpha / half).cumsum()) / (2 * k * (2 * k - 1))[:, 0]  # c_k m_k
    ratio = np.log1p(k / (half * (1 + (half + k) / alpha))).cumsum(axis=1)  # of m_{j+k} to m_j m_k at [j, k]
    return float(term @ np.expm1(ratio) @ term)


def mixup_infimum(x: ArrayLike, labels: ArrayLike, *, lams: ArrayLike, weights: ArrayLike | None = None) -> float:
    """``E H(E[p | Z])``, the infimum of the Mixup loss over all models: all n² pairs and a finite law of λ.

    A model sees the mixed input Z alone, so that its best output is the mean target there. Mixed inputs that differ by
    less than 1e-9 of the largest entry of x count as equal.

    Args: x: ``[n, d]``; labels: integers ``[n]`` from 0; lams: values of λ, ``[L]``; weights: their probabilities
        (None: 1/L each).
    Raises: ValueError if shapes do not fit, weights are not a law or a λ leaves [0, 1].
    Source: book prop-mixup-infimum.
    """
    x, labels, lams = np.asarray(x, float), np.asarray(labels), _check_lams(lams)
    if x.ndim != 2 or len(x) == 0 or labels.shape != x.shape[:1] or not np.isfinite(x).all():
        raise ValueError(
            f"x must be finite [n, d] with labels [n] and n > 0, got {list(x.shape)}, {list(labels.shape)}"
        )
    num_classes = int(labels.max()) + 1
    _check_codes("labels", labels, num_classes)
    law = _law("weights", weights, len(lams))
    lam = lams[:, None, None, None]
    inputs = (lam * x[:, None] + (1 - lam) * x[None, :]).reshape(-1, x.shape[1])
    one = np.eye(num_classes)[labels]
    targets = (lam * one[:, None] + (1 - lam) * one[None, :]).reshape(-1, num_classes)
    mass = np.repeat(law / len(x) ** 2, len(x) ** 2)
    cell = np.round(inputs / (1e-9 * max(np.abs(x).max(), np.finfo(float).tiny)))
    _, place = np.unique(cell, axis=0, return_inverse=True)
    share = np.bincount(place, weights=mass)
    mean = np.stack([np.bincount(place, weights=mass * column) for column in targets.T], axis=1)
    filled = share > 0
    return float(share[filled] @ entropy(mean[filled] / share[filled, None]))


def logit_curvature(smoothing: float) -> float:
    """``m(ε) = σ'(|c*| + 1)`` with c* = log((2-ε)/ε): the constant of the logit bound; 0 at ε = 0, where c* = ∞.

    Args: smoothing: ε in [0, 2). Raises: ValueError for ε out of range. Source: book prop-logit-variance.
    """
    _check_range(smoothing, 2)
    if smoothing == 0:
        return 0.0
    far = abs(np.log((2 - smoothing) / smoothing)) + 1
    return float(expit(far) * expit(-far))


def logit_bound(margins: ArrayLike, *, smoothing: float) -> tuple[float, float]:
    """Excess of the binary label-smoothed loss, and its lower bound ``½ m(ε) E min{(s - c*)², |s - c*|}``.

    The excess is ``E[log(1 + e^{-s}) + εs/2] - H(ε/2)``, summed as a divergence so that nothing cancels. At ε = 0 the
    bound is 0.

    Args: margins: signed margins s = Y·logit, ``[n]``; smoothing: ε in [0, 2).
    Raises: ValueError for no margins, one that is not finite, or ε out of range. Source: book prop-logit-variance.
    """
    s = np.asarray(margins, float)
    if s.ndim != 1 or len(s) == 0 or not np.isfinite(s).all():
        raise ValueError(f"margins must be [n] finite numbers with n > 0, got {list(s.shape)}: {s.ravel()[:3]}")
    curvature = logit_curvature(smoothing)
    t = 1 - smoothing / 2
    divergence = -t * _log_expit(s) - (1 - t) * _log_expit(-s) - entr(t) - entr(1 - t)
    if smoothing == 0:
        return float(divergence.mean()), 0.0
    away = np.abs(s - np.log((2 - smoothing) / smoothing))
    return float(divergence.mean()), float(0.5 * curvature * np.minimum(away**2, away).mean())


def class_logit_bound(logits: ArrayLike, labels: ArrayLike, *, smoothing: float) -> tuple[float, float]:
    """The same for K classes: excess, and its bound ``(p_min/2e²) E[‖u‖² / max(1, ‖u‖_∞)]``, p_min = min_k p_k.

    u is the centred vector of logits less the centred log p^y: what label smoothing asks for, subtracted.

    Args: logits: ``[n, K]``; labels: integers ``[n]``; smoothing: ε in (0, K/(K-1)).
    Raises: ValueError if shapes do not fit, a logit is not finite or ε is out of range.
    Source: book prop-logit-classes.
    """
    z, labels = np.asarray(logits, float), np.asarray(labels)
    if z.ndim != 2 or labels.shape != z.shape[:1] or not np.isfinite(z).all():
        raise ValueError(f"logits must be finite [n, K] with labels [n], got {list(z.shape)} and {list(labels.shape)}")
    _check_codes("labels", labels, z.shape[1])
    if smoothing == 0:
        raise ValueError("smoothing must be above 0: plain cross-entropy asks for infinite logits, got 0")
    p = _smoothed(z.shape[1], smoothing)[labels]
    log_p = np.log(p)
    u = z - z.mean(1, keepdims=True) - (log_p - log_p.mean(1, keepdims=True))
    log_g = z - logsumexp(z, axis=1, keepdims=True)
    excess = (p * (log_p - log_g)).sum(1).mean()
    far = np.maximum(1.0, np.abs(u).max(1))
    return float(excess), float(0.5 * p.min() * np.exp(-2.0) * ((u**2).sum(1) / far).mean())


def logit_variance_ceiling(excess: float, *, largest: float) -> float:
    """``Var(s | Y) ≤ 2·excess/σ'(M)`` on average over Y where |s| ≤ M, for every ε in [0, 2).

    Args: excess: of the binary label-smoothed loss, in nats; largest: M.
    Raises: ValueError for a negative M or excess. Source: book prop-logit-variance.
    """
    for name, value in (("excess", excess), ("largest", largest)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    return float(2 * excess / (expit(largest) * expit(-largest)))


def _smoothed(num_classes: int, smoothing: float) -> np.ndarray:
    """Targets ``[K, K]`` of the K labels."""
    _check_range(smoothing, num_classes)
    return (1 - smoothing) * np.eye(num_classes) + smoothing / num_classes


def _divergence(p, mean, log_g, group, within, filled) -> np.ndarray:
    """``KL(p ‖ mean)`` of each group; where a mean underflowed, its logarithm is taken from those of the points."""
    divergence = rel_entr(p, mean).sum(1)
    for row in np.flatnonzero(~np.isfinite(divergence)):
        members = group == np.flatnonzero(filled)[row]
        log_mean = logsumexp(log_g[members], axis=0, b=within[members, None])
        divergence[row] = -_times_log(p[row], log_mean) - entropy(p[row])
    return divergence


def _times_log(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """``Σ_k p_k log q_k`` with 0·(-∞) = 0."""
    return np.where(p > 0, p * np.where(p > 0, log_q, 0.0), 0.0).sum(-1)


def _log_expit(t: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -t)


def _check_range(smoothing: float, num_classes: int) -> None:
    check_smoothing(smoothing, num_classes)
    if smoothing < 0:
        raise ValueError(f"smoothing must be at least 0 for a target inside the simplex, got {smoothing}")


def _check_log_probabilities(log_g: np.ndarray) -> None:
    if len(log_g) == 0:
        raise ValueError("log_g must hold at least one point, got none")
    total = np.exp(logsumexp(log_g, axis=1))
    if not (np.abs(total - 1) < 1e-9).all():  # the bounds are exact only for probabilities; float32 rows are 1e-7 off
        worst = total[np.argmax(np.where(np.isfinite(total), np.abs(total - 1), np.inf))]
        raise ValueError(
            f"each row of log_g must hold float64 log-probabilities with sum 1, but one has sum {worst:.10g}: "
            "take log_softmax in float64"
        )


def _check_targets(targets: np.ndarray) -> None:
    # 1e-12: a few roundings of λ e + (1-λ) e'.
    if not ((targets >= 0).all() and (np.abs(targets.sum(1) - 1) < 1e-12).all()):
        worst = targets[np.argmax(np.maximum(-targets.min(1), np.abs(targets.sum(1) - 1)))]
        raise ValueError(f"targets must be at least 0 with sum 1, got {worst}")


def _check_codes(name: str, codes: np.ndarray, count: int) -> None:
    if codes.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {codes.dtype}")
    if codes.size and not (codes.min() >= 0 and codes.max() < count):
        raise ValueError(f"{name} must lie in 0..{count - 1}, got {codes.min()}..{codes.max()}")


def _check_lams(lams: ArrayLike) -> np.ndarray:
    lams = np.asarray(lams, float)
    if lams.ndim != 1 or len(lams) == 0 or not ((lams >= 0) & (lams <= 1)).all():
        raise ValueError(f"lams must be [L] numbers in [0, 1], got {lams}")
    return lams


def _mean_entropy(lams: ArrayLike | None, weights: ArrayLike | None, alpha: float | None) -> float:
    """``E H_b(λ)`` of a finite law of λ, or of Beta(α, α)."""
    if (lams is None) == (alpha is None) or (weights is not None and lams is None):
        raise ValueError(f"give lams (with weights or without) or alpha, got {lams=}, {weights=}, {alpha=}")
    if lams is None:
        return mixing_entropy(alpha)[0]
    lams = _check_lams(lams)
    return float(_law("weights", weights, len(lams)) @ (entr(lams) + entr(1 - lams)))


def _law(name: str, weights: ArrayLike | None, count: int) -> np.ndarray:
    if weights is None:
        return np.full(count, 1.0 / count)
    weights = np.asarray(weights, float)
    if weights.shape != (count,) or not (weights >= 0).all() or not abs(weights.sum() - 1) < 1e-9:
        raise ValueError(
            f"{name} must be [{count}] numbers, at least 0 with sum 1, got {list(weights.shape)}, sum {weights.sum()}"
        )
    return weights / weights.sum()
