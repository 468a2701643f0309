"""Averages that stay right: totals and counts, added on device, divided when read."""

from typing import NamedTuple

import jax.numpy as jnp

from robustjax.types import Array


class Mean(NamedTuple):
    """A mean that can still be merged: `total / count`.

    total: scalar (or stacked) float32, the sum of the values that count.
    count: float32 of the same shape, how many values that are.
    """

    total: Array
    count: Array


def mean_of(values: Array, mask: Array | None = None) -> Mean:
    """Mean of the values whose mask is True: `sum(mask * values) / sum(mask)`.

    Args:
      values: `[B]`, numbers or booleans.
      mask: `[B]` bool, False for rows that must not count; their values may be
        anything, NaN too. None: all rows count.

    Returns:
      A `Mean`.

    >>> float(value(mean_of(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1, 1, 0]) > 0)))
    2.0
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.float32)
    if mask is None:
        return Mean(values.sum(), jnp.full((), values.size, values.dtype))
    return Mean(jnp.where(mask, values, 0).sum(), mask.astype(values.dtype).sum())


def merge(first: Mean, second: Mean) -> Mean:
    """The mean over both sets of values.

    >>> one, three = mean_of(jnp.ones(1)), mean_of(jnp.full(3, 5.0))
    >>> float(value(merge(one, three)))
    4.0
    """
    return Mean(first.total + second.total, first.count + second.count)


def value(mean: Mean) -> Array:
    """`total / count`; NaN where nothing counted."""
    empty = mean.count == 0
    return jnp.where(empty, jnp.nan, mean.total / jnp.where(empty, 1, mean.count))
