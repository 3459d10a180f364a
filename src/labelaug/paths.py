"""Where things are: the repository, what a build leaves behind, and the image sets."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
BUILD = PROJECT / "book" / "_build"
RUNS = BUILD / "runs"
NOTEBOOKS = PROJECT / "notebooks"
RESULTS = PROJECT / "results"  # committed: one file of trials for each study and scale


def data_dir(explicit: str | Path | None = None) -> Path:
    """Folder of the image sets: ``explicit``, else ``$LABELAUG_DATA``, else ``~/.cache/labelaug``."""
    return Path(explicit or os.environ.get("LABELAUG_DATA") or Path.home() / ".cache" / "labelaug").expanduser()
