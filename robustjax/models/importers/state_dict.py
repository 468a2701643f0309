"""From a PyTorch state_dict to a model of the zoo: nothing missing, nothing left."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.models.base import Model
from robustjax.models.importers.architectures import (
    Architecture,
    Leaf,
    architecture,
    build,
    leaves,
)
from robustjax.models.importers.checkpoint import read_weights
from robustjax.models.importers.layers import from_layers
from robustjax.types import Array, PyTree

# Buffers by which published nets normalize their inputs.
_NORMALIZERS = (("mu", "sigma"), ("mean", "std"), ("new_mean", "new_std"))
_LISTED = 8  # names of each sort in an error


def load(
    path: str | Path,
    net: Architecture | str,
    *,
    entry: str | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Model, PyTree, PyTree]:
    """A published PyTorch checkpoint as a model with its weights.

    `from_state_dict(net, read_weights(path, entry=entry), ignore=ignore)`.

    Args:
        path: a .pt, .pth, .safetensors or .npz file.
        net: an `Architecture`, or the name of one.
        entry: which state_dict, in a file with several.
        ignore: beginnings of names that may be left over.

    Returns:
        (model, params, extra), as `logits_fn` takes them.

    Raises:
        ValueError: as `read_weights` and `from_state_dict`.

    >>> load("no.pt", "resnet18")
    Traceback (most recent call last):
    ...
    FileNotFoundError: [Errno 2] No such file or directory: 'no.pt'
    """
    return from_state_dict(net, read_weights(path, entry=entry), ignore=ignore)


def from_state_dict(
    net: Architecture | str,
    arrays: Mapping[str, np.ndarray],
    *,
    ignore: Sequence[str] = (),
) -> tuple[Model, PyTree, PyTree]:
    """The zoo's net of an architecture, with the arrays of a PyTorch state_dict.

    Names may have a common beginning, such as `module.` or `model.`: the one under
    which most of the net's names are found is removed. Left out are BatchNorm's counts,
    what is under `sub_block1.` (which WideResNets store and never use), and copies of
    arrays that were used. The normalization is that of the state_dict's own buffers
    (`mu` and `sigma`, `mean` and `std`) if it has them, else the architecture's.

    Args:
        net: an `Architecture`, or the name of one (with 10 classes).
        arrays: name -> array, convolutions OIHW, dense layers [out, in].
        ignore: beginnings of names (as in the file) that may be left over.

    Returns:
        (model, params, extra); weights are float32.

    Raises:
        ValueError: when arrays are missing, left over, or have other shapes; it lists
            them, with the most similar name. When the architecture's normalization is
            another one than the state_dict's (by more than 0.001).

    >>> net = architecture("resnet18", width=2)
    >>> arrays = {name: np.zeros(leaf.shape) for name, leaf in leaves(net).items()}
    >>> model, params, extra = from_state_dict(net, arrays)
    >>> params["head"]["kernel"].shape
    (16, 10)
    """
    if isinstance(net, str):
        net = architecture(net)
    wanted = leaves(net)
    prefix = _prefix(arrays, wanted)
    given = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    used = {name: np.asarray(given[name]) for name in wanted if name in given}
    rest = {
        name: np.asarray(array)
        for name, array in arrays.items()
        if not (name.startswith(prefix) and name.removeprefix(prefix) in wanted)
    }
    rest, normalization = _normalization(rest, net.channels)
    _complain(wanted, used, _left_over(rest, used, prefix, ignore), prefix)
    if normalization:
        net = _with_normalization(net, *normalization)
    tree: dict = {"params": {}}
    for name, leaf in wanted.items():
        place = tree
        for part in leaf.path[:-1]:
            place = place.setdefault(part, {})
        place[leaf.path[-1]] = _converted(used[name])
    params = tree.pop("params")
    return build(net), params, tree


def from_net_folder(path: str | Path) -> tuple[Model, PyTree, PyTree]:
    """A net stored as `net.json` (a list of layers) and `weights.npz`.

    Args:
        path: the folder; the layers are those of `from_layers`, under "layers".

    Returns:
        (model, params, extra).

    Raises:
        FileNotFoundError: when one of the two files is missing.
        ValueError: as `from_layers` and `read_weights`.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "net.json").write_text('{"layers": [{"op": "dense", "w": "w"}]}')
    >>> np.savez(folder / "weights.npz", w=np.ones((3, 4)))
    >>> model, params, extra = from_net_folder(folder)
    >>> params["w"].shape
    (4, 3)
    """
    folder = Path(path)
    spec = json.loads((folder / "net.json").read_text())
    if not isinstance(spec, dict) or "layers" not in spec:
        raise ValueError(f'{folder / "net.json"} has no "layers".')
    model = from_layers(spec["layers"], read_weights(folder / "weights.npz"))
    # Its weights do not depend on key and input.
    params, extra = model.init(jax.random.key(0), jnp.zeros((1,)))
    return model, params, extra


def _converted(array: np.ndarray) -> Array:
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, tuple(range(array.ndim)))
    return jnp.asarray(array.transpose(axes), jnp.float32)


def _prefix(arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Leaf]) -> str:
    """What the names begin with: the shortest under which most wanted ones are."""
    candidates = {""}
    for name in arrays:
        for probe in ("", *_ends(name)):
            if name[len(probe) :] in wanted:
                candidates.add(probe)
    found = {
        prefix: sum(prefix + name in arrays for name in wanted) for prefix in candidates
    }
    return min(candidates, key=lambda prefix: (-found[prefix], len(prefix), prefix))


def _ends(name: str) -> list[str]:
    """ "a.b.c" -> ["a.", "a.b."]."""
    return [name[: place + 1] for place, sign in enumerate(name) if sign == "."]


def _normalization(
    rest: dict[str, np.ndarray], channels: int
) -> tuple[dict[str, np.ndarray], tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """`rest` without the buffers of a normalization; and what they say."""
    for first, second in _NORMALIZERS:
        for name, mean in rest.items():
            parent, _, last = name.rpartition(".")
            other = f"{parent}.{second}" if parent else second
            if last != first or other not in rest:
                continue
            std = rest[other]
            if mean.size not in (1, channels) or std.size != mean.size:
                continue
            left = {key: rest[key] for key in rest if key not in (name, other)}
            values = (tuple(map(float, a.reshape(-1))) for a in (mean, std))
            return left, (next(values), next(values))
    return rest, None


def _with_normalization(
    net: Architecture, mean: tuple[float, ...], std: tuple[float, ...]
) -> Architecture:
    if net.mean:
        theirs = np.broadcast_arrays(
            np.array([mean, std]), np.array([net.mean, net.std])
        )
        if not np.allclose(*theirs, rtol=0, atol=1e-3):
            raise ValueError(
                f"the file normalizes by mean={mean}, std={std}, the architecture by "
                f"mean={net.mean}, std={net.std}: leave out mean and std to take the "
                "file's, or leave its buffers out of the arrays."
            )
    return net._replace(mean=mean, std=std)


def _left_over(
    rest: Mapping[str, np.ndarray],
    used: Mapping[str, np.ndarray],
    prefix: str,
    ignore: Sequence[str],
) -> list[str]:
    def is_known(name: str, array: np.ndarray) -> bool:
        return (
            name.endswith("num_batches_tracked")
            or name.removeprefix(prefix).startswith("sub_block1.")
            or name.startswith(tuple(ignore))
            or (array.size > 1 and np.ptp(array) > 0)  # constants prove nothing
            and any(np.array_equal(array, other) for other in used.values())
        )

    return sorted(name for name, array in rest.items() if not is_known(name, array))


def _complain(
    wanted: Mapping[str, Leaf],
    used: Mapping[str, np.ndarray],
    left_over: Sequence[str],
    prefix: str,
) -> None:
    missing = sorted(prefix + name for name in wanted if name not in used)
    shapes = [
        f"{prefix}{name} has {array.shape}, the architecture {wanted[name].shape}"
        for name, array in used.items()
        if array.shape != wanted[name].shape
    ]
    similar = [f"{name}{_nearest(name, left_over, 'the file has')}" for name in missing]
    over = [
        f"{name}{_nearest(name.removeprefix(prefix), wanted, 'wanted is')}"
        for name in left_over
    ]
    sorts = (("missing", similar), ("left over", over), ("of another shape", shapes))
    lines = [
        f"{len(names)} {sort}: {'; '.join(names[:_LISTED])}"
        + ("; ..." if len(names) > _LISTED else "")
        for sort, names in sorts
        if names
    ]
    if lines:
        raise ValueError(
            "the arrays do not fit the architecture. "
            + ". ".join(lines)
            + ". Choose another architecture or num_classes; `ignore` lists beginnings "
            "of names that may be left over."
        )


def _nearest(name: str, names: Sequence[str] | Mapping[str, Leaf], words: str) -> str:
    close = difflib.get_close_matches(name, list(names), 1, 0.75)
    return f" ({words} {close[0]})" if close else ""
