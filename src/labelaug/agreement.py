"""How far numbers agree when rounding differs: reads what ``benchmarks/agreement.py`` measured.

``results/agreement.json`` holds case -> variant -> ``rows`` (name -> value, and for a row of the ledger low, high and
verdict), commit, dirty, device, created.
"""

import json

from labelaug.paths import RESULTS

PATH = RESULTS / "agreement.json"
REFERENCE = "one thread"


def load() -> dict:
    """The measured cases."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def largest_difference(case: dict, variant: str) -> float:
    """The largest difference of a row's value between a variant and the reference."""
    ours, theirs = case[REFERENCE]["rows"], case[variant]["rows"]
    if ours.keys() != theirs.keys():
        raise ValueError(f"the variant {variant!r} has other rows: {sorted(ours.keys() ^ theirs.keys())}")
    return max(abs(ours[name]["value"] - theirs[name]["value"]) for name in ours)


def other_verdicts(case: dict, variant: str) -> list[str]:
    """The rows whose verdict differs between a variant and the reference."""
    ours, theirs = case[REFERENCE]["rows"], case[variant]["rows"]
    return [name for name in ours if ours[name].get("verdict") != theirs[name].get("verdict")]
