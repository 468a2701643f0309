"""One program for one device, several, and several hosts.

The state is replicated, batches are split by rows over the mesh axis "data", and the
compiler adds the one all-reduce that averages the gradients. No other file names a
mesh or a process.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from robustjax.types import PyTree


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis "data".

    Args:
      devices: which devices; None: all, of all processes.

    Raises:
      ValueError: `devices` is empty.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ValueError("devices is empty; give at least one of jax.devices().")
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def split_rows(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over the devices."""
    return NamedSharding(mesh, P("data"))


def constrain_rows(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Inside a trace: divide every leaf's leading axis; without a mesh, nothing."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, split_rows(mesh))


def check_rows(batch_size: int, mesh: Mesh | None) -> None:
    """Raise ValueError where the rows of a batch cannot be shared out evenly."""
    if mesh is not None and batch_size % mesh.size:
        raise ValueError(
            f"batch_size {batch_size} cannot be split evenly over {mesh.size} devices; "
            f"give a multiple of {mesh.size}."
        )


def put_global(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
    """Place arrays that every process holds in full; None: on the default device."""
    if sharding is None:
        return jax.tree.map(jnp.asarray, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: _put_leaf(leaf, sharding), tree)


def _put_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put_leaf(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def fetch(tree: PyTree) -> PyTree:
    """Copy to host memory as numpy arrays, whole, in every process."""

    def leaf(value: Any) -> np.ndarray:
        whole = not isinstance(value, jax.Array) or (
            value.is_fully_addressable or value.is_fully_replicated
        )
        if whole:
            return np.asarray(value)
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))

    return jax.tree.map(leaf, tree)


def is_writer() -> bool:
    """Whether this process writes files and lines: process 0 does."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has come here; alone, at once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
