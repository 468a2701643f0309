"""One program for one device, several, and several processes.

The state is replicated or shared out, batches are split by rows over the mesh axis
"data", and the compiler adds the one all-reduce that averages the gradients. No other
file names a mesh or a process.
"""

import contextlib
import itertools
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from robustjax.types import PyTree

LOST_AFTER = 30
"""Seconds without a sign of life after which a process is taken for lost."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the processes of a run; call it before anything else of JAX, in all of them.

    Without arguments the surroundings are asked: Cloud TPU, GKE, SLURM, Open MPI. Where
    they say nothing this process is alone, and nothing happens.

    Args:
      coordinator: "host:port" of process 0, reachable from all.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: some of the three without the others, or a number out of range.
      RuntimeError: JAX has been used already, or the others did not come.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError(
                f"coordinator is {coordinator}, num_processes {num_processes} and "
                f"process_id {process_id}; give all three, or none where the machine "
                "tells (Cloud TPU, SLURM)."
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id is {process_id} of num_processes {num_processes}; give 0 "
                f"to {num_processes - 1}."
            )
        if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
            raise ValueError(
                f"coordinator is {coordinator!r}; give host:port, as in 10.0.0.2:1234."
            )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=LOST_AFTER,
            # How long one that is done waits for the others.
            shutdown_timeout_seconds=LOST_AFTER,
        )
    except ValueError as error:
        # Nobody told where the others are: there are none.
        if coordinator is None and "coordinator_address" in str(error):
            return
        raise


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """`initialize`, and inside an error ends this process at once, with exit code 1.

    Without it the process of an error waits for those it has lost. Where process 0 is
    lost, JAX itself ends the others (SIGABRT, exit code 134); so it does, after
    `LOST_AFTER` seconds, where an accelerator waits for a lost one.

    Args:
      coordinator, num_processes, process_id: see `initialize`.
    """
    initialize(coordinator, num_processes, process_id)
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        print(
            f"Process {jax.process_index()} of {jax.process_count()} stops: "
            + ("another process was lost. " if lost else f"{type(error).__name__}. ")
            + "The last checkpoint is intact: run the same command again, on as many "
            "processes or fewer, and it goes on from there.",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the usual way out waits for all


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


def spread(tree: PyTree, mesh: Mesh, smallest: int = 4096) -> PyTree:
    """Where each leaf of weights lies when devices share them (as in FSDP, ZeRO).

    A leaf is divided along its largest axis that the number of devices divides (of
    equals the first); one of fewer than `smallest` numbers, or without such an axis, is
    on every device.

    Args:
      tree: arrays or their shapes.
      mesh: the devices.
      smallest: numbers of a leaf that is worth dividing.

    Returns:
      A tree of shardings, for the same structure.

    Reference: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054.

    >>> mesh = data_mesh(jax.devices()[:1])
    >>> spread({"w": jnp.zeros((3, 64, 64)), "b": jnp.zeros(64)}, mesh)["w"].spec[1]
    'data'
    """

    def leaf(array: Any) -> NamedSharding:
        fits = [a for a, size in enumerate(array.shape) if size % mesh.size == 0]
        if math.prod(array.shape) < smallest or not fits:
            return replicated(mesh)
        axis = max(fits, key=lambda a: array.shape[a])
        return NamedSharding(mesh, P(*[None] * axis, "data"))

    return jax.tree.map(leaf, tree)


def constrain(tree: PyTree, sharding: PyTree) -> PyTree:
    """Inside a trace: place the leaves; one sharding for all, or a tree of them."""
    return jax.lax.with_sharding_constraint(tree, sharding)


def place(tree: PyTree, sharding: PyTree) -> PyTree:
    """Move device arrays to other places, between devices of all processes."""
    return jax.jit(lambda leaves: leaves, out_shardings=sharding)(tree)


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


def put_global(tree: PyTree, sharding: PyTree) -> PyTree:
    """Place arrays that every process holds in full.

    Args:
      tree: arrays of the host or of this process, equal in all processes.
      sharding: for all leaves, or a tree of them; None: the default device.
    """
    if sharding is None:
        return jax.tree.map(jnp.asarray, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda leaf: _put_leaf(leaf, sharding), tree)
    return jax.tree.map(_put_leaf, tree, sharding)


def put_rows(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Place a batch of which every process holds its own rows, process after process.

    Args:
      tree: `[B / num_processes, ...]` host arrays of this process.
      mesh: divides the rows of all; None: the default device.

    Returns:
      `[B, ...]` arrays.
    """
    if mesh is None or jax.process_count() == 1:
        return put_split(tree, mesh)
    rows = split_rows(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(rows, np.asarray(leaf)),
        tree,
    )


def num_devices(mesh: Mesh | None) -> int:
    """How many devices share the rows; without a mesh, 1."""
    return 1 if mesh is None else mesh.size


def put_shared(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Place what every row reads, equal in all processes: on all devices of a mesh."""
    return put_global(tree, None if mesh is None else replicated(mesh))


def put_split(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Divide the rows of arrays that every process holds in full over the devices."""
    return put_global(tree, None if mesh is None else split_rows(mesh))


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


def local(tree: PyTree) -> PyTree:
    """The tree, with what lies on other processes' devices too fetched to the host."""

    def leaf(value: Any) -> Any:
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return fetch(value)
        return value

    return jax.tree.map(leaf, tree)


def process_rows(batch_size: int) -> slice:
    """Which rows of a batch this process gives, where each gives its own.

    Raises:
      ValueError: they cannot be shared out evenly.

    >>> process_rows(6)
    slice(0, 6, None)
    """
    count = jax.process_count()
    if batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} cannot be split evenly over {count} processes; "
            f"give a multiple of {count}."
        )
    own = batch_size // count
    return slice(jax.process_index() * own, (jax.process_index() + 1) * own)


def num_processes() -> int:
    """How many processes take part."""
    return jax.process_count()


def is_writer() -> bool:
    """Whether this process writes files and lines: process 0 does."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Return when every process has come here; alone, at once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM (preemption) does not end this process: ask whether it came.

    Yields:
      A function that says whether to stop now. Where several processes run, all must
      call it equally often; a signal to one makes it True in all at the same call.
      Outside of the main thread of a single process it is always False.
    """
    if jax.distributed.is_initialized():
        calls = itertools.count(1)
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
