"""A trial: the frozen description of one training on images, its name, and how it is run."""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from labelaug import models
from labelaug.data.images import DataMissing, ImageSet, is_there, load_images
from labelaug.data.plant import plant_entry
from labelaug.keys import description_key
from labelaug.measure import calibration_error, class_error, outputs_and_activations, relative_variance
from labelaug.measure import within_class_variance as variance
from labelaug.targets import one_hot_targets
from labelaug.training.deep import (
    COLUMNS,
    LOSSES,
    DeepSetting,
    autocast,
    check_last_batch,
    gather,
    init_generator,
    one_core,
    train,
)
from labelaug.training.gradients import gradient_norms

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "vgg16", "mlp")
SUBSET, RANDOM_LABELS = 7, 8  # purposes of the streams of a trial's data, beside those of training
EVALUATION_BATCH = 500
COMPILED_STEPS = 5_000  # half a minute to a minute of compiling, at ten milliseconds gained a step or a little less


class TrialRefused(ValueError):
    """A trial that cannot be honoured."""


class Stopped(Exception):
    """Raised by whoever watches a trial, to stop it after its checkpoint."""


@dataclass(frozen=True)
class Images:
    """Which images are trained on, and what is done to them before.

    Args: name: of the set (labelaug.data.images); classes: names of those kept, in the order of their new labels (none:
        all); fraction: of the training images of the smallest class, as many from every class, chosen by ``seed``, a
        smaller fraction being part of every larger one (1: all images, as they are); validation, test: images a class
        that are held out of the training part, none of them trained on, and of the test part (0: no validation, all
        test images); side: images are averaged over blocks to so many pixels a side; random_labels: share of the
        training images whose label is redrawn uniformly from all classes; planted: γ of the entry that identifies the
        class in two-class training images, in standard deviations of its channel (0: none).
    """

    name: str
    classes: tuple[str, ...] = ()
    fraction: float = 1.0
    validation: int = 0
    test: int = 0
    side: int | None = None
    random_labels: float = 0.0
    planted: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.fraction <= 1 or not 0 <= self.random_labels <= 1:
            raise ValueError(f"fraction must lie in (0, 1], random_labels in [0, 1], got {self}")
        if min(self.validation, self.test, self.seed) < 0 or self.planted < 0:
            raise ValueError(f"validation, test, planted and seed must be at least 0, got {self}")
        if self.side is not None and self.side < 1:
            raise ValueError(f"side must be at least 1, got {self.side}")


@dataclass(frozen=True)
class Network:
    """An architecture of labelaug.models and the channels of its first stage (of an MLP: of its two hidden layers)."""

    architecture: str = "resnet18"
    width: int = 64

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {self.architecture!r}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


@dataclass(frozen=True)
class Trial:
    """One training, from data to measurements. Its key names its result: the same trial is never run twice.

    Args: seed: of the start of the network and of every draw of the training; teacher: the trial whose network labels
        the inputs, where setting.labels is "teacher"; gradient_epochs: those of the record epochs at which norms of
        gradients are measured too, over ``gradient_draws`` minibatches of the objective.
    """

    images: Images
    network: Network
    setting: DeepSetting
    seed: int
    teacher: "Trial | None" = None
    gradient_epochs: tuple[int, ...] = ()
    gradient_draws: int = 64

    def __post_init__(self):
        if (self.teacher is not None) != (self.setting.labels == "teacher"):
            raise ValueError(f"labels={self.setting.labels!r} and {'a' if self.teacher else 'no'} teacher do not fit")
        if not set(self.gradient_epochs) <= set(self.setting.records):
            raise ValueError(f"gradient_epochs {self.gradient_epochs} must be among {self.setting.records}")

    @property
    def key(self) -> str:
        """The name of this trial's result."""
        return description_key(self)

    @property
    def label(self) -> str:
        """A few words for a line of progress."""
        parts = [
            self.images.name,
            f"{self.images.fraction:.3g}",
            f"{self.network.architecture}-{self.network.width}",
            str(self.setting.method),
            *([f"smoothing {self.setting.smoothing:g}"] if self.setting.smoothing else []),
            *([f"until {self.setting.switch_epoch}"] if self.setting.switch_epoch is not None else []),
            *(["teacher's labels"] if self.teacher else []),
            *([f"{self.images.random_labels:.0%} random"] if self.images.random_labels else []),
            *([f"planted {self.images.planted:g}"] if self.images.planted else []),
            f"seed {self.seed}",
        ]
        return " ".join(parts)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A trial's data on its device: x uint8 (or, with a planted entry, float32) ``[n, C, H, W]``, labels ``[n]``.

    ``parts``: train, test and, where asked for, validation; mean and std, of a channel over the training images.
    """

    parts: dict[str, tuple[Tensor, Tensor]]
    num_classes: int
    mean: Tensor
    std: Tensor


def check_trial(trial: Trial, *, data_dir: Path, device: str) -> None:
    """Raise TrialRefused, in one sentence, if the trial cannot be honoured here; trains nothing and reads no images."""
    if not is_there(trial.images.name, data_dir):
        raise TrialRefused(
            f"trial {trial.key} needs the image set {trial.images.name!r}, which is not in {data_dir}: get it with "
            f"`labelaug data {trial.images.name}` or point --data-dir at it"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise TrialRefused("this torch finds no GPU: use --device cpu")
    if device == "cuda" and trial.setting.precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise TrialRefused(f"trial {trial.key} asks for bfloat16, which {torch.cuda.get_device_name()} does not have")
    if trial.teacher is not None:
        check_trial(trial.teacher, data_dir=data_dir, device=device)


def run_trial(
    trial: Trial,
    *,
    data_dir: Path,
    device: str = "cpu",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Callable[[int], None] = lambda epoch: None,
    keep: Callable[[pd.DataFrame], None] = lambda rows: None,
) -> pd.DataFrame:
    """Run one trial and return its rows ``key, seed, step, epoch, split, metric, value``.

    Splits are train, test and, where asked for, validation, each with loss (nats), error, calibration_error,
    activation_variance and relative_variance (within classes, and within over between, of what enters the last layer)
    and output_variance (of the probabilities, within classes); "train" has the rows of the trainer and of
    :func:`~labelaug.training.gradients.gradient_norms` too, "teacher" those of a teacher. The last row but one,
    ("train", "seconds"), is the wall time of all pieces of the trial.

    Args: checkpoint: where the state is kept, at least ``checkpoint_seconds`` apart and always before Stopped leaves;
        a file of the same trial is gone on from, and one that is damaged or of another trial is told of and ignored;
        progress: called with the number of whole epochs; what it raises stops the trial; keep: called with the rows so
        far, ("train", "seconds") being the last, as often as the state is kept and right after it.
    Raises: TrialRefused; Stopped, from ``progress``.
    """
    check_trial(trial, data_dir=data_dir, device=device)
    began = time.perf_counter()
    data = prepare(trial.images, data_dir=data_dir, device=device)
    with one_core(torch.device(device)):
        model = _build(trial, data)  # before a teacher is trained, so that what cannot be built costs nothing
        teacher = _teacher(trial, data_dir, device, checkpoint, checkpoint_seconds, progress)
        state = _load(checkpoint, trial.key)
        before = state["seconds"] if state else 0.0
        done = state["epoch"] if state else -1
        epochs = iter([epoch for epoch in trial.setting.records if epoch > done])

        def measure(model: nn.Module) -> dict:
            return _measure(model, data, trial, next(epochs), teacher)

        frame = train(
            model,
            *data.parts["train"],
            setting=trial.setting,
            seed=trial.seed,
            measure=measure,
            teacher=teacher,
            compiled=_pays(trial.setting, len(data.parts["train"][0]), device),
            resume=state,
            after_epoch=_keeper(checkpoint, trial, checkpoint_seconds, progress, began - before, keep),
        )
    frame = frame.assign(key=trial.key)
    last = frame.iloc[[-1]]
    seconds = last.assign(metric="seconds", value=before + time.perf_counter() - began)
    return pd.concat([frame.iloc[:-1], seconds, last], ignore_index=True)


def prepare(images: Images, *, data_dir: Path, device: str) -> Prepared:
    """Choose, average, relabel and plant as the description says, and move the data to the device.

    Raises: TrialRefused if the set is missing or does not have what is asked for.
    """
    try:
        source = _load_set(images.name, Path(data_dir))
        return _prepared(images, source, device)
    except (DataMissing, ValueError) as error:
        raise TrialRefused(str(error)) from None


@cache
def _load_set(name: str, data_dir: Path) -> ImageSet:
    return load_images(name, data_dir)


def _prepared(images: Images, source: ImageSet, device: str) -> Prepared:
    wanted = images.classes or source.classes
    unknown = [name for name in wanted if name not in source.classes]
    if unknown or len(wanted) < 2:
        raise ValueError(f"{images.name} needs two or more of its classes, got {wanted}")
    rng = {split: np.random.default_rng([images.seed, SUBSET, index]) for index, split in enumerate(("train", "test"))}
    members = {
        split: [rng[split].permutation(np.flatnonzero(y == source.classes.index(name))) for name in wanted]
        for split, y in (("train", source.y_train), ("test", source.y_test))
    }
    smallest = min(map(len, members["train"]))
    per_class = None if images.fraction == 1 else round(images.fraction * smallest)
    left = smallest - (smallest if per_class is None else per_class)
    if per_class == 0 or images.validation > left or images.test > min(map(len, members["test"])):
        raise ValueError(
            f"{images.name} has {smallest} training images in its smallest class: {per_class or 'all'} to train on, "
            f"{images.validation} to validate and {images.test} to test on cannot be had"
        )
    held_out = images.validation or None
    picked = {"train": [part[:per_class] for part in members["train"]]}
    picked["test"] = [part[: images.test or None] for part in members["test"]]
    if held_out:
        picked["validation"] = [part[-held_out:] for part in members["train"]]
    parts = {}
    for split, chosen in picked.items():
        pixels = source.x_test if split == "test" else source.x_train
        labels = np.repeat(np.arange(len(wanted)), [len(part) for part in chosen])
        if split == "train" and images.random_labels:
            labels = _randomised(labels, images, len(wanted))
        parts[split] = _averaged(pixels[np.concatenate(chosen)], images.side), torch.from_numpy(labels)
    pixels = parts["train"][0].double()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    if not bool((std > 0).all()):
        raise ValueError(f"a channel of {images.name} is constant: it cannot be standardised")
    if images.planted:
        scale = (slice(None), None, None)
        x, labels = parts["train"]
        planted = plant_entry((x.double() - mean[scale]) / std[scale], labels, gamma=images.planted)
        parts["train"] = (planted * std[scale] + mean[scale]).float(), labels
    parts = {split: (x.to(device), labels.to(device)) for split, (x, labels) in parts.items()}
    return Prepared(parts, len(wanted), mean.float().to(device), std.float().to(device))


def _randomised(labels: np.ndarray, images: Images, num_classes: int) -> np.ndarray:
    """A share of the labels, redrawn; the images of a smaller share are among those of a larger one."""
    rng = np.random.default_rng([images.seed, RANDOM_LABELS])
    chosen = rng.permutation(len(labels))[: round(images.random_labels * len(labels))]
    drawn = rng.integers(num_classes, size=len(labels))
    labels = labels.copy()
    labels[chosen] = drawn[chosen]
    return labels


def _averaged(x: np.ndarray, side: int | None) -> Tensor:
    """uint8 ``[n, H, W, C]`` -> uint8 ``[n, C, side, side]``, block means rounded to the nearest integer."""
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
    if side is None:
        return images
    block = images.shape[2] // side
    if images.shape[2] != images.shape[3] or block * side != images.shape[2]:
        raise ValueError(f"images of {images.shape[2]}×{images.shape[3]} pixels cannot be averaged to side {side}")
    return F.avg_pool2d(images.float(), block).round().to(torch.uint8)


def _pays(setting: DeepSetting, n: int, device: str) -> bool:
    """Whether compiling is worth its time: on a GPU, for a training of COMPILED_STEPS full minibatches or more."""
    return device == "cuda" and n // setting.batch_size * setting.epochs >= COMPILED_STEPS


class Standardised(nn.Module):
    """(x - mean)/std per channel, then the network."""

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


def _build(trial: Trial, data: Prepared) -> nn.Module:
    """The trial's network with its start, on the device of the data: from pixels in 0..255 to ``[n, K]``.

    Raises: TrialRefused if it cannot take images of this size, or be trained on the last minibatch.
    """
    kind, width = trial.network.architecture, trial.network.width
    x, generator = data.parts["train"][0], init_generator(trial.seed)
    channels, height, side = x.shape[1:]
    if kind == "mlp":
        flat = models.mlp(channels * height * side, (width, width), data.num_classes, generator=generator)
        network: nn.Module = nn.Sequential(nn.Flatten(), flat)
    elif kind == "vgg16":
        if min(height, side) < 32:
            raise TrialRefused(f"vgg16 needs images of 32×32 pixels or more, got {height}×{side}")
        network = models.vgg16(channels, data.num_classes, width=width, generator=generator)
    else:
        depth = int(kind.removeprefix("resnet"))
        network = models.resnet(depth, channels, data.num_classes, width=width, generator=generator)
    model = Standardised(network, data.mean, data.std).to(device=x.device, memory_format=torch.channels_last)
    try:
        check_last_batch(model, x, trial.setting.batch_size)
    except ValueError as error:
        raise TrialRefused(f"trial {trial.key}: {error}") from None
    return model


def _measure(model: nn.Module, data: Prepared, trial: Trial, epoch: int, teacher) -> dict[str, dict[str, float]]:
    """One record."""
    setting, found = trial.setting, {}
    for split, (x, labels) in data.parts.items():
        found[split] = _evaluated(model, x, labels, data.num_classes, setting)
        if split == "train" and epoch in trial.gradient_epochs:
            found[split] |= gradient_norms(
                model,
                x,
                labels,
                num_classes=data.num_classes,
                setting=setting,
                seed=trial.seed,
                epoch=epoch,
                draws=trial.gradient_draws,
                teacher=teacher,
            )
        if teacher is not None and epoch == setting.records[-1]:
            entries = _evaluated(teacher.network, x, labels, data.num_classes, trial.teacher.setting)
            found.setdefault("teacher", {}).update({f"{split}_{name}": value for name, value in entries.items()})
    return found


def _evaluated(model: nn.Module, x: Tensor, labels: Tensor, num_classes: int, setting: DeepSetting) -> dict[str, float]:
    base = x.permute(0, 2, 3, 1) if x.dtype == torch.uint8 else x
    indices = torch.arange(len(x), device=x.device).split(EVALUATION_BATCH)
    with autocast(setting.precision, x.device):
        outputs, activations = outputs_and_activations(model, (gather(base, chosen) for chosen in indices))
    outputs, activations = outputs.double(), activations.double()
    is_probability = setting.loss == "cross-entropy"
    found = {
        "loss": LOSSES[setting.loss](outputs, one_hot_targets(labels, num_classes, dtype=outputs.dtype)),
        "error": class_error(outputs, labels),
        "activation_variance": variance(activations, labels),
        "relative_variance": relative_variance(activations, labels),
        "output_variance": variance(outputs.softmax(-1) if is_probability else outputs, labels),
    }
    if is_probability:
        found["calibration_error"] = calibration_error(outputs, labels)
    return {name: float(value) for name, value in found.items()}


class _Teacher:
    """Probabilities of a trained network, at the inputs as the student gets them."""

    def __init__(self, network: nn.Module, precision: str):
        self.network, self.precision = network.eval().requires_grad_(False), precision

    def __call__(self, inputs: Tensor) -> Tensor:
        with autocast(self.precision, inputs.device):
            return self.network(inputs).float().softmax(-1)


def _teacher(trial, data_dir, device, checkpoint, checkpoint_seconds, progress) -> _Teacher | None:
    """The trial's teacher, read from beside the checkpoint or trained first; one process trains, others wait."""
    if trial.teacher is None:
        return None
    data = prepare(trial.teacher.images, data_dir=data_dir, device=device)
    model = _build(trial.teacher, data)
    if checkpoint is None:
        _train_teacher(trial.teacher, model, data, None, checkpoint_seconds, progress)
    else:
        weights = checkpoint.with_name(f"{trial.teacher.key}.weights")
        weights.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(weights.with_suffix(".teacher-lock")):
            state = _load(weights, trial.teacher.key)
            if state is None:
                _train_teacher(trial.teacher, model, data, checkpoint, checkpoint_seconds, progress)
                _save(weights, {"trial": trial.teacher.key, "model": model.state_dict()})
            else:
                model.load_state_dict(state["model"])
    return _Teacher(model, trial.teacher.setting.precision)


def _train_teacher(teacher: Trial, model, data: Prepared, checkpoint, checkpoint_seconds, progress) -> None:
    """Train the teacher without measuring it; the state is kept beside the student's."""
    state_file = None if checkpoint is None else checkpoint.with_name(f"{teacher.key}.teacher-checkpoint")
    state = _load(state_file, teacher.key)
    train(
        model,
        *data.parts["train"],
        setting=replace(teacher.setting, record_epochs=None),
        seed=teacher.seed,
        measure=lambda model: {},
        compiled=_pays(teacher.setting, len(data.parts["train"][0]), data.mean.device.type),
        resume=state,
        after_epoch=_keeper(state_file, teacher, checkpoint_seconds, lambda epoch: progress(0), time.perf_counter()),
    )
    if state_file is not None:
        state_file.unlink(missing_ok=True)


def _keeper(path: Path | None, trial: Trial, every: float, progress, began: float, keep=lambda rows: None):
    """What ``train`` calls after an epoch: it tells ``progress`` and keeps state and rows, ``every`` seconds apart.

    Stopped, from ``progress``, leaves after both are kept. ``began``: when the training did, less earlier pieces.
    """
    saved = time.perf_counter()

    def after_epoch(epoch: int, make_state: Callable[[], dict]) -> None:
        nonlocal saved
        stop = None
        try:
            progress(epoch)
        except Stopped as stopped:
            stop = stopped
        now = time.perf_counter()
        if stop or now - saved >= every:
            state = {**make_state(), "trial": trial.key, "seconds": now - began}
            if path is not None:
                _save(path, state)
            keep(_rows_so_far(trial, state))
            saved = now
        if stop:
            raise stop

    return after_epoch


def _rows_so_far(trial: Trial, state: dict) -> pd.DataFrame:
    """The rows of a state, as ``run_trial`` returns them but for the last: whether it diverges is not known yet."""
    rows = [*state["rows"], (state["step"], state["epoch"], "train", "seconds", state["seconds"])]
    return pd.DataFrame(rows, columns=COLUMNS[2:]).assign(key=trial.key, seed=trial.seed)[COLUMNS]


def _load(path: Path | None, key: str) -> dict | None:
    """The state in the file, if there is one and it is whole and this trial's."""
    if path is None or not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["trial"] == key:
            return state
        reason = f"is of trial {state['trial']}"
    except Exception as error:  # readers of damaged files raise nearly anything; all of it means the same here
        reason = f"cannot be read ({type(error).__name__})"
    warnings.warn(f"{path} {reason}: trial {key} starts again", stacklevel=2)
    return None


def _save(path: Path, state: dict) -> None:
    """Write the state whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        torch.save(state, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
