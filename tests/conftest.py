"""What every test shares: fixed seeds, one thread, no display, small projects, and what a missing thing means.

A test marked ``data`` or ``browser`` is skipped where the image sets, Chromium or the built book are missing. With CI
set that is a failure, and so is any other skip of such a test.
"""

import json
import os
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import settings

from labelaug import notebooks, paths
from labelaug.data.images import DataMissing

matplotlib.use("Agg")  # not MPLBACKEND: the kernels that tests start have a display of their own
torch.set_num_threads(1)
# The same examples in every run and on every machine, however slow.
settings.register_profile("study", derandomize=True, deadline=None, database=None)
settings.load_profile("study")

GUARDED = ("data", "browser")


def pytest_collection_modifyitems(config, items):
    """Tests of the real book wait, in CI, for the second call of pytest, after ``make book``; there none may skip."""
    if os.environ.get("CI") and not os.environ.get("LABELAUG_BOOK_BUILT"):
        later = [item for item in items if "built_book" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marks = [name for name in GUARDED if item.get_closest_marker(name)]
    if "data" in marks and call.excinfo and call.excinfo.errisinstance(DataMissing):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], f"Skipped: {call.excinfo.value}")
    if marks and os.environ.get("CI") and report.skipped:
        report.outcome = "failed"
        reason = report.longrepr[2].removeprefix("Skipped: ")
        report.longrepr = f"a test marked {' and '.join(marks)} must not be skipped in CI: {reason}"
    return report


def wait_for(condition, what: str):
    """What ``condition()`` gives as soon as it is true, on however busy a machine; for tests of several processes."""
    until = time.monotonic() + 600
    while not (found := condition()):
        assert time.monotonic() < until, f"waited ten minutes for {what}"
        time.sleep(0.01)
    return found


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20261121)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium for playwright's ``executable_path``."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        raise pytest.skip.Exception("no Chromium on this machine: install Debian's chromium")
    return found[0]


@pytest.fixture(scope="session")
def built_book() -> Path:
    """Folder of the real book's pages."""
    html = paths.BUILD / "html"
    if not (html / "index.html").is_file():
        raise pytest.skip.Exception("the book is not built: run make book")
    return html


class Project:
    """A project of tiny notebooks in a folder of its own, used in place of the real one."""

    def __init__(self, root: Path):
        self.root = root
        self.notebooks = root / "notebooks"
        self.build = root / "book" / "_build"
        self.runs = self.build / "runs"
        self.places = {"PROJECT": root, "NOTEBOOKS": self.notebooks, "BUILD": self.build, "RUNS": self.runs}
        self.notebooks.mkdir(parents=True)
        (root / "book" / "claims.yml").parent.mkdir(parents=True)
        (root / "requirements.txt").write_text("numpy==2\n")
        (root / "package" / "training").mkdir(parents=True)  # stands in for the code that the keys of runs depend on
        for name in ("__init__.py", "losses.py", "engine.py", "training/__init__.py", "training/linear.py"):
            (root / "package" / name).write_text("x = 1\n")
        self.listed = []
        self.list_sections()
        self.profiles("smoke: {}\npaper: {}\n")

    def use(self, monkeypatch) -> "Project":
        for name, path in self.places.items():
            monkeypatch.setattr(paths, name, path)
        monkeypatch.setattr(notebooks, "PACKAGE", self.root / "package")
        return self

    def script(self, call: str) -> str:
        """A program that does ``call`` on this project in a process of its own."""
        lines = ["from pathlib import Path", "from labelaug import notebooks, paths"]
        lines += [f"paths.{name} = Path({str(path)!r})" for name, path in self.places.items()]
        lines += [f"notebooks.PACKAGE = Path({str(self.root / 'package')!r})", call]
        return "\n".join(lines)

    def profiles(self, text: str) -> None:
        (self.notebooks / "profiles.yml").write_text(text, encoding="utf-8")

    def list_sections(self, *names: str) -> None:
        """Put names into the table of contents, which says what is a section."""
        self.listed += [name for name in names if name not in self.listed]
        chapters = "".join(f"\n      - file: {name}" for name in self.listed)
        toc = f"format: jb-book\nroot: index\nparts:\n  - chapters:{chapters or ' []'}\n"
        (self.root / "book" / "_toc.yml").write_text(toc, encoding="utf-8")

    def write(self, section: str, parameters: str, *code: str, text: str = "# A section", data: tuple = ()) -> Path:
        """A notebook: a Markdown cell, the parameters cell, code cells."""
        cells = [{"cell_type": "markdown", "metadata": {}, "source": text}]
        for tags, source in [(["parameters"], parameters), *(([], source) for source in code)]:
            cell = {"cell_type": "code", "metadata": {"tags": tags}, "source": source}
            cells.append(cell | {"execution_count": None, "outputs": []})
        for number, cell in enumerate(cells):
            cell["id"] = f"cell-{number}"
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        metadata |= {"labelaug": {"data": list(data)}}
        self.list_sections(section)
        path = self.notebooks / f"{section}.ipynb"
        notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
        path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")
        return path

    def finish(self, section: str, profile: str = "default", seconds: float = 1.0, **overrides) -> Path:
        """The folder of a finished run, as current as a real one, without running anything."""
        parameters = notebooks.resolve(section, profile, overrides)
        plan = notebooks._plan(section, parameters, None if overrides else profile)
        plan.folder.mkdir(parents=True)
        shutil.copy(self.notebooks / f"{section}.ipynb", plan.folder / "notebook.ipynb")
        record = {name: getattr(plan, name) for name in ("section", "key", "profile", "parameters", "data")}
        record |= {"seconds": seconds, "created": "2026-11-21T10:00:00+00:00", "commit": "0" * 40, "dirty": False}
        record |= {"versions": {"python": "3.11.7", "torch": "2.13.0"}, "device": "CPU, 2 cores"}
        (plan.folder / "run.json").write_text(json.dumps(record))
        return plan.folder

    def files(self) -> dict[str, bytes]:
        """Every file of the results folder with its content; those that are being written too."""
        files = [path for path in self.build.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.build)): path.read_bytes() for path in files}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    return Project(tmp_path / "a {project}").use(monkeypatch)
