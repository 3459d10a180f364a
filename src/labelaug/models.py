"""Networks, from inputs to logits."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def mlp(num_inputs: int, widths: Sequence[int], num_classes: int, *, generator: torch.Generator) -> nn.Sequential:
    """ReLU network ``[n, num_inputs] -> [n, num_classes]`` logits in float32; no hidden layer is logistic regression.

    Weights and biases start uniform on ±1/√(fan-in), torch.nn.Linear's own start, drawn in order from ``generator``.
    Raises: ValueError unless all sizes are positive and there are two classes or more.
    """
    sizes = [num_inputs, *widths, num_classes]
    if min(sizes) < 1 or num_classes < 2:
        raise ValueError(f"sizes must be at least 1 and classes at least 2, got {num_inputs}, {widths}, {num_classes}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)  # nothing is drawn from torch's global stream
        with torch.no_grad():
            for parameter in (layer.weight, layer.bias):
                parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
