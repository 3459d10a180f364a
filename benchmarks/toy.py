"""The teacher-student toy: all seeds and settings at once against one seed at a time by autograd, in one run.

Run by ``labelaug bench``.
"""

import time

import numpy as np
import torch

from labelaug.data.teacher import TeacherTask, draw_teachers, labelled_moments, population_moments
from labelaug.theory.random_features import risk, weights_at
from labelaug.training.toy import ToySetting, ToyTraining, train_toy

SETTINGS = (ToySetting(), ToySetting(lam=0.5), ToySetting(lam=0.3), ToySetting(lam=0.1), ToySetting(alpha=1.0))
SEEDS, EPOCHS, CLOSED_SEEDS, CLOSED_TIMES = 20, 10_000, 100, 200
WANTED_SECONDS, WANTED_RATIO, WANTED_CLOSED = 15, 50, 1


def autograd_loop(
    draws, seed: int, setting: ToySetting, training: ToyTraining, *, epochs: int, generator
) -> torch.Tensor:
    """One seed as one would write it: a Linear layer, a new permutation and λ each epoch, backward, optimiser."""
    first, x, y = (torch.as_tensor(a[seed], dtype=torch.float32) for a in (draws.first, draws.x, draws.y))
    layer = torch.nn.Linear(len(first), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(training.start_std * torch.as_tensor(draws.start[seed])[None])
    optimiser = torch.optim.SGD(layer.parameters(), lr=training.learning_rate)
    for _ in range(epochs):
        inputs, targets = x, y
        if setting.mixes:
            lam = torch.rand((), generator=generator) if setting.lam is None else setting.lam
            partner = torch.randperm(len(x), generator=generator)
            inputs, targets = lam * x + (1 - lam) * x[partner], lam * y + (1 - lam) * y[partner]
        loss = training.loss_factor * torch.nn.functional.mse_loss(layer(torch.tanh(inputs @ first.T))[:, 0], targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.weight.detach()[0]


def measure(*, quick: bool) -> list[dict]:
    """Two rows: the stochastic runs and the closed form."""
    epochs = EPOCHS // 20 if quick else EPOCHS
    draws, training = draw_teachers(TeacherTask(), 20, seeds=range(SEEDS)), ToyTraining(epochs=epochs)
    train_toy(draws, SETTINGS, ToyTraining(epochs=20), dtype=torch.float32)  # warm-up
    began = time.perf_counter()
    train_toy(draws, SETTINGS, training, dtype=torch.float32)
    seconds = time.perf_counter() - began

    some, generator, cores = (100 if quick else 1000), torch.Generator().manual_seed(0), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        autograd_loop(draws, 0, SETTINGS[1], training, epochs=20, generator=generator)
        began = time.perf_counter()
        for setting in SETTINGS:
            autograd_loop(draws, 0, setting, training, epochs=some, generator=generator)
        a_step = (time.perf_counter() - began) / some  # of one seed in all settings
    finally:
        torch.set_num_threads(cores)
    loop = a_step * SEEDS * epochs

    many = draw_teachers(TeacherTask(), 20, seeds=range(CLOSED_SEEDS))
    began = time.perf_counter()
    test = population_moments(many)
    moments_seconds = time.perf_counter() - began
    began = time.perf_counter()
    train = labelled_moments(many, ([0.5], [1.0]), inputs="pairs", labels="mixup")
    times = np.linspace(0, EPOCHS, CLOSED_TIMES).round()
    weights = weights_at(
        train.moment, train.cross, training.start_std * many.start, times, learning_rate=training.rate, discrete=True
    )
    risk(weights, test.moment, test.cross, test.power)
    closed = time.perf_counter() - began
    return [
        {
            "what": f"stochastic, {SEEDS} seeds x {len(SETTINGS)} settings x {epochs} epochs",
            "seconds": seconds,
            "wanted_seconds": WANTED_SECONDS * epochs / EPOCHS,
            "loop_seconds": loop,
            "ratio": loop / seconds,
            "wanted_ratio": WANTED_RATIO,
        },
        {
            "what": f"closed form, {CLOSED_SEEDS} seeds x {len(times)} times, one λ",
            "seconds": closed,
            "wanted_seconds": WANTED_CLOSED,
            "test_moments_seconds": moments_seconds,  # once for all λ and times
        },
    ]


def main(*, quick: bool) -> None:
    """Print the table."""
    for row in measure(quick=quick):
        line = f"{row['what']:56s}{row['seconds']:8.2f} s (wanted {row['wanted_seconds']:g} s)"
        if "ratio" in row:
            line += (
                f"; one seed at a time {row['loop_seconds']:.0f} s, {row['ratio']:.0f}x (wanted {row['wanted_ratio']}x)"
            )
        else:
            line += f"; moments of the test law, once: {row['test_moments_seconds']:.2f} s"
        print(line)
