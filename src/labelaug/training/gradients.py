"""Norms of gradients during training: of clean data, of a minibatch, and of the objective that is in fact minimised."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from labelaug.methods import ERM
from labelaug.targets import check_labels, smooth_targets
from labelaug.training.deep import DeepSetting, check_last_batch, gather, left_as_found, minibatch_loss
from labelaug.training.linear import LAM, ORDER, PARTNER

GRADIENTS = 6  # purpose of the streams of these draws, beside those of training


def gradient_norms(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    setting: DeepSetting,
    seed: int,
    epoch: int,
    draws: int,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Three gradients of one model, without the penalty, batch normalisation using each minibatch's own statistics.

    ``clean_gradient``: norm of the full-batch gradient of the loss on unmixed data with their own, unsmoothed labels;
    ``minibatch_gradient``: root mean square norm of the training objective's minibatch gradients g_1 .. g_M (the
    method's mixing, smoothing and targets at this epoch; examples, λ and partners drawn anew each time);
    ``squared_objective_gradient``: ‖E g‖² without bias, (‖Σg‖² - Σ‖g‖²)/(M(M-1)), which can fall below zero;
    ``squared_penalised_gradient``: the same of the objective with its penalty, ‖E g + λθ‖²: zero where it is
    stationary; ``parameter_norm``: ‖θ‖.

    Args: x: uint8 images ``[n, C, H, W]`` or floats ``[n, ...]``; labels: ``[n]``; epoch: whole epochs made;
        draws: M, at least 2. The model is left as it was found, and so is torch's random state.
    Raises: ValueError for fewer draws, a label outside 0..K-1, or if the model cannot be trained on the last minibatch.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    check_labels(labels, num_classes)
    check_last_batch(model, x, setting.batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    base = x.permute(0, 2, 3, 1) if x.dtype == torch.uint8 else x
    rng = {p: np.random.default_rng([seed, GRADIENTS, p, epoch]) for p in (ORDER, PARTNER, LAM)}
    size = min(setting.batch_size, len(x))

    def gradient(chosen: np.ndarray, method, smoothing: float, teacher) -> Tensor:
        indices = torch.from_numpy(chosen).to(x.device)
        inputs = gather(base, indices)
        targets = smooth_targets(labels[indices], num_classes, smoothing=smoothing, dtype=inputs.dtype)
        draw = method.draw(len(chosen), lam_rng=rng[LAM], partner_rng=rng[PARTNER])
        draw = tuple(part.to(x.device) for part in draw)
        loss, _ = minibatch_loss(model, teacher, inputs, targets, draw, method=method, setting=setting)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()

    with torch.enable_grad(), left_as_found(model, x.device):
        model.train()
        order = rng[ORDER].permutation(len(x))
        clean = sum(
            gradient(order[begin : begin + size], ERM, 0.0, None) * (len(order[begin : begin + size]) / len(x))
            for begin in range(0, len(x), size)
        )
        total, squares = 0, 0.0
        for _ in range(draws):
            one = gradient(rng[ORDER].permutation(len(x))[:size], setting.method_at(epoch), setting.smoothing, teacher)
            total, squares = total + one, squares + one @ one
    theta = torch.cat([p.detach().flatten() for p in parameters]).double()
    squared = (total @ total - squares) / (draws * (draws - 1))
    penalty = setting.weight_decay
    penalised = squared + 2 * penalty * (total @ theta) / draws + penalty**2 * (theta @ theta)
    return {
        "clean_gradient": clean.norm().item(),
        "minibatch_gradient": (squares / draws).sqrt().item(),
        "squared_objective_gradient": squared.item(),
        "squared_penalised_gradient": penalised.item(),
        "parameter_norm": theta.norm().item(),
    }
