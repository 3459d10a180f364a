"""The deep trainer on one core, against a plain loop with DataLoader and against forward and backward passes alone.

Run by `labelaug bench`. The forward and backward passes are what any trainer of this network must do; the share of
their speed that the whole trainer reaches is what gathering, augmenting, mixing, the optimiser and the records leave.
"""

import time
from statistics import median

import numpy as np
import torch
from torch import nn

from labelaug.methods import ERM, Mixup
from labelaug.models import resnet
from labelaug.training.deep import DeepSetting, autocast, init_generator, one_core, train

WANTED_SHARE = 0.9  # of forward and backward alone


class _Cropped(torch.utils.data.Dataset):
    """One image at a time, as one would write it: crop, flip and normalise in Python."""

    def __init__(self, x, labels, augment):
        self.x, self.labels, self.augment = x.float() / 255, labels, augment

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        image = self.x[index]
        if self.augment:
            top, left = np.random.randint(0, 9, 2)  # noqa: NPY002 - what one would write
            side = image.shape[-1]
            image = nn.functional.pad(image, (4, 4, 4, 4))[:, top : top + side, left : left + side]
            if np.random.rand() < 0.5:  # noqa: NPY002
                image = image.flip(-1)
        return (image - 0.5) / 0.25, self.labels[index]


def plain_loop(model, x, labels, setting, epochs: int) -> None:
    """DataLoader, cross-entropy to both labels, torch's default optimiser; Mixup as in the first public code."""
    loader = torch.utils.data.DataLoader(
        _Cropped(x, labels, setting.augmentation != "none"), setting.batch_size, shuffle=True
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=setting.learning_rate, momentum=setting.momentum)
    for _ in range(epochs):
        for images, wanted in loader:
            lam = np.random.beta(1, 1) if setting.method != ERM else 1.0  # noqa: NPY002
            partner = torch.randperm(len(images))
            with autocast(setting.precision, x.device):
                outputs = model(lam * images + (1 - lam) * images[partner])
                loss = lam * nn.functional.cross_entropy(outputs, wanted)
                loss = loss + (1 - lam) * nn.functional.cross_entropy(outputs, wanted[partner])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            loss.item()


def alone(model, x, labels, setting, steps: int) -> None:
    """Forward and backward passes of one minibatch, again and again, channels last; no optimiser, no data."""
    images = x[: setting.batch_size].float().contiguous(memory_format=torch.channels_last)
    wanted = labels[: setting.batch_size]
    for _ in range(steps):
        with autocast(setting.precision, x.device):
            loss = nn.functional.cross_entropy(model(images), wanted)
        model.zero_grad()
        loss.backward()


def ours(model, x, labels, setting) -> None:
    """The whole trainer."""
    train(model, x, labels, setting=setting, seed=0, measure=lambda model: {})


def _row(name, width, side, batch, steps, *, augmentation, repetitions) -> dict:
    """Images a second of the three, in turns; medians."""
    n, generator = batch * steps, torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (n,), generator=generator)
    setting = DeepSetting(
        0.05,
        1,
        batch,
        method=Mixup(1.0),
        optimiser="sgd",
        momentum=0.9,
        weight_decay=5e-4,
        precision="bfloat16",
        augmentation=augmentation,
    )

    def network() -> nn.Module:
        model = resnet(18, 3, 10, width=width, generator=init_generator(0))
        return model.to(memory_format=torch.channels_last)

    ways = {
        "trainer": lambda model: ours(model, x, labels, setting),
        "plain_loop": lambda model: plain_loop(model, x, labels, setting, 1),
        "alone": lambda model: alone(model, x, labels, setting, steps),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    with one_core(x.device):
        for repetition in range(repetitions + 1):
            for way, call in ways.items():
                model = network()
                began = time.perf_counter()
                call(model)
                if repetition:  # the first one warms up
                    speeds[way].append(n / (time.perf_counter() - began))
    found = {way: median(found) for way, found in speeds.items()}
    return {
        "network": name,
        "batch": batch,
        "trainer_images_per_s": round(found["trainer"]),
        "plain_loop_images_per_s": round(found["plain_loop"]),
        "alone_images_per_s": round(found["alone"]),
        "share_of_alone": round(found["trainer"] / found["alone"], 3),
        "over_plain_loop": round(found["trainer"] / found["plain_loop"], 2),
    }


def measure(*, quick: bool) -> list[dict]:
    """A row a network: full width and narrow."""
    repetitions = 1 if quick else 3
    return [
        _row("ResNet-18", 64, 32, 128, 1 if quick else 3, augmentation="crop-flip", repetitions=repetitions),
        _row("ResNet-18, width 8, 16×16", 8, 16, 100, 5, augmentation="none", repetitions=repetitions),
    ]


def main(*, quick: bool) -> None:
    """Print the rows."""
    for row in measure(quick=quick):
        print(
            f"{row['network']}, batch {row['batch']}: {row['trainer_images_per_s']:,} images/s, "
            f"{row['share_of_alone']:.0%} of forward and backward alone ({row['alone_images_per_s']:,}), "
            f"{row['over_plain_loop']:g} times a plain loop ({row['plain_loop_images_per_s']:,}); wanted: at least "
            f"{WANTED_SHARE:.0%} of forward and backward alone"
        )
