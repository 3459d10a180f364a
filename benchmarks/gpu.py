"""ResNet-18 on one GPU: do its curves agree with a CPU's, how fast is the trainer, and what takes the time.

`python benchmarks/gpu.py --out FILE` prints each part as it is measured and keeps all of them in FILE, as JSON; it
imports what training does, and nothing else. `labelaug bench` runs it where torch finds a GPU. The trainer is held
against a plain loop as an expert would write it (data on the GPU, channels last, compiled with CUDA graphs, fused SGD)
and against forward and backward passes of the same compiled network alone.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from labelaug.methods import Mixup
from labelaug.models import resnet
from labelaug.results import environment
from labelaug.studies import flops
from labelaug.training.deep import DeepSetting, autocast, init_generator, train
from labelaug.trials import Standardised

WANTED = 60_000  # images a second at batch 500
PEAK_SIZE = 8192  # of the square bfloat16 product that measures what the device can do
EPOCHS, SKIPPED = 6, 3  # of a timed training; the first ones compile and record
SIDE, CLASSES = 32, 10
KERNELS = {  # kinds of kernels, by what stands in their names; the first that fits
    "optimiser": ("multi_tensor", "fused_sgd", "FusedSgd"),
    "compiled normalisation, activations and casts": ("triton",),
    "convolutions and products": ("conv", "gemm", "xmma", "cutlass", "cudnn", "wgrad", "dgrad", "nhwc", "nchw"),
    "copies": ("memcpy", "memset", "copy"),
}


def network(width: int, device: torch.device) -> nn.Module:
    """ResNet-18 with its start, channels last, that standardises the pixels itself, as in a trial."""
    inside = resnet(18, 3, CLASSES, width=width, generator=init_generator(0))
    model = Standardised(inside, torch.full((3,), 127.5), torch.full((3,), 73.6))
    return model.to(device=device, memory_format=torch.channels_last)


def data(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, on which speed does not depend: uint8 ``[n, 3, 32, 32]`` and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return x.to(device), torch.randint(0, CLASSES, (n,), generator=generator).to(device)


def setting(batch: int, epochs: int, **fields) -> DeepSetting:
    """Mixup as the studies train it."""
    fields = {"method": Mixup(1.0), "precision": "bfloat16", "weight_decay": 1e-4} | fields
    return DeepSetting(0.05, epochs, batch, optimiser="sgd", momentum=0.9, **fields)


def agreement(device: torch.device) -> dict:
    """The same trial on the CPU and on the device: a narrow network, 500 images, a smaller last batch.

    Uncompiled; a test does the same compiled, for a smaller network. At a small learning rate without momentum: at the
    studies' own, rounding alone moves the weights of two trials as far apart as they move in all.
    Returns: the largest relative difference of an epoch's mean training loss, and of the weights relative to how far
    they moved, from the CPU in float32: of the device in float32 and bfloat16, and, as a measure for both, of the CPU
    in float64.
    """

    def run(where: torch.device, precision: str) -> tuple[np.ndarray, torch.Tensor]:
        model, (x, labels) = network(8, where), data(500, where)
        if precision == "float64":
            model, x = model.double(), x.double()
        kind = {"precision": "bfloat16" if precision == "bfloat16" else "float32"}
        what = replace(setting(96, 3, **kind), learning_rate=0.001, momentum=0.0)
        rows = train(model, x, labels, setting=what, seed=0, measure=lambda model: {})
        return rows.loc[rows["metric"] == "running_loss", "value"].to_numpy(), _flat(model)

    cpu, start, found = torch.device("cpu"), _flat(network(8, torch.device("cpu"))), {}
    losses, weights = run(cpu, "float32")
    for name, (where, precision) in {
        "float32": (device, "float32"),
        "bfloat16": (device, "bfloat16"),
        "cpu_float64": (cpu, "float64"),
    }.items():
        other_losses, other_weights = run(where, precision)
        found[f"{name}_loss"] = float(np.abs(other_losses / losses - 1).max())
        found[f"{name}_weights"] = float((other_weights - weights).norm() / (weights - start).norm())
    return found


def trainer(batch: int, n: int, width: int, device: torch.device, after_epoch=lambda epoch: None) -> list[float]:
    """The whole trainer: seconds of each epoch that counts. An epoch ends by waiting for the device."""
    model, (x, labels), ends = network(width, device), data(n, device), []

    def ended(epoch, state):
        ends.append(time.perf_counter())
        after_epoch(epoch)

    train(
        model,
        x,
        labels,
        setting=setting(batch, EPOCHS),
        seed=0,
        measure=lambda model: {},
        compiled=device.type == "cuda",
        after_epoch=ended,
    )
    return list(np.diff(ends)[SKIPPED - 1 :])


def plain_loop(batch: int, n: int, width: int, device: torch.device) -> list[float]:
    """Mixup as an expert would write it for images that fit on the device."""
    model, (x, labels) = network(width, device), data(n, device)
    compiled = _compiled(model, device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, fused=True)

    def epoch():
        for chosen in torch.randperm(len(x), device=device).split(batch):
            images, wanted = x[chosen].float().contiguous(memory_format=torch.channels_last), labels[chosen]
            lam, partner = np.random.beta(1, 1), torch.randperm(len(chosen), device=device)  # noqa: NPY002
            with autocast("bfloat16", device):
                outputs = compiled(lam * images + (1 - lam) * images[partner])
                loss = lam * F.cross_entropy(outputs, wanted) + (1 - lam) * F.cross_entropy(outputs, wanted[partner])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return _timed(epoch, device)


def alone(batch: int, n: int, width: int, device: torch.device) -> list[float]:
    """Forward and backward passes of one minibatch of pixels, as often as an epoch has minibatches."""
    model, (x, labels) = network(width, device), data(batch, device)
    compiled, images = _compiled(model, device), x.float().contiguous(memory_format=torch.channels_last)

    def epoch():
        for _ in range(n // batch):
            with autocast("bfloat16", device):
                loss = F.cross_entropy(compiled(images), labels)
            model.zero_grad()
            loss.backward()

    return _timed(epoch, device)


def peak(device: torch.device, size: int = PEAK_SIZE) -> float:
    """Operations a second of a square bfloat16 product of random numbers, the best of twenty."""
    a, seconds = torch.randn(size, size, device=device, dtype=torch.bfloat16), []
    for _ in range(20):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def kernels(batch: int, n: int, width: int, device: torch.device) -> dict:
    """Seconds that the device's kernels take in one epoch of the trainer, by kind, as torch's profiler has them."""
    activity = torch.profiler.ProfilerActivity
    kind = activity.CUDA if device.type == "cuda" else activity.CPU
    profile = torch.profiler.profile(activities=[kind])
    switch = {EPOCHS - 2: profile.start, EPOCHS - 1: profile.stop}
    trainer(batch, n, width, device, lambda epoch: switch.get(epoch, lambda: None)())
    seconds = dict.fromkeys([*KERNELS, "others"], 0.0)
    for event in profile.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        fits = [name for name, parts in KERNELS.items() if any(part in event.key for part in parts)]
        seconds[fits[0] if fits else "others"] += spent / 1e6
    return seconds


def measure(
    *,
    quick: bool = False,
    device: str = "cuda",
    width: int = 64,
    n: int = 25_600,
    batches: tuple[int, ...] = (128, 500),
    size: int = PEAK_SIZE,
) -> Iterator[dict]:
    """The parts, one after the other: agreement, peak, speed at each batch size, kinds of kernels.

    Args: quick: an epoch is a quarter of ``n``.
    """
    n = n // 4 if quick else n
    where = torch.device(device)
    with _cudnn(where):
        yield {"part": "agreement"} | agreement(where)
        most = peak(where, size)
        yield {"part": "peak", "tflops": most / 1e12, "size": size}
        for batch in batches:
            whole, found = n // batch * batch, {}
            for way in (trainer, plain_loop, alone):
                began = time.perf_counter()
                found[f"{way.__name__}_images_per_s"] = whole / median(way(batch, whole, width, where))
                found[f"{way.__name__}_seconds_in_all"] = time.perf_counter() - began
            share = found["trainer_images_per_s"] * 3 * flops("resnet18", width, CLASSES, SIDE) / most
            yield {"part": "speed", "batch": batch, "width": width, "n": whole} | found | {"share_of_peak": share}
        batch = batches[0]
        whole = n // batch * batch
        spent = kernels(batch, whole, width, where)
        yield {"part": "kernels", "batch": batch, "width": width, "n": whole, "seconds": spent}


def told(part: dict) -> str:
    """A part in words."""
    if part["part"] == "agreement":
        return (
            f"CPU and GPU: training loss within {part['float32_loss']:.1g} in float32 and "
            f"{part['bfloat16_loss']:.1g} in bfloat16, weights within {part['float32_weights']:.1g} and "
            f"{part['bfloat16_weights']:.1g} of their way; "
            f"the CPU's own rounding: {part['cpu_float64_loss']:.1g} and {part['cpu_float64_weights']:.1g}"
        )
    if part["part"] == "peak":
        return f"a bfloat16 product of size {part['size']}: {part['tflops']:.0f} TFLOP/s"
    if part["part"] == "speed":
        ours, plain, bare = (part[f"{way}_images_per_s"] for way in ("trainer", "plain_loop", "alone"))
        return (
            f"ResNet-18, width {part['width']}, batch {part['batch']}: {ours:,.0f} images/s, {ours / plain:.2f} times "
            f"a plain compiled loop, {ours / bare:.0%} of forward and backward alone, {part['share_of_peak']:.0%} of "
            f"the peak (wanted: {WANTED:,} images/s at batch 500)"
        )
    everything = sum(part["seconds"].values())
    shares = ", ".join(f"{name} {seconds / everything:.0%}" for name, seconds in part["seconds"].items())
    return f"where the time goes at batch {part['batch']}: {shares}"


def _compiled(model: nn.Module, device: torch.device) -> Callable:
    return torch.compile(model, mode="reduce-overhead", dynamic=False) if device.type == "cuda" else model


def _timed(epoch: Callable[[], None], device: torch.device) -> list[float]:
    ends = []
    for _ in range(EPOCHS):
        epoch()
        _wait(device)
        ends.append(time.perf_counter())
    return list(np.diff(ends)[SKIPPED - 1 :])


def _cudnn(device: torch.device):
    """cuDNN's choice by trial for all ways alike, and float32 convolutions that are float32."""
    on = device.type == "cuda"
    return torch.backends.cudnn.flags(enabled=True, benchmark=on, allow_tf32=False)


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double().cpu() for p in model.parameters()])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--width", default=64, show_default=True, help="Channels of the first stage.")
@click.option("-n", default=25_600, show_default=True, help="Images of an epoch.")
@click.option("--batch", "batches", multiple=True, type=int, default=(128, 500), show_default=True)
@click.option("--size", default=PEAK_SIZE, show_default=True, help="Of the product that measures the peak.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Keep the parts here.")
def command(device, width, n, batches, size, out):
    """Measure and print, part by part."""
    record = environment(device) | {"parts": []}
    for part in measure(device=device, width=width, n=n, batches=batches, size=size):
        print(told(part), flush=True)
        record["parts"].append(part)
        if out:
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(*, quick: bool) -> None:
    """Print the parts."""
    for part in measure(quick=quick):
        print(told(part), flush=True)


if __name__ == "__main__":
    command()
