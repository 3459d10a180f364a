"""Linear sweeps: ours against what a researcher would otherwise write, timed in one run on one machine.

300 models (20 strengths of three methods, 5 seeds) on 10,000 examples, 100 epochs of minibatches of 500, in float32:
the synthetic task at d = 10, and Gaussian pixels of CIFAR's shape at d = 3,072 (only the time is of interest there).
What would take an hour is measured in part and scaled; the name of the row then says what was measured.

Run by ``labelaug bench``.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from json import dumps, loads
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from labelaug.data.synthetic import TwoFeatureTask, sample
from labelaug.training.linear import LinearSetting, LinearTraining, method_setting, train_linear

N, BATCH, EPOCHS, SEEDS, STRENGTHS = 10_000, 500, 100, 5, 20
WIDE = 3 * 32 * 32
STEPS = EPOCHS * N // BATCH
LEARNING_RATE = 0.01
GRIDS = {"weight decay": (0.0, 0.1), "label smoothing": (0.0, 0.75), "mixup": (0.0, 8.0)}  # ends of each grid
MIDDLE = [method_setting(method, sum(ends) / 2, learning_rate=LEARNING_RATE) for method, ends in GRIDS.items()]


def all_settings() -> list[LinearSetting]:
    """The sixty settings of the sweep; ERM, at strength 0, once for each method, as a script would train it."""
    return [
        method_setting(method, float(strength), learning_rate=LEARNING_RATE)
        for method, ends in GRIDS.items()
        for strength in np.linspace(*ends, STRENGTHS)
    ]


# What a researcher would write -------------------------------------------------------------------------------------


def train_with_loader(loader: DataLoader, setting: LinearSetting, *, start: Tensor, epochs: int) -> Tensor:
    """The usual script: DataLoader of (x ``[d]``, label as a float), nn.Linear, Adam. Returns weights ``[d]``."""
    model = nn.Linear(len(start), 1, bias=False, dtype=start.dtype)
    model.weight.data.copy_(start)
    optimiser = torch.optim.Adam(model.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay)
    for _ in range(epochs):
        for inputs, labels in loader:
            _step(model, optimiser, inputs, labels, setting)
    return model.weight.detach()[0]


def train_by_index(
    x: Tensor, labels: Tensor, setting: LinearSetting, *, start: Tensor, orders: Sequence[Tensor], batch_size: int
) -> Tensor:
    """The same without DataLoader: the tensors are indexed by ``orders``, one permutation ``[n]`` an epoch."""
    model = nn.Linear(len(start), 1, bias=False, dtype=start.dtype)
    model.weight.data.copy_(start)
    optimiser = torch.optim.Adam(model.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay)
    targets = labels.to(x.dtype)
    for order in orders:
        for chosen in order.split(batch_size):
            _step(model, optimiser, x[chosen], targets[chosen], setting)
    return model.weight.detach()[0]


def _step(model, optimiser, inputs, targets, setting) -> None:
    if setting.mixup_alpha is not None:
        lam = np.random.beta(setting.mixup_alpha, setting.mixup_alpha)  # noqa: NPY002 (what such scripts use)
        partner = torch.randperm(len(inputs))
        inputs = lam * inputs + (1 - lam) * inputs[partner]
        targets = lam * targets + (1 - lam) * targets[partner]
    if setting.smoothing:
        targets = (1 - setting.smoothing) * targets + setting.smoothing / 2
    loss = F.binary_cross_entropy_with_logits(model(inputs)[:, 0], targets)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def train_vmap(
    x: Tensor, labels: Tensor, *, learning_rate: float, starts: Tensor, orders: Sequence[Tensor], batch_size: int
) -> Tensor:
    """ERM of many models ``starts [models, d]`` by torch.func, all in the same order. Returns ``[models, d]``."""

    def loss(weight, inputs, targets):
        return F.binary_cross_entropy_with_logits(inputs @ weight, targets)

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))
    weights = starts.clone().requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=learning_rate)
    targets = labels.to(x.dtype)
    for order in orders:
        for chosen in order.split(batch_size):
            weights.grad = gradients(weights.detach(), x[chosen], targets[chosen])
            optimiser.step()
    return weights.detach()


# Timing ------------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@contextmanager
def threads(count: int):
    """Within the block torch uses ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def per_epoch(train: Callable[[LinearSetting, int], object], *, epochs: int, counts: Sequence[int]) -> float:
    """Seconds a model and epoch: mean over one model of each method, best over numbers of threads, after a warm-up."""
    found = []
    for count in counts:
        with threads(count):
            train(MIDDLE[0], 1)
            found.append(sum(seconds(lambda s=s: train(s, epochs)) for s in MIDDLE) / len(MIDDLE) / epochs)
    return min(found)


def one_at_a_time(x: Tensor, labels: Tensor, *, loader_epochs: int, index_epochs: int, counts: Sequence[int]):
    """Both scripts on one problem. Yields (name, seconds of the whole sweep, scaled)."""
    models, d = STRENGTHS * len(GRIDS) * SEEDS, x.shape[1]
    loader = DataLoader(TensorDataset(x, labels.to(x.dtype)), batch_size=BATCH, shuffle=True)
    start = (2 * torch.rand(d) - 1) / d**0.5

    def by_loader(setting, epochs):
        train_with_loader(loader, setting, start=start, epochs=epochs)

    def by_index(setting, epochs):
        orders = [torch.randperm(len(x)) for _ in range(epochs)]
        train_by_index(x, labels, setting, start=start, orders=orders, batch_size=BATCH)

    for name, train, epochs in (
        ("DataLoader + nn.Linear + Adam, one at a time", by_loader, loader_epochs),
        ("the same without DataLoader", by_index, index_epochs),
    ):
        measured = per_epoch(train, epochs=epochs, counts=counts)
        yield f"{name} (scaled from 3 models, {epochs} epochs each)", measured * models * EPOCHS


def vmapped(x: Tensor, labels: Tensor, *, epochs: int, counts: Sequence[int]):
    """torch.func on as many ERM models as the sweep has. Yields (name, seconds of 100 epochs, scaled if fewer ran)."""
    models, d = STRENGTHS * len(GRIDS) * SEEDS, x.shape[1]
    starts = (2 * torch.rand(models, d) - 1) / d**0.5

    def train(epochs):
        orders = [torch.randperm(len(x)) for _ in range(epochs)]
        train_vmap(x, labels, learning_rate=LEARNING_RATE, starts=starts, orders=orders, batch_size=BATCH)

    found = []
    for count in counts:
        with threads(count):
            train(1)
            found.append(seconds(lambda: train(epochs)))
    note = "" if epochs == EPOCHS else f" (scaled from {epochs} epochs)"
    yield f"torch.func vmap, ERM alone, one order{note}", min(found) * EPOCHS / epochs


def floor(d: int, *, seeds_at_once: int, repeats: int = 50) -> float:
    """The two matrix products of a step at this shape, best of several, times the steps of the sweep."""
    settings = STRENGTHS * len(GRIDS)
    weight, residual = torch.randn(seeds_at_once, settings, d), torch.randn(seeds_at_once, settings, BATCH)
    batch = torch.randn(seeds_at_once, BATCH, d)
    logits, gradient = torch.empty_like(residual), torch.empty_like(weight)

    def step():
        torch.bmm(weight, batch.transpose(1, 2), out=logits)
        torch.bmm(residual, batch, out=gradient)

    step()
    return min(seconds(step) for _ in range(repeats)) * STEPS * SEEDS / seeds_at_once


def synthetic() -> tuple[Tensor, Tensor]:
    """The task of paper 1 at d = 10."""
    return sample(TwoFeatureTask(), N, generator=torch.Generator().manual_seed(0))


def pixels() -> tuple[Tensor, Tensor]:
    """Standard normal numbers of CIFAR's shape, labels by halves: for the time only, nothing is learned from them."""
    x = torch.randn(N, WIDE, generator=torch.Generator().manual_seed(0))
    return x, (torch.arange(N) >= N // 2).long()


def sweep(x: Tensor, labels: Tensor, *, epochs: int, num_seeds: int) -> float:
    """Seconds of our trainer on the sixty settings."""
    training = LinearTraining(epochs=epochs, batch_size=BATCH)
    return seconds(lambda: train_linear(x, labels, all_settings(), seeds=range(num_seeds), training=training))


def wide_in_a_child(*, epochs: int, num_seeds: int) -> tuple[float, float]:
    """Seconds and peak memory (MB) of our wide sweep, in a process that does nothing else."""
    script = f"import runpy; runpy.run_path({__file__!r})['wide_child']({epochs}, {num_seeds})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(loads(done.stdout))


def wide_child(epochs: int, num_seeds: int) -> None:
    """Print seconds and peak memory (MB) of our wide sweep, as JSON."""
    x, labels = pixels()
    sweep(x, labels, epochs=1, num_seeds=1)
    spent = sweep(x, labels, epochs=epochs, num_seeds=num_seeds)
    print(dumps([spent, peak_memory()]))


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts from the memory of the parent
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024 / 1e6
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


# Rows --------------------------------------------------------------------------------------------------------------


def rows(name: str, ours_s: float, floor_s: float, others, *, peak_mb: float | None = None):
    """Yield a row for each (name, seconds) of ``others``, as soon as it is known.

    Keys: name; ours_s; other; other_s; ratio (other_s / ours_s); floor_s; load (one-minute load average before and
    after the other was measured); peak_mb (of ours, where it was measured).
    """
    before = psutil.getloadavg()[0]
    for other, other_s in others:
        after = psutil.getloadavg()[0]
        yield {
            "name": name,
            "ours_s": round(ours_s, 3),
            "other": other,
            "other_s": round(other_s, 3),
            "ratio": round(other_s / ours_s, 2),
            "floor_s": round(floor_s, 3),
            "load": [round(before, 2), round(after, 2)],
            "peak_mb": None if peak_mb is None else round(peak_mb),
        }
        before = after


def measure(*, quick: bool):
    """Yield all rows."""
    counts = sorted({1, min(2, os.cpu_count() or 1)})  # tiny shapes are faster on one thread

    epochs, num_seeds = (4, 1) if quick else (EPOCHS, SEEDS)
    ours_s, peak_mb = wide_in_a_child(epochs=epochs, num_seeds=num_seeds)
    ours_s *= EPOCHS / epochs * SEEDS / num_seeds
    floor_s = floor(WIDE, seeds_at_once=1)
    name = "d=3072, 300 models" + (f" (ours scaled from {num_seeds} seed, {epochs} epochs)" if quick else "")
    others = [("matrix products alone (the floor)", floor_s)]
    yield from rows(name, ours_s, floor_s, others, peak_mb=peak_mb)
    effort = dict(loader_epochs=1, index_epochs=1) if quick else dict(loader_epochs=2, index_epochs=3)
    others = one_at_a_time(*pixels(), **effort, counts=counts)
    yield from rows(name, ours_s, floor_s, others, peak_mb=peak_mb)

    x, labels = synthetic()
    with threads(1):
        floor_s = floor(x.shape[1], seeds_at_once=SEEDS)
    sweep(x, labels, epochs=1, num_seeds=SEEDS)
    ours_s = sweep(x, labels, epochs=EPOCHS, num_seeds=SEEDS)
    name = f"d={x.shape[1]}, 300 models"
    effort = dict(loader_epochs=1, index_epochs=5) if quick else dict(loader_epochs=3, index_epochs=30)
    yield from rows(name, ours_s, floor_s, one_at_a_time(x, labels, **effort, counts=counts))
    yield from rows(name, ours_s, floor_s, vmapped(x, labels, epochs=10 if quick else EPOCHS, counts=counts))


def main(*, quick: bool) -> None:
    """Print the table, each row as soon as it is known."""
    for number, row in enumerate(measure(quick=quick)):
        _print(row, heading=number == 0)


def _print(row, *, heading: bool) -> None:
    if heading:
        print(f"torch {torch.__version__}, {os.cpu_count()} cores; seconds of 100 epochs; ratio = other / ours")
        print(f"{'ours':>9} {'floor':>9} {'other':>10} {'ratio':>9}  {'load':12}  what")
    load = " to ".join(f"{value:.2f}" for value in row["load"])
    memory = "" if row["peak_mb"] is None else f"; our peak memory {row['peak_mb']} MB"
    print(
        f"{row['ours_s']:9.2f} {row['floor_s']:9.2f} {row['other_s']:10.1f} {row['ratio']:9.2f}  {load:12}  "
        f"{row['name']}: {row['other']}{memory}",
        flush=True,
    )
