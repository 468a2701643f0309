"""Augmentation on the device, random per example: pure functions for the train step.

Every function takes `(key, x, index, ...)`: one key per step and, per row, which
example it is. Row i draws from `fold_in(key, index[i])`, so what happens to an example
depends neither on the order nor on the size of the batch. Images may be uint8 (cheaper;
use `to_float` afterwards) or float32.

What they cost is in docs/data.md: a tenth to a quarter of a millisecond per batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from robustjax.types import Array, Key

AugmentFn = Callable[[Key, Array, Array], Array]
"""`(key, x [B, H, W, C], index [B]) -> x [B, H, W, C]`, dtype kept."""


class Mixed(NamedTuple):
    """What `cutmix` returns; the loss is `lam * l(y_a) + (1 - lam) * l(y_b)`.

    x:   `[B, H, W, C]` mixed images.
    y_a: `[B]` labels of the images that the patches were put on.
    y_b: `[B]` labels of the images that the patches come from.
    lam: `[B]` float32, the share of the pixels that is still the first image's.
    """

    x: Array
    y_a: Array
    y_b: Array
    lam: Array


def compose(*fns: AugmentFn) -> AugmentFn:
    """Apply augmentations one after the other, each with a key of its own.

    Args:
      *fns: functions `(key, x, index) -> x`; set options with `functools.partial`.

    Returns:
      One such function; with no arguments it changes nothing.

    >>> augment = compose(random_crop, random_flip)
    >>> x = jnp.zeros((2, 8, 8, 1))
    >>> augment(jax.random.key(0), x, jnp.arange(2)).shape
    (2, 8, 8, 1)
    """

    def augment(key: Key, x: Array, index: Array) -> Array:
        for number, fn in enumerate(fns):
            x = fn(jax.random.fold_in(key, number), x, index)
        return x

    return augment


def random_crop(key: Key, x: Array, index: Array, padding: int = 4) -> Array:
    """Pad with zeros and cut the old size out at a random place.

    `x'[h, w] = pad(x)[h + i, w + j]`, i and j uniform on 0 .. 2 * padding

    Args:
      key: one per step.
      x: `[B, H, W, C]`.
      index: `[B]` int32, which example each row is.
      padding: pixels on each side.

    Returns:
      `[B, H, W, C]`, the dtype of x.

    Raises:
      ValueError: x is not `[B, H, W, C]`, or padding is negative.
    """
    _check_images(x)
    if padding < 0:
        raise ValueError(f"padding is {padding}; it must not be negative.")
    offsets = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 2 * padding + 1))(
        _keys(key, index)
    )
    sides = (padding, padding)
    padded = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))

    def crop(image: Array, offset: Array) -> Array:
        return lax.dynamic_slice(image, (offset[0], offset[1], 0), x.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def random_flip(key: Key, x: Array, index: Array) -> Array:
    """Mirror left and right with probability 1/2.

    Args:
      key: one per step.
      x: `[B, H, W, C]`.
      index: `[B]` int32, which example each row is.

    Returns:
      `[B, H, W, C]`, the dtype of x.

    Raises:
      ValueError: x is not `[B, H, W, C]`.
    """
    _check_images(x)
    flip = jax.vmap(jax.random.bernoulli)(_keys(key, index))
    return jnp.where(flip.reshape(-1, 1, 1, 1), x[:, :, ::-1], x)


def cutout(key: Key, x: Array, index: Array, size: int = 16, fill: float = 0) -> Array:
    """Blank a square of random place, cut off at the borders.

    The center is uniform on the pixels; `size // 2` rows before it and
    `size - size // 2` from it on are set to `fill`.

    Args:
      key: one per step.
      x: `[B, H, W, C]`.
      index: `[B]` int32, which example each row is.
      size: side of the square in pixels.
      fill: the value put there, in the units of x.

    Returns:
      `[B, H, W, C]`, the dtype of x.

    Raises:
      ValueError: x is not `[B, H, W, C]`, or size is below 1.

    Reference: DeVries and Taylor, Improved Regularization of Convolutional Neural
    Networks with Cutout, arXiv:1708.04552.
    Differs from the authors' code: `fill` counts before the model's normalization; 0
    is black, where theirs is the mean.
    """
    _check_images(x)
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1.")
    height, width = x.shape[1:3]

    def draw(k: Key) -> Array:
        return jax.random.randint(
            k, (2,), jnp.zeros(2, jnp.int32), jnp.array([height, width])
        )

    top_left = jax.vmap(draw)(_keys(key, index)) - size // 2
    inside = _box(top_left, top_left + size, height, width)
    return jnp.where(inside, jnp.asarray(fill, x.dtype), x)


def cutmix(key: Key, x: Array, y: Array, index: Array, alpha: float = 1.0) -> Mixed:
    """Put a random patch of the next row's image on each image.

    `lam ~ Beta(alpha, alpha)`; the patch has sides `sqrt(1 - lam)` times those of the
    image, a uniform center, and is cut off at the borders; the returned lam is the
    share that was really kept. The partner of row i is row i + 1, the last row's is
    the first: examples are in random order already.

    Args:
      key: one per step.
      x: `[B, H, W, C]`.
      y: `[B]` int32 labels.
      index: `[B]` int32, which example each row is.
      alpha: parameter of the Beta distribution.

    Returns:
      Images, both labels, and the weight of the first.

    Raises:
      ValueError: x is not `[B, H, W, C]`, or alpha is not positive.

    Reference: Yun et al., CutMix, arXiv:1905.04899.
    Differs from the authors' code: one patch per example instead of one per batch, and
    the partner is the next row instead of a random one.
    """
    _check_images(x)
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha}; it must be positive.")
    height, width = x.shape[1:3]

    def draw(k: Key) -> tuple[Array, Array]:
        key_share, key_center = jax.random.split(k)
        if alpha == 1:  # Beta(1, 1) is uniform, and compiles much faster
            share = jax.random.uniform(key_share)
        else:
            share = jax.random.beta(key_share, alpha, alpha)
        limits = jnp.array([height, width])
        center = jax.random.randint(key_center, (2,), jnp.zeros(2, jnp.int32), limits)
        half = (limits * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        return jnp.maximum(center - half, 0), jnp.minimum(center + half, limits)

    low, high = jax.vmap(draw)(_keys(key, index))
    inside = _box(low, high, height, width)
    area = jnp.prod(high - low, axis=-1).astype(jnp.float32)
    return Mixed(
        x=jnp.where(inside, jnp.roll(x, -1, axis=0), x),
        y_a=y,
        y_b=jnp.roll(y, -1),
        lam=1 - area / (height * width),
    )


def _keys(key: Key, index: Array) -> Key:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def _box(low: Array, high: Array, height: int, width: int) -> Array:
    """`[B, H, W, 1]` bool: low <= (h, w) < high, `low` and `high` `[B, 2]`."""
    inside = []
    for axis, size in enumerate((height, width)):
        place = jnp.arange(size).reshape(1, -1)
        inside.append(
            (place >= low[:, axis].reshape(-1, 1))
            & (place < high[:, axis].reshape(-1, 1))
        )
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def _check_images(x: Array) -> None:
    if x.ndim != 4:
        raise ValueError(
            f"x has shape {x.shape}; augmentation needs images [B, H, W, C]."
        )
