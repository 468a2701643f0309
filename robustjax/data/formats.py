"""Readers of the file formats that data sets come in. One reader, one format.

Every reader returns `Arrays` as the file holds them, or raises an error that names
the file and the fix. What a data set must be is checked later, in `sources`.
"""

import gzip
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ARRAY_NAMES = ("x_train", "y_train", "x_test", "y_test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


class Arrays(NamedTuple):
    """Images and labels of both splits, unchecked; `max_value` None: not said."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    max_value: int | None = None


def read_npz(path: Path) -> Arrays:
    """Read the arrays x_train, y_train, x_test, y_test (and max_value) of an npz.

    Args:
      path: the `.npz` file.

    Returns:
      The arrays as they are stored.

    Raises:
      ValueError: the file is truncated, no npz, or lacks one of the arrays.
    """
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not hasattr(archive, "files"):
                raise ValueError("it holds one bare array")
            missing = [name for name in ARRAY_NAMES if name not in archive.files]
            found = list(archive.files)
            if not missing:
                stored = [np.asarray(archive[name]) for name in ARRAY_NAMES]
                scale = None
                if "max_value" in found:
                    scale = int(np.asarray(archive["max_value"]).item())
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise ValueError(
            f"{path} cannot be read as an npz ({error}): it is truncated or another "
            "kind of file. Copy it again, or write it with numpy.savez_compressed"
            f"(path, {', '.join(f'{n}={n}' for n in ARRAY_NAMES)})."
        ) from error
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(found) or 'none'}."
            f" A data set needs all of {', '.join(ARRAY_NAMES)}: where there is no "
            "test split, cut one from the training images before saving."
        )
    return Arrays(stored[0], stored[1], stored[2], stored[3], max_value=scale)


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes (the format of MNIST), packed or not.

    Layout: `0 0 8 ndim`, then ndim big-endian uint32 sizes, then the bytes.

    Args:
      path: the file; a name that ends in `.gz` is unpacked.

    Returns:
      uint8 array of the rank that the file states.

    Raises:
      ValueError: the file is truncated or no IDX file of unsigned bytes.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be unpacked ({error}): it is truncated or no gzip file. "
            "Copy or download it again."
        ) from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or not 1 <= raw[3] <= 4:
        raise ValueError(
            f"{path} is no IDX file of unsigned bytes: it begins with "
            f"{raw[:4].hex(' ') or 'nothing'}, not with 00 00 08 and a rank of 1 to 4."
        )
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: it ends in its header. Copy it again.")
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], ">u4"))
    size = int(np.prod(shape, dtype=np.int64))
    if len(raw) != start + size:
        raise ValueError(
            f"{path} states the shape {shape}, but {len(raw) - start:,} bytes follow "
            f"instead of {size:,}: it is truncated or damaged. Copy it again."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def find_idx(files: Iterable[Path]) -> dict[str, Path]:
    """Tell which IDX files hold x_train, y_train, x_test and y_test.

    Args:
      files: candidates; those with other names are ignored.

    Returns:
      What was found, by array name; of a packed and an unpacked twin the unpacked.

    Raises:
      ValueError: two files claim the same place.
    """
    found: dict[str, Path] = {}
    for path in sorted(files):
        match = re.search(
            r"(train|t10k|test).*(images|labels).*ubyte(\.gz)?$", path.name
        )
        if match is None:
            continue
        split = "train" if match[1] == "train" else "test"
        name = ("x_" if match[2] == "images" else "y_") + split
        twin = found.get(name)
        if twin is None:
            found[name] = path
        elif path.name != twin.name + ".gz":
            raise ValueError(
                f"Both {twin} and {path} look like {name}. Keep one data set in a "
                "folder."
            )
    return found


def read_idx_files(files: Mapping[str, Path]) -> Arrays:
    """Read the four IDX files of a set.

    Args:
      files: by array name, as `find_idx` returns them.

    Returns:
      The arrays.

    Raises:
      FileNotFoundError: one of the four is not there.
      ValueError: a file is truncated, damaged or foreign.
    """
    missing = [name for name in ARRAY_NAMES if name not in files]
    if missing:
        names = ", ".join(str(path) for path in files.values())
        raise FileNotFoundError(
            f"There is {names}, but no IDX file for {', '.join(missing)}. The four are "
            "named train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each with or "
            "without .gz."
        )
    x_train, y_train, x_test, y_test = (read_idx(files[name]) for name in ARRAY_NAMES)
    return Arrays(x_train, y_train, x_test, y_test)


def list_files(folder: Path) -> list[Path]:
    """Return what lies in a folder, not below it; nothing where there is none."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def read_image_folder(folder: Path) -> tuple[Arrays, tuple[str, ...]]:
    """Read `train/CLASS/*.png` and `test/CLASS/*.png` (or jpg, jpeg, bmp).

    Args:
      folder: the folder that holds `train` and `test`.

    Returns:
      The arrays, gray images `[N, H, W, 1]` and others `[N, H, W, 3]`, and the names
      of the classes in the order of their labels (alphabetical).

    Raises:
      ImportError: Pillow is not installed.
      FileNotFoundError: a split or its images are missing.
      ValueError: a file is no image, sizes or classes differ.
    """
    image_module = pillow()
    splits = {}
    for split in ("train", "test"):
        root = folder / split
        files = image_files(root)
        if not files:
            raise FileNotFoundError(
                f"{root} holds no images. An image folder is {folder.name}/train/CLASS/"
                f"*.png and {folder.name}/test/CLASS/*.png ({', '.join(IMAGE_SUFFIXES)}"
                "); where there is no test split, move some training images there."
            )
        splits[split] = files
    names = tuple(sorted({name for _, name in splits["train"]}))
    foreign = {name for _, name in splits["test"]} - set(names)
    if foreign:
        raise ValueError(
            f"{folder / 'test'} has classes that {folder / 'train'} has not: "
            f"{', '.join(sorted(foreign))}. Both need the same class folders."
        )
    images: dict[str, list[Any]] = {"train": [], "test": []}
    modes, size = set(), None
    for split, files in splits.items():
        for path, _ in files:
            try:
                with image_module.open(path) as image:
                    image.load()
                    opened = image.copy()
            except OSError as error:
                raise ValueError(
                    f"{path} cannot be read as an image ({error}). Remove or "
                    "replace it."
                ) from error
            size = size or opened.size
            if opened.size != size:
                raise ValueError(
                    f"{path} has {opened.size[0]}x{opened.size[1]} pixels, the images "
                    f"before it {size[0]}x{size[1]}. Resize all to one size first."
                )
            modes.add(opened.mode)
            images[split].append(opened)
    mode = "L" if modes <= {"1", "L"} else "RGB"
    label = {name: i for i, name in enumerate(names)}
    arrays = []
    for split, files in splits.items():
        x = np.stack([np.asarray(i.convert(mode), np.uint8) for i in images[split]])
        arrays += [x, np.array([label[name] for _, name in files], np.int32)]
    return Arrays(*arrays), names


def image_files(root: Path) -> list[tuple[Path, str]]:
    """The images in `root/CLASS/`, each with its class, both in alphabetical order."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return [
        (path, folder.name)
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]


def pillow() -> Any:
    """Pillow's module Image.

    Raises:
      ImportError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'Image folders need Pillow: pip install "robustjax[data]".'
        ) from error
    return Image
