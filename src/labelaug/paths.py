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


class NoDataFolder(RuntimeError):
    """What is named as the folder of the image sets cannot be one."""


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
    """Folder of the image sets: ``explicit``, else ``$LABELAUG_DATA``, else ``~/.cache/labelaug``.

    Raises: NoDataFolder if it is no folder, or its "~" or "~user" stands for none, as where HOME is not set and the
        user has no entry. That it is not there yet is no error: a download makes it.
    """
    named = explicit or os.environ.get("LABELAUG_DATA") or "~/.cache/labelaug"
    try:
        folder = Path(named).expanduser()
    except RuntimeError:
        reason = f"no home folder is known for the '{Path(named).parts[0]}' of '{named}'"
        raise NoDataFolder(f"{reason}: name the image sets' folder in full, with --data-dir or LABELAUG_DATA") from None
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NoDataFolder(f"'{folder}' is no folder: name the one that holds the image sets, or is to hold them")
    return folder
