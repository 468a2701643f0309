"""On what an experiment runs: devices, processes, precision, memory. All from flags.

A run may go on with other values, on another number of devices, but for `dtype` and
`microbatches`: they change the arithmetic and what BatchNorm sees.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from robustjax import models, parallel
from robustjax.methods.base import Method
from robustjax.methods.microbatch import microbatches
from robustjax.models.base import Model
from robustjax.models.compiling import quick_options


@dataclass(frozen=True)
class Machine:
    num_devices: int | None = None
    """Devices to use, of all processes; absent: as many as can share a batch."""
    shard_params: bool = False
    """Devices share weights, averages and the optimizer's state (FSDP)."""
    microbatches: int = 1
    """Slices of every batch, one after the other: for what does not fit in memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the net computes in; weights, attacks and losses are float32."""
    remat: Literal["none", "products", "blocks"] = "none"
    """What the backward pass computes again: nothing; what lies between convolutions
    and matrix products; or whole blocks, where the net has blocks."""
    coordinator: str | None = None
    """host:port of process 0, where the machine does not tell (docs/pods.md)."""
    num_processes: int | None = None
    """How many processes there are; with --coordinator."""
    process_id: int | None = None
    """Which one this is, from 0; with --coordinator."""
    cache: bool = True
    """Keep compiled programs (experiments/compilation_cache.py says where)."""


HERE = Machine()


def of(config: Any) -> Machine:
    """The `Machine` in a config, or in a dataclass inside of it; else the defaults."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Machine):
            return value
        if dataclasses.is_dataclass(value) and (found := of(value)) != HERE:
            return found
    return HERE


@contextlib.contextmanager
def started(machine: Machine) -> Iterator[None]:
    """Inside, the processes know each other, and only process 0 prints.

    Call it before anything of JAX.
    """
    where = machine.coordinator, machine.num_processes, machine.process_id
    with parallel.joined(*where), contextlib.ExitStack() as stack:
        if not parallel.is_writer():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def mesh(machine: Machine, *batch_sizes: int) -> Any:
    """The devices to use as a mesh; None: one, without a mesh.

    Args:
      machine: the flags.
      batch_sizes: rows that they share, microbatch by microbatch, of the data and of
        each further stream; none: any number.

    Raises:
      ValueError: they cannot share it, or there are fewer devices than asked for.
    """
    devices, count = jax.devices(), machine.num_devices
    together, slices = parallel.num_processes() > 1, machine.microbatches
    if count is None:
        counts = range(len(devices), 0, -1)
        rows = math.gcd(*batch_sizes)  # of none it is 0
        fitting = (n for n in counts if rows % (slices * n) == 0)
        count = len(devices) if together else next(fitting, 1)
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"num_devices is {count}; there are {len(devices)}. Give 1 to that."
        )
    if together and count != len(devices):
        raise ValueError(
            f"num_devices is {count}, but {parallel.num_processes()} processes have "
            f"{len(devices)}: with several processes all are used. Leave it out."
        )
    for batch_size in batch_sizes:
        if batch_size % (slices * count):
            raise ValueError(
                f"batch_size {batch_size} cannot be shared by {count} devices in "
                f"microbatches={slices}: give a multiple of {slices * count}."
            )
    return None if len(devices) == 1 else parallel.data_mesh(devices[:count])


def fit_options(machine: Machine, *batch_sizes: int) -> dict[str, Any]:
    """What `fit` is told: mesh and sharing."""
    return {
        "mesh": mesh(machine, *batch_sizes),
        "shard_params": machine.shard_params and len(jax.devices()) > 1,
    }


def step_options(machine: Machine = HERE) -> dict[str, Any]:
    """What `fit` is told of the steps of a convolutional net on a `Resident` set.

    On CPU ten steps per call ask for temporary memory once, and the compiler's level 1
    takes a quarter off compiling and makes no slower steps (docs/benchmarks.md).
    Elsewhere, and where devices share weights, a loop brings nothing and takes memory.
    """
    looped = jax.default_backend() == "cpu" and not machine.shard_params
    return {
        "steps_per_dispatch": 10 if looped else 1,
        "compiler_options": models.convolution_options() | quick_options(1),
    }


def method(machine: Machine, whole: Method) -> Method:
    """The method in microbatches."""
    return microbatches(whole, machine.microbatches)


def net_options(machine: Machine, has_blocks: bool) -> dict[str, Any]:
    """What a net of the zoo is told: the type it computes in, and its blocks' remat.

    Raises:
      ValueError: blocks are to be computed again where there are none.
    """
    options: dict[str, Any] = {"dtype": jnp.dtype(machine.dtype)}
    if machine.remat == "blocks":
        if not has_blocks:
            raise ValueError(
                "remat is 'blocks', but this net has none of its own: give 'products'."
            )
        options["remat"] = True
    return options


def net(machine: Machine, plain: Model) -> Model:
    """The net, keeping its products only, where that is asked for."""
    return models.rematerialized(plain) if machine.remat == "products" else plain
