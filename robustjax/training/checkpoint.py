"""Checkpoints: written whole or not at all, and read only where they fit.

A checkpoint is a folder `step_00000500` with the arrays (Orbax) and `meta.json`: what
the leaves are, a checksum of every file, and what the run remembers (settings, best).
It is written beside its place and renamed in one step, so a crash leaves the earlier
checkpoints as they were. This is the only file that imports Orbax.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from robustjax.logging import write_json
from robustjax.parallel import (
    fetch,
    is_writer,
    num_processes,
    put_global,
    wait_for_all,
)
from robustjax.types import PyTree

FORMAT = "robustjax checkpoint 1"
_PREFIX, _SAVING = "step_", ".saving_"


def steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are complete, rising."""
    if not folder.is_dir():
        return []
    found = (_step_of(path) for path in folder.iterdir())
    return sorted(step for step in found if step is not None)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"{_PREFIX}{step:08d}"


def save(folder: Path, step: int, state: PyTree, remembered: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step, atomically.

    Args:
      folder: the run's folder of checkpoints, made where it is missing.
      step: names the checkpoint; one that exists is replaced.
      state: any pytree of arrays and typed PRNG keys.
      remembered: JSON values that come back with `read_meta`.

    Returns:
      The checkpoint's folder.

    Raises:
      OSError: it could not be written (disc full, no permission); what was in `folder`
        before is intact.
    """
    final, saving = path_of(folder, step), folder / f"{_SAVING}{step:08d}"
    leaves, arrays = {}, {}
    for number, (name, leaf) in enumerate(_named_leaves(state)):
        kind, impl = _kind(leaf), None
        if kind != "array":
            impl = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        # What other processes hold too is saved by all of them, each its part.
        array = leaf if num_processes() > 1 else fetch(leaf)
        leaves[name] = {
            "id": f"{number:05d}",
            "kind": kind,
            "impl": impl,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
        }
        if array.size:  # Orbax does not store arrays without elements
            arrays[f"{number:05d}"] = array
    try:
        if is_writer():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(saving, ignore_errors=True)
            saving.mkdir()
        wait_for_all(f"checkpoint {step} begins")
        ocp.save(str((saving / "arrays").absolute()), arrays)
        wait_for_all(f"checkpoint {step} is written")
        if is_writer():
            meta = {"format": FORMAT, "step": step, "leaves": leaves}
            meta |= {"files": _checksums(saving), "remembered": remembered}
            write_json(saving / "meta.json", meta)
            _sync(saving)
            old = final.with_name(_SAVING + "old_" + final.name)
            if final.exists():
                os.replace(final, old)
            os.replace(saving, final)
            _sync_folder(folder)
            shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # Orbax reports a full disc in several types
        with contextlib.suppress(OSError):
            shutil.rmtree(saving, ignore_errors=True)
        raise _write_error(folder, step, error) from error
    wait_for_all(f"checkpoint {step} is in place")
    return final


def prune(folder: Path, keep: set[int]) -> None:
    """Delete the checkpoints of other steps, and what a crash left half written."""
    if not is_writer() or not folder.is_dir():
        return
    for path in folder.iterdir():
        step = _step_of(path)
        if step is not None and step not in keep:
            # Renamed first: a folder that is half deleted must not look complete.
            doomed = path.with_name(_SAVING + "old_" + path.name)
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        elif path.name.startswith(_SAVING):
            shutil.rmtree(path, ignore_errors=True)


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """Read and verify `meta.json` and the checksums of a checkpoint.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is truncated, damaged or foreign; the message says what to do.
    """
    path = path_of(folder, step)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist; {folder} holds the steps "
            f"{steps(folder) or 'none'}."
        )
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no robustjax checkpoint: its meta.json is missing or damaged "
            f"({type(error).__name__}). {_advice(folder, step)}"
        ) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(
            f"{path} is foreign: its format is {found!r}, this version reads "
            f"{FORMAT!r}. {_advice(folder, step)}"
        )
    found = _checksums(path)
    for name, checksum in meta["files"].items():
        if found.get(name) != checksum:
            what = "missing" if name not in found else "truncated or damaged"
            raise ValueError(
                f"{path} is incomplete: its file {name} is {what}. "
                f"{_advice(folder, step)}"
            )
    return meta


def restore(
    folder: Path, step: int, like: PyTree, sharding: Any = None, within: str = ""
) -> PyTree:
    """Read a checkpoint into the structure of `like`.

    Args:
      folder: the run's folder of checkpoints.
      step: which.
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s of the structure, shapes and
        dtypes that are expected; typed PRNG keys come back as such.
      sharding: where to place the arrays, one for all or a tree of them like `like`;
        None: the default device.
      within: read only the part of the saved tree at this path, as in ".params".

    Returns:
      A pytree like `like`.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is damaged, or its leaves are not those of `like`: the message
        names the first leaf that differs.
    """
    meta = read_meta(folder, step)
    path = path_of(folder, step)
    saved = {
        name[len(within) :]: leaf
        for name, leaf in meta["leaves"].items()
        if name.startswith(within)
    }
    wanted = dict(_named_leaves(like))
    _compare(path, saved, wanted)
    arrays = ocp.load(str((path / "arrays").absolute()), _abstract(meta["leaves"]))

    def leaf(name: str):
        entry = saved[name]
        array = arrays.get(entry["id"], np.zeros(entry["shape"], entry["dtype"]))
        if entry["kind"] == "array":
            return np.asarray(array)
        return jax.random.wrap_key_data(jnp.asarray(array), impl=entry["impl"])

    whole = jax.tree.unflatten(jax.tree.structure(like), [leaf(n) for n in wanted])
    return put_global(whole, sharding)


def _compare(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, target in wanted.items():
        if name not in saved:
            raise ValueError(
                f"{path} does not fit this model and optimizer: it has no leaf {name}. "
                "Build the model, method and optimizer that the run was made with (its "
                "config.json says which), or start a new run in another folder."
            )
        entry = saved[name]
        shape, kind = tuple(entry["shape"]), entry["kind"]
        here = target
        if _kind(target) != "array":
            here = jax.eval_shape(jax.random.key_data, target)
        same = shape == here.shape and entry["dtype"] == str(here.dtype)
        if not same or kind != _kind(target):
            raise ValueError(
                f"{path} does not fit: its leaf {name} is "
                f"{entry['dtype']}{list(shape)} ({kind}), expected "
                f"{here.dtype}{list(here.shape)} ({_kind(target)}). "
                "Build the model that the run was made with (its config.json says "
                "which), or start a new run in another folder."
            )
    extra = [name for name in saved if name not in wanted]
    if extra:
        raise ValueError(
            f"{path} does not fit this model and optimizer: it also has the leaf "
            f"{extra[0]}. Build those that the run was made with (its config.json says "
            "which), or start a new run in another folder."
        )


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(_PREFIX + r"(\d{8,})", path.name)
    return int(match[1]) if match else None


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _kind(leaf: Any) -> str:
    """ "array", or what sort of typed key it is, as in "key<fry>"."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return str(leaf.dtype) if is_key else "array"


def _abstract(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {
        entry["id"]: np.empty(entry["shape"], entry["dtype"])
        for entry in leaves.values()
        if 0 not in entry["shape"]
    }


def _checksums(folder: Path) -> dict[str, list[int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path == folder / "meta.json":
            continue
        data = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = [len(data), zlib.crc32(data)]
    return found


def _advice(folder: Path, step: int) -> str:
    earlier = [s for s in steps(folder) if s < step]
    if not earlier:
        return "Delete the run's folder to start anew, or give another one."
    return f"Delete that folder to go on from step {earlier[-1]}, which is beside it."


def _write_error(folder: Path, step: int, error: Exception) -> OSError:
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    full = full or "No space left" in str(error)
    reason = "the disc is full" if full else f"{type(error).__name__}: {error}"
    kept = [s for s in steps(folder) if s != step]
    intact = (
        f"The checkpoint of step {kept[-1]} is intact: "
        if kept
        else "No earlier checkpoint was there: "
    )
    fix = "free some space" if full else "remove the cause"
    return OSError(
        errno.ENOSPC if full else errno.EIO,
        f"the checkpoint of step {step} could not be saved in {folder} ({reason}). "
        f"{intact}{fix} and run the same command again",
    )


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
