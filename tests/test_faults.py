"""What is lost when something breaks from outside: nothing.

Processes killed, folders full or in the way, an interrupted installation, a missing data set in CI.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import wait_for

from labelaug import notebooks, paths
from labelaug.notebooks import NotebookError, run_sections

pytest_plugins = ["pytester"]


# Killed


SLOW = """\
import os, pathlib, subprocess, time
run = pathlib.Path(os.environ['LABELAUG_RUN_DIR'])
helper = subprocess.Popen(['sleep', '3600'])  # such as a worker that loads data
(run / 'half.txt').write_text('half')
time.sleep(3600)  # it waits to be killed
(run / 'half.txt').write_text('whole')"""


def test_kill_9_leaves_no_process_and_nothing_half_written_and_the_next_run_completes(project):
    """The earlier run, of other parameters, stays as it is; the killed one is completed by the next call."""
    source = project.write("01_one", "n: int = 1", SLOW)
    earlier = project.finish("01_one", n=2)
    before = project.files()
    parent = subprocess.Popen([sys.executable, "-c", project.script("notebooks.run_sections(progress=False)")])
    halves = wait_for(lambda: list(project.runs.glob("01_one/.new-*/half.txt")), "the run to be half done")
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 3  # the process that runs the notebook, its kernel, the kernel's helper
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=600)
    assert alive == []
    assert project.files() == before  # the process took its temporary folder along
    assert notebooks.current_runs() == ({}, ["01_one"])

    source.write_text(source.read_text().replace("subprocess.Popen(['sleep', '3600'])", "None"))
    # The same, with the process that cleans up killed first: what it leaves is hidden, and swept by the next run.
    parent = subprocess.Popen([sys.executable, "-c", project.script("notebooks.run_sections(progress=False)")])
    halves = wait_for(lambda: list(project.runs.glob("01_one/.new-*/half.txt")), "the run to be half done")
    family = psutil.Process(parent.pid).children(recursive=True)
    for process in (*family[:1], parent):
        process.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=600)
    assert alive == []
    assert halves[0].exists() and notebooks.current_runs() == ({}, ["01_one"])

    source.write_text(source.read_text().replace("sleep(3600)", "sleep(0)"))
    (run,) = run_sections(progress=False)
    assert (run.path / "half.txt").read_text() == "whole"
    assert not halves[0].exists() and list(project.runs.rglob(".*")) == []
    assert run.parameters == {"n": 1}
    assert before.items() <= project.files().items() and earlier.exists()


def test_a_killed_kernel_is_a_failure_although_papermill_notes_none(project):
    project.write("01_one", "n: int = 1", "n", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "n")
    with pytest.raises(NotebookError, match=r"01_one: cell 4 stopped with the death of its kernel .*; the notebook as"):
        run_sections(progress=False)
    assert notebooks.current_runs() == ({}, ["01_one"])
    assert '"exception": true' not in (project.build / "failed" / "01_one.ipynb").read_text()  # hence our own sentence


def test_a_killed_runner_is_told_by_the_name_of_its_signal(project):
    """The process between us and the kernel: a notebook can reach it, and so can whoever is short of memory."""
    project.write("01_one", "n: int = 1", "import os, signal\nos.kill(os.getppid(), signal.SIGSEGV)", "n")
    with pytest.raises(NotebookError, match=r"^01_one: the process that runs the notebook was killed by SIGSEGV\n"):
        run_sections(progress=False)
    assert notebooks.current_runs() == ({}, ["01_one"])


def test_a_run_killed_while_it_took_the_place_of_another_gives_it_back(tmp_path):
    """Between the two renames of ``run --force`` the run has no name; a dead process's is given back or swept."""
    dead = "1-1000"  # process 1 started at another time
    alive = notebooks._owner()
    left = [f".old-aaa-{dead}", f".new-aaa-{dead}", f".old-bbb-{dead}"]
    for name in (*left, "bbb", f".new-ccc-{alive}", f".old-ddd-{alive}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(name)
    notebooks._clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".new-ccc-{alive}", f".old-ddd-{alive}", "aaa", "bbb"]
    assert (tmp_path / "aaa" / "run.json").read_text() == f".old-aaa-{dead}"
    assert (tmp_path / "bbb" / "run.json").read_text() == "bbb"

    (tmp_path / ".new-bbb-1-1").mkdir()
    notebooks._publish(tmp_path / ".new-bbb-1-1", tmp_path / "bbb")
    assert list((tmp_path / "bbb").iterdir()) == [] and not (tmp_path / ".old-bbb-1-1").exists()


# Full, or in the way

FULL = """\
import os, pathlib
from labelaug import results
run = pathlib.Path(os.environ['LABELAUG_RUN_DIR'])
if where == 'table':  # the kernel finds the disk full
    import pandas as pd
    (run / 'tables').mkdir()
    os.symlink('/dev/full', run / 'tables' / f'.sweep.parquet.{os.getpid()}.part')
    results.section('01_one').write('sweep', pd.DataFrame({'x': [1]}), description={})
if where == 'notebook':  # papermill does
    (run / 'notebook.ipynb').unlink()
    os.symlink('/dev/full', run / 'notebook.ipynb')"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_result(project):
    project.write("01_one", "where: str = 'nowhere'", FULL)
    project.finish("01_one")
    before = project.files()
    with pytest.raises(
        NotebookError, match=r"^01_one: cell 3 stopped with ResultsError: cannot write .*No space left on device"
    ):
        run_sections(overrides={"where": "table"}, progress=False)
    shutil.rmtree(project.build / "failed")
    with pytest.raises(NotebookError, match=r"^01_one: cannot write .*: No space left on device; free space or make"):
        run_sections(overrides={"where": "notebook"}, progress=False)
    assert project.files() == before
    assert list(project.runs.rglob(".*")) == []


def test_a_results_folder_that_cannot_be_written_is_one_sentence(project):
    """A file stands where the folder should be: unlike permissions, that stops an administrator too."""
    project.write("01_one", "n: int = 1")
    project.build.mkdir(parents=True)
    project.runs.write_text("in the way")
    (project.root / "book" / "claims.yml").write_text("[]\n")  # with profiles.yml, by which a project is known
    program = project.script("from labelaug.cli import main; main(['run', '01'])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    cure = "free space or make it writable"
    assert re.fullmatch(rf"Error: cannot use .*runs/01_one: Not a directory; {cure}\n", done.stderr)
    assert project.runs.read_text() == "in the way"


# An environment that is missing, old or half made

INTERPRETER = """\
#!/bin/sh
# Stands in for Python: notes what it is asked to install, into an environment that is a copy of itself.
case "$*" in
  *version_info*) [ -z "$OLD" ] ;;
  --version) echo Python 3.9.2 ;;
  "-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> log ;;
  *"pip install"*) echo "pip $(cat requirements.txt)" >> log; [ -z "$BREAK" ] ;;
esac
"""


@pytest.fixture
def fresh_clone(tmp_path):
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copy(Path(__file__).parents[1] / "Makefile", folder)
    (folder / "requirements.txt").write_text("numpy==1")
    (folder / "pyproject.toml").write_text("")
    (folder / "python").write_text(INTERPRETER)
    (folder / "python").chmod(0o755)

    def setup(**environment):
        (folder / "log").unlink(missing_ok=True)
        done = subprocess.run(
            ["make", "setup", "PYTHON=./python"],
            cwd=folder, env=os.environ | environment, capture_output=True, text=True,
        )  # fmt: skip
        log = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
        return done.returncode, log, done.stderr

    return folder, setup


def test_make_installs_what_is_missing_or_stale_and_only_that(fresh_clone):
    folder, setup = fresh_clone
    assert setup()[:2] == (0, ["venv", "pip numpy==1"])
    assert setup()[:2] == (0, [])
    os.utime(folder / "requirements.txt")  # a clone or a touch changes times, not contents
    assert setup()[:2] == (0, [])
    (folder / "requirements.txt").write_text("numpy==2")
    assert setup()[:2] == (0, ["pip numpy==2"])
    (folder / "pyproject.toml").write_text("[project]")
    assert setup()[:2] == (0, ["pip numpy==2"])
    (folder / ".venv" / "bin" / "python").unlink()  # the interpreter that it was made from is gone
    assert setup()[:2] == (0, ["venv", "pip numpy==2"])


def test_an_interrupted_installation_does_not_look_finished(fresh_clone):
    folder, setup = fresh_clone
    for before in ("numpy==1", "numpy==2"):  # while it is made, and while it is brought up to date
        (folder / "requirements.txt").write_text(before)
        code, log, _ = setup(BREAK="yes")
        assert code != 0 and log[-1] == f"pip {before}"
        assert setup()[:2] == (0, ["venv", f"pip {before}"])
        assert setup()[:2] == (0, [])


def test_an_old_or_missing_python_is_one_sentence(fresh_clone):
    folder, setup = fresh_clone
    code, log, said = setup(OLD="yes")
    assert code != 0 and log == []
    needed = "Python 3.11 or later is needed and './python' is"
    cure = "name another one, as in make PYTHON=python3.12 setup."
    assert said.splitlines()[0] == f"{needed} Python 3.9.2: {cure}"
    (folder / "python").unlink()
    assert setup()[2].splitlines()[0] == f"{needed} missing: {cure}"


# Skips in CI

MARKED = """\
import pytest
from labelaug.data.images import load_images
from labelaug.paths import data_dir

@pytest.mark.data
def test_reads_a_set():
    load_images("cifar10", data_dir())

@pytest.mark.browser
def test_opens_a_page(chromium):
    pass

@pytest.mark.browser
def test_opens_the_book(built_book):
    pass

def test_is_not_guarded():
    raise pytest.skip.Exception("for a reason of its own")
"""


@pytest.mark.parametrize(
    ("environment", "outcomes"),
    [
        ({}, {"skipped": 4}),
        ({"CI": "true"}, {"skipped": 1, "failed": 1, "errors": 1, "deselected": 1}),
        ({"CI": "true", "LABELAUG_BOOK_BUILT": "1"}, {"skipped": 1, "failed": 1, "errors": 2}),
    ],
)
def test_a_skipped_data_or_browser_test_fails_in_ci(pytester, monkeypatch, environment, outcomes):
    """No data, no Chromium, no book: skips on a reader's machine, failures in CI."""
    for name in ("CI", "LABELAUG_BOOK_BUILT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"LABELAUG_DATA": str(pytester.path), "PATH": ""} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(paths, "BUILD", pytester.path)
    pytester.makeini("[pytest]\nmarkers =\n    data\n    browser")
    pytester.makepyfile(MARKED)
    done = pytester.runpytest_inprocess("-p", "conftest")
    done.assert_outcomes(**outcomes)
    assert ("must not be skipped in CI" in done.stdout.str()) == bool(environment)
