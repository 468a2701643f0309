"""From a name to arrays: `load("cifar10")`, `load("path/to/my.npz")`.

Everything that comes out has been checked: uint8 images `[N, H, W, C]`, int32 labels
in range, nothing empty. Where the files lie and what they may look like: docs/data.md.
"""

import difflib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robustjax.data import formats


class Dataset(NamedTuple):
    """A data set in host memory.

    name:        as given to `load`.
    x_train:     `[N, H, W, C]` uint8, values 0 to `max_value`.
    y_train:     `[N]` int32, values 0 to `num_classes - 1`.
    x_test:      `[M, H, W, C]` uint8.
    y_test:      `[M]` int32.
    num_classes: how many classes there are.
    source:      a sentence for reports: where it came from and how many examples.
    max_value:   the pixel value that stands for 1.0: 255, or 16 for `digits`.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    source: str
    max_value: int = 255


class Known(NamedTuple):
    """What a public set must be. `labels_md5`: of the test labels, one byte each."""

    title: str
    shape: tuple[int, int, int]
    num_classes: int
    num_train: int
    num_test: int
    labels_md5: str = ""


KNOWN = {
    "digits": Known("UCI digits", (8, 8, 1), 10, 1437, 360),
    "mnist": Known(
        "MNIST", (28, 28, 1), 10, 60_000, 10_000, "073c3904dfbd3e141ff8aa01cfde6b15"
    ),
    "fashion_mnist": Known(
        "Fashion-MNIST",
        (28, 28, 1),
        10,
        60_000,
        10_000,
        "8dea97a4e78c1bd1b5a6e8efbb870b6e",
    ),
    "cifar10": Known("CIFAR-10", (32, 32, 3), 10, 50_000, 10_000),
    "cifar100": Known("CIFAR-100", (32, 32, 3), 100, 50_000, 10_000),
    "svhn_cropped": Known("SVHN", (32, 32, 3), 10, 73_257, 26_032),
}


def default_data_dir() -> Path:
    """Return `$ROBUSTJAX_DATA_DIR`, or `~/.robustjax/data` where that is not set."""
    given = os.environ.get("ROBUSTJAX_DATA_DIR")
    return Path(given).expanduser() if given else Path.home() / ".robustjax" / "data"


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set by name, or from a file or folder of your own.

    `digits` is embedded in the package. Any other name is looked for in `data_dir`,
    in this order: `NAME.npz`; IDX files in `NAME/` or in `data_dir` itself; an image
    folder `NAME/{train,test}/CLASS/*.png`; `NAME/VERSION`, prepared by TensorFlow
    Datasets as ArrayRecord (`scripts/prepare_data NAME`).

    Args:
      name: `digits`, `mnist`, `fashion_mnist`, `cifar10`, `cifar100`,
        `svhn_cropped`, the name of a set of your own in `data_dir`, or a path to an
        `.npz` or a folder.
      data_dir: where data sets lie; None: see `default_data_dir`.

    Returns:
      The checked data set.

    Raises:
      FileNotFoundError: nothing was found; says what was looked for and what helps.
      ValueError: a file is truncated, foreign, empty, or its labels out of range.

    >>> digits = load("digits")
    >>> digits.x_train.shape, digits.num_classes, digits.max_value
    ((1437, 8, 8, 1), 10, 16)
    """
    if not name:
        raise ValueError(f"name is empty. Known names: {', '.join(KNOWN)}.")
    if name == "digits":
        arrays = formats.read_npz(Path(__file__).parent / "digits.npz")
        return check(name, arrays, "the package")
    if name.endswith(".npz") or os.sep in name or name.startswith("~"):
        path = Path(name).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist (name={name!r}).")
        found = _read(path.with_suffix("") if path.is_file() else path)
        if path.is_file() and path.suffix != ".npz":
            raise ValueError(f"{path} is no .npz and no folder (name={name!r}).")
        name = path.name.removesuffix(".npz")
    else:
        folder = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
        found = _read(folder / name)
        idx = formats.find_idx(formats.list_files(folder))
        if found is None and idx:
            found = formats.read_idx_files(idx), f"IDX files in {folder.name}", ()
        if found is None:
            raise FileNotFoundError(_missing(name, folder))
    if found is None:
        raise FileNotFoundError(
            f"{name} holds no data set: no IDX files, no train/ and test/ folders of "
            "images, no version folder of TensorFlow Datasets."
        )
    arrays, origin, classes = found
    return check(name, arrays, origin, classes)


def check(
    name: str,
    arrays: formats.Arrays,
    origin: str,
    classes: tuple[str, ...] = (),
) -> Dataset:
    """Check arrays and make them a `Dataset`.

    Images may be `[N, H, W]`, labels `[N, 1]`; float images in [0, 1] are accepted
    where they are multiples of 1/255, and converted without loss.

    Args:
      name: a public name, whose shape and size are then required, or any other.
      arrays: images and labels of both splits.
      origin: where they came from, for messages and for `Dataset.source`.
      classes: names of the classes, where they are known.

    Returns:
      The data set.

    Raises:
      ValueError: says what is wrong, in which array, and what would help.
    """
    known = KNOWN.get(name)
    max_value = 255 if arrays.max_value is None else arrays.max_value
    if not 1 <= max_value <= 255:
        raise ValueError(f"max_value is {max_value} in {origin}; it must be 1 to 255.")
    converted = False
    images, labels = {}, {}
    for split, x, y in (
        ("train", arrays.x_train, arrays.y_train),
        ("test", arrays.x_test, arrays.y_test),
    ):
        converted |= np.issubdtype(x.dtype, np.floating)
        images[split] = _images(x, f"x_{split}", origin, max_value)
        labels[split] = _labels(y, f"y_{split}", origin)
        if len(x) != len(labels[split]):
            raise ValueError(
                f"x_{split} has {len(x):,} images and y_{split} {len(y):,} labels in "
                f"{origin}; every image needs one label."
            )
    largest = max(int(x.max()) for x in images.values())
    if largest <= 1 < max_value:
        raise ValueError(
            f"The largest pixel in {origin} is {largest}: uint8 images go from 0 to "
            f"{max_value}. Images scaled to 0..1 must be multiplied by 255 first "
            "(or say so: store max_value=1 in the npz)."
        )
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise ValueError(
            f"Training images are {images['train'].shape[1:]} and test images "
            f"{images['test'].shape[1:]} in {origin}; both need one shape."
        )
    num_classes = 1 + max(int(y.max()) for y in labels.values())
    if known is not None:
        _check_known(name, known, images, labels, origin)
        num_classes = known.num_classes
    elif classes:
        num_classes = len(classes)
    num_train, num_test = len(images["train"]), len(images["test"])
    source = (
        f"{known.title if known else name} from {origin}: {num_train:,} training and "
        f"{num_test:,} test images"
    )
    if known and (num_train, num_test) != (known.num_train, known.num_test):
        source += f" (the full set has {known.num_train:,} and {known.num_test:,})"
    if converted:
        source += ", converted from float to uint8 without loss"
    return Dataset(
        name,
        images["train"],
        labels["train"],
        images["test"],
        labels["test"],
        num_classes,
        source,
        max_value,
    )


def _read(base: Path) -> tuple[formats.Arrays, str, tuple[str, ...]] | None:
    """Read what lies at `base.npz` or in the folder `base`; None: nothing does."""
    npz = base.with_name(base.name + ".npz")
    if npz.is_file():
        return formats.read_npz(npz), npz.name, ()
    idx = formats.find_idx(formats.list_files(base))
    if idx:
        return formats.read_idx_files(idx), f"IDX files in {base.name}", ()
    if (base / "train").is_dir() or (base / "test").is_dir():
        arrays, classes = formats.read_image_folder(base)
        return arrays, f"the image folder {base.name}", classes
    version = (
        base if (base / "dataset_info.json").is_file() else formats.find_tfds(base)
    )
    if version is not None:
        arrays, ordered = formats.read_tfds(version)
        origin = f"TFDS ArrayRecord {version.parent.name}/{version.name}"
        return arrays, origin + ("" if ordered else " in TFDS's shuffled order"), ()
    return None


def _images(x: np.ndarray, what: str, origin: str, max_value: int) -> np.ndarray:
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(
            f"{what} has shape {x.shape} in {origin}; images are [N, H, W, C] or "
            "[N, H, W], with at least one example."
        )
    x = x[..., None] if x.ndim == 3 else x
    if x.shape[1] in (1, 3) and x.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{what} has shape {x.shape} in {origin}: channels come last here. "
            f"Transpose it: {what}.transpose(0, 2, 3, 1)."
        )
    if np.issubdtype(x.dtype, np.floating):
        pixels = np.round(x * np.float32(max_value))
        inside = bool(np.isfinite(x).all()) and x.min() >= 0 and x.max() <= 1
        if not inside or np.abs(x * np.float32(max_value) - pixels).max() > 1e-3:
            raise ValueError(
                f"{what} is {x.dtype} with values from {x.min():.4g} to {x.max():.4g} "
                f"in {origin}. Images are uint8; floats are taken only when they are "
                f"multiples of 1/{max_value} in [0, 1]. Undo any normalization and "
                "save uint8."
            )
        x = pixels
    elif not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"{what} is {x.dtype} in {origin}; images are uint8.")
    if x.min() < 0 or x.max() > max_value:
        raise ValueError(
            f"{what} has values from {x.min()} to {x.max()} in {origin}; pixels are 0 "
            f"to {max_value}."
        )
    return np.ascontiguousarray(x.astype(np.uint8))


def _labels(y: np.ndarray, what: str, origin: str) -> np.ndarray:
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1:
        raise ValueError(
            f"{what} has shape {y.shape} in {origin}; labels are [N] integers. "
            f"One-hot labels: save {what}.argmax(-1)."
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{what} is {y.dtype} in {origin}; labels are integers.")
    if len(y) and y.min() < 0:
        raise ValueError(
            f"{what} has the label {y.min()} in {origin}; labels start at 0."
        )
    return y.astype(np.int32)


def _check_known(
    name: str,
    known: Known,
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    origin: str,
) -> None:
    most = {"train": known.num_train, "test": known.num_test}
    for split, x in images.items():
        if x.shape[1:] != known.shape or len(x) > most[split]:
            raise ValueError(
                f"{origin} is not {known.title}: x_{split} has shape {x.shape}, the "
                f"real one ({most[split]}, {', '.join(map(str, known.shape))}). If it "
                "is a set of your own, give it a name of its own."
            )
        largest = int(labels[split].max())
        if largest >= known.num_classes:
            raise ValueError(
                f"y_{split} has the label {largest} in {origin}; {known.title} has the "
                f"labels 0 to {known.num_classes - 1}."
            )
    digest = hashlib.md5(
        labels["test"].astype(np.uint8).tobytes(), usedforsecurity=False
    ).hexdigest()
    for other, entry in KNOWN.items():
        if other != name and digest == entry.labels_md5:
            raise ValueError(
                f"{origin} holds {entry.title}, not {known.title}: its test labels are "
                f"those of {entry.title}. Load it as {other!r} or move it."
            )


def _missing(name: str, folder: Path) -> str:
    looked = (
        f"Data set {name!r} was not found. Looked in {folder}"
        f"{'' if folder.is_dir() else ' (which does not exist)'} for {name}.npz, "
        f"{name}/*-ubyte[.gz] (IDX), {name}/{{train,test}}/CLASS/*.png (image folder) "
        f"and {name}/VERSION (TensorFlow Datasets, ArrayRecord). "
    )
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        return looked + hint + f"Known names: {', '.join(KNOWN)}; or give a path."
    return looked + (
        f"If you have its files: scripts/prepare_data {name} --from FILE... With a "
        f"network: scripts/prepare_data {name}. If it lies elsewhere: --data-dir "
        "DIR (data_dir=DIR in Python), or the environment variable "
        "ROBUSTJAX_DATA_DIR. 'digits' needs no files."
    )
