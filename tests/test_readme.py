"""README: its numbers are those of the ledger, and what it shows runs as it stands there."""

import inspect
import re

import numpy as np
import pytest
import torch

from labelaug import agreement, claims, notebooks, paths
from labelaug.studies import STUDIES
from labelaug.trials import run_trial

TEXT = (paths.PROJECT / "README.md").read_text(encoding="utf-8")
ROW = "P1-F2e"


def headline(row: dict) -> str:
    """README's sentence with the numbers of a row of the ledger, errors in points."""
    value, low, high = (f"{100 * row[name]:.0f}" for name in ("value", "low", "high"))
    return f"falls by {value} points, 95 % interval [{low}, {high}], n = 3 seeds"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_the_number_is_the_ledgers_however_it_was_rounded():
    """In float64 every variant gives README's digits; a rounding of the interval's ends by one would not."""
    assert ROW in TEXT and notebooks.resolve("03_binary_images")["control_seeds"] == 3
    measured = agreement.load()["section 03, CIFAR-100"]
    assert len(measured) > 2
    for variant, found in measured.items():
        if variant != "float32":
            assert headline(found["rows"][ROW]) in TEXT, variant
            moved = found["rows"][ROW] | {"high": found["rows"][ROW]["high"] + 0.01}
            assert headline(moved) not in TEXT


@pytest.fixture
def default_runs() -> dict:
    """The current runs with the sections' own parameters, as after ``make book``; section 03 is among them."""
    runs = notebooks.current_runs("default")[0]
    if "03_binary_images" not in runs:
        pytest.skip("section 03 has no current run: run make book")
    return runs


def test_the_number_is_that_of_the_book_on_this_machine(default_runs):
    (row,) = claims.evaluate(default_runs, [row for row in claims.load() if row["id"] == ROW])
    if row["value"] is None:
        pytest.skip(row["why"])
    assert headline(row) in TEXT


def test_the_figure_is_that_of_the_book_on_this_machine(default_runs):
    """Line by line to within two of its hundred points of height: some models of the larger pair move with rounding."""
    drawn = default_runs["03_binary_images"] / "figures" / "fig-binary-controls-light.svg"
    ours, theirs = (coordinates(path) for path in (paths.PROJECT / "book" / "readme-figure.svg", drawn))
    assert len(ours) == len(theirs) > 1000 and np.abs(ours - theirs).max() < 2


def coordinates(path) -> np.ndarray:
    """Every coordinate of the lines of an SVG, in the order in which they are drawn."""
    lines = re.findall(r'\bd="([^"]*)"', path.read_text(encoding="utf-8"))
    return np.array([float(number) for line in lines for number in re.findall(r"-?\d+\.?\d*", line)])


def test_what_the_text_says_of_commands_is_so():
    assert "smoke: four tiny trials" in TEXT and len(STUDIES["over-training"]("smoke")) == 4
    assert "at most about a minute old" in TEXT
    assert inspect.signature(run_trial).parameters["checkpoint_seconds"].default == 60
    assert "Both need Python 3.11 or later" in TEXT
    assert 'requires-python = ">=3.11"' in (paths.PROJECT / "pyproject.toml").read_text(encoding="utf-8")


def test_no_time_is_stated():
    """Times are of one machine and one day; the pages and ``labelaug bench`` print those of the reader's own."""
    command = re.compile(r"--lifetime\S*|walltime=\S+|--minutes \d+|[\"'#].*")  # what the examples ask for
    prose = re.sub(r"```.*?```", lambda block: command.sub("", block[0]), TEXT, flags=re.S)
    times = r"\d[\d,.]* ?(?:s|ms|seconds?|minutes?|hours?|×|img/s)\b"
    assert re.findall(times, re.sub(r"--minutes \d+", "", prose)) == []
    assert re.findall(times, "takes 3.3 s, 27 ms or eight minutes, 1,045× less") == ["3.3 s", "27 ms"]


def test_the_sweep_in_python_runs(capsys):
    """Label smoothing's norm at ε = 0.1 and 0.5 is far below ERM's."""
    sweep = next(block for block in python_blocks() if "train_linear" in block)
    exec(compile(sweep, "README.md", "exec"), {})
    erm, *smoothed = eval(capsys.readouterr().out, {"tensor": torch.tensor}).tolist()
    assert len(smoothed) == 2 and max(smoothed) < 0.2 * erm


def test_the_minimisers_in_python_are_exact_to_ten_digits():
    """‖w - w*‖ ≤ gradient / curvature near the minimiser, where the curvature is at least half of what it is at w."""
    exact = next(block for block in python_blocks() if "minimise" in block)
    assert "The same question without training, exact to ten digits" in TEXT
    seen = []
    exec(compile(exact.replace("    print(", "    seen.append(found), print("), "README.md", "exec"), {"seen": seen})
    assert len(seen) == 3
    for found in seen:
        assert 2 * found.gradient_norm / found.least_curvature < 1e-10 * abs(found.weights).max(), found
