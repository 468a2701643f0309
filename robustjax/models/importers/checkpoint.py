"""Weights from files, as plain arrays: .pt and .pth, .safetensors, .npz.

PyTorch is not needed, and nothing in a file is executed: a .pt file is a pickle, and
the reader here knows the few names that a dictionary of tensors consists of and refuses
all others. Both forms of .pt are read, the zip archive (PyTorch 1.6 and later) and the
older sequence of pickles.
"""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

NESTED = ("state_dict", "model_state_dict", "model", "net", "network")
"""Where a checkpoint of a training keeps the weights, by custom."""

_BFLOAT16 = np.dtype(jnp.bfloat16)
_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_SAFETENSORS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": _BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_weights(
    path: str | Path, *, entry: str | None = None
) -> dict[str, np.ndarray]:
    """The named arrays of a .pt, .pth, .safetensors or .npz file.

    The kind is recognized by the content. A .pt file may be a state_dict, or a
    dictionary that holds one, under `state_dict`, `model_state_dict`, `model`, `net` or
    `network`, or as its only dictionary of tensors. Nothing in the file is executed.

    Args:
        path: the file.
        entry: the key of the state_dict in a .pt file that has several, such as
            "last", "best" or "ema".

    Returns:
        name -> array, with the file's names, shapes and types (bfloat16 as float32).
        What is no tensor (epoch, settings) is left out.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: on a file that is truncated, of another kind, or has several
            state_dicts; on a .pt file that asks for anything but tensors.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "weights.npz"
    >>> np.savez(path, **{"fc.bias": np.zeros(3)})
    >>> read_weights(path)["fc.bias"].shape
    (3,)
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(9)
        file.seek(0)
        try:
            content = _read(file, head, path)
        except (EOFError, zipfile.BadZipFile, _Truncated) as error:
            raise ValueError(
                f"{path} is truncated or damaged ({error}): copy or download it again."
            ) from error
    return {
        name: array.astype(np.float32) if array.dtype == _BFLOAT16 else array
        for name, array in _choose(content, entry, path).items()
    }


class _Truncated(Exception):
    """The file ends before what it promises."""


def _read(file: BinaryIO, head: bytes, path: Path) -> Mapping[Any, Any]:
    if head[:2] == b"PK":
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
            if pickles:
                return _torch_zip(archive, pickles[0].split("/")[0], path)
            if names and all(name.endswith(".npy") for name in names):
                return {
                    name.removesuffix(".npy"): _npy(archive.read(name), name, path)
                    for name in names
                }
        raise ValueError(
            f"{path} is a zip archive, but neither a PyTorch checkpoint nor .npz."
        )
    if head[:1] == b"\x80":
        return _torch_legacy(file, path)
    if len(head) == 9 and head[8:] == b"{":
        return _safetensors(file, path)
    if path.suffix in (".pt", ".pth", ".npz", ".safetensors"):
        raise _Truncated("its beginning is not that of its kind")
    raise ValueError(f"{path} is no .pt, .pth, .safetensors or .npz file.")


def _npy(data: bytes, name: str, path: Path) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _safetensors(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
    """Eight bytes of length, that much JSON, then the tensors' bytes."""
    length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if length > size - 8:
        raise _Truncated(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise ValueError(
            f"{path}: the header of a .safetensors file is JSON, this is not: {error}"
        ) from error
    arrays = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        begin, end = about["data_offsets"]
        if about["dtype"] not in _SAFETENSORS:
            raise ValueError(
                f"{path}: {name} has the type {about['dtype']}; known are "
                f"{', '.join(_SAFETENSORS)}."
            )
        if not 0 <= begin <= end <= size - 8 - length:
            raise _Truncated(f"{name} ends at byte {end}, of {size - 8 - length}")
        file.seek(8 + length + begin)
        flat = np.frombuffer(file.read(end - begin), _SAFETENSORS[about["dtype"]])
        if flat.size != int(np.prod(about["shape"])):
            raise ValueError(
                f"{path}: {name} has {flat.size} numbers, but the shape "
                f"{about['shape']}."
            )
        arrays[name] = flat.reshape(about["shape"])
    return arrays


# A .pt file. Tensors are descriptions at first: in the older form their numbers come
# after the pickle.


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Kind(NamedTuple):
    """What a storage's class becomes: a value, which nobody can call."""

    dtype: np.dtype


def _tensor(
    storage: _Storage, offset: int, shape: Any, strides: Any, *rest: Any
) -> Any:
    """In the place of `torch._utils._rebuild_tensor_v2`: a description."""
    del rest  # whether it takes gradients, and hooks
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, int(offset), tuple(shape), tuple(strides))


def _parameter(data: Any, *rest: Any) -> Any:
    """In the place of `torch._utils._rebuild_parameter`."""
    del rest
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): _Kind(dtype) for name, dtype in _STORAGES.items()},
    **{("torch.storage", name): _Kind(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows `_ALLOWED` and nothing else, so that no code of the file's choice runs."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file, encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(
                f"{self.path} asks for {module}.{name}, which is no part of a tensor: "
                "refused, since a pickle can run any program. If you trust the file, "
                "load it in PyTorch and save model.state_dict() alone."
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise ValueError(f"{self.path}: {pid!r} is not the place of a tensor.")
        kind, key, count = pid[1], pid[2], pid[4]
        if not isinstance(kind, _Kind):
            raise ValueError(f"{self.path}: a storage of the unknown type {kind!r}.")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError(
                f"{self.path}: a storage that is part of another one, as PyTorch "
                "before 0.4 wrote them. Save the file again with a newer PyTorch."
            )
        return _Storage(str(key), kind.dtype, int(count))


def _unpickle(file: Any, path: Path) -> Any:
    try:
        return _Unpickler(file, path).load()
    except (EOFError, pickle.UnpicklingError) as error:
        raise _Truncated(error) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # What an unusual pickle can do with the few objects it is given.
        raise ValueError(f"{path} is no dictionary of tensors: {error}") from error


def _torch_zip(archive: zipfile.ZipFile, root: str, path: Path) -> Mapping[Any, Any]:
    content = _unpickle(io.BytesIO(archive.read(f"{root}/data.pkl")), path)
    order = b"little"
    if f"{root}/byteorder" in archive.namelist():
        order = archive.read(f"{root}/byteorder").strip()
    if order != b"little":
        raise ValueError(
            f"{path} was written on a machine with byte order {order.decode()}: save "
            "it again on a little-endian one."
        )

    def fetch(storage: _Storage) -> bytes:
        name = f"{root}/data/{storage.key}"
        if name not in archive.namelist():
            raise _Truncated(f"the numbers {name} are missing")
        return archive.read(name)

    return _resolve(content, fetch, path)


def _torch_legacy(file: BinaryIO, path: Path) -> Mapping[Any, Any]:
    """Magic number, protocol, machine, content, storage keys; then their numbers."""
    if _unpickle(file, path) != _LEGACY_MAGIC:
        raise ValueError(f"{path} is a pickle, but no PyTorch checkpoint.")
    if _unpickle(file, path) != _LEGACY_PROTOCOL:
        raise ValueError(f"{path}: another protocol than {_LEGACY_PROTOCOL}.")
    if not _unpickle(file, path).get("little_endian", True):
        raise ValueError(f"{path} was written on a big-endian machine: save it again.")
    content = _unpickle(file, path)
    used: dict[str, _Storage] = {}
    _walk(content, lambda tensor: used.setdefault(tensor.storage.key, tensor.storage))
    data: dict[str, bytes] = {}
    for key in _unpickle(file, path):
        if str(key) not in used:
            raise ValueError(f"{path}: no tensor uses the storage {key}.")
        count = int.from_bytes(file.read(8), "little")
        wanted = count * used[str(key)].dtype.itemsize
        if wanted > path.stat().st_size:
            raise _Truncated(f"the storage {key} of {count} numbers")
        data[str(key)] = file.read(wanted)
    return _resolve(content, lambda storage: data.get(storage.key, b""), path)


def _walk(value: Any, use: Callable[[_Tensor], Any]) -> Any:
    """`value` with every tensor replaced by `use(tensor)`."""
    if isinstance(value, _Tensor):
        return use(value)
    if isinstance(value, dict):
        return {key: _walk(inner, use) for key, inner in value.items()}
    return value  # lists (of optimizers, of schedules) hold no weights


def _resolve(
    content: Any, fetch: Callable[[_Storage], bytes], path: Path
) -> Mapping[Any, Any]:
    flats: dict[str, np.ndarray] = {}

    def array(tensor: _Tensor) -> np.ndarray:
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        if storage.key not in flats:
            data, dtype = fetch(storage), storage.dtype
            if len(data) != storage.count * dtype.itemsize:
                raise _Truncated(
                    f"{len(data)} bytes for the {storage.count} numbers of storage "
                    f"{storage.key}"
                )
            flats[storage.key] = np.frombuffer(data, dtype)
        flat = flats[storage.key]
        size = int(np.prod(shape, dtype=np.int64))
        last = tensor.offset + sum(
            (n - 1) * s for n, s in zip(shape, strides, strict=True)
        )
        # Inside its storage, or as_strided would read other memory.
        if min((0, tensor.offset, *shape, *strides)) < 0 or size > flat.size:
            raise ValueError(f"{path}: a tensor with impossible strides.")
        if size and last >= flat.size:
            raise ValueError(f"{path}: a tensor reaches beyond its storage.")
        if not size:
            return np.zeros(shape, flat.dtype)
        steps = tuple(s * flat.itemsize for s in strides)
        view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], shape, steps)
        return np.ascontiguousarray(view).reshape(shape)

    content = _walk(content, array)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {type(content).__name__}, no dictionary of tensors: save "
            "model.state_dict()."
        )
    return content


def _choose(
    content: Mapping[Any, Any], entry: str | None, path: Path
) -> dict[str, np.ndarray]:
    """The state_dict in `content`."""
    if entry is not None:
        if not isinstance(content.get(entry), dict):
            raise ValueError(
                f"entry={entry!r}: {path} has no such dictionary; it has "
                f"{', '.join(map(repr, content)) or 'nothing'}."
            )
        return _choose(content[entry], None, path)
    inside = {
        key: value
        for key, value in content.items()
        if isinstance(value, dict) and _has_arrays(value)
    }
    for key in NESTED:
        if key in inside:
            return _choose(inside[key], None, path)
    arrays = {
        str(key): value
        for key, value in content.items()
        if isinstance(value, np.ndarray)
    }
    if arrays:
        return arrays
    if len(inside) == 1:
        return _choose(next(iter(inside.values())), None, path)
    if inside:
        first = next(iter(inside))
        raise ValueError(
            f"{path} has several dictionaries of tensors, "
            f"{', '.join(map(repr, inside))}: say which, as in entry={first!r}."
        )
    raise ValueError(
        f"{path} holds no tensors; it has {', '.join(map(repr, content)) or 'nothing'}."
    )


def _has_arrays(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_arrays, value.values()))
    return isinstance(value, np.ndarray)
