"""Trials that a test stops in their course: they wait for it, so that no clock decides where they are stopped."""

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from labelaug.studies import STUDIES
from labelaug.trials import Images, Network, Stopped, run_trial

STUDY = "over-training"
EPOCHS = 12  # of a trial that is to be stopped in its course


def small(seed: int, epochs: int = 2):
    """A trial of the smoke study on a small network and images of our own: an epoch takes ten milliseconds."""
    trial = STUDIES[STUDY]("smoke")[0]
    setting = replace(trial.setting, epochs=epochs, record_epochs=(epochs // 2, epochs), milestones=(1,))
    images, network = Images("toy"), Network("mlp", 8)
    return replace(trial, images=images, network=network, setting=setting, seed=seed, gradient_epochs=())


TRIALS = [small(seed) for seed in range(4)]
LONG = [small(seed, EPOCHS) for seed in range(4)]


def note(log, trial) -> None:
    """A line in ``log``: which trial, and which process is at it."""
    with open(log, "a") as file:
        file.write(f"{trial.key} {os.getpid()}\n")


def noted(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def holds(trial, *, log, at, progress, **options):
    """``run_trial`` that waits in the middle of epoch ``at`` until it is told to stop, and notes that it waits."""

    def holding(epoch):
        progress(epoch)
        if epoch == at - 1:
            note(log, trial)
            wait_until_told(lambda: progress(epoch))

    return run_trial(trial, progress=holding, **options)


def wait_until_told(progress) -> None:
    with suppress(Stopped):
        while True:
            time.sleep(0.01)
            progress()


class Clock:
    """Stands for the engine's ``time``: an hour goes by as soon as ``happened`` is true."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, happened):
        self.happened = happened

    def time(self) -> float:
        return time.time() + 3600 * bool(self.happened())

    def monotonic(self) -> float:
        return time.monotonic() + 3600 * bool(self.happened())


def holds_once(trial, *, log, at, **options):
    """A checkpoint after every epoch; the first trial that is begun ``holds``."""
    try:
        open(f"{log}.first", "x").close()
    except FileExistsError:
        return run_trial(trial, checkpoint_seconds=0, **options)
    return holds(trial, log=log, at=at, checkpoint_seconds=0, **options)
