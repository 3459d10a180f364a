"""Trials on a dask cluster: each is one task under its key, and what the workers find is written here, once."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from labelaug import paths, results
from labelaug.engine import GO_ON, Display, TrainingError, has_result, lock, say, why, write_partial, write_result
from labelaug.trials import Stopped, Trial, TrialRefused, check_trial

CONNECT = 10.0  # seconds without an answer after which a scheduler is given up


@dataclass(frozen=True)
class Task:
    """What every trial of a call has in common, sent to the workers.

    Args: runs: folder of checkpoints where a worker sees it too, else they lie in the worker's own; data_dir: folder of
        the image sets on the workers, None for each worker's own default; deadline: on the wall clock, in seconds.
    """

    runs: Path
    data_dir: Path | None
    device: str
    deadline: float
    run: Callable[..., pd.DataFrame]

    @property
    def left(self) -> float | None:
        """Seconds until the deadline, at least 0; None if there is none."""
        return None if self.deadline == math.inf else max(0.0, self.deadline - time.time())

    @property
    def images(self) -> Path:
        """The data folder, on the machine where this is asked."""
        return paths.data_dir(self.data_dir)


def train(todo: Sequence[Trial], address: str, *, task: Task, display: Display) -> Display:
    """Run trials on the cluster, the first ones first; a result is written as soon as it is there.

    Raises: TrainingError if the cluster does not answer, or is lost; TrialRefused, by a worker, before anything is
        trained.
    """
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=CONNECT)
    except (OSError, ValueError) as error:
        raise TrainingError(f"no dask scheduler answers at {address}: start one, or correct the address") from error
    with client:
        try:
            if _checked(client, todo, task):
                _collect(client, todo, task, display)
        except KeyboardInterrupt:  # the client's end cancels its tasks, which stop at the end of their epochs
            say(f"stopped with {len(display.done)} trials done: {GO_ON}")
            raise
        finally:
            display.close()
    return display


def _distributed():
    try:
        import distributed
    except ImportError:
        raise TrainingError('a cluster needs dask: pip install "labelaug[cluster]"') from None
    return distributed


def _checked(client, todo: Sequence[Trial], task: Task) -> bool:
    """Have a worker check every trial; False if none came in time."""
    if not client.scheduler_info()["workers"]:
        say("the cluster has no worker yet: waiting for one")
    try:
        client.submit(_check, list(todo), task, pure=False, priority=1).result(timeout=task.left)
    except TimeoutError:
        return False
    return True


def _collect(client, todo: Sequence[Trial], task: Task, display: Display) -> None:
    """Submit every trial; write the results in the order in which they come."""
    from distributed import as_completed

    trials = {trial.key: trial for trial in todo}
    futures = {
        key: client.submit(_remote, trial, task, key=key, priority=-rank, pure=False)
        for rank, (key, trial) in enumerate(trials.items())
    }
    try:
        for future in as_completed(list(futures.values()), timeout=task.left):
            _take(futures.pop(future.key), trials[future.key], task, display)
    except TimeoutError:
        running = {key for keys in client.processing().values() for key in keys}
        client.cancel([future for key, future in futures.items() if key not in running])
        for future in as_completed([future for key, future in futures.items() if key in running]):
            _take(future, trials[future.key], task, display)


def _take(future, trial: Trial, task: Task, display: Display) -> None:
    """Write what a task has found, unless another process has, or has the trial in hand."""
    if future.status == "cancelled":  # by us only after the deadline
        if task.left != 0:
            raise TrainingError(f"the cluster is lost, with {len(display.done)} trials done: {GO_ON}")
        return
    if future.status == "error":  # a trial that raises is told below
        return display.fails(trial, _gave_up(future.exception()))
    kind, *told = future.result()
    if kind == "failed":
        display.fails(trial, *told)
    if kind == "done":
        with lock(trial, task.runs) as held:
            if held and not has_result(trial, task.runs):
                display.finished(trial, write_result(trial, *told, runs=task.runs))
            else:
                display.not_ours(trial, "another process has it in hand")
    if kind == "stopped" and told:
        with lock(trial, task.runs) as held:
            if held and not has_result(trial, task.runs):
                write_partial(trial, *told, runs=task.runs)


def _gave_up(error: Exception) -> str:
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):  # dask keeps no exit code
        lost = error.allowed_failures + 1
        return f"{lost} workers were lost one after the other with this trial in hand; the log of the last says why"
    return why(error)


# ---------------------------------------------------------------------------------------------------------------------
# On the workers


def _check(todo: Sequence[Trial], task: Task) -> None:
    _one_at_a_time()
    for trial in todo:
        check_trial(trial, data_dir=task.images, device=task.device)


def _remote(trial: Trial, task: Task) -> tuple:
    """Train one trial: "done" with rows and environment, "failed" with a sentence, "stopped" with what there is."""
    from distributed import get_worker

    worker = get_worker()
    if task.device == "cpu":
        torch.set_num_threads(1)

    def progress(epochs: int) -> None:
        known = worker.state.tasks.get(trial.key)
        if task.left == 0 or known is None or known.state == "cancelled":  # time is up, or nobody waits for it
            raise Stopped

    shared, rows = task.runs.is_dir(), None

    def keep(frame: pd.DataFrame) -> None:
        nonlocal rows
        rows = frame
        if shared:
            write_partial(trial, frame, _environment(task.device), runs=task.runs)

    checkpoint = (task.runs if shared else Path(worker.local_directory)) / f"{trial.key}.checkpoint"
    options = {"data_dir": task.images, "device": task.device, "checkpoint": checkpoint}
    try:
        _one_at_a_time()
        if task.left == 0:
            raise Stopped
        frame = task.run(trial, **options, progress=progress, keep=keep)
    except Stopped:
        return ("stopped",) if rows is None else ("stopped", rows, _environment(task.device))
    except Exception as error:
        return ("failed", why(error))
    if not shared:  # a shared one goes when the result is written
        checkpoint.unlink(missing_ok=True)
    return ("done", frame, _environment(task.device))


@cache
def _environment(device: str) -> dict:
    return results.environment(device)


def _one_at_a_time() -> None:
    """torch's threads and random state are the process's own: two trials in one would disturb each other."""
    from distributed import get_worker

    if (threads := get_worker().state.nthreads) > 1:
        raise TrialRefused(f"a worker trains one trial at a time, and one has {threads} threads: start it with 1")
