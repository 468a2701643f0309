"""The one train step, for every method."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from robustjax.methods.base import Method
from robustjax.metrics import Mean
from robustjax.training.state import Ema, TrainState
from robustjax.types import Array, Batch, PyTree

Decay = float | Callable[[Array], Array]
Metrics = dict[str, Mean]


def make_train_step(
    method: Method, tx: optax.GradientTransformation, ema_decay: Decay | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Build the pure train step; the caller compiles it.

    Step t draws from `fold_in(state.key, t)`. With `method.repeats = m > 1` it makes m
    updates on the batch, update r from `fold_in(fold_in(state.key, t), r)`, so a
    schedule in `tx` counts `m * steps` updates.

    Args:
      method: how gradients are made.
      tx: what becomes of them.
      ema_decay: d of `ema <- d * ema + (1 - d) * value`, after every update; a number
        or a function of the step such as `ramped(0.999)` or `averaged_from(5000)`.
        The floating-point leaves of `extra` (BatchNorm statistics) are averaged like
        the weights, other leaves are copied.

    Returns:
      `step(state, batch) -> (state, metrics)`. It refuses a batch with a mask where the
      model has statistics: padded rows would enter those of BatchNorm, which no mask
      undoes.

    Raises:
      ValueError: method.repeats is below 1, or a number ema_decay outside [0, 1).
    """
    if isinstance(ema_decay, int | float) and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay is {ema_decay}; give a number from 0 to below 1.")
    if method.repeats < 1:
        raise ValueError(f"method.repeats is {method.repeats}; give 1 or more.")

    def update(state: TrainState, batch: Batch, key) -> tuple[TrainState, Metrics]:
        grads, aux = method.grads(
            state.params, state.extra, state.carry, batch, state.step, key
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None and ema is not None:
            decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
            ema = Ema(
                _average(ema.params, params, decay),
                _average(ema.extra, aux.extra, decay),
            )
        state = dataclasses.replace(
            state,
            params=params,
            extra=aux.extra,
            opt_state=opt_state,
            carry=aux.carry,
            ema=ema,
        )
        return state, aux.metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _refuse_masks(state, batch)
        key = jax.random.fold_in(state.key, state.step)
        if method.repeats == 1:
            state, metrics = update(state, batch, key)
        else:

            def body(state, repeat):
                return update(state, batch, jax.random.fold_in(key, repeat))

            state, stacked = jax.lax.scan(body, state, jnp.arange(method.repeats))
            metrics = jax.tree.map(lambda v: v.sum(0), stacked)
        return dataclasses.replace(state, step=state.step + 1), metrics

    return step


def _refuse_masks(state: TrainState, batch: Batch) -> None:
    statistics = jax.tree_util.tree_leaves_with_path(state.extra)
    if not statistics:
        return
    for name, rows in {"batch": batch, **(batch.streams or {})}.items():
        if rows.mask is None:
            continue
        leaf = jax.tree_util.keystr(statistics[0][0], simple=True, separator="/")
        raise ValueError(
            f"{name} has a mask, but the model has statistics ({leaf}): padded rows "
            "would enter those of BatchNorm. Train on whole batches with mask=None "
            "(a `resident` set and `stream` give no others), or on a model without "
            "BatchNorm."
        )


def ramped(decay: float) -> Callable[[Array], Array]:
    """Decay that grows from 0.1: `min(decay, (1 + t) / (10 + t))` at step t.

    >>> [round(float(ramped(0.99)(jnp.array(t))), 2) for t in (0, 10, 10_000)]
    [0.1, 0.55, 0.99]
    """

    def at(step: Array) -> Array:
        t = step.astype(jnp.float32)
        return jnp.minimum(decay, (1 + t) / (10 + t))

    return at


def averaged_from(start: int, every: int = 1) -> Callable[[Array], Array]:
    """Decay that makes an equal average from a step on: stochastic weight averaging.

    The average is the mean of the weights after the steps start, start + every, ...:
    `n = (t - start) / every`, `d = n / (n + 1)` where n is whole, else 1. Before
    `start` d = 0: the averages are the weights. For methods with `repeats = 1`.

    Args:
      start: the first step that counts, from 0.
      every: steps between weights that count; the authors take one of each epoch.

    Raises:
      ValueError: start is below 0 or every below 1.

    Reference: Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better
    Generalization, arXiv:1803.05407.

    Differs from the authors' code: BatchNorm's statistics are averaged like the
    weights; there a pass over the training set estimates them anew for the average.

    >>> decay = averaged_from(4)
    >>> [round(float(decay(jnp.array(t))), 2) for t in (0, 4, 5, 6, 7)]
    [0.0, 0.0, 0.5, 0.67, 0.75]
    """
    if start < 0 or every < 1:
        raise ValueError(
            f"start is {start}, every {every}; give 0 or more, and 1 or more."
        )

    def at(step: Array) -> Array:
        since = jnp.maximum(jnp.asarray(step) - start, 0)
        n = (since // every).astype(jnp.result_type(float))
        return jnp.where(since % every == 0, n / (n + 1), 1.0)

    return at


def _average(average: PyTree, value: PyTree, decay: Array | float) -> PyTree:
    def leaf(a: Array, v: Array) -> Array:
        if not jnp.issubdtype(v.dtype, jnp.floating):
            return v
        return (decay * a + (1 - decay) * v).astype(a.dtype)

    return jax.tree.map(leaf, average, value)
