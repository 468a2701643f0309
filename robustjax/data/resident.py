"""A whole data set on the device, and which example comes when: pure functions.

The order of epoch e is `permutation(fold_in(key, e))`, so the batch at a step follows
from (key, step) alone: resume is exact and steps can be scanned in one dispatch.

Measured on two CPU cores with 40,000 CIFAR images: gathering a batch of 128 takes
0.02 ms, a permutation 5 ms. Hence compute the order once per dispatch
(`batch_indices`) and gather in the scan (`take`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from robustjax.types import Array, Batch, Key


class Resident(NamedTuple):
    """A data set on the device: a pytree that `jit` takes as data.

    x:     `[N, ...]` uint8 pixels.
    y:     `[N]` int32 labels.
    scale: float32 scalar, the pixel value that stands for 1.0.
    """

    x: Array
    y: Array
    scale: Array


def resident(x: np.ndarray, y: np.ndarray, max_value: int | None = None) -> Resident:
    """Put a data set on the device.

    Args:
      x: `[N, ...]` uint8 pixels.
      y: `[N]` integer labels.
      max_value: the pixel value that stands for 1.0 (`Dataset.max_value`; 16 for the
        digits). None: 255, and x is refused where no pixel is above 127: such data
        would be trained on dark, at a budget that is too large for it. Where images
        really are that dark, say `max_value=255`.

    Returns:
      The set on the default device.

    Raises:
      TypeError: x is not uint8, or y not integer.
      ValueError: x and y differ in length or are empty, y is not `[N]` or has a label
        below 0, or max_value does not fit the pixels.

    >>> x = np.full((5, 2, 2, 1), 16, np.uint8)
    >>> float(resident(x, np.arange(5), max_value=16).scale)
    16.0
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype != np.uint8:
        raise TypeError(
            f"x is {x.dtype}; a resident set is uint8 (floats would take four times "
            "the memory). `load` returns uint8."
        )
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) == 0:
        shapes = f"x has shape {x.shape} and y {y.shape}"
        raise ValueError(f"{shapes}; give as many labels as examples, one or more.")
    if y.ndim > 1:
        raise ValueError(
            f"y has shape {y.shape}; give [N] integer labels (one-hot: y.argmax(-1)). "
            "Soft labels come from `mix` or from a loss, see `smoothed`."
        )
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"y is {y.dtype}; labels are integers, y.astype('int32').")
    if y.min() < 0:
        raise ValueError(f"y has the label {y.min()}; labels are 0, 1, ..., K - 1.")
    return Resident(
        jnp.asarray(x), jnp.asarray(y, jnp.int32), jnp.float32(_scale(x, max_value))
    )


def _scale(x: np.ndarray, max_value: int | None) -> int:
    largest = int(x.max())
    if max_value is None:
        if largest <= 127:
            raise ValueError(
                f"x has no pixel above {largest}, and max_value was not given: 255 "
                "would make every image dark. Give the value that stands for 1.0, "
                "Dataset.max_value (16 for the digits), or max_value=255 if the images "
                "are dark."
            )
        return 255
    if max_value < 1:
        raise ValueError(f"max_value is {max_value}; it must be at least 1.")
    if largest > max_value:
        raise ValueError(
            f"max_value is {max_value}, but x has the pixel {largest}: it would lie "
            "outside the box [0, 1]. Give the largest value that a pixel can have."
        )
    return max_value


def to_float(x: Array, max_value: Array | int) -> Array:
    """Return pixels as float32 in [0, 1]: `x * (1 / max_value)`.

    XLA turns the division by a scalar into this product anyway; written as a product it
    gives the same bits in NumPy, eagerly and jitted. It is at most one unit in the last
    place from the quotient, never above 1, and exactly 1 for 255 of 255.

    Args:
      x: uint8 pixels of any shape.
      max_value: the pixel value that stands for 1.0; `Resident.scale`.

    Returns:
      float32, the shape of x.
    """
    factor = 1 / jnp.asarray(max_value, jnp.float32)
    return jnp.asarray(x).astype(jnp.float32) * factor


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return `n // batch_size`: the last, incomplete batch is dropped.

    Raises:
      ValueError: not even one batch fits.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"batch_size is {batch_size} with {n} examples; it must be 1 to {n}."
        )
    return n // batch_size


def epoch_order(key: Key, epoch: Array | int, n: int) -> Array:
    """Return the order of the examples in one epoch.

    `permutation(fold_in(key, epoch), n)`

    Args:
      key: one key for the whole training.
      epoch: number of the epoch, from 0.
      n: how many examples there are.

    Returns:
      `[n]` int32.
    """
    return jax.random.permutation(
        jax.random.fold_in(key, epoch), jnp.arange(n, dtype=jnp.int32)
    )


def batch_indices(
    key: Key, step: Array | int, num_steps: int, n: int, batch_size: int
) -> Array:
    """Return which examples the steps `step .. step + num_steps - 1` see.

    Meant to be scanned over. An epoch's order is computed once, and only for epochs
    that the steps touch.

    Args:
      key: one key for the whole training.
      step: the first step, counted from the beginning of the training; may be traced.
      num_steps: how many steps (static).
      n: how many examples there are.
      batch_size: examples per step.

    Returns:
      `[num_steps, batch_size]` int32 positions in the data set.

    Raises:
      ValueError: batch_size or num_steps do not fit.

    >>> rows = batch_indices(jax.random.key(0), 0, 2, n=4, batch_size=2)
    >>> sorted(rows.flatten().tolist())
    [0, 1, 2, 3]
    """
    per_epoch = steps_per_epoch(n, batch_size)
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    step = jnp.asarray(step, jnp.int32)
    first_epoch, first = step // per_epoch, step % per_epoch
    # A window of num_steps touches at most this many epochs, wherever it begins.
    num_epochs = (num_steps + per_epoch - 2) // per_epoch + 1

    def order(offset: Array) -> Array:
        # `cond` inside `map` skips the sort of an epoch that is not reached.
        rows = lax.cond(
            offset * per_epoch < first + num_steps,
            lambda: epoch_order(key, first_epoch + offset, n),
            lambda: jnp.zeros(n, jnp.int32),
        )
        return rows[: per_epoch * batch_size].reshape(per_epoch, batch_size)

    orders = lax.map(order, jnp.arange(num_epochs, dtype=jnp.int32))
    orders = orders.reshape(num_epochs * per_epoch, batch_size)
    return lax.dynamic_slice_in_dim(orders, first, num_steps)


def take(data: Resident, index: Array) -> Batch:
    """Gather examples as uint8 pixels: crop and flip them, then `to_float`.

    Args:
      data: the set.
      index: `[B]` int32 positions, a row of `batch_indices`.

    Returns:
      A batch whose `x` is uint8 and whose `index` is the position in the set.
    """
    return Batch(x=data.x[index], y=data.y[index], index=index)


def batch_at(data: Resident, key: Key, step: Array | int, batch_size: int) -> Batch:
    """Return the batch of one step, as float32 in [0, 1].

    It sorts the whole epoch for one batch: in a loop over steps use `batch_indices`
    once and `take` in the loop, which gives the same batches.

    Args:
      data: the set.
      key: one key for the whole training.
      step: counted from the beginning of the training; may be traced.
      batch_size: examples per step; the last incomplete batch of an epoch is dropped.

    Returns:
      The batch; `index` is the position in the set.

    >>> data = resident(np.full((4, 2, 2, 1), 255, np.uint8), np.arange(4))
    >>> batch = batch_at(data, jax.random.key(0), 3, batch_size=2)
    >>> batch.x.shape, float(batch.x.max())
    ((2, 2, 2, 1), 1.0)
    """
    index = batch_indices(key, step, 1, data.x.shape[0], batch_size)[0]
    batch = take(data, index)
    return batch._replace(x=to_float(batch.x, data.scale))


def eval_batches(
    x: np.ndarray, y: np.ndarray, batch_size: int, max_value: int | None = None
) -> Iterator[Batch]:
    """Yield every example exactly once, in order, in batches of one shape.

    The last batch is padded with copies of its first row, whose `mask` is False.

    Args:
      x: `[N, ...]` uint8 pixels, or floats in the model's box.
      y: `[N]` integer labels.
      batch_size: rows of every batch.
      max_value: the pixel value that stands for 1.0; needed for uint8.

    Yields:
      Batches of NumPy arrays with `index` and `mask`, x float32.

    Raises:
      ValueError: sizes do not fit, or uint8 without max_value.

    >>> x, y = np.zeros((5, 2), np.float32), np.zeros(5, np.int32)
    >>> [int(b.mask.sum()) for b in eval_batches(x, y, 2)]
    [2, 2, 1]
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x has {len(x)} examples and y {len(y)} labels.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if np.issubdtype(x.dtype, np.integer) and max_value is None:
        raise ValueError(
            f"x is {x.dtype}, so max_value is needed: give Dataset.max_value (255 for "
            "usual images)."
        )
    return _eval_batches(x, y, batch_size, max_value)


def _eval_batches(
    x: np.ndarray, y: np.ndarray, batch_size: int, max_value: int | None
) -> Iterator[Batch]:
    for start in range(0, len(x), batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        mask = index < len(x)
        index = np.where(mask, index, start).astype(np.int32)
        rows = x[index].astype(np.float32)
        if max_value is not None and np.issubdtype(x.dtype, np.integer):
            rows = rows * (np.float32(1) / np.float32(max_value))  # as in `to_float`
        # Batch is annotated with jax.Array; jit takes NumPy arrays just as well.
        yield Batch(rows, y[index].astype(np.int32), index, mask)  # type: ignore[arg-type]


def split_validation(
    seed: int | Key, x: np.ndarray, y: np.ndarray, num_validation: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Set examples aside at random: the same ones for the same seed.

    Args:
      seed: an int or a key.
      x: `[N, ...]` images.
      y: `[N]` labels.
      num_validation: how many to set aside; 0 sets none aside.

    Returns:
      `(x_train, y_train), (x_validation, y_validation)`, each in the order of x.

    Raises:
      ValueError: nothing would remain for training.
    """
    if not 0 <= num_validation < len(x):
        raise ValueError(
            f"num_validation is {num_validation} with {len(x)} examples; it must be 0 "
            f"to {len(x) - 1}."
        )
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    order = np.asarray(jax.random.permutation(key, len(x)))
    validation = np.sort(order[:num_validation])
    train = np.sort(order[num_validation:])
    return (x[train], y[train]), (x[validation], y[validation])
