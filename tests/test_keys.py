"""The name of a result: stable, canonical, blind to fields at their default."""

from dataclasses import dataclass

import pytest

from labelaug.data.synthetic import Box, TwoFeatureTask
from labelaug.keys import description_key
from labelaug.training.linear import LinearSetting, LinearTraining

FROZEN = {
    "6ffad5a2a646": LinearSetting(0.01),
    "921aa02ba89c": LinearSetting(0.01, smoothing=0.1),
    "aa2d9df4f684": LinearSetting(0.01, mixup_alpha=1.0),
    "258955ae054e": LinearSetting(0.01, weight_decay=0.1),
    "9bac14213fd0": LinearSetting(0.01, decoupled_decay=0.1),
    "028e2850e69a": LinearSetting(0.1, smoothing=0.1, weight_decay=0.01),
    "7c6b656535cf": LinearTraining(),
    "a3647b5d84cf": LinearTraining(epochs=300, record_epochs=(10, 300)),
    "d18dcc1166c3": TwoFeatureTask(),
    "86652469d887": TwoFeatureTask(gamma=1.0, high=Box(2.0, 12.0), low_noise=0.5),
}


@dataclass(frozen=True)
class Later:
    rate: float
    added: float = 0.0


def test_fields_at_their_default_do_not_count():
    assert description_key(Later(0.1)) == description_key(Later(0.1, added=0.0))
    assert description_key(Later(0.1)) != description_key(Later(0.1, added=1.0))


def test_integers_and_floats_of_one_value_are_one_description():
    assert description_key(LinearSetting(0.01, mixup_alpha=1)) == description_key(LinearSetting(0.01, mixup_alpha=1.0))
    assert description_key(LinearSetting(0.01, mixup_alpha=1)) != description_key(LinearSetting(0.01, mixup_alpha=2))


def test_the_class_is_part_of_the_name():
    assert description_key(LinearSetting(0.01)) != description_key(Later(0.01))


def test_nested_descriptions_count():
    task = TwoFeatureTask(high=Box(0.2, 1.2))
    assert description_key(task) != description_key(TwoFeatureTask(high=Box(0.2, 1.3)))


@pytest.mark.parametrize("key", FROZEN)
def test_frozen_keys(key):
    """Results are filed under these names: a change of the canonical form would orphan them."""
    assert description_key(FROZEN[key]) == key


def test_what_is_not_a_description_is_refused():
    @dataclass(frozen=True)
    class Odd:
        law: object

    with pytest.raises(TypeError, match="got set"):
        description_key(Odd({1}))
