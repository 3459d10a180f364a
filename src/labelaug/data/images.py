"""Real images in one canonical order, so that a seed means the same subset whichever file they were read from.

A set is read from the data folder in torchvision's own layout, else from ``NAME.npz``; reading never uses the network.
Within each split the order is: label, then SHA-1 of the pixel bytes (H×W×C, uint8). Images that agree in both are
identical, so that their order means nothing.
"""

import difflib
import hashlib
import http.client
import json
import os
import re
import socket
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from labelaug import _torchvision

TIMEOUT = 30.0  # seconds without an answer after which a download is given up
CHANNELS = (1, 3, 4)  # that the last axis of images may have: grey, colour, and colour with a fourth
LONGEST_NAME = 60  # letters of a class name, which stands in captions and legends


class DataMissing(FileNotFoundError):
    """The image set is not in the data folder."""


class DataError(RuntimeError):
    """The image set is in the data folder and cannot be read, or is not what it should be."""


@dataclass(frozen=True)
class _Layout:
    """Where torchvision keeps a set: its class there, the layout's name, and its files relative to the data folder."""

    dataset: str
    source: str
    files: tuple[str, ...]
    meta: tuple[str, ...] = ()

    def open(self, root: Path, *, train: bool, download: bool = False):
        """torchvision's data set of one split; torchvision checks the MD5 of the files for which it has one."""
        split = {"split": "train" if train else "test"} if self.dataset == "SVHN" else {"train": train}
        return getattr(_torchvision.load().datasets, self.dataset)(root, download=download, **split)


def _in(folder: str, *files: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{file}" for file in files)


_IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
_CIFAR10 = "cifar-10-batches-py"
_CIFAR100 = "cifar-100-python"
LAYOUTS = {
    "cifar10": _Layout(
        "CIFAR10",
        _CIFAR10,
        _in(_CIFAR10, *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
        _in(_CIFAR10, "batches.meta"),
    ),
    "cifar100": _Layout("CIFAR100", _CIFAR100, _in(_CIFAR100, "train", "test"), _in(_CIFAR100, "meta")),
    "mnist": _Layout("MNIST", "MNIST/raw", _in("MNIST/raw", *_IDX)),
    "fashion-mnist": _Layout("FashionMNIST", "FashionMNIST/raw", _in("FashionMNIST/raw", *_IDX)),
    "svhn": _Layout("SVHN", "{train,test}_32x32.mat", ("train_32x32.mat", "test_32x32.mat")),
}

_DIGITS = tuple("0123456789")
CLASSES = {
    "cifar10": tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "cifar100": tuple(
        """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
    ),
    "mnist": _DIGITS,
    "fashion-mnist": tuple("T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")),
    "svhn": _DIGITS,
    "digits": _DIGITS,
}

# Checksums of the published sets, as `ImageSet.checksum` computes them (SVHN is guarded by torchvision's MD5 alone).
CHECKSUMS = {
    "cifar10": "5f07cf2540a34a5f933213c11dd0b9c662bb29f245c4cbbda130a6bf5cd9ff72",
    "cifar100": "c1a0a2ad98012c8038c5f863653c8639e87b3d94d5c9aaa5046976a3a8c39ca9",
    "mnist": "5767097eebf512eb706aad20ae6dc53b4b7e0e201e3a3095ed3a5c6d6c48eefa",
    "fashion-mnist": "8fe94643b97d7c3c865fa5d0c1245ef6d25e93b8b397a5e7b6243df6dadadfd2",
}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An image set in canonical order: x uint8 ``[n, H, W, C]``, y int64 ``[n]`` in 0..len(classes)-1.

    ``checksum`` is the SHA-256 (hex) of classes, shapes, pixels and labels in canonical order, whatever file they came
    from; ``source`` is that file's layout, such as ``cifar-10-batches-py`` or ``cifar100.npz``.
    """

    name: str
    classes: tuple[str, ...]
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    checksum: str
    source: str


@dataclass(frozen=True, eq=False)
class BinarySet:
    """Two classes of an image set: x uint8 ``[n, H, W, C]``, labels int64 ``[n]`` (0 = names[0], 1 = names[1])."""

    names: tuple[str, str]
    x_train: np.ndarray = field(repr=False)
    labels_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    labels_test: np.ndarray = field(repr=False)


def check_name(name: str) -> None:
    """Raise ValueError for a name that cannot be a file's."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"an image set's name is made of letters, digits, '-', '_' and '.', got {name!r}")


def load_images(name: str, data_dir: str | Path) -> ImageSet:
    """The image set ``name`` of the folder, in canonical order, checked; never uses the network.

    Names: cifar10, cifar100, mnist, fashion-mnist, svhn (torchvision's layout first, else ``NAME.npz``), any other
    ``NAME.npz``, and ``digits``, scikit-learn's built-in 8×8 images, which need no file. An npz file holds
    ``x_train, x_test`` (uint8 ``[n, H, W, C]`` or ``[n, H, W]``), ``y_train, y_test`` (integers ``[n]``, 0..K-1) and,
    where the classes have names, ``names`` (K strings); without names, K is the number of labels used in ``y_train``.
    C is 1, 3 or 4. What could as well be ``[n, C, H, W]``, with a second axis of 1, 3 or 4 and two equal ones behind
    it, is refused. Names differ from each other, are printable and have 1 to 60 letters, the first and last no space.

    Raises: ValueError for a name that cannot be a file's; DataMissing if the set is not there; DataError if it is there
    and truncated, altered, malformed or, for a published set, not the published content.
    """
    check_name(name)
    folder = Path(data_dir).expanduser()
    if name == "digits":
        if _stat(folder / "digits.npz"):
            raise DataError(f"'digits' are scikit-learn's own, and {folder / 'digits.npz'} is not read: rename it")
        return _canonical(name, "scikit-learn's digits", *_read_digits())
    layout, npz = LAYOUTS.get(name), folder / f"{name}.npz"
    if _has_layout(name, folder):
        _torchvision.load()  # outside the guard below: a torchvision that does not import is no fault of the data
        where, source, read = folder / layout.source, layout.source, partial(_read_layout, layout, folder)
    elif _stat(npz):
        where, source, read = npz, npz.name, partial(_read_npz, npz)
    else:
        raise DataMissing(_missing(name, folder))

    cure = f"delete it and run `labelaug data {name}`" if layout else "write the file again"
    try:
        images = _canonical(name, source, *read())
    except Exception as error:  # readers of damaged files raise nearly anything; all of it means the same here
        raise DataError(f"image set {name!r} is there but cannot be read ({where}: {_brief(error)}); {cure}") from error
    if images.checksum != CHECKSUMS.get(name, images.checksum):
        raise DataError(
            f"image set {name!r} in {where} is not the published one (its checksum is {images.checksum[:12]}…, not "
            f"{CHECKSUMS[name][:12]}…); {cure}"
        )
    return images


def is_there(name: str, data_dir: str | Path) -> bool:
    """Whether `load_images` would find files to read; reads none of them."""
    folder = Path(data_dir).expanduser()
    return name == "digits" or _has_layout(name, folder) or _stat(folder / f"{name}.npz") is not None


def load_or_digits(name: str, data_dir: str | Path) -> tuple[ImageSet, str | None]:
    """The image set and None; where it is missing, ``digits`` and one sentence for the section's banner.

    Raises: as `load_images`, DataMissing apart: a set that is there and cannot be read is never replaced.
    """
    try:
        return load_images(name, data_dir), None
    except DataMissing as error:
        return load_images("digits", data_dir), (
            f"The {error}; until then this section runs on scikit-learn's 8×8 digits, and no claim about {name} gets a "
            "verdict."
        )


def download(name: str, data_dir: str | Path) -> ImageSet:
    """Verify the set if it is there; else fetch it through torchvision (progress bar on stderr), then verify it.

    The files appear in the folder only when all of them have arrived and passed torchvision's MD5.
    Raises: DataMissing if the set cannot be fetched; DataError if it is there and does not pass.
    """
    try:
        return load_images(name, data_dir)
    except DataMissing:
        if name not in LAYOUTS:
            raise
    folder, layout = Path(data_dir).expanduser(), LAYOUTS[name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none: a network that drops packets would hold us for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as arrived:
            for train in (True, False):
                layout.open(arrived, train=train, download=True)
            for file in layout.files + layout.meta:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(arrived) / file, folder / file)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise DataMissing(
            f"image set {name!r} could not be downloaded to {folder} ({_brief(error)}): "
            f"connect to the network and run `labelaug data {name}` again, or put its files there"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return load_images(name, folder)


def fingerprint(names: Iterable[str], data_dir: str | Path) -> str:
    """SHA-256 (hex) of the files that `load_images` would read for these sets: which they are, and their content.

    A set that is not there counts as missing; ``digits`` has no file.
    Raises: DataError if a file is there and cannot be read.
    """
    folder = Path(data_dir).expanduser()
    found = {}
    for name in names:
        layout = LAYOUTS[name].files + LAYOUTS[name].meta if _has_layout(name, folder) else (f"{name}.npz",)
        found[name] = {file: _content(folder / file) for file in layout if name != "digits"}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _content(path: Path) -> str | None:
    """SHA-256 of a file, read again when anything about it has changed, the time of the change included."""
    stat = _stat(path)
    return stat and _hashed(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _hashed(path: Path, *state: int) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} is there but cannot be read ({error.strerror}); check its permissions") from error


def parse_pair(text: str) -> tuple[str, str, str]:
    """Image set, negative and positive class of ``SET:CLASS:CLASS``.

    Raises: ValueError for any other form.
    """
    parts = text.split(":")
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"a pair is written SET:CLASS:CLASS, as in cifar10:airplane:automobile, got {text!r}")
    return tuple(parts)


def binary_subset(images: ImageSet, negative: str, positive: str) -> BinarySet:
    """The two named classes with labels 0 (``negative``) and 1 (``positive``), in canonical order of these labels.

    Raises: ValueError for an unknown name, the same name twice, or a class with no image in one of the splits.
    """
    if negative == positive:
        raise ValueError(f"a binary problem needs two different classes, got {negative!r} twice")
    for name in (negative, positive):
        if name not in images.classes:
            close = difflib.get_close_matches(name, images.classes)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(images.classes)}"
            raise ValueError(f"{images.name} has no class {name!r}: {hint}")

    def pick(x, y, split):
        parts = [x[y == images.classes.index(name)] for name in (negative, positive)]
        for part, name in zip(parts, (negative, positive), strict=True):
            if len(part) == 0:
                raise ValueError(f"class {name!r} of {images.name} has no image in the {split} part")
        return np.concatenate(parts), np.repeat(np.arange(2), [len(part) for part in parts])

    return BinarySet(
        (negative, positive),
        *pick(images.x_train, images.y_train, "training"),
        *pick(images.x_test, images.y_test, "test"),
    )


def balanced_subset(labels: np.ndarray, per_class: int, *, rng: np.random.Generator) -> np.ndarray:
    """Indices ``[classes · per_class]``, ascending, of a draw without replacement from each class 0..max(labels).

    From the same state of ``rng`` a smaller subset is part of every larger one.
    Raises: ValueError if per_class < 1, there is one class only, or a class has fewer images than per_class.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    return np.sort(np.concatenate([members[:per_class] for members in _shuffled_classes(labels, per_class, rng)]))


def validation_split(labels: np.ndarray, fraction: float, *, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation) of the training part, ascending: round(fraction · n_k) of class k's n_k validate.

    Raises: ValueError if fraction is not inside (0, 1), there is one class only, or a class would miss in either part.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the validation fraction must lie inside (0, 1), got {fraction}")
    train, validation = [], []
    for code, members in enumerate(_shuffled_classes(labels, 2, rng)):
        held_out = round(fraction * len(members))
        if not 0 < held_out < len(members):
            raise ValueError(
                f"a validation fraction of {fraction} takes {held_out} of the {len(members)} images of class {code}, "
                "but each part needs at least one"
            )
        validation.append(members[:held_out])
        train.append(members[held_out:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(validation))


def standardise(x_train: np.ndarray, *others: np.ndarray) -> list[torch.Tensor]:
    """Each array, uint8 ``[n, H, W, C]``, as float32 ``[n, C, H, W]`` with (x - mean_c)/std_c, both from ``x_train``.

    Mean and variance are over the n·H·W pixels of a channel, the variance biased (divided by n·H·W), so that each
    channel of the first tensor has mean 0 and variance 1; a value is rounded once, from float64.
    Raises: TypeError if an array is not uint8; ValueError on a wrong shape or a channel constant in ``x_train``.
    """
    for x in (x_train, *others):
        if x.dtype != np.uint8:
            raise TypeError(f"images to standardise must be uint8, got {x.dtype}")
        if x.ndim != 4 or x.shape[3] != x_train.shape[3] or len(x_train) == 0:
            raise ValueError(f"images to standardise must be [n, H, W, C] with a common C, got {list(x.shape)}")
    values, tables = np.arange(256.0), []
    for channel in range(x_train.shape[3]):
        weight = torch.bincount(torch.from_numpy(x_train[..., channel].ravel()), minlength=256).numpy()
        mean = weight @ values / weight.sum()
        variance = weight @ (values - mean) ** 2 / weight.sum()
        if variance == 0:
            raise ValueError(f"channel {channel} is {mean:.0f} in every training image: it cannot have variance 1")
        tables.append(((values - mean) / np.sqrt(variance)).astype(np.float32))
    standardised = []
    for x in (x_train, *others):
        out = np.empty((x.shape[0], x.shape[3], *x.shape[1:3]), np.float32)
        for channel, table in enumerate(tables):
            out[:, channel] = table[x[..., channel]]
        standardised.append(torch.from_numpy(out))
    return standardised


def _has_layout(name: str, folder: Path) -> bool:
    layout = LAYOUTS.get(name)
    return layout is not None and any(_stat(folder / file) for file in layout.files)


def _stat(path: Path) -> os.stat_result | None:
    """None where there is nothing; an entry that cannot be looked at is not nothing."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} is there but cannot be read ({error.strerror}); check its permissions") from error


def _brief(error: Exception) -> str:
    """Kind and first line of an error, without torchvision's advice to download what is there."""
    line = str(error).partition(". You can use download=True")[0].partition("\n")[0].rstrip(".: ")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _missing(name: str, folder: Path) -> str:
    if name in LAYOUTS:
        return f"image set {name!r} is not in {folder}: get it with `labelaug data {name}` or point LABELAUG_DATA at it"
    close = difflib.get_close_matches(name, LAYOUTS, 1)
    return (
        f"image set {name!r} is not in {folder}: it needs a file {name}.npz there, for `labelaug data` knows only "
        f"{', '.join(LAYOUTS)}" + (f" (did you mean {close[0]}?)" if close else "")
    )


def _shuffled_classes(labels: np.ndarray, least: int, rng: np.random.Generator) -> list[np.ndarray]:
    counts = np.bincount(labels, minlength=2)
    if counts.min() < least:
        code = counts.argmin()
        raise ValueError(f"class {code} has {counts[code]} images, fewer than the {least} needed")
    return [rng.permutation(np.flatnonzero(labels == code)) for code in range(len(counts))]


def _read_layout(layout: _Layout, folder: Path) -> tuple:
    for file in layout.files + layout.meta:
        if not _stat(folder / file):
            raise ValueError(f"{file} is missing")
    names, arrays = None, []
    for train in (True, False):
        split = layout.open(folder, train=train)
        if layout.dataset == "SVHN":
            arrays += [split.data.transpose(0, 2, 3, 1), split.labels]
        else:
            arrays += [np.asarray(split.data), np.asarray(split.targets)]
        if layout.meta:
            names = tuple(split.classes)
    return names, *arrays


def _read_npz(path: Path) -> tuple:
    with open(path, "rb") as stream:
        if not zipfile.is_zipfile(stream):  # NumPy would take it for a pickle, and advise to load it
            raise ValueError("it is no whole npz file, as numpy.savez writes it")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
            names = None
            if "names" in file:
                names = _array(file, "names")
                if names.dtype.kind != "U" or names.ndim != 1:
                    raise ValueError(f"names must be a list of strings, not {names.dtype} {list(names.shape)}")
                names = tuple(names.tolist())
            return names, *(_array(file, key) for key in ("x_train", "y_train", "x_test", "y_test"))


def _array(file, key: str) -> np.ndarray:
    """One array of an open npz file; what is none is told in our words, for NumPy's advise to load it unsafely."""
    if key not in file:
        raise ValueError(f"it has no array {key}")
    try:
        array = file[key]
    except Exception as error:  # objects, a header that cannot be, a wrong checksum: nearly anything is raised
        raise ValueError(f"its array {key} is damaged, too large, or holds objects in place of numbers") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{key} in it is no array")
    return array


def _read_digits() -> tuple:
    """scikit-learn's digits, 0..16 scaled to 0..255 and rounded; every fifth in canonical order is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = _in_order(np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target)
    test = np.arange(len(y)) % 5 == 4
    return None, x[~test], y[~test], x[test], y[test]


def _canonical(name, source, names, x_train, y_train, x_test, y_test) -> ImageSet:
    """Check the four arrays, order them, and compute the checksum; ValueError says what is wrong with them."""
    x_train, y_train = _checked("train", x_train, y_train)
    x_test, y_test = _checked("test", x_test, y_test)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"x_train holds images {x_train.shape[1:]}, x_test {x_test.shape[1:]}")
    classes = CLASSES.get(name) or names or tuple(str(code) for code in range(len(np.unique(y_train))))
    for word in classes:
        if not word.isprintable() or word.strip() != word or not 0 < len(word) <= LONGEST_NAME:
            raise ValueError(f"the class name {word[:LONGEST_NAME]!r} is not 1 to {LONGEST_NAME} printable letters")
    if names not in (None, classes) or len(set(classes)) != len(classes):
        raise ValueError(f"its class names ({', '.join(names[:3])}, …) are not those of {name}, each once")
    for part, y in (("train", y_train), ("test", y_test)):
        if y.min() < 0 or y.max() >= len(classes):
            raise ValueError(
                f"y_{part} holds {y.min()}..{y.max()}, not labels 0..{len(classes) - 1} of {len(classes)} classes"
            )

    arrays = (*_in_order(x_train, y_train), *_in_order(x_test, y_test))
    digest = hashlib.sha256(json.dumps([classes, x_train.shape, x_test.shape]).encode())
    for array in arrays:
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return ImageSet(name, classes, *arrays, digest.hexdigest(), source)


def _checked(part: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.size == 0:
        raise ValueError(f"x_{part} must be uint8 [n, H, W, C] or [n, H, W], n > 0, not {x.dtype} {list(x.shape)}")
    if x.ndim == 4 and x.shape[3] not in CHANNELS:
        raise ValueError(f"x_{part} must be [n, H, W, C] with C = 1, 3 or 4 channels last, not {list(x.shape)}")
    if x.ndim == 4 and x.shape[1] in CHANNELS and x.shape[2] == x.shape[3]:
        raise ValueError(f"x_{part} must be [n, H, W, C], and {list(x.shape)} could be [n, C, H, W]")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ValueError(f"y_{part} must be {len(x)} integers, not {y.dtype} {list(y.shape)}")
    return x if x.ndim == 4 else x[..., None], y


def _in_order(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort images ``[n, H, W, C]`` by label, then SHA-1 of their bytes; labels come back as int64."""
    out = np.empty(x.shape, np.uint8)  # C order; channel by channel is three times faster than ascontiguousarray
    x = np.stack([x[..., channel] for channel in range(x.shape[3])], axis=-1, out=out)
    hashes = (hashlib.sha1(image, usedforsecurity=False).digest() for image in x)
    keys = list(zip(y.tolist(), hashes, strict=True))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return x[order], y[order].astype(np.int64)
