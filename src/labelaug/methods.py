"""What a training method does to a minibatch: a draw, and the terms of its loss.

A method is a frozen dataclass with two functions. ``draw`` takes random numbers only, for one minibatch of n examples;
``terms`` is arithmetic and may call the model. Both live here, so that another method is one more class with these two
functions, and nothing in the trainer changes: CutMix draws a box beside λ; RegMixup returns two terms, the second with
its weight η; a method that mixes hidden layers, or adds noise to them, does so in hooks around its call of ``model``
(and is trained uncompiled: a compiled model hides its layers).

Results are filed under the class's name and fields: let each method have a name of its own, at the top level of a
module that workers can import. In lists it appears as ``str`` has it, which is the dataclass's own form unless the
class says something shorter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from labelaug.mixing import PER, check_alpha, draw_lam, draw_partner, mix

Draw = tuple[Tensor, ...]
Term = tuple[Tensor, Tensor, float]  # outputs [n, K], targets [n, K], weight in the loss


@dataclass(frozen=True)
class Erm:
    """The minibatch as it is. The model is called once: ``terms`` has the one pair (outputs, targets) of weight 1."""

    def __str__(self) -> str:
        return "erm"

    def draw(self, n: int, *, lam_rng: np.random.Generator, partner_rng: np.random.Generator) -> Draw:
        """Nothing is drawn."""
        return ()

    def terms(self, model: Callable, label: Callable, x: Tensor, targets: Tensor, draw: Draw) -> list[Term]:
        """``label(inputs, targets)``, here and in every method: the targets that the trainer wants at these inputs."""
        return [(model(x), label(x, targets), 1.0)]


@dataclass(frozen=True)
class Mixup:
    """``λ x_i + (1 - λ) x_π(i)`` with targets mixed alike, π a permutation of the minibatch.

    Args: alpha: of λ ~ Beta(α, α); lam: a fixed λ in [0, 1] in its place (1 is ERM, bit for bit); per: one λ a "batch",
        as the first public code has it, or one an "example"; inputs: whether the inputs are mixed too, or only targets.
    Source: Zhang et al. (2018); book eq-mixup-point.
    """

    alpha: float | None = None
    lam: float | None = None
    per: str = "batch"
    inputs: bool = True

    def __post_init__(self):
        if (self.alpha is None) == (self.lam is None):
            raise ValueError(f"Mixup takes either alpha or lam, got {self.alpha} and {self.lam}")
        if self.alpha is not None:
            check_alpha(self.alpha)
        elif not 0 <= self.lam <= 1:
            raise ValueError(f"lam must lie in [0, 1], got {self.lam}")
        if self.per not in PER:
            raise ValueError(f"per must be one of {PER}, got {self.per!r}")

    def __str__(self) -> str:
        """What differs from one λ ~ Beta(1, 1) a batch is said: "mixup", "mixed labels α=0.2", "mixup λ=0.5"."""
        mixed = "mixup" if self.inputs else "mixed labels"
        strength = f" λ={self.lam:g}" if self.alpha is None else f" α={self.alpha:g}" if self.alpha != 1 else ""
        return mixed + strength + (" an example" if self.per == "example" else "")

    def draw(self, n: int, *, lam_rng: np.random.Generator, partner_rng: np.random.Generator) -> Draw:
        """λ float64 ``[]`` or ``[n]``, and the partner, int64 ``[n]``."""
        if self.lam is None:
            lam = draw_lam(n, self.alpha, per=self.per, rng=lam_rng)
        else:
            lam = torch.tensor(self.lam, dtype=torch.float64)
        return lam, draw_partner(n, rng=partner_rng)

    def terms(self, model: Callable, label: Callable, x: Tensor, targets: Tensor, draw: Draw) -> list[Term]:
        """One term, at the mixed inputs."""
        if self.inputs:
            x = mix(x, *draw)
        return [(model(x), label(x, mix(targets, *draw)), 1.0)]


ERM = Erm()
