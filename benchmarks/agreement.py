"""How far numbers agree when rounding differs: sections 02 and 03 and a small network, run once in each way.

Rounding changes with a processor's instructions, the number of threads, the order of sums and the precision. Each
variant is a fresh process whose environment differs in one of them; the first is what the others are held against.

Run by ``python benchmarks/agreement.py``: it writes ``results/agreement.json``, from which *What you can rely on* is
made. Whatever has been measured at this commit is kept, so that the same command goes on after a stop; the pair of
CIFAR-10, which takes longest, comes last.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

from labelaug import agreement, claims, notebooks, paths, results
from labelaug.methods import Mixup
from labelaug.studies import STUDIES
from labelaug.trials import run_trial

FOLDER = paths.BUILD / "agreement"
BOTH = ["cifar10:airplane:automobile", "cifar100:apple:aquarium_fish"]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# MKL's code for any x86 processor and torch's for any at all: no fused products, sums in another order.
OTHER_SUMS = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}
VARIANTS: dict[str, tuple[dict, dict]] = {  # environment, parameters
    agreement.REFERENCE: ({}, {}),
    "float32": ({}, {"precision": "float32"}),
    "another order of sums": (OTHER_SUMS, {}),
    "at most AVX2": (AVX2, {}),
    "two threads": ({"OMP_NUM_THREADS": "2"}, {}),
}
SECTIONS: dict[str, tuple[str, dict]] = {  # section, parameters: the two pairs of section 03 do not touch each other
    "section 02": ("02_synthetic_sweep", {}),
    "section 03, CIFAR-100": ("03_binary_images", {"pairs": BOTH[1:]}),
    "section 03, CIFAR-10": ("03_binary_images", {"pairs": BOTH[:1]}),
}
NETWORKS = {"a network, float32, 20 epochs": ("float32", 20), "a network, bfloat16, 2 epochs": ("bfloat16", 2)}
ORDER = ["section 02", "section 03, CIFAR-100", *NETWORKS, "section 03, CIFAR-10"]


def measure_section(case: str, variant: str) -> dict:
    """Value, interval and verdict of each row of the ledger that this case has numbers for.

    The rows' requirements (all pairs, for one) are left out: here one run is held against another, not against a claim.
    """
    section, parameters = SECTIONS[case]
    paths.RUNS = FOLDER / case.replace(", ", "-").replace(" ", "-") / variant.replace(" ", "-")
    (run,) = notebooks.run_sections([section], overrides=parameters | VARIANTS[variant][1], jobs=1)
    rows = [row for row in claims.load() if row.get("table", "").startswith(f"{section}/")]
    found = claims.evaluate(
        {section: run.path}, [{name: part for name, part in row.items() if name != "requires"} for row in rows]
    )
    values = {
        row["id"]: {name: row[name] for name in ("value", "low", "high", "verdict")}
        for row in found
        if row["value"] is not None
    }
    return {"rows": values, "commit": run.commit, "dirty": run.dirty, "device": run.device, "created": run.created}


def measure_network(case: str) -> dict:
    """The test loss after each epoch of one Mixup trial of the scale "cpu", stopped early."""
    precision, epochs = NETWORKS[case]
    trial = next(t for t in STUDIES["over-training"]("cpu") if t.setting.method == Mixup(1.0))
    records = tuple(range(1, epochs + 1))
    setting = replace(trial.setting, precision=precision, epochs=epochs, milestones=(), record_epochs=records)
    frame = run_trial(replace(trial, setting=setting, gradient_epochs=()), data_dir=paths.data_dir())
    loss = frame[(frame["split"] == "test") & (frame["metric"] == "loss")].set_index("epoch")["value"]
    found = results.environment()
    rows = {f"epoch {epoch}": {"value": value} for epoch, value in loss.items()}
    return {"rows": rows} | {name: found[name] for name in ("commit", "dirty", "device", "created")}


def main() -> None:
    """Measure what is not there yet, one process at a time, and keep it after each; the whole takes the file's place.

    What is measured is kept in the build folder until then: the committed file, changed, would make the tree dirty.
    """
    sources, kept = results.environment()["commit"], FOLDER / "agreement.json"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in ORDER:
        for variant, (environment, parameters) in VARIANTS.items():
            found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
            known = found.get(case, {}).get(variant)
            if (known and known["commit"] == sources) or (case in NETWORKS and parameters):
                continue
            print(f"{case}: {variant}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, case, variant]
            done = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stdout=subprocess.PIPE, check=True
            )
            one = json.loads(done.stdout)
            found.setdefault(case, {})[variant] = one
            kept.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copy(kept, agreement.PATH)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        case, variant = sys.argv[1:]
        print(json.dumps(measure_network(case) if case in NETWORKS else measure_section(case, variant)))
