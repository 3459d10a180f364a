"""Tables and their provenance: what is written comes back, a failure leaves no trace, damage is said."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
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
from labelaug.results import ResultsError, environment, read_table, section, write_table

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
    """Commit, versions, device and time are those of this process, asked for independently."""
    before = datetime.now(UTC).replace(microsecond=0)
    _, provenance = read_table(write_table(tmp_path / "a.parquet", FRAME, description={}, seconds=0.0))
    assert set(provenance) == {"commit", "dirty", "versions", "device", "created", "description", "seconds"}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
    assert provenance["commit"] == (git.stdout.strip() if git.returncode == 0 else "none")
    assert provenance["versions"]["python"] == platform.python_version()
    for package in ("torch", "numpy", "scipy", "pandas"):
        assert provenance["versions"][package] == version(package)
    assert provenance["device"].startswith("CPU, ") and f"{os.cpu_count()} cores" in provenance["device"]
    assert before <= datetime.fromisoformat(provenance["created"]) <= datetime.now(UTC)


def test_commit_and_dirty_follow_the_repository(tmp_path, monkeypatch):
    """In a repository of its own: no commit, a clean commit, a changed file, and no repository at all."""
    monkeypatch.setattr(results, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]

    def git(*arguments):
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert environment()["commit"] == "none" and environment()["dirty"] is False
    git("init", "--quiet")
    assert environment()["commit"] == "none"
    (tmp_path / "a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "--quiet", "--message", "one")
    assert environment()["commit"] == git("rev-parse", "HEAD") and len(environment()["commit"]) == 40
    (tmp_path / "untracked.txt").write_text("left out")
    assert environment()["dirty"] is False
    (tmp_path / "a.txt").write_text("two")
    assert environment()["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git
    assert environment()["commit"] == "none"


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
    time.sleep(0.05)
    opened.write("sweep", FRAME, description={"n": 3})
    elapsed = time.perf_counter() - opened.started
    tables = tmp_path / "tables"
    assert 0.05 <= read_table(tables / "sweep.parquet")[1]["seconds"] <= elapsed + 0.001
    opened.write("given", FRAME, description={}, seconds=7.0)
    assert read_table(tables / "given.parquet")[1]["seconds"] == 7.0
    assert sorted(contents(tmp_path)) == [f"tables/{n}.{e}" for n in ("given", "sweep") for e in ("csv", "parquet")]
    monkeypatch.delenv("LABELAUG_RUN_DIR")
    assert section("02_synthetic_sweep").folder == BUILD / "scratch" / "02_synthetic_sweep"


def test_metadata_is_plain_json(tmp_path):
    """Anyone's parquet reader finds the provenance under the key labelaug."""
    path = write_table(tmp_path / "a.parquet", FRAME, description={"n": 3}, seconds=1.0)
    assert json.loads(pq.read_schema(path).metadata[b"labelaug"])["description"] == {"n": 3}
