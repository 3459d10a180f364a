"""Planted features: entries written into training data that identify the class; test data are never touched."""

import torch
from torch import Tensor


def plant_entry(
    x: Tensor, labels: Tensor, *, gamma: float, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """A copy of ``x`` whose entry (channel 0, row 0, column 0) is ``γy``, plus uniform noise on [-noise, noise].

    Only training data get the entry: at test the model meets images as they are.

    Args: x: ``[n, C, H, W]``, standardised, so γ is in units of a channel's standard deviation; labels: ``[n]`` in
        {0, 1}, y = 2·label - 1; noise: half-width, in the same units; generator: needed where noise > 0.
    Raises: ValueError unless γ > 0, noise ≥ 0, labels binary, shapes agree, and a generator is there for the noise.
    Source: paper 1, section 4.2 and appendix B; book def-planted-entry.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    if x.ndim != 4 or labels.shape != x.shape[:1]:
        raise ValueError(f"x must be [n, C, H, W] and labels [n], got {tuple(x.shape)} and {tuple(labels.shape)}")
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"labels must be 0 or 1, got {sorted(set(labels.tolist()))[:5]}")
    entry = gamma * (2.0 * labels.to(x.dtype) - 1.0)
    if noise > 0:
        if generator is None:
            raise ValueError("noise on the planted entry needs a generator")
        entry = entry + noise * (2.0 * torch.rand(len(x), generator=generator, dtype=x.dtype) - 1.0)
    planted = x.clone()
    planted[:, 0, 0, 0] = entry
    return planted
