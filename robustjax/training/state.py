"""Everything that changes during training, in one pytree."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from robustjax.methods.base import Method
from robustjax.models.base import Model
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
