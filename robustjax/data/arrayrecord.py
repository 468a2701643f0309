"""Sets that TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from robustjax.data.formats import Arrays


def find_tfds(folder: Path) -> Path | None:
    """Return the newest version folder of a set that TFDS prepared, or None."""
    versions = [
        (tuple(int(part) for part in path.name.split(".")), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
        and (path / "dataset_info.json").is_file()
    ]
    return max(versions)[1] if versions else None


def read_tfds(folder: Path) -> tuple[Arrays, bool]:
    """Read a set that TFDS prepared as ArrayRecord, without TensorFlow.

    Args:
      folder: the version folder, which holds `dataset_info.json`.

    Returns:
      The arrays of the splits `train` and `test`, and whether they are in the
      official order: TFDS shuffles what it prepares. `scripts/prepare_data` does not,
      and where examples have an "id" (CIFAR, SVHN) the order is restored from it.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      ValueError: another file format, or splits or features that are not there.
    """
    arrays, ordered = [], True
    for split in ("train", "test"):
        source = tfds_source(folder, split)
        try:
            first = source[0]
        except Exception as error:  # Riegeli raises bare RuntimeErrors
            raise _damaged(folder, error) from error
        if not isinstance(first, dict) or not {"image", "label"} <= set(first):
            raise ValueError(
                f"{folder} has the features {', '.join(first)}; 'image' and 'label' "
                "are needed. Read it yourself and save an npz instead."
            )
        x = np.empty((len(source), *np.shape(first["image"])), np.uint8)
        y = np.empty(len(source), np.int32)
        ids = []
        # In blocks: about three times as fast as one example at a time.
        for start in range(0, len(source), 1000):
            rows = list(range(start, min(start + 1000, len(source))))
            try:
                examples = source.__getitems__(rows)
            except Exception as error:
                raise _damaged(folder, error) from error
            for row, example in zip(rows, examples, strict=True):
                x[row], y[row] = example["image"], example["label"]
                ids.append(example.get("id", b""))
        if not source.dataset_info.disable_shuffling:
            ordered = ordered and len(set(ids)) == len(ids)
            if len(set(ids)) == len(ids):
                order = np.argsort(ids)
                x, y = x[order], y[order]
        arrays += [x, y]
    return Arrays(*arrays), ordered


def tfds_source(folder: Path, split: str) -> Any:
    """Open one split of a set prepared by TFDS as a random-access source.

    Args:
      folder: the version folder, which holds `dataset_info.json`.
      split: a split of the set, "train" or "test".

    Returns:
      A source of dicts (`len`, `[i]`), which `stream` reads too.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      ValueError: the set has no such split, is empty, or is no ArrayRecord.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{folder} was prepared by TensorFlow Datasets; to read it, "
            'pip install "robustjax[data]" (TensorFlow is not needed).'
        ) from error
    try:
        builder: Any = tfds.builder_from_directory(folder)
    except Exception as error:  # whatever its JSON and proto parsers raise
        raise _damaged(folder, error) from error
    if split not in builder.info.splits:
        raise ValueError(
            f"{folder} has the splits {', '.join(builder.info.splits) or 'none'}, "
            f"not {split!r}."
        )
    stored_as = builder.info.file_format.value
    if stored_as != "array_record":
        raise ValueError(
            f"{folder} was prepared as {stored_as}, which needs "
            "TensorFlow to read. Prepare it as ArrayRecord: scripts/prepare_data "
            f"{folder.parent.name}, or tfds build --file_format=array_record."
        )
    if builder.info.splits[split].num_examples == 0:
        raise ValueError(f"{folder} has no examples in {split!r}. Prepare it again.")
    return builder.as_data_source(split=split)


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder} cannot be read ({error}): a file is missing, truncated or damaged. "
        f"Prepare it again: scripts/prepare_data {folder.parent.name} --overwrite."
    )
