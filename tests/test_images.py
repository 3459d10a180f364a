"""Image sets: every layout from small files written here, each way a file can be bad, and the real sets."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from labelaug import _torchvision
from labelaug.data import images
from labelaug.data.images import DataError, DataMissing, load_images
from labelaug.paths import data_dir

NAMES = list(images.LAYOUTS)
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def small_content(name: str) -> dict[str, np.ndarray]:
    """Random images in random order, five of a class to train on and two to test, one image there twice."""
    rng = np.random.default_rng(7)
    shape = (28, 28, 1) if name.endswith("mnist") else (32, 32, 3)
    content = {}
    for part, per_class in (("train", 5), ("test", 2)):
        y = rng.permutation(np.repeat(np.arange(len(images.CLASSES[name])), per_class))
        x = rng.integers(0, 256, (len(y), *shape), dtype=np.uint8)
        first, second = np.flatnonzero(y == 3)[:2]
        x[second] = x[first]
        content |= {f"x_{part}": x, f"y_{part}": y}
    return content


def shuffled(content, seed=0):
    rng, out = np.random.default_rng(seed), {}
    for part in ("train", "test"):
        order = rng.permutation(len(content[f"y_{part}"]))
        out |= {f"{key}_{part}": content[f"{key}_{part}"][order] for key in "xy"}
    return out


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_layout(name, root, content, monkeypatch):
    """torchvision's own files of the set; its MD5 tables are set to the files just written."""
    datasets = _torchvision.load().datasets
    layout = images.LAYOUTS[name]
    kind = getattr(datasets, layout.dataset)
    for file in layout.files + layout.meta:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
    x, y, x_test, y_test = (content[key] for key in ARRAYS)
    if name.startswith("cifar"):
        folder, train, label_key = root / kind.base_folder, [row[0] for row in kind.train_list], "fine_labels"
        if name == "cifar10":
            label_key = "labels"
        batches = [*zip(np.array_split(x, len(train)), np.array_split(y, len(train)), strict=True), (x_test, y_test)]
        for file, (pixels, labels) in zip([*train, kind.test_list[0][0]], batches, strict=True):
            rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)  # a row is red, green, blue, as published
            (folder / file).write_bytes(pickle.dumps({"data": rows, label_key: labels.tolist()}))
        meta = folder / kind.meta["filename"]
        meta.write_bytes(pickle.dumps({kind.meta["key"]: list(images.CLASSES[name])}))
        monkeypatch.setattr(kind, "train_list", [[file, md5(folder / file)] for file in train])
        monkeypatch.setattr(kind, "test_list", [[row[0], md5(folder / row[0])] for row in kind.test_list])
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})
    elif name == "svhn":
        for part in ("train", "test"):
            labels = content[f"y_{part}"].astype(np.uint8)[:, None]
            pixels = content[f"x_{part}"].transpose(1, 2, 3, 0)
            file = root / f"{part}_32x32.mat"
            scipy.io.savemat(file, {"X": pixels, "y": np.where(labels == 0, 10, labels)})  # SVHN calls the digit 0 10
            url = kind.split_list[part][0]
            monkeypatch.setitem(kind.split_list, part, [url, file.name, md5(file)])
    else:
        for file, array in zip(layout.files, (x[..., 0], y, x_test[..., 0], y_test), strict=True):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (root / file).write_bytes(head + array.astype(np.uint8).tobytes())


def write_npz(name, root, content, **extra):
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / f"{name}.npz", **(content | extra))


@pytest.fixture
def small(monkeypatch):
    """The small sets stand in for the published ones, so the published checksums are out of the way."""
    monkeypatch.setattr(images, "CHECKSUMS", {})


@pytest.fixture
def own(tmp_path):
    """A user's own set of three classes, ``own.npz``; returns its arrays."""
    rng = np.random.default_rng(3)
    content = {"y_train": np.repeat([0, 1, 2], 4), "y_test": np.repeat([0, 1, 2], 2)}
    content |= {f"x_{k}": rng.integers(0, 256, (len(content[f"y_{k}"]), 5, 4), np.uint8) for k in ("train", "test")}
    write_npz("own", tmp_path, content)
    return content


def same(a, b) -> bool:
    return a.checksum == b.checksum and all(np.array_equal(getattr(a, key), getattr(b, key)) for key in ARRAYS)


# Reading


@pytest.mark.parametrize("name", NAMES)
def test_two_layouts_are_one_set(name, tmp_path, monkeypatch, small):
    content = small_content(name)
    write_layout(name, tmp_path / "a", content, monkeypatch)
    write_npz(name, tmp_path / "b", shuffled(content))
    a, b = load_images(name, tmp_path / "a"), load_images(name, tmp_path / "b")
    assert same(a, b)
    assert (a.source, b.source) == (images.LAYOUTS[name].source, f"{name}.npz")
    assert a.classes == b.classes == images.CLASSES[name]
    draws = [images.balanced_subset(s.y_train, 2, rng=np.random.default_rng(5)) for s in (a, b)]
    assert np.array_equal(a.x_train[draws[0]], b.x_train[draws[1]])
    # control: in the files' own order the same seed means other images
    raw = [images.balanced_subset(c["y_train"], 2, rng=np.random.default_rng(5)) for c in (content, shuffled(content))]
    assert not np.array_equal(content["x_train"][raw[0]], shuffled(content)["x_train"][raw[1]])


@pytest.mark.parametrize("name", NAMES)
def test_every_image_keeps_its_label_and_split(name, tmp_path, monkeypatch, small):
    content = small_content(name)
    write_layout(name, tmp_path, content, monkeypatch)
    read = load_images(name, tmp_path)
    for part in ("train", "test"):
        x, y = getattr(read, f"x_{part}"), getattr(read, f"y_{part}")
        assert x.dtype == np.uint8 and y.dtype == np.int64 and x.flags.c_contiguous
        expected = zip(content[f"y_{part}"], content[f"x_{part}"], strict=True)
        assert [(k, i.tobytes()) for k, i in zip(y, x, strict=True)] == sorted(
            ((k, i.tobytes()) for k, i in expected), key=lambda pair: (pair[0], hashlib.sha1(pair[1]).hexdigest())
        )


def test_order_and_checksum_do_not_depend_on_the_file(tmp_path, small):
    content = small_content("cifar10")
    for seed in (1, 2):
        write_npz("cifar10", tmp_path / str(seed), shuffled(content, seed))
    one, two = (load_images("cifar10", tmp_path / str(seed)) for seed in (1, 2))
    assert same(one, two)


def test_checksum_sees_everything(tmp_path, own):
    base = load_images("own", tmp_path).checksum
    changes = {
        "pixel": {"x_train": own["x_train"] ^ (np.arange(own["x_train"].size) == 9).reshape(own["x_train"].shape)},
        "label": {"y_train": np.roll(own["y_train"], 1)},
        "shape": {key: own[key].transpose(0, 2, 1).reshape(-1, 10, 2) for key in ("x_train", "x_test")},
        "test": {"x_test": 255 - own["x_test"]},
        "names": {"names": np.array(["a", "b", "c"])},
    }
    seen = {base}
    for what, change in changes.items():
        write_npz("own", tmp_path / what, own | change)
        seen.add(load_images("own", tmp_path / what).checksum)
    assert len(seen) == 1 + len(changes)
    write_npz("own", tmp_path / "again", own | {"y_train": own["y_train"].astype(np.uint8), "note": np.arange(3)})
    assert load_images("own", tmp_path / "again").checksum == base  # the integer's width and other arrays do not count


def test_a_users_own_set(tmp_path, own):
    read = load_images("own", tmp_path)
    assert read.classes == ("0", "1", "2") and read.source == "own.npz" and read.x_train.shape == (12, 5, 4, 1)
    write_npz("own", tmp_path, own, names=np.array(["cat", "dog", "axolotl", "none of these"]))
    assert load_images("own", tmp_path).classes == ("cat", "dog", "axolotl", "none of these")


def test_torchvision_layout_comes_first_and_meta_alone_is_no_set(tmp_path, monkeypatch, small):
    content = small_content("cifar100")
    write_npz("cifar100", tmp_path, content)
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "meta").write_bytes(b"")
    assert load_images("cifar100", tmp_path).source == "cifar100.npz"
    write_layout("cifar100", tmp_path, content, monkeypatch)
    assert load_images("cifar100", tmp_path).source == "cifar-100-python"


def test_reading_opens_no_connection(tmp_path, monkeypatch, small):
    write_layout("mnist", tmp_path, small_content("mnist"), monkeypatch)

    def refuse(*args, **kwargs):
        raise ConnectionRefusedError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_images("mnist", tmp_path)
    with pytest.raises(DataMissing):
        load_images("cifar10", tmp_path)
    with pytest.raises(DataMissing, match="a connection was opened"):  # control: downloading does
        images.download("cifar10", tmp_path)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, original = load_images("digits", "nowhere"), load_digits()
    x = np.concatenate([digits.x_train, digits.x_test])[..., 0]
    y = np.concatenate([digits.y_train, digits.y_test])
    scaled = original.images * 255 / 16
    assert sorted(zip(y, (i.tobytes() for i in x), strict=True)) == sorted(
        zip(original.target, (np.rint(i).astype(np.uint8).tobytes() for i in scaled), strict=True)
    )
    assert len(digits.y_test) == 1797 // 5 and x.max() == 255
    assert np.abs(np.bincount(digits.y_test) - np.bincount(original.target) / 5).max() < 1  # stratified
    assert same(digits, load_images("digits", "elsewhere"))


# What is missing, and what is bad


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_set_says_how_to_get_it(name, tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        with pytest.raises(DataMissing) as error:
            load_images(name, folder)
        assert all(word in str(error.value) for word in (name, str(folder), f"`labelaug data {name}`"))


def test_a_mistyped_name_is_told_the_known_ones(tmp_path):
    with pytest.raises(DataMissing, match=r"cifar-10\.npz.*mnist.*did you mean cifar10\?"):
        load_images("cifar-10", tmp_path)
    with pytest.raises(DataMissing):
        images.download("cifar-10", tmp_path)
    for name in ("../cifar10", "", ".own"):
        with pytest.raises(ValueError, match=f"got '{re.escape(name)}'"):
            load_images(name, tmp_path)


def test_only_a_missing_set_falls_back_to_digits(tmp_path, own):
    read, missing = images.load_or_digits("own", tmp_path)
    assert (read.name, missing) == ("own", None)
    read, missing = images.load_or_digits("cifar10", tmp_path)
    assert read.name == "digits"
    assert all(
        word in missing for word in ("cifar10", str(tmp_path), "digits", "no claim about cifar10 gets a verdict")
    )
    (tmp_path / "own.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:-40])
    with pytest.raises(DataError):
        images.load_or_digits("own", tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "absent"])
def test_a_damaged_layout_is_an_error_and_never_the_npz(name, damage, tmp_path, monkeypatch, small):
    write_layout(name, tmp_path, small_content(name), monkeypatch)
    write_npz(name, tmp_path, small_content(name))
    load_images(name, tmp_path)
    for file in images.LAYOUTS[name].files + images.LAYOUTS[name].meta:
        path = tmp_path / file
        whole = path.read_bytes()
        if damage == "absent":
            path.unlink()
        else:
            path.write_bytes(whole[:-7] if damage == "truncated" else b"")
        with pytest.raises(DataError, match=f"'{name}' is there but cannot be read .*labelaug data {name}") as error:
            images.load_or_digits(name, tmp_path)
        assert "download=True" not in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(whole)
    load_images(name, tmp_path)


def test_torchvision_md5_guards_a_layout(tmp_path, monkeypatch, small):
    write_layout("cifar10", tmp_path, small_content("cifar10"), monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch = pickle.loads(file.read_bytes())
    batch["data"][0, 0] ^= 1
    file.write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match="corrupted"):
        load_images("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_a_published_set_must_have_its_published_content(name, tmp_path, monkeypatch, small):
    """MNIST's raw files and an npz have no MD5: one changed pixel in a well-formed file is caught by the checksum."""
    content = small_content(name)
    write = write_npz if name == "cifar100" else lambda *args: write_layout(*args, monkeypatch)
    write(name, tmp_path, content)
    monkeypatch.setitem(images.CHECKSUMS, name, load_images(name, tmp_path).checksum)
    load_images(name, tmp_path)
    content["x_test"][4, 3, 2, 0] ^= 1
    write(name, tmp_path, content)
    with pytest.raises(DataError, match="is not the published one"):
        images.load_or_digits(name, tmp_path)


BAD_NPZ = {
    "no array y_test": lambda c: {k: v for k, v in c.items() if k != "y_test"},
    "x_train must be uint8": lambda c: c | {"x_train": c["x_train"] / 255},
    "x_test must be uint8": lambda c: c | {"x_test": c["x_test"].reshape(len(c["x_test"]), -1)},
    "n > 0": lambda c: c | {"x_train": c["x_train"][:0], "y_train": c["y_train"][:0]},
    "y_train must be 12 integers": lambda c: c | {"y_train": c["y_train"][1:]},
    "y_test must be 6 integers": lambda c: c | {"y_test": np.eye(3)[c["y_test"]]},
    "y_train must be 12 integers, not float": lambda c: c | {"y_train": c["y_train"] * 1.0},
    "x_train holds images": lambda c: c | {"x_test": c["x_test"][:, 1:]},
    "y_test holds 0..3": lambda c: c | {"y_test": c["y_test"] + (np.arange(6) == 5)},
    "y_train holds -1..2": lambda c: c | {"y_train": c["y_train"] - (np.arange(12) == 0)},
    "y_train holds 0..1152921504606846976": lambda c: c | {"y_train": np.where(c["y_train"] == 2, 2**60, c["y_train"])},
    "y_train holds 0..9223372036854775808,": lambda c: c | {"y_train": c["y_train"].astype(np.uint64) << 62},
    "y_train holds 1..3, not labels 0..2 of 3 classes": lambda c: c | {f"y_{k}": c[f"y_{k}"] + 1 for k in PARTS},
    "not labels 0..1 of 2 classes": lambda c: c | {"names": np.array(["cat", "dog"])},
    "each once": lambda c: c | {"names": np.array(["cat", "dog", "cat"])},
    "names must be a list of strings": lambda c: c | {"names": np.arange(3)},
    "its array x_train is damaged, too large, or holds objects": lambda c: c | {"x_train": c["x_train"].astype(object)},
    "its array names is damaged, too large, or holds objects": lambda c: c | {"names": np.array(["cat", None, 3])},
    "class name '' is not 1 to 60 printable letters": lambda c: c | {"names": np.array(["cat", "", "dog"])},
    "class name 'a\\nb' is not": lambda c: c | {"names": np.array(["a\nb", "cat", "dog"])},
    "class name 'cat ' is not": lambda c: c | {"names": np.array(["cat", "cat ", "dog"])},
    "class name '\\u202ecat' is not": lambda c: c | {"names": np.array(["\u202ecat", "cat", "dog"])},
    f"class name '{60 * 'x'}' is not": lambda c: c | {"names": np.array([61 * "x", "cat", "dog"])},
}
PARTS = ("train", "test")


def with_images(own, *shape):
    """The set with images of this shape, random, in place of its own."""
    rng = np.random.default_rng(4)
    return own | {f"x_{k}": rng.integers(0, 256, (len(own[f"y_{k}"]), *shape), np.uint8) for k in PARTS}


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 6, 6), (3, 32, 30), (3, 4, 4), (3, 3, 3), (8, 8, 2)])
def test_channels_stand_last(shape, tmp_path, own):
    """Channels first, as torch has them, or what could be that, is no image of three rows; nor are there two channels.

    With the channels last the same images are read, but those of 3×3 pixels, which are both.
    """
    content = with_images(own, *shape)
    write_npz("own", tmp_path, content)
    message = rf"x_train must be \[n, H, W, C\].*\[12, {', '.join(map(str, shape))}\]"
    with pytest.raises(DataError, match=message):
        load_images("own", tmp_path)
    write_npz("own", tmp_path, content | {f"x_{k}": content[f"x_{k}"].transpose(0, 2, 3, 1) for k in PARTS})
    if shape[0] < 5 and shape != (3, 3, 3):
        assert load_images("own", tmp_path).x_train.shape == (12, *shape[1:], shape[0])


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3), (8, 9, 4), (4, 4, 3), (3, 4, 1)])
def test_images_of_one_three_or_four_channels_are_read(shape, tmp_path, own):
    content = with_images(own, *shape)
    write_npz("own", tmp_path, content)
    read = load_images("own", tmp_path).x_train
    assert read.shape == (12, *(shape if len(shape) == 3 else (*shape, 1)))
    assert sorted(map(bytes, read)) == sorted(map(bytes, content["x_train"]))


def test_images_with_their_number_last_are_refused(tmp_path, own):
    """As Matlab's files have them: H×W×C×N."""
    content = with_images(own, 32, 32, 3)
    write_npz("own", tmp_path, content | {f"x_{k}": content[f"x_{k}"].transpose(1, 2, 3, 0) for k in PARTS})
    with pytest.raises(DataError, match=r"x_train must be \[n, H, W, C\] .* not \[32, 32, 3, 12\]"):
        load_images("own", tmp_path)


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def huge_header(path):
    """Four arrays whose headers ask for 3 PB and that hold nothing."""
    head = io.BytesIO()
    shape = (10**9, 1000, 1000, 3)
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    zipped(path, {f"{name}.npy": head.getvalue() for name in ARRAYS})


def single_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


NO_NPZ = {
    "a text page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "no whole npz file"),
    "nothing": (lambda path: path.write_bytes(b""), "no whole npz file"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"x_train": 1})), "no whole npz file"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x_train")), "no whole npz file"),
    "one array": (single_array, "no whole npz file"),
    "another zip": (lambda path: zipped(path, {"notes.txt": "x"}), "no array x_train"),
    "text for arrays": (lambda path: zipped(path, dict.fromkeys(ARRAYS, "x")), "x_train in it is no array"),
    "a huge header": (huge_header, "its array x_train is damaged, too large"),
}


@pytest.mark.parametrize("kind", NO_NPZ)
def test_another_file_under_the_name_is_told_in_our_words(kind, tmp_path):
    """NumPy's own advise loading it unsafely."""
    write, sentence = NO_NPZ[kind]
    write(tmp_path / "own.npz")
    with pytest.raises(DataError, match=f"'own' is there but cannot be read .*own.npz.*{sentence}") as caught:
        load_images("own", tmp_path)
    assert not re.search("pickle|unsafe|trust", str(caught.value))


def test_a_truncated_npz_is_told_in_our_words(tmp_path, own):
    whole = (tmp_path / "own.npz").read_bytes()
    for kept in (10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "own.npz").write_bytes(whole[:kept])
        with pytest.raises(DataError, match="no whole npz file"):
            load_images("own", tmp_path)


def test_digits_of_ones_own_are_not_passed_over_in_silence(tmp_path, own):
    load_images("digits", tmp_path)
    write_npz("digits", tmp_path, own)
    with pytest.raises(DataError, match=r"scikit-learn's own, and .*digits\.npz is not read: rename it"):
        load_images("digits", tmp_path)


@pytest.mark.parametrize("sentence", BAD_NPZ)
def test_a_malformed_npz_is_an_error(sentence, tmp_path, own):
    load_images("own", tmp_path)
    np.savez(tmp_path / "own.npz", **BAD_NPZ[sentence](own))
    with pytest.raises(DataError, match=f"'own' is there but cannot be read .*own.npz.*{re.escape(sentence)}"):
        images.load_or_digits("own", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "one byte", "a folder", "a loop"])
def test_a_damaged_npz_is_an_error(damage, tmp_path, own):
    file = tmp_path / "own.npz"
    content = bytearray(file.read_bytes())
    if damage in ("a folder", "a loop"):
        file.unlink()
        file.mkdir() if damage == "a folder" else file.symlink_to(file)
    elif damage == "one byte":
        content[content.index(own["x_train"].tobytes()) + 5] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(DataError, match=r"own\.npz"):
        images.load_or_digits("own", tmp_path)


def test_a_known_sets_npz_cannot_rename_its_classes(tmp_path, small):
    names = list(images.CLASSES["cifar10"])
    write_npz("cifar10", tmp_path, small_content("cifar10"), names=np.array(names))
    load_images("cifar10", tmp_path)
    write_npz("cifar10", tmp_path, small_content("cifar10"), names=np.array(names[::-1]))
    with pytest.raises(DataError, match="truck, ship"):
        load_images("cifar10", tmp_path)


# Downloading


@pytest.fixture
def web(tmp_path, monkeypatch, small):
    """``web(name)`` writes the archives of a set, serves them to torchvision locally, and returns their folder."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield partial(publish, folder=folder, url=f"http://127.0.0.1:{server.server_port}/", monkeypatch=monkeypatch)
        server.shutdown()


def publish(name, folder, url, monkeypatch):
    write_layout(name, folder, small_content(name), monkeypatch)
    layout = images.LAYOUTS[name]
    kind = getattr(_torchvision.load().datasets, layout.dataset)
    if name == "svhn":
        for part in ("train", "test"):
            _, file, checksum = kind.split_list[part]
            monkeypatch.setitem(kind.split_list, part, [url + file, file, checksum])
    elif name == "mnist":
        packed = [folder / (Path(file).name + ".gz") for file in layout.files]
        for file, archive in zip(layout.files, packed, strict=True):
            archive.write_bytes(gzip.compress((folder / file).read_bytes()))
        monkeypatch.setattr(kind, "resources", [(archive.name, md5(archive)) for archive in packed])
        monkeypatch.setattr(kind, "mirrors", [url])
    else:
        with tarfile.open(folder / kind.filename, "w:gz") as archive:
            archive.add(folder / kind.base_folder, kind.base_folder)
        monkeypatch.setattr(kind, "url", url + kind.filename)
        monkeypatch.setattr(kind, "tgz_md5", md5(folder / kind.filename))
    return folder


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "svhn"])
def test_download_fetches_once_and_verifies(name, tmp_path, web, monkeypatch, capsys):
    there, here = web(name), tmp_path / "here" / "data"
    read = images.download(name, here)
    assert "100%" in capsys.readouterr().err  # the bar
    assert same(read, load_images(name, there)) and same(read, load_images(name, here))
    assert {path.name for path in here.iterdir()} == {
        Path(file).parts[0] for file in images.LAYOUTS[name].files
    }  # neither archives nor temporary folders
    before = images.fingerprint([name], here)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert same(images.download(name, here), read) and images.fingerprint([name], here) == before
    assert capsys.readouterr().err == ""


def test_download_leaves_nothing_half_done(tmp_path, web):
    archive, here = web("cifar10") / "cifar-10-python.tar.gz", tmp_path / "here"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-9])
    with pytest.raises(DataMissing, match=r"'cifar10' could not be downloaded .*corrupted.*labelaug data cifar10"):
        images.download("cifar10", here)
    assert list(here.iterdir()) == []
    archive.write_bytes(whole)
    images.download("cifar10", here)
    (here / "cifar-10-batches-py" / "test_batch").write_bytes(b"")
    with pytest.raises(DataError, match="delete it and run"):  # an altered set is reported, not replaced
        images.download("cifar10", here)


# Sub-problems, splits and scale


def test_binary_subset(tmp_path, own):
    write_npz("own", tmp_path, own, names=np.array(["cat", "dog", "axolotl", "unicorn"]))
    read = load_images("own", tmp_path)
    pair = images.binary_subset(read, "axolotl", "cat")
    assert pair.names == ("axolotl", "cat") and pair.labels_train.dtype == np.int64
    assert pair.labels_train.tolist() == [0] * 4 + [1] * 4 and pair.labels_test.tolist() == [0] * 2 + [1] * 2
    assert np.array_equal(pair.x_train, read.x_train[[8, 9, 10, 11, 0, 1, 2, 3]])
    assert np.array_equal(pair.x_test, read.x_test[[4, 5, 0, 1]])
    with pytest.raises(ValueError, match="no class 'axolotol': did you mean axolotl"):
        images.binary_subset(read, "cat", "axolotol")
    with pytest.raises(ValueError, match="no class 'zzz': it has cat, dog, axolotl, unicorn"):
        images.binary_subset(read, "zzz", "cat")
    with pytest.raises(ValueError, match="'dog' twice"):
        images.binary_subset(read, "dog", "dog")
    with pytest.raises(ValueError, match="class 'unicorn' of own has no image in the training part"):
        images.binary_subset(read, "cat", "unicorn")
    write_npz("own", tmp_path, own | {"x_test": own["x_test"][:4], "y_test": own["y_test"][:4]})
    with pytest.raises(ValueError, match="class '2' of own has no image in the test part"):
        images.binary_subset(load_images("own", tmp_path), "0", "2")


def test_balanced_subset():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [30, 20, 50]))
    draw = lambda n, seed=1: images.balanced_subset(labels, n, rng=np.random.default_rng(seed))  # noqa: E731
    for n in (1, 7, 20):
        chosen = draw(n)
        assert np.bincount(labels[chosen]).tolist() == [n] * 3 and (np.diff(chosen) > 0).all()
        assert set(chosen) <= set(draw(20))  # nested
    assert np.array_equal(draw(7), draw(7)) and not np.array_equal(draw(7), draw(7, seed=2))
    with pytest.raises(ValueError, match="class 1 has 20 images, fewer than the 21 needed"):
        draw(21)
    with pytest.raises(ValueError, match="class 1 has 0 images"):
        images.balanced_subset(np.array([0, 2, 0, 2]), 1, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="class 1 has 0 images"):
        images.balanced_subset(np.zeros(9, int), 1, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw(0)


def test_balanced_subset_is_uniform():
    """Each of ten images of a class is in a half with probability 1/2; 4.5 standard errors, false alarm about 1e-4."""
    labels, draws = np.repeat([0, 1], 10), 2000
    rng = np.random.default_rng(0)
    counts = sum(np.bincount(images.balanced_subset(labels, 5, rng=rng), minlength=20) for _ in range(draws))
    assert np.abs(counts / draws - 0.5).max() < 4.5 * np.sqrt(0.25 / draws)


def test_validation_split():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [30, 20, 50]))
    split = lambda fraction, seed=1: images.validation_split(labels, fraction, rng=np.random.default_rng(seed))  # noqa: E731
    train, validation = split(0.2)
    assert np.bincount(labels[validation]).tolist() == [6, 4, 10]
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(100))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    assert np.array_equal(split(0.2)[1], validation) and not np.array_equal(split(0.2, seed=2)[1], validation)
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
            split(fraction)
    with pytest.raises(ValueError, match="takes 0 of the 20 images of class 1"):
        split(0.02)
    with pytest.raises(ValueError, match="takes 20 of the 20 images of class 1"):
        split(0.98)
    with pytest.raises(ValueError, match="class 0 has 1 images"):
        images.validation_split(np.array([0, 1, 1, 1]), 0.5, rng=np.random.default_rng(0))


def test_standardise_against_numpy():
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, [40, 256, 90], (n, 4, 5, 3), dtype=np.uint8) for n in (3, 2))
    got, other = images.standardise(train, test)
    mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
    for x, z in ((train, got), (test, other)):
        assert z.dtype == torch.float32 and z.is_contiguous()
        expected = ((x - mean) / std).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(z.numpy(), expected, rtol=1.2e-7, atol=1e-12)  # one rounding to float32
    assert got.mean((0, 2, 3)).abs().max() < 1e-6 and (got.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    assert other.mean((0, 2, 3)).abs().max() > 1e-2  # control: scaled by the training part, not by itself
    assert (got.var((0, 2, 3), correction=1) - 1).abs().min() > 1e-3  # control: the variance is the biased one


def test_standardise_refuses():
    x = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    constant = x.copy()
    constant[..., 1] = 7
    with pytest.raises(ValueError, match="channel 1 is 7 in every training image"):
        images.standardise(constant, x)
    images.standardise(x, constant)  # constant elsewhere is fine
    with pytest.raises(TypeError, match="uint8, got float64"):
        images.standardise(x, x / 2)
    for bad in (x[0], x[..., :2]):
        with pytest.raises(ValueError, match="common C"):
            images.standardise(x, bad)
    with pytest.raises(ValueError):
        images.standardise(x[:0])


def test_fingerprint_is_of_the_content_of_the_files_that_would_be_read(tmp_path, own):
    first = images.fingerprint(["own"], tmp_path)
    assert re.fullmatch("[0-9a-f]{64}", first)
    os.utime(tmp_path / "own.npz", ns=(1, 1))
    (tmp_path / "notes.txt").write_text("no image file")
    (tmp_path / "unrelated.npz").write_bytes(b"x")
    assert images.fingerprint(["own"], tmp_path) == first
    missing = images.fingerprint(["own"], tmp_path / "not there")
    assert missing == images.fingerprint(["own"], tmp_path / "neither") != first
    seen = {first, missing, images.fingerprint(["own", "unrelated"], tmp_path), images.fingerprint([], tmp_path)}
    content = (tmp_path / "own.npz").read_bytes()
    (tmp_path / "own.npz").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit; same size, same time
    os.utime(tmp_path / "own.npz", ns=(1, 1))
    seen.add(images.fingerprint(["own"], tmp_path))
    assert len(seen) == 5
    assert images.fingerprint(["digits"], tmp_path) == images.fingerprint(["digits"], tmp_path / "not there")


def test_fingerprint_takes_the_layout_that_is_read_before_an_npz(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"x")
    npz = images.fingerprint(["mnist"], tmp_path)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"")
    layout = images.fingerprint(["mnist"], tmp_path)
    (tmp_path / "mnist.npz").write_bytes(b"y")
    assert images.fingerprint(["mnist"], tmp_path) == layout != npz


def test_a_folder_in_place_of_an_image_file_is_one_sentence(tmp_path):
    (tmp_path / "own.npz").mkdir()
    with pytest.raises(DataError, match=r"own.npz is there but cannot be read \(Is a directory\)"):
        images.fingerprint(["own"], tmp_path)


@pytest.mark.parametrize("text", ["mydata", "mydata:cat", "a:b:c:d", ":cat:dog", "mydata::dog", ""])
def test_a_pair_of_another_form_is_refused(text):
    assert images.parse_pair("cifar10:airplane:automobile") == ("cifar10", "airplane", "automobile")
    with pytest.raises(ValueError, match=rf"a pair is written SET:CLASS:CLASS, .* got '{text}'"):
        images.parse_pair(text)


# torchvision beside a torch that its compiled part does not fit

FAKES = {
    "broken": """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: None)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: None)
""",
    "whole": 'import torch\ntorch.library.define("torchvision::nms", "(Tensor whole) -> Tensor")\n',
    "other": 'raise RuntimeError("some other trouble")\n',
}
PROBE = """
import torch
from labelaug import _torchvision
try:
    print(_torchvision.load().__file__)
except RuntimeError as error:
    print(error)
for name in ("nms", "qnms"):
    print(getattr(torch.ops.torchvision, name).default._schema if hasattr(torch.ops.torchvision, name) else None)
"""


@pytest.mark.parametrize("fake", FAKES)
def test_operators_are_declared_only_where_they_are_missing(fake, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(FAKES[fake])

    def python(code):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    done = python(PROBE)
    assert done.returncode == 0, done.stderr
    result, nms, qnms = done.stdout.splitlines()
    if fake == "broken":
        assert "operator torchvision::nms does not exist" in python("import torchvision").stderr  # control
        assert str(tmp_path) in result and "float iou_threshold" in nms and "float iou_threshold" in qnms
    elif fake == "whole":
        assert str(tmp_path) in result and "Tensor whole" in nms and qnms == "None"
    else:
        assert (result, nms, qnms) == ("some other trouble", "None", "None")


def test_mixup_of_torchvision_works():
    _torchvision.load()
    from torchvision.transforms.v2 import MixUp

    torch.manual_seed(0)
    x, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    mixed, targets = MixUp(alpha=1.0, num_classes=4)(x, labels)
    lam = targets[0, 0]
    assert 0.01 < lam < 0.99
    torch.testing.assert_close(mixed, lam * x + (1 - lam) * x.roll(1, 0))
    torch.testing.assert_close(targets, lam * torch.eye(4) + (1 - lam) * torch.eye(4).roll(1, 0))


# The real sets


@cache
def real(name):
    return load_images(name, data_dir())


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("cifar10", 5000, 1000), ("cifar100", 500, 100), ("fashion-mnist", 6000, 1000)],
)
def test_real_sets_are_balanced(name, train, test):
    read = real(name)
    assert set(np.bincount(read.y_train)) == {train} and set(np.bincount(read.y_test)) == {test}
    assert len(read.classes) == len(np.bincount(read.y_train))
    assert read.checksum == images.CHECKSUMS[name]


@pytest.mark.data
def test_real_mnist_has_its_known_counts():
    """Counts per digit of LeCun's training and test part."""
    read = real("mnist")
    assert np.bincount(read.y_train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(read.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert read.checksum == images.CHECKSUMS["mnist"]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "means", "stds"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ("mnist", (0.1307,), (0.3081,)),
        ("fashion-mnist", (0.2860,), (0.3530,)),
    ],
)
def test_real_channels_have_their_known_scale(name, means, stds):
    """The constants that everybody's code quotes, to their four digits: pixels, channels and split are right."""
    x = real(name).x_train
    for channel, (mean, std) in enumerate(zip(means, stds, strict=True)):
        first, second = x[..., channel].mean(), np.square(x[..., channel], dtype=np.uint32).mean()
        assert abs(first / 255 - mean) < 1e-4 and abs(np.sqrt(second - first**2) / 255 - std) < 1e-4


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "pair", "train", "test"),
    [("cifar10", ("airplane", "automobile"), 10_000, 2_000), ("cifar100", ("apple", "aquarium_fish"), 1_000, 200)],
)
def test_real_pairs(name, pair, train, test):
    subset = images.binary_subset(real(name), *pair)
    assert (len(subset.x_train), len(subset.x_test)) == (train, test)
    assert (subset.labels_train.mean(), subset.labels_test.mean()) == (0.5, 0.5)
    z, z_test = images.standardise(subset.x_train, subset.x_test)
    assert z.mean((0, 2, 3), dtype=torch.double).abs().max() < 1e-6 and z_test.shape == (test, 3, 32, 32)


@pytest.mark.data
def test_an_altered_real_npz_is_refused(tmp_path):
    read = real("cifar100")
    content = {key: getattr(read, key) for key in ARRAYS}
    write_npz("cifar100", tmp_path, shuffled(content))
    assert load_images("cifar100", tmp_path).checksum == read.checksum
    content["x_train"] = content["x_train"].copy()
    content["x_train"][31_415, 9, 2, 1] ^= 1
    write_npz("cifar100", tmp_path, content)
    with pytest.raises(DataError, match="is not the published one"):
        load_images("cifar100", tmp_path)
