"""Prepare a public set as ArrayRecord: `scripts/prepare_data NAME [--from FILE...]`.

Afterwards `tfds.data_source(NAME, data_dir=...)` and `robustjax.data.load(NAME)` read
it without TensorFlow. The builder is TFDS's own class (so name, version and features
are the official ones); only the place that the examples come from is replaced.
"""

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustjax.data import arrayrecord, raw, sources
from robustjax.data.dataset import Dataset, check

NAMES = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Path:
    """Write a public set as ArrayRecord files that TFDS reads as its own.

    Examples keep the official order ("the first 1,000 test images" stay the first;
    TFDS itself would shuffle them).

    Args:
      name: one of `NAMES`.
      data_dir: where to write `NAME/VERSION`; None: see `default_data_dir`.
      files: the published files, see `raw.read_files`. None given: TFDS downloads
        them, which needs a network and TensorFlow.
      overwrite: replace what is there.

    Returns:
      The version folder.

    Raises:
      ValueError: name is unknown, or a file is truncated or foreign.
      FileExistsError: the set is there already and `overwrite` is False.
      FileNotFoundError: a file does not exist.
      ImportError: tensorflow-datasets, Pillow, or, to download, TensorFlow is missing.
      ConnectionError: the download failed.
    """
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; known names: {', '.join(NAMES)}.")
    tfds = _tfds()
    root = sources.default_data_dir() if data_dir is None else Path(data_dir)
    root = root.expanduser()
    official = tfds.builder_cls(name)
    target = root / name / str(official.VERSION)
    if (target / "dataset_info.json").is_file() and not overwrite:
        raise FileExistsError(
            f"{target} is there already. To replace it: --overwrite (overwrite=True)."
        )
    if files:
        arrays = raw.read_files(name, [Path(f).expanduser() for f in files])
        dataset = check(name, arrays, ", ".join(Path(f).name for f in files))
        builder_class = _local_builder(tfds, official, dataset)
    else:
        _require_tensorflow(name)
        builder_class = official
    root.mkdir(parents=True, exist_ok=True)
    builder = builder_class(data_dir=str(root), file_format="array_record")
    mode = tfds.download.GenerateMode.REUSE_DATASET_IF_EXISTS
    if overwrite:
        mode = tfds.download.GenerateMode.REUSE_CACHE_IF_EXISTS
    config = tfds.download.DownloadConfig(download_mode=mode, try_download_gcs=False)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as downloads:
        try:
            builder.download_and_prepare(
                download_dir=downloads if files else None, download_config=config
            )
        except Exception as error:
            if files:
                raise
            raise ConnectionError(
                f"TFDS could not download {name} ({type(error).__name__}: {error}). "
                "Without a network, give the published files: scripts/prepare_data "
                f"{name} --from FILE..."
            ) from error
    if files:
        _check_written(target, dataset)
    return target


def _local_builder(tfds: Any, official: Any, dataset: Dataset) -> Any:
    """TFDS's builder of the same name that takes its examples from `dataset`."""
    splits = {
        "train": (dataset.x_train, dataset.y_train),
        "test": (dataset.x_test, dataset.y_test),
    }

    def info(self: Any) -> Any:
        given = official._info(self)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{given.description} Prepared from {dataset.source}.",
            features=given.features,
            supervised_keys=given.supervised_keys,
            homepage=given.homepage,
            citation=given.citation,
            disable_shuffling=True,
        )

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in splits}

    def generate_examples(
        self: Any, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        features = self.info.features
        for row, (x, y) in enumerate(zip(*splits[split], strict=True)):
            example = {"image": _png(x), "label": int(y)}
            if "id" in features:
                digits = 6 if dataset.name == "svhn_cropped" else 5  # as TFDS has it
                example["id"] = f"{split}_{row:0{digits}d}"
            if "coarse_label" in features:
                example["coarse_label"] = -1  # TFDS's word for "not known"
            yield row, example

    # TFDS builders are classes, and a class of a set's name can be registered once.
    return type(
        "LocalBuilder",
        (official,),
        {
            "name": dataset.name,
            "__module__": official.__module__,  # where TFDS looks for its metadata
            "_info": info,
            "_split_generators": split_generators,
            "_generate_examples": generate_examples,
        },
        skip_registration=True,
    )


def _png(x: np.ndarray) -> bytes:
    """Encode one image; TFDS would need TensorFlow to encode an array."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _check_written(target: Path, dataset: Dataset) -> None:
    """Read some examples of each split back and compare them."""
    for split, x, y in (
        ("train", dataset.x_train, dataset.y_train),
        ("test", dataset.x_test, dataset.y_test),
    ):
        source = arrayrecord.tfds_source(target, split)
        rows = {0, len(x) - 1, *range(0, len(x), max(1, len(x) // 50))}
        same = len(source) == len(x) and all(
            np.array_equal(source[row]["image"], x[row])
            and source[row]["label"] == y[row]
            for row in rows
        )
        if not same:
            raise RuntimeError(
                f"{target} does not read back what was written to {split!r}. Is the "
                "disc full? Remove the folder and prepare it again."
            )


def _tfds() -> Any:
    try:
        import PIL.Image  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"Preparing a set needs tensorflow-datasets and Pillow ({error}): "
            'pip install "robustjax[data]".'
        ) from error
    return tfds


def _require_tensorflow(name: str) -> None:
    try:
        import tensorflow  # noqa: F401  # pyright: ignore
    except ImportError as error:
        raise ImportError(
            f"Downloading {name} through TFDS needs TensorFlow (pip install "
            "tensorflow) and a network. With the published files neither is needed: "
            f"scripts/prepare_data {name} --from FILE..."
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/prepare_data",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prepare a public data set, so that load(NAME) and "
        "tfds.data_source(NAME) read it without TensorFlow.",
        epilog="""examples:
  scripts/prepare_data mnist --from train-images-idx3-ubyte.gz \\
      train-labels-idx1-ubyte.gz t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz
  scripts/prepare_data fashion_mnist --from path/to/fashion_mnist
  scripts/prepare_data cifar10 --from cifar-10-python.tar.gz
  scripts/prepare_data svhn_cropped --from train_32x32.mat test_32x32.mat
  scripts/prepare_data cifar100        (downloads; needs TensorFlow and a network)""",
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where to write NAME/VERSION (default: $ROBUSTJAX_DATA_DIR or "
        "~/.robustjax/data)",
    )
    parser.add_argument(
        "--from",
        dest="files",
        nargs="+",
        default=(),
        metavar="FILE",
        help="the published files, or one folder that holds them: IDX, npz, CIFAR "
        ".tar.gz or batches, SVHN .mat",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a set that is there already"
    )
    args = parser.parse_args(argv)
    try:
        target = prepare(args.name, args.data_dir, args.files, args.overwrite)
        dataset_info = arrayrecord.tfds_source(target, "train").dataset_info
    except (OSError, ValueError, ImportError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    sizes = {s: i.num_examples for s, i in dataset_info.splits.items()}
    print(f"{args.name} is ready in {target}: {sizes}")
    root = target.parent.parent
    hint = "" if root == sources.default_data_dir() else f", data_dir={str(root)!r}"
    print(f"Use it: robustjax.data.load({args.name!r}{hint})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
