"""How far numbers agree when rounding differs: what ``benchmarks/agreement.py`` measured, as a table for the book.

``results/agreement.json`` holds case -> variant -> ``rows`` (name -> ``value``, and for a row of the ledger ``low``,
``high`` and ``verdict``), commit, dirty, device and created.
"""

import json

from labelaug import claims
from labelaug.paths import RESULTS

PATH = RESULTS / "agreement.json"
REFERENCE = "one thread"  # the variant that the others are held against


def load() -> dict:
    """The measured cases."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def largest_difference(case: dict, variant: str) -> float:
    """The largest difference of a row's value between a variant and the reference.

    Raises: ValueError if the two have different rows.
    """
    ours, theirs = case[REFERENCE]["rows"], case[variant]["rows"]
    if ours.keys() != theirs.keys():
        raise ValueError(f"'{variant}' has other rows than '{REFERENCE}': {sorted(ours.keys() ^ theirs.keys())}")
    return max(abs(ours[name]["value"] - theirs[name]["value"]) for name in ours)


def other_verdicts(case: dict, variant: str) -> list[str]:
    """The rows whose verdict differs between a variant and the reference."""
    ours, theirs = case[REFERENCE]["rows"], case[variant]["rows"]
    return [name for name in ours if ours[name].get("verdict") != theirs[name].get("verdict")]


def other_digits(case: dict, variant: str) -> list[str]:
    """The rows of the ledger that are printed otherwise under a variant than in the reference."""
    ours, theirs = ({name: _printed(row) for name, row in case[one]["rows"].items()} for one in (REFERENCE, variant))
    return [name for name in ours if ours[name] != theirs[name]]


def markdown(cases: dict) -> str:
    """A table, one row a case and one column a variant, and where its numbers come from.

    A cell is the largest difference of a value, and the rows of the ledger that are printed otherwise or, said with it,
    have another verdict; "–" is not measured.
    """
    variants = list(dict.fromkeys(name for case in cases.values() for name in case if name != REFERENCE))
    lines = [f"| numbers | {' | '.join(variants)} |", "|---" * (len(variants) + 1) + "|"]
    for name, case in cases.items():
        cells = [_cell(case, variant) if variant in case else "–" for variant in variants]
        lines.append(f"| {name} ({len(case[REFERENCE]['rows'])}) | {' | '.join(cells)} |")
    measured = [one for case in cases.values() for one in case.values()]
    days = sorted(one["created"][:10] for one in measured)
    commits = ", ".join(sorted({f"{one['commit'][:7]}{' with changes' * one['dirty']}" for one in measured}))
    devices = "; ".join(sorted({one["device"] for one in measured}))
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return "\n".join([*lines, "", f"Measured on {devices}, {when}, commit {commits}.", ""])


def _cell(case: dict, variant: str) -> str:
    difference, verdicts = largest_difference(case, variant), other_verdicts(case, variant)
    rows = [f"{name}, another verdict" if name in verdicts else name for name in other_digits(case, variant)]
    text = f"{difference:.0e}" if difference else "0"
    return f"{text} ({'; '.join(rows)})" if rows else text


def _printed(row: dict) -> str | None:
    """What the ledger prints; None for a number that is not the ledger's."""
    return claims.number(row | {"unit": None}) + row["verdict"] if "verdict" in row else None
