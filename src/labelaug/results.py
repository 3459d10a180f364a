"""Tables with their provenance: parquet files that are written whole or not at all, and where they are.

A section's tables lie in its run; the results of a study's trials lie in one committed file a study and scale.
"""

import json
import os
import platform
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from labelaug import paths
from labelaug.paths import BUILD, PROJECT

METADATA_KEY = b"labelaug"
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pandas", "papermill", "jupyter-book")


class ResultsError(OSError):
    """A table could not be written or read."""


class CommitError(ValueError):
    """$LABELAUG_COMMIT is no commit."""


def environment(device: str = "cpu") -> dict:
    """What a number depends on besides its description: commit, whether the tree had changes, versions, device, time.

    Args: device: "cpu", or "cuda" for torch's current GPU.
    Returns: ``commit`` and ``dirty`` as :func:`commit` has them, ``versions`` (of the packages that are installed),
    ``device`` (processor and cores, or the GPU's name), ``created`` (ISO 8601, UTC).
    Raises: as :func:`commit`.
    """
    name, dirty = commit()
    return {
        "commit": name,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | _versions(),
        "device": f"CPU, {_processor()}, {os.cpu_count()} cores" if device == "cpu" else f"GPU, {_gpu()}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> tuple[str, bool]:
    """The commit that the package's own files belong to, and whether tracked files differ from it.

    Asked of git where the project is a repository that has this file in its HEAD, whatever other repository the
    surroundings name (``GIT_DIR``) or the project lies in. Elsewhere, as in an unpacked archive or an installed
    package, it is what ``$LABELAUG_COMMIT`` states, "-dirty" at its end meaning changes; README says how to get it.
    Returns: 40 hex digits, or "none" where nothing is known; the changes.
    Raises: CommitError if ``$LABELAUG_COMMIT`` is needed and is no commit.
    """
    found = _git("rev-parse", "--show-prefix", "HEAD", "HEAD:src/labelaug/results.py")
    if found is not None and found.startswith(b"\n"):  # the folder below the repository's: none
        return found.split()[0].decode(), _git("status", "--porcelain", "--untracked-files=no") != b""
    given = os.environ.get("LABELAUG_COMMIT") or "none"
    if not re.fullmatch(r"none|[0-9a-f]{40}(-dirty)?", given):
        raise CommitError(f"LABELAUG_COMMIT must be 40 hex digits, and '-dirty' after changes; got '{given}'")
    return given.removesuffix("-dirty"), given.endswith("-dirty")


def write_table(path: Path, frame: pd.DataFrame, *, description, seconds: float) -> Path:
    """Write ``frame`` as parquet with provenance, and the same rows as CSV beside it; both whole or not at all.

    Args: description: what the rows are a function of (a dict or a dataclass; stored as JSON); seconds: wall time that
        the rows took.
    Raises: ResultsError if the folder cannot be written or is full; a table that was there stays as it was.
    """
    path, table = Path(path), _table(frame, environment() | described(description, seconds))
    _replace(
        {
            path: lambda part: pq.write_table(table, part, compression="zstd"),
            path.with_suffix(".csv"): lambda part: frame.to_csv(part, index=False, float_format="%.8g"),
        }
    )
    return path


def write_parquet(path: Path, frame: pd.DataFrame, provenance: dict) -> Path:
    """Write ``frame`` as parquet alone, whole or not at all; the same rows and provenance give the same bytes.

    Raises: as :func:`write_table`.
    """
    table = _table(frame, provenance)
    _replace({Path(path): lambda part: pq.write_table(table, part, compression="zstd")})
    return Path(path)


def described(description, seconds: float) -> dict:
    """The part of a provenance that is the caller's: the description as JSON's own types, and the wall time."""
    return {"description": _plain(description), "seconds": round(seconds, 3)}


def read_table(path: Path) -> tuple[pd.DataFrame, dict]:
    """Read a table and its provenance.

    Raises: ResultsError if there is no such file, it is damaged, or it carries no provenance.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ResultsError(f"no table at {path}: run the section that writes it") from None
    except (OSError, pa.ArrowException) as error:
        raise ResultsError(f"{path} is not a whole parquet table ({error}): delete it and run its section") from error
    metadata = table.schema.metadata or {}
    if METADATA_KEY not in metadata:
        raise ResultsError(f"{path} carries no provenance: write it with labelaug.results.write_table")
    return table.to_pandas(), json.loads(metadata[METADATA_KEY])


@dataclass(frozen=True, eq=False)
class StudyResults:
    """The finished trials of a study at one scale: two tables that share the column ``key``.

    ``rows`` has key, seed, step, epoch, split, metric, value. ``trials`` has one row per key: every field of the
    description, a nested one as ``setting.epochs`` (its class as ``setting.type``), a list as its JSON text so that it
    can be grouped by, and device, commit, dirty, created, seconds (of training). A field that is None is missing (NaN):
    group by it with ``dropna=False``.
    """

    study: str
    scale: str
    rows: pd.DataFrame
    trials: pd.DataFrame


def load_study(study: str, scale: str, *, folder: Path | None = None) -> StudyResults:
    """The results of a study at one scale, in ``folder`` or the project's own, which are committed.

    Raises: ResultsError if there are none, or the file is damaged.
    """
    path = Path(folder or paths.results_dir()) / f"{study}-{scale}.parquet"
    if not path.exists():
        raise ResultsError(f"no results at {path}: run `labelaug train {study} --scale {scale}`")
    rows, found = read_table(path)
    if not {"study", "scale", "trials"} <= found.keys():
        raise ResultsError(f"{path} holds no study: write it with `labelaug train {study} --scale {scale}`")
    trials = [
        {"key": key}
        | _flat({name: value for name, value in trial["description"].items() if name != "type"})
        | {name: trial[name] for name in ("device", "commit", "dirty", "created", "seconds")}
        for key, trial in found["trials"].items()
    ]
    return StudyResults(found["study"], found["scale"], rows, pd.DataFrame(trials))


@dataclass(frozen=True)
class Section:
    """Where a section's tables and figures go, and since when it has been running."""

    name: str
    folder: Path
    started: float

    def check(self, namespace: dict) -> None:
        """Refuse parameters of another type than the notebook declares, under plain papermill too.

        Args: namespace: ``globals()`` of the notebook, after its parameters cell.
        Raises: ParameterError.
        """
        from labelaug import parameters  # needs YAML, which a machine that only trains may lack

        parameters.check(self.name, namespace)

    def write(self, table: str, frame: pd.DataFrame, *, description, seconds: float | None = None) -> None:
        """Write ``tables/<table>.parquet`` and ``.csv``; ``seconds`` defaults to the time since the section began."""
        elapsed = time.perf_counter() - self.started if seconds is None else seconds
        path = self.folder / "tables" / f"{table}.parquet"
        write_table(path, frame, description=description, seconds=elapsed)


def section(name: str) -> Section:
    """Open section ``name``: in the run folder that ``labelaug run`` gives, else in a scratch folder.

    The scratch folder is the build's, or in the working folder where the package lies outside its project.
    """
    scratch = (BUILD if paths.is_checkout() else Path.cwd()) / "scratch"
    folder = os.environ.get("LABELAUG_RUN_DIR") or scratch / name
    return Section(name, Path(folder), time.perf_counter())


def _table(frame: pd.DataFrame, provenance: dict) -> pa.Table:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return table.replace_schema_metadata((table.schema.metadata or {}) | {METADATA_KEY: json.dumps(provenance)})


def _replace(writers: dict) -> None:
    """Write each file beside its place and, once all are whole, rename them."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in writers}
    path = next(iter(parts))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for path, part in parts.items():
            writers[path](part)
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResultsError(f"cannot write {path}: {reason}; free space or choose a writable folder") from error
    finally:
        for part in parts.values():
            if part.is_file():
                part.unlink()


def _plain(value):
    """Dataclasses, tuples and NumPy scalars as JSON's own types; a dataclass keeps its class name."""
    if is_dataclass(value):
        return {"type": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _flat(fields: dict, prefix: str = "") -> dict:
    """Nested dicts as one, names joined by a point; lists as JSON text."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # a machine that only trains has few of them
            found[name] = version(name)
    return found


def _gpu() -> str:
    import torch  # slow to import, and only a GPU's name needs it

    return torch.cuda.get_device_name()


def _git(*arguments: str) -> bytes | None:
    """What git says of the project's folder; None if it refuses, or there is no git on this machine."""
    surroundings = {name: value for name, value in os.environ.items() if not name.upper().startswith("GIT_")}
    surroundings |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # the reader's may be unreadable
    # The folder may be another user's (a mount, a container), which git distrusts; its code is what runs here already.
    # No lock: a status that refreshes the index would stand in the way of a commit that is made meanwhile.
    command = ["git", "-c", f"safe.directory={PROJECT.as_posix()}", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=PROJECT, env=surroundings, capture_output=True, check=False)
    except (FileNotFoundError, PermissionError):
        return None
    return done.stdout if done.returncode == 0 else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
