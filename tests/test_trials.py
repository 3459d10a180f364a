"""A trial's data, its name, its measurements, and what stopping and going on leave unchanged."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from labelaug import trials
from labelaug.data.images import load_images
from labelaug.data.plant import plant_entry
from labelaug.methods import ERM, Mixup
from labelaug.studies import over_training
from labelaug.training.deep import DeepSetting, init_generator
from labelaug.trials import Images, Network, Stopped, Trial, TrialRefused, check_trial, prepare, run_trial

MIXUP, BASE = over_training("smoke")[:2]
DIGITS = BASE.images
FROZEN = {
    "base": "392d97acc02e",
    "seed": "b3e88019978b",
    "subset": "fe245e3a985b",
    "averaged": "505715928e37",
    "planted": "80800f97a79e",
    "network": "201361c1f5e3",
    "mixup": "8cf58bd77e70",
    "midpoint": "7233753d9436",
    "optimiser": "fe900e6d1659",
    "teacher": "bd64ff055128",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with no files: digits need none."""
    return tmp_path_factory.mktemp("images")


def without_seconds(frame):
    return frame[frame["metric"] != "seconds"].reset_index(drop=True)


@pytest.fixture(scope="module")
def undisturbed(folder):
    return run_trial(MIXUP, data_dir=folder)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_keys_are_frozen():
    """A field added later, with a neutral default, must leave the names of committed results alone."""
    setting = DeepSetting(0.1, 10, 128)
    base = Trial(Images("cifar10"), Network(), setting, 0)
    found = {
        name: trial.key
        for name, trial in {
            "base": base,
            "seed": replace(base, seed=1),
            "subset": replace(base, images=Images("cifar10", ("cat", "dog"), 0.3, validation=50, seed=2)),
            "averaged": replace(base, images=Images("svhn", side=16, test=400, random_labels=0.2)),
            "planted": replace(base, images=Images("cifar10", ("cat", "dog"), planted=0.5)),
            "network": replace(base, network=Network("vgg16", 32)),
            "mixup": replace(base, setting=replace(setting, method=Mixup(1.0), switch_epoch=5)),
            "midpoint": replace(base, setting=replace(setting, method=Mixup(lam=0.5, inputs=False))),
            "optimiser": replace(
                base,
                setting=replace(
                    setting, optimiser="sgd", momentum=0.9, milestones=(5, 8), decay=0.2, weight_decay=5e-4
                ),
            ),
            "teacher": replace(base, setting=replace(setting, labels="teacher"), teacher=replace(base, seed=7)),
        }.items()
    }
    assert found == FROZEN


def test_a_label_says_what_is_trained():
    assert BASE.label == "digits 0.1 resnet18-2 erm seed 0" and MIXUP.label == "digits 0.1 resnet18-2 mixup seed 0"
    switched, taught = over_training("smoke")[2:]
    assert "mixup until 4" in switched.label and "teacher's labels" in taught.label
    smoothed = replace(BASE, setting=replace(BASE.setting, smoothing=0.1), images=replace(DIGITS, planted=2.5))
    assert "erm smoothing 0.1 planted 2.5 seed 0" in smoothed.label


# ---------------------------------------------------------------------------------------------------------------------
# Data


def npz(folder, images, name, *, shuffle):
    """The training and test images in an npz file, in canonical order or shuffled."""
    rng = np.random.default_rng(0)
    parts = {}
    for split, x, y in (("train", images.x_train, images.y_train), ("test", images.x_test, images.y_test)):
        order = rng.permutation(len(y)) if shuffle else np.arange(len(y))
        parts |= {f"x_{split}": x[order], f"y_{split}": y[order]}
    np.savez(folder / f"{name}.npz", **parts)


def test_subsets_are_balanced_nested_seeded_and_the_same_from_any_file(tmp_path):
    digits = load_images("digits", tmp_path)
    for name, shuffle in (("one", False), ("two", True)):
        npz(tmp_path, digits, name, shuffle=shuffle)
    images = Images("one", fraction=0.2, validation=10, test=7, seed=3)
    one, two = (prepare(replace(images, name=name), data_dir=tmp_path, device="cpu") for name in ("one", "two"))
    for split, (x, labels) in one.parts.items():
        assert torch.equal(x, two.parts[split][0]) and torch.equal(labels, two.parts[split][1])
        assert x.dtype == torch.uint8 and x.shape[1:] == (1, 8, 8)
    smallest = np.bincount(digits.y_train).min()
    counts = {split: np.bincount(labels).tolist() for split, (_, labels) in one.parts.items()}
    assert counts == {"train": [round(0.2 * smallest)] * 10, "test": [7] * 10, "validation": [10] * 10}

    def members(data, split="train"):
        return {image.numpy().tobytes() for image in data.parts[split][0]}

    larger = prepare(replace(images, fraction=0.5), data_dir=tmp_path, device="cpu")
    assert members(one) < members(larger)
    for data in (one, larger):  # what validates is the same for every size, and never trained on
        assert members(data, "validation") == members(one, "validation")
        assert not members(data) & members(data, "validation")
    other = prepare(replace(images, seed=4), data_dir=tmp_path, device="cpu")
    assert members(other) != members(one) and members(other, "test") != members(one, "test")
    whole = prepare(Images("one"), data_dir=tmp_path, device="cpu")
    assert len(whole.parts["train"][1]) == len(digits.y_train) and set(whole.parts) == {"train", "test"}


def test_subsets_and_random_labels_come_from_streams_of_their_own(folder):
    """[seed, 7, split] orders each class in turn, [seed, 8] says which labels are redrawn."""
    images = Images("digits", fraction=0.2, test=7, random_labels=0.3, seed=3)
    data, digits = prepare(images, data_dir=folder, device="cpu"), load_images("digits", folder)
    each = round(0.2 * np.bincount(digits.y_train).min())
    for index, (split, count) in enumerate((("train", each), ("test", 7))):
        rng = np.random.default_rng([3, 7, index])
        x, y = getattr(digits, f"x_{split}"), getattr(digits, f"y_{split}")
        chosen = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:count] for k in range(10)])
        assert np.array_equal(data.parts[split][0].numpy(), x[chosen].transpose(0, 3, 1, 2))
    rng, labels = np.random.default_rng([3, 8]), np.repeat(np.arange(10), each)
    redrawn = rng.permutation(10 * each)[: round(0.3 * 10 * each)]
    labels[redrawn] = rng.integers(10, size=10 * each)[redrawn]
    assert data.parts["train"][1].tolist() == labels.tolist()


def test_classes_are_relabelled_in_the_order_given(folder):
    data = prepare(Images("digits", classes=("7", "3")), data_dir=folder, device="cpu")
    digits = load_images("digits", folder)
    x, labels = data.parts["train"]
    assert data.num_classes == 2 and (labels == 0).sum() == (digits.y_train == 7).sum()
    assert {i.numpy().tobytes() for i in x[labels == 1]} == {i.tobytes() for i in digits.x_train[digits.y_train == 3]}


def test_averaging_is_the_rounded_mean_of_blocks(folder):
    plain, coarse = (prepare(replace(DIGITS, side=side), data_dir=folder, device="cpu") for side in (None, 4))
    x = plain.parts["train"][0].numpy().astype(float)
    blocks = x.reshape(len(x), 1, 4, 2, 4, 2).mean((3, 5))
    assert coarse.parts["train"][0].shape[2:] == (4, 4)
    assert np.abs(coarse.parts["train"][0].numpy() - blocks).max() <= 0.5
    assert coarse.mean.item() == pytest.approx(coarse.parts["train"][0].double().mean().item(), rel=1e-6)


def test_random_labels_change_their_share_of_the_training_labels_only(folder):
    images = Images("digits", validation=0)
    plain = prepare(images, data_dir=folder, device="cpu")
    few, many = (prepare(replace(images, random_labels=share), data_dir=folder, device="cpu") for share in (0.2, 0.6))
    changed = [data.parts["train"][1] != plain.parts["train"][1] for data in (few, many)]
    n = len(changed[0])
    for differs, share in zip(changed, (0.2, 0.6), strict=True):  # a redrawn label is another one in 9 cases of 10
        expected, spread = 0.9 * share, math.sqrt(0.9 * 0.1 * share / n)
        assert abs(differs.double().mean().item() - expected) < 4.5 * spread
    assert bool((changed[1] | ~changed[0]).all())  # those of the smaller share are among those of the larger
    assert torch.equal(few.parts["test"][1], plain.parts["test"][1])


def test_a_planted_entry_stands_in_training_images_only(folder):
    images = Images("digits", classes=("3", "7"), validation=0)
    plain, planted = (prepare(replace(images, planted=g), data_dir=folder, device="cpu") for g in (0.0, 1.5))
    x, labels = plain.parts["train"]
    standardised = (x.double() - plain.mean.double()) / plain.std.double()
    wanted = plant_entry(standardised, labels, gamma=1.5)
    found = (planted.parts["train"][0].double() - planted.mean.double()) / planted.std.double()
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found, standardised, atol=1e-1)
    assert torch.equal(plain.parts["test"][0], planted.parts["test"][0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Images("cifar10"), "needs the image set 'cifar10', which is not in"),
        (Images("digits", classes=("1", "eleven")), "two or more of its classes"),
        (Images("digits", fraction=0.9, validation=100), "cannot be had"),
        (Images("digits", fraction=1e-6), "cannot be had"),
        (Images("digits", validation=1), "all to train on, 1 to validate"),
        (Images("digits", side=5), "cannot be averaged to side 5"),
        (Images("digits", planted=1.0), "labels must be 0 or 1"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_training(folder, images, message):
    with pytest.raises(TrialRefused, match=message):
        run_trial(replace(BASE, images=images), data_dir=folder, progress=lambda epoch: pytest.fail("it trained"))


def test_architecture_and_device_are_refused_too(folder):
    with pytest.raises(TrialRefused, match="vgg16 needs images of 32×32"):
        run_trial(replace(BASE, network=Network("vgg16", 2)), data_dir=folder)
    if not torch.cuda.is_available():
        with pytest.raises(TrialRefused, match="finds no GPU: use --device cpu"):
            check_trial(BASE, data_dir=folder, device="cuda")
    with pytest.raises(ValueError, match="a teacher do not fit"):
        replace(BASE, teacher=BASE)
    with pytest.raises(ValueError, match="must be among"):
        replace(BASE, gradient_epochs=(1,))
    for wrong in ({"fraction": 0.0}, {"random_labels": 1.5}, {"validation": -1}, {"side": 0}):
        with pytest.raises(ValueError, match=r"must (lie|be)"):
            replace(DIGITS, **wrong)
    with pytest.raises(ValueError, match="architecture must be one of"):
        Network("alexnet")


def of_27(batch_size, network=BASE.network, **fields):
    """Nine digits of each of three classes."""
    images = Images("digits", ("0", "1", "2"), fraction=9 / 142, test=5)
    setting = replace(BASE.setting, batch_size=batch_size, epochs=1, milestones=(), record_epochs=(1,))
    return replace(BASE, images=images, network=network, setting=setting, gradient_epochs=(), **fields)


def taught(student, teacher):
    return replace(student, setting=replace(student.setting, labels="teacher"), teacher=teacher)


SMALL = Network("mlp", 4)
ALONE = {
    "last minibatch of one": of_27(13),
    "all but one in the first": of_27(26),
    "minibatches of one": of_27(1),
    "of the teacher": taught(of_27(9), of_27(13)),
    "of the student, whose teacher could be trained": taught(of_27(13), of_27(9)),
}


@pytest.mark.parametrize("trial", ALONE.values(), ids=ALONE)
def test_a_minibatch_of_one_is_refused_before_training(folder, tmp_path, trial):
    """Digits of 8×8 pixels reach a ResNet's last stage as one pixel, where batch normalisation needs two images."""
    with pytest.raises(TrialRefused, match=r"^trial \w+: 27 examples in minibatches of \d+ leave a minibatch of one, "):
        run_trial(trial, data_dir=folder, checkpoint=tmp_path / "c", progress=lambda epoch: pytest.fail("it trained"))
    assert list(tmp_path.iterdir()) == []  # no teacher's weights either


def test_a_minibatch_of_one_is_trained_on_where_that_can_be(folder, tmp_path):
    """Two images suffice; so does one without batch normalisation, or with four pixels in the last stage."""
    for trial in (of_27(25), of_27(27), of_27(13, SMALL), of_27(1, SMALL), taught(of_27(9), of_27(13, SMALL))):
        assert run_trial(trial, data_dir=folder).iloc[-1][["metric", "value"]].tolist() == ["diverged", 0.0]
    x, y = np.random.default_rng(0).integers(256, size=(15, 9, 9, 1), dtype=np.uint8), np.arange(15) % 3
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    larger = replace(of_27(7), images=Images("own"))
    assert run_trial(larger, data_dir=tmp_path).iloc[-1][["metric", "value"]].tolist() == ["diverged", 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def by_class(values, labels):
    """Mean squared distance from the mean of the own class, and from the mean of all: sums over n, not n - 1."""
    means = np.stack([values[labels == k].mean(0) for k in range(10)])[labels]
    return ((values - means) ** 2).sum() / len(values), ((values - values.mean(0)) ** 2).sum() / len(values)


def test_a_record_is_what_plain_torch_computes(folder, undisturbed):
    """The record before the first step, recomputed from the start of the network with torch's own functions.

    Float32 networks on batches of another size: rounding is some 1e-6, a variance over n - 1 is off by a tenth.
    """
    data, entered = prepare(MIXUP.images, data_dir=folder, device="cpu"), []
    model = trials._build(MIXUP, data).eval()
    model.network.fc.register_forward_hook(lambda layer, inputs, outputs: entered.append(inputs[0].double().numpy()))
    with torch.no_grad():
        for split, (x, labels) in data.parts.items():
            logits = model(x.float())
            rows = undisturbed[(undisturbed["epoch"] == 0) & (undisturbed["split"] == split)]
            found = rows.set_index("metric")["value"]
            assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
            right = (logits.argmax(1) == labels).double()
            assert found["error"] == pytest.approx(1 - right.mean().item())
            probability, labels = logits.double().softmax(1), labels.numpy()
            assert found["output_variance"] == pytest.approx(by_class(probability.numpy(), labels)[0], rel=1e-3)
            within, whole = by_class(entered[-1], labels)
            assert found["activation_variance"] == pytest.approx(within, rel=1e-4)
            assert found["relative_variance"] == pytest.approx(within / (whole - within), rel=1e-4)
            confidence = probability.amax(1)
            bins = [(b / 15 < confidence) & (confidence <= (b + 1) / 15) for b in range(15)]
            expected = sum(abs((right - confidence)[chosen].sum().item()) for chosen in bins) / len(labels)
            assert found["calibration_error"] == pytest.approx(expected, rel=1e-4)
    wanted = {"loss", "error", "activation_variance", "relative_variance", "output_variance", "calibration_error"}
    assert set(undisturbed[undisturbed["split"] == "test"]["metric"]) == wanted
    assert sorted(set(undisturbed[undisturbed["metric"] == "loss"]["epoch"])) == [0, 2, 4, 6]
    assert set(undisturbed[undisturbed["metric"] == "clean_gradient"]["epoch"]) == {6}
    assert undisturbed["key"].eq(MIXUP.key).all()
    assert undisturbed.iloc[-1][["metric", "value"]].tolist() == ["diverged", 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Running


def test_the_same_trial_gives_the_same_rows_and_another_seed_others(folder, undisturbed):
    again = run_trial(MIXUP, data_dir=folder)
    assert without_seconds(again).equals(without_seconds(undisturbed))
    other = run_trial(replace(MIXUP, seed=1), data_dir=folder)
    assert not np.allclose(other["value"].iloc[:6], undisturbed["value"].iloc[:6])


def test_mixup_with_lam_one_is_erm_bit_for_bit(folder):
    plain = run_trial(BASE, data_dir=folder)
    neutral = run_trial(replace(BASE, setting=replace(BASE.setting, method=Mixup(lam=1.0))), data_dir=folder)
    drop = ["key"]
    assert BASE.setting.method == ERM
    assert without_seconds(neutral).drop(columns=drop).equals(without_seconds(plain).drop(columns=drop))


def test_compiling_has_to_pay():
    """On a GPU alone, and from five thousand full minibatches on: 15,000 images give 117 of 128 an epoch."""
    setting = replace(BASE.setting, batch_size=128, epochs=43, record_epochs=None, milestones=())
    assert trials._pays(setting, 15_000, "cuda") and not trials._pays(setting, 15_000, "cpu")
    assert not trials._pays(replace(setting, epochs=42), 15_000, "cuda") and not trials._pays(setting, 100, "cuda")


@pytest.mark.parametrize("stop_at", [1, 4, 5])
def test_a_stopped_trial_goes_on_with_the_same_bits(folder, tmp_path, undisturbed, stop_at):
    """Stopped between records, at one and after the learning rate has fallen."""
    checkpoint, epochs = tmp_path / "trial.checkpoint", []

    def stop(epoch):
        if epoch == stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        run_trial(MIXUP, data_dir=folder, checkpoint=checkpoint, progress=stop)
    assert torch.load(checkpoint, weights_only=True)["epoch"] == stop_at
    state = torch.load(checkpoint, weights_only=True)
    assert state["seconds"] > 0
    torch.save(state | {"seconds": 1000.0}, checkpoint)
    began = time.perf_counter()
    frame = run_trial(MIXUP, data_dir=folder, checkpoint=checkpoint, progress=epochs.append)
    second = time.perf_counter() - began
    assert epochs == list(range(stop_at + 1, 7))
    assert without_seconds(frame).equals(without_seconds(undisturbed))
    seconds = frame.loc[frame["metric"] == "seconds", "value"].item()
    assert 1000 < seconds <= 1000 + second  # all pieces count


def test_checkpoints_are_written_as_often_as_asked(folder, tmp_path):
    times = []

    def look(epoch):
        file = tmp_path / "t.checkpoint"
        times.append(torch.load(file, weights_only=True)["epoch"] if file.exists() else None)

    run_trial(BASE, data_dir=folder, checkpoint=tmp_path / "t.checkpoint", checkpoint_seconds=0, progress=look)
    assert times == [None, 1, 2, 3, 4, 5]
    run_trial(BASE, data_dir=folder, checkpoint=tmp_path / "u.checkpoint", checkpoint_seconds=3600)
    assert [p.name for p in tmp_path.iterdir()] == ["t.checkpoint"]  # and no part is left behind


def test_rows_are_kept_as_often_as_the_state_and_are_the_first_of_all(folder, tmp_path, undisturbed):
    """After every epoch, after none, and at a stop: right after the state, with the time that they took as last row."""
    parts, epochs = [], []

    def keep(rows):
        parts.append(rows)
        epochs.append(torch.load(tmp_path / "t.checkpoint", weights_only=True)["epoch"])

    run_trial(MIXUP, data_dir=folder, checkpoint=tmp_path / "t.checkpoint", checkpoint_seconds=0, keep=keep)
    assert epochs == [1, 2, 3, 4, 5, 6]
    for epoch, rows in enumerate(parts, start=1):
        first = undisturbed[(undisturbed["epoch"] <= epoch) & ~undisturbed["metric"].isin(["seconds", "diverged"])]
        assert without_seconds(rows).equals(first.reset_index(drop=True))
        assert rows.iloc[-1][["epoch", "metric"]].tolist() == [epoch, "seconds"] and rows.iloc[-1]["value"] > 0

    def stop(epoch):
        if epoch == 2:
            raise Stopped

    kept = []
    run_trial(MIXUP, data_dir=folder, keep=kept.append)  # within a minute
    with pytest.raises(Stopped):
        run_trial(MIXUP, data_dir=folder, progress=stop, keep=kept.append)
    assert len(kept) == 1 and without_seconds(kept[0]).equals(without_seconds(parts[1]))


@pytest.mark.parametrize("damage", ["cut", "foreign", "garbage"])
def test_a_damaged_checkpoint_is_told_of_and_the_trial_starts_again(folder, tmp_path, undisturbed, damage):
    checkpoint = tmp_path / "trial.checkpoint"
    if damage == "foreign":
        run_trial(BASE, data_dir=folder, checkpoint=checkpoint, checkpoint_seconds=0)
    else:
        run_trial(MIXUP, data_dir=folder, checkpoint=checkpoint, checkpoint_seconds=0)
        content = checkpoint.read_bytes()
        checkpoint.write_bytes(content[: len(content) // 2] if damage == "cut" else b"not a checkpoint")
    message = f"is of trial {BASE.key}" if damage == "foreign" else "cannot be read"
    with pytest.warns(UserWarning, match=message):
        frame = run_trial(MIXUP, data_dir=folder, checkpoint=checkpoint)
    assert without_seconds(frame).equals(without_seconds(undisturbed))


def test_a_stopped_teacher_goes_on(folder, tmp_path):
    """Stopped twice while its teacher trains: each time one more of the teacher's epochs is kept."""
    taught, epochs = over_training("smoke")[3], []

    def stop(epoch):
        epochs.append(epoch)
        raise Stopped

    apart = run_trial(taught, data_dir=folder)
    for made in (1, 2):
        with pytest.raises(Stopped):
            run_trial(taught, data_dir=folder, checkpoint=tmp_path / "t.checkpoint", progress=stop)
        kept = tmp_path / f"{taught.teacher.key}.teacher-checkpoint"
        assert torch.load(kept, weights_only=True)["epoch"] == made and epochs == [0] * made
    frame = run_trial(taught, data_dir=folder, checkpoint=tmp_path / "t.checkpoint")
    assert without_seconds(frame).equals(without_seconds(apart)) and not kept.exists()


def test_a_teacher_is_trained_once_and_labels_what_the_student_sees(folder, tmp_path):
    taught = over_training("smoke")[3]
    apart = run_trial(taught, data_dir=folder)
    first = run_trial(taught, data_dir=folder, checkpoint=tmp_path / "a.checkpoint")
    weights = tmp_path / f"{taught.teacher.key}.weights"
    written = weights.stat().st_mtime_ns
    second = run_trial(taught, data_dir=folder, checkpoint=tmp_path / "b.checkpoint")
    assert weights.stat().st_mtime_ns == written
    assert without_seconds(first).equals(without_seconds(second))
    assert without_seconds(first).equals(without_seconds(apart))
    rows = first[first["split"] == "teacher"].set_index("metric")["value"]
    # The teacher has seen five times the student's images; it knows the digits better than by chance, and says so.
    assert rows["test_error"] < 0.6 and {"train_error", "validation_error", "test_loss"} <= set(rows.index)
    mixed = run_trial(MIXUP, data_dir=folder)
    floor = {
        name: frame.loc[frame["metric"] == "running_floor", "value"].to_numpy()
        for name, frame in (("teacher", first), ("mixed", mixed))
    }
    assert not np.allclose(floor["teacher"], floor["mixed"])  # its labels are not the mixed ones
    assert init_generator(0).initial_seed() != init_generator(1).initial_seed()
