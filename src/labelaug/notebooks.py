"""The sections of the book: their parameters checked, their notebooks executed by papermill, what is current kept.

A finished run of a section is one folder, ``RUNS/<section>/<key>/``, whose name is a hash of all that it depends on.
It appears by one rename: whoever looks sees a whole run or none. Each notebook runs in a child process of its own
(``python -m labelaug.notebooks``), which reports over a pipe and ends itself, its kernel and its temporary folder when
the pipe from its parent closes. What a reader has set for Python, IPython, Jupyter or matplotlib, and the files of the
folder where a command is given, do not reach that process or the kernel.
"""

import ast
import difflib
import hashlib
import json
import os
import re
import shutil
import string
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import psutil
import yaml

from labelaug import paths
from labelaug.imports import PACKAGE, imported_modules
from labelaug.parameters import KINDS, ParameterError, checked, yaml_text
from labelaug.processes import ending

PROFILES = ("smoke", "default", "paper")  # "default" is the parameters cell itself; profiles.yml holds the others
CONFIGURES = ("PYTHON", "IPYTHON", "JUPYTER", "JPY_", "MPL", "MATPLOTLIB", "PANDAS_", "SCIPY_", "SKLEARN_")
INSTALLED = ("PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE")  # where packages are, as PYTHONPATH, and no setting
IMPORTED = """\
import json, sys
print(json.dumps([name for name in sys.modules if name.partition(".")[0] == "labelaug"]))"""


class NotebookError(RuntimeError):
    """One or more notebooks did not run through: one line each."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell, ``name: kind = default  # help``."""

    name: str
    kind: str  # one of KINDS
    default: object
    help: str


@dataclass(frozen=True)
class Run:
    """A finished run, as its ``run.json`` tells it."""

    path: Path
    section: str
    key: str
    profile: str | None  # None where the command line changed a parameter
    parameters: dict
    seconds: float
    created: str  # ISO 8601, UTC
    commit: str
    dirty: bool
    versions: dict
    device: str
    data: str | None  # fingerprint of the image sets; None for a section that reads none


# ---------------------------------------------------------------------------------------------------------------------
# Sections and their parameters


def sections() -> list[str]:
    """Names of all sections: the notebooks ``NN_name`` that the book's table of contents lists, in order.

    Whatever else lies beside them, such as a copy that an editor, a synchroniser or papermill made, is no section.
    """
    toc = paths.PROJECT / "book" / "_toc.yml"
    try:
        listed = _toc_files(yaml_text(toc.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ParameterError(f"there is no {toc}, which lists the sections: use a checkout of the study") from None
    except yaml.YAMLError as error:
        raise ParameterError(f"{toc} is not YAML: {' '.join(str(error).split())}") from None
    return sorted(name for name in listed if re.fullmatch(r"\d\d_\w+", name) and _source(name).is_file())


def _toc_files(entry) -> list[str]:
    """Each "file" of a table of contents, at any depth."""
    if isinstance(entry, list):
        return [name for item in entry for name in _toc_files(item)]
    if not isinstance(entry, dict):
        return []
    own = [entry["file"]] if isinstance(entry.get("file"), str) else []
    return own + [name for value in entry.values() for name in _toc_files(value)]


def match(names) -> list[str]:
    """Sections meant by ``names``: a section, an unambiguous beginning of one, or the path of its file; none means all.

    Raises: ParameterError for a name that means no section or several.
    """
    known = sections()
    found = []
    for name in names:
        if str(name).endswith(".ipynb"):
            path = Path(name).resolve()
            hits = [path.stem] if path.parent == paths.NOTEBOOKS.resolve() and path.stem in known else []
        else:
            hits = [name] if name in known else [section for section in known if name and section.startswith(name)]
        if len(hits) != 1:
            reason = f"means several sections: {', '.join(hits)}" if hits else f"is no section{_nearest(name, known)}"
            raise ParameterError(f"'{name}' {reason}")
        found += [section for section in hits if section not in found]
    return found or known


def inspect(section: str) -> dict[str, Parameter]:
    """Parameters of a section, in the order of its parameters cell.

    Raises: ParameterError for an unknown section, or a cell that papermill cannot read in full (it skips without a
        word each line that holds more than one "=").
    """
    _notebook(section)
    return dict(_inspect(section, _source(section), _source(section).read_text(encoding="utf-8")))


@lru_cache(maxsize=64)
def _inspect(section: str, path: Path, text: str) -> dict[str, Parameter]:
    """``inspect`` of the notebook ``path``, whose content is ``text``."""
    cells = [cell for cell in json.loads(text)["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if not cells:
        return {}
    try:
        seen = _papermill().inspect_notebook(_literal(path))
        tree = ast.parse("".join(cells[0]["source"]))
    except (ValueError, SyntaxError) as error:  # no kernelspec; a cell that is not Python
        raise ParameterError(f"{section}: the parameters cell cannot be read ({error})") from None
    found = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in (target.id for target in targets if isinstance(target, ast.Name)):
            kind = seen[name]["inferred_type_name"].replace(" ", "") if name in seen else None
            if kind not in KINDS:
                raise ParameterError(
                    f"{section}: write the parameter {name} as '{name}: TYPE = VALUE  # meaning' with one '=' in the "
                    f"line and one of these types: {', '.join(KINDS)}"
                )
            default = checked(section, name, kind, ast.literal_eval(node.value))
            found[name] = Parameter(name, kind, default, seen[name]["help"])
    return found


def image_sets(section: str, parameters: dict) -> list[str]:
    """The image sets that a section reads under ``parameters``, as its metadata say: ``{"labelaug": {"data": […]}}``.

    An entry is a set's name, or the parameter in braces that holds one or several; of "cifar10:cat:dog" the set is what
    stands before the colon.
    Raises: ParameterError for a name that no set can have.
    """
    names = list(dict.fromkeys(entry.partition(":")[0] for entry in _read_by(section, "data", parameters)))
    if names:
        from labelaug.data import images  # slow to import, and most sections read no images

        for name in names:
            try:
                images.check_name(name)
            except ValueError as error:
                raise ParameterError(f"{section}: {error}") from None
    return names


def _committed_results(section: str, parameters: dict) -> list[str]:
    """SHA-256 of each file of results that a section reads, ``{"labelaug": {"results": ["STUDY-{scale}", …]}}``.

    A name without an ending is that of a study's parquet file.
    """
    names = [Path(name) for name in _read_by(section, "results", parameters)]
    files = [paths.RESULTS / (name if name.suffix else f"{name}.parquet") for name in names]
    return [hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "none" for file in files]


def _read_by(section: str, what: str, parameters: dict) -> list[str]:
    """What the metadata name, with each parameter in braces replaced by its value, or by each of its values."""
    found = []
    for entry in _notebook(section)["metadata"].get("labelaug", {}).get(what, []):
        fields = [field for _, field, _, _ in string.Formatter().parse(entry) if field is not None]
        for field in fields:
            if field not in parameters:
                raise ParameterError(f"{section}: its metadata name a parameter '{field}'{_nearest(field, parameters)}")
        values = [value if isinstance(value, list) else [value] for value in map(parameters.get, fields)]
        found += [entry.format(**dict(zip(fields, choice, strict=True))) for choice in product(*values)]
    return found


def resolve(section: str, profile: str = "default", overrides: dict | None = None) -> dict:
    """All parameters of a section: the notebook's own, changed by the profile, changed by ``overrides``.

    Args: overrides: values by name; text is read as the parameter's type (a list as YAML), the rest is only checked.
    Raises: ParameterError, before anything runs, for an unknown name (with the nearest one and the list) or a value of
        the wrong type, in ``overrides`` or in profiles.yml. An int is accepted for a float, and nothing else for
        anything else.
    """
    parameters = inspect(section)
    values = {name: parameter.default for name, parameter in parameters.items()}
    for origin, given in ((f"{section} in profiles.yml", _profile(profile, section)), (section, overrides or {})):
        for name, value in given.items():
            if name not in parameters:
                raise ParameterError(f"{origin}: no parameter '{name}'{_nearest(name, parameters)}")
            values[name] = checked(origin, name, parameters[name].kind, value)
    return values


def resolve_all(names, profile: str = "default", overrides: dict | None = None) -> dict[str, dict]:
    """``resolve`` for several sections; an override goes to each section that has the parameter.

    Raises: ParameterError as ``resolve`` does, and for a name that none of the sections has.
    """
    overrides = overrides or {}
    known = {section: inspect(section) for section in names}
    everything = sorted({name for parameters in known.values() for name in parameters})
    for name in overrides:
        if name not in everything:
            raise ParameterError(f"{', '.join(names)}: no parameter '{name}'{_nearest(name, everything)}")
    return {
        section: resolve(section, profile, {name: overrides[name] for name in overrides if name in parameters})
        for section, parameters in known.items()
    }


def _profile(profile: str, section: str) -> dict:
    """What profiles.yml sets for a section, all leaves as text, after a check of the names in the whole file."""
    path = paths.NOTEBOOKS / "profiles.yml"
    if profile not in PROFILES:
        raise ParameterError(f"no profile '{profile}'{_nearest(profile, PROFILES)}")
    try:
        declared = yaml_text(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ParameterError(f"profiles.yml is not YAML: {' '.join(str(error).split())}") from None
    for name, settings in declared.items():
        if name not in PROFILES or name == "default":
            raise ParameterError(f"profiles.yml: no profile '{name}'; it may set smoke and paper")
        for owner, values in (settings or {}).items():
            if owner not in sections():
                raise ParameterError(f"profiles.yml, {name}: no section '{owner}'{_nearest(owner, sections())}")
            if values and not isinstance(values, dict):
                raise ParameterError(f"profiles.yml, {name}, {owner}: expected 'parameter: value', got {values!r}")
    return (declared.get(profile) or {}).get(section) or {}


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return (f"; did you mean '{close[0]}'?" if close else ";") + f" there are: {', '.join(known) or 'none'}"


def _source(section: str) -> Path:
    return paths.NOTEBOOKS / f"{section}.ipynb"


def _notebook(section: str) -> dict:
    try:
        return json.loads(_source(section).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParameterError(f"'{section}' is no section{_nearest(section, sections())}") from None
    except ValueError as error:
        raise ParameterError(f"{_source(section)} is not a notebook ({error}): restore it from git") from None


def _papermill():
    # jsonschema would compile an optional grammar of internationalised addresses at import: 2.6 s, and unused here.
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill

    return papermill


def _literal(path: Path) -> str:
    """A path as papermill wants it: it reads braces as places to fill in."""
    return str(path).replace("{", "{{").replace("}", "}}")


# ---------------------------------------------------------------------------------------------------------------------
# What is current


@dataclass(frozen=True)
class _Plan:
    """One section with its parameters, and the run folder that they lead to."""

    section: str
    profile: str | None
    parameters: dict
    key: str
    data: str | None

    @property
    def folder(self) -> Path:
        return paths.RUNS / self.section / self.key

    @property
    def is_current(self) -> bool:
        return (self.folder / "run.json").is_file() and (self.folder / "notebook.ipynb").is_file()


def _plan(section: str, parameters: dict, profile: str | None) -> _Plan:
    """The key: notebook, parameters, the code it imports, pins and what it reads: image sets, committed results."""
    notebook = _notebook(section)
    data = None
    if sets := image_sets(section, parameters):
        from labelaug.data import images

        data = images.fingerprint(sets, paths.data_dir())
    cells = [
        {
            "type": cell["cell_type"],
            "source": "".join(cell["source"]),
            "metadata": {k: v for k, v in cell["metadata"].items() if k not in ("execution", "papermill")},
        }
        for cell in notebook["cells"]
    ]
    modules = imported_modules(_code(notebook), PACKAGE)
    code = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in modules.items()}
    requirements = (paths.PROJECT / "requirements.txt").read_text(encoding="utf-8")
    ingredients = [cells, parameters, code, requirements, data, _committed_results(section, parameters)]
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    return _Plan(section, profile, parameters, digest[:12], data)


def _code(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def read_run(path: Path) -> Run:
    """The record of the finished run in folder ``path``."""
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    return Run(path, **{field.name: record[field.name] for field in fields(Run) if field.name != "path"})


def current_runs(profile: str = "default") -> tuple[dict[str, Path], list[str]]:
    """Folders of the runs that are current under ``profile``, by section, and the sections that have none."""
    plans = [_plan(name, values, profile) for name, values in resolve_all(sections(), profile).items()]
    return (
        {plan.section: plan.folder for plan in plans if plan.is_current},
        [plan.section for plan in plans if not plan.is_current],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Running, the parent's side


def run_sections(
    names=(),
    *,
    profile: str = "default",
    overrides: dict | None = None,
    force: bool = False,
    jobs: int | None = None,
    progress: bool = True,
) -> list[Run]:
    """Bring sections up to date: run each that has no current run (with ``force``, each), several at once.

    Args: names: as ``match`` takes them; jobs: notebooks at once (None: one per core, and no more than there are to
        run). Each may use all cores: the trainer's threads never wait for each other, so the system can share them out.
    Returns: the runs, in the order of ``match``.
    Raises: ParameterError before anything starts; OSError if the results folder cannot be written; NotebookError at the
        end, when notebooks failed: the others have run, and earlier runs are as they were.
    """
    names = match(names)
    settings = resolve_all(names, profile, overrides)
    known = {name: profile if settings[name] == resolve(name, profile) else None for name in names}
    plans = [_plan(name, settings[name], known[name]) for name in names]
    stale = [plan for plan in plans if force or not plan.is_current]
    for plan in stale:
        plan.folder.parent.mkdir(parents=True, exist_ok=True)
        _clean(plan.folder.parent)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = min(jobs or cores, len(stale))
    environment = _environment()
    display = _Progress(progress)
    for plan in plans:
        if plan not in stale:
            display.say(f"{plan.section}: current")

    keys = {plan.section: plan.key for plan in plans}
    failures = []
    children = set()
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        futures = [pool.submit(_supervise, plan, environment, display, children) for plan in stale]
        try:
            for future in as_completed(futures):
                section, key, failure = future.result()
                keys[section] = key
                failures += [failure] if failure else []
        except BaseException:  # Ctrl-C among them: a child whose pipe closes ends itself
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.stdin.close()
            raise
    display.close()
    if failures:
        raise NotebookError("\n".join(failures))
    return [read_run(paths.RUNS / name / keys[name]) for name in names]


def _environment() -> dict[str, str]:
    """Variables for the processes of a section: the reader's, less those that configure what it computes with."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CONFIGURES) or name in INSTALLED}
    folders = [os.path.abspath(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return kept | {
        **({"PYTHONPATH": os.pathsep.join(folders)} if folders else {}),
        "PYTHONSAFEPATH": "1",  # no module is taken from the folder where one happens to be
        "PYTHONHASHSEED": "0",  # sets have one order
        "PYTHONUTF8": "1",
        "MATPLOTLIBRC": str(Path(find_spec("matplotlib").origin).parent / "mpl-data" / "matplotlibrc"),
        "LABELAUG_DATA": str(paths.data_dir().absolute()),  # a kernel has a folder of its own
    }


def _supervise(plan: _Plan, environment: dict, display: "_Progress", children: set) -> tuple[str, str, str | None]:
    """Run one notebook in a child process. Returns: section, key, and the sentence that says why it failed, if so."""
    plan = _plan(plan.section, plan.parameters, plan.profile)  # it may have been edited while it waited for its turn
    changed = {name: value for name, value in plan.parameters.items() if value != inspect(plan.section)[name].default}
    job = {
        "section": plan.section,
        "source": str(_source(plan.section)),
        "folder": str(plan.folder),
        "failed": str(paths.BUILD / "failed" / f"{plan.section}.ipynb"),
        "changed": changed,
        "record": {name: getattr(plan, name) for name in ("section", "key", "profile", "parameters", "data")},
    }
    display.start(plan.section)
    failure = None
    finished = False
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "labelaug.notebooks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=environment,
            cwd=plan.folder.parent,
            start_new_session=True,  # Ctrl-C reaches the parent alone
        ) as child,
    ):
        children.add(child)
        with suppress(BrokenPipeError):  # a child that is dead already is told by its exit code
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
        for line in child.stdout:
            event = json.loads(line)
            failure = event.get("failed")
            finished = "finished" in event or failure is not None
            display.cell(plan.section, event)
        code = child.wait()
        children.discard(child)
        if not finished:
            errors.seek(0)
            failure = f"{plan.section}: the process that runs the notebook {ending(code)}\n{errors.read()}".strip()
    display.end(plan.section, failure)
    return plan.section, plan.key, failure


class _Progress:
    """A bar per notebook on a terminal, short lines elsewhere, nothing if switched off; all on standard error."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.terminal = shown and sys.stderr.isatty()
        self.bars = {}
        self.started = {}
        self.lock = threading.Lock()

    def say(self, text: str) -> None:
        if self.shown:
            from tqdm import tqdm

            with self.lock:
                tqdm.write(text, file=sys.stderr)

    def start(self, section: str) -> None:
        self.started[section] = time.perf_counter()
        if not self.terminal:
            return self.say(f"{section}: running")
        from tqdm import tqdm

        with self.lock:
            total = len(_notebook(section)["cells"])
            self.bars[section] = tqdm(total=total, desc=section, unit="cell", position=len(self.bars), file=sys.stderr)

    def cell(self, section: str, event: dict) -> None:
        if self.terminal and "cell" in event:
            with self.lock:
                self.bars[section].update(event["cell"] - self.bars[section].n)

    def end(self, section: str, failure: str | None) -> None:
        seconds = time.perf_counter() - self.started[section]
        if not self.terminal:
            self.say(f"{section}: {'failed' if failure else 'done'} after {seconds:.1f} s")
        elif not failure:
            with self.lock:
                self.bars[section].update(self.bars[section].total - self.bars[section].n)

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# Folders on the way to a finished run: ".new-<key>-<owner>" is being written, ".old-<key>-<owner>" is being replaced


def _owner(pid: int | None = None) -> str:
    """A process, told apart from a later one of the same number by its start (whole seconds)."""
    process = psutil.Process(pid)
    return f"{process.pid}-{int(process.create_time())}"


def _is_alive(owner: str) -> bool:
    pid, started = map(int, owner.split("-"))
    with suppress(psutil.Error):
        return abs(int(psutil.Process(pid).create_time()) - started) <= 2
    return False


def _clean(folder: Path) -> None:
    """Remove what dead processes left half-done in a section's folder; a run that one was replacing comes back."""
    for path in folder.iterdir():
        ours = re.fullmatch(r"\.(new|old)-([^-]+)-(\d+-\d+)", path.name)
        if ours is None or _is_alive(ours[3]):
            continue
        state, key, _ = ours.groups()
        if state == "old" and not (folder / key).exists():
            path.rename(folder / key)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Let the finished ``temporary`` appear as ``folder``."""
    if not folder.exists():
        return temporary.rename(folder)
    old = folder.with_name(temporary.name.replace(".new-", ".old-", 1))
    folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _drop_superseded(folder: Path, record: dict) -> None:
    """Remove earlier runs of the same parameters or profile on the same image sets: ``folder`` takes their place."""
    for path in folder.parent.glob("*/run.json"):
        if path.parent == folder or not re.fullmatch("[0-9a-f]{12}", path.parent.name):
            continue  # a folder of another name is somebody's own
        earlier = read_run(path.parent)
        same = earlier.parameters == record["parameters"] or (earlier.profile and earlier.profile == record["profile"])
        if same and earlier.data == record["data"]:
            shutil.rmtree(path.parent, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Running, the child's side


def _child() -> None:
    """Run the job that the parent writes on standard input, and report on standard output, one JSON object a line."""
    report = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever the kernel and libraries print goes where it cannot be taken for a report
    job = json.loads(sys.stdin.readline())
    folder = Path(job["folder"])
    temporary = folder.with_name(f".new-{folder.name}-{_owner()}")
    orphaned = threading.Event()
    threading.Thread(target=_end_with_parent, args=(temporary, orphaned), daemon=True).start()
    try:
        failure = _execute(job, temporary, folder, report)
        keep = failure is not None and (temporary / "notebook.ipynb").exists()
        if keep and not orphaned.is_set():
            failure += f"; the notebook as it stopped is {_keep(temporary / 'notebook.ipynb', Path(job['failed']))}"
        event = {"finished": True} if failure is None else {"failed": failure}
    except OSError as error:
        reason = error.strerror or str(error)
        event = {"failed": f"{job['section']}: cannot write {folder}: {reason}; free space or make it writable"}
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(json.dumps(event), file=report)


def _end_with_parent(temporary: Path, orphaned: threading.Event) -> None:
    """Wait for the end of standard input, which is the end of the parent; then end the kernel and this process."""
    while os.read(0, 4096):
        pass
    orphaned.set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(temporary, ignore_errors=True)
    os._exit(1)


def _execute(job: dict, temporary: Path, folder: Path, report) -> str | None:
    """Execute, record and publish one notebook. Returns: why it failed, without a full stop, or None."""
    papermill = _papermill()
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient.exceptions import DeadKernelError

    from labelaug.results import environment

    class OwnKernel(AsyncKernelManager):
        """A kernel of this very interpreter, whatever kernels are installed for the user or the machine."""

        def _kernel_spec_manager_default(self):
            return KernelSpecManager(parent=self, kernel_dirs=[])

    own = temporary / ".kernel"
    own.mkdir(parents=True)
    os.environ["LABELAUG_RUN_DIR"] = str(temporary)
    _configure_nothing(own)
    notebook = json.loads(Path(job["source"]).read_text(encoding="utf-8"))
    follows = imported_modules(_code(notebook))
    last = {"cell_type": "code", "metadata": {}, "source": IMPORTED, "execution_count": None, "outputs": []}
    notebook["cells"].append(last | ({"id": "imported"} if notebook["nbformat_minor"] >= 5 else {}))
    (own / "source.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    record = job["record"] | environment()
    at = 0

    def on_cell_start(cell, cell_index):
        nonlocal at
        at = cell_index
        print(json.dumps({"cell": cell_index}), file=report)

    started = time.perf_counter()
    try:
        papermill.execute_notebook(
            _literal(own / "source.ipynb"),
            _literal(temporary / "notebook.ipynb"),
            job["changed"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=temporary,
            kernel_manager_class=OwnKernel,
            on_cell_start=on_cell_start,
        )
    except papermill.PapermillExecutionError as error:
        _restore(temporary / "notebook.ipynb", job["section"])
        said = error.evalue.strip().rsplit("\n", 1)[-1].strip().rstrip(".")
        return f"{_place(job, error.cell_index)} {error.ename}{f': {said}' if said else ''}"
    except DeadKernelError:  # what papermill saved by then says that all went well
        _restore(temporary / "notebook.ipynb", job["section"])
        return f"{_place(job, at)} the death of its kernel (killed, or out of memory)"
    record["seconds"] = round(time.perf_counter() - started, 3)
    unseen = _restore(temporary / "notebook.ipynb", job["section"]) - follows.keys()
    if unseen:
        names = ", ".join(sorted(unseen))
        return f"{job['section']}: its key does not follow {names}, which it imported: use an import statement for it"
    (temporary / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(own)
    _publish(temporary, folder)
    _drop_superseded(folder, record)
    Path(job["failed"]).unlink(missing_ok=True)
    return None


def _configure_nothing(folder: Path) -> None:
    """Let IPython, Jupyter and matplotlib find an empty folder where they look for a reader's settings."""
    from matplotlib import font_manager  # its list of fonts takes seconds to make, and is kept between runs

    os.environ |= {"IPYTHONDIR": str(folder / "ipython"), "MPLCONFIGDIR": str(folder / "matplotlib")}
    os.environ |= {"JUPYTER_CONFIG_DIR": str(folder / "jupyter"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    (folder / "matplotlib").mkdir()
    manager = font_manager.fontManager
    font_manager.json_dump(manager, folder / "matplotlib" / f"fontlist-v{manager.__version__}.json")


def _restore(path: Path, section: str) -> set[str]:
    """Make the executed notebook the section's own again: without our last cell, and without this machine's folders.

    Returns: the modules of the package that the kernel held at the end; none if it did not come so far.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = notebook["cells"].pop()["outputs"]
    notebook["metadata"]["papermill"] |= {"input_path": f"notebooks/{section}.ipynb", "output_path": f"{section}.ipynb"}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    return set(json.loads(printed)) if printed else set()


def _place(job: dict, index: int) -> str:
    """Section and cell, counted from 1 in the notebook's source, which lacks the cell that papermill injects."""
    cells = json.loads(Path(job["source"]).read_text(encoding="utf-8"))["cells"]
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
    injected = bool(job["changed"]) and index > (tagged[0] if tagged else -1)
    return f"{job['section']}: cell {index - injected + 1} stopped with"


def _keep(notebook: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    return notebook.replace(place)


if __name__ == "__main__":
    _child()
