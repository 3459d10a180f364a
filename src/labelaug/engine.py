"""Studies trained: what is missing is run, here or on a cluster, goes on after any stop, and is merged into one file.

In the runs folder a trial has up to four files under its key: ``<key>.parquet``, its result; ``<key>.checkpoint``, how
far it has come; ``<key>.partial.parquet``, its rows up to there, a small file that is never taken for a result;
``<key>.lock``, held by the process that trains it (the system lets go of it when its holder dies).
"""

import math
import multiprocessing
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import connection, resource_tracker
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout, UnixFileLock
from tqdm import tqdm

from labelaug import results
from labelaug.processes import ending
from labelaug.results import ResultsError
from labelaug.studies import STUDIES
from labelaug.training.deep import COLUMNS
from labelaug.trials import Stopped, Trial, check_trial, run_trial

GRACE = 10.0  # seconds that Ctrl-C gives running trials to reach the end of an epoch
GO_ON = "the same command goes on from there"


class TrainingError(RuntimeError):
    """Trials failed, or a cluster cannot be used; one sentence."""


def run_trials(
    trials: Sequence[Trial],
    *,
    runs: Path,
    data_dir: Path | None,
    device: str,
    workers: int = 1,
    scheduler: str | None = None,
    minutes: float | None = None,
    run: Callable[..., pd.DataFrame] = run_trial,
) -> list[str]:
    """Run the trials that have no result in ``runs`` yet, in their order.

    Args: data_dir: folder of the image sets (None on a cluster: each worker's own); scheduler: address of a dask
        scheduler, used in place of ``workers`` processes here; minutes: after which no trial is begun, and running
        ones stop at the end of their epoch, with a checkpoint and their rows so far; run: what trains one, with the
        arguments of ``run_trial``.
    Returns: keys of the trials whose results were written by this call.
    Raises: TrialRefused before anything is trained; TrainingError when all is done that can be and a trial failed, or
        if the cluster cannot be used.
    """
    runs = Path(runs).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    trials = list({trial.key: trial for trial in trials}.values())
    todo = [trial for trial in trials if not has_result(trial, runs, say=say)]
    if not todo:
        say(f"all {len(trials)} trials are done")
        return []
    seconds = math.inf if minutes is None else 60 * minutes
    if scheduler is not None:
        from labelaug import cluster

        task = cluster.Task(runs, data_dir, device, time.time() + seconds, run)
        return _finish(cluster.train(todo, scheduler, task=task, display=Display(todo, 0)), len(todo))
    for trial in todo:
        check_trial(trial, data_dir=data_dir, device=device)
    one_thread = workers > 1 or device == "cpu"
    workers = min(workers, len(todo))
    crew = _Crew(workers, (device, one_thread, runs, data_dir, run), Display(todo, workers))
    return _finish(crew.train(todo, time.monotonic() + seconds), len(todo))


def read_result(trial: Trial, runs: Path) -> tuple[pd.DataFrame, dict] | None:
    """Rows and provenance of a finished trial; None if it has no result.

    A description may lack fields that came later: the key says that they have their neutral default.
    Raises: ResultsError if the file is damaged, not this trial's, or holds the rows of a trial that is not finished.
    """
    return _read(trial, Path(runs) / f"{trial.key}.parquet", unfinished=False)


def read_partial(trial: Trial, runs: Path) -> tuple[pd.DataFrame, dict] | None:
    """Rows so far of a trial that was stopped, the first ones of those of its result; None if there are none.

    The provenance is that of a result, with ``unfinished``: True, and ``epoch``: how many are whole.
    Raises: ResultsError if the file is damaged or not this trial's.
    """
    return _read(trial, Path(runs) / f"{trial.key}.partial.parquet", unfinished=True)


def _read(trial: Trial, path: Path, *, unfinished: bool) -> tuple[pd.DataFrame, dict] | None:
    if not path.exists():
        return None
    frame, provenance = results.read_table(path)
    ours = list(frame.columns) == COLUMNS and set(frame["key"]) == {trial.key}
    ours &= provenance.get("unfinished", False) == unfinished
    if not ours or not _agrees(provenance.get("description"), results.described(trial, 0.0)["description"]):
        raise ResultsError(f"{path} is not the result of {trial.label}{', as far as it is' if unfinished else ''}")
    return frame, provenance


def shorten(trial: Trial, epochs: int, runs: Path) -> Trial:
    """Take the rows of a trial that was stopped for the result of the trial that ends after ``epochs`` epochs.

    The two are one training as far as the shorter goes: what an epoch draws depends on the seed and the epoch alone,
    and so do its learning rate and method. The result's provenance names the longer trial, ``shortened_from``; its
    seconds are those of all the epochs that were made.
    Returns: the shorter trial, whose result is now in ``runs``.
    Raises: ValueError if the longer trial was not measured after ``epochs`` epochs, is switched only later or has a
        teacher; ResultsError if there are no rows up to there.
    """
    found, setting = read_partial(trial, runs), trial.setting
    if found is None or found[1]["epoch"] < epochs:
        raise ResultsError(f"{trial.label}: there are no rows up to epoch {epochs} in {runs}")
    if epochs not in setting.records or trial.teacher is not None:  # a teacher is measured with the last record alone
        raise ValueError(f"{trial.label} has no record of a training that ends after {epochs} epochs")
    records = tuple(epoch for epoch in setting.records if epoch <= epochs)
    milestones = tuple(epoch for epoch in setting.milestones if epoch <= epochs)
    shorter = replace(
        trial,
        setting=replace(setting, epochs=epochs, record_epochs=records, milestones=milestones),
        gradient_epochs=tuple(epoch for epoch in trial.gradient_epochs if epoch <= epochs),
    )
    rows, provenance = found
    rows = rows[rows["epoch"] <= epochs].assign(key=shorter.key)
    end = rows.iloc[[-1]].assign(split="train", metric="diverged", value=0.0)
    rest = {name: value for name, value in provenance.items() if name not in ("unfinished", "epoch")}
    provenance = rest | {"shortened_from": trial.key} | results.described(shorter, provenance["seconds"])
    rows = pd.concat([rows, end], ignore_index=True)
    results.write_parquet(Path(runs) / f"{shorter.key}.parquet", rows, provenance)
    return shorter


def has_result(trial: Trial, runs: Path, *, say: Callable[[str], None] = lambda text: None) -> bool:
    """Whether a trial has a sound result; one that is not is told through ``say``."""
    try:
        return read_result(trial, runs) is not None
    except ResultsError:
        say(f"{trial.label}: its result {trial.key}.parquet is damaged or another trial's, and is computed again")
        return False


def write_result(trial: Trial, frame: pd.DataFrame, environment: dict, *, runs: Path) -> float:
    """Write a trial's result, then drop its checkpoint and partial rows. Returns: seconds of training, in all pieces.

    The rows kept are a function of the description; the training's wall time goes into the provenance.
    Args: frame: rows as ``run_trial`` returns them; environment: of the process that trained.
    """
    seconds = _write(trial, frame, environment, runs / f"{trial.key}.parquet")
    for name in ("checkpoint", "partial.parquet"):
        (runs / f"{trial.key}.{name}").unlink(missing_ok=True)
    return seconds


def write_partial(trial: Trial, frame: pd.DataFrame, environment: dict, *, runs: Path) -> None:
    """Write the rows of a running trial, as ``run_trial`` keeps them, over those that were written before."""
    mark = {"unfinished": True, "epoch": int(frame["epoch"].iloc[-1])}
    _write(trial, frame, environment | mark, runs / f"{trial.key}.partial.parquet")


def _write(trial: Trial, frame: pd.DataFrame, environment: dict, path: Path) -> float:
    timing = (frame["split"] == "train") & (frame["metric"] == "seconds")
    seconds = float(frame.loc[timing, "value"].iloc[-1])
    provenance = environment | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    rows = frame.loc[~timing, COLUMNS].reset_index(drop=True)
    results.write_parquet(path, rows, provenance | results.described(trial, seconds))
    return seconds


@contextmanager
def lock(trial: Trial, runs: Path) -> Iterator[bool]:
    """Hold the trial's lock; yields False, at once, if another process holds it.

    Raises: TrainingError if the folder, or its file system, allows none.
    """
    path = runs / f"{trial.key}.lock"
    held = FileLock(path)
    try:
        with suppress(Timeout):
            held.acquire(timeout=0)
    except OSError as error:
        raise TrainingError(
            f"cannot lock {path}: {error.strerror}; name a folder on another disk with --runs"
        ) from None
    try:
        yield held.is_locked
    finally:
        if held.is_locked and isinstance(held, UnixFileLock):  # others remove the file when they let go of it
            path.unlink(missing_ok=True)
        held.release()


def merge(study: str, scale: str, *, runs: Path, folder: Path) -> Path | None:
    """Write ``<study>-<scale>.parquet``: what the file holds already, and the study's trials finished in ``runs``.

    A trial that is in both with different rows stays as the file has it, which is said on standard error. The same
    inputs give the same bytes.
    Returns: the file; None if there is nothing to write.
    Raises: ResultsError if the file is damaged: it is not replaced.
    """
    path = Path(folder) / f"{study}-{scale}.parquet"
    frames, records = {}, {}
    if path.exists():
        held = results.load_study(study, scale, folder=folder)
        frames = dict(list(held.rows.groupby("key")))
        records = results.read_table(path)[1]["trials"]
    for trial in STUDIES[study](scale):
        with suppress(ResultsError):  # damaged: told, and trained again, by the next run
            if found := read_result(trial, runs):
                frame, provenance = found
                if trial.key not in records:
                    frames[trial.key], records[trial.key] = frame, provenance
                elif not frames[trial.key].reset_index(drop=True).equals(frame):
                    say(f"{trial.label}: {path.name} holds other rows for it, which stay; those in {runs} are left out")
    if not records:
        return None
    keys = sorted(records)
    provenance = {"study": study, "scale": scale, "trials": {key: records[key] for key in keys}}
    rows = pd.concat([frames[key] for key in keys], ignore_index=True)
    return results.write_parquet(path, rows, provenance)


def status(trial: Trial, runs: Path) -> tuple[str, float | None]:
    """How far a trial is, in words, and its training seconds if it is done."""
    with suppress(ResultsError):
        if found := read_result(trial, runs):
            return "done", found[1]["seconds"]
    checkpoint = runs / f"{trial.key}.checkpoint"
    if checkpoint.exists():
        with suppress(Exception):  # a damaged checkpoint may raise anything; the next run tells of it
            return f"checkpoint at epoch {torch.load(checkpoint, weights_only=True, map_location='cpu')['epoch']}", None
    with suppress(ResultsError):
        if found := read_partial(trial, runs):
            return f"rows up to epoch {found[1]['epoch']}", None
    return "to do", None


def say(text: str) -> None:
    """A line on standard error, above any bars."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def _agrees(stored, now) -> bool:
    """Whether a stored description says nothing else than the present one."""
    if isinstance(stored, dict) and isinstance(now, dict):
        return bool(stored) and all(name in now and _agrees(value, now[name]) for name, value in stored.items())
    return stored == now


def _finish(display: "Display", wanted: int) -> list[str]:
    """Sum up on standard error. Raises: TrainingError if a trial failed."""
    left = wanted - len(display.done) - len(display.elsewhere) - len(display.failed)
    if left:
        say(f"time is up, and {left} of {wanted} trials are not finished: {GO_ON}")
    if display.failed:
        labels = "; ".join(display.failed)
        raise TrainingError(f"{len(display.failed)} of {wanted} trials failed: {labels}; the same command tries again")
    return display.done


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


class Display:
    """What becomes of the trials: on a terminal a bar a worker and one in all, elsewhere a line a finished trial.

    ``done`` holds keys of trials finished by us, ``elsewhere`` of those that another process finished or trains,
    ``failed`` labels.
    """

    def __init__(self, trials: Sequence[Trial], workers: int):
        self.wanted = len(trials)
        self.done, self.elsewhere, self.failed = [], [], []
        self.epochs = sum(trial.setting.epochs for trial in trials)
        self.shown = sys.stderr.isatty()
        shown = {"file": sys.stderr, "unit": "epoch", "disable": not self.shown, "dynamic_ncols": True}
        self.bars = [tqdm(position=slot, leave=False, **shown) for slot in range(workers)]
        self.total = tqdm(desc=f"0/{self.wanted} trials", total=self.epochs, position=workers, smoothing=0, **shown)
        self.began = time.perf_counter()
        self.made = self.settled = 0  # epochs made here; epochs made or no longer to be made
        self.reached = {}  # epoch by key

    def epoch(self, trial: Trial, epoch: int, slot: int | None = None) -> None:
        """``epoch`` epochs of the trial are made, in earlier pieces or now; 0 while it prepares."""
        before = self.reached.get(trial.key)
        self.reached[trial.key] = epoch
        earlier = max(0, epoch - 1) if not before else before  # epochs of earlier pieces took none of our time
        self.made += epoch - earlier
        self._settle(epoch - (before or 0), epoch - earlier)
        if self.shown and slot is not None:
            bar = self.bars[slot]
            if before is None:
                bar.reset(total=trial.setting.epochs)
                bar.set_description_str(trial.label)
            if not before:
                bar.initial = bar.n = earlier
            bar.update(epoch - earlier)

    def finished(self, trial: Trial, seconds: float) -> None:
        self.done.append(trial.key)
        rest = trial.setting.epochs - self.reached.get(trial.key, 0)  # all of them on a cluster, 0 here
        self.made += rest
        self._settle(rest, rest)
        if not self.shown:
            say(f"{len(self.done)}/{self.wanted} {trial.label}: {seconds:.1f} s{self._left()}")

    def not_ours(self, trial: Trial, text: str) -> None:
        self.elsewhere.append(trial.key)
        self._settle(trial.setting.epochs, 0)
        say(f"{trial.label}: {text}")

    def fails(self, trial: Trial, text: str) -> None:
        self.failed.append(trial.label)
        self._settle(trial.setting.epochs - self.reached.get(trial.key, 0), 0)
        say(f"{trial.label}: {text}")

    def close(self) -> None:
        for bar in (*self.bars, self.total):
            bar.close()

    def _settle(self, epochs: int, made: int) -> None:
        self.settled += epochs
        if self.shown:
            self.total.initial += epochs - made  # the rate, and so the time left, counts epochs that took time
            self.total.set_description_str(f"{len(self.done)}/{self.wanted} trials", refresh=False)
            self.total.update(epochs)

    def _left(self) -> str:
        if not self.made or self.settled >= self.epochs:
            return ""
        seconds = (self.epochs - self.settled) * (time.perf_counter() - self.began) / self.made
        return f", about {tqdm.format_interval(seconds)} left"


# ---------------------------------------------------------------------------------------------------------------------
# Processes of this machine


class _Worker:
    """A process that trains one trial after the other; None, or the end of the pipe, stops it after an epoch."""

    def __init__(self, slot: int, arguments: tuple):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.slot, self.trial, self.told = slot, None, False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        with _without_ctrl_c():
            self.process.start()
        theirs.close()  # so that the death of the process ends the pipe

    def send(self, trial: Trial | None) -> None:
        self.trial, self.told = trial or self.trial, trial is None
        with suppress(OSError):  # it is dead, and its pipe will say so
            self.pipe.send(trial)

    def stop(self) -> None:
        if not self.told:
            self.send(None)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal: not those that are started here, from their first moment.

    Windows has no signals to block: there a worker ignores it from the moment at which it has been imported.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # The first start of a process starts multiprocessing's own tracker too, which would end the blocking: hence before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Crew:
    """The workers, and the trials on their way through them."""

    def __init__(self, size: int, arguments: tuple, display: Display):
        self.size, self.arguments, self.display = size, arguments, display
        self.workers: list[_Worker] = []
        self.queue, self.locked = deque(), []

    def train(self, todo: Sequence[Trial], deadline: float) -> Display:
        self.queue.extend(todo)
        again = True  # trials that another process held are asked for once more at the end
        try:
            while True:
                if time.monotonic() >= deadline:
                    self.queue.clear()
                    self._stop()
                self._assign()
                busy = [worker for worker in self.workers if worker.trial]
                if not busy and self.locked and again and time.monotonic() < deadline:
                    again = False
                    self.queue.extend(self.locked)
                    self.locked.clear()
                elif not busy and not self.queue:
                    break
                else:
                    self._listen(None if deadline == math.inf else max(0.0, deadline - time.monotonic()) or None)
            for trial in self.locked:
                self.display.not_ours(trial, "another process is training it")
        except KeyboardInterrupt:
            say("stopping at the end of the running epochs; Ctrl-C again to stop at once")
            self._leave()
            say(f"stopped with {len(self.display.done)} trials done and the others at their checkpoints: {GO_ON}")
            raise
        finally:
            self.display.close()
            self._stop()
            for worker in self.workers:
                worker.process.join(None if worker.trial is None else 0)
                worker.process.kill()
                worker.process.join()
        return self.display

    def _assign(self) -> None:
        while self.queue and (worker := self._idle()):
            worker.send(self.queue.popleft())

    def _idle(self) -> _Worker | None:
        for worker in self.workers:
            if worker.trial is None and not worker.told:
                return worker
        if len(self.workers) == self.size:
            return None
        slot = min(set(range(self.size)) - {worker.slot for worker in self.workers})
        self.workers.append(_Worker(slot, self.arguments))
        return self.workers[-1]

    def _listen(self, seconds: float | None) -> None:
        """Take in what the workers tell; at most ``seconds``."""
        pipes = {worker.pipe: worker for worker in self.workers}
        dead = {worker.process.sentinel: worker for worker in self.workers}
        ready = connection.wait([*pipes, *dead], seconds)
        for worker in [pipes[pipe] for pipe in ready if pipe in pipes]:
            try:
                kind, *told = worker.pipe.recv()
            except (EOFError, OSError):
                self._buried(worker)
                continue
            trial = worker.trial
            if kind == "epoch":
                self.display.epoch(trial, *told, slot=worker.slot)
                continue
            if kind == "warns":
                say(f"{trial.label}: {told[0]}")
                continue
            worker.trial = None
            if kind == "done":
                self.display.finished(trial, *told)
            elif kind == "there":
                self.display.not_ours(trial, "another process has trained it")
            elif kind == "locked":
                self.locked.append(trial)
            elif kind == "failed":
                self.display.fails(trial, *told)
        for worker in [dead[sentinel] for sentinel in ready if sentinel in dead]:
            if worker.pipe not in ready:  # all that it told is read; Windows may keep the other end open
                self._buried(worker)

    def _buried(self, worker: _Worker) -> None:
        """A worker has ended: it was told to leave, or it was killed."""
        self.workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        if worker.trial:
            self.display.fails(worker.trial, f"its process {ending(worker.process.exitcode)}")

    def _stop(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _leave(self) -> None:
        """Give the running trials ``GRACE`` seconds to write their checkpoints."""
        self._stop()
        until = time.monotonic() + GRACE
        with suppress(KeyboardInterrupt):
            while self.workers and (left := until - time.monotonic()) > 0:
                self._listen(left)


def _work(pipe, device: str, one_thread: bool, runs: Path, data_dir: Path, run) -> None:
    """Train what comes through the pipe and tell how it goes; leave when None comes or the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if one_thread:
        torch.set_num_threads(1)
    warnings.showwarning = lambda message, *where: pipe.send(("warns", str(message)))
    environment = results.environment(device)  # now: of the code that has just been imported
    with suppress(EOFError, OSError):
        while (trial := pipe.recv()) is not None:
            try:
                told = _train(trial, pipe, device, runs, data_dir, run, environment)
            except Exception as error:
                told = ("failed", why(error))
            pipe.send(told)


def _train(trial: Trial, pipe, device: str, runs: Path, data_dir: Path, run, environment: dict) -> tuple:
    """One trial, unless another process is at it or was: what is told to the parent."""

    def progress(epochs: int) -> None:
        try:
            pipe.send(("epoch", epochs))
            stop = pipe.poll()
        except OSError:  # the parent is gone
            stop = True
        if stop:
            raise Stopped

    with lock(trial, runs) as held:
        if not held:
            return ("locked",)
        if has_result(trial, runs):
            return ("there",)
        for part in runs.glob(f".{trial.key}.*.part"):  # of a process that was killed while it wrote
            part.unlink()
        options = {"data_dir": data_dir, "device": device, "checkpoint": runs / f"{trial.key}.checkpoint"}
        keep = partial(write_partial, trial, environment=environment, runs=runs)
        try:
            frame = run(trial, **options, progress=progress, keep=keep)
        except Stopped:
            return ("stopped",)
        return ("done", write_result(trial, frame, environment, runs=runs))


def why(error: Exception) -> str:
    """The sentence of an exception of the package; a traceback for any other, which is a bug."""
    if type(error).__module__.startswith("labelaug."):
        return str(error)
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}".rstrip()
