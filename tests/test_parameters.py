"""Under plain papermill, which checks nothing, a section refuses parameters of a wrong type itself."""

import json
import subprocess
import sys

import pytest

from labelaug import notebooks, paths, results
from labelaug.parameters import ParameterError, check

CELLS = [
    "",
    "import numpy as np\nsection = None",
    "n: int = 5\nlr: float = 1e-3  # a rate\ndecoupled: bool = False\nname: str = 'a'\n"
    "sizes: list[int] = [1]\nrates: list[float] = [\n    0.5,\n]\npairs: list[str] = ['a:b:c']",
]  # fmt: skip
DEFAULTS = {
    "n": 5, "lr": 1e-3, "decoupled": False, "name": "a", "sizes": [1], "rates": [0.5], "pairs": ["a:b:c"],
}  # fmt: skip


def namespace(*cells, **injected):
    """What a notebook's ``globals()`` holds after its parameters and the cell that papermill injects."""
    lines = "\n".join(f"{name} = {value!r}" for name, value in injected.items())
    return DEFAULTS | injected | {"In": [*CELLS, f"# Parameters\n{lines}", *cells, "section.check(globals())"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 7), ("lr", 1), ("lr", 0.5), ("decoupled", True), ("name", "mydata:cat:dog"), ("name", "5"),
        ("sizes", [1, 2]), ("sizes", []), ("rates", [1, 0.5]), ("pairs", []), ("pairs", ["x", "y"]),
    ],
)  # fmt: skip
def test_what_has_the_type_passes(name, value):
    check("01_one", namespace(**{name: value}))


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("pairs", "list[str]", "mydata:cat:dog"), ("pairs", "list[str]", '["mydata:cat:dog"]'),
        ("pairs", "list[str]", 5), ("pairs", "list[str]", [5]), ("pairs", "list[str]", None),
        ("sizes", "list[int]", 3), ("sizes", "list[int]", "[1]"), ("sizes", "list[int]", [1.5]),
        ("sizes", "list[int]", ["1"]), ("rates", "list[float]", 0.5), ("rates", "list[float]", ["0.5"]),
        ("rates", "list[float]", [float("nan")]), ("n", "int", 2.0), ("n", "int", "many"), ("n", "int", "3"),
        ("n", "int", True), ("n", "int", [1]), ("lr", "float", "fast"), ("lr", "float", "0.1"), ("lr", "float", True),
        ("lr", "float", float("inf")), ("decoupled", "bool", 1), ("decoupled", "bool", "true"), ("name", "str", 5),
        ("name", "str", ["a"]), ("name", "str", None),
    ],
)  # fmt: skip
def test_what_has_another_type_is_refused_by_name(name, kind, value):
    cure = f"; papermill takes a list as -y '{name}: [...]'" if kind.startswith("list") else ""
    with pytest.raises(ParameterError) as caught:
        check("01_one", namespace(**{name: value}))
    assert str(caught.value) == f"01_one: {name} must be {kind}, got {value!r}{cure}"


def test_only_declared_parameters_are_checked_and_the_last_declaration_counts():
    """A cell that did not run, another annotation, a local one; in JupyterLab a parameters cell that was edited."""
    check("01_one", namespace("this is no Python", "table: dict = 5", "def f():\n    n: str = 1", "other: int = 'x'"))
    check("01_one", namespace("n: str = '5'", n="5"))
    with pytest.raises(ParameterError, match="n must be str, got 5"):
        check("01_one", namespace("n: str = '5'"))


def test_each_section_checks_before_it_computes():
    """In the first code cell after its parameters, where papermill's values have been put in."""
    for name in notebooks.sections():
        cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        tagged = ["parameters" in cell["metadata"].get("tags", []) for cell in code]
        assert "".join(code[tagged.index(True) + 1]["source"]).startswith("section.check(globals())"), name
        assert f'section = results.section("{name}")' in "".join(code[0]["source"]), name


def test_plain_papermill_names_parameter_and_type(tmp_path):
    """README's own-data section with a word for its list, on a copy of the notebook; and the same call by ``run``."""
    given = ["-p", "pairs", "mydata:cat:dog"]
    command = [sys.executable, "-m", "papermill", str(paths.NOTEBOOKS / "03_binary_images.ipynb"), "out.ipynb", *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    sentence = "03_binary_images: pairs must be list[str], got 'mydata:cat:dog'"
    assert done.returncode == 1
    assert f"ParameterError: {sentence}; papermill takes a list as -y 'pairs: [...]'" in done.stderr
    with pytest.raises(ParameterError) as caught:
        notebooks.resolve("03_binary_images", overrides={"pairs": "mydata:cat:dog"})
    assert str(caught.value) == sentence


def test_a_section_names_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("LABELAUG_RUN_DIR", str(tmp_path))
    with pytest.raises(ParameterError, match="09_related_work: n must be int, got 'many'"):
        results.section("09_related_work").check(namespace(n="many"))
