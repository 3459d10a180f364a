"""Parameters are refused before anything starts, what is current is kept, what is not is run; all on tiny notebooks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import papermill.cli
import pytest
from conftest import Project

from labelaug import notebooks, paths
from labelaug.notebooks import NotebookError, ParameterError, resolve, run_sections

PARAMETERS = """\
n_seeds: int = 5  # runs per strength
lr: float = 1e-3  # of Adam
decoupled: bool = False
pair: str = 'airplane'  # class
strengths: list[float] = [0, 0.5]
sizes: list[int] = [100,
    200]  # images
names: list[str] = []"""
DEFAULTS = {
    "n_seeds": 5, "lr": 1e-3, "decoupled": False, "pair": "airplane", "strengths": [0.0, 0.5], "sizes": [100, 200],
    "names": [],
}  # fmt: skip


@pytest.fixture
def one(project):
    project.write("01_one", PARAMETERS)
    return project


# Parameters


def test_inspect_reads_the_parameters_cell(one):
    found = notebooks.inspect("01_one")
    assert {name: parameter.default for name, parameter in found.items()} == DEFAULTS
    assert list(found) == list(DEFAULTS)
    assert [p.kind for p in found.values()] == ["int", "float", "bool", "str", "list[float]", "list[int]", "list[str]"]
    assert [p.help for p in found.values()] == ["runs per strength", "of Adam", "", "class", "", "images", ""]
    path = str(one.notebooks / "01_one.ipynb").replace("{", "{{").replace("}", "}}")
    assert list(papermill.inspect_notebook(path)) == list(found)  # the same as plain papermill sees


UNCHECKED = ["n = 5", "n: int = 5  # n = 5 as in the paper", "n: dict = {}", "n: int | None = 5", "a = b = 1", "n += 1"]


@pytest.mark.parametrize("line", [*UNCHECKED, "n: int = 0.5"])
def test_a_parameter_that_papermill_would_not_check_is_refused(project, line):
    project.write("01_one", line)
    with pytest.raises(ParameterError, match=r"01_one: (write the parameter \w|n must be int, got 0.5)"):
        notebooks.inspect("01_one")


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("n_seeds", 2, 2), ("n_seeds", "2", 2), ("n_seeds", "010", 10), ("n_seeds", "-3", -3),
        ("lr", 1, 1.0), ("lr", "1e-3", 1e-3), ("lr", "1", 1.0),
        ("decoupled", True, True), ("decoupled", "true", True), ("decoupled", "False", False),
        ("pair", "no", "no"), ("pair", "5", "5"), ("pair", "[a: b", "[a: b"), ("pair", "", ""),
        ("strengths", "[0, 1e-3]", [0.0, 1e-3]), ("strengths", [1], [1.0]), ("strengths", "[]", []),
        ("sizes", "[1, 010]", [1, 10]), ("names", "[no, 'a, b']", ["no", "a, b"]),
    ],
)  # fmt: skip
def test_a_value_takes_the_type_of_its_parameter(one, name, given, value):
    resolved = resolve("01_one", overrides={name: given})
    assert resolved == DEFAULTS | {name: value}
    assert type(resolved[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("n_seeds", 2.5), ("n_seeds", "2.5"), ("n_seeds", 2.0), ("n_seeds", True), ("n_seeds", "five"),
        ("n_seeds", None), ("n_seeds", "[1]"), ("lr", True), ("lr", "true"), ("lr", "fast"), ("lr", "nan"),
        ("lr", float("inf")), ("lr", [1.0]), ("decoupled", 1), ("decoupled", "1"), ("decoupled", "yes"),
        ("decoupled", ""), ("pair", 5), ("pair", ["a"]), ("strengths", "0.5"), ("strengths", 0.5),
        ("strengths", "[0.5, x]"), ("strengths", [True]), ("strengths", "[0.5"), ("strengths", "[[0.5]]"),
        ("sizes", "[0.5]"), ("sizes", [0.5]), ("names", [1]), ("names", "[[a]]"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_refused(one, name, given):
    with pytest.raises(ParameterError) as caught:
        resolve("01_one", overrides={name: given})
    assert str(caught.value) == f"01_one: {name} must be {notebooks.inspect('01_one')[name].kind}, got {given!r}"


def test_an_unknown_name_is_refused_with_the_nearest(one):
    with pytest.raises(ParameterError) as caught:
        resolve("01_one", overrides={"n_seed": 2})
    assert str(caught.value) == (
        "01_one: no parameter 'n_seed'; did you mean 'n_seeds'? there are: " + ", ".join(DEFAULTS)
    )


def test_a_profile_changes_the_defaults_and_the_command_line_the_profile(one):
    one.profiles("smoke: {01_one: {n_seeds: 2, lr: 1e-2, strengths: [0, 1]}}\npaper:\n")
    assert resolve("01_one", "smoke") == DEFAULTS | {"n_seeds": 2, "lr": 1e-2, "strengths": [0.0, 1.0]}
    assert resolve("01_one", "smoke", {"n_seeds": 3})["n_seeds"] == 3
    assert resolve("01_one", "paper") == resolve("01_one") == DEFAULTS


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("smoke: {01_one: {n_seed: 2}}", "01_one in profiles.yml: no parameter 'n_seed'; did you mean 'n_seeds'"),
        ("smoke: {01_one: {n_seeds: 2.5}}", "01_one in profiles.yml: n_seeds must be int, got '2.5'"),
        ("smoke: {01_one: {decoupled: 1}}", "decoupled must be bool, got '1'"),
        ("smoke: {01_one: n_seeds}", "profiles.yml, smoke, 01_one: expected 'parameter: value', got 'n_seeds'"),
        ("smoke: {02_one: {n_seeds: 2}}", "profiles.yml, smoke: no section '02_one'; did you mean '01_one'"),
        ("smok: {}", "profiles.yml: no profile 'smok'"),
        ("default: {}", "profiles.yml: no profile 'default'"),
        ("smoke: {01_one: [", "profiles.yml is not YAML: "),
    ],
)
def test_profiles_are_checked_too(one, text, sentence):
    one.profiles(text)
    with pytest.raises(ParameterError, match=r"^[^\n]*$") as caught:
        resolve("01_one", "smoke")
    assert sentence in str(caught.value)


def test_an_override_goes_to_the_sections_that_have_it(one):
    one.write("02_two", "n_seeds: int = 1")
    resolved = notebooks.resolve_all(["01_one", "02_two"], overrides={"n_seeds": "3", "pair": "cat"})
    assert resolved == {"01_one": DEFAULTS | {"n_seeds": 3, "pair": "cat"}, "02_two": {"n_seeds": 3}}
    with pytest.raises(ParameterError, match="02_two: no parameter 'pair'; there are: n_seeds"):
        notebooks.resolve_all(["02_two"], overrides={"pair": "cat"})


def test_a_section_is_named_in_full_by_its_beginning_or_by_its_file(one, monkeypatch):
    one.write("02_two", "")
    one.write("02_twin", "")
    (one.notebooks / "draft.ipynb").write_text("{}")
    monkeypatch.chdir(one.root)
    assert notebooks.match([]) == ["01_one", "02_twin", "02_two"]
    assert notebooks.match(["02_two", "01", "notebooks/01_one.ipynb"]) == ["02_two", "01_one"]
    for name, sentence in (
        ("02", "'02' means several sections: 02_twin, 02_two"),
        ("1_one", "'1_one' is no section; did you mean '01_one'"),
        ("", "'' is no section"),
        ("draft.ipynb", "is no section"),
        ("elsewhere/01_one.ipynb", "'elsewhere/01_one.ipynb' is no section"),
    ):
        with pytest.raises(ParameterError, match=sentence):
            notebooks.match([name])


COPIES = [
    "01_one-Copy1.ipynb", "01_one 2.ipynb", "01_one copy.ipynb", "01_one - Copy.ipynb", "01_one (1).ipynb",
    "._01_one.ipynb", "01_one (conflicted copy 2026-11-27).ipynb",
    "01_one.sync-conflict-20261127-101010-ABCDEFG.ipynb", "01_one-LAPTOP.ipynb", "01_one.ipynb~", ".01_one.ipynb.swp",
    "#01_one.ipynb#", "01_one.ipynb.orig", "01_one_BASE_123.ipynb", "01_one.out.ipynb", "01_one_executed.ipynb",
    "02_mine.ipynb", ".ipynb_checkpoints/01_one-checkpoint.ipynb", "old/01_one.ipynb", "01_one_copy.ipynb",
    "lab_01.ipynb",
]  # fmt: skip


def test_only_what_the_table_of_contents_lists_is_a_section(one):
    """Copies that editors, file managers, synchronisers, git and papermill leave, and folders of a notebook's name."""
    source = one.notebooks / "01_one.ipynb"
    for name in COPIES:
        (one.notebooks / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, one.notebooks / name)
    (one.notebooks / "._01_one.ipynb").write_bytes(b"\x00\x05\x16\x07")
    (one.notebooks / "03_folder.ipynb").mkdir()
    one.list_sections("index", "03_folder", "04_not_written", "appendix/05_far", "../06_out")
    assert notebooks.sections() == notebooks.match([]) == notebooks.match(["01"]) == ["01_one"]
    for name in COPIES:
        with pytest.raises(ParameterError, match="is no section"):
            notebooks.match([str(one.notebooks / name)])
    one.list_sections("02_mine")  # the control: what one puts there is one
    assert notebooks.sections() == ["01_one", "02_mine"]


def test_what_is_left_in_a_sections_runs_is_no_run(project):
    """Files that systems and synchronisers leave beside runs, and a copy of one, neither stop a run nor replace it."""
    project.write("01_one", "n: int = 1")
    run = project.finish("01_one")
    (run.parent / "._abc").write_bytes(b"\x00")
    (run.parent / ".DS_Store").write_bytes(b"\x00")
    for name in (".new-file", ".sync-a-b-c", "._x-1-2-3", ".old-abc-1-x"):
        (run.parent / name).write_text("none of ours")
    (run.parent / "notes").mkdir()
    (run.parent / "notes" / "run.json").write_text("{}")
    copy = shutil.copytree(run, run.parent / f"{run.name} (copy)")
    (run.parent / "desktop.ini").write_text("")
    (run / "._run.json").write_bytes(b"\x00")
    project.write("01_one", "n: int = 1", "n")
    (second,) = run_sections(progress=False)
    assert notebooks.current_runs() == ({"01_one": second.path}, [])
    assert not run.exists() and (run.parent / "notes").exists() and (copy / "run.json").exists()


@pytest.mark.parametrize("text", ["parts: [", "", "- a\n- b", "parts: {chapters: 3}", "file: [1]"])
def test_a_damaged_table_of_contents_is_one_sentence_or_lists_nothing(one, text):
    (one.root / "book" / "_toc.yml").write_text(text)
    if text == "parts: [":
        with pytest.raises(ParameterError, match=r"^\S.*_toc.yml is not YAML: [^\n]*$"):
            notebooks.sections()
    else:
        assert notebooks.sections() == []
    (one.root / "book" / "_toc.yml").unlink()
    with pytest.raises(ParameterError, match=r"there is no .*_toc.yml, which lists the sections: use a checkout"):
        notebooks.sections()


# The key


def test_the_key_follows_each_ingredient_and_nothing_else(one, tmp_path, monkeypatch):
    """Change one thing at a time, from an unchanged state each time; what must not matter is the control."""
    one.write("01_one", PARAMETERS, "if lr:\n    from labelaug.training import linear", "1 + 1")
    source, package = one.notebooks / "01_one.ipynb", one.root / "package"

    def key(**changes):
        return notebooks._plan("01_one", DEFAULTS | changes, "default").key

    def edited(path, old, new):
        before = path.read_text() if path.exists() else None
        path.write_text((before or "").replace(old, new) if old else (before or "") + new)
        changed = key()
        path.write_text(before) if before is not None else path.unlink()
        assert key() == first  # back to where it was
        return changed

    first = key()
    assert key(n_seeds=6) != first
    assert edited(source, "1 + 1", "1 + 2") != first
    assert edited(source, '"parameters"', '"parameters", "hide-input"') != first
    assert edited(package / "training" / "linear.py", "", "\n") != first
    assert edited(package / "training" / "__init__.py", "", "\n") != first
    assert edited(package / "__init__.py", "", "\n") != first
    assert edited(one.root / "requirements.txt", "numpy", "torch") != first

    assert edited(source, '"execution_count": null', '"execution_count": 7') == first
    assert edited(source, '"tags": [', '"execution": {"a": 1}, "tags": [') == first
    assert edited(package / "losses.py", "", "x = 2") == first  # no section imports it
    assert edited(package / "training" / "new.py", "", "x = 1\n") == first
    (package / "training" / "linear.py").write_text("def f():\n    from labelaug import losses\n")
    first = key()
    assert edited(package / "losses.py", "", "x = 2") != first  # now one does, in a function of a module


def test_a_change_of_the_package_makes_stale_what_imports_it_and_nothing_else(tmp_path, monkeypatch):
    """The real sections: 16 to 19 print intervals; none imports the engine, the ledger or what runs notebooks."""
    package = tmp_path / "package"
    shutil.copytree(notebooks.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(notebooks, "PACKAGE", package)
    monkeypatch.setenv("LABELAUG_DATA", str(tmp_path))
    settings = notebooks.resolve_all(notebooks.sections())
    text = {name: (paths.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8") for name in settings}

    def keys():
        return {name: notebooks._plan(name, values, "default").key for name, values in settings.items()}

    def stale(module, old, new):
        source = (package / module).read_text(encoding="utf-8")
        assert old in source
        (package / module).write_text(source.replace(old, new, 1), encoding="utf-8")
        changed = {name for name, key in keys().items() if key != before[name]}
        (package / module).write_text(source, encoding="utf-8")
        return changed

    before = keys()
    assert len(settings) == 19 and len(set(before.values())) == 19
    printing = {name for name in text if "mean_interval" in text[name]}
    assert sorted(name[:2] for name in printing) == ["03", "16", "17", "18", "19"]
    assert stale("intervals.py", "level: float = 0.95", "level: float = 0.475") == printing
    for module in ("engine.py", "cluster.py", "claims.py", "notebooks.py", "cli.py", "book.py"):
        assert stale(module, "import", "x = 1\nimport") == set()
    assert stale("__init__.py", "", "x = 1\n") == set(text)
    assert stale("plots.py", "import", "x = 1\nimport") == {name for name in text if "plots" in text[name]}
    assert keys() == before


def test_a_run_that_imported_what_its_key_does_not_follow_fails(project):
    """Each run is held against its closure, those of the real book too; a statement in a function is the control."""
    project.write("01_one", "n: int = 1", "def late():\n    from labelaug import keys\nlate()")
    by_call = "import labelaug\nfrom importlib import import_module\nimport_module('labelaug.keys')"
    project.write("02_two", "n: int = 1", by_call)
    with pytest.raises(NotebookError) as caught:
        run_sections(progress=False)
    assert str(caught.value) == (
        "02_two: its key does not follow labelaug.keys, which it imported: use an import statement for it; the "
        f"notebook as it stopped is {project.build / 'failed' / '02_two.ipynb'}"
    )
    assert notebooks.current_runs()[1] == ["02_two"]


# Image sets and committed results


@pytest.fixture
def sets(project, tmp_path, monkeypatch):
    """A section that reads the image sets of its parameter; the data folder; what writes an image set into it."""
    monkeypatch.setenv("LABELAUG_DATA", str(tmp_path))
    project.write("03_pairs", "pairs: list[str] = ['own:cat:dog']\nn: int = 1", data=["{pairs}"])

    def put(name, **changes):
        x, y = np.arange(12, dtype=np.uint8).reshape(4, 1, 3), np.array([0, 1, 0, 1])
        np.savez(tmp_path / f"{name}.npz", **{"x_train": x, "y_train": y, "x_test": x, "y_test": y} | changes)
        return tmp_path / f"{name}.npz"

    def key(**overrides):
        return notebooks._plan("03_pairs", resolve("03_pairs", overrides=overrides), None).key

    put.key = key
    return put


def test_labels_exchanged_in_a_file_of_the_same_size_and_time_make_a_run_stale(sets):
    file = sets("own")
    before, first = file.stat(), sets.key()
    assert sets("own", y_train=np.array([1, 0, 1, 0])) == file
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    exchanged = sets.key()
    assert exchanged != first
    content = file.read_bytes()
    other = file.with_name("other.npz")  # another file in its place, with the same name, size and time
    sets("other")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)
    assert sets.key() == first and file.read_bytes() != content
    os.utime(file, ns=(1, 1))  # the control: touched, moved away and back, nothing has changed
    file.rename(other)
    assert sets.key() not in (first, exchanged)  # missing is another state
    other.rename(file)
    assert sets.key() == first


def test_only_the_sets_that_the_parameters_name_make_a_run_stale(sets):
    sets("own")
    first, other = sets.key(), sets.key(pairs=["other:cat:dog"])
    for name in ("unrelated", "own2", "cifar10", ".own", "own copy"):
        sets(name)
        assert sets.key() == first
    assert sets.key(pairs=["other:cat:dog"]) == other != first
    sets("other")
    assert sets.key(pairs=["other:cat:dog"]) != other and sets.key() == first


@pytest.mark.parametrize(
    ("pairs", "names"),
    [
        (["cifar10:airplane:automobile", "cifar100:apple:bear"], ["cifar10", "cifar100"]),
        (["mydata:cat:dog"], ["mydata"]), (["mydata:a:b", "mydata:b:c"], ["mydata"]), (["digits:3:8"], ["digits"]),
        (["mydata"], ["mydata"]), ([], []),
    ],
)  # fmt: skip
def test_the_parameters_decide_which_image_sets_are_read(project, pairs, names):
    project.write("03_pairs", "pairs: list[str] = ['cifar10:airplane:automobile']", data=["{pairs}"])
    assert notebooks.image_sets("03_pairs", {"pairs": pairs}) == names
    project.write("08_one", "image_set: str = 'mnist'", data=["{image_set}", "svhn"])
    assert notebooks.image_sets("08_one", {"image_set": "own"}) == ["own", "svhn"]


@pytest.mark.parametrize("name", ["../secret", "a b", "/etc/x", ""])
def test_a_name_that_no_image_set_can_have_is_refused(project, name):
    project.write("03_pairs", "pairs: list[str] = ['a:b:c']", data=["{pairs}"])
    with pytest.raises(ParameterError, match="03_pairs: an image set's name is made of letters"):
        notebooks.image_sets("03_pairs", {"pairs": [f"{name}:cat:dog"]})
    project.write("03_pairs", "pairs: list[str] = ['a:b:c']", data=["{pair}"])
    with pytest.raises(ParameterError, match="its metadata name a parameter 'pair'; did you mean 'pairs'"):
        notebooks.image_sets("03_pairs", {"pairs": ["a:b:c"]})


def test_the_committed_results_of_the_scale_that_the_parameters_name_decide(project, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    path = project.write("16_u", "scale: str = 'cpu'")
    path.write_text(path.read_text().replace('"data": []', '"results": ["study-{scale}"]'))

    def key(scale):
        return notebooks._plan("16_u", {"scale": scale}, None).key

    before = {scale: key(scale) for scale in ("cpu", "gpu")}
    (tmp_path / "study-gpu.parquet").write_text("x")
    (tmp_path / "study-gpu 2.parquet").write_text("y")
    assert key("cpu") == before["cpu"] and key("gpu") != before["gpu"]


def test_the_real_sections_read_what_their_parameters_name():
    """As they are set today, and with the image sets and scales that a reader may name."""
    settings = notebooks.resolve_all(notebooks.sections())
    named = {name: notebooks.image_sets(name, values) for name, values in settings.items()}
    assert {name[:2]: found for name, found in named.items() if found} == {
        "03": ["cifar10", "cifar100"], "08": ["mnist"], "10": ["mnist"], "11": ["mnist", "cifar10"],
    }  # fmt: skip
    own = settings["03_binary_images"] | {"pairs": ["mydata:cat:dog"]}
    assert notebooks.image_sets("03_binary_images", own) == ["mydata"]
    for name in ("16_u_curve", "17_when_to_stop", "18_gradient_norms", "19_noise_on_images"):
        assert notebooks._read_by(name, "results", {"scale": "own"})[0] == "over-training-own"


# Running

WAIT = """\
import os, pathlib, sys, time
shared = pathlib.Path({folder!r})
(shared / {mine!r}).touch()
until = time.monotonic() + 600
while not (shared / {other!r}).exists() and time.monotonic() < until:
    time.sleep(0.02)
assert (shared / {other!r}).exists(), 'ran alone'
pathlib.Path(os.environ['LABELAUG_RUN_DIR'], 'seen.txt').write_text(
    f"{{n}} {{sys.executable}} {{os.environ['LABELAUG_DATA']}}")"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Two notebooks that wait for each other, run with an override that one of them has: the project and the runs."""
    root = tmp_path_factory.mktemp("ran")
    project = Project(root / "a {project}")
    for section, mine, other in (("01_one", "a", "b"), ("02_two", "b", "a")):
        code = WAIT.format(folder=str(root), mine=mine, other=other)
        project.write(section, "n: int = 1  # any" + ("\nlr: float = 0.1" if mine == "a" else ""), code)
    elsewhere = root / "jupyter" / "kernels" / "python3"  # a user's kernel of the same name, of no use to us
    elsewhere.mkdir(parents=True)
    (elsewhere / "kernel.json").write_text('{"argv": ["false"], "display_name": "", "language": "python"}')
    with pytest.MonkeyPatch.context() as monkeypatch:
        project.use(monkeypatch)
        monkeypatch.setenv("JUPYTER_PATH", str(root / "jupyter"))
        monkeypatch.setenv("LABELAUG_DATA", "sets")
        monkeypatch.chdir(root)
        return project, run_sections(overrides={"lr": "0.5"}, jobs=2, progress=False)


def test_notebooks_run_at_once(ran):
    project, runs = ran
    assert [run.section for run in runs] == ["01_one", "02_two"]
    for run in runs:
        assert run.path == project.runs / run.section / run.key
        # the parameter, this interpreter, the folder as seen from here
        assert (run.path / "seen.txt").read_text() == f"1 {sys.executable} {project.root.parent / 'sets'}"


def test_a_run_records_what_it_depends_on(ran):
    one, two = ran[1]
    assert (one.parameters, one.profile) == ({"n": 1, "lr": 0.5}, None)
    assert (two.parameters, two.profile) == ({"n": 1}, "default")
    assert one.seconds > 0 and one.data is None and one.versions["papermill"] == papermill.__version__
    assert json.loads((one.path / "run.json").read_text())["key"] == one.path.name


def test_an_executed_notebook_is_whole_and_free_of_this_machines_paths(ran):
    project, (one, two) = ran
    for run, injected in ((one, 1), (two, 0)):
        text = (run.path / "notebook.ipynb").read_text()
        notebook = json.loads(text)
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, 3 + injected))
        assert sum("injected-parameters" in cell["metadata"]["tags"] for cell in code) == injected
        assert notebook["metadata"]["papermill"]["input_path"] == f"notebooks/{run.section}.ipynb"
        assert str(project.build) not in text
    assert sorted(path.name for path in project.runs.rglob("*") if path.name.startswith(".")) == []


def test_what_is_current_is_not_run_again(ran, monkeypatch):
    project, runs = ran
    project.use(monkeypatch)
    before = project.files()
    monkeypatch.setattr(notebooks, "_supervise", None)  # to run anything is an error
    assert run_sections(overrides={"lr": 0.5}, progress=False) == runs
    assert notebooks.current_runs() == ({"02_two": runs[1].path}, ["01_one"])  # 01_one ran with lr of its own
    with pytest.raises(TypeError, match="NoneType"):
        run_sections(["02"], force=True, progress=False)
    assert project.files() == before


def test_refusals_come_before_anything_starts(one, monkeypatch):
    one.write("02_two", "n_seeds: int = 1")
    monkeypatch.setattr(notebooks, "_supervise", None)
    for overrides in ({"n_seeds": "many"}, {"n_seed": "1"}, {"sizes": "[x]"}):
        with pytest.raises(ParameterError):
            run_sections(overrides=overrides, progress=False)
        assert not one.build.exists()


def test_a_failing_cell_keeps_the_earlier_result_and_stops_no_other_notebook(project, capfd):
    fails = "assert n < 3, f'n is too large:\\n  {n} of 2'"
    project.write("01_one", "n: int = 2", "n", fails)
    first = project.finish("01_one")
    before = project.files()
    project.write("02_two", "n: int = 2", "n")
    with pytest.raises(NotebookError) as caught:
        run_sections(overrides={"n": 3})
    kept = project.build / "failed" / "01_one.ipynb"
    assert str(caught.value) == (  # the fourth cell of the source: papermill's own is not counted
        f"01_one: cell 4 stopped with AssertionError: 3 of 2; the notebook as it stopped is {kept}"
    )
    assert "n is too large" in kept.read_text()
    after = project.files()
    assert before.items() <= after.items()  # what was there is unchanged
    assert sum("01_one" in path for path in after) == len(before) + 1
    assert notebooks.current_runs() == ({"01_one": first}, ["02_two"])
    assert not list(project.runs.rglob(".*"))
    shown = capfd.readouterr().err.splitlines()  # no terminal: short lines
    assert {line.split(" after")[0] for line in shown} == {
        "01_one: running", "02_two: running", "01_one: failed", "02_two: done",
    }  # fmt: skip

    project.write("01_one", "n: int = 2", "n", fails + "  # edited")  # a success takes the place of both
    (second,) = run_sections(["01"], progress=False)
    assert not kept.exists() and not first.exists() and second.path.exists()


def test_a_run_takes_the_place_of_its_own_kind_only(project):
    """Same parameters or same profile, on the same image sets; the rest are results of something else."""
    project.write("01_one", "n: int = 2")
    new = project.finish("01_one")
    record = json.loads((new / "run.json").read_text())
    others = {
        "parameters": {"profile": None}, "profile": {"parameters": {"n": 1}},
        "smoke": {"profile": "smoke", "parameters": {"n": 1}}, "own": {"profile": None, "parameters": {"n": 1}},
        "data": {"data": "abc"},
    }  # fmt: skip
    keys = {name: f"{number:012x}" for number, name in enumerate(others)}  # of runs; another name is not ours to remove
    for name, changes in others.items():
        (new.parent / keys[name]).mkdir()
        (new.parent / keys[name] / "run.json").write_text(json.dumps(record | changes))
    notebooks._drop_superseded(new, record)
    left = sorted([new.name, *(keys[name] for name in ("smoke", "own", "data"))])
    assert sorted(path.name for path in new.parent.iterdir()) == left


def test_a_terminal_shows_a_bar_for_each_notebook(project, monkeypatch, capsys):
    project.write("01_one", "", "1", "2")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display = notebooks._Progress(True)
    display.start("01_one")
    display.cell("01_one", {"cell": 2})
    display.say("02_two: current")
    display.end("01_one", None)
    display.close()
    shown = capsys.readouterr().err
    assert "01_one:   0%" in shown and "01_one: 100%" in shown and "4/4" in shown and "02_two: current\n" in shown


def test_plain_papermill_runs_a_notebook_without_us(project, tmp_path):
    path = project.write("01_one", "n: int = 2", "print('n is', n)")
    source, out = tmp_path / "plain.ipynb", tmp_path / "out.ipynb"
    shutil.copy(path, source)
    command = [str(source), str(out), "-p", "n", "7", "--no-progress-bar"]
    papermill.cli.papermill(command, standalone_mode=False)
    assert "n is 7" in out.read_text()
    assert not paths.BUILD.exists()


# A reader's own computer

MARK = "import builtins\nbuiltins.intruders = [*getattr(builtins, 'intruders', []), '{}']\n"
SEES = """\
import builtins, json, os, sys
import matplotlib, numpy, seaborn, yaml
from matplotlib import pyplot
seen = {
    'intruders': getattr(builtins, 'intruders', []),
    'asserts': __debug__,
    'hash': hash('a word'),
    'backend': pyplot.get_backend(),
    'settings': {k: str(v) for k, v in matplotlib.rcParams.items() if k not in ('backend', 'backend_fallback')},
    'styles': 'mine' in matplotlib.style.available,
    'variables': sorted(k for k in os.environ if k.startswith(('SCIPY_', 'PANDAS_', 'SKLEARN_', 'PYTHON'))),
    'files': [module.__file__ for module in (matplotlib, numpy, seaborn, yaml)],
}"""
WRITES = "open(os.environ.get('LABELAUG_RUN_DIR', '.') + '/seen.json', 'w').write(json.dumps(seen))"


@pytest.fixture
def configured(project, tmp_path, monkeypatch):
    """A computer on which everything is configured: each setting leaves a mark where it arrives. Returns the marks."""
    home, elsewhere, here = tmp_path / "home", tmp_path / "elsewhere", tmp_path / "here"
    files = {
        home / ".ipython/profile_default/startup/00-seed.py": MARK.format("startup"),
        home / ".ipython/profile_default/startup/10-magic.ipy": MARK.format("startup.ipy"),
        home / ".ipython/profile_default/ipython_config.py": "c.InteractiveShellApp.exec_lines = ['import ofhome']",
        home / ".config/matplotlib/matplotlibrc": "lines.linewidth: 7\n",
        home / ".config/matplotlib/stylelib/mine.mplstyle": "lines.linewidth: 8\n",
        elsewhere / "startup.py": MARK.format("PYTHONSTARTUP"),
        elsewhere / "matplotlibrc": "font.size: 23\n",
        project.notebooks / "matplotlibrc": "axes.linewidth: 5\n",
        project.notebooks / "seaborn.py": MARK.format("beside the notebooks"),
        project.notebooks / "ofhome.py": MARK.format("ipython_config"),
        **{here / f"{name}.py": "raise SystemExit('from here')" for name in (
            "yaml", "json", "numpy", "torch", "psutil", "papermill", "labelaug", "sitecustomise", "ast", "tempfile"
        )},
        here / "matplotlibrc": "axes.grid: True\n",
    }  # fmt: skip
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    variables = {
        "HOME": home, "XDG_CONFIG_HOME": home / ".config", "PYTHONSTARTUP": elsewhere / "startup.py",
        "MATPLOTLIBRC": elsewhere, "MPLBACKEND": "pdf",
        "MPLCONFIGDIR": home / ".config" / "matplotlib", "PYTHONOPTIMIZE": "1", "PYTHONHASHSEED": "5",
        "PYTHONWARNINGS": "always", "SCIPY_ARRAY_API": "1", "PANDAS_FUTURE_INFER_STRING": "0",
        "IPYTHONDIR": home / ".ipython",
        "PYTHONPATH": os.pathsep.join(["", str(Path(notebooks.__file__).parents[1])]),
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(here)


def test_nothing_that_a_reader_has_configured_reaches_a_section(project, configured):
    """The control is plain papermill, which is a reader's own affair: there every one of the settings arrives."""
    project.write("01_one", "n: int = 1", SEES, WRITES)
    (run,) = run_sections(progress=False)
    seen = json.loads((run.path / "seen.json").read_text())
    default = matplotlib.rcParamsDefault
    assert seen["intruders"] == [] and seen["asserts"] and not seen["styles"]
    assert seen["backend"].endswith("inline")
    assert seen["settings"] == {k: str(default[k]) for k in seen["settings"]}
    assert seen["variables"] == ["PYTHONHASHSEED", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUTF8"]
    assert all("site-packages" in file for file in seen["files"])
    same = "import sys; sys.stdout.write(str(hash('a word')))"
    hashed = subprocess.run([sys.executable, "-c", same], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True)
    assert str(seen["hash"]) == hashed.stdout
    assert sorted(path.name for path in run.path.iterdir()) == ["notebook.ipynb", "run.json", "seen.json"]

    command = [sys.executable, "-P", "-m", "papermill", "01_one.ipynb", "out.ipynb"]
    subprocess.run(command, cwd=project.notebooks, check=True, capture_output=True)
    plain = json.loads((project.notebooks / "seen.json").read_text())
    by_ipython = ["PYTHONSTARTUP", "startup", "startup.ipy", "ipython_config", "beside the notebooks"]
    assert plain["intruders"] == by_ipython and not plain["asserts"] and plain["styles"]
    assert plain["backend"] == "pdf" and plain["settings"]["axes.linewidth"] == "5.0"
    assert {"PYTHONOPTIMIZE", "SCIPY_ARRAY_API"} <= set(plain["variables"]) and plain["hash"] != seen["hash"]


@pytest.mark.parametrize("where", ["MATPLOTLIBRC", "home"])
def test_the_other_matplotlibrcs_do_not_arrive_either(project, configured, where, monkeypatch):
    """With none beside the notebook, matplotlib takes MATPLOTLIBRC's, then that of its own folder: so the control."""
    (project.notebooks / "matplotlibrc").unlink()
    sees = "import os, matplotlib\nwidth, size = (matplotlib.rcParams[k] for k in ('lines.linewidth', 'font.size'))"
    writes = "open(os.environ.get('LABELAUG_RUN_DIR', '.') + '/seen.txt', 'w').write(f'{width} {size}')"
    project.write("01_one", "n: int = 1", sees, writes)
    if where == "home":
        monkeypatch.delenv("MATPLOTLIBRC")
    (run,) = run_sections(progress=False)
    assert (run.path / "seen.txt").read_text() == "1.5 10.0"
    command = [sys.executable, "-P", "-m", "papermill", "01_one.ipynb", "out.ipynb"]
    subprocess.run(command, cwd=project.notebooks, check=True, capture_output=True)
    assert (project.notebooks / "seen.txt").read_text() == ("7.0 10.0" if where == "home" else "1.5 23.0")


def test_a_matplotlibrc_that_cannot_be_read_stops_no_section(project, configured, tmp_path, monkeypatch):
    """The process beside the kernel asks matplotlib for the list of fonts; matplotlib alone raises, as the control."""
    monkeypatch.delenv("MATPLOTLIBRC")
    (tmp_path / "home" / ".config" / "matplotlib" / "matplotlibrc").write_bytes(b"lines.linewidth: \xff\n")
    project.write("01_one", "n: int = 1")
    (run,) = run_sections(progress=False)
    assert (run.path / "run.json").exists()
    command = [sys.executable, "-P", "-c", "import matplotlib"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "UnicodeDecodeError" in done.stderr


SPAWNS = """\
import multiprocessing, sys
def work():
    pass
if __name__ == "__main__":
    if sys.argv[1:]:
        from labelaug.cli import main
        main(sys.argv[1:], standalone_mode=False)
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    worker.join()
    print(worker.exitcode)
"""


@pytest.mark.parametrize(("arguments", "code"), [(["data", "digits"], "0"), ([], "1")])
def test_no_process_of_the_command_line_imports_from_the_working_folder(tmp_path, monkeypatch, arguments, code):
    """As the workers that train are started; the control is a program that does not go through the command line."""
    (tmp_path / "here").mkdir()
    for name in ("pickle", "socket", "tempfile", "yaml", "torch", "click"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('from here')")
    (tmp_path / "program.py").write_text(SPAWNS)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    command = [sys.executable, str(tmp_path / "program.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [code], done.stderr
    assert ("from here" in done.stderr) == (code == "1")


def test_make_takes_no_module_from_the_projects_folder():
    """Each of make's commands of a module leaves the folder where it is called out of the path."""
    makefile = Path(__file__).parents[1] / "Makefile"
    goals = "setup book test lab bench train".split()
    done = subprocess.run(["make", "-n", "-f", makefile, *goals], cwd=makefile.parent, capture_output=True, text=True)
    modules = [line for line in done.stdout.splitlines() if re.search(r"\.venv/bin/python\b.* -m ", line)]
    assert len(modules) >= 5 and all(re.search(r"\.venv/bin/python -P +-m ", line) for line in modules), modules
