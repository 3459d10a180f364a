"""Studies trained: one result a trial whoever starts it, nothing lost when something is killed, and one merged file."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from click.testing import CliRunner
from conftest import wait_for
from packaging.requirements import Requirement
from pandas.testing import assert_frame_equal

from labelaug import cluster, engine, paths, results
from labelaug.cli import main
from labelaug.engine import TrainingError, has_result, lock, merge, read_result, run_trials, status, write_result
from labelaug.studies import STUDIES
from labelaug.training.deep import COLUMNS
from labelaug.trials import Images, Network, TrialRefused, run_trial

STUDY = "over-training"
EPOCHS = 150  # of a trial that is to be stopped in its course


def slowly(trial, *, progress, **options):
    """``run_trial`` with a pause after each epoch: LONG trials take five seconds, so that a stop finds them running."""

    def pausing(epoch):
        time.sleep(5 / EPOCHS)
        progress(epoch)

    return run_trial(trial, progress=pausing, **options)


EAGER = partial(run_trial, checkpoint_seconds=0)  # a checkpoint after every epoch


def counts(trial, *, data_dir, device, checkpoint, progress, log=os.devnull, pause=0.0, dies=None, breaks=None):
    """Stands for ``run_trial`` where only the engine matters: counts epochs, and notes in ``log`` who does."""
    with open(log, "a") as file:
        file.write(f"{trial.key} {os.getpid()}\n")
    if trial.key == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    if trial.key == breaks:
        raise ZeroDivisionError("a bug")
    for epoch in range(1, trial.setting.epochs + 1):
        time.sleep(pause / trial.setting.epochs)
        progress(epoch)
    rows = [
        (5, trial.setting.epochs, "test", "error", 0.1 * trial.seed),
        (5, trial.setting.epochs, "train", "seconds", 3.0),
    ]
    return pd.DataFrame(rows, columns=COLUMNS[2:]).assign(key=trial.key, seed=trial.seed)[COLUMNS]


def counted(trial, runs: Path) -> None:
    """The result of ``counts`` in a folder of runs, without an engine."""
    runs.mkdir(exist_ok=True)
    frame = counts(trial, data_dir=None, device="cpu", checkpoint=None, progress=lambda epoch: None)
    write_result(trial, frame, results.environment(), runs=runs)


def small(seed: int, epochs: int = 2):
    """A trial of the smoke study on a small network and images of our own: an epoch takes ten milliseconds."""
    trial = STUDIES[STUDY]("smoke")[0]
    setting = replace(trial.setting, epochs=epochs, record_epochs=(epochs // 2, epochs), milestones=(1,))
    images, network = Images("toy"), Network("mlp", 8)
    return replace(trial, images=images, network=network, setting=setting, seed=seed, gradient_epochs=())


TRIALS = [small(seed) for seed in range(4)]
LONG = [small(seed, EPOCHS) for seed in range(4)]


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


@pytest.fixture
def go(runs, data_dir):
    """``run_trials`` in this test's folders."""
    return partial(run_trials, runs=runs, data_dir=data_dir, device="cpu")


@pytest.fixture
def start(runs, data_dir):
    """Starts a call of ``go`` in a process of its own, at the head of its own group of processes."""
    head = (
        "import test_engine\nfrom test_engine import *\n"
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


def epoch_of(trial, runs: Path) -> int:
    state, seconds = status(trial, runs)
    assert state.startswith("checkpoint at epoch ") and seconds is None
    return int(state.split()[-1])


# Results


def test_trials_are_run_in_order_and_shared_among_workers(go, runs, tmp_path, capsys):
    """One result a trial and nothing else; a line each on standard error; nothing is left to do for a second call."""
    run = partial(counts, log=tmp_path / "log", pause=0.2)
    assert set(go(TRIALS, workers=2, run=run)) == {trial.key for trial in TRIALS}
    keys, workers = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert set(keys[:2]) <= {trial.key for trial in TRIALS[:3]} and len(set(keys)) == 4
    assert set(workers) <= {line for line in workers if line != str(os.getpid())} and len(set(workers)) <= 2
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


# Started twice


def test_two_processes_that_start_the_same_trials_train_each_once(start, runs, tmp_path):
    log = tmp_path / "log"
    both = [start(f"go(TRIALS, run=partial(counts, log={str(log)!r}, pause=0.5))") for _ in range(2)]
    told = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted(line.split()[0] for line in log.read_text().splitlines()) == sorted(t.key for t in TRIALS)
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


# Stopped


def test_kill_9_of_anything_then_the_same_command_gives_the_undisturbed_rows(start, go, runs, undisturbed):
    """First the worker is killed, then its parent, then both at once; each time the trial is further than before."""
    trial, reached = LONG[0], 0
    for victim in ("worker", "parent", "both"):
        process = start("go(LONG[:1], run=partial(slowly, checkpoint_seconds=0))")
        before = (runs / f"{trial.key}.checkpoint").stat().st_mtime_ns if reached else 0
        checkpoint = runs / f"{trial.key}.checkpoint"
        wait_for(lambda file=checkpoint, t=before: file.exists() and file.stat().st_mtime_ns > t, "a checkpoint")
        children = psutil.Process(process.pid).children(recursive=True)
        (worker,) = (child for child in children if "spawn_main" in " ".join(child.cmdline()))
        if victim == "worker":
            worker.kill()
        elif victim == "parent":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert psutil.wait_procs(children, timeout=20)[1] == []  # an orphan notices at the end of its epoch
        if victim == "worker":
            assert process.returncode == 1 and "1 of 1 trials failed" in err
            assert f"{trial.label}: its process was killed by signal 9 (out of memory?)\n" in err
        assert reached < epoch_of(trial, runs) < EPOCHS
        reached = epoch_of(trial, runs)
    (runs / f".{trial.key}.checkpoint.1.part").write_bytes(b"half")  # as a kill in the middle of writing leaves it
    assert go([trial]) == [trial.key]
    assert names(runs) == results_of([trial])
    assert_frame_equal(rows_of(trial, runs), undisturbed(trial), check_exact=True)
    with pytest.raises(AssertionError):
        assert_frame_equal(rows_of(trial, runs), undisturbed(LONG[1]).assign(key=trial.key), check_exact=True)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(start, runs, data_dir, undisturbed):
    """The signal reaches every process of the terminal; a checkpoint is due once a minute: this is the stop's."""
    trial = LONG[0]
    process = start("go([LONG[0], TRIALS[1]], run=slowly)")
    wait_for((runs / f"{trial.key}.lock").exists, "the trial to begin")
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    lines = err.splitlines()
    assert lines[:2] == [
        "stopping at the end of the running epochs; Ctrl-C again to stop at once",
        "stopped with 0 trials done and the others at their checkpoints: the same command goes on from there",
    ]
    assert lines[-1] == "KeyboardInterrupt" and err.count("Traceback") == 1  # the parent's own, none of the worker
    assert 0 < epoch_of(trial, runs) < EPOCHS
    assert names(runs) == [f"{trial.key}.checkpoint"]
    options = {"data_dir": data_dir, "device": "cpu", "progress": lambda epoch: None}
    frame = run_trial(trial, checkpoint=runs / f"{trial.key}.checkpoint", **options)
    write_result(trial, frame, results.environment(), runs=runs)
    assert_frame_equal(rows_of(trial, runs), undisturbed(trial), check_exact=True)


def test_minutes_stop_and_the_next_call_goes_on(go, runs, undisturbed, capsys):
    """No trial begins after the time; the running one leaves its checkpoint; the seconds of both pieces add up."""
    assert go([LONG[0], TRIALS[1]], minutes=0.01) == []
    assert capsys.readouterr().err == (
        "time is up, and 2 of 2 trials are not finished: the same command goes on from there\n"
    )
    assert 0 < epoch_of(LONG[0], runs) < EPOCHS and status(TRIALS[1], runs) == ("to do", None)
    checkpoint = runs / f"{LONG[0].key}.checkpoint"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"seconds": 1000.0}, checkpoint)
    assert go([LONG[0], TRIALS[1]], minutes=5) == [LONG[0].key, TRIALS[1].key]
    assert 1000 < read_result(LONG[0], runs)[1]["seconds"] < 1060
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
    assert f"{TRIALS[0].label}: its process was killed by signal 9 (out of memory?)\n" in said
    assert f"{TRIALS[2].label}: ZeroDivisionError: a bug\nTraceback" in said
    assert [status(trial, runs)[0] for trial in TRIALS] == ["to do", "done", "to do", "done"]
    assert names(runs) == sorted([*results_of([TRIALS[1], TRIALS[3]]), f"{TRIALS[0].key}.lock"])


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
    options = {"dashboard_address": None, "silence_logs": 50, "local_directory": folder}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as made:
        yield made


def test_a_cluster_that_loses_a_worker_finishes_every_trial_once(start, runs, undisturbed, dask):
    """One worker is killed in the middle of its trial, which another takes over at the checkpoint."""
    process = start(f"go(LONG[:3], scheduler={dask.scheduler_address!r}, run=EAGER)")
    wait_for(lambda: list(runs.glob("*.checkpoint")), "a checkpoint")
    dask.workers[0].process.process.kill()
    out, err = process.communicate(timeout=400)
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


def test_a_cluster_stops_after_minutes_and_when_its_client_leaves(go, start, runs, dask, capsys):
    """What nobody waits for any more stops at the end of its epoch, with a checkpoint; then the workers are free."""
    assert go(LONG[:3], scheduler=dask.scheduler_address, minutes=0.01) == []
    assert "time is up, and 3 of 3 trials are not finished" in capsys.readouterr().err
    log = runs / "log"
    run = f"partial(counts, log={str(log)!r}, pause=600)"
    process = start(f"go(LONG[:2], scheduler={dask.scheduler_address!r}, run={run})")
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) == 2, "both workers to be busy")
    process.kill()
    assert set(go(TRIALS[:2], scheduler=dask.scheduler_address, run=counts)) == {trial.key for trial in TRIALS[:2]}


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
    monkeypatch.setattr(paths, "PROJECT", tmp_path / "project")
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
    """On a machine with torch, numpy, pandas, pyarrow, click and tqdm alone, and what these need."""
    allowed, waiting = {"labelaug"}, ["torch", "numpy", "pandas", "pyarrow", "click", "tqdm"]
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


BARE = """\
from dataclasses import replace
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
