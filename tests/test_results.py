"""Tables and their provenance: what is written comes back, a failure leaves no trace, damage is said."""

import errno
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal

from labelaug import results
from labelaug.data.synthetic import Box, TwoFeatureTask
from labelaug.paths import BUILD, PROJECT
from labelaug.results import CommitError, ResultsError, commit, environment, read_table, section, write_table

FRAME = pd.DataFrame({"seed": [0, 1, 2], "value": [0.5, np.nan, -1e-9], "metric": ["loss", "loss", "norm"]})
LARGE = pd.DataFrame({"value": np.random.default_rng(0).normal(size=50_000)})  # 400 kB as parquet, more as text


def contents(folder):
    """Every file below a folder, hidden ones included, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip(tmp_path):
    """Rows, types and order come back; the CSV beside the parquet holds the same rows in text."""
    path = write_table(tmp_path / "new" / "tables" / "a.parquet", FRAME, description={"n": 3}, seconds=1.23456)
    frame, provenance = read_table(path)
    assert_frame_equal(frame, FRAME)
    assert_frame_equal(pd.read_csv(path.with_suffix(".csv")), FRAME, rtol=1e-7)  # eight digits in text
    assert sorted(contents(path.parent)) == ["a.csv", "a.parquet"]
    assert provenance["seconds"] == 1.235 and provenance["description"] == {"n": 3}
    with pytest.raises(AssertionError):
        assert_frame_equal(frame, FRAME.iloc[::-1].reset_index(drop=True))


def test_provenance_says_where_a_number_comes_from(tmp_path):
    """Commit (if this is a checkout), versions, device and time are those of this process, asked for independently."""
    before = datetime.now(UTC).replace(microsecond=0)
    _, provenance = read_table(write_table(tmp_path / "a.parquet", FRAME, description={}, seconds=0.0))
    assert set(provenance) == {"commit", "dirty", "versions", "device", "created", "description", "seconds"}
    if (PROJECT / ".git").exists():
        assert provenance["commit"] == git(PROJECT, "rev-parse", "HEAD")
    assert provenance["versions"]["python"] == platform.python_version()
    for package in ("torch", "numpy", "scipy", "pandas"):
        assert provenance["versions"][package] == version(package)
    assert provenance["device"].startswith("CPU, ") and f"{os.cpu_count()} cores" in provenance["device"]
    assert before <= datetime.fromisoformat(provenance["created"]) <= datetime.now(UTC)


def git(folder, *arguments, **variables):
    """What plain git says in a folder; the variables are added to the environment."""
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder, *names):
    """A repository with one commit, of these files. Returns: the commit."""
    git(folder, "init", "--quiet")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder} {name}")
        git(folder, "add", name)
    git(folder, "commit", "--quiet", "--message", "one")
    return git(folder, "rev-parse", "HEAD")


OWN = "src/labelaug/results.py"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that stands for the project and holds one file of the package; no repository, no variables of git."""
    for name in [name for name in os.environ if name.startswith("GIT_") or name == "LABELAUG_COMMIT"]:
        monkeypatch.delenv(name)
    folder = tmp_path / "parent" / "project"
    (folder / OWN).parent.mkdir(parents=True)
    (folder / OWN).write_text("from an archive")
    monkeypatch.setattr(results, "PROJECT", folder)
    return folder


def test_commit_and_dirty_follow_the_repository(place, monkeypatch):
    """In a repository of its own: no commit, a clean commit, a changed file, a machine without git."""
    assert commit() == ("none", False)
    git(place, "init", "--quiet")
    assert commit() == ("none", False)
    found = repository(place, OWN)
    assert commit() == (found, False) and len(found) == 40
    (place / "untracked.txt").write_text("left out")
    assert commit() == (found, False)
    (place / OWN).write_text("two")
    assert commit() == (found, True)
    assert (environment()["commit"], environment()["dirty"]) == (found, True)
    monkeypatch.setenv("PATH", str(place))
    assert commit() == ("none", False)


SURROUNDINGS = {
    "GIT_DIR": ["GIT_DIR"],
    "GIT_WORK_TREE": ["GIT_DIR", "GIT_WORK_TREE"],
    "GIT_INDEX_FILE": ["GIT_INDEX_FILE"],
    "GIT_OBJECT_DIRECTORY": ["GIT_OBJECT_DIRECTORY"],
    "GIT_COMMON_DIR": ["GIT_COMMON_DIR"],
}


@pytest.mark.parametrize("names", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_commit_is_not_that_of_another_repository_that_the_surroundings_name(place, tmp_path, monkeypatch, names):
    """As in a git hook or `git rebase --exec`; plain git, as a control, answers otherwise or not at all."""
    ours, other = repository(place, OWN), tmp_path / "other"
    other.mkdir()
    assert repository(other, "a.txt") != ours
    values = {
        "GIT_DIR": str(other / ".git"),
        "GIT_WORK_TREE": str(other),
        "GIT_INDEX_FILE": str(other / ".git" / "index"),
        "GIT_OBJECT_DIRECTORY": str(other / ".git" / "objects"),
        "GIT_COMMON_DIR": str(other / ".git"),
    }
    for name in names:
        monkeypatch.setenv(name, values[name])
    with suppress(subprocess.CalledProcessError):
        plain = git(place, "rev-parse", "HEAD"), git(place, "status", "--porcelain", "--untracked-files=no")
        assert plain != (ours, "")
    assert commit() == (ours, False)


@pytest.mark.parametrize(
    "tracked", ["project/a.txt", f"project/{OWN}", OWN], ids=["beside it", "it", "its other version"]
)
def test_commit_is_not_that_of_a_repository_around_the_project(place, tracked):
    around = repository(place.parent, tracked)
    assert git(place, "rev-parse", "HEAD") == around and commit() == ("none", False)


def test_commit_is_not_that_of_a_repository_without_the_package(place):
    """An archive unpacked into a repository of something else; staged is not committed."""
    repository(place, "a.txt")
    assert commit() == ("none", False)
    git(place, "add", OWN)
    assert commit() == ("none", False)
    git(place, "commit", "--quiet", "--message", "two")
    assert commit() == (git(place, "rev-parse", "HEAD"), False)


def test_commit_of_a_work_tree(place, tmp_path):
    """`git worktree add`: .git is a file there."""
    main = tmp_path / "main"
    main.mkdir()
    repository(main, "a.txt")
    shutil.rmtree(place)
    git(main, "worktree", "add", "--quiet", str(place))
    repository(place, OWN)
    assert commit() == (git(place, "rev-parse", "HEAD"), False) != (git(main, "rev-parse", "HEAD"), False)


def test_commit_does_not_need_the_readers_own_settings_of_git(place, tmp_path, monkeypatch):
    """A damaged ~/.gitconfig: plain git, as a control, refuses every question."""
    ours, home = repository(place, OWN), tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text("broken[")
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(subprocess.CalledProcessError):
        git(place, "rev-parse", "HEAD")
    assert commit() == (ours, False)


def test_commit_of_another_users_folder(place, tmp_path, monkeypatch):
    """A mount or a container: git calls the ownership dubious and answers plain questions with a refusal."""
    ours = repository(place, OWN)
    script = f'#!/bin/sh\nGIT_TEST_ASSUME_DIFFERENT_OWNER=1 exec {shutil.which("git")} "$@"\n'
    (tmp_path / "git").write_text(script)
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        git(place, "rev-parse", "HEAD")
    assert "dubious ownership" in refused.value.stderr
    assert commit() == (ours, False)


def test_commit_does_not_stand_in_the_way_of_git(place):
    """Asking takes no lock, whose owner would break a reader's `git commit`, and changes nothing in .git."""
    repository(place, OWN)
    os.utime(place / OWN, (0, 0))  # another time than the index has for it: a status refreshes the index
    before = contents(place / ".git")
    assert commit()[1] is False and contents(place / ".git") == before
    git(place, "status")
    assert contents(place / ".git") != before


def test_commit_is_given_where_there_is_no_repository(place, monkeypatch):
    """README's command makes the text, in a repository with tags too; a repository of its own knows better."""
    (given,) = re.findall(r"LABELAUG_COMMIT=\$\((git .*?)\)", (PROJECT / "README.md").read_text(encoding="utf-8"))
    origin = place.parent / "origin"
    origin.mkdir()
    found = repository(origin, OWN)
    git(origin, "tag", "-a", "v1", "-m", "one")
    assert git(origin, *shlex.split(given)[1:]) == found
    monkeypatch.setenv("LABELAUG_COMMIT", found)
    assert commit() == (found, False)
    (origin / OWN).write_text("changed")
    monkeypatch.setenv("LABELAUG_COMMIT", git(origin, *shlex.split(given)[1:]))
    assert commit() == (found, True)
    own = repository(place, OWN)
    assert commit() == (own, False) and own != found


@pytest.mark.parametrize("given", ["HEAD", "f352fcb", "v1-3-gf352fcb", "0" * 39, "0" * 41, "0" * 40 + "\n", "A" * 40])
def test_commit_that_is_given_is_checked(place, monkeypatch, given):
    """What is no commit would stand in files for good; where it is not needed it is not read."""
    monkeypatch.setenv("LABELAUG_COMMIT", given)
    with pytest.raises(CommitError, match=r"LABELAUG_COMMIT must be 40 hex digits, and '-dirty' after changes; got"):
        commit()
    assert repository(place, OWN) == commit()[0]


@dataclass(frozen=True)
class Study:
    """A description as a notebook would have it: nested, with tuples and NumPy numbers."""

    task: TwoFeatureTask
    strengths: tuple[float, ...]
    n: np.int64


def test_description_may_be_a_dataclass(tmp_path):
    """Fields and class names come back, nested ones too: a box and another law of equal fields must stay apart."""
    study = Study(TwoFeatureTask(high=Box(0.2, 1.2)), (0.0, 0.5), np.int64(7))
    description = {"study": study, "seeds": (0, 1), "rate": np.float64(0.1)}
    _, provenance = read_table(write_table(tmp_path / "a.parquet", FRAME, description=description, seconds=0.0))
    read = provenance["description"]
    assert read["seeds"] == [0, 1] and read["rate"] == 0.1
    assert read["study"]["type"] == "Study" and read["study"]["n"] == 7 and read["study"]["strengths"] == [0.0, 0.5]
    assert read["study"]["task"] == {
        "type": "TwoFeatureTask",
        "gamma": 0.1,
        "high": {"type": "Box", "low": 0.2, "high": 1.2},
        "high_negative": None,
        "low_noise": 0.0,
        "num_low": 5,
        "num_high": 5,
    }


def test_description_that_json_cannot_hold_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_table(tmp_path / "a.parquet", FRAME, description={"rng": np.random.default_rng(0)}, seconds=0.0)
    assert contents(tmp_path) == {}


def test_overwriting_replaces_the_whole_table(tmp_path):
    path = write_table(tmp_path / "a.parquet", LARGE, description={"try": 1}, seconds=1.0)
    write_table(path, FRAME, description={"try": 2}, seconds=2.0)
    frame, provenance = read_table(path)
    assert_frame_equal(frame, FRAME)
    assert provenance["description"] == {"try": 2}
    assert len(pd.read_csv(path.with_suffix(".csv"))) == len(FRAME)


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A folder on a 64 kB file system; where mounting is not permitted, writes there fail as on a full disk."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return

    def write_half(table, path, *arguments, **options):
        if table.nbytes < 65_536:
            return whole(table, path, *arguments, **options)
        path.write_bytes(b"PAR1" + bytes(60_000))
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = pq.write_table
    monkeypatch.setattr(pq, "write_table", write_half)
    yield folder


def test_full_disk_leaves_the_earlier_table(full_disk):
    """A table that does not fit: one sentence, no part of it left behind, and the earlier table unchanged."""
    path = write_table(full_disk / "a.parquet", FRAME, description={"try": 1}, seconds=1.0)
    before = contents(full_disk)
    with pytest.raises(ResultsError, match=r"cannot write .*a\.parquet: .*No space left on device.*; free space"):
        write_table(path, LARGE, description={"try": 2}, seconds=1.0)
    with pytest.raises(ResultsError, match="No space left on device"):
        write_table(full_disk / "b.parquet", LARGE, description={}, seconds=1.0)
    assert contents(full_disk) == before
    assert read_table(path)[1]["description"] == {"try": 1}


LIMITED = """
import resource, sys
import numpy as np, pandas as pd
from labelaug.results import ResultsError, write_table
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
frame = pd.DataFrame({"value": np.random.default_rng(0).normal(size=50_000)})
if sys.argv[2] == "csv":  # 2 kB as parquet, 100 kB as text
    frame = pd.DataFrame({"value": np.ones(50_000, dtype=int)})
try:
    write_table(sys.argv[1], frame, description={"try": 2}, seconds=1.0)
except ResultsError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("fails", ["parquet", "csv"])
def test_write_cut_off_by_the_system_leaves_the_earlier_table(tmp_path, fails):
    """The system refuses the 65,537th byte of a file, in the parquet or only in its CSV: both files stay as a pair."""
    path = write_table(tmp_path / "a.parquet", FRAME, description={"try": 1}, seconds=1.0)
    before = contents(tmp_path)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path), fails], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("cannot write ") and "File too large" in done.stderr
    assert contents(tmp_path) == before


def test_unwritable_folder(tmp_path):
    """A file stands where a folder should be: root, too, is refused."""
    (tmp_path / "tables").write_text("a file")
    before = contents(tmp_path)
    for path in (tmp_path / "tables" / "a.parquet", tmp_path / "tables" / "deeper" / "a.parquet"):
        with pytest.raises(ResultsError, match=r"cannot write .*a\.parquet: .*(exists|directory); .* writable folder"):
            write_table(path, FRAME, description={}, seconds=1.0)
    assert contents(tmp_path) == before


def test_killed_while_writing_leaves_the_earlier_table(tmp_path):
    """kill -9 between the write and the rename: the earlier table is whole, and the next write completes."""
    path = write_table(tmp_path / "a.parquet", FRAME, description={"try": 1}, seconds=1.0)
    script = (
        "import os, signal, sys; import pandas as pd; import labelaug.results as results\n"
        "results.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "results.write_table(sys.argv[1], pd.DataFrame({'value': [9]}), description={'try': 2}, seconds=1.0)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert_frame_equal(read_table(path)[0], FRAME)
    assert read_table(path)[1]["description"] == {"try": 1}
    write_table(path, FRAME, description={"try": 3}, seconds=1.0)
    assert read_table(path)[1]["description"] == {"try": 3}


@pytest.mark.parametrize("kept", [0, 3, 200, -1])
def test_damaged_table(tmp_path, kept):
    """A file cut short anywhere is named, with what to do."""
    path = write_table(tmp_path / "a.parquet", FRAME, description={}, seconds=1.0)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ResultsError, match=r"a\.parquet is not a whole parquet table .* delete it and run its section"):
        read_table(path)


def test_altered_table(tmp_path):
    """A flipped byte in the footer is found; not one of its readers gets a frame."""
    path = write_table(tmp_path / "a.parquet", FRAME, description={}, seconds=1.0)
    whole = bytearray(path.read_bytes())
    whole[-8] ^= 0xFF  # the length of the footer
    path.write_bytes(bytes(whole))
    with pytest.raises(ResultsError, match="not a whole parquet table"):
        read_table(path)


def test_missing_table_and_missing_provenance(tmp_path):
    with pytest.raises(ResultsError, match=r"no table at .*none\.parquet: run the section"):
        read_table(tmp_path / "none.parquet")
    pq.write_table(pa.Table.from_pandas(FRAME), tmp_path / "bare.parquet")
    with pytest.raises(ResultsError, match=r"bare\.parquet carries no provenance"):
        read_table(tmp_path / "bare.parquet")


def test_section_writes_into_its_run(tmp_path, monkeypatch):
    """The runner's folder if there is one, else the scratch folder; seconds run from the opening unless given."""
    monkeypatch.setenv("LABELAUG_RUN_DIR", str(tmp_path))
    opened = section("02_synthetic_sweep")
    opened = replace(opened, started=opened.started - 100)  # it has been open for as long
    opened.write("sweep", FRAME, description={"n": 3})
    elapsed = time.perf_counter() - opened.started
    tables = tmp_path / "tables"
    assert 100 <= read_table(tables / "sweep.parquet")[1]["seconds"] <= elapsed + 0.001
    opened.write("given", FRAME, description={}, seconds=7.0)
    assert read_table(tables / "given.parquet")[1]["seconds"] == 7.0
    assert sorted(contents(tmp_path)) == [f"tables/{n}.{e}" for n in ("given", "sweep") for e in ("csv", "parquet")]
    monkeypatch.delenv("LABELAUG_RUN_DIR")
    assert section("02_synthetic_sweep").folder == BUILD / "scratch" / "02_synthetic_sweep"


def test_metadata_is_plain_json(tmp_path):
    """Anyone's parquet reader finds the provenance under the key labelaug."""
    path = write_table(tmp_path / "a.parquet", FRAME, description={"n": 3}, seconds=1.0)
    assert json.loads(pq.read_schema(path).metadata[b"labelaug"])["description"] == {"n": 3}
