"""The ledger: every way to a verdict, and every way to be told that a row is wrong."""

import math

import numpy as np
import pandas as pd
import pytest
import yaml

from labelaug import claims, results
from labelaug.claims import ClaimError, evaluate

ROW = {
    "id": "P1-F1",
    "claim": "label smoothing drops\n  the feature",
    "source": "Paper 1, Figure 1",
    "where": "fig-sweep",
    "table": "02_sweep/sweep",
    "value": "mean_interval(t.norm)",
    "unit": "of the total norm",
    "verdicts": [
        {"when": "high < 0.1", "verdict": "holds", "text": "below a tenth"},
        {"when": "low < 0.1", "verdict": "holds under few seeds", "text": "the interval holds a tenth"},
        {"when": "low > 1", "verdict": "does not hold"},
    ],
}
SMALL, WIDE, LARGE = (0.02, 0.03, 0.04), (0.01, 0.05, 0.3), (2.0, 2.1, 2.2)


@pytest.fixture
def runs(project):
    """One finished run with a table of each kind; returns what writes another ``sweep`` into it."""
    project.write("01_setting", "")
    project.write("02_sweep", "n_seeds: int = 3\nkind: str = 'box'")
    folder = project.finish("02_sweep")

    def put(name="sweep", **columns):
        frame = pd.DataFrame(columns)
        results.write_table(folder / "tables" / f"{name}.parquet", frame, description={"a": 1}, seconds=0.5)
        return {"02_sweep": folder}

    put("other", x=[1, 2, 4])
    put(norm=SMALL)
    put.runs = {"02_sweep": folder}
    return put


def verdict(runs, **changes):
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    return evaluate(runs, [row])[0]


# Verdicts


@pytest.mark.parametrize(
    ("norm", "expected", "why"),
    [
        (SMALL, "holds", "below a tenth"),
        (WIDE, "holds under few seeds", "the interval holds a tenth"),
        (LARGE, "does not hold", ""),
    ],
)
def test_a_verdict_follows_the_table(runs, norm, expected, why):
    row = verdict(runs(norm=norm))
    assert (row["verdict"], row["why"]) == (expected, why)
    assert (row["value"], row["low"], row["high"]) == claims.mean_interval(norm)
    assert row["claim"] == "label smoothing drops the feature" and row["where"] == "fig-sweep"
    assert row["provenance"].keys() == {"commit", "table", "created", "device"}
    assert row["provenance"]["table"] == "02_sweep/tables/sweep.parquet"


def test_what_the_data_cannot_tell_is_not_resolved(runs):
    """Shown in grey, as what was not run; the same row with a narrower interval has an answer."""
    answers = [{"when": "high < 0.1", "verdict": "holds"}, {"verdict": "not resolved", "text": "three seeds"}]
    row = verdict(runs(norm=WIDE), verdicts=answers)
    assert (row["verdict"], row["why"]) == ("not resolved", "three seeds")
    assert "[not resolved]{.verdict-untested}" in claims.ledger_markdown([row])
    assert verdict(runs(norm=SMALL), verdicts=answers)["verdict"] == "holds"


def test_expressions_reach_tables_parameters_and_arithmetic(runs):
    value = "exact(sum(tables('02_sweep/other').x[i] for i in range(3)) + p.n_seeds\n  + np.float32(0.5) + len(t))"
    when = "p.kind == 'box' and value == low == high == t.shape[0] + 10.5"
    row = verdict(runs.runs, value=value, verdicts=[{"when": when, "verdict": "holds"}])
    assert row["value"] == 13.5 and type(row["value"]) is float


def test_not_tested_says_why(runs):
    missing = verdict(runs.runs, table="01_setting/any")
    assert missing["verdict"] == "not tested" and missing["value"] is None and missing["provenance"] is None
    assert missing["why"] == "01_setting has no current run: `labelaug run 01_setting`"
    assert "01_setting has no" in verdict(runs.runs, value="exact(tables('01_setting/any').x[0])")["why"]

    few = [{"when": "True", "why": "fine"}, {"when": "p.n_seeds >= 5", "why": "fewer than\n5 seeds"}]
    assert verdict(runs.runs, requires=few)["why"] == "fewer than 5 seeds"
    assert verdict(runs.runs, requires=few[:1])["verdict"] == "holds"

    row = {"id": "P2-L31", "claim": "c", "source": "s", "not_tested": "comes with the theory"}
    (row,) = evaluate({}, [row])
    assert (row["verdict"], row["why"]) == ("not tested", "comes with the theory")


def test_a_stand_in_never_counts_for_an_image_set(runs):
    """Only the rows of the claim's own set are seen; digits alone leave it untested."""
    both = runs(norm=(*SMALL, *LARGE), data_set=["cifar10"] * 3 + ["digits"] * 3)
    assert verdict(both, data="cifar10")["value"] == pytest.approx(np.mean(SMALL))
    assert verdict(both, data="digits")["verdict"] == "does not hold"
    row = verdict(both, data="cifar100")
    assert row["verdict"] == "not tested" and "`labelaug data cifar100`" in row["why"]
    with pytest.raises(ClaimError, match="has a column data_set, and the claim names no image set"):
        verdict(both)
    with pytest.raises(ClaimError, match="has no column data_set, and the claim names an image set"):
        verdict(runs(norm=SMALL), data="cifar10")


# Rows that are wrong


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"id": "P3-F1"}, "claim P3-F1: an id is one of the study's"),
        ({"id": "F1"}, "claim F1: an id"),
        ({"claim": None}, "claim P1-F1: claim is missing"),
        ({"value": None}, "claim P1-F1: value is missing"),
        ({"verdits": []}, "claim P1-F1: 'verdits' is out of place"),
        ({"not_tested": "why"}, "claim P1-F1: 'table' is out of place"),
        ({"table": "sweep"}, "claim P1-F1: table must be section/name, got 'sweep'"),
        ({"value": "exact(1"}, r"claim P1-F1: 'exact\(1' is no expression"),
        ({"value": "exat(t.norm[0])"}, r"claim P1-F1: unknown name 'exat' in 'exat\(t.norm\[0\]\)'"),
        ({"value": "exact(value)"}, "claim P1-F1: unknown name 'value'"),
        ({"value": "exact(open('x'))"}, "claim P1-F1: unknown name 'open'"),
        ({"requires": [{"when": "q", "why": "w"}]}, "claim P1-F1: unknown name 'q'"),
        ({"requires": [{"when": "True"}]}, "claim P1-F1: each of requires holds when and why"),
        ({"verdicts": [{"when": "vlue > 0", "verdict": "holds"}]}, "claim P1-F1: unknown name 'vlue' in 'vlue > 0'"),
        ({"verdicts": [{"verdict": "hold"}]}, "claim P1-F1: a verdict is .*, got 'hold'"),
        ({"verdicts": [{"if": "True", "verdict": "holds"}]}, "claim P1-F1: each of verdicts holds when"),
    ],
)
def test_a_wrong_row_is_refused_without_any_table(tmp_path, changes, sentence):
    path = tmp_path / "claims.yml"
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    path.write_text(yaml.safe_dump([row]))
    with pytest.raises(ClaimError, match=f"^{sentence}[^\n]*$"):
        claims.load(path)


def test_a_right_file_loads_and_a_wrong_one_does_not(tmp_path):
    path = tmp_path / "claims.yml"
    rows = [ROW | {"id": name} for name in ("P1-F1", "P1-F1a", "P2-F2b", "P1-V3T", "B-1", "X-10", "P1-OQ1")]
    path.write_text(yaml.safe_dump(rows))
    assert claims.load(path) == rows
    for text, sentence in (
        (yaml.safe_dump([ROW, ROW]), "claim P1-F1 stands twice"),
        ("- id: [", "claims.yml is not YAML"),
        ("id: P1-F1", "claims.yml must be a list of rows"),
        ("- claim: c", "claims.yml must be a list of rows"),
    ):
        path.write_text(text)
        with pytest.raises(ClaimError, match=sentence):
            claims.load(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"value": "mean_interval(t.nrm)"}, r"'mean_interval\(t.nrm\)' fails with AttributeError: .*'nrm'"),
        ({"value": "mean_interval(t.norm[:1])"}, "fails with ValueError: an interval needs at least 2 finite values"),
        ({"requires": [{"when": "p.n_sees > 1", "why": "w"}]}, "'p.n_sees > 1' fails with AttributeError"),
        ({"value": "t.norm.mean()"}, r"must give \(value, low, high\), as exact\(x\) does, got 0.03"),
        ({"value": "(1, 2)"}, "must give"),
        ({"value": "(1, 2, 3)"}, r"gives 1 outside \[2, 3\]"),
        ({"value": "exact(np.nan)"}, "gives nan outside"),
        ({"verdicts": [{"when": "low > 1", "verdict": "holds"}]}, r"no verdict matches 0.03 \[.*\] among 'low > 1'"),
        ({"table": "02_sweep/swep"}, "02_sweep wrote no table 'swep'; it wrote: other, sweep"),
        ({"table": "03_sweep/sweep"}, "no section '03_sweep'"),
        ({"value": "exact(tables('02_sweep/swep').x[0])"}, "02_sweep wrote no table 'swep'"),
    ],
)
def test_a_row_that_fails_on_its_table_is_named(runs, changes, sentence):
    with pytest.raises(ClaimError, match=f"claim P1-F1: .*{sentence}"):
        verdict(runs.runs, **changes)


# The book about itself

TEXT = """\
# A section
:::{prf:theorem} One
:label: thm-one
$$ x $$ (eq-one)
:::
:::{prf:proof}
By {eq}`eq-one`, {cite}`a2020,b2021` and {numref}`fig-one`; see {prf:ref}`thm-one`.
:::
```{math}
:label: eq-two
y
```
```{figure} a.svg
:name: fig-one
```"""


def test_structure_counts_what_a_section_holds(project):
    project.write("01_one", "n: int = 1\nnames: list[str] = []", "1", "2", text=TEXT)
    project.write("02_two", "", text="# Nothing")
    one, two = claims.structure({"01_one": project.finish("01_one", seconds=7.5)}).to_dict("records")
    assert one == {
        "section": "01_one", "executed": True, "refuses_unknown": True, "refuses_wrong_type": True, "parameters": 2,
        "code_cells": 3, "seconds": 7.5, "statements": 1, "proofs": 1, "equations": 2, "figures": 1, "citations": 2,
        "cross_references": 3,
    }  # fmt: skip
    assert not two["executed"] and math.isnan(two["seconds"]) and two["statements"] == two["figures"] == 0


def test_structure_tries_the_refusals(project, monkeypatch):
    """With a check that lets everything pass, the columns turn false: they are tried, not declared."""
    project.write("01_one", "\n".join(f"{name}: {kind} = {value}" for name, kind, value in (
        ("a", "bool", True), ("b", "int", 1), ("c", "float", 0.5), ("d", "str", "'x'"),
        ("e", "list[int]", "[1]"), ("f", "list[float]", "[0.5]"), ("g", "list[str]", "['x']"),
    )))  # fmt: skip
    row = claims.structure({}).iloc[0]
    assert row.refuses_unknown and row.refuses_wrong_type
    monkeypatch.setattr(claims.notebooks, "resolve", lambda section, overrides: overrides)
    row = claims.structure({}).iloc[0]
    assert not row.refuses_unknown and not row.refuses_wrong_type


def test_a_claim_about_the_book_reads_its_structure(runs):
    row = verdict(
        runs.runs, id="B-2", table="book/structure", value="exact(t.executed.sum())",
        verdicts=[{"when": "value == len(t)", "verdict": "holds"}, {"verdict": "does not hold"}],
    )  # fmt: skip
    assert (row["value"], row["verdict"], row["provenance"]["table"]) == (1.0, "does not hold", "book/structure")


# Pages


def test_ledger_markdown_shows_number_verdict_and_link(runs):
    untested = ROW | {"id": "P1-T31", "where": "thm-half", "table": "01_setting/any", "headline": True}
    rows = evaluate(runs.runs, [ROW, untested])
    text = claims.ledger_markdown(rows)
    assert "[P1-F1]{#P1-F1}\n  - label smoothing drops the feature (Paper 1, Figure 1)\n" in text
    assert "  - 0.03 [0.00516, 0.0548] of the total norm\n  - [holds]{.verdict-holds} below a tenth\n" in text
    source = rows[0]["provenance"]
    origin = f"commit {source['commit'][:7]}, {source['created'][:10]}]{{.origin}}"
    assert "{numref}`fig-sweep` [table " in text and text.count(origin) == 1  # no number, no origin
    assert "{prf:ref}`thm-half`\n" in text
    assert "  - –\n  - [not tested]{.verdict-untested} 01_setting has no" in text
    headline = claims.headline_markdown(rows)
    assert headline.startswith("- [not tested]{.verdict-untested} label smoothing") and headline.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.03, "0.03"), (0.0312345, "0.0312"), (-0.5, "-0.5"), (2.0, "2"), (12345.0, "12345"), (1234.5, "1230"),
     (0.0, "0"), (1.23456e-7, "1.23e-07"), (99.96, "100"), (4.5e9, "4.50e+09")],
)  # fmt: skip
def test_numbers_are_short_and_not_wrong(value, text):
    assert claims.number({"value": value, "low": value, "high": value, "unit": None}) == text
    assert float(text) == pytest.approx(value, rel=5e-3)


def test_execution_markdown_tells_where_each_section_ran(runs):
    text = claims.execution_markdown(runs.runs)
    where, when = ("{doc}`/02_sweep`", "CPU, 2 cores"), ("2026-11-21 10:00:00", "1.0")
    for part in (*where, *when, "`000000000000`", "2.13.0", '"n_seeds": 3'):
        assert part in text
    assert runs.runs["02_sweep"].name in text and "uncommitted" not in text
