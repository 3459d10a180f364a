"""What is measured on trained models; the leading axes of the weights (records, seeds, settings) survive.

Data that are not finite are refused, and so are labels that are none. A model whose weights or outputs are not finite
has diverged: all its measures are NaN, never an error rate, and those of the others on the leading axes are theirs.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from labelaug.targets import check_labels


def block_norm(weights: Tensor, coordinates: slice) -> Tensor:
    """Euclidean norm of the weights on some coordinates, ‖w_S‖: ``[..., d]`` -> ``[...]``."""
    return weights[..., coordinates].norm(dim=-1)


def norm_share(weights: Tensor, coordinates: slice) -> Tensor:
    """Share of the squared norm on some coordinates, ‖w_S‖²/‖w‖² in [0, 1]: ``[..., d]`` -> ``[...]``."""
    return weights[..., coordinates].square().sum(-1) / weights.square().sum(-1)


def entry_ratio(weights: Tensor) -> Tensor:
    """``|w_1| / ‖w_2:‖``, the first entry against all others: ``[..., d]`` -> ``[...]``. Source: paper 1, 4.2."""
    return weights[..., 0].abs() / weights[..., 1:].norm(dim=-1)


def error_rate(weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Share of examples on the wrong side of ⟨w, x⟩ = 0: ``[..., d]``, x ``[n, d]``, labels ``[n]`` -> ``[...]``.

    A logit of exactly 0 is read as label 0; logits that are not finite give NaN.
    Raises: ValueError if shapes do not fit, a label is not 0 or 1, or x is not finite.
    """
    if x.shape[-1] != weights.shape[-1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"x must be [n, {weights.shape[-1]}] with labels [n], got {list(x.shape)} and {list(labels.shape)}"
        )
    check_labels(labels, 2)
    if not x.isfinite().all():
        raise ValueError(f"x must be finite, and {int((~x.isfinite()).any(-1).sum())} of its {len(x)} rows are not")
    logits = weights.reshape(-1, weights.shape[-1]) @ x.T
    return _scored((logits > 0) != (labels == 1), logits).reshape(weights.shape[:-1])


def logit_share(weights: Tensor, mean: Tensor, coordinates: slice) -> Tensor:
    """Share of the mean signed logit that some coordinates carry, ⟨w_S, μ_S⟩/⟨w, μ⟩: ``[..., d]`` -> ``[...]``.

    Unlike a norm it does not depend on the units of the features. Args: mean: μ = E[YX], ``[d]``.
    """
    mean = mean.to(weights.dtype)
    return weights[..., coordinates] @ mean[coordinates] / (weights @ mean)


def within_class_variance(outputs: Tensor, labels: Tensor) -> Tensor:
    """``E_Y tr Cov(o | Y)``, variances divided by n_y: ``[..., n, K]`` -> ``[...]``, in the outputs' squared units.

    Classes count by their share of the examples, so that it is the mean squared distance from the own class mean.
    Args: outputs: probabilities, logits or activations; labels: integers ``[n]``, any.
    Raises: ValueError if the shapes do not fit, there is no example or labels are not integers.
    """
    if outputs.ndim < 2 or labels.shape != outputs.shape[-2:-1] or len(labels) == 0 or labels.is_floating_point():
        raise ValueError(
            f"outputs must be [..., n, K] with integer labels [n] and n > 0, got {list(outputs.shape)}, "
            f"{labels.dtype} {list(labels.shape)}"
        )
    total = torch.zeros(outputs.shape[:-2], dtype=outputs.dtype, device=outputs.device)
    for label in labels.unique():
        members = outputs[..., labels == label, :]
        total += (members - members.mean(-2, keepdim=True)).square().sum((-2, -1))
    return total / len(labels)


def relative_variance(outputs: Tensor, labels: Tensor) -> Tensor:
    """``E_Y tr Cov(o | Y) / tr Cov(E[o | Y])``, variance within over between classes: ``[..., n, K]`` -> ``[...]``.

    Free of the outputs' scale; both variances weigh classes by their share and divide by n.
    Raises: ValueError as :func:`within_class_variance`.
    """
    within = within_class_variance(outputs, labels)
    return within / (within_class_variance(outputs, torch.zeros_like(labels)) - within)


def class_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of examples whose largest logit is not their label's: ``[..., n, K]``, labels ``[n]`` -> ``[...]``.

    NaN where a logit is not finite. Raises: ValueError if shapes do not fit or a label is not in 0..K-1.
    """
    if labels.shape != logits.shape[-2:-1]:
        raise ValueError(f"logits must be [..., n, K] with labels [n], got {list(logits.shape)}, {list(labels.shape)}")
    check_labels(labels, logits.shape[-1])
    return _scored(logits.argmax(-1) != labels, logits.flatten(-2))


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:
    """Expected calibration error, Σ_b (n_b/n)·|accuracy_b - confidence_b| over equal bins of the largest probability.

    Bin b holds the confidences in (b/B, (b + 1)/B], open on the left, as Guo et al. have it; others open the right end.
    Logits ``[n, K]``, labels ``[n]`` -> ``[]`` in [0, 1], NaN where a logit is not finite.
    Raises: ValueError if shapes do not fit, a label is not in 0..K-1 or there is no bin.
    Source: Guo et al. (2017), section 2, whose 15 bins are the usual ones.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or bins < 1:
        raise ValueError(
            f"logits must be [n, K] with labels [n] and bins at least 1, got {list(logits.shape)}, "
            f"{list(labels.shape)} and {bins}"
        )
    check_labels(labels, logits.shape[-1])
    confidence, predicted = logits.double().softmax(-1).max(-1)
    excess = (predicted == labels).double() - confidence
    ends = torch.arange(1, bins, dtype=torch.float64, device=logits.device) / bins
    chosen = torch.bucketize(confidence, ends)  # ends[b - 1] < confidence <= ends[b]
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add(0, chosen, excess)
    error = gaps.abs().sum() / len(labels)
    return torch.where(logits.isfinite().all(), error, torch.nan)


def outputs_and_activations(model: nn.Module, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, K]`` and what enters the model's last dense layer ``[n, D]``, both float32, over all batches.

    Raises: ValueError if the model has no dense layer.
    """
    dense = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not dense:
        raise ValueError("a model without a dense layer has no penultimate activations")
    entered: list[Tensor] = []
    hook = dense[-1].register_forward_pre_hook(lambda layer, inputs: entered.append(inputs[0].detach().float()))
    try:
        with torch.no_grad():
            outputs = [model(batch).float() for batch in batches]
    finally:
        hook.remove()
    return torch.cat(outputs), torch.cat(entered)


def mixed_logits(model: Callable[[Tensor], Tensor], x: Tensor, *, lams: Sequence[float]) -> Tensor:
    """Logits at λ x_i + (1 - λ) x_j for all pairs and each λ: x ``[n, ...]`` -> ``[L, n, n, K]``, in float64.

    The model itself works in the dtype of x. Raises: ValueError for no λ or one outside [0, 1].
    """
    if len(lams) == 0 or not all(0 <= lam <= 1 for lam in lams):
        raise ValueError(f"lams must be numbers in [0, 1], at least one, got {list(lams)}")
    n = len(x)
    first, second = x.repeat_interleave(n, 0), x.repeat(n, *[1] * (x.ndim - 1))
    with torch.no_grad():
        return torch.stack([model(torch.lerp(second, first, lam)).double().reshape(n, n, -1) for lam in lams])


def _scored(wrong: Tensor, logits: Tensor) -> Tensor:
    """Share of ``wrong [..., n]`` in float64; NaN where one of a model's logits ``[..., m]`` is not finite."""
    return torch.where(logits.isfinite().all(-1), wrong.double().mean(-1), torch.nan)
