"""One trial: one model, one setting, one seed.

What is trained is plain: minibatches in a random order, targets smoothed and mixed as the setting says, torch's own
optimiser. What is measured is the caller's affair and cannot touch the training: a model is measured in eval mode,
without gradients, on a copy of torch's random state. A trial keeps to one core, so that its numbers do not depend on
how many there are (and small layers are faster on one than on two); many trials share cores as processes.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from labelaug.keys import description_key
from labelaug.losses import soft_cross_entropy
from labelaug.mixing import PER, check_alpha, draw_lam, draw_partner, mix
from labelaug.targets import check_smoothing, smooth_targets
from labelaug.training.linear import INIT, LAM, ORDER, PARTNER

OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
COLUMNS = ["key", "seed", "step", "epoch", "split", "metric", "value"]
Measure = Callable[[nn.Module], Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class DeepSetting:
    """What is minimised, how, and for how long. Parts at zero or None are switched off.

    Args: learning_rate: of the optimiser, constant; epochs; batch_size: examples a step (a smaller last batch is kept);
        optimiser: "adam" or "sgd" (without momentum); smoothing: ε in units of probability, at least 0 here and below
        K/(K-1); mixup_alpha: α of λ ~ Beta(α, α); lam_per: one λ per "batch" or per "example"; weight_decay: λ of the
        penalty (λ/2)‖θ‖² in the loss over *all* parameters, biases too, as torch's optimisers have it (not AdamW's);
        record_epochs: epochs after which the model is measured, 0 being before the first step (None: only the last).
    """

    learning_rate: float
    epochs: int
    batch_size: int
    optimiser: str = "adam"
    smoothing: float = 0.0
    mixup_alpha: float | None = None
    lam_per: str = "batch"
    weight_decay: float = 0.0
    record_epochs: tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser must be one of {tuple(OPTIMISERS)}, got {self.optimiser!r}")
        check_smoothing(self.smoothing, 2)
        if self.smoothing < 0:
            raise ValueError(f"smoothing must be at least 0, got {self.smoothing}")
        if self.mixup_alpha is not None:
            check_alpha(self.mixup_alpha)
        if self.lam_per not in PER:
            raise ValueError(f"lam_per must be one of {PER}, got {self.lam_per!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        records = self.records
        if not records or list(records) != sorted(set(records)) or not 0 <= records[0] <= records[-1] <= self.epochs:
            raise ValueError(f"record_epochs must increase within 0..{self.epochs}, got {self.record_epochs}")

    @property
    def records(self) -> tuple[int, ...]:
        """The epochs after which the model is measured."""
        return (self.epochs,) if self.record_epochs is None else tuple(self.record_epochs)

    @property
    def key(self) -> str:
        """The name of this setting's results."""
        return description_key(self)


def init_generator(seed: int) -> torch.Generator:
    """The stream from which seed ``seed`` draws its start; apart from those of order, partner and λ."""
    _check_seed(seed)
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, INIT]).generate_state(1)[0]))


def train(
    model: nn.Module, x: Tensor, labels: Tensor, *, setting: DeepSetting, seed: int, measure: Measure
) -> pd.DataFrame:
    """Train ``model`` in place: minimise E[-Σ_k q_k log softmax(f(x))_k] + (λ/2)‖θ‖² over minibatches.

    A run whose loss, parameters or measured values stop being finite ends there, without that record. Its last row, as
    that of every run, is the metric "diverged" of the split "train": 1 for such a run, else 0.

    Args: model: ``[B, ...] -> [B, K]`` logits; x: ``[n, ...]``, its dtype that of the model; labels: int64 ``[n]`` in
        0..K-1; seed: at least 0, of the streams of order, partner and λ (the model brings its own start, see
        :func:`init_generator`); measure: from the model to ``{split: {metric: value}}``.
    Returns: rows ``key, seed, step, epoch, split, metric, value``, step and epoch counting those made.
    Raises: ValueError if shapes, labels, the seed or the smoothing do not fit.
    """
    _check(x, labels, seed)
    with _one_core():
        rows = _rows(model, x, labels, setting, seed, measure)
    frame = pd.DataFrame(rows, columns=COLUMNS[2:])
    return frame.assign(key=setting.key, seed=seed)[COLUMNS]


def _rows(model, x, labels, setting, seed, measure) -> list[tuple]:
    """Rows ``step, epoch, split, metric, value`` of one trial."""
    order, partner, lam = (np.random.default_rng([seed, purpose]) for purpose in (ORDER, PARTNER, LAM))
    optimiser = OPTIMISERS[setting.optimiser](
        model.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay, fused=True
    )
    rows: list[tuple] = []
    step = epoch = 0

    def record() -> bool:
        """Add a record and True; False, and nothing, if the run has diverged."""
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            return False
        found = _measured(model, measure) if epoch in setting.records else []
        if not all(np.isfinite(value) for *_, value in found):
            return False
        rows.extend((step, epoch, *item) for item in found)
        return True

    def minibatches():
        shuffled = torch.from_numpy(order.permutation(len(x)))
        for chosen in shuffled.split(setting.batch_size):
            xb, yb = x[chosen], labels[chosen]
            if setting.mixup_alpha is None:
                yield xb, yb, None
            else:
                mixing = (
                    draw_lam(len(chosen), setting.mixup_alpha, per=setting.lam_per, rng=lam),
                    draw_partner(len(chosen), rng=partner),
                )
                yield mix(xb, *mixing), yb, mixing

    model.train()
    finite = record()
    while finite and epoch < setting.epochs:
        for xb, yb, mixing in minibatches():
            loss = _loss(model(xb), yb, mixing, setting.smoothing)
            finite = bool(torch.isfinite(loss))
            if not finite:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
        else:
            epoch += 1
            finite = record()
    return [*rows, (step, epoch, "train", "diverged", float(not finite))]


def _loss(logits: Tensor, labels: Tensor, mixing: tuple | None, smoothing: float) -> Tensor:
    if logits.ndim != 2 or logits.shape[0] != len(labels) or logits.shape[1] <= labels.max():
        raise ValueError(f"the model must give logits [{len(labels)}, K > {labels.max()}], got {list(logits.shape)}")
    targets = smooth_targets(labels, logits.shape[1], smoothing=smoothing, dtype=logits.dtype)
    return soft_cross_entropy(logits, targets if mixing is None else mix(targets, *mixing))


def _measured(model: nn.Module, measure: Measure) -> list[tuple[str, str, float]]:
    """What ``measure`` says of the model, as (split, metric, value); the model is left as it was found."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = measure(model)
    finally:
        model.train(was_training)
    return [(split, name, float(value)) for split, part in found.items() for name, value in part.items()]


@contextmanager
def _one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


def _check(x: Tensor, labels: Tensor, seed: int) -> None:
    _check_seed(seed)
    if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) == 0 or x.shape[:1] != labels.shape:
        raise ValueError(
            f"x must be [n, ...] with int64 labels [n] and n > 0, got {list(x.shape)} and {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels must be at least 0, got {labels.min()}")
