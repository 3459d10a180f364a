"""Stochastic runs of the teacher-student toy: all seeds and settings at once, one batched product a step.

Only the second layer is trained, so the gradient of the (half) mean squared error is ``Φᵀ(Φθ - y)/n`` and nothing is
taped. At a fixed λ there are only n² mixed inputs: their features are computed once and rows are gathered each epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from labelaug.mixing import check_alpha

PAIRINGS = ("permutation", "all")
# Each seed has one stream for each purpose, so that adding a setting or an epoch leaves the others alone.
PARTNER, LAM = 101, 102
BLOCK = 1000  # epochs whose draws are made together


@dataclass(frozen=True)
class ToySetting:
    """What is trained on; neither lam nor alpha is ERM.

    Args: lam: fixed λ in [0, 1]; alpha: λ ~ Beta(α, α), one number an epoch; switch: epochs with mixing, after which
        training goes on as ERM (None: never); pairing: "permutation" (n mixed examples an epoch, paired by a new
        permutation, as paper 2's "full batch") or "all" (all n² pairs each epoch).
    Raises: ValueError with the offending value.
    """

    lam: float | None = None
    alpha: float | None = None
    switch: int | None = None
    pairing: str = "permutation"

    def __post_init__(self):
        if self.lam is not None and self.alpha is not None:
            raise ValueError(f"λ is fixed or random, got lam={self.lam} and alpha={self.alpha}")
        if self.lam is not None and not 0 <= self.lam <= 1:
            raise ValueError(f"λ must lie in [0, 1], got {self.lam}")
        if self.alpha is not None:
            check_alpha(self.alpha)
        if self.switch is not None and (not self.mixes or self.switch < 0):
            raise ValueError(f"switch is a number of epochs with mixing, at least 0, got {self.switch} for {self}")
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing must be one of {PAIRINGS}, got {self.pairing!r}")

    @property
    def mixes(self) -> bool:
        """Whether inputs are mixed at all."""
        return self.lam is not None or self.alpha is not None

    def kind(self, epoch: int) -> str:
        """How epoch ``epoch`` (from 0) is trained: "erm", "fixed" or "random"."""
        if not self.mixes or (self.switch is not None and epoch >= self.switch):
            return "erm"
        return "fixed" if self.lam is not None else "random"


@dataclass(frozen=True)
class ToyTraining:
    """How it is trained, shared by all settings.

    Args: epochs; every: epochs between records (epoch 0 and the last are always kept); learning_rate: η; loss_factor:
        ½ for half the mean squared error, 1 for the mean squared error itself (twice the step); start_std: s₂, the
        student's second layer starts at N(0, s₂²); blow_up: a run whose weights are no longer finite, or longer than
        this many times 1 + their start, has diverged.
    Raises: ValueError with the offending value.
    """

    epochs: int = 10_000
    every: int = 50
    learning_rate: float = 0.1
    loss_factor: float = 0.5
    start_std: float = 0.25
    blow_up: float = 1e6

    def __post_init__(self):
        if self.epochs < 1 or self.every < 1:
            raise ValueError(f"epochs and every must be at least 1, got {self.epochs} and {self.every}")
        for name in ("learning_rate", "loss_factor", "blow_up"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.start_std < np.inf:
            raise ValueError(f"start_std must be at least 0, got {self.start_std}")

    @property
    def rate(self) -> float:
        """Step on Mθ - c: 2 · loss_factor · learning_rate."""
        return 2 * self.loss_factor * self.learning_rate

    @property
    def records(self) -> tuple[int, ...]:
        """Epochs after which weights are kept, 0 being the start."""
        return tuple(sorted({*range(0, self.epochs + 1, self.every), self.epochs}))


@dataclass(frozen=True)
class ToyRuns:
    """``weights [seeds, settings, records, d]`` after ``epochs [records]``; NaN from where a run has diverged.

    ``diverged [seeds, settings]`` holds the first record at which it was seen, 0 for runs that stayed finite.
    """

    weights: np.ndarray
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: tuple[ToySetting, ...]
    diverged: np.ndarray

    def kept(self, setting: ToySetting) -> np.ndarray:
        """Which seeds of a setting may be averaged: bool ``[seeds]``."""
        return self.diverged[:, self.settings.index(setting)] == 0


def train_toy(draws, settings: Sequence[ToySetting], training: ToyTraining, *, dtype=torch.float64) -> ToyRuns:
    """Train every setting from every seed's own start, on its own examples; settings of a seed share partners and λ.

    Args: draws: ``data.teacher`` draws (fields seeds, first ``[S, d, p]``, start ``[S, d]``, x ``[S, n, p]``, y).
    Raises: ValueError for n < 2, draws that are not finite, or settings that are missing or repeated. A run that
        diverges is reported in :class:`ToyRuns`, not raised.
    """
    settings = tuple(settings)
    if not settings or len(set(settings)) != len(settings):
        raise ValueError(f"settings must be distinct, at least one, got {list(settings)}")
    if draws.x.shape[1] < 2:
        raise ValueError(f"n must be at least 2, got {draws.x.shape[1]}")
    arrays = (draws.first, draws.x, draws.y, training.start_std * draws.start)
    for name, array in zip(("first", "x", "y", "start"), arrays, strict=True):
        if not np.isfinite(array).all():
            raise ValueError(f"draws must be finite, and {name} has {(~np.isfinite(array)).sum()} values that are not")
    streams = [(np.random.default_rng([s, PARTNER]), np.random.default_rng([s, LAM])) for s in draws.seeds]
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small lose more to waiting for each other than a second core gains
    try:
        weights, diverged = _train(*(torch.as_tensor(a, dtype=dtype) for a in arrays), streams, settings, training)
    finally:
        torch.set_num_threads(cores)
    return ToyRuns(weights, training.records, tuple(draws.seeds), settings, diverged)


def _train(first, x, y, start, streams, settings, training) -> tuple[np.ndarray, np.ndarray]:
    """The weights ``[S, E, records, d]`` and the first records at which they had diverged ``[S, E]``."""
    theta = start[:, None].repeat(1, len(settings), 1)  # [S, E, d]
    limits = training.blow_up * (1 + theta.norm(dim=-1))
    records = training.records
    weights = np.full((*theta.shape[:2], len(records), theta.shape[2]), np.nan)
    weights[:, :, 0] = theta.double().numpy()
    diverged = np.zeros(theta.shape[:2], dtype=int)
    alive = np.ones(theta.shape[:2], dtype=bool)
    switches = {s.switch for s in settings if s.switch is not None and s.switch < training.epochs}
    bounds = sorted({*range(0, training.epochs, BLOCK), *switches, training.epochs})
    plan, position = None, 1
    for begin, end in pairwise(bounds):
        kinds = tuple(s.kind(begin) for s in settings)
        if kinds != plan:  # built anew only where a setting switches
            groups, plan = _groups(settings, kinds, first, x, y), kinds
        partners, uniforms = _draw(streams, end - begin, x.shape[1])
        for group in groups:
            group.enter(theta, partners, uniforms)
        for epoch in range(begin, end):
            for group in groups:
                group.step(epoch - begin, training.rate)
            if epoch + 1 == records[position]:
                for group in groups:
                    group.leave(theta)
                bad = ~(torch.isfinite(theta).all(-1) & (theta.norm(dim=-1) <= limits)).numpy()
                diverged[bad & alive] = epoch + 1
                alive &= ~bad
                weights[:, :, position][alive] = theta.double().numpy()[alive]
                position += 1
        for group in groups:
            group.leave(theta)
    return weights, diverged


def _draw(streams, epochs: int, n: int) -> tuple[Tensor, np.ndarray]:
    """Partners ``[S, epochs, n]`` and uniform numbers ``[S, epochs]`` of the coming epochs, by each seed's streams."""
    rows = np.tile(np.arange(n), (epochs, 1))
    partners = np.stack([partner.permuted(rows, axis=1) for partner, _ in streams])
    return torch.from_numpy(partners), np.stack([lam.random(epochs) for _, lam in streams])


def _groups(settings, kinds, first, x, y) -> list:
    """Members that are trained alike, as few batched problems."""
    found = {}
    for i, (setting, kind) in enumerate(zip(settings, kinds, strict=True)):
        found.setdefault((kind, setting.pairing if kind != "erm" else "all"), []).append(i)
    return [
        _Random(chosen, [settings[i].alpha for i in chosen], pairing, first, x, y)
        if kind == "random"
        else _Table(chosen, [1.0 if kind == "erm" else settings[i].lam for i in chosen], kind, pairing, first, x, y)
        for (kind, pairing), chosen in found.items()
    ]


class _Group:
    """Some settings of all seeds: B = S·E problems, features ``[B, m, d]``, weights as rows ``[B, 1, d]``.

    Rows, because ``[1, m] @ [m, d]`` is several times faster than ``[d, m] @ [m, 1]`` in batches of small matrices.
    """

    def __init__(self, chosen, m):
        self.chosen, self.m = chosen, m

    def enter(self, theta, partners, uniforms):
        """Take over the weights and the draws of the coming epochs."""
        self.theta = theta[:, self.chosen].flatten(0, 1)[:, None].contiguous()
        self.error = theta.new_empty(len(self.theta), 1, self.m)

    def leave(self, theta):
        """Hand the weights back."""
        theta[:, self.chosen] = self.theta.view(len(theta), len(self.chosen), -1)

    def descend(self, features, y, rate, turned=None):
        """``θ - rate·Φᵀ(Φθ - y)/m``: features ``[B, m, d]``, y ``[B, 1, m]``."""
        torch.baddbmm(y, self.theta, features.mT if turned is None else turned, beta=-1, out=self.error)
        self.theta.baddbmm_(self.error, features, alpha=-rate / features.shape[1])


class _Table(_Group):
    """Inputs known beforehand: the examples themselves, or all pairs at a fixed λ."""

    def __init__(self, chosen, lams, kind, pairing, first, x, y):
        self.gather = kind != "erm" and pairing == "permutation"
        super().__init__(chosen, x.shape[1] ** (1 if kind == "erm" or self.gather else 2))
        if kind == "erm":
            inputs, labels = x[:, None], y[:, None]
        else:
            lam = torch.tensor(lams, dtype=x.dtype)[:, None, None]
            inputs = lam[..., None] * x[:, None, :, None] + (1 - lam[..., None]) * x[:, None, None]
            inputs = inputs.flatten(2, 3)  # [S, E, n², p], row i·n + j: anchor i, partner j
            labels = (lam * y[:, None, :, None] + (1 - lam) * y[:, None, None]).flatten(2)
        features = torch.tanh(inputs @ first[:, None].mT)
        shape = (len(x), len(chosen))
        self.features = features.expand(*shape, *features.shape[2:]).flatten(0, 1).contiguous()
        self.y = labels.expand(*shape, labels.shape[2]).flatten(0, 1)[:, None].contiguous()
        self.n = x.shape[1]
        self.turned = None if self.gather else self.features.mT.contiguous()

    def enter(self, theta, partners, uniforms):
        super().enter(theta, partners, uniforms)
        if self.gather:
            rows = torch.arange(self.n) * self.n + partners  # [S, epochs, n]
            rows = rows.repeat_interleave(len(self.chosen), 0)
            rows = rows + torch.arange(len(rows))[:, None, None] * self.n**2
            self.rows = rows.swapaxes(0, 1).flatten(1).contiguous()
            self.table, y = self.features.flatten(0, 1), self.y.flatten()
            self.labels = y[self.rows].view(len(self.rows), len(self.theta), 1, self.n)
            self.batch = self.table.new_empty(self.rows.shape[1], self.table.shape[1])

    def step(self, k, rate):
        if not self.gather:
            return self.descend(self.features, self.y, rate, self.turned)
        torch.index_select(self.table, 0, self.rows[k], out=self.batch)
        return self.descend(self.batch.view(-1, self.n, self.table.shape[1]), self.labels[k], rate)


class _Random(_Group):
    """A new λ each epoch. <w, mixed x> is the mix of <w, x>, so that inputs need no product with w either."""

    def __init__(self, chosen, alphas, pairing, first, x, y):
        self.alphas, self.y, self.every_pair = alphas, y, pairing == "all"
        super().__init__(chosen, x.shape[1] ** (2 if self.every_pair else 1))
        self.drive = x @ first.mT  # <w_j, x_i>  [S, n, d]

    def enter(self, theta, partners, uniforms):
        super().enter(theta, partners, uniforms)
        lam = np.stack([_beta_quantile(uniforms, alpha) for alpha in self.alphas], axis=1)  # [S, E, epochs]
        lam = torch.as_tensor(lam, dtype=self.y.dtype)
        count, n, d = self.drive.shape
        self.sides = [self.drive.new_empty(count * self.m, d) for _ in range(2)]
        self.batch = self.drive.new_empty(count, len(self.chosen), self.m, d)
        own, other = torch.arange(n).expand(count, len(uniforms[0]), n), partners
        if self.every_pair:
            own, other = (torch.arange(n**2).expand(count, own.shape[1], -1) // n, torch.arange(n**2) % n)
            other = other.expand_as(own)
        offset = torch.arange(count)[:, None, None] * n
        self.rows = [(part + offset).swapaxes(0, 1).flatten(1).contiguous() for part in (own, other)]  # [epochs, S·m]
        y, lam = self.y.flatten(), lam.permute(2, 0, 1)[..., None]  # [epochs, S, E, 1]
        labels = [y[rows].view(len(rows), count, 1, -1) for rows in self.rows]
        self.labels = torch.lerp(labels[1], labels[0], lam).flatten(1, 2)[:, :, None]  # [epochs, S·E, 1, m]
        self.shares = lam[..., None].contiguous()

    def step(self, k, rate):
        count, _, d = self.drive.shape
        for rows, side in zip(self.rows, self.sides, strict=True):
            torch.index_select(self.drive.view(-1, d), 0, rows[k], out=side)
        own, other = (side.view(count, 1, self.m, d) for side in self.sides)
        torch.lerp(other, own, self.shares[k], out=self.batch).tanh_()
        self.descend(self.batch.view(-1, self.m, d), self.labels[k], rate)


def _beta_quantile(uniforms: np.ndarray, alpha: float) -> np.ndarray:
    """λ ~ Beta(α, α) from uniform numbers; for α = 1 the numbers themselves."""
    return uniforms if alpha == 1 else beta.ppf(uniforms, alpha, alpha)
