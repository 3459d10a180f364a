"""Where things are: the project's folder, what a build leaves behind, results, and the image sets."""

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
BUILD = PROJECT / "book" / "_build"
RUNS = BUILD / "runs"
NOTEBOOKS = PROJECT / "notebooks"
RESULTS = PROJECT / "results"  # committed: one file of trials for each study and scale


class NoCheckout(RuntimeError):
    """What needs the project's folder was asked of a package that lies elsewhere."""


def is_checkout() -> bool:
    """Whether the package lies in the project's folder: true of an unpacked archive, false of an installed copy."""
    return all((PROJECT / file).is_file() for file in ("notebooks/profiles.yml", "book/claims.yml"))


def checkout() -> Path:
    """The project's folder. Raises: NoCheckout where the package lies elsewhere."""
    if not is_checkout():
        raise NoCheckout(
            f"this needs the project's notebooks, book and benchmarks, and the package lies without them in "
            f"{Path(__file__).parent}: get the project, and in its folder `pip install -e .`"
        )
    return PROJECT


def results_dir() -> Path:
    """Folder of the results of studies: the project's, else ``results`` in the working folder."""
    return (PROJECT if is_checkout() else Path.cwd()) / "results"


def data_dir(explicit: str | Path | None = None) -> Path:
    """Folder of the image sets: ``explicit``, else ``$LABELAUG_DATA``, else ``~/.cache/labelaug``."""
    return Path(explicit or os.environ.get("LABELAUG_DATA") or Path.home() / ".cache" / "labelaug").expanduser()
