"""Hundreds of logistic models at once: every setting of a sweep times every seed, by exact gradients and one Adam.

Three facts make it fast and keep it exact. The model is linear, so the logit of a mixed input is the mix of the logits:
mixed inputs are never formed, and Mixup costs no extra matrix product. All settings of a seed share its minibatches, so
their logits are one product ``W @ x_batch.T``. The gradient of the loss is known in closed form, so nothing is taped.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from labelaug.keys import description_key
from labelaug.mixing import PER, check_alpha
from labelaug.targets import check_smoothing

BETAS, EPS = (0.9, 0.999), 1e-8
# Each seed has one stream for each purpose, so that adding a setting, a record or a purpose leaves the others alone.
ORDER, PARTNER, LAM, INIT = range(4)


@dataclass(frozen=True)
class LinearSetting:
    """One row of a sweep: what is minimised, and by how much. Fields at zero or None switch their part off.

    Args: smoothing: ε of label smoothing, below 2; mixup_alpha: α of λ ~ Beta(α, α), None for no mixing;
        weight_decay: λ of the penalty (λ/2)‖w‖² in the loss; decoupled_decay: rate of AdamW's decay, which shrinks w
        by the factor 1 - lr·rate each step and does not pass through Adam's scaling; learning_rate: of Adam.
    """

    learning_rate: float
    smoothing: float = 0.0
    mixup_alpha: float | None = None
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0

    def __post_init__(self):
        check_smoothing(self.smoothing, 2)
        if self.mixup_alpha is not None:
            check_alpha(self.mixup_alpha)
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        for name in ("weight_decay", "decoupled_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")

    @property
    def key(self) -> str:
        """The name of this setting's results."""
        return description_key(self)


METHODS = ("weight decay", "label smoothing", "mixup")


def method_setting(method: str, strength: float, *, learning_rate: float) -> LinearSetting:
    """The setting of one method at one strength; strength 0 *is* ERM for each of them.

    Args: method: one of METHODS; strength: λ, ε or the α of Beta(α, α).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if strength < 0:
        raise ValueError(f"the strength of {method} must be at least 0, got {strength}")
    if strength == 0:
        return LinearSetting(learning_rate)
    name = {"weight decay": "weight_decay", "label smoothing": "smoothing", "mixup": "mixup_alpha"}[method]
    return LinearSetting(learning_rate, **{name: strength})


def strength_sweep(
    strengths: Mapping[str, Sequence[float]], *, learning_rate: float
) -> tuple[list[LinearSetting], pd.DataFrame]:
    """The settings of a sweep, each once, and the table ``method, strength, key`` plus their fields, one row a point.

    Strength 0 is ERM in every method: one setting, which stands in the table once for each method that includes it.

    Args: strengths: method -> strengths, both as in :func:`method_setting`.
    """
    points = [
        (method, float(value), method_setting(method, float(value), learning_rate=learning_rate))
        for method, values in strengths.items()
        for value in values
    ]
    table = pd.DataFrame([{"method": m, "strength": v, "key": s.key, **asdict(s)} for m, v, s in points])
    return list(dict.fromkeys(setting for _, _, setting in points)), table


@dataclass(frozen=True)
class LinearTraining:
    """How long and in what portions: shared by all settings of a sweep.

    Args: epochs; batch_size: examples a step (a smaller last batch is kept); record_epochs: epochs after which the
        weights are kept (None: only the last); lam_per: one λ per "batch" or per "example"; init_scale: weights start
        uniform on ±init_scale/√d, 1 being torch.nn.Linear's own start and 0 the origin.
    """

    epochs: int = 100
    batch_size: int = 500
    record_epochs: tuple[int, ...] | None = None
    lam_per: str = "batch"
    init_scale: float = 1.0

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if self.lam_per not in PER:
            raise ValueError(f"lam_per must be one of {PER}, got {self.lam_per!r}")
        records = self.records
        if not records or list(records) != sorted(set(records)) or not 1 <= records[0] <= records[-1] <= self.epochs:
            raise ValueError(f"record_epochs must increase within 1..{self.epochs}, got {self.record_epochs}")
        if not self.init_scale >= 0:
            raise ValueError(f"init_scale must be at least 0, got {self.init_scale}")

    @property
    def records(self) -> tuple[int, ...]:
        """The epochs after which weights are kept."""
        return (self.epochs,) if self.record_epochs is None else tuple(self.record_epochs)


@dataclass(frozen=True)
class LinearSweep:
    """What training leaves: ``weights [records, seeds, settings, d]`` after ``epochs [records]``."""

    weights: Tensor
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: tuple[LinearSetting, ...]
    steps_per_epoch: int

    def frame(self, *, split: str = "", **metrics: Tensor) -> pd.DataFrame:
        """Tidy rows ``key, seed, step, epoch, split, metric, value`` of metrics ``[records, seeds, settings]``.

        Args: split: what the metrics were measured on ("train", "test"); empty for those of the weights alone.
        """
        shape = self.weights.shape[:3]
        index = pd.MultiIndex.from_product([self.epochs, self.seeds, [s.key for s in self.settings]])
        points = index.to_frame(index=False, name=["epoch", "seed", "key"])
        points["step"] = points["epoch"] * self.steps_per_epoch
        rows = []
        for name, value in metrics.items():
            if value.shape != shape:
                raise ValueError(f"metric {name} must have shape {list(shape)}, got {list(value.shape)}")
            rows.append(points.assign(split=split, metric=name, value=value.reshape(-1).double().numpy()))
        return pd.concat(rows, ignore_index=True)[["key", "seed", "step", "epoch", "split", "metric", "value"]]


def train_linear(
    x: Tensor, labels: Tensor, settings: Sequence[LinearSetting], *, seeds: Sequence[int], training: LinearTraining
) -> LinearSweep:
    """Train one bias-free logistic model per seed and setting: minimise E ℓ(⟨w, z⟩, t) + (λ/2)‖w‖² by Adam.

    Member (seed, setting) sees the same numbers alone as in company: minibatch order, partner and start come from the
    seed's streams, and λ from a stream of the seed's that each setting reads from its beginning.

    Args: x: ``[n, d]`` shared by the seeds, or ``[seeds, n, d]``; its dtype is the dtype of training; labels: int64
        ``[n]`` or ``[seeds, n]`` in {0, 1}; settings: what differs between members; seeds: non-negative and different.
    Returns: LinearSweep with the weights after each epoch of ``training.records``.
    Raises: ValueError if shapes do not fit, x is not finite, labels are not binary, a class is empty, or nothing is to
        be trained.
    """
    settings, seeds = tuple(settings), tuple(seeds)
    _check(x, labels, settings, seeds)
    n = x.shape[-2]
    cores = torch.get_num_threads()
    units = _units(len(seeds), len(settings), cores, small=training.batch_size * x.shape[-1] < 50_000)

    def train_unit(unit):
        group, chosen = unit
        return _train(
            x if x.ndim == 2 else x[group.start : group.stop],
            labels if labels.ndim == 1 else labels[group.start : group.stop],
            [settings[i] for i in chosen],
            [seeds[i] for i in group],
            training,
        )

    weights = torch.empty(len(training.records), len(seeds), len(settings), x.shape[-1], dtype=x.dtype)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for (group, chosen), part in zip(units, pool.map(train_unit, units), strict=True):
                weights[:, group.start : group.stop, list(chosen)] = part
    finally:
        torch.set_num_threads(cores)
    return LinearSweep(weights, training.records, seeds, settings, -(-n // training.batch_size))


def _units(num_seeds: int, num_settings: int, cores: int, *, small: bool) -> list[tuple[range, range]]:
    """What one core trains at a time: (seeds, settings).

    Small problems are bound by the cost of a call: all at once. Large ones by memory: one seed at a time on each core,
    whose minibatch then stays in that core's cache between its two products, and cores never wait for each other.
    Seeds left over when the cores have shared the others are split by settings.
    """
    if small:
        return [(range(num_seeds), range(num_settings))]
    left = num_seeds % cores
    pieces = min(cores // left, num_settings) if left else 1
    whole = [(range(i, i + 1), range(num_settings)) for i in range(num_seeds - left)]
    split = [range(k, num_settings, pieces) for k in range(pieces)]
    return whole + [(range(i, i + 1), part) for i in range(num_seeds - left, num_seeds) for part in split]


def _train(x, labels, settings, seeds, training) -> Tensor:
    """Weights ``[records, seeds, settings, d]`` of one group of seeds."""
    n, d = x.shape[-2:]
    num_seeds, batch, dtype = len(seeds), min(training.batch_size, n), x.dtype
    # Settings that mix stand last, so that the mixing touches one contiguous block.
    order = sorted(range(len(settings)), key=lambda i: settings[i].mixup_alpha is not None)
    columns = [settings[i] for i in order]
    num_settings, plain = len(columns), sum(s.mixup_alpha is None for s in columns)

    def values(name):
        return torch.tensor([[getattr(s, name)] for s in columns], dtype=dtype)

    learning_rate, smoothing, penalty, decay = map(
        values, ("learning_rate", "smoothing", "weight_decay", "decoupled_decay")
    )
    shrink = 1 - learning_rate * decay
    penalised, decoupled = bool(penalty.any()), bool(decay.any())
    draws = _Draws(seeds, [s.mixup_alpha for s in columns[plain:]], n, batch, training, dtype)

    y = labels.to(dtype).expand(num_seeds, n)
    weight = draws.start(d, training.init_scale)[:, None, :].expand(num_seeds, num_settings, d).contiguous()
    first, second, gradient, scaled = (torch.zeros_like(weight) for _ in range(4))
    x_batch = torch.empty(num_seeds, batch, d, dtype=dtype)
    logits = torch.empty(num_seeds, num_settings, batch, dtype=dtype)
    records = torch.empty(len(training.records), num_seeds, num_settings, d, dtype=dtype)
    step = 0
    for epoch in range(1, training.epochs + 1):
        orders = draws.orders()
        for begin in range(0, n, batch):
            chosen = orders[:, begin : begin + batch]
            size = chosen.shape[1]
            xb = x_batch[:, :size]
            for s in range(num_seeds):
                torch.index_select(x if x.ndim == 2 else x[s], 0, chosen[s], out=xb[s])
            yb = y.gather(1, chosen)[:, None, :]
            z = logits if size == batch else logits.new_empty(num_seeds, num_settings, size)
            _matmul(weight, xb.transpose(1, 2), out=z)
            _residual_(z[:, :plain], yb, smoothing[:plain])
            if plain < num_settings:
                _mixed_residual_(z[:, plain:], yb, smoothing[plain:], *draws.mix(size))
            _matmul(z.div_(size), xb, out=gradient)
            if penalised:
                gradient.addcmul_(weight, penalty)
            if decoupled:
                weight.mul_(shrink)
            step += 1
            _adam_(weight, gradient, first, second, scaled, learning_rate, step)
        if epoch in training.records:
            records[training.records.index(epoch)][:, order] = weight
    return records


def _matmul(a, b, *, out) -> None:
    """Product of each seed's matrices; one seed alone goes to the faster plain product (1.2 against 1.6 ms)."""
    if len(a) == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)


def _residual_(z, y, smoothing) -> None:
    """Turn logits ``[seeds, settings, B]`` into d(sum of losses)/d(logits) = σ(z) - (1-ε)y - ε/2, in place."""
    z.sigmoid_().addcmul_(y, 1 - smoothing, value=-1).sub_(smoothing / 2)


def _mixed_residual_(z, y, smoothing, partner, inverse, lam, lam_inverse) -> None:
    """The same under Mixup: the logits and targets of the mixed inputs are the mixed logits and targets.

    With z' = λz + (1-λ)z_π, the loss at place i sends λ_i r_i back to example i and (1-λ_i) r_i to its partner.
    """
    residual = torch.lerp(_take(z, partner), z, lam)
    _residual_(residual, torch.lerp(_take(y, partner), y, lam), smoothing)
    torch.mul(_take(residual, inverse), 1 - lam_inverse, out=z)
    z.addcmul_(residual, lam)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values [seeds, m, B]`` at ``index [seeds, B]`` of the last axis."""
    return torch.stack([torch.index_select(v, 1, i) for v, i in zip(values, index, strict=True)])


def _adam_(weight, gradient, first, second, scaled, learning_rate, step) -> None:
    """One step of Adam (Kingma & Ba 2015) on all members; the learning rate differs by setting."""
    beta1, beta2 = BETAS
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    # m̂/(√v̂ + eps) = m·√(1-β₂ᵗ)/(1-β₁ᵗ) / (√v + eps·√(1-β₂ᵗ))
    correction = (1 - beta2**step) ** 0.5
    torch.sqrt(second, out=scaled)
    scaled.add_(EPS * correction)
    torch.div(first, scaled, out=scaled)
    weight.addcmul_(scaled, learning_rate, value=-correction / (1 - beta1**step))


class _Draws:
    """All randomness of a group of seeds, each purpose from its own stream of each seed."""

    def __init__(self, seeds, alphas, n, batch, training, dtype):
        self.n, self.dtype, self.per = n, dtype, training.lam_per
        self.order, self.partner, self.init = (
            [np.random.default_rng([seed, purpose]) for seed in seeds] for purpose in (ORDER, PARTNER, INIT)
        )
        self.alphas = alphas
        self.lam = [[np.random.default_rng([seed, LAM]) for _ in alphas] for seed in seeds]
        self.step, self.table = 0, None
        if self.per == "batch" and alphas:  # one number a step: all of them at once
            steps = training.epochs * -(-n // batch)
            table = [[rng.beta(a, a, size=steps) for rng, a in zip(rngs, alphas, strict=True)] for rngs in self.lam]
            self.table = torch.tensor(np.array(table), dtype=dtype)  # [seeds, mixing settings, steps]

    def start(self, d, scale) -> Tensor:
        bound = scale / d**0.5
        return torch.tensor(np.array([rng.uniform(-bound, bound, d) for rng in self.init]), dtype=self.dtype)

    def orders(self) -> Tensor:
        return torch.tensor(np.array([rng.permutation(self.n) for rng in self.order]))

    def mix(self, size):
        """partner and its inverse ``[seeds, B]``; λ ``[seeds, mixing settings, 1 or B]``, and λ of the inverse."""
        partner = torch.tensor(np.array([rng.permutation(size) for rng in self.partner]))
        inverse = torch.empty_like(partner).scatter_(1, partner, torch.arange(size).expand_as(partner))
        if self.per == "batch":
            lam = self.table[:, :, self.step, None]
            self.step += 1
            return partner, inverse, lam, lam
        drawn = [[rng.beta(a, a, size=size) for rng, a in zip(rngs, self.alphas, strict=True)] for rngs in self.lam]
        lam = torch.tensor(np.array(drawn), dtype=self.dtype)
        return partner, inverse, lam, _take(lam, inverse)


def _check(x, labels, settings, seeds) -> None:
    if not settings or not seeds:
        raise ValueError(f"nothing to train: {len(settings)} settings and {len(seeds)} seeds")
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different and at least 0, got {list(seeds)}")
    if x.ndim not in (2, 3) or (x.ndim == 3 and len(x) != len(seeds)):
        raise ValueError(f"x must be [n, d] or [{len(seeds)} seeds, n, d], got {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"x must be finite, and {int((~x.isfinite()).sum())} of its {x.numel()} values are not")
    if labels.shape not in (x.shape[-2:-1], (len(seeds), x.shape[-2])):
        raise ValueError(f"labels must be [n] or [seeds, n] with n = {x.shape[-2]}, got {list(labels.shape)}")
    for row in labels.reshape(-1, labels.shape[-1]):
        classes = row.unique().tolist()
        if classes != [0, 1]:
            raise ValueError(f"labels must hold both classes 0 and 1, got {classes[:5]}: is a class empty?")
