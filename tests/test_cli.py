"""The command line: one sentence and an exit code for what a user can mend, a traceback for what only we can."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from click.testing import CliRunner

from labelaug import agreement, book, claims, notebooks, results
from labelaug.cli import main
from labelaug.data import images


@pytest.fixture
def command(project, monkeypatch):
    """Calls the command line on a small project, on which no notebook can run."""
    project.write("01_one", "n_seeds: int = 5\nlr: float = 0.1")
    project.write("02_two", "n_seeds: int = 5")
    (project.root / "book" / "claims.yml").write_text("[]")
    monkeypatch.setattr(notebooks, "_supervise", None)
    monkeypatch.setenv("LABELAUG_DATA", str(project.root / "no data"))
    monkeypatch.chdir(project.root)
    return lambda *arguments: CliRunner().invoke(main, arguments, prog_name="labelaug")


REFUSALS = [
    (["run", "3"], 1, "Error: '3' is no section; there are: 01_one, 02_two"),
    (["run", "02_too"], 1, "Error: '02_too' is no section; did you mean '02_two'? there are: 01_one, 02_two"),
    (["run", "0"], 1, "Error: '0' means several sections: 01_one, 02_two"),
    (["run", "notebooks/03.ipynb"], 1, "Error: 'notebooks/03.ipynb' is no section; there are: 01_one, 02_two"),
    (["run", "-p", "n_seed", "2"], 1,
     "Error: 01_one, 02_two: no parameter 'n_seed'; did you mean 'n_seeds'? there are: lr, n_seeds"),
    (["run", "02", "-p", "lr", "1"], 1, "Error: 02_two: no parameter 'lr'; there are: n_seeds"),
    (["run", "-p", "n_seeds", "2.5"], 1, "Error: 01_one: n_seeds must be int, got '2.5'"),
    (["run", "-p", "n_seeds", "true"], 1, "Error: 01_one: n_seeds must be int, got 'true'"),
    (["run", "-p", "lr", "fast"], 1, "Error: 01_one: lr must be float, got 'fast'"),
    (["run", "-p", "lr", "1", "-p", "lr", "2"], 2, "Error: Invalid value for '-p': lr is set 2 times"),
    (["run", "-p", "lr"], 2, "Error: Option '-p' requires 2 arguments."),
    (["run", "--profile", "big"], 2,
     "Error: Invalid value for '--profile': 'big' is not one of 'smoke', 'default', 'paper'."),
    (["run", "--jobs", "0"], 2, "Error: Invalid value for '--jobs': 0 is not in the range x>=1."),
    (["run", "--data-dir", "nowhere"], 2,
     "Error: Invalid value for '--data-dir': there is no folder 'nowhere'; name the one that holds the image sets"),
    (["run", "--data-dir", "requirements.txt"], 1,
     "Error: 'requirements.txt' is no folder: name the one that holds the image sets, or is to hold them"),
    (["run", "--data-dir", "~no body/x"], 1,
     "Error: no home folder is known for the '~no body' of '~no body/x': name the image sets' folder in full, with "
     "--data-dir or LABELAUG_DATA"),
    (["book", "--data-dir", "nowhere"], 2,
     "Error: Invalid value for '--data-dir': there is no folder 'nowhere'; name the one that holds the image sets"),
    (["data"], 2, "Error: Missing argument 'NAME...'."),
    (["data", "../x"], 2,
     "Error: Invalid value for NAME: an image set's name is made of letters, digits, '-', '_' and '.', got '../x'"),
    (["data", "own"], 1,
     "Error: image set 'own' is not in {root}/no data: it needs a file own.npz there, for `labelaug data` knows only "
     "cifar10, cifar100, mnist, fashion-mnist, svhn"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "sentence"), REFUSALS, ids=[" ".join(row[0]) for row in REFUSALS])
def test_a_mistake_is_one_sentence(command, project, arguments, code, sentence):
    done = command(*arguments)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (code, sentence.replace("{root}", str(project.root)))
    assert done.stdout == "" and done.stderr.count("Error") == 1 and not project.build.exists()


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (notebooks.NotebookError("01: a\n02: b"), "Error: 01: a\nError: 02: b\n"),
        (images.DataError("the set is torn"), "Error: the set is torn\n"),
        (results.ResultsError("no room"), "Error: no room\n"),
        (book.BookError("no page"), "Error: no page\n"),
        (claims.ClaimError("no row"), "Error: no row\n"),
        (OSError(28, "No space left on device", "runs"),
         "Error: cannot use runs: No space left on device; free space or make it writable\n"),
        (OSError(30, "Read-only file system", "runs"),
         "Error: cannot use runs: Read-only file system; free space or make it writable\n"),
    ],
)  # fmt: skip
def test_an_expected_error_shows_no_traceback(command, monkeypatch, raised, said):
    def fails(*arguments, **options):
        raise raised

    monkeypatch.setattr(notebooks, "run_sections", fails)
    done = command("run")
    assert (done.exit_code, done.stderr) == (1, said)


@pytest.mark.parametrize("raised", [ValueError("ours"), KeyError("ours"), FileNotFoundError(2, "ours", "x")])
def test_a_bug_keeps_its_traceback(command, monkeypatch, raised):
    def fails(*arguments, **options):
        raise raised

    monkeypatch.setattr(notebooks, "run_sections", fails)
    assert command("run").exception is raised


@pytest.mark.parametrize("arguments", [["run", "01"], ["book"], ["train", "over-training"]], ids=" ".join)
def test_a_commit_that_is_none_is_told_before_anything_runs(command, project, monkeypatch, arguments):
    """The folder is no repository; a checkout knows its commit, and there the variable says nothing."""
    monkeypatch.setattr(results, "PROJECT", project.root)
    monkeypatch.setenv("LABELAUG_COMMIT", "HEAD")
    done = command(*arguments)
    said = "Error: LABELAUG_COMMIT must be 40 hex digits, and '-dirty' after changes; got 'HEAD'\n"
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", said)
    assert not (project.root / "results").exists() and not project.build.exists()


NO_FOLDER = [
    ({"LABELAUG_DATA": ""}, "no home folder is known for the '~' of '~/.cache/labelaug': name the image sets' folder"),
    ({"LABELAUG_DATA": "~/sets"}, "no home folder is known for the '~' of '~/sets': name the image sets' folder"),
    ({"LABELAUG_DATA": "requirements.txt"}, "'requirements.txt' is no folder: name the one that holds the image sets"),
    ({"LABELAUG_DATA": os.devnull}, f"'{os.devnull}' is no folder: name the one that holds the image sets"),
    ({"LABELAUG_DATA": "~", "HOME": "requirements.txt"}, "'requirements.txt' is no folder: name the one that holds"),
]


@pytest.mark.parametrize(("variables", "said"), NO_FOLDER, ids=[" ".join(row[0].values()) for row in NO_FOLDER])
def test_a_data_folder_that_cannot_be_is_one_sentence(command, project, monkeypatch, variables, said):
    """No home: HOME is not set, and the user has no entry in the system's list, as in a container."""
    project.write("01_one", "n_seeds: int = 5", data=["mnist"])
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    monkeypatch.delenv("HOME")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for arguments in (["data", "digits"], ["run"], ["claims"], ["train", "over-training"]):
        done = command(*arguments)
        assert (done.exit_code, done.stdout) == (1, "") and done.stderr.startswith(f"Error: {said}")
        assert done.stderr.count("\n") == 1 and not project.build.exists() and not (project.root / "results").exists()


def test_a_home_is_needed_only_for_what_lies_in_it(command, project, monkeypatch):
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    monkeypatch.delenv("HOME")
    assert command("data", "digits").exit_code == 0  # LABELAUG_DATA is a folder that is not there yet
    assert command("data", "digits", "--data-dir", "book").stdout.startswith("digits: 1438 + 359 images")


def test_options_reach_the_runner(command, project, monkeypatch):
    seen = {}
    monkeypatch.setattr(notebooks, "run_sections", lambda names, **options: seen.update(options, names=names) or [])
    (project.root / "sets").mkdir()
    options = "--force --jobs 3 --profile paper --data-dir sets".split()
    done = command("run", "01", "-p", "lr", "-1", "-p", "n_seeds", "2", *options)
    assert done.exit_code == 0, done.stderr
    assert seen.pop("overrides") == {"lr": "-1", "n_seeds": "2"}
    assert seen == {"names": ["01_one"], "force": True, "jobs": 3, "profile": "paper"}
    assert notebooks.paths.data_dir() == project.root / "sets"  # for this process and its children


def test_run_fetches_the_image_sets_that_its_sections_name_and_lack(command, project, monkeypatch):
    """After the check of parameters, and a set that cannot be had stops nothing."""
    project.write("01_one", "n_seeds: int = 5", data=["cifar10", "digits", "mnist"])
    asked, run = [], []

    def download(name, folder):
        asked.append((name, folder))
        if name == "mnist":
            raise images.DataMissing("no network")

    monkeypatch.setattr(images, "download", download)
    monkeypatch.setattr(notebooks, "run_sections", lambda names, **options: run.append(names) or [])
    folder = project.root / "no data"
    assert command("run", "02").exit_code == 0 and asked == []
    assert command("run", "-p", "n_seeds", "x").exit_code == 1 and asked == []
    done = command("run")
    assert asked == [("cifar10", folder), ("mnist", folder)] and run == [["02_two"], ["01_one", "02_two"]]
    assert done.exit_code == 0 and done.stderr == "no network; its section runs on scikit-learn's digits\n"


def test_the_parameters_decide_what_is_fetched(command, project, monkeypatch):
    """README's own-data command, offline: the default's sets are not asked for, and nothing runs on digits."""
    project.write("03_pairs", "pairs: list[str] = ['cifar10:a:b', 'cifar100:c:d']", data=["{pairs}"])
    project.write("08_one", "image_set: str = 'mnist'", data=["{image_set}"])
    folder = project.root / "no data"
    folder.mkdir()
    (folder / "mydata.npz").write_bytes(b"read by the section alone")
    asked = []

    def download(name, folder):
        asked.append(name)
        raise images.DataMissing(f"{name}: no network")

    monkeypatch.setattr(images, "download", download)
    monkeypatch.setattr(notebooks, "run_sections", lambda names, **options: [])
    done = command("run", "03", "-p", "pairs", '["mydata:cat:dog"]')
    assert (done.exit_code, done.stderr, asked) == (0, "", [])
    assert command("run", "03", "08", "-p", "pairs", '["mydata:cat:dog", "digits:3:8", "svhn:1:2"]').exit_code == 0
    assert asked == ["svhn", "mnist"]
    asked.clear()
    project.profiles("smoke: {03_pairs: {pairs: ['mydata:cat:dog']}, 08_one: {image_set: mydata}}")
    assert command("run", "--profile", "smoke").stderr == "" and asked == []
    done = command("run", "08", "-p", "image_set", "mydta")
    assert asked == ["mydta"] and done.stderr == "mydta: no network; its section runs on scikit-learn's digits\n"
    done = command("run", "03", "-p", "pairs", '["../x:cat:dog"]')
    sentence = "Error: 03_pairs: an image set's name is made of letters, digits, '-', '_' and '.', got '../x'\n"
    assert (done.exit_code, done.stderr) == (1, sentence)


def test_run_prints_where_the_notebooks_are(command, project):
    folders = [project.finish(section) for section in ("01_one", "02_two")]
    done = command("run")
    assert done.stdout.splitlines() == [f"{path.parent.name}: {path / 'notebook.ipynb'}" for path in folders]


def test_claims_prints_rows(command, project):
    (project.root / "book" / "claims.yml").write_text(
        "- {id: B-2, claim: c, source: s, table: book/structure, value: exact(len(t)), verdicts: [{verdict: holds}]}\n"
        "- {id: P2-Z, claim: c, source: s, not_tested: later}\n"
    )
    first, second = json.loads(command("claims", "--json").stdout)
    wanted = {"id", "claim", "value", "low", "high", "verdict", "why", "where", "provenance"}
    assert wanted <= first.keys() == second.keys()
    assert (first["value"], first["verdict"], second["verdict"], second["why"]) == (2.0, "holds", "not tested", "later")
    assert [line.split()[0] for line in command("claims").stdout.splitlines()] == ["B-2", "P2-Z", "later"]


def test_claims_in_a_terminal_name_labels_without_markup(command, project):
    """As JSON they stay as the book has them; what only looks like a role (LaTeX, code) is left alone."""
    claim = r"by {prf:ref}`thm-one` and {numref}`Fig. %s <fig-two>`, {eq}`eq-three`: $\\frac{a}{b}$ of `x`, {b} `y` < 1"
    row = {"id": "B-2", "claim": claim, "source": "s", "not_tested": "later"}
    (project.root / "book" / "claims.yml").write_text(json.dumps([row]), encoding="utf-8")
    assert (
        command("claims")
        .stdout.splitlines()[0]
        .endswith(r" by thm-one and fig-two, eq-three: $\\frac{a}{b}$ of `x`, {b} `y` < 1")
    )
    assert json.loads(command("claims", "--json").stdout)[0]["claim"] == claim


def test_the_command_for_own_data_reads_the_same_in_every_shell(command, monkeypatch, project):
    """README's, in words of a POSIX shell and in those of Windows, which knows no single quotes."""
    project.write("03_three", 'pairs: list[str] = ["cifar10:ship:truck"]')
    (line,) = re.findall(r"labelaug (run 03 .*)", (results.PROJECT / "README.md").read_text(encoding="utf-8"))
    windows = [word.strip('"') for word in line.split(" ")]
    seen = []
    monkeypatch.setattr(notebooks, "run_sections", lambda names, **options: seen.append(options["overrides"]) or [])
    for words in (shlex.split(line), windows):
        assert command(*words).exit_code == 0
        assert notebooks.resolve("03_three", overrides=seen[-1])["pairs"] == ["mydata:cat:dog"]


def test_book_runs_assembles_and_builds(command, project, monkeypatch):
    """Every snippet that pages include is written from the runs, and the last line says where the book is."""
    folders = {section: project.finish(section, "smoke") for section in ("01_one", "02_two")}
    seen = {}

    def assemble(runs, generated):
        seen.update(runs=runs, generated=generated)
        return project.build / "source"

    monkeypatch.setattr(book, "assemble", assemble)
    monkeypatch.setattr(book, "build", lambda source: source.with_name("html") / "index.html")
    done = command("book", "--profile", "smoke")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{project.build / 'html' / 'index.html'} (") and done.stdout.endswith(" s)\n")
    assert seen["runs"] == folders
    assert seen["generated"].keys() == {"ledger.md", "headline.md", "execution.md", "agreement.md"}
    assert seen["generated"]["agreement.md"] == agreement.markdown(agreement.load())
    assert "{doc}`/01_one`" in seen["generated"]["execution.md"]


def test_bench_calls_the_benchmarks(command, project):
    (project.root / "benchmarks").mkdir()
    for name in ("deep", "linear", "minimisers", "toy"):
        script = f"def main(quick):\n    print({name!r}, quick)\ndef measure(quick):\n    yield {{'quick': quick}}\n"
        (project.root / "benchmarks" / f"{name}.py").write_text(script)
    assert command("bench", "--quick").stdout == "minimisers True\ntoy True\nlinear True\ndeep True\n"
    found = json.loads(command("bench", "--json").stdout)
    assert found == {name: [{"quick": False}] for name in ("minimisers", "toy", "linear", "deep")}


def test_data_verifies_what_is_there(command, project, monkeypatch):
    monkeypatch.setattr(images, "download", lambda name, folder: images.load_images("digits", folder))
    done = command("data", "cifar10", "--data-dir", "sets")
    assert done.stdout.startswith("cifar10: 1438 + 359 images of 10 classes in sets, checksum ")


# ---------------------------------------------------------------------------------------------------------------------
# Whatever the standard streams are


@pytest.fixture
def process(command, project):
    """Calls the command line on the small project in a process of its own, as a shell's words around it say."""
    (project.root / "book" / "claims.yml").write_text(GREEK, encoding="utf-8")
    for section in ("01_one", "02_two"):
        project.finish(section)
    (project.root / "benchmarks").mkdir()
    for name in ("deep", "linear", "minimisers", "toy"):
        (project.root / "benchmarks" / f"{name}.py").write_text(
            "def main(quick):\n    print('λ = 1')\n", encoding="utf-8"
        )
    program = project.root / "program.py"
    call = "from labelaug.cli import main\nif __name__ == '__main__':\n    main(prog_name='labelaug')"
    program.write_text(project.script(call), encoding="utf-8")

    def call(arguments, redirected="", stdout=subprocess.PIPE, **variables):
        command = ["sh", "-c", f'exec "$0" "$1" {arguments} {redirected}', sys.executable, program]
        buffered = os.environ | {"PYTHONUNBUFFERED": ""} | variables
        return subprocess.run(command, env=buffered, stdout=stdout, stderr=subprocess.PIPE)

    return call


GREEK = "- {id: B-2, claim: 'ε → λ, 95 % ± “é” \U0001d400 \\x', source: s, not_tested: später}\n"
SAID = "ε → λ, 95 % ± “é” \U0001d400 \\x"
COMMANDS = ["--help", "--version", "claims", "claims --json", "run", "bench"]
CURRENT = {"run": b"01_one: current\n02_two: current\n"}  # what a command says on standard error


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_matter(process, closed):
    """What can be said is said, and the rest is done."""
    silent = "2>&-" in closed
    done = process("run", closed)
    assert (done.returncode, done.stderr) == (0, b"" if silent else CURRENT["run"])
    assert done.stdout.count(b"notebook.ipynb\n") == 2 * (closed == "2>&-")
    done = process("run 3", closed)
    said = b"" if silent else b"Error: '3' is no section; there are: 01_one, 02_two\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", said)


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    """A library's word on descriptor 2 would land in it; and a child finds three streams as well."""
    program = (
        "import subprocess, sys\nfrom labelaug.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "file = open('file', 'w')\nchild = 'import os; [os.fstat(n) for n in range(3)]'\n"
        "sys.exit(10 * (file.fileno() < 3) + subprocess.run([sys.executable, '-c', child]).returncode)"
    )
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program], cwd=tmp_path)
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252", "latin-1", "cp437", "ascii", "koi8-r", "shift_jis"])
def test_output_in_any_encoding_is_whole(command, project, encoding):
    """In the stream's own encoding; what it lacks is escaped in text, and in JSON as JSON does, so that it is read."""
    (project.root / "book" / "claims.yml").write_text(GREEK, encoding="utf-8")
    runner = CliRunner(charset=encoding)
    text = runner.invoke(main, ["claims"]).stdout_bytes.decode(encoding)
    assert SAID.encode(encoding, "backslashreplace").decode(encoding) in text and text.endswith("ter\n")
    assert (SAID in text) == encoding.startswith("utf")
    json_bytes = runner.invoke(main, ["claims", "--json"]).stdout_bytes
    (row,) = json.loads(json_bytes.decode(encoding))
    assert (row["claim"], row["why"]) == (SAID, "später")
    assert (SAID.split()[0] in json_bytes.decode(encoding)) == encoding.startswith("utf")


BARE = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "1"}


@pytest.mark.parametrize(("encoding", "variables"), [("cp1252", {"PYTHONIOENCODING": "cp1252"}), ("ascii", BARE)])
def test_output_to_a_file_in_any_encoding_is_whole(process, encoding, variables):
    """As on Windows, and in a locale without UTF-8."""
    done = process("claims", **variables)
    assert SAID.encode(encoding, "backslashreplace") in done.stdout and (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_reader_that_leaves_gets_no_traceback(process, arguments):
    """`labelaug claims | head -1`: no word about it; here the pipe has no reader from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    done = process(arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, CURRENT.get(arguments, b""))


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_full_disk_under_the_output_is_one_sentence(process, arguments):
    done = process(arguments, ">/dev/full")
    said = b"Error: cannot use a file or the output: No space left on device; free space or make it writable\n"
    assert (done.returncode, done.stderr) == (1, CURRENT.get(arguments, b"") + said)


# ---------------------------------------------------------------------------------------------------------------------
# Other systems


ELSEWHERE = """\
import builtins, importlib, importlib.util, pkgutil, sys
from pathlib import Path
def imports(name, globals=None, *more, **options):  # what libraries import on this system is their own affair
    if name.partition(".")[0] in REFUSED and (globals or {}).get("__name__", "").startswith(("labelaug", "benchmark_")):
        raise ModuleNotFoundError(name)
    return ordinary(name, globals, *more, **options)
REFUSED = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}
ordinary, builtins.__import__ = builtins.__import__, imports
try:
    exec("import resource", {"__name__": "labelaug.planted"})
except ModuleNotFoundError:
    print("refused")
import labelaug
for module in pkgutil.walk_packages(labelaug.__path__, "labelaug."):
    print(importlib.import_module(module.name).__name__)
for path in sorted(Path(sys.argv[1]).glob("*.py")):
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(spec.name)
"""


def test_every_module_imports_without_what_only_unix_has():
    """As on Windows: the package's own modules and the benchmarks find no fcntl, resource, pwd, and the like."""
    folder = results.PROJECT / "benchmarks"
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [path for path in notebooks.PACKAGE.rglob("*.py") if path != notebooks.PACKAGE / "__init__.py"]
    said = done.stdout.splitlines()
    assert said[0] == "refused" and len(said) == 1 + len(files) + len(list(folder.glob("*.py")))


def test_text_is_read_and_written_in_a_stated_encoding():
    """Else it is the locale's, which is cp1252 on most Windows machines and cannot hold the notation."""
    text = {"open", "read_text", "write_text", "TemporaryFile", "NamedTemporaryFile", "fdopen"}

    def unstated(source):
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            mode = options.get("mode") or "".join(ast.unparse(value) for value in call.args[1:2])
            whole = name in text and "b" not in mode and not re.search("os.open|layout.open", ast.unparse(call.func))
            if (whole or "text" in options) and "encoding" not in options:
                yield ast.unparse(call)

    files = [*notebooks.PACKAGE.rglob("*.py"), *(results.PROJECT / "book" / "_ext").glob("*.py")]
    assert {path.name: found for path in files if (found := list(unstated(path.read_text(encoding="utf-8"))))} == {}
    planted = "open('x')\nopen('x', 'rb')\np.read_text()\np.read_text(encoding='utf-8')\nrun(['x'], text=True)"
    assert list(unstated(planted)) == ["open('x')", "p.read_text()", "run(['x'], text=True)"]


# ---------------------------------------------------------------------------------------------------------------------
# The package outside its project's folder


@pytest.fixture
def installed(tmp_path):
    """Calls the command line of a copy in a site-packages, in a working folder; nothing may change beside the copy."""
    site = tmp_path / "lib" / "python3" / "site-packages"
    shutil.copytree(notebooks.PACKAGE, site / "labelaug", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "work").mkdir()
    alone = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "LABELAUG_COMMIT": "5" * 40}

    def call(*arguments, program=("-m", "labelaug.cli"), **variables):
        environment = os.environ | alone | variables
        command = [sys.executable, *program, *arguments]
        before = sorted((tmp_path / "lib").rglob("*"))
        done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
        assert sorted((tmp_path / "lib").rglob("*")) == before
        return done

    call.package = site / "labelaug"
    return call


@pytest.mark.parametrize("arguments", ["run", "run 01", "run -p seed 1", "book", "claims", "claims --json", "bench"])
def test_what_needs_the_project_says_so_outside_it(installed, tmp_path, arguments):
    done = installed(*arguments.split())
    assert (done.returncode, done.stdout) == (1, "") and list((tmp_path / "work").iterdir()) == []
    assert done.stderr == (
        "Error: this needs the project's notebooks, book and benchmarks, and the package lies without them in "
        f"{installed.package}: get the project, and in its folder `pip install -e .`\n"
    )


def test_training_outside_the_project_stays_in_the_working_folder(installed, tmp_path):
    """It says where that is, and what it leaves there can be told and read there; and with what was stated of it."""
    work = tmp_path / "work"
    done = installed("results")
    sentence = f"Error: no results of a study in {work / 'results'}: train one there with `labelaug train`\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)
    (work / "train.py").write_text(ONE_TRIAL)
    done = installed("train", "over-training", "--scale", "gpu", "--device", "cpu", program=["train.py"])
    assert done.returncode == 0, done.stderr
    merged = work / "results" / "over-training-gpu.parquet"
    said = (
        f"outside the project's folder: trials go to {work / 'results' / 'runs'}, what is merged to {work / 'results'}"
    )
    assert done.stdout == f"{merged}\n" and done.stderr.splitlines()[0] == said
    assert sorted(path.name for path in work.iterdir()) == ["results", "train.py"]
    (work / "results" / "._over-training-gpu.parquet").write_text("of a Mac's Finder")
    (work / "results" / "mine-cpu.parquet").write_text("of somebody else")
    told = installed("results")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"{merged.name}: over-training at scale gpu\n") and "commits 5555555" in told.stdout
    read = "from labelaug.results import load_study; print(len(load_study('over-training', 'gpu').trials))"
    assert installed(program=["-c", read]).stdout == "1\n"


ONE_TRIAL = """\
from labelaug.cli import main
from labelaug.studies import STUDIES
if __name__ == "__main__":
    smoke = STUDIES["over-training"]("smoke")
    STUDIES["over-training"] = lambda scale: smoke[1:2]
    main()
"""


def test_other_commands_need_no_project(installed):
    """Nor a version: a copy that pip does not know has none."""
    assert installed("data", "digits").stdout.startswith("digits: 1438 + 359 images")
    assert len(installed("train", "over-training", "--list").stdout.splitlines()) == 4
    program = "import importlib.metadata as m\ndef version(name): raise m.PackageNotFoundError\nm.version = version\n"
    done = installed("--version", program=["-c", f"{program}from labelaug.cli import main; main()"])
    sentence = "Error: the package was copied, not installed by pip: its version is not known\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)
    assert installed("--version").stdout == f"labelaug {version('labelaug')}\n"


def test_a_section_outside_the_project_writes_into_the_working_folder(project, monkeypatch):
    """As plain papermill with an installed package; the marks of a project are its notebooks and its book, together."""
    monkeypatch.chdir(project.root)
    monkeypatch.delenv("LABELAUG_RUN_DIR", raising=False)
    assert results.section("01_one").folder == project.root / "scratch" / "01_one"
    (project.root / "book" / "claims.yml").write_text("[]")
    assert results.section("01_one").folder == results.BUILD / "scratch" / "01_one"
    (project.notebooks / "profiles.yml").unlink()
    assert results.section("01_one").folder == project.root / "scratch" / "01_one"


def test_help_imports_nothing_heavy():
    """`labelaug --help` answers at once because these stay out; a command imports them when it runs."""
    program = (
        "import sys\nfrom labelaug.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "print({'torch', 'numpy', 'pandas', 'papermill', 'sphinx', 'scipy'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Commands:" in done.stdout and done.stderr == "set()\n"
