"""What a data set is, and the checks that every one has passed."""

import hashlib
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
