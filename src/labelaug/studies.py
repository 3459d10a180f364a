"""Studies: which trials, at which scale, and in which order.

*smoke* takes seconds and is for tests; *cpu* shows real phenomena on real images on two cores; *gpu* is what one GPU
does in a quarter of an hour at a time; *paper* is the paper's own grid. A study lists what tells most first, so that
whatever has been computed when time runs out is the best that could be.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from labelaug import models
from labelaug.methods import ERM, Mixup
from labelaug.training.deep import DeepSetting
from labelaug.trials import Images, Network, Trial

SCALES = ("smoke", "cpu", "gpu", "paper")
CLASSES = {"cifar100": 100}  # 10 in the other sets
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "fashion-mnist": 60_000}
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "svhn": 26_032, "fashion-mnist": 10_000}
SMALLEST_CLASS = {"cifar10": 5_000, "cifar100": 500, "svhn": 4_659, "fashion-mnist": 6_000}
MIXUP = Mixup(1.0)

# --- smoke: 14 images of scikit-learn's digits a class, a ResNet-18 with two channels in its first stage --------------

_DIGITS = Images("digits", fraction=0.1, validation=5, test=10)
_QUICK = DeepSetting(
    0.05, 6, 40, optimiser="sgd", momentum=0.9, milestones=(4,), weight_decay=1e-4, record_epochs=(0, 2, 4, 6)
)


def _smoke() -> list[Trial]:
    base = Trial(_DIGITS, Network("resnet18", 2), _QUICK, 0, gradient_epochs=(6,), gradient_draws=4)
    mixup = replace(base, setting=replace(_QUICK, method=MIXUP))
    teacher = Trial(replace(_DIGITS, fraction=0.5), Network("mlp", 16), replace(_QUICK, record_epochs=None), 0)
    return [
        mixup,
        base,
        replace(mixup, setting=replace(mixup.setting, switch_epoch=4)),
        replace(mixup, setting=replace(mixup.setting, labels="teacher"), teacher=teacher),
    ]


# --- cpu: a narrow ResNet-18 on 500 images of CIFAR-10, averaged to 16×16 pixels -------------------------------------

CPU_RECORDS = (0, 1, 2, 5, 10, 15, 20, 30, 40, 50, 60, 80, 95, 100, 105, 110, 120, 130, 140, 160, 180, 200)
CPU_RECORDS += tuple(range(225, 501, 25))
CPU_GRADIENTS = (0, 5, 20, 50, 95, 105, 120, 160, 200, 300, 400, 500)
CPU_SWITCHES = (20, 50, 95, 105, 150, 250)
_CPU = DeepSetting(
    0.05,
    500,
    100,
    optimiser="sgd",
    momentum=0.9,
    milestones=(100,),
    decay=0.2,
    weight_decay=1e-4,
    precision="bfloat16",
    record_epochs=CPU_RECORDS,
)
_CPU_TEACHER = Trial(
    Images("cifar10", fraction=0.95, side=16, validation=100, test=400),
    Network("resnet18", 16),
    DeepSetting(
        0.1,
        12,
        100,
        optimiser="sgd",
        momentum=0.9,
        milestones=(8, 11),
        weight_decay=5e-4,
        augmentation="crop-flip",
        precision="bfloat16",
    ),
    0,
)


def _cpu_trial(seed: int, n: int = 500, *, width: int = 8, random_labels: float = 0.0, **setting) -> Trial:
    """One seed: another subset, start and order; the same validation and test images for all methods and sizes."""
    images = Images(
        "cifar10", fraction=n / 50_000, validation=100, test=400, side=16, random_labels=random_labels, seed=seed
    )
    teacher = _CPU_TEACHER if setting.get("labels") == "teacher" else None
    return Trial(images, Network("resnet18", width), replace(_CPU, **setting), seed, teacher)


def _with_gradients(trial: Trial) -> Trial:
    return replace(trial, gradient_epochs=CPU_GRADIENTS)


# A second set and network, chosen after the first runs on CIFAR-10 had shown no rise of the error: two hidden layers of
# 256 units on 500 images of FashionMNIST, at a constant learning rate.
_FASHION = DeepSetting(
    0.05,
    2000,
    100,
    optimiser="sgd",
    momentum=0.9,
    weight_decay=1e-4,
    record_epochs=(0, 2, 5, 10, 20, 30, *range(50, 300, 25), *range(300, 2001, 50)),
)


def _fashion(seed: int, method) -> Trial:
    images = Images("fashion-mnist", fraction=500 / 60_000, validation=100, test=400, seed=seed)
    return Trial(images, Network("mlp", 256), replace(_FASHION, method=method), seed)


def _cpu() -> list[Trial]:
    seeds, more = range(3), range(3, 10)

    def both(make, seeds=seeds) -> list[Trial]:
        return [make(seed, method) for seed in seeds for method in (MIXUP, ERM)]

    def switched(epochs, seeds=seeds) -> list[Trial]:
        return [_with_gradients(_cpu_trial(s, method=MIXUP, switch_epoch=e)) for s in seeds for e in epochs]

    def core(seed, method):
        return _with_gradients(_cpu_trial(seed, method=method))

    four = [
        _cpu_trial(s, method=m, labels=labels)
        for s in seeds
        for m, labels in ((MIXUP, "teacher"), (Mixup(1.0, inputs=False), "data"), (ERM, "teacher"))
    ]
    return [
        *both(core),
        *four,
        *switched(CPU_SWITCHES[1::2]),
        *(_cpu_trial(s, n, method=MIXUP) for s in seeds for n in (250, 1000)),
        *both(_fashion),
        *both(lambda s, m: _with_gradients(_cpu_trial(s, method=m, random_labels=0.2))),
        *switched(CPU_SWITCHES[0::2]),
        *(_cpu_trial(s, n, method=ERM) for s in seeds for n in (250, 1000)),
        *both(core, more),
        *both(_fashion, more),
        *both(lambda s, m: _cpu_trial(s, method=m, width=16)),
        *both(lambda s, m: _cpu_trial(s, 2000, method=m)),
        *both(lambda s, m: _cpu_trial(s, method=m, precision="float32")),
        *switched(CPU_SWITCHES, more),
    ]


# --- gpu and paper: ResNets of full width. What paper 2 does not state is filled in here and marked so ---------------

# Filled in: learning rate, momentum, batch size, weight decay and the milestones of the cross-entropy runs are stated
# nowhere; these are the ones of the first public Mixup code, whose milestones the paper's runs with squared error use.
FILLED_IN = DeepSetting(
    0.1,
    1600,
    128,
    optimiser="sgd",
    momentum=0.9,
    milestones=(100, 150),
    weight_decay=1e-4,
    precision="bfloat16",
)


def _records(epochs: int) -> tuple[int, ...]:
    """Dense where Mixup's curve turns and where it is switched off, then every 50 epochs, beyond 1600 every 250."""
    early = {0, 1, 2, 5, *range(10, 100, 10), 95, 100, 105, 110, 115, 120, 125, 130, 140, 150, 155, 160, 170, 180, 200}
    dense = early | set(range(225, 400, 25)) | set(range(400, 1601, 50)) | set(range(1750, 7001, 250))
    return tuple(sorted({epoch for epoch in dense if epoch < epochs} | {epochs}))


def _full(
    name: str, fraction: float, architecture: str, seed: int, *, epochs: int, gradients: bool = False, **setting
) -> Trial:
    """Without validation where every training image is trained on; else 2 % of the smallest class from each."""
    held_out = 0 if fraction == 1 else round(0.02 * SMALLEST_CLASS[name])
    images = Images(name, fraction=fraction, validation=held_out, seed=seed)
    setting = replace(FILLED_IN, epochs=epochs, record_epochs=_records(epochs), **setting)
    marked = tuple(e for e in _records(epochs) if e <= 200 or e % 100 == 0) if gradients else ()
    return Trial(images, Network(architecture), setting, seed, gradient_epochs=marked)


GPU_GRADIENTS = (50, 95, 105, 155, 200, 400, 800)  # one record, at 32 draws, takes as long as one or two epochs
GPU_EPOCHS = 550  # six minutes at the 24,500 images a second that one H100 gave
GPU_ERM_EPOCHS = 200  # it has fitted its images and its learning rate has fallen twice: nothing about it changes then


def _gpu() -> list[Trial]:
    """One seed of the U-curve whole, then more seeds, then switches and more images."""
    seeds = range(3)

    def thinned(epochs: int, seed: int, **setting) -> Trial:
        trial = _full("cifar10", 0.3, "resnet18", seed, epochs=epochs, **setting)
        marked = tuple(epoch for epoch in GPU_GRADIENTS if epoch <= epochs)
        return replace(trial, gradient_epochs=marked, gradient_draws=32)

    core = [t for s in seeds for t in (thinned(GPU_EPOCHS, s, method=MIXUP), thinned(GPU_ERM_EPOCHS, s, method=ERM))]
    switched = [thinned(400, s, method=MIXUP, switch_epoch=e) for s in seeds for e in (105, 155)]
    full = [_full("cifar10", 0.9, "resnet18", s, epochs=400, method=m) for s in seeds for m in (MIXUP, ERM)]
    return [*core, *switched, *full]


# Panels of paper 2 that are deep trainings: data, share of them, architecture, epochs, further fields of the setting.
# Sample sizes of figure 7 and the last epochs of figures 1, 6, 7, 8, 13 and 14 are not in the text: filled in.
_SWITCH_CIFAR, _SWITCH_ALL = (105, 115, 125, 155), (95, 105, 115, 125, 155)
PANELS: dict[str, tuple[tuple[str, float, str, int, dict], ...]] = {
    "P2-F1": (("cifar10", 1.0, "resnet18", 1600, {}),),
    "P2-F2": (("cifar10", 0.3, "resnet18", 1600, {}), ("cifar10", 1.0, "resnet18", 1600, {})),
    "P2-F3": (("cifar100", 1.0, "resnet34", 1600, {}),),
    "P2-F4": (
        ("cifar10", 0.1, "resnet18", 7000, {"augmentation": "crop-flip"}),
        ("cifar100", 0.1, "resnet34", 7000, {"augmentation": "crop-flip"}),
    ),
    "P2-F6": (
        *(("cifar10", 0.3, "resnet18", 400, {"switch_epoch": epoch}) for epoch in _SWITCH_CIFAR),
        *(("cifar10", 1.0, "resnet18", 400, {"switch_epoch": epoch}) for epoch in _SWITCH_ALL),
        *(("svhn", share, "resnet18", 400, {"switch_epoch": epoch}) for share in (0.3, 1.0) for epoch in _SWITCH_ALL),
    ),
    "P2-F7": tuple(
        (name, share, "resnet18", 1600, {}) for name in ("cifar10", "svhn") for share in (0.1, 0.2, 0.3, 0.5, 1.0)
    ),
    "P2-F8": tuple(
        (name, share, "resnet18", 400, {"gradients": True}) for name in ("cifar10", "svhn") for share in (0.3, 1.0)
    ),
    "P2-F9": (("svhn", 0.3, "resnet18", 1600, {}), ("svhn", 1.0, "resnet18", 1600, {})),
    "P2-F10": (("cifar10", 0.3, "resnet34", 800, {}), ("cifar10", 1.0, "resnet34", 800, {})),
    "P2-F11": (("svhn", 0.3, "resnet34", 800, {}), ("svhn", 1.0, "resnet34", 800, {})),
    "P2-F12": (("cifar10", 0.3, "vgg16", 1600, {}), ("cifar10", 1.0, "vgg16", 1600, {})),
    "P2-F13": tuple((name, 1.0, "resnet18", 1600, {"loss": "squared-error"}) for name in ("cifar10", "svhn")),
    "P2-F14": (("cifar10", 1.0, "resnet18", 400, {"switch_epoch": 125, "gradients": True}),),
}
PAPER_SEEDS = 10


def panel(row: str) -> list[Trial]:
    """The trials of one row of the ledger at the paper's scale: Mixup and, where nothing is switched, ERM; ten seeds.

    One long run a seed stands for the paper's separate runs of each length: with fixed milestones it is the same law.
    """
    trials = []
    for seed in range(PAPER_SEEDS):
        for name, share, architecture, epochs, fields in PANELS[row]:
            for method in (MIXUP,) if "switch_epoch" in fields else (MIXUP, ERM):
                trials.append(_full(name, share, architecture, seed, epochs=epochs, method=method, **fields))
    return trials


def _paper() -> list[Trial]:
    return [trial for row in PANELS for trial in panel(row)]


_SCALES = {"smoke": _smoke, "cpu": _cpu, "gpu": _gpu, "paper": _paper}


def over_training(scale: str) -> list[Trial]:
    """Paper 2 on images: the U-curve, its dependence on the data, switching off, gradients, and whose noise it is.

    Raises: ValueError for a scale that is not one of SCALES.
    """
    if scale not in _SCALES:
        raise ValueError(f"over-training has the scales {', '.join(_SCALES)}, got {scale!r}")
    return _distinct(_SCALES[scale]())


# Paper 1's question to a deep network: one entry of the training images identifies the class and is gone at test. What
# paper 1 trains deep is a whole random image a class; sizes, schedule and length of this smaller one are ours.
PLANTED = (1.0, 2.0, 4.0)  # γ, in standard deviations of its channel; at 10 a narrow network errs on half of all
_PLANTED = DeepSetting(
    0.05,
    30,
    128,
    optimiser="sgd",
    momentum=0.9,
    milestones=(20,),
    weight_decay=1e-4,
    precision="bfloat16",
    record_epochs=(0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 30),
)


def planted_entry(scale: str) -> list[Trial]:
    """Two classes of CIFAR-10 with an identifying entry in each training image, under ERM, label smoothing and Mixup.

    Raises: ValueError for any scale but "gpu".
    """
    if scale != "gpu":
        raise ValueError(f"planted-entry has the scale gpu, got {scale!r}")
    trials = []
    for seed in range(3):
        for gamma in PLANTED:
            classes = ("airplane", "automobile")
            images = Images("cifar10", classes=classes, fraction=0.3, validation=100, planted=gamma, seed=seed)
            for arm in ({}, {"smoothing": 0.1}, {"method": MIXUP}):
                trials.append(Trial(images, Network(), replace(_PLANTED, **arm), seed))
    return trials


STUDIES = {"over-training": over_training, "planted-entry": planted_entry}


def _distinct(trials: Iterable[Trial]) -> list[Trial]:
    """Each trial once, at its first place."""
    return list({trial.key: trial for trial in trials}.values())


# --- what a trial costs ----------------------------------------------------------------------------------------------


@cache
def flops(architecture: str, width: int, num_classes: int, side: int) -> int:
    """Floating-point operations of one image forward, two for a multiply-add, counted by torch on shapes alone."""
    generator = torch.Generator()
    if architecture == "mlp":
        dense = models.mlp(3 * side**2, (width, width), num_classes, generator=generator)
        model = torch.nn.Sequential(torch.nn.Flatten(), dense)
    elif architecture == "vgg16":
        model = models.vgg16(3, num_classes, width=width, generator=generator)
    else:
        depth = int(architecture.removeprefix("resnet"))
        model = models.resnet(depth, 3, num_classes, width=width, generator=generator)
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(2, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


def training_images(trial: Trial) -> int:
    """How many images the trial trains on."""
    images = trial.images
    if images.fraction == 1 and not images.classes:
        return TRAINING_IMAGES[images.name]
    classes = len(images.classes) or CLASSES.get(images.name, 10)
    return classes * round(images.fraction * SMALLEST_CLASS[images.name])


def training_flops(trial: Trial) -> float:
    """Floating-point operations of the training itself: three forward passes' worth for each image and epoch."""
    classes = len(trial.images.classes) or CLASSES.get(trial.images.name, 10)
    network = trial.network
    once = flops(network.architecture, network.width, classes, trial.images.side or 32)
    return 3.0 * once * training_images(trial) * trial.setting.epochs
