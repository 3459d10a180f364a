"""The deep trainer against a plain loop with DataLoader and against forward and backward passes alone, in one run.

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

WANTED_SHARE = 0.9  # of forward and backward alone, on a CPU
WANTED_GPU = 60_000  # images a second at batch 500 on an H200, aim 100,000
PEAK_SIZE = 8192  # of the square bfloat16 product that measures what the device can do


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
    device = next(model.parameters()).device
    loader = torch.utils.data.DataLoader(
        _Cropped(x.cpu(), labels.cpu(), setting.augmentation != "none"), setting.batch_size, shuffle=True
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=setting.learning_rate, momentum=setting.momentum)
    for _ in range(epochs):
        for images, wanted in loader:
            images, wanted = images.to(device), wanted.to(device)
            lam = np.random.beta(1, 1) if setting.method != ERM else 1.0  # noqa: NPY002
            partner = torch.randperm(len(images), device=device)
            with autocast(setting.precision, device):
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
    _wait(x.device)


def ours(model, x, labels, setting, *, compiled: bool) -> None:
    """The whole trainer."""
    train(model, x, labels, setting=setting, seed=0, measure=lambda model: {}, compiled=compiled)
    _wait(x.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _row(name, width, side, batch, steps, *, device, augmentation, repetitions, compiled=False) -> dict:
    """Images a second of the three, in turns; medians."""
    device, n = torch.device(device), batch * steps
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(0, 10, (n,), generator=generator).to(device)
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
        return model.to(device=device, memory_format=torch.channels_last)

    ways = {
        "trainer": lambda model: ours(model, x, labels, setting, compiled=compiled),
        "plain_loop": lambda model: plain_loop(model, x, labels, setting, 1),
        "alone": lambda model: alone(torch.compile(model) if compiled else model, x, labels, setting, steps),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    with one_core(device):
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
        "device": device.type,
        "batch": batch,
        "trainer_images_per_s": round(found["trainer"]),
        "plain_loop_images_per_s": round(found["plain_loop"]),
        "alone_images_per_s": round(found["alone"]),
        "share_of_alone": round(found["trainer"] / found["alone"], 3),
        "over_plain_loop": round(found["trainer"] / found["plain_loop"], 2),
    }


def _gpu_rows(repetitions: int) -> list[dict]:
    """ResNet-18 at full width and the share of the measured bfloat16 peak that its arithmetic reaches."""
    from labelaug.studies import flops

    a = torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(20):
        _wait(a.device)
        began = time.perf_counter()
        a @ a
        _wait(a.device)
        seconds.append(time.perf_counter() - began)
    peak = 2 * PEAK_SIZE**3 / min(seconds)
    rows = []
    for batch in (128, 500):
        row = _row(
            "ResNet-18",
            64,
            32,
            batch,
            25_000 // batch,
            device="cuda",
            augmentation="crop-flip",
            repetitions=repetitions,
            compiled=True,
        )
        share = row["trainer_images_per_s"] * 3 * flops("resnet18", 64, 10, 32) / peak
        rows.append(row | {"peak_tflops": round(peak / 1e12), "share_of_peak": round(share, 3)})
    return rows


def measure(*, quick: bool) -> list[dict]:
    """A row a network: full width and narrow on one core, full width on a GPU where there is one."""
    repetitions = 1 if quick else 3
    rows = [
        _row(
            "ResNet-18", 64, 32, 128, 1 if quick else 3, device="cpu", augmentation="crop-flip", repetitions=repetitions
        ),
        _row("ResNet-18, width 8, 16×16", 8, 16, 100, 5, device="cpu", augmentation="none", repetitions=repetitions),
    ]
    return rows + (_gpu_rows(repetitions) if torch.cuda.is_available() else [])


def main(*, quick: bool) -> None:
    """Print the rows."""
    for row in measure(quick=quick):
        wanted = f"at least {WANTED_SHARE:.0%}" if row["device"] == "cpu" else f"at least {WANTED_GPU:,} at batch 500"
        print(
            f"{row['network']}, {row['device']}, batch {row['batch']}: {row['trainer_images_per_s']:,} images/s, "
            f"{row['share_of_alone']:.0%} of forward and backward alone ({row['alone_images_per_s']:,}), "
            f"{row['over_plain_loop']:g} times a plain loop ({row['plain_loop_images_per_s']:,}); wanted {wanted}"
            + (f"; {row['share_of_peak']:.0%} of {row['peak_tflops']} TFLOP/s" if "share_of_peak" in row else "")
        )
