"""What the studies list: each trial once, what tells most first, the paper's grid as the paper states it."""

from dataclasses import replace

import pytest

from labelaug import paths
from labelaug.data.images import load_images
from labelaug.methods import ERM
from labelaug.studies import (
    MIXUP,
    PANELS,
    SCALES,
    SMALLEST_CLASS,
    TEST_IMAGES,
    TRAINING_IMAGES,
    flops,
    over_training,
    panel,
    planted_entry,
    training_flops,
    training_images,
)
from labelaug.trials import Images, Network


@pytest.mark.parametrize("scale", SCALES)
def test_each_trial_stands_once(scale):
    trials = over_training(scale)
    assert len({trial.key for trial in trials}) == len(trials) > 0
    assert trials[0].setting.method == MIXUP and trials[1].setting.method == ERM  # the U-curve comes first
    assert [t.key for t in over_training(scale)] == [t.key for t in trials]


def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match="has the scales smoke, cpu, gpu, paper, got 'large'"):
        over_training("large")


def test_arms_are_paired_by_seed():
    """Two arms of one seed differ in the method alone: same images, same network, same start."""
    trials = over_training("cpu")
    for seed in range(3):
        mixup, erm = (
            next(t for t in trials if t.seed == seed and t.setting.method == method and t.images.fraction == 0.01)
            for method in (MIXUP, ERM)
        )
        assert mixup.images == erm.images and mixup.network == erm.network and mixup.images.seed == seed
        assert {t.teacher.key for t in trials if t.teacher} == {next(t.teacher.key for t in trials if t.teacher)}


def test_every_panel_is_declared_as_the_paper_has_it():
    assert set(PANELS) == {f"P2-F{i}" for i in (1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14)}
    listed = {trial.key for trial in over_training("paper")}
    for row in PANELS:
        trials = panel(row)
        assert {t.key for t in trials} <= listed and {t.seed for t in trials} == set(range(10))
        assert all(t.setting.record_epochs[-1] == t.setting.epochs for t in trials)
    figure4 = panel("P2-F4")
    assert {t.setting.augmentation for t in figure4} == {"crop-flip"} and {t.setting.epochs for t in figure4} == {7000}
    assert {(t.images.name, t.network.architecture) for t in panel("P2-F3")} == {("cifar100", "resnet34")}
    assert {t.setting.loss for t in panel("P2-F13")} == {"squared-error"}
    switches = {t.setting.switch_epoch for t in panel("P2-F6") if t.images == Images("cifar10", seed=t.seed)}
    assert switches == {95, 105, 115, 125, 155}
    elsewhere = [t for row in PANELS if row not in ("P2-F4", "P2-F13") for t in panel(row)]
    assert {t.setting.augmentation for t in elsewhere} == {"none"} and {t.network.width for t in elsewhere} == {64}


def test_planted_arms_differ_in_targets_and_mixing_alone():
    """For each seed three arms on the same two-class images, an entry planted in those of the training part."""
    trials = planted_entry("gpu")
    plain = [replace(t, setting=replace(t.setting, method=ERM, smoothing=0.0)) for t in trials]
    assert len(set(plain)) == 9 and len(set(trials)) == 27 and [t.seed for t in trials] == [0] * 9 + [1] * 9 + [2] * 9
    assert {t.images.planted > 0 and len(t.images.classes) for t in trials} == {2}
    arms = {(type(t.setting.method).__name__, t.setting.smoothing) for t in trials}
    assert arms == {("Erm", 0.0), ("Erm", 0.1), ("Mixup", 0.0)}
    with pytest.raises(ValueError, match="has the scale gpu, got 'cpu'"):
        planted_entry("cpu")


def test_a_gpus_quarter_of_an_hour_comes_first():
    """At 24,000 images a second the first two trials train for eight minutes at most, and few gradients are taken."""
    first, second, *_ = trials = over_training("gpu")
    assert (first.seed, second.seed, second.setting.method) == (0, 0, ERM) and first.images == second.images
    assert sum(training_images(t) * t.setting.epochs for t in (first, second)) / 24_000 < 8 * 60
    for trial in trials:
        assert len(trial.gradient_epochs) <= 7 and set(trial.gradient_epochs) <= set(trial.setting.records)


def test_flops_are_those_of_the_formula():
    """ResNet-18 for 32×32 images: the convolutions' and the last layer's multiply-adds, by hand."""

    def conv(fan_in, fan_out, size, side):
        return fan_in * fan_out * size**2 * side**2

    total = conv(3, 64, 3, 32) + 4 * conv(64, 64, 3, 32)
    for width, side in ((128, 16), (256, 8), (512, 4)):
        total += conv(width // 2, width, 3, side) + 3 * conv(width, width, 3, side) + conv(width // 2, width, 1, side)
    assert flops("resnet18", 64, 10, 32) == 2 * (total + 512 * 10)
    assert flops("mlp", 7, 10, 4) == 2 * (48 * 7 + 7 * 7 + 7 * 10)
    assert flops("vgg16", 64, 10, 32) > flops("vgg16", 32, 10, 32) > 0


def test_a_trial_costs_three_passes_an_image_and_epoch():
    trial = panel("P2-F2")[0]
    assert training_images(trial) == 15_000 and trial.network == Network("resnet18")
    assert training_flops(trial) == 3 * flops("resnet18", 64, 10, 32) * 15_000 * 1600


@pytest.mark.data
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_sizes_are_those_of_the_sets(name):
    images = load_images(name, paths.data_dir())
    assert len(images.y_train) == TRAINING_IMAGES[name] and len(images.y_test) == TEST_IMAGES[name]
    assert min((images.y_train == k).sum() for k in range(len(images.classes))) == SMALLEST_CLASS[name]
