"""From a name to arrays: `load("cifar10")`, `load("path/to/my.npz")`.

Everything that comes out has been checked: uint8 images `[N, H, W, C]`, int32 labels
in range, nothing empty. Where the files lie and what they may look like: docs/data.md.
"""

import difflib
import os
from pathlib import Path

from robustjax.data import arrayrecord, formats
from robustjax.data.dataset import KNOWN, Dataset, check


def default_data_dir() -> Path:
    """Return `$ROBUSTJAX_DATA_DIR`, or `~/.robustjax/data` where that is not set."""
    given = os.environ.get("ROBUSTJAX_DATA_DIR")
    return Path(given).expanduser() if given else Path.home() / ".robustjax" / "data"


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set by name, or from a file or folder of your own.

    `digits` is embedded in the package. Any other name is looked for in `data_dir`,
    in this order: `NAME.npz`; IDX files in `NAME/`; an image folder
    `NAME/{train,test}/CLASS/*.png`; `NAME/VERSION`, prepared by TensorFlow Datasets as
    ArrayRecord (`scripts/prepare_data NAME`); IDX files in `data_dir` itself.

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
        base if (base / "dataset_info.json").is_file() else arrayrecord.find_tfds(base)
    )
    if version is not None:
        arrays, ordered = arrayrecord.read_tfds(version)
        origin = f"TFDS ArrayRecord {version.parent.name}/{version.name}"
        return arrays, origin + ("" if ordered else " in TFDS's shuffled order"), ()
    return None


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
