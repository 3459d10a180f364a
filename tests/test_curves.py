"""What is read off a training curve, on tables whose answers are known by hand, and on noise of a known law."""

import numpy as np
import pandas as pd
import pytest

from labelaug.curves import RULES, chosen_on_others, readings, stops_falling, turns, wide

NAMES = ["test/error", "validation/error", "train/running_loss"]


def rows_of(columns: dict[str, list[float]], *, key: str = "a", seed: int = 0, epochs=None) -> pd.DataFrame:
    """Rows of one trial from a list of values for each "split/metric"."""
    found = []
    for name, values in columns.items():
        split, metric = name.split("/")
        for epoch, value in zip(epochs or range(len(values)), values, strict=True):
            found.append((key, seed, 10 * epoch, epoch, split, metric, value))
    return pd.DataFrame(found, columns=["key", "seed", "step", "epoch", "split", "metric", "value"])


CURVE = {
    "test/error": [0.9, 0.50, 0.40, 0.45, 0.47],
    "validation/error": [0.9, 0.52, 0.43, 0.41, 0.46],
    "train/running_loss": [0.1, 2.00, 0.90, 0.95, 0.80],
}


def test_wide_keeps_the_epochs_at_which_all_are_recorded():
    rows = rows_of(CURVE)
    rows = rows[~((rows["epoch"] == 0) & (rows["metric"] == "running_loss"))]
    table = wide(rows, NAMES)
    assert list(table.columns) == ["key", "seed", "epoch", *NAMES]
    assert table["epoch"].tolist() == [1, 2, 3, 4] and table["test/error"].tolist() == CURVE["test/error"][1:]
    with pytest.raises(ValueError, match="no row has test/loss"):
        wide(rows, ["test/error", "test/loss"])


def test_three_rules_read_three_epochs():
    """The least running loss before ``least_epoch`` and the least *test* error choose nothing."""
    found = readings(rows_of(CURVE)).set_index("rule")
    assert set(found.index) == set(RULES)
    assert found["epoch"].to_dict() == {"last": 4, "least training loss": 4, "chosen on validation": 3}
    assert found.loc["chosen on validation", "value"] == 0.45  # of the test images, at the epoch of least validation
    assert readings(rows_of(CURVE), least_epoch=0).set_index("rule").loc["least training loss", "epoch"] == 0


def test_rules_keep_trials_apart_and_take_the_earliest_of_equals():
    other = {name: values[::-1] for name, values in CURVE.items()} | {"validation/error": [0.9, 0.4, 0.4, 0.4, 0.5]}
    rows = pd.concat([rows_of(CURVE), rows_of(other, key="b", seed=1)])
    found = readings(rows).set_index(["key", "rule"])
    assert found.loc[("b", "chosen on validation"), "epoch"] == 1 and found.loc[("b", "last"), "value"] == 0.9
    assert found.loc[("a", "chosen on validation"), "epoch"] == 3 and len(found) == 6


def test_def_turn():
    """def-turn: the turn is chosen on validation, least and last are values on test."""
    found = turns(rows_of(CURVE), "error").iloc[0]
    assert (found["turn"], found["least"], found["last"]) == (3, 0.45, 0.47)
    assert found["rise"] == pytest.approx(0.02, abs=1e-12)
    # Negative control: the least on the test images themselves, 0.40, is another number.
    assert found["last"] - min(CURVE["test/error"][1:]) == pytest.approx(0.07, abs=1e-12)
    untrained = CURVE | {"validation/error": [0.1, *CURVE["validation/error"][1:]]}
    assert turns(rows_of(untrained), "error").iloc[0]["turn"] == 3  # the start, before any step, is no turn
    late = turns(rows_of(CURVE), "error", least_epoch=4).iloc[0]
    assert late["turn"] == 4 and late["rise"] == 0


def rows_of_trials(values):
    """Rows of trials whose error on a split is an array [trials, records]."""
    frames = []
    for split, value in values.items():
        trials, records = value.shape
        frame = pd.DataFrame({"seed": np.repeat(np.arange(trials), records)})
        frame["epoch"] = np.tile(np.arange(1, records + 1), trials)
        frame["key"], frame["step"] = frame["seed"].astype(str), frame["epoch"]
        frames.append(frame.assign(split=split, metric="error", value=value.ravel()))
    return pd.concat(frames)


def test_prop_honest_rise():
    """prop-honest-rise: on a level curve with independent noise the rise has mean 0, that from the own least has not.

    4,000 trials of 20 records with noise of standard deviation 1 on either set. The rise is the difference of two
    independent N(0, 1) values, or 0 when the turn is the last record: variance 2(1 - 1/20), so the mean of 4,000 has a
    standard error of 0.0218; 4.5 of them are exceeded by chance 7 times in a million. The negative control: from the
    own minimum of 20 normal values the mean rise is E max = 1.867 (the largest of 20), tabulated.
    """
    trials, records = 4000, 20
    rng = np.random.default_rng(0)
    values = {split: rng.standard_normal((trials, records)) for split in ("validation", "test")}
    rise = turns(rows_of_trials(values), "error")["rise"]
    error = np.sqrt(2 * (1 - 1 / records) / trials)
    assert abs(rise.mean()) < 4.5 * error
    own = values["test"][:, -1] - values["test"].min(axis=1)
    assert own.mean() == pytest.approx(1.867, abs=4.5 * 1.2 / np.sqrt(trials))
    assert own.mean() > 10 * 4.5 * error


def test_jitter_that_both_sets_share_biases_a_rise_upwards():
    """A level curve whose network jitters by N(0, 1) an epoch, the images adding N(0, 1) on either set.

    The turn has the least of 20 values of variance 2, E = -1.867 √2, half of which the network's: the mean rise is
    1.867/√2 = 1.320, not 0. A rise is a difference of values of variance at most 2 each, so 4.5 standard errors of the
    mean of 4,000 are below 4.5 · 2/√4000 = 0.142.
    """
    rng = np.random.default_rng(1)
    network = rng.standard_normal((4000, 20))
    values = {split: network + rng.standard_normal(network.shape) for split in ("validation", "test")}
    assert turns(rows_of_trials(values), "error")["rise"].mean() == pytest.approx(1.867 / np.sqrt(2), abs=0.142)


def test_a_rise_that_is_there_is_found_in_full():
    """A parabola with its least at epoch 30 on both sets: the turn is there and the rise exact."""
    epochs = list(range(0, 101, 10))
    curve = [(epoch - 30) ** 2 / 1000 for epoch in epochs]
    rows = rows_of({"test/loss": [1 + v for v in curve], "validation/loss": curve}, epochs=epochs)
    found = turns(rows, "loss").iloc[0]
    assert (found["turn"], found["least"]) == (30, 1.0) and found["rise"] == pytest.approx(4.9, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "epoch"),
    [
        ([5, 4, 3, 3.5, 3.2, 2, 2.5, 2.5], 20),  # not improved at the next two; that it is later does not count
        ([5, 4, 3, 3.5, 2.9, 3, 3, 3], 40),  # one bad record is forgiven
        ([5, 4, 3, 3, 3, 1, 1, 1], 20),  # an equal value is no improvement
        ([1, 2, 3, 4, 5, 6, 7, 8], 0),  # never fell
        ([8, 7, 6, 5, 4, 3, 2, 1], None),  # never stopped
        ([8, 7, 6, 5, 4, 3, 1, 2], None),  # one record after the last minimum is not enough to know
        ([8, 7, 6, 5, 4, 1, 3, 2], 50),
    ],
)
def test_def_stops_falling(values, epoch):
    assert stops_falling(range(0, 80, 10), values) == epoch


def test_def_stops_falling_with_another_patience():
    values = [5, 4, 3, 3.5, 2.9, 3, 3, 3]
    assert stops_falling(range(8), values, patience=1) == 2 and stops_falling(range(8), values, patience=4) is None
    for epochs, patience in (([0, 0, 1], 1), ([0, 1], 1), ([0, 1, 2], 0)):
        with pytest.raises(ValueError, match="epochs must increase"):
            stops_falling(epochs, [3, 2, 1], patience=patience)


def test_no_seed_chooses_for_itself():
    table = pd.DataFrame({20: [0.1, 0.5, 0.5], 50: [0.4, 0.4, 0.4]}, index=[7, 8, 9])
    # Seed 7 alone likes arm 20, and the other two decide for it; with it they would choose arm 20 for themselves.
    assert chosen_on_others(table).to_dict() == {7: 50, 8: 20, 9: 20}
    lone = table.copy()
    lone.loc[7, 20] = -100.0
    assert chosen_on_others(lone)[7] == 50  # whatever its own value is
    for bad in (table.iloc[:1], table.mask(table == 0.1)):
        with pytest.raises(ValueError, match="two seeds or more"):
            chosen_on_others(bad)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_not_finite_is_not_passed_over(name, value):
    """Left out in silence, the epoch after it would be read as the least, or the one before as the last."""
    broken = CURVE | {name: [*CURVE[name][:3], value, CURVE[name][4]]}
    rows = pd.concat([rows_of(CURVE), rows_of(broken, key="b", seed=1)])
    message = f"1 values are not finite, the first {name} = {value} of b, seed 1, epoch 3"
    with pytest.raises(ValueError, match=message):
        wide(rows, NAMES)
    with pytest.raises(ValueError, match=message):
        readings(rows)
    if name != "train/running_loss":
        with pytest.raises(ValueError, match=message):
            turns(rows, "error")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_curve_that_is_not_finite_has_no_end_of_its_fall(value):
    with pytest.raises(ValueError, match="values must be finite"):
        stops_falling(range(5), [5, 4, value, 3.5, 3.2])
    table = pd.DataFrame({20: [0.1, 0.5, value], 50: [0.4, 0.4, 0.4]}, index=[7, 8, 9])
    with pytest.raises(ValueError, match="two seeds or more"):
        chosen_on_others(table)
