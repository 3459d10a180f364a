"""The ledger: each claim of the papers with our number, its interval and a verdict, all computed from tables of runs.

``book/claims.yml`` is a list of rows. A row holds

- ``id``: the study's row (P1-F1, P2-L31, B-2, X-1; a letter tells several claims of one row apart: P1-F1a); ``claim``
  and ``source`` (MyST); optionally ``section`` (the page), ``where`` (a label of the book), ``headline: true`` (the
  intro shows it);
- ``not_tested``: why, and nothing else; or
- ``table``: ``section/name`` of the table it is computed from (``book/structure``: `structure`); ``data``: the image
  set that the claim is about, to whose rows ``t`` is then limited; ``requires``: a list of ``when`` (an expression) and
  ``why`` (what is said where it is false); ``value``: an expression that gives (value, low, high); ``unit`` (optional);
  ``verdicts``: a list of ``when`` (an expression; none in the last one means else), ``verdict`` and ``text``; the
  verdict "declared" is for trainings that are described in full and have not run: the number is what they cost; "not
  resolved" for an interval that holds both answers.

Expressions are Python over ``t`` (the table), ``tables("section/name")``, ``p`` (the parameters of the table's run, as
in ``p.n_seeds``), ``pd``, ``np``, `mean_interval`, `median_interval`, `exact`; verdicts also over ``value, low, high``.
"""

import ast
import builtins
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import yaml

from labelaug import notebooks, paths
from labelaug.intervals import mean_interval, median_interval
from labelaug.results import environment, read_table

ID = re.compile(r"P[12]-[A-Z][A-Z0-9]*[a-z]?|[BX]-[0-9]+[a-z]?")
KEYS = {"id", "claim", "source", "section", "where", "headline"}
TESTED = {"table", "data", "requires", "value", "unit", "verdicts"}
BUILTINS = "abs all any bool dict float int len list max min range round set sorted str sum tuple zip".split()
STRUCTURE = "book/structure"
WRONG = {  # for each type of a parameter, the nearest value that is not of it
    "bool": 1, "int": 0.5, "float": True, "str": 0, "list[int]": [0.5], "list[float]": [True], "list[str]": [0],
}  # fmt: skip


class ClaimError(ValueError):
    """A row of claims.yml that cannot be read or computed; the message names row and expression."""


class _NotThere(Exception):
    """A table whose section has no current run."""


# ---------------------------------------------------------------------------------------------------------------------
# What expressions may call


def exact(x) -> tuple[float, float, float]:
    """A number without an error: (x, x, x)."""
    return x, x, x


NAMESPACE = {
    "np": np, "pd": pd, "exact": exact, "mean_interval": mean_interval, "median_interval": median_interval,
    "__builtins__": {name: getattr(builtins, name) for name in BUILTINS},
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Reading claims.yml


def load(path: Path | None = None) -> list[dict]:
    """The rows of claims.yml, checked as far as is possible without tables: keys, ids, verdicts, names in expressions.

    Raises: ClaimError.
    """
    path = path or paths.PROJECT / "book" / "claims.yml"
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except yaml.YAMLError as error:
        raise ClaimError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise ClaimError(f"{path.name} must be a list of rows, each with an id")
    seen = set()
    for row in rows:
        if not ID.fullmatch(str(row["id"])):
            raise ClaimError(f"claim {row['id']}: an id is one of the study's, such as P1-F1, P2-L31, B-2 or X-1")
        if row["id"] in seen:
            raise ClaimError(f"claim {row['id']} stands twice")
        seen.add(row["id"])
        _check_row(row)
    return rows


def _check_row(row: dict) -> None:
    needed = {"not_tested"} if "not_tested" in row else {"table", "value", "verdicts"}
    allowed = KEYS | ({"not_tested"} if "not_tested" in row else TESTED)
    missing = sorted(({"claim", "source"} | needed) - row.keys())
    unknown = sorted(row.keys() - allowed)
    if missing or unknown:
        reason = f"{missing[0]} is missing" if missing else f"'{unknown[0]}' is out of place"
        raise ClaimError(f"claim {row['id']}: {reason}")
    if "not_tested" in row:
        return
    if not re.fullmatch(r"\w+/\w[\w-]*", row["table"]):
        raise ClaimError(f"claim {row['id']}: table must be section/name, got '{row['table']}'")
    known = {"t", "tables", "p"}
    _check_expression(row, row["value"], known)
    for item in row.get("requires", []):
        if item.keys() != {"when", "why"}:
            raise ClaimError(f"claim {row['id']}: each of requires holds when and why, got {', '.join(item)}")
        _check_expression(row, item["when"], known)
    for item in row["verdicts"]:
        if not item.keys() <= {"when", "verdict", "text"} or "verdict" not in item:
            raise ClaimError(f"claim {row['id']}: each of verdicts holds when, verdict and text, got {', '.join(item)}")
        if not re.fullmatch("holds|does not hold|holds under .+|not resolved|declared", item["verdict"]):
            raise ClaimError(
                f"claim {row['id']}: a verdict is 'holds', 'holds under …', 'does not hold', 'not resolved' or "
                f"'declared', got '{item['verdict']}'"
            )
        if "when" in item:
            _check_expression(row, item["when"], known | {"value", "low", "high"})


def _check_expression(row: dict, expression, known: set[str]) -> None:
    """Syntax and names, so that a typo is found where no table is there to evaluate it on."""
    try:
        tree = ast.parse(_source(expression), mode="eval")
    except SyntaxError as error:
        raise ClaimError(f"claim {row['id']}: '{expression}' is no expression ({error.msg})") from None
    nodes = list(ast.walk(tree))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in bound | known | NAMESPACE.keys() | set(BUILTINS):
            raise ClaimError(f"claim {row['id']}: unknown name '{node.id}' in '{expression}'")


def _source(expression) -> str:
    """In parentheses, so that it may run over several lines."""
    return f"({expression}\n)"


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


def evaluate(runs: dict[str, Path], rows: list[dict] | None = None) -> list[dict]:
    """The ledger over the current runs.

    Args: runs: section -> folder of its run; a section without a run leaves its claims not tested; rows: as `load`
        gives them (the default).
    Returns: one dict a row: ``id, claim, value, low, high, verdict, why, where, provenance``, and ``source, section,
        unit, headline``; not tested, value, low, high and provenance (``commit, table, created, device``) are None.
    Raises: ClaimError for an expression that fails, a table that its finished run lacks, or no matching verdict.
    """
    read = {}  # each table once
    return [_row(spec, runs, read) for spec in (load() if rows is None else rows)]


def _row(spec: dict, runs: dict[str, Path], read: dict) -> dict:
    row = {
        "id": spec["id"],
        "claim": _one_line(spec["claim"]),
        "value": None, "low": None, "high": None,
        "verdict": "not tested",
        "why": _one_line(spec.get("not_tested", "")),
        "section": spec.get("section"),
        "where": spec.get("where"),
        "provenance": None,
        "source": _one_line(spec["source"]),
        "unit": spec.get("unit"),
        "headline": bool(spec.get("headline", False)),
    }  # fmt: skip
    if "not_tested" in spec:
        return row
    try:
        return row | _verdict(spec, runs, read)
    except _NotThere as reason:
        return row | {"why": str(reason)}


def _verdict(spec: dict, runs: dict[str, Path], read: dict) -> dict:
    """Value, interval, verdict, why and provenance of a tested row; only ``why`` where a requirement is not met."""
    table, provenance = _table(spec, spec["table"], runs, read)
    section = spec["table"].split("/")[0]
    parameters = notebooks.read_run(runs[section]).parameters if section in runs else {}
    names = NAMESPACE | {
        "t": _rows_of_data(spec, table),
        "tables": lambda name: _table(spec, name, runs, read)[0],
        "p": SimpleNamespace(**parameters),
    }
    if spec.get("data") and names["t"].empty:
        cure = f"get it with `labelaug data {spec['data']}`"
        return {"why": f"the section ran without the image set {spec['data']}: {cure}"}
    for item in spec.get("requires", []):
        if not _evaluate(spec, item["when"], names):
            return {"why": _one_line(item["why"])}
    value, low, high = _triple(spec, _evaluate(spec, spec["value"], names))
    names |= {"value": value, "low": low, "high": high}
    for item in spec["verdicts"]:
        if "when" not in item or _evaluate(spec, item["when"], names):
            return {
                "value": value, "low": low, "high": high,
                "verdict": item["verdict"],
                "why": _one_line(item.get("text", "")),
                "provenance": {
                    "commit": provenance["commit"],
                    "table": provenance["table"],
                    "created": provenance["created"],
                    "device": provenance["device"],
                },
            }  # fmt: skip
    conditions = ", ".join(repr(item["when"]) for item in spec["verdicts"])
    raise ClaimError(f"claim {spec['id']}: no verdict matches {value:.4g} [{low:.4g}, {high:.4g}] among {conditions}")


def _table(spec: dict, name: str, runs: dict[str, Path], read: dict) -> tuple[pd.DataFrame, dict]:
    """The table and its provenance, from ``read`` if an earlier row has put it there."""
    if name == STRUCTURE and name not in read:
        read[name] = structure(runs), environment() | {"table": STRUCTURE}
    if name in read:
        return read[name]
    section, _, table = name.partition("/")
    if section not in notebooks.sections():
        raise ClaimError(f"claim {spec['id']}: no section '{section}' for the table '{name}'")
    if section not in runs:
        raise _NotThere(f"{section} has no current run: `labelaug run {section}`")
    path = runs[section] / "tables" / f"{table}.parquet"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in path.parent.glob("*.parquet"))) or "none"
        raise ClaimError(f"claim {spec['id']}: {section} wrote no table '{table}'; it wrote: {there}")
    frame, provenance = read_table(path)
    read[name] = frame, provenance | {"table": f"{section}/tables/{table}.parquet"}
    return read[name]


def _rows_of_data(spec: dict, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the claim's own image set, so that a stand-in never counts."""
    if ("data" in spec) != ("data_set" in table.columns):
        has, names = ("has a", "no") if "data_set" in table.columns else ("has no", "an")
        raise ClaimError(
            f"claim {spec['id']}: {spec['table']} {has} column data_set, and the claim names {names} image set (data)"
        )
    return table[table["data_set"] == spec["data"]] if "data" in spec else table


def _evaluate(spec: dict, expression, names: dict):
    try:
        # As globals, not locals: a comprehension inside an expression sees globals only.
        return eval(compile(_source(expression), f"<claim {spec['id']}>", "eval"), dict(names))
    except (_NotThere, ClaimError):
        raise
    except Exception as error:  # whatever an expression of the file raises, its row is what to mend
        raise ClaimError(f"claim {spec['id']}: '{expression}' fails with {type(error).__name__}: {error}") from error


def _triple(spec: dict, result) -> tuple[float, float, float]:
    try:
        value, low, high = (float(x) for x in result)
    except (TypeError, ValueError):
        raise ClaimError(
            f"claim {spec['id']}: '{spec['value']}' must give (value, low, high), as exact(x) does, got {result}"
        ) from None
    if not (np.isfinite([value, low, high]).all() and low <= value <= high):
        raise ClaimError(f"claim {spec['id']}: '{spec['value']}' gives {value:.4g} outside [{low:.4g}, {high:.4g}]")
    return value, low, high


# ---------------------------------------------------------------------------------------------------------------------
# The book about itself


def structure(runs: dict[str, Path]) -> pd.DataFrame:
    """What each section holds, one row a section, counted in its notebook (the executed one where there is a run).

    Columns: section, executed, refuses_unknown and refuses_wrong_type (tried here, on the parameters as they are),
    parameters, code_cells, seconds (NaN if not run), statements (numbered ones, by label), proofs, equations (with a
    label), figures, citations, cross_references.
    """
    return pd.DataFrame([_section_row(name, runs.get(name)) for name in notebooks.sections()])


def _section_row(section: str, run: Path | None) -> dict:
    path = run / "notebook.ipynb" if run else paths.NOTEBOOKS / f"{section}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join(_markdown(cells))
    parameters = notebooks.inspect(section)
    return {
        "section": section,
        "executed": run is not None,
        "refuses_unknown": _refuses(section, {f"{'_'.join(parameters)}_not": 1}),
        "refuses_wrong_type": all(_refuses(section, {p.name: WRONG[p.kind]}) for p in parameters.values()),
        "parameters": len(parameters),
        "code_cells": sum(cell["cell_type"] == "code" for cell in cells),
        "seconds": notebooks.read_run(run).seconds if run else np.nan,
        "statements": len(set(re.findall(r"^\s*:label:\s*((?:def|lem|prop|thm|cor|rem|ex)-[\w-]+)", text, re.M))),
        "proofs": len(re.findall(r"^[`:]{3,}\{prf:proof\}", text, re.M)),
        "equations": len(set(re.findall(r"\$\$\s*\((eq-[\w-]+)\)|^\s*:label:\s*(eq-[\w-]+)", text, re.M))),
        "figures": len(re.findall(r"^[`:]{3,}\{(?:study-)?figure\}", text, re.M)),
        "citations": sum(len(keys.split(",")) for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)),
        "cross_references": len(re.findall(r"\{(?:numref|ref|eq|prf:ref|doc)\}`[^`]+`", text)),
    }


def _markdown(cells: list[dict]):
    for cell in cells:
        if cell["cell_type"] == "markdown":
            yield "".join(cell["source"])
        for output in cell.get("outputs", []):
            yield "".join(output.get("data", {}).get("text/markdown", ""))


def _refuses(section: str, overrides: dict) -> bool:
    try:
        notebooks.resolve(section, overrides=overrides)
    except notebooks.ParameterError:
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Markdown for the pages


def ledger_markdown(rows: list[dict]) -> str:
    """The ledger as a table: id, claim, our number, verdict and why, where it is shown and from what it came."""
    table = [["id", "claim", "our number", "verdict", "where and from what"]]
    for row in rows:
        why = f" {row['why']}" if row["why"] else ""
        claim = f"{row['claim']} ({row['source']})"
        table.append(
            [f"[{row['id']}]{{#{row['id']}}}", claim, number(row), _badge(row) + why, _link(row) + _origin(row)]
        )
    return _list_table(table, "9 36 15 23 17")


def _origin(row: dict) -> str:
    """Table, commit and day of the number, in small print after the link."""
    source = row["provenance"]
    if source is None:
        return ""
    name = source["table"].rsplit("/", 1)[-1].removesuffix(".parquet")
    return f" [table {name}, commit {source['commit'][:7]}, {source['created'][:10]}]{{.origin}}"


def headline_markdown(rows: list[dict]) -> str:
    """The claims of the headline as a list: verdict, claim, number."""
    lines = []
    for row in (row for row in rows if row["headline"]):
        shown = f": {number(row)}" if row["value"] is not None else f": {row['why']}"
        where = f" ({_link(row)})" if row["where"] or row["section"] else ""
        lines.append(f"- {_badge(row)} {row['claim']} ({row['source']}){shown}{where}")
    return "\n".join(lines) + "\n"


def execution_markdown(runs: dict[str, Path]) -> str:
    """What was run where and for how long, and with which versions."""
    found = [notebooks.read_run(path) for path in runs.values()]
    table = [["section", "seconds", "finished (UTC)", "commit", "device", "run", "image sets"]]
    for run in found:
        changes = ", with uncommitted changes" if run.dirty else ""
        table.append([
            f"{{doc}}`/{run.section}`", f"{run.seconds:.1f}", run.created[:19].replace("T", " "),
            f"`{run.commit[:12]}`{changes}", run.device, f"`{run.key}` ({run.profile or 'own parameters'})",
            f"`{run.data[:12]}`" if run.data else "none",
        ])  # fmt: skip
    names = list(dict.fromkeys(name for run in found for name in run.versions))
    versions = [["version of", *(f"{{doc}}`/{run.section}`" for run in found)]]
    versions += [[name, *(run.versions.get(name, "none") for run in found)] for name in names]
    parameters = [["section", "parameters"]]
    parameters += [[f"{{doc}}`/{run.section}`", f"`{json.dumps(run.parameters)}`"] for run in found]
    return "\n".join(map(_list_table, (table, parameters, versions)))


def number(row: dict) -> str:
    """Value and interval with the unit, as text: "0.031 [0.028, 0.034]"; "–" where there is none."""
    if row["value"] is None:
        return "–"
    unit = f" {row['unit']}" if row["unit"] else ""
    if row["low"] == row["high"]:
        return _digits(row["value"]) + unit
    return f"{_digits(row['value'])} [{_digits(row['low'])}, {_digits(row['high'])}]{unit}"


def _digits(x: float) -> str:
    """Three significant digits, whole numbers in full, no exponent between 0.0001 and a million."""
    if x == round(x) and abs(x) < 1e6:
        return str(round(x))
    if 1e-4 <= abs(x) < 1e6:
        return np.format_float_positional(x, precision=3, unique=False, fractional=False, trim="-")
    return f"{x:.2e}"


def _badge(row: dict) -> str:
    kinds = {"holds": "holds", "does not hold": "fails", "not tested": "untested"}
    kinds |= {"not resolved": "untested", "declared": "untested"}
    kind = kinds.get(row["verdict"], "conditional")
    return f"[{row['verdict']}]{{.verdict-{kind}}}"


def _link(row: dict) -> str:
    """A reference to the label, by the role that its prefix asks for; without a label, to the page."""
    if not row["where"]:
        return f"{{doc}}`/{row['section']}`" if row["section"] else "–"
    prefix = row["where"].split("-")[0]
    role = {"fig": "numref", "tab": "numref", "eq": "eq"}.get(prefix, "ref")
    role = "prf:ref" if prefix in ("def", "lem", "prop", "thm", "cor", "rem", "ex") else role
    return f"{{{role}}}`{row['where']}`"


def _list_table(rows: list[list[str]], widths: str = "auto") -> str:
    """MyST's list-table, which takes any MyST text in a cell, unlike a table of pipes; the first row is the header."""
    if len(rows) == 1:
        return ""
    lines = [":::{list-table}", ":header-rows: 1", f":widths: {widths}", ""]
    for row in rows:
        lines += [f"{'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    return "\n".join([*lines, ":::", ""])


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
