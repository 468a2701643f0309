"""Microbatches: a batch in slices, for what does not fit on the device at once."""

import jax
import jax.numpy as jnp

from robustjax.methods.base import Aux, Method
from robustjax.types import Array, Batch, PyTree


def microbatches(method: Method, n: int) -> Method:
    """The method on `n` slices of every batch, one after the other: one gradient.

    `g = sum_i c_i g_i / sum_i c_i`, `c_i` the examples that count in slice i, so for a
    loss that is a mean over examples it is the gradient of the whole batch. Attack and
    loss run slice by slice: memory is that of `B / n` rows. Slice i has the rows
    `i, i + n, i + 2 n, ...`, of streams too: where the devices divide `B / n`, every
    row stays on its device.

    What looks at a batch as a whole looks at a slice: BatchNorm's statistics, which
    move slice by slice, and the worst case of AWP. Slices share the key: noise of an
    example follows from its index, so it is the whole batch's, but dropout draws the
    same masks for every slice.

    Args:
      method: any. Of what it carries, leaves that have the batch's rows are sliced;
        the others pass from slice to slice.
      n: how many slices; must divide the rows of batch and streams. 1: the method.

    Returns:
      A `Method` without stages, so wrap last; its metrics count the rows of all slices.

    Raises:
      ValueError: n is below 1; and in the first step, n does not divide the rows.

    >>> from robustjax.methods.base import from_loss
    >>> def loss(params, extra, carry, batch, step, key):
    ...     return (params * batch.x).mean(), Aux(extra, carry, {})
    >>> batch = Batch(jnp.array([1.0, 2.0, 3.0, 6.0]), jnp.zeros(4))
    >>> method = microbatches(from_loss(loss), 2)
    >>> float(method.grads(1.0, {}, (), batch, 0, jax.random.key(0))[0])
    3.0
    """
    if n < 1:
        raise ValueError(f"n is {n}; give 1 or more microbatches.")
    if n == 1:
        return method

    def grads(params, extra, carry, batch, step, key):
        slices = jax.tree.map(lambda rows: _sliced(rows, n), _numbered(batch))
        first = jax.tree.map(lambda leaf: leaf[0], slices)
        # A leaf of the carry has rows where its shape follows the batch's.
        whole, part = (jax.eval_shape(method.init, params, b) for b in (batch, first))
        leaves, structure = jax.tree.flatten(carry)
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True)
        has_rows = [a.shape != b.shape for a, b in pairs]
        rows = [_sliced(x, n) for x, r in zip(leaves, has_rows, strict=True) if r]
        passed = [x for x, r in zip(leaves, has_rows, strict=True) if not r]

        def one(extra: PyTree, passed: list[Array], rows: list[Array], batch: Batch):
            kinds = {True: iter(rows), False: iter(passed)}
            carry = jax.tree.unflatten(structure, [next(kinds[r]) for r in has_rows])
            found, aux = method.grads(params, extra, carry, batch, step, key)
            after = list(zip(jax.tree.leaves(aux.carry), has_rows, strict=True))
            rows, passed = (
                [x for x, r in after if r is kind] for kind in (True, False)
            )
            weight = _counted(aux, batch)
            found = jax.tree.map(lambda g: jnp.where(weight > 0, weight * g, 0), found)
            return aux.extra, passed, rows, (found, weight, aux.metrics)

        def body(state, sliced):
            extra, passed, sums = state
            extra, passed, rows, terms = one(extra, passed, *sliced)
            return (extra, passed, jax.tree.map(jnp.add, sums, terms)), rows

        shapes = jax.eval_shape(one, extra, passed, [x[0] for x in rows], first)[3]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (extra, passed, sums), rows = jax.lax.scan(
            body, (extra, passed, zeros), (rows, slices)
        )
        found, weight, metrics = sums
        found = jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1), found)
        kinds = {True: iter([_joined(x) for x in rows]), False: iter(passed)}
        carry = jax.tree.unflatten(structure, [next(kinds[r]) for r in has_rows])
        return found, Aux(extra, carry, metrics)

    return method._replace(grads=grads, stages=None)


def _sliced(rows: Array, n: int) -> Array:
    """`[B, ...]` to `[n, B / n, ...]`; the reshape keeps the leading axis in place."""
    if len(rows) % n:
        raise ValueError(
            f"{len(rows)} rows cannot be cut into {n} microbatches; give a multiple of "
            f"{n} rows."
        )
    return jnp.reshape(rows, (-1, n, *rows.shape[1:])).swapaxes(0, 1)


def _joined(slices: Array) -> Array:
    return slices.swapaxes(0, 1).reshape(-1, *slices.shape[2:])


def _numbered(batch: Batch) -> Batch:
    """The batch with its indices written out: a slice alone cannot know them."""
    streams = batch.streams
    if streams is not None:
        streams = {name: _numbered(rows) for name, rows in streams.items()}
    index = batch.index
    if index is None:
        index = jnp.arange(len(batch.x), dtype=jnp.int32)
    return batch._replace(index=index, streams=streams)


def _counted(aux: Aux, batch: Batch) -> Array:
    """How many examples the loss is the mean of."""
    if "loss" in aux.metrics:
        return aux.metrics["loss"].count
    if batch.mask is not None:
        return batch.mask.sum().astype(jnp.float32)
    return jnp.float32(len(batch.x))
