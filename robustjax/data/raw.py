"""The files that public sets are published as: CIFAR archives and SVHN's .mat files.

Only `prepare` needs them. IDX and npz files are read by `formats`.
"""

import codecs
import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from robustjax.data import formats

# Members of the CIFAR archives, training first, as pickles and as binary files.
_CIFAR_TRAIN = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4")
_CIFAR_FILES = {
    "cifar10": ((*_CIFAR_TRAIN, "data_batch_5"), ("test_batch",)),
    "cifar100": (("train",), ("test",)),
}

# What a truncated or damaged file makes its reader raise.
_BROKEN = (EOFError, OSError, zlib.error)


def read_files(name: str, files: list[Path]) -> formats.Arrays:
    """Read the published files of a public set, whatever their form.

    Args:
      name: "mnist", "fashion_mnist", "cifar10", "cifar100" or "svhn_cropped".
      files: an `.npz`; the four IDX files; a CIFAR `.tar.gz` (Python or binary
        version), its folder or its members; SVHN's two `.mat` files; or one folder
        that holds any of these.

    Returns:
      The arrays of both splits, unchecked.

    Raises:
      FileNotFoundError: a file does not exist, or one of the set is missing.
      ValueError: a file is truncated, or nothing of this set was recognized.
    """
    for path in files:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
    paths = [
        inner
        for path in files
        for inner in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if inner.is_file()
    ]
    archives = [p for p in paths if p.suffix == ".npz"]
    if len(archives) == 1:
        return formats.read_npz(archives[0])
    idx = formats.find_idx(paths)
    if idx:
        return formats.read_idx_files(idx)
    mats = {p.name: p for p in paths if p.suffix == ".mat"}
    if name == "svhn_cropped" and mats:
        return _read_svhn(mats)
    if name in _CIFAR_FILES:
        for path in paths:
            if path.name.endswith((".tar.gz", ".tgz", ".tar")):
                return read_cifar(name, _untar(path), path)
        members = {p.name.removesuffix(".bin"): p for p in paths}
        if any(n in members for part in _CIFAR_FILES[name] for n in part):
            return read_cifar(
                name,
                {p.name: p.read_bytes() for p in members.values()},
                paths[0].parent,
            )
    raise ValueError(
        f"None of {', '.join(str(p) for p in files)} looks like {name}. Wanted: an "
        ".npz; the four IDX files of MNIST; the .tar.gz, the folder or the batch files "
        "of CIFAR; train_32x32.mat and test_32x32.mat of SVHN."
    )


def read_cifar(name: str, members: Mapping[str, bytes], origin: Path) -> formats.Arrays:
    """Decode the batch files of CIFAR-10 or CIFAR-100.

    Args:
      name: "cifar10" or "cifar100".
      members: the content of each file, by its name without folders.
      origin: where they came from, for messages.

    Returns:
      The arrays, `[N, 32, 32, 3]`, in the official order.

    Raises:
      FileNotFoundError: a batch file is missing.
      ValueError: a batch file is truncated or foreign.
    """
    arrays = []
    for names in _CIFAR_FILES[name]:
        parts = []
        for member in names:
            if member in members:
                parts.append(_cifar_pickle(members[member], origin / member))
            elif member + ".bin" in members:
                raw = members[member + ".bin"]
                parts.append(_cifar_binary(raw, name, origin / (member + ".bin")))
            else:
                raise FileNotFoundError(f"{origin} lacks the file {member} of {name}.")
        arrays += [np.concatenate(column) for column in zip(*parts, strict=True)]
    return formats.Arrays(*arrays)


def _cifar_binary(raw: bytes, name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    # CIFAR-100 has two label bytes, coarse and fine; the fine one is the last.
    num_labels = 2 if name == "cifar100" else 1
    if not raw or len(raw) % (num_labels + 3072):
        raise ValueError(
            f"{path} has {len(raw):,} bytes, no multiple of {num_labels + 3072}: it is "
            "truncated or no batch of CIFAR. Unpack it again."
        )
    rows = np.frombuffer(raw, np.uint8).reshape(-1, num_labels + 3072)
    return _planes_last(rows[:, num_labels:]), rows[:, num_labels - 1].astype(np.int32)


def _cifar_pickle(raw: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
        y = batch[b"fine_labels" if b"fine_labels" in batch else b"labels"]
        return _planes_last(np.asarray(batch[b"data"], np.uint8)), np.array(y, np.int32)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a batch of CIFAR ({error}): it is truncated or "
            "another file. Unpack it again."
        ) from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and nothing else: a pickle can run any code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        # What an array refers to; NumPy has moved `_reconstruct`, so ask an array.
        name = (module_name.replace("numpy._core.", "numpy.core."), global_name)
        if name == ("numpy.core.multiarray", "_reconstruct"):
            return np.zeros(0).__reduce__()[0]
        if name in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, global_name)
        if name == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _planes_last(rows: np.ndarray) -> np.ndarray:
    """`[N, 3072]`, the red plane first, to `[N, 32, 32, 3]`."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _untar(path: Path) -> dict[str, bytes]:
    """The files of an archive by their bare names; nothing is written to disk."""
    members = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    members[PurePosixPath(member.name).name] = content.read()
    except (tarfile.TarError, *_BROKEN) as error:
        raise ValueError(
            f"{path} cannot be unpacked ({error}): it is truncated or no tar archive. "
            "Download it again."
        ) from error
    return members


def _read_svhn(mats: Mapping[str, Path]) -> formats.Arrays:
    from scipy.io import loadmat  # slow to import
    from scipy.io.matlab import MatReadError

    arrays = []
    for name in ("train_32x32.mat", "test_32x32.mat"):
        if name not in mats:
            raise FileNotFoundError(
                f"SVHN needs train_32x32.mat and test_32x32.mat; {name} is missing."
            )
        try:
            content = loadmat(str(mats[name]))
            x, y = content["X"], content["y"]
        except (MatReadError, KeyError, TypeError, ValueError, *_BROKEN) as error:
            raise ValueError(
                f"{mats[name]} cannot be read as SVHN ({error}): it is truncated or "
                "another file. Download it again."
            ) from error
        # The files call the digit zero 10, and put the examples last.
        arrays += [x.transpose(3, 0, 1, 2), y.reshape(-1).astype(np.int32) % 10]
    return formats.Arrays(*arrays)
