"""Everything that changes during training, in one pytree."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from robustjax.methods.base import Method
from robustjax.models.base import Model
from robustjax.parallel import constrain, replicated, spread
from robustjax.types import Array, Batch, Key, PyTree


class Ema(NamedTuple):
    """Moving averages of the weights and of the floating-point statistics."""

    params: PyTree
    extra: PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "extra", "opt_state", "carry", "ema", "key"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a training run; all of it goes into a checkpoint.

    step:      int32 scalar, how many batches have been learned from.
    params:    the weights.
    extra:     BatchNorm statistics, or `{}`.
    opt_state: of the optax transformation.
    carry:     what the method remembers.
    ema:       `Ema`, or None where no average is kept.
    key:       typed PRNG key; constant: step t uses `fold_in(key, t)`.
    """

    step: Array
    params: PyTree
    extra: PyTree
    opt_state: PyTree
    carry: PyTree
    ema: Ema | None
    key: Key


def create_state(
    key: Key,
    model: Model,
    method: Method,
    tx: optax.GradientTransformation,
    batch: Batch,
    *,
    ema: bool = False,
    start: tuple[PyTree, PyTree] | None = None,
) -> TrainState:
    """Initialize model, method and optimizer.

    Args:
      key: PRNG key; split for the weights and for the steps.
      model: what is trained.
      method: how.
      tx: the optimizer.
      batch: an example of the batches to come, for shapes.
      ema: whether averages are kept; they begin at the initial weights.
      start: `(params, extra)` to go on from instead of `model.init`.

    Returns:
      The state before the first step.
    """
    init_key, step_key = jax.random.split(key)
    params, extra = model.init(init_key, batch.x) if start is None else start
    # Donated buffers must not be shared, so every part of the state is a copy.
    params, extra = jax.tree.map(jnp.array, (params, extra))
    averages = Ema(*jax.tree.map(jnp.array, (params, extra))) if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        extra=extra,
        opt_state=jax.tree.map(jnp.array, tx.init(params)),
        carry=jax.tree.map(jnp.array, method.init(params, batch)),
        ema=averages,
        key=step_key,
    )


def placement(state: TrainState, mesh: Any, shard_params: bool = False) -> TrainState:
    """Where each leaf of a state lies: on every device, or shared out (`spread`).

    Shared out are weights, their averages and what the optimizer keeps for them;
    statistics and what the method carries are on every device.

    Args:
      state: arrays or their shapes.
      mesh: the devices.
      shard_params: whether to share out.

    Returns:
      A `TrainState` of shardings.
    """
    placed = jax.tree.map(lambda _: replicated(mesh), state)
    if not shard_params:
        return placed
    ema = placed.ema
    if state.ema is not None:
        ema = ema._replace(params=spread(state.ema.params, mesh))
    return dataclasses.replace(
        placed,
        params=spread(state.params, mesh),
        opt_state=spread(state.opt_state, mesh),
        ema=ema,
    )


def sharing(method: Method, mesh: Any) -> Method:
    """The method for weights that the devices share: gathered once, before it begins.

    The attack sees whole weights and needs no other device; the gradient is handed back
    divided, so that each device updates its own part.
    """

    def grads(params, extra, carry, batch, step, key):
        whole = constrain(params, replicated(mesh))
        found, aux = method.grads(whole, extra, carry, batch, step, key)
        return constrain(found, spread(found, mesh)), aux

    return method._replace(grads=grads, stages=None)
