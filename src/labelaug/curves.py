"""Reading training curves: values at the last epoch, at the least training loss, and at an epoch chosen on validation.

The three are never mixed. The paper on over-training reports the second; what one would use is the third; the first is
what a fixed budget gives. All take rows ``key, seed, step, epoch, split, metric, value`` of trials.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

RULES = ("last", "least training loss", "chosen on validation")


def wide(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """One column for each "split/metric" name and one row a trial and recorded epoch: ``key, seed, epoch, ...``.

    Epochs at which one of the names was not recorded are left out.
    Raises: ValueError for a name that no row has, or a value that is not finite: it would pass for one not recorded.
    """
    named = rows.assign(name=rows["split"] + "/" + rows["metric"])
    missing = [name for name in names if name not in set(named["name"])]
    if missing:
        raise ValueError(f"no row has {', '.join(missing)}")
    chosen = named[named["name"].isin(names)]
    if len(bad := chosen[~np.isfinite(chosen["value"])]):
        first = bad.iloc[0]
        raise ValueError(
            f"{len(bad)} values are not finite, the first {first['name']} = {first['value']} of {first['key']}, seed "
            f"{first['seed']}, epoch {first['epoch']}"
        )
    table = chosen.pivot_table(index=["key", "seed", "epoch"], columns="name", values="value")[list(names)]
    return table.dropna().reset_index().rename_axis(columns=None)


def readings(
    rows: pd.DataFrame, *, value: str = "test/error", chooser: str = "validation/error", least_epoch: int = 1
) -> pd.DataFrame:
    """Each trial's ``value`` by the three RULES: columns key, seed, rule, epoch, value.

    "least training loss" is the recorded epoch of least mean training loss over the epoch (of the mixed data, where
    data are mixed), "chosen on validation" that of the least ``chooser``; of equal ones the earliest.

    Args: least_epoch: the first that may be chosen.
    Raises: ValueError if a metric was not recorded.
    """
    table = wide(rows, [value, chooser, "train/running_loss"])
    table = table[table["epoch"] >= least_epoch]
    found = []
    for (key, seed), one in table.groupby(["key", "seed"], sort=False):
        one = one.sort_values("epoch")
        at = {
            "last": one.index[-1],
            "least training loss": one["train/running_loss"].idxmin(),
            "chosen on validation": one[chooser].idxmin(),
        }
        found += [(key, seed, rule, one.at[i, "epoch"], one.at[i, value]) for rule, i in at.items()]
    return pd.DataFrame(found, columns=["key", "seed", "rule", "epoch", "value"])


def turns(rows: pd.DataFrame, metric: str, *, least_epoch: int = 1) -> pd.DataFrame:
    """Each trial's turn and rise: columns key, seed, turn, least, last, rise.

    turn: the recorded epoch of the least ``metric`` on validation; least and last: its value on *test* at the turn and
    at the last epoch; rise: last - least. Chosen on one set and measured on another, a rise is free of the chance of
    the images: of networks that are all equally good it is zero in the mean. It is not free of jitter of the network
    itself, which both sets share: the turn then picks a network that is good by chance on both, and a training that
    only jitters about a level has a positive mean rise.
    """
    table = wide(rows, [f"validation/{metric}", f"test/{metric}"])
    table = table[table["epoch"] >= least_epoch]
    found = []
    for (key, seed), one in table.groupby(["key", "seed"], sort=False):
        one = one.sort_values("epoch").set_index("epoch")
        turn = one[f"validation/{metric}"].idxmin()
        least, last = one.at[turn, f"test/{metric}"], one[f"test/{metric}"].iloc[-1]
        found.append((key, seed, turn, least, last, last - least))
    return pd.DataFrame(found, columns=["key", "seed", "turn", "least", "last", "rise"])


def stops_falling(epochs: Sequence[int], values: Sequence[float], *, patience: int = 2) -> int | None:
    """The first record after which the running minimum is not improved at the next ``patience`` records.

    Args: epochs: of the records, increasing; values: there.
    Returns: its epoch; None if the minimum is improved up to the end, that is if no record has ``patience`` later ones
        none of which lies below the least so far.
    Raises: ValueError for epochs that do not increase, a value that is not finite, or for patience below 1.
    """
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError(f"values must be finite, got {values.tolist()}")
    if len(epochs) != len(values) or patience < 1 or (np.diff(epochs) <= 0).any():
        raise ValueError(f"epochs must increase, one a value, and patience be at least 1, got {epochs}, {patience}")
    least = np.minimum.accumulate(values)
    for i in range(len(values) - patience):
        if values[i + 1 : i + 1 + patience].min() >= least[i]:
            return int(epochs[i])
    return None


def chosen_on_others(table: pd.DataFrame) -> pd.Series:
    """For each seed the arm of least mean over the *other* seeds: ``[seeds, arms]`` -> arm by seed.

    What an arm's own seed shows of it then decides nothing, neither the choice nor, through the choice, its reading.
    Raises: ValueError for fewer than two seeds or a value that is missing or not finite.
    """
    if len(table) < 2 or not np.isfinite(table.to_numpy(float)).all():
        raise ValueError(f"a choice needs two seeds or more with every arm, got {len(table)}")
    others = (table.sum() - table) / (len(table) - 1)
    return others.idxmin(axis=1)
