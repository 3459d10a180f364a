"""Studies trained: one result a trial whoever starts it, nothing lost when something is killed, and one merged file."""

import ast
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from click.testing import CliRunner
from conftest import wait_for
from held import LONG, STUDY, TRIALS, Clock, holds, note, noted, small
from packaging.requirements import Requirement
from pandas.testing import assert_frame_equal

import labelaug
from labelaug import cluster, engine, paths, results
from labelaug.cli import main
from labelaug.engine import (
    TrainingError,
    has_result,
    lock,
    merge,
    read_partial,
    read_result,
    run_trials,
    shorten,
    status,
    write_partial,
    write_result,
)
from labelaug.studies import STUDIES
from labelaug.training.deep import COLUMNS
from labelaug.trials import Images, TrialRefused, run_trial


def counts(trial, *, data_dir, device, checkpoint, progress, keep, log=os.devnull, dies=None, breaks=None, together=1):
    """Stands for ``run_trial`` where only the engine matters: counts epochs, and notes in ``log`` who does.

    It begins when ``together`` processes have noted something.
    """
    note(log, trial)
    if together > 1:
        wait_for(lambda: len({process for _, process in noted(log)}) >= together, "company")
    if trial.key == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    if trial.key == breaks:
        raise ZeroDivisionError("a bug")
    for epoch in range(1, trial.setting.epochs + 1):
        progress(epoch)
    rows = [
        (5, trial.setting.epochs, "test", "error", 0.1 * trial.seed),
        (5, trial.setting.epochs, "train", "seconds", 3.0),
    ]
    return pd.DataFrame(rows, columns=COLUMNS[2:]).assign(key=trial.key, seed=trial.seed)[COLUMNS]


def counted(trial, runs: Path) -> None:
    """The result of ``counts`` in a folder of runs, without an engine."""
    runs.mkdir(exist_ok=True)
    frame = counts(trial, data_dir=None, device="cpu", checkpoint=None, progress=lambda epoch: None, keep=None)
    write_result(trial, frame, results.environment(), runs=runs)


def write_images(path: Path, side: int = 8) -> None:
    """A set of noise, 10 classes of 12 and 4 images."""
    rng = np.random.default_rng(5)
    parts = {}
    for split, each in (("train", 12), ("test", 4)):
        parts[f"x_{split}"] = rng.integers(256, size=(10 * each, side, side, 3), dtype=np.uint8)
        parts[f"y_{split}"] = np.arange(10 * each) % 10
    np.savez(path, **parts)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "toy.npz")
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """On a busy machine the end of an epoch, and an answer, may take longer than a user would wait."""
    for module, name in ((engine, "GRACE"), (cluster, "CONNECT")):
        monkeypatch.setattr(module, name, 600)


@pytest.fixture
def go(runs, data_dir):
    """``run_trials`` in this test's folders."""
    return partial(run_trials, runs=runs, data_dir=data_dir, device="cpu")


@pytest.fixture
def start(runs, data_dir):
    """Starts a call of ``go`` in a process of its own, at the head of its own group of processes."""
    head = (
        "import test_engine\nfrom held import *\nfrom test_engine import *\nengine.GRACE = cluster.CONNECT = 600\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        f"go = partial(run_trials, runs=Path({str(runs)!r}), data_dir=Path({str(data_dir)!r}), device='cpu')\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    started = []

    def start(call: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{head}print(*{call})"],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def in_their_course(process: subprocess.Popen, log: Path, count: int = 1) -> list[list[str]]:
    """What is noted as soon as ``count`` trials of the process are."""
    wait_for(lambda: len(noted(log)) == count or process.poll() is not None, "a trial to be in its course")
    assert process.poll() is None, process.communicate()
    return noted(log)


@pytest.fixture(scope="module")
def undisturbed(data_dir):
    """The rows of a trial that nothing stopped, trained in this process."""

    def train(trial) -> pd.DataFrame:
        frame = run_trial(trial, data_dir=data_dir, device="cpu", checkpoint=None, progress=lambda epoch: None)
        return frame[frame["metric"] != "seconds"].reset_index(drop=True)

    return train


def rows_of(trial, runs: Path) -> pd.DataFrame:
    return read_result(trial, runs)[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def results_of(trials) -> list[str]:
    return sorted(f"{trial.key}.parquet" for trial in trials)


# Results


def test_trials_are_run_in_order_and_shared_among_workers(go, runs, tmp_path, capsys):
    """One result a trial and nothing else; a line each on standard error; nothing is left to do for a second call."""
    run = partial(counts, log=tmp_path / "log", together=2)
    assert set(go(TRIALS, workers=2, run=run)) == {trial.key for trial in TRIALS}
    keys, workers = zip(*noted(tmp_path / "log"), strict=True)
    assert set(keys[:2]) == {trial.key for trial in TRIALS[:2]} and len(set(keys)) == 4
    assert str(os.getpid()) not in workers and len(set(workers)) == 2
    assert names(runs) == results_of(TRIALS)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in said] == ["1/4", "2/4", "3/4", "4/4"]
    assert {line.partition(" ")[2].partition(": 3.0 s")[0] for line in said} == {trial.label for trial in TRIALS}
    assert "s, about " in said[0] and "left" in said[0] and "left" not in said[3]
    assert go(TRIALS, run=run) == [] and capsys.readouterr().err == "all 4 trials are done\n"


def test_a_result_keeps_its_time_apart_from_its_rows(runs):
    """The time, which no two runs share, is in the provenance; the rows are a function of the description."""
    counted(TRIALS[1], runs)
    frame, provenance = read_result(TRIALS[1], runs)
    assert list(frame["metric"]) == ["error"] and provenance["seconds"] == 3.0
    assert provenance["description"]["seed"] == TRIALS[1].seed and provenance["description"]["type"] == "Trial"
    assert provenance["description"]["images"]["planted"] == 0.0  # defaults too
    assert provenance["device"].startswith("CPU, ") and len(provenance["commit"]) in (4, 40)


def test_a_damaged_result_is_told_and_computed_again(go, runs, capsys):
    """Cut, altered, another trial's, or of another description."""
    for trial in TRIALS[:3]:
        counted(trial, runs)
    cut, renamed, other = (runs / f"{trial.key}.parquet" for trial in TRIALS[:3])
    frame, provenance = results.read_table(other)
    provenance["description"]["images"]["name"] = "other"
    results.write_parquet(other, frame, provenance)
    whole = cut.read_bytes()
    for place in (20, len(whole) - 6):  # in the first column's data, in the length of the footer
        cut.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert not has_result(TRIALS[0], runs), place
    cut.write_bytes(whole[:200])
    sound = renamed.read_bytes()
    renamed.write_bytes(whole)
    assert [status(trial, runs) for trial in TRIALS[:3]] == 3 * [("to do", None)]
    assert go(TRIALS[:3], run=counts) == [trial.key for trial in TRIALS[:3]]
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        f"{trial.label}: its result {trial.key}.parquet is damaged or another trial's, and is computed again"
        for trial in TRIALS[:3]
    ]
    assert len(said) == 6 and has_result(TRIALS[1], runs) and len(renamed.read_bytes()) >= len(sound) // 2


def test_a_result_from_before_a_field_existed_stays_valid(runs):
    """A key leaves out neutral defaults: a description may lack a field, but not say something else."""
    counted(TRIALS[0], runs)
    path = runs / f"{TRIALS[0].key}.parquet"
    frame, provenance = results.read_table(path)
    del provenance["description"]["images"]["planted"]
    results.write_parquet(path, frame, provenance)
    assert status(TRIALS[0], runs) == ("done", 3.0)
    provenance["description"]["setting"]["gone"] = 1
    results.write_parquet(path, frame, provenance)
    assert status(TRIALS[0], runs) == ("to do", None)


def test_a_trial_is_refused_before_anything_is_trained(go, runs, tmp_path):
    """The last of the list asks for images that are not there: the first is not begun either."""
    missing = replace(TRIALS[1], images=Images("nowhere"))
    with pytest.raises(TrialRefused, match="nowhere"):
        go([TRIALS[0], missing], run=partial(counts, log=tmp_path / "log"))
    assert not (tmp_path / "log").exists() and names(runs) == []


# Rows of a trial that is not finished


def prefix(rows: pd.DataFrame, epoch: int) -> pd.DataFrame:
    return rows[rows["epoch"] <= epoch].reset_index(drop=True)


def test_a_stop_brings_the_rows_home(go, runs, undisturbed, monkeypatch, tmp_path):
    """The time is up in the middle of two trials' epochs: their rows are the first ones of those that nothing stopped.

    They carry the provenance of a result and are none; with the result they go.
    """
    trials, log = LONG[:2], tmp_path / "log"
    monkeypatch.setattr(engine, "time", Clock(lambda: len(noted(log)) == 2))
    assert go([*trials, TRIALS[2]], workers=2, minutes=30, run=partial(holds, log=log, at=8)) == []
    endings = ("checkpoint", "partial.parquet")
    assert names(runs) == sorted(f"{trial.key}.{ending}" for trial in trials for ending in endings)
    for trial in trials:
        frame, provenance = read_partial(trial, runs)
        assert_frame_equal(frame, prefix(undisturbed(trial), 8), check_exact=True)
        assert set(frame["split"]) == {"train", "test"}  # a record, of epoch 6, is among them
        for other in (prefix(undisturbed(trial), 7), prefix(undisturbed(LONG[2]), 8).assign(key=trial.key)):
            assert not frame.equals(other)
        assert (provenance["unfinished"], provenance["epoch"]) == (True, 8) and provenance["seconds"] > 0
        assert provenance["description"]["seed"] == trial.seed and provenance["device"].startswith("CPU, ")
        assert read_result(trial, runs) is None and status(trial, runs) == ("checkpoint at epoch 8", None)
    monkeypatch.undo()
    assert set(go(trials)) == {trial.key for trial in trials} and names(runs) == results_of(trials)
    for trial in trials:
        assert_frame_equal(rows_of(trial, runs), undisturbed(trial), check_exact=True)
        assert read_partial(trial, runs) is None


def test_unfinished_rows_are_never_taken_for_a_result(go, runs, undisturbed, tmp_path, capsys):
    """Neither under their own name nor under that of a result; where they alone came home, the list says so."""
    trial = STUDIES[STUDY]("smoke")[0]
    parts = []
    run_trial(trial, data_dir=tmp_path, checkpoint_seconds=0, keep=parts.append)
    write_partial(trial, parts[3], results.environment(), runs=runs)
    assert status(trial, runs) == ("rows up to epoch 4", None)
    assert not has_result(trial, runs) and merge(STUDY, "smoke", runs=runs, folder=tmp_path) is None
    (runs / f"{trial.key}.partial.parquet").rename(runs / f"{trial.key}.parquet")
    assert not has_result(trial, runs, say=print) and merge(STUDY, "smoke", runs=runs, folder=tmp_path) is None
    assert "is damaged or another trial's, and is computed again" in capsys.readouterr().out
    counted(trial, runs)
    (runs / f"{trial.key}.parquet").rename(runs / f"{trial.key}.partial.parquet")
    with pytest.raises(results.ResultsError, match=", as far as it is"):
        read_partial(trial, runs)


# Started twice


def test_rows_of_a_stopped_trial_are_the_result_of_a_shorter_one(runs, data_dir):
    """Bit for bit what the shorter trial gives when it is trained, learning rate, gradients and last row included."""
    setting = replace(LONG[0].setting, milestones=(2, 4, 9), record_epochs=(2, 4, 6, 12))
    long, parts = replace(LONG[0], setting=setting, gradient_epochs=(4, 12), gradient_draws=2), {}
    keep = {"checkpoint_seconds": 0, "keep": lambda frame: parts.update({frame["epoch"].max(): frame})}
    run_trial(long, data_dir=data_dir, **keep)
    with pytest.raises(results.ResultsError, match="no rows up to epoch 4"):
        shorten(long, 4, runs)
    write_partial(long, parts[5], results.environment() | {"device": "there"}, runs=runs)
    with pytest.raises(ValueError, match="ends after 3 epochs"):
        shorten(long, 3, runs)
    short = shorten(long, 4, runs)
    assert short.setting.milestones == (2, 4) and short.gradient_epochs == (4,) and short.key != long.key
    found, provenance = read_result(short, runs)
    assert provenance["seconds"] == read_partial(long, runs)[1]["seconds"] > 0
    expected = run_trial(short, data_dir=data_dir)
    expected = expected[expected["metric"] != "seconds"].reset_index(drop=True)
    assert_frame_equal(found, expected, check_exact=True)
    assert provenance["shortened_from"] == long.key and provenance["device"] == "there"
    assert not {"unfinished", "epoch"} & provenance.keys()
    with pytest.raises(results.ResultsError, match="no rows up to epoch 6"):
        shorten(long, 6, runs)
    write_partial(long, parts[6], results.environment(), runs=runs)
    assert shorten(long, 6, runs).setting.epochs == 6  # the last of its rows is of that very epoch
    switched = replace(long, setting=replace(setting, switch_epoch=5))
    write_partial(switched, parts[5].assign(key=switched.key), results.environment(), runs=runs)
    with pytest.raises(ValueError, match=r"switch_epoch must lie in 0\.\.4"):
        shorten(switched, 4, runs)


def test_two_processes_that_start_the_same_trials_train_each_once(start, runs, tmp_path):
    log = tmp_path / "log"
    both = [start(f"go(TRIALS, run=partial(counts, log=Path({str(log)!r}), together=2))") for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    keys, workers = zip(*noted(log), strict=True)
    assert sorted(keys) == sorted(trial.key for trial in TRIALS) and len(set(workers)) == 2
    assert sorted(" ".join(out for out, _ in told).split()) == sorted(trial.key for trial in TRIALS)
    assert names(runs) == results_of(TRIALS)


def test_a_trial_that_another_process_holds_is_left_to_it(go, runs, capsys):
    runs.mkdir()
    with lock(TRIALS[0], runs) as held, lock(TRIALS[0], runs) as again:
        assert held and not again
        assert go(TRIALS[:2], run=counts) == [TRIALS[1].key]
        assert capsys.readouterr().err.splitlines()[-1] == f"{TRIALS[0].label}: another process is training it"
    assert names(runs) == results_of(TRIALS[1:2])
    with lock(TRIALS[0], runs) as held:
        assert held


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_sentence(runs, monkeypatch, number):
    """Some network and container file systems; where the call is not there at all, filelock has another way."""
    import fcntl

    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    runs.mkdir()
    with pytest.raises(TrainingError, match=rf"^cannot lock .*: {os.strerror(number)}; name a folder on another disk"):
        with lock(TRIALS[0], runs):
            pytest.fail("it is not locked")
    number = errno.ENOSYS
    with pytest.warns(UserWarning, match="flock not supported"):
        with lock(TRIALS[1], runs) as held, lock(TRIALS[1], runs) as again:
            assert held and not again
    assert not (runs / f"{TRIALS[1].key}.lock").exists()


# Stopped


def test_kill_9_of_anything_then_the_same_command_gives_the_undisturbed_rows(start, go, runs, undisturbed, tmp_path):
    """First the worker is killed, then its parent, then both at once, each time in the middle of an epoch.

    A checkpoint is due after every epoch, and the rows so far lie beside it. A worker whose parent is gone notices at
    the end of its epoch; one that is killed has the checkpoint before the epoch that its process had just told of.
    """
    trial = LONG[0]
    for at, victim, epoch in ((4, "worker", 2), (6, "parent", 6), (10, "both", 8)):
        log = tmp_path / victim
        run = f"partial(holds, log=Path({str(log)!r}), at={at}, checkpoint_seconds=0)"
        process = start(f"go(LONG[:1], run={run})")
        worker = psutil.Process(int(in_their_course(process, log)[0][1]))
        assert worker in psutil.Process(process.pid).children()
        if victim == "worker":
            worker.kill()
        elif victim == "parent":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        assert psutil.wait_procs([worker], timeout=600)[1] == []
        if victim == "worker":
            assert process.returncode == 1 and "1 of 1 trials failed" in err
            assert f"{trial.label}: its process was killed by SIGKILL (out of memory?)\n" in err
        assert status(trial, runs) == (f"checkpoint at epoch {epoch}", None)
        assert_frame_equal(read_partial(trial, runs)[0], prefix(undisturbed(trial), epoch), check_exact=True)
    (runs / f".{trial.key}.checkpoint.1.part").write_bytes(b"half")  # as a kill in the middle of writing leaves it
    assert go([trial]) == [trial.key]
    assert names(runs) == results_of([trial])
    assert_frame_equal(rows_of(trial, runs), undisturbed(trial), check_exact=True)
    with pytest.raises(AssertionError):
        assert_frame_equal(rows_of(trial, runs), undisturbed(LONG[1]).assign(key=trial.key), check_exact=True)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(start, go, runs, undisturbed, tmp_path):
    """The signal reaches every process of the terminal; a checkpoint is due once a minute: this is the stop's."""
    trial, log = LONG[0], tmp_path / "log"
    process = start(f"go([LONG[0], TRIALS[1]], run=partial(holds, log=Path({str(log)!r}), at=5))")
    in_their_course(process, log)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    lines = err.splitlines()
    assert lines[:2] == [
        "stopping at the end of the running epochs; Ctrl-C again to stop at once",
        "stopped with 0 trials done and the others at their checkpoints: the same command goes on from there",
    ]
    assert lines[-1] == "KeyboardInterrupt" and err.count("Traceback") == 1  # the parent's own, none of the worker
    assert status(trial, runs) == ("checkpoint at epoch 5", None)
    assert names(runs) == [f"{trial.key}.checkpoint", f"{trial.key}.partial.parquet"]
    assert go([trial]) == [trial.key]
    assert_frame_equal(rows_of(trial, runs), undisturbed(trial), check_exact=True)


def test_minutes_stop_and_the_next_call_goes_on(go, runs, undisturbed, capsys, monkeypatch, tmp_path):
    """No trial begins after the time; the running one leaves its checkpoint; the seconds of both pieces add up."""
    log = tmp_path / "log"
    monkeypatch.setattr(engine, "time", Clock(lambda: noted(log)))
    assert go([LONG[0], TRIALS[1]], minutes=30, run=partial(holds, log=log, at=7)) == []
    assert capsys.readouterr().err == (
        "time is up, and 2 of 2 trials are not finished: the same command goes on from there\n"
    )
    assert [status(trial, runs)[0] for trial in (LONG[0], TRIALS[1])] == ["checkpoint at epoch 7", "to do"]
    checkpoint = runs / f"{LONG[0].key}.checkpoint"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"seconds": 1e6}, checkpoint)
    monkeypatch.undo()
    assert go([LONG[0], TRIALS[1]], minutes=600) == [LONG[0].key, TRIALS[1].key]
    assert 1e6 < read_result(LONG[0], runs)[1]["seconds"] < 2e6
    assert names(runs) == results_of([LONG[0], TRIALS[1]])
    assert_frame_equal(rows_of(LONG[0], runs), undisturbed(LONG[0]), check_exact=True)


def test_a_trial_that_fails_is_told_and_the_others_go_on(go, runs, capsys):
    """One kills its process, as a machine without memory does; one raises."""
    with pytest.raises(TrainingError) as raised:
        go(TRIALS, run=partial(counts, dies=TRIALS[0].key, breaks=TRIALS[2].key))
    assert str(raised.value) == (
        f"2 of 4 trials failed: {TRIALS[0].label}; {TRIALS[2].label}; the same command tries again"
    )
    said = capsys.readouterr().err
    assert f"{TRIALS[0].label}: its process was killed by SIGKILL (out of memory?)\n" in said
    assert f"{TRIALS[2].label}: ZeroDivisionError: a bug\nTraceback" in said
    assert [status(trial, runs)[0] for trial in TRIALS] == ["to do", "done", "to do", "done"]
    assert names(runs) == sorted([*results_of([TRIALS[1], TRIALS[3]]), f"{TRIALS[0].key}.lock"])


def falls(trial, *, signals, **options):
    """Its process ends by a real signal, or with an exit code; no core is left."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number = signals[trial.key]
    if number < 0:
        os._exit(-number)
    os.kill(os.getpid(), number)


def test_a_process_that_is_killed_is_told_by_the_name_of_its_signal(go, capsys):
    """Memory is suspected where SIGKILL came from nowhere; a crash in compiled code is none of its doing."""
    wanted = {
        signal.SIGKILL: "was killed by SIGKILL (out of memory?)",
        signal.SIGSEGV: "was killed by SIGSEGV",
        signal.SIGABRT: "was killed by SIGABRT",
        signal.SIGBUS: "was killed by SIGBUS",
        signal.SIGRTMIN + 6: f"was killed by signal {signal.SIGRTMIN + 6}",  # it has no name
        -3: "ended with exit code 3",
    }
    trials = [small(seed) for seed in range(len(wanted))]
    signals = {trial.key: int(number) for trial, number in zip(trials, wanted, strict=True)}
    with pytest.raises(TrainingError, match="6 of 6 trials failed"):
        go(trials, workers=2, run=partial(falls, signals=signals))
    said = capsys.readouterr().err.splitlines()
    told = [f"{trial.label}: its process {words}" for trial, words in zip(trials, wanted.values(), strict=True)]
    assert sorted(said) == sorted(told)


def test_a_worker_that_dies_before_it_takes_its_pipe_is_told_dead(go, monkeypatch, capsys):
    """Windows keeps the pipe's other end open until then, so that its end does not come."""
    spawn, kept = multiprocessing.get_context("spawn"), []

    def pipe():
        ours, theirs = spawn.Pipe()
        kept.append(os.dup(theirs.fileno()))
        return ours, theirs

    context = SimpleNamespace(Pipe=pipe, Process=spawn.Process)
    monkeypatch.setattr(engine.multiprocessing, "get_context", lambda method: context)
    with pytest.raises(TrainingError, match="1 of 2 trials failed"):
        go(TRIALS[:2], run=partial(counts, dies=TRIALS[0].key))
    assert "its process was killed by SIGKILL" in capsys.readouterr().err
    for end in kept:
        os.close(end)


def test_a_clock_that_is_set_does_not_end_the_time(go, monkeypatch):
    """The clock of day goes three years forwards at every look; the minutes are those that pass."""
    clock, looks = Clock(lambda: False), iter(range(10**6))
    clock.time = lambda: 1e9 + 1e8 * next(looks)
    monkeypatch.setattr(engine, "time", clock)
    assert go(TRIALS[:2], minutes=600, run=counts) == [trial.key for trial in TRIALS[:2]]


def test_a_damaged_checkpoint_is_told_and_the_trial_begun_again(go, runs, undisturbed, capsys):
    runs.mkdir()
    (runs / f"{TRIALS[0].key}.checkpoint").write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save({"trial": TRIALS[0].key, "epoch": 2}, runs / f"{TRIALS[1].key}.checkpoint")
    assert status(TRIALS[0], runs) == ("to do", None)
    assert go(TRIALS[:2]) == [trial.key for trial in TRIALS[:2]]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4  # a warning and a result each
    for line, trial in zip(said[::2], TRIALS[:2], strict=True):
        assert line.startswith(f"{trial.label}: ") and f"{trial.key}.checkpoint" in line
        assert_frame_equal(rows_of(trial, runs), undisturbed(trial), check_exact=True)
    assert names(runs) == results_of(TRIALS[:2])


# A cluster


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    """A dask cluster of two worker processes on this machine."""
    distributed = pytest.importorskip("distributed")
    folder = str(tmp_path_factory.mktemp("dask"))
    options = {"dashboard_address": ":0", "silence_logs": 50, "local_directory": folder}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as made:
        yield made


def test_a_cluster_that_loses_a_worker_finishes_every_trial_once(start, runs, undisturbed, dask, tmp_path):
    """A worker is killed in the middle of its trial, which another takes over at the checkpoint."""
    log = tmp_path / "log"
    run = f"partial(holds_once, log=Path({str(log)!r}), at=6)"
    process = start(f"go(LONG[:3], scheduler={dask.scheduler_address!r}, run={run})")
    key, worker = in_their_course(process, log)[0]
    (trial,) = [trial for trial in LONG if trial.key == key]
    assert status(trial, runs) == ("checkpoint at epoch 4", None)
    assert_frame_equal(read_partial(trial, runs)[0], prefix(undisturbed(trial), 4), check_exact=True)
    os.kill(int(worker), signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert sorted(out.split()) == sorted(trial.key for trial in LONG[:3])
    assert names(runs) == results_of(LONG[:3])
    for trial in LONG[:3]:
        assert_frame_equal(rows_of(trial, runs), undisturbed(trial), check_exact=True)


def test_a_cluster_reports_what_raises_and_refuses_before_training(go, runs, tmp_path, dask, capsys):
    address, log = dask.scheduler_address, tmp_path / "log"
    missing = replace(TRIALS[1], images=Images("nowhere"))
    with pytest.raises(TrialRefused, match="nowhere"):
        go([TRIALS[0], missing], run=partial(counts, log=log), scheduler=address)
    assert not log.exists()
    with pytest.raises(TrainingError, match="1 of 2 trials failed"):
        go(TRIALS[:2], run=partial(counts, breaks=TRIALS[0].key), scheduler=address)
    assert f"{TRIALS[0].label}: ZeroDivisionError: a bug" in capsys.readouterr().err
    assert [status(trial, runs)[0] for trial in TRIALS[:2]] == ["to do", "done"]


@dataclass(frozen=True)
class Held(cluster.Task):
    """The time is up as soon as two trials note that they are in their course; ``unseen``: the workers have no runs."""

    log: Path
    client: int
    unseen: bool

    def __reduce__(self):
        runs = self.runs / "elsewhere" if self.unseen else self.runs
        return Held, (runs, *(getattr(self, field.name) for field in fields(self)[1:]))

    @property
    def left(self) -> float | None:
        if os.getpid() == self.client:
            wait_for(lambda: len(noted(self.log)) == 2, "two trials to be in their course")
        return 0.0 if len(noted(self.log)) == 2 else None


@pytest.mark.parametrize("unseen", [False, True])
def test_a_cluster_stops_after_minutes_and_brings_rows_home(go, runs, undisturbed, dask, monkeypatch, tmp_path, unseen):
    """The time is up in the middle of two trials' epochs, whether the workers see the folder of runs or not."""
    log = tmp_path / "log"
    monkeypatch.setattr(cluster, "Task", partial(Held, log=log, client=os.getpid(), unseen=unseen))
    monkeypatch.setattr(cluster, "_checked", lambda *told: True)  # it would wait for what comes later
    assert go(LONG[:3], scheduler=dask.scheduler_address, minutes=30, run=partial(holds, log=log, at=8)) == []
    endings = ("partial.parquet",) if unseen else ("checkpoint", "partial.parquet")
    assert names(runs) == sorted(f"{trial.key}.{ending}" for trial in LONG[:2] for ending in endings)
    for trial in LONG[:2]:
        frame, provenance = read_partial(trial, runs)
        assert_frame_equal(frame, prefix(undisturbed(trial), 8), check_exact=True)
        assert (provenance["unfinished"], provenance["epoch"]) == (True, 8)


def test_a_cluster_stops_when_its_client_leaves(go, start, runs, dask, tmp_path):
    """What nobody waits for any more stops at the end of its epoch; then the workers are free."""
    log = tmp_path / "log"
    run = f"partial(holds, log=Path({str(log)!r}), at=6)"
    process = start(f"go(LONG[:2], scheduler={dask.scheduler_address!r}, run={run})")
    in_their_course(process, log, 2)
    process.kill()
    assert set(go(TRIALS[:2], scheduler=dask.scheduler_address, run=counts)) == {trial.key for trial in TRIALS[:2]}


def test_a_cluster_that_loses_worker_after_worker_gives_the_trial_up(go, runs, dask, monkeypatch, capsys):
    monkeypatch.setattr(dask.scheduler, "allowed_failures", 1)
    with pytest.raises(TrainingError, match="1 of 2 trials failed"):
        go(TRIALS[:2], run=partial(counts, dies=TRIALS[0].key), scheduler=dask.scheduler_address)
    why = "2 workers were lost one after the other with this trial in hand; the log of the last says why"
    assert f"{TRIALS[0].label}: {why}" in capsys.readouterr().err.splitlines()
    assert [status(trial, runs)[0] for trial in TRIALS[:2]] == ["to do", "done"]


def test_a_cluster_that_does_not_answer_is_one_sentence(go, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT", 0.5)
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(TrainingError, match=f"^no dask scheduler answers at {address}"):
            go(TRIALS[:1], scheduler=address)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(TrainingError, match=r'^a cluster needs dask: pip install "labelaug\[cluster\]"$'):
        go(TRIALS[:1], scheduler="tcp://127.0.0.1:1")


# Merged


def test_merge_adds_to_what_is_there_and_is_deterministic(tmp_path, capsys):
    trials = STUDIES[STUDY]("smoke")[:2]
    here, elsewhere, out, other = (tmp_path / name for name in ("here", "elsewhere", "out", "other"))
    assert merge(STUDY, "smoke", runs=here, folder=out) is None and not out.exists()
    counted(trials[0], here)
    path = merge(STUDY, "smoke", runs=here, folder=out)
    assert path == out / f"{STUDY}-smoke.parquet"
    once = path.read_bytes()
    assert merge(STUDY, "smoke", runs=here, folder=out).read_bytes() == once
    counted(trials[1], elsewhere)
    both = merge(STUDY, "smoke", runs=elsewhere, folder=out).read_bytes()
    assert both != once and merge(STUDY, "smoke", runs=here, folder=out).read_bytes() == both
    merge(STUDY, "smoke", runs=elsewhere, folder=other)  # the other way round gives the same file
    assert merge(STUDY, "smoke", runs=here, folder=other).read_bytes() == both

    found = results.load_study(STUDY, "smoke", folder=out)
    assert list(found.trials["key"]) == sorted(trial.key for trial in trials)
    assert list(found.rows.columns) == COLUMNS and found.rows["value"].dtype == np.float64
    described = found.trials.set_index("key").loc[trials[0].key]
    assert described["setting.epochs"] == trials[0].setting.epochs and described["seed"] == trials[0].seed
    assert described["seconds"] == 3.0 and described["device"].startswith("CPU")
    assert found.trials.groupby(list(found.trials.columns), dropna=False).ngroups == 2
    for trial in trials:
        assert list(found.rows.loc[found.rows["key"] == trial.key, "value"]) == [0.1 * trial.seed]
    assert capsys.readouterr().err == ""


def test_merge_keeps_the_rows_that_the_file_has(tmp_path, runs, capsys):
    trial, out = STUDIES[STUDY]("smoke")[0], tmp_path / "out"
    counted(trial, runs)
    merged = merge(STUDY, "smoke", runs=runs, folder=out)
    before, path = merged.read_bytes(), runs / f"{trial.key}.parquet"
    frame, provenance = results.read_table(path)
    results.write_parquet(path, frame.assign(value=0.75), provenance)
    assert merge(STUDY, "smoke", runs=runs, folder=out).read_bytes() == before
    assert capsys.readouterr().err.startswith(f"{trial.label}: {STUDY}-smoke.parquet holds other rows for it")
    merged.write_bytes(before[:-20])
    with pytest.raises(results.ResultsError, match="not a whole parquet table"):
        merge(STUDY, "smoke", runs=runs, folder=out)
    assert merged.read_bytes() == before[:-20]


def test_load_study_says_what_to_run(tmp_path):
    with pytest.raises(results.ResultsError, match=f"run `labelaug train {STUDY} --scale gpu`"):
        results.load_study(STUDY, "gpu", folder=tmp_path)
    results.write_parquet(tmp_path / f"{STUDY}-cpu.parquet", pd.DataFrame({"x": [1]}), {"description": {}})
    with pytest.raises(results.ResultsError, match="holds no study"):
        results.load_study(STUDY, "cpu", folder=tmp_path)


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    assert results.environment("cuda")["device"] == "GPU, NVIDIA X"


# The command line


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Calls the command line in a project without results; ``train`` stops short of training."""
    monkeypatch.setattr(paths, "results_dir", lambda: tmp_path / "project" / "results")
    monkeypatch.setattr(engine, "run_trials", lambda trials, **options: None)
    return lambda *arguments: CliRunner().invoke(main, arguments, prog_name="labelaug")


def test_list_says_how_far_each_trial_is(command, runs):
    trials = STUDIES[STUDY]("smoke")
    counted(trials[0], runs)
    torch.save({"epoch": 3}, runs / f"{trials[1].key}.checkpoint")
    listed = command("train", STUDY, "--list", "--runs", str(runs)).stdout.splitlines()
    assert [line.partition(" ")[0] for line in listed] == [trial.key for trial in trials]
    assert "  done " in listed[0] and " 3.0 s  " in listed[0] and listed[0].endswith(f"  {trials[0].label}")
    assert "  checkpoint at epoch 3 " in listed[1] and "  to do " in listed[2]


def test_train_merges_and_results_tells(command, runs, tmp_path):
    """A smoke study is merged beside its runs: nothing of it is for the repository."""
    trial = STUDIES[STUDY]("smoke")[0]
    counted(trial, runs)
    assert command("results").stdout == ""
    done = command("train", STUDY, "--runs", str(runs))
    merged = runs / f"{STUDY}-smoke.parquet"
    assert done.stdout == f"{merged}\n" and not (tmp_path / "project").exists()
    (tmp_path / "project" / "results").mkdir(parents=True)
    merged.rename(tmp_path / "project" / "results" / merged.name)
    said = command("results").stdout.splitlines()
    assert said[:2] == [f"{merged.name}: {STUDY} at scale smoke", f"  1 trials, seeds {trial.seed}"]
    assert "0.00 hours on CPU, " in said[2] and results.environment()["commit"][:7] in said[3]


def test_train_refuses_what_it_does_not_know(command):
    done = command("train", "overtraining")
    sentence = f"Error: Invalid value for STUDY: 'overtraining' is no study; there are: {', '.join(STUDIES)}"
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, sentence)


def test_train_needs_no_other_package(tmp_path, data_dir):
    """On a machine with torch, numpy, pandas, pyarrow, click, tqdm and filelock alone, and what these need."""
    allowed, waiting = {"labelaug"}, ["torch", "numpy", "pandas", "pyarrow", "click", "tqdm", "filelock"]
    while waiting:
        if (name := waiting.pop().lower().replace("_", "-")) not in allowed:
            allowed.add(name)
            try:
                needs = [Requirement(text) for text in requires(name) or []]
            except PackageNotFoundError:  # for another system
                continue
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    refused = [
        module
        for module, owners in packages_distributions().items()
        if not allowed & {owner.lower().replace("_", "-") for owner in owners}
    ]
    assert {"scipy", "sklearn", "torchvision", "matplotlib", "psutil", "yaml", "papermill"} <= set(refused)
    hook = f"""\
import sys
from importlib.machinery import PathFinder
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else super().find_spec(name, path, target)
REFUSED = set({json.dumps(refused)})
sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""
    (tmp_path / "sitecustomize.py").write_text(hook)  # in every process, the worker too
    (tmp_path / "train.py").write_text(BARE)
    done = subprocess.run(
        [sys.executable, "train.py", "train", "bare", "--runs", "runs", "--data-dir", str(data_dir)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = results.load_study("bare", "smoke", folder=tmp_path / "runs")
    assert len(found.trials) == 1 and set(found.rows["metric"]) > {"loss", "error"}


def test_minutes_on_the_command_line_bring_rows_home_without_a_repository(tmp_path, data_dir, undisturbed):
    """A copy of the project, as it would be unpacked on another machine; the time is up in the middle of an epoch."""
    copy = tmp_path / "copy"
    shutil.copytree(paths.PROJECT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ("notebooks/profiles.yml", "book/claims.yml"):  # by which the project's folder is known
        (copy / file).parent.mkdir()
        shutil.copy(paths.PROJECT / file, copy / file)
    (copy / "train.py").write_text(HELD.format(log=str(tmp_path / "log"), at=8, count=1))
    path = os.pathsep.join([str(copy / "src"), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    command = [sys.executable, "train.py", "train", "held", "--scale", "cpu", "--data-dir", str(data_dir)]
    done = subprocess.run([*command, "--minutes", "9"], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert done.stderr == "time is up, and 1 of 1 trials are not finished: the same command goes on from there\n"
    trial, runs = LONG[0], copy / "results" / "runs"
    frame, provenance = read_partial(trial, runs)
    assert_frame_equal(frame, prefix(undisturbed(trial), 8), check_exact=True)
    assert not frame.equals(prefix(undisturbed(trial), 7))
    assert (provenance["commit"], provenance["dirty"], provenance["epoch"]) == ("none", False, 8)
    assert names(copy / "results") == ["runs"]  # nothing is merged


HELD = """\
from functools import partial
from pathlib import Path
from labelaug import engine
from labelaug.cli import main
from labelaug.studies import STUDIES
from held import LONG, Clock, holds, noted
if __name__ == "__main__":
    log = Path({log!r})
    if not noted(log):
        engine.run_trials = partial(engine.run_trials, run=partial(holds, log=log, at={at}))
    engine.time = Clock(lambda: len(noted(log)) == {count})
    STUDIES["held"] = lambda scale: LONG[:{count}]
    main()
"""


# A system that is not Unix

UNIX_MODULES = "fcntl resource pwd grp termios tty pty syslog readline spwd crypt nis posix"
UNIX_NAMES = {
    "os": "chown chroot ctermid fchdir fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid "
    "getpgrp getpriority getsid getuid initgroups killpg lchown lockf major minor mkfifo mknod nice openpty pathconf "
    "pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread pwrite register_at_fork sched_getaffinity "
    "sched_setaffinity sched_yield sendfile setegid seteuid setgid setpgid setpriority setregid setreuid setsid setuid "
    "statvfs sync sysconf tcgetpgrp tcsetpgrp uname wait wait3 wait4 waitid WIFSIGNALED WTERMSIG WEXITSTATUS",
    "signal": "alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait "
    "sigwait SIG_BLOCK SIG_SETMASK SIG_UNBLOCK SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGRTMIN "
    "SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGUSR1 SIGUSR2 SIGWINCH",
    "select": "poll epoll kqueue devpoll",
    "socket": "AF_UNIX socketpair_unix",
    "time": "tzset clock_gettime clock_settime pthread_getcpuclockid",
    "resource_tracker": "ensure_running",  # it starts a process in the way of Unix
}
KEPT = "posix SIGKILL register_at_fork uname sysconf ensure_running"  # libraries on Unix use these without asking


def used_of_unix(source: str) -> list[str]:
    """Modules and names that only Unix has, as far as the source does not ask for one of them with ``hasattr``."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    asked = {
        (node.args[0].id, node.args[1].value)
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
        if isinstance(node.args[0], ast.Name) and isinstance(node.args[1], ast.Constant)
    }
    named = {(n.value.id, n.attr) for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    if ("signal", "pthread_sigmask") in asked:  # one question for all of the mask
        asked |= {("signal", "SIG_BLOCK"), ("signal", "SIG_SETMASK"), ("resource_tracker", "ensure_running")}
    missing = {(module, name) for module, text in UNIX_NAMES.items() for name in text.split()}
    return sorted(imported & set(UNIX_MODULES.split())) + sorted(".".join(name) for name in named & missing - asked)


def test_the_package_uses_nothing_that_only_unix_has():
    files = sorted(Path(labelaug.__file__).parent.rglob("*.py"))
    assert len(files) > 30
    assert {path.name: found for path in files if (found := used_of_unix(path.read_text(encoding="utf-8")))} == {}
    planted = "import os, fcntl\nfrom pwd import getpwuid\nif hasattr(os, 'fork'):\n    os.fork()\nos.getuid()"
    assert used_of_unix(planted) == ["fcntl", "pwd", "os.getuid"]


ELSEWHERE = f"""\
import os, signal, sys, time
for module in {UNIX_MODULES.split()}:
    if module not in {KEPT.split()}:
        sys.modules[module] = None
for module in (os, signal, time):
    for name in {UNIX_NAMES}[module.__name__].split():
        if name not in {KEPT.split()} and hasattr(module, name):
            delattr(module, name)
def refuse_what_is_open(act):
    def acts(path, *more, **options):
        caller, ours = sys._getframe(), True
        while caller := caller.f_back:
            ours &= "filelock" not in caller.f_code.co_filename
        for number in os.listdir("/proc/self/fd") if ours else []:
            link = f"/proc/self/fd/{{number}}"
            if os.path.islink(link) and os.readlink(link) in map(os.path.realpath, (path, *more)):
                raise PermissionError(13, "it is open in this process", os.readlink(link))
        return act(path, *more, **options)
    return acts
for name in ("remove", "unlink", "rename", "replace"):
    setattr(os, name, refuse_what_is_open(getattr(os, name)))
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Runs Python, and all that it starts, without what only Unix has, on a system that keeps files that are open.

    A file that is open in a process can be removed or replaced by that process under Unix alone. What filelock does on
    Windows itself cannot run here: it takes files in place of the system's locks, in ways of its own.
    """
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(ELSEWHERE)
    path = os.pathsep.join([str(hook), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore:only soft file lock is available"}

    def run(*arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_trials_stop_and_go_on_where_nothing_is_unix(elsewhere, tmp_path, data_dir, undisturbed, workers):
    """On the command line: the time is up in mid-epoch, rows come home, and the same command finishes and merges."""
    (tmp_path / "train.py").write_text(HELD.format(log=str(tmp_path / "log"), at=8, count=workers))
    command = ["train.py", "train", "held", "--runs", "runs", "--data-dir", data_dir, "--workers", workers]
    done, runs = elsewhere(*command, "--minutes", 9), tmp_path / "runs"
    assert done.stderr.startswith("time is up") and len(done.stderr.splitlines()) == 1 and done.returncode == 0
    for trial in LONG[:workers]:
        assert_frame_equal(read_partial(trial, runs)[0], prefix(undisturbed(trial), 8), check_exact=True)
    done = elsewhere(*command)
    assert (done.returncode, done.stdout.strip()) == (0, str(Path("runs", "held-smoke.parquet"))), done.stderr
    assert names(runs) == sorted([*results_of(LONG[:workers]), "held-smoke.parquet"])
    for trial in LONG[:workers]:
        assert_frame_equal(rows_of(trial, runs), undisturbed(trial), check_exact=True)
    assert elsewhere(*command).stderr == f"all {workers} trials are done\n"  # merged once more, over the file just read


def test_a_killed_process_leaves_no_lock_where_nothing_is_unix(elsewhere, tmp_path):
    holder = "import os, held; from labelaug.engine import lock; from pathlib import Path\n"
    holder += "with lock(held.TRIALS[0], Path()) as it_is: "
    done = elsewhere("-c", holder + "print(it_is, flush=True); os.kill(os.getpid(), 9)")
    assert (done.returncode, done.stdout) == (-9, "True\n") and (tmp_path / f"{TRIALS[0].key}.lock").exists()
    assert elsewhere("-c", holder + "print(it_is)").stdout == "True\n"
    assert not (tmp_path / f"{TRIALS[0].key}.lock").exists()


BARE = """\
from dataclasses import dataclass, fields, replace
from labelaug.cli import main
from labelaug.studies import STUDIES
from labelaug.trials import Images
def bare(scale):
    try:
        import scipy
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("this machine is not bare")
    return [replace(STUDIES["over-training"](scale)[0], images=Images("toy"))]
if __name__ == "__main__":
    STUDIES["bare"] = bare
    main()
"""
