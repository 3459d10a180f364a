"""One trial: one model, one setting, one seed, on whatever device the data are.

What is trained is plain: minibatches in a random order, augmented, smoothed and mixed as the setting says, torch's own
optimiser. What is measured is the caller's affair and cannot touch the training: a model is measured in eval mode,
without gradients, on a copy of torch's random state.

Every random number comes from a stream of its own purpose and epoch, so that an epoch can be repeated alone: a trial
that goes on from a checkpoint gives the curve of one that was never stopped (bit for bit on a CPU). Images stay uint8
on the device, where they are gathered and augmented; a record is the only place that waits for the device.
On a CPU a trial keeps to one core, so that its numbers do not depend on how many there are; many trials share cores, or
a GPU, as processes.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from labelaug.keys import description_key
from labelaug.losses import soft_cross_entropy, squared_error
from labelaug.methods import ERM, Draw, Erm, Mixup
from labelaug.targets import check_smoothing, smooth_targets
from labelaug.training.linear import INIT, LAM, ORDER, PARTNER

AUGMENTATION = 5  # purpose of the stream of crops and flips, beside those of training.linear
OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
LOSSES = {"cross-entropy": soft_cross_entropy, "squared-error": squared_error}
PRECISIONS = ("float32", "bfloat16")
AUGMENTATIONS = ("none", "crop-flip")
LABELS = ("data", "teacher")
PADDING = 4  # of the crop, in pixels
COLUMNS = ["key", "seed", "step", "epoch", "split", "metric", "value"]
Measure = Callable[[nn.Module], Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class DeepSetting:
    """What is minimised, how, and for how long. Parts at their default are switched off.

    Args: learning_rate: at the start; epochs; batch_size: examples a step (a smaller last batch is kept);
        method: what is done to a minibatch (labelaug.methods); switch_epoch: the method is left for ERM after so many
        epochs (0: never used; None: never left); labels: "data", or "teacher" for those that a teacher gives at the
        very inputs the model sees; smoothing: ε in units of probability, below K/(K-1), negative allowed;
        loss: "cross-entropy" to soft targets, or "squared-error" of the outputs to them;
        augmentation: "crop-flip" pads images with 4 black pixels, crops them back at random and flips every other;
        optimiser: "adam" or "sgd" with momentum; milestones: epochs after which the learning rate is multiplied by
        decay; weight_decay: λ of the penalty (λ/2)‖θ‖² in the loss over *all* parameters, biases and normalisation too,
        as torch's optimisers have it (not AdamW's); precision: "float32", or "bfloat16" for torch's autocast;
        record_epochs: epochs after which the model is measured, 0 being before the first step (None: only the last).
    """

    learning_rate: float
    epochs: int
    batch_size: int
    method: Erm | Mixup = ERM
    switch_epoch: int | None = None
    labels: str = "data"
    smoothing: float = 0.0
    loss: str = "cross-entropy"
    augmentation: str = "none"
    optimiser: str = "adam"
    momentum: float = 0.0
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    weight_decay: float = 0.0
    precision: str = "float32"
    record_epochs: tuple[int, ...] | None = None

    def __post_init__(self):
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {tuple(known)}, got {getattr(self, name)!r}")
        if self.switch_epoch is not None and not 0 <= self.switch_epoch <= self.epochs:
            raise ValueError(f"switch_epoch must lie in 0..{self.epochs}, got {self.switch_epoch}")
        check_smoothing(self.smoothing, 2)
        if self.labels == "teacher" and (self.smoothing != 0 or not getattr(self.method, "inputs", True)):
            raise ValueError("a teacher's labels are neither smoothed nor mixed: smoothing and inputs=False do nothing")
        if not 0 <= self.momentum < 1 or (self.momentum > 0 and self.optimiser != "sgd"):
            raise ValueError(f"momentum must lie in [0, 1) and belongs to sgd, got {self.momentum}, {self.optimiser}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if not 0 < self.decay <= 1 or not _increase(self.milestones, 1, self.epochs):
            raise ValueError(f"milestones must increase within 1..{self.epochs} and decay lie in (0, 1]")
        if not self.records or not _increase(self.records, 0, self.epochs):
            raise ValueError(f"record_epochs must increase within 0..{self.epochs}, got {self.record_epochs}")

    @property
    def records(self) -> tuple[int, ...]:
        """The epochs after which the model is measured."""
        return (self.epochs,) if self.record_epochs is None else tuple(self.record_epochs)

    @property
    def key(self) -> str:
        """The name of this setting's results."""
        return description_key(self)

    @property
    def has_floor(self) -> bool:
        """Whether the loss has the entropy of the targets as its floor."""
        return self.loss == "cross-entropy" and self.smoothing >= 0

    def method_at(self, epoch: int) -> Erm | Mixup:
        """The method of the epoch that follows ``epoch`` whole ones."""
        switched = self.switch_epoch is not None and epoch >= self.switch_epoch
        return ERM if switched else self.method

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate of the epoch that follows ``epoch`` whole ones."""
        return self.learning_rate * self.decay ** sum(epoch >= milestone for milestone in self.milestones)


_CHOICES = {
    "optimiser": OPTIMISERS,
    "loss": LOSSES,
    "precision": PRECISIONS,
    "augmentation": AUGMENTATIONS,
    "labels": LABELS,
}


def init_generator(seed: int) -> torch.Generator:
    """The stream from which seed ``seed`` draws its start; apart from those of order, partner and λ."""
    _check_seed(seed)
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, INIT]).generate_state(1)[0]))


def train(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    setting: DeepSetting,
    seed: int,
    measure: Measure,
    teacher: Callable[[Tensor], Tensor] | None = None,
    compiled: bool = False,
    resume: dict | None = None,
    after_epoch: Callable[[int, Callable[[], dict]], None] = lambda epoch, state: None,
) -> pd.DataFrame:
    """Train ``model`` in place: minimise E[loss(f(x), q)] + (λ/2)‖θ‖² over minibatches, q the setting's targets.

    After every epoch the means over it of the training loss and of its floor, the entropy of the targets, are rows
    ("train", "running_loss" and "running_floor"; nats; no floor for squared error). A run whose loss or parameters stop
    being finite ends with the last epoch that was whole. Its last row, as that of every run, is the metric "diverged"
    of the split "train": 1 for such a run, else 0. A measured value that is not finite has no row, and is warned of.

    Args: model: ``[B, ...] -> [B, K]`` outputs; x: ``[n, ...]``, its dtype that of the model, or uint8 images
        ``[n, C, H, W]``, which the model gets as float32 in 0..255; labels: int64 ``[n]`` in 0..K-1; both on the
        model's device; seed: at least 0, of the streams of order, partner, λ and augmentation (the model brings its own
        start, see :func:`init_generator`); measure: from the model to ``{split: {metric: value}}``; teacher: from
        inputs as the model gets them to probabilities ``[B, K]``, for labels="teacher"; compiled: full minibatches go
        through torch.compile, with CUDA graphs on a GPU (torch's TORCH_COMPILE_DISABLE=1 switches it off); resume: a
        state that ``after_epoch`` was offered; after_epoch: gets the number of whole epochs and a function that
        returns the state, plain tensors and numbers.
    Returns: rows ``key, seed, step, epoch, split, metric, value``, step and epoch counting those made.
    Raises: ValueError if shapes, labels, the seed or the smoothing do not fit, x is not finite, a teacher is missing or
        idle, or the model cannot be trained on the last minibatch.
    """
    _check(x, labels, setting, seed, teacher)
    check_last_batch(model, x, setting.batch_size)
    with one_core(x.device), _exact_convolutions(x.device):
        rows = _Run(model, x, labels, setting, seed, measure, teacher, compiled).rows(resume, after_epoch)
    frame = pd.DataFrame(rows, columns=COLUMNS[2:])
    return frame.assign(key=setting.key, seed=seed)[COLUMNS]


class _Run:
    """The state of one trial, and its epochs."""

    def __init__(self, model, x, labels, setting, seed, measure, teacher, compiled):
        self.model, self.setting, self.seed, self.measure, self.teacher = model, setting, seed, measure, teacher
        self.forward = partial(_compiled_forward(x.device.type), model) if compiled else model
        self.captured = compiled and x.device.type == "cuda"
        self.x = x.permute(0, 2, 3, 1).contiguous() if x.dtype == torch.uint8 else x
        self.labels, self.device, self.n = labels, x.device, len(x)
        self.num_classes = _num_classes(model, x, labels)
        options = {"momentum": setting.momentum} if setting.optimiser == "sgd" else {}
        self.optimiser = OPTIMISERS[setting.optimiser](
            model.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay, fused=True, **options
        )
        self.step = self.epoch = 0
        self.found: list[tuple] = []

    def rows(self, resume: dict | None, after_epoch) -> list[tuple]:
        """Rows ``step, epoch, split, metric, value``."""
        finite = True
        if resume is None:
            finite = self.record([])
        else:
            self.restore(resume)
        self.model.train()
        while finite and self.epoch < self.setting.epochs:
            finite = self.train_epoch()
            if finite:
                after_epoch(self.epoch, self.state)
        return [*self.found, (self.step, self.epoch, "train", "diverged", float(not finite))]

    def train_epoch(self) -> bool:
        """One pass and its record; False if it has diverged. Nothing waits for the device before the pass is done."""
        setting, method = self.setting, self.setting.method_at(self.epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = setting.learning_rate_at(self.epoch)
        sums, steps = torch.zeros(2, dtype=torch.float64, device=self.device), 0
        for x, labels, draw in self.minibatches(method):
            whole = len(x) == setting.batch_size  # a smaller last minibatch is not worth a graph of its own
            if self.captured and whole:
                torch.compiler.cudagraph_mark_step_begin()
            forward = self.forward if whole else self.model
            targets = smooth_targets(labels, self.num_classes, smoothing=setting.smoothing, dtype=x.dtype)
            loss, floor = minibatch_loss(forward, self.teacher, x, targets, draw, method=method, setting=setting)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            sums += torch.stack([loss.detach(), floor]).to(sums.dtype) * (len(x) / self.n)
            steps += 1
        running = dict(zip(("running_loss", "running_floor"), sums.tolist(), strict=True))
        if not setting.has_floor:
            del running["running_floor"]
        self.epoch, self.step = self.epoch + 1, self.step + steps
        if self.record([("train", name, value) for name, value in running.items()]):
            return True
        self.epoch, self.step = self.epoch - 1, self.step - steps
        return False

    def minibatches(self, method):
        """Float inputs, labels and the method's draw, on the device, for each minibatch of the coming epoch."""
        rng = {
            purpose: np.random.default_rng([self.seed, purpose, self.epoch])
            for purpose in (ORDER, PARTNER, LAM, AUGMENTATION)
        }
        parts = torch.from_numpy(rng[ORDER].permutation(self.n)).to(self.device).split(self.setting.batch_size)
        draws = [method.draw(len(part), lam_rng=rng[LAM], partner_rng=rng[PARTNER]) for part in parts]
        draws = _moved(draws, self.device)
        moves = [None] * len(parts)
        if self.setting.augmentation == "crop-flip":
            moves = draw_moves(self.n, rng=rng[AUGMENTATION]).to(self.device).split(self.setting.batch_size)
        for chosen, draw, move in zip(parts, draws, moves, strict=True):
            yield gather(self.x, chosen, move), self.labels[chosen], draw

    def record(self, running: list[tuple]) -> bool:
        """Add the rows of this epoch and True; or nothing and False, if the run has diverged."""
        if not all(np.isfinite(value) for *_, value in running):
            return False
        if not bool(torch.stack([p.detach().isfinite().all() for p in self.model.parameters()]).all()):
            return False
        found = _measured(self.model, self.measure, self.device) if self.epoch in self.setting.records else []
        for split, name, value in [*running, *found]:
            if np.isfinite(value):
                self.found.append((self.step, self.epoch, split, name, value))
            else:
                warnings.warn(f"epoch {self.epoch}: {name} on {split} is {value} and has no row", stacklevel=2)
        return True

    def state(self) -> dict:
        """What a checkpoint holds: to be saved at once, since the next step changes its tensors and rows."""
        return {
            "key": self.setting.key,
            "seed": self.seed,
            "epoch": self.epoch,
            "step": self.step,
            "rows": self.found,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def restore(self, state: dict) -> None:
        if (state["key"], state["seed"]) != (self.setting.key, self.seed):
            raise ValueError(f"the state is that of setting {state['key']}, seed {state['seed']}")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.found = [tuple(row) for row in state["rows"]]


def minibatch_loss(
    model: Callable[[Tensor], Tensor],
    teacher: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    targets: Tensor,
    draw: Draw,
    *,
    method: Erm | Mixup,
    setting: DeepSetting,
) -> tuple[Tensor, Tensor]:
    """The loss of a minibatch, with its graph, and its floor (0 where it has none), in nats: ``[], []``.

    Args: teacher: gives the targets at the inputs of the model, None leaving those of the data; x: ``[B, ...]`` floats;
        targets: ``[B, K]``, smoothed; draw: what ``method.draw`` drew.
    """

    def label(inputs: Tensor, mixed: Tensor) -> Tensor:
        if teacher is None:
            return mixed
        with torch.no_grad():
            return teacher(inputs).to(mixed.dtype)

    with autocast(setting.precision, x.device):
        terms = method.terms(model, label, x, targets, draw)
    loss = floor = torch.zeros((), dtype=x.dtype, device=x.device)
    for outputs, wanted, weight in terms:
        loss = loss + weight * LOSSES[setting.loss](outputs.to(x.dtype), wanted)
        if setting.has_floor:
            floor = floor - weight * torch.special.xlogy(wanted, wanted).sum(-1).mean()
    return loss, floor


def draw_moves(n: int, *, rng: np.random.Generator) -> Tensor:
    """Offsets of the crop in 0..2·PADDING along height and width, and the flip in {0, 1}: int64 ``[n, 3]``."""
    return torch.from_numpy(rng.integers(0, (2 * PADDING + 1, 2 * PADDING + 1, 2), size=(n, 3)))


def gather(x: Tensor, chosen: Tensor, moves: Tensor | None = None) -> Tensor:
    """The chosen examples as the model gets them: uint8 ``[n, H, W, C]`` -> float32 ``[B, C, H, W]``, channels last.

    Args: x: uint8 images, or any ``[n, ...]`` of floats, which are returned as they are; chosen: int64 ``[B]``;
        moves: int64 ``[B, 3]`` of :func:`draw_moves`: crops of the image with PADDING black pixels around, flips.
    """
    if x.dtype != torch.uint8:
        return x[chosen]
    if moves is None:
        return x[chosen].permute(0, 3, 1, 2).float()
    height, width = x.shape[1:3]
    rows = moves[:, :1] - PADDING + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(len(chosen), -1)
    columns = torch.where(moves[:, 2:] == 1, width - 1 - columns, columns) + moves[:, 1:2] - PADDING
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    pixels = x[chosen[:, None, None], rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return (pixels * inside[..., None]).permute(0, 3, 1, 2).float()


def autocast(precision: str, device: torch.device):
    """torch's autocast to bfloat16 on this device, or nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def _moved(draws: Sequence[Draw], device: torch.device) -> list[Draw]:
    """The draws of all minibatches on the device, in one copy for each of their members."""
    members = []
    for parts in zip(*draws, strict=True):
        flat = torch.cat([part.reshape(-1) for part in parts]).to(device)
        pieces = flat.split([part.numel() for part in parts])
        members.append([piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)])
    return list(zip(*members, strict=True)) if members else list(draws)


@contextmanager
def left_as_found(model: nn.Module, device: torch.device):
    """After the block the model's buffers, each layer's mode and torch's random state are what they were before it."""
    modes = [(layer, layer.training) for layer in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for layer, mode in modes:
            layer.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def one_core(device: torch.device):
    """One thread for work on a CPU, given back afterwards; nothing for other devices."""
    if device.type != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _exact_convolutions(device: torch.device):
    """On a GPU cuDNN's fastest algorithm for each shape, and float32 that is float32, not TF32."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


def _forward(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs)


@cache
def _compiled_forward(kind: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Compiled once for all models of one architecture and input shape: parameters are arguments of the graph."""
    return torch.compile(_forward, mode="reduce-overhead" if kind == "cuda" else "default", dynamic=False)


def _num_classes(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    """The number K of the model's outputs, which must be more than the largest label."""
    chosen = torch.zeros(1, dtype=torch.int64, device=x.device)
    first = x[:1].float() if x.dtype == torch.uint8 else x[chosen]
    shape = []
    _measured(model, lambda model: shape.extend(model(first).shape) or {}, x.device)
    if len(shape) != 2 or shape[0] != 1 or shape[1] <= labels.max():
        raise ValueError(f"the model must give logits [1, K > {labels.max()}], got {shape}")
    return shape[1]


def check_last_batch(model: nn.Module, x: Tensor, batch_size: int) -> None:
    """Raise ValueError if some minibatch has one example and the model refuses such a one in training mode.

    Batch normalisation does where the feature map is a single pixel: the variance of one value a channel is no scale.
    Args: x: as in :func:`train`. The model is tried on a copy.
    """
    if (len(x) % batch_size or min(batch_size, len(x))) > 1:
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        try:
            copy.deepcopy(model).train()(x[:1].float() if x.dtype == torch.uint8 else x[:1])
        except ValueError as error:
            raise ValueError(
                f"{len(x)} examples in minibatches of {batch_size} leave a minibatch of one, on which the model cannot "
                f"be trained ({error}): choose another batch_size"
            ) from error


def _measured(model: nn.Module, measure: Measure, device: torch.device) -> list[tuple[str, str, float]]:
    """What ``measure`` says of the model, as (split, metric, value); the model is left as it was found."""
    with torch.no_grad(), left_as_found(model, device):
        found = measure(model.eval())
    return [(split, name, float(value)) for split, part in found.items() for name, value in part.items()]


def _increase(numbers: Sequence[int], least: int, most: int) -> bool:
    """Whether the numbers increase strictly within least..most."""
    return all(least <= number <= most for number in numbers) and list(numbers) == sorted(set(numbers))


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


def _check(x: Tensor, labels: Tensor, setting: DeepSetting, seed: int, teacher) -> None:
    _check_seed(seed)
    if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) == 0 or x.shape[:1] != labels.shape:
        raise ValueError(
            f"x must be [n, ...] with int64 labels [n] and n > 0, got {list(x.shape)} and {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels must be at least 0, got {labels.min()}")
    if not (x.is_floating_point() or (x.dtype == torch.uint8 and x.ndim == 4)):
        raise ValueError(f"x must be floats or uint8 images [n, C, H, W], got {x.dtype} {list(x.shape)}")
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError(f"x must be finite, and {int((~x.isfinite()).sum())} of its {x.numel()} values are not")
    if setting.augmentation != "none" and x.dtype != torch.uint8:
        raise ValueError(f"crop-flip needs uint8 images [n, C, H, W], got {x.dtype} {list(x.shape)}")
    if (setting.labels == "teacher") != (teacher is not None):
        raise ValueError(f"labels={setting.labels!r} and {'a' if teacher else 'no'} teacher do not fit")
