"""Wrappers on a problem whose gradient then transfers to other models: DI and TI.

Both change the gradient only. Score, logits and success stay those of the point itself,
so bookkeeping (`keep`, `success`, the bracket of an attack) means what it always means.
They compose with each other, with every attack and with `eot`:

    def attack_fn(key, problem):  # MI + DI + TI
        return rj.momentum(10)(key, translation_invariant(input_diversity(problem)))
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.problems import Problem, example_keys
from robustjax.types import Array, Key

HIGHEST = jax.lax.Precision.HIGHEST  # pixels are moved, not rounded


def input_diversity(
    problem: Problem,
    *,
    smallest: float = 0.9,
    probability: float = 0.5,
    fill: float = 0.0,
    image_axes: str = "HWC",
) -> Problem:
    """DI: the gradient is taken through a random resizing and padding of each image.

    `grad_x score(T(x))`: with `probability`, T shrinks the image to s rows (nearest
    pixel, its proportions kept), s uniform in {floor(smallest * H), ..., H - 1}, and
    puts it at a random place on a canvas of the old size; else T(x) = x. Each example
    draws its own T at each step, from the step's key and its index.
    Reference: Xie et al., Improving Transferability of Adversarial Examples with Input
    Diversity, arXiv 1803.06978.
    Differs from the authors' code: theirs enlarges the canvas (299 to 330 pixels, the
    image covering 299 to 329) and shows the model larger images; here the canvas keeps
    its size, so that every model can read it, and 0.9 is about their 299 / 330. One
    draw for each example, theirs is one for the batch. Where nothing of a step but its
    gradient is kept (`keep=last`) the point's own score costs nothing; else it is a
    forward pass more.

    Args:
      problem: on images `[B, H, W, C]`, or `[B, C, H, W]` with `image_axes="CHW"`.
      smallest: share of the image's rows that the smallest copy has, in (0, 1).
      probability: of a transformation, in [0, 1].
      fill: the canvas, in input units.
      image_axes: "HWC" or "CHW".

    Raises:
      ValueError: a number out of its range, or inputs that are no images.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> f = lambda x: x.reshape(len(x), -1)[:, :2]
    >>> x, y = jnp.full((1, 8, 8, 1), 0.5), jnp.array([0])
    >>> def attack_fn(key, problem):
    ...     return rj.fgsm()(key, input_diversity(problem))
    >>> rj.attack(f, x, y, rj.linf(0.1), attack_fn).success.tolist()
    [True]
    """
    if not 0 < smallest < 1:
        raise ValueError(f"smallest={smallest}: pass a share inside (0, 1), as 0.9.")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability}: pass a number in [0, 1].")
    height, width = image_size(problem.x, image_axes)
    low = math.floor(smallest * height)
    if low < 1:
        raise ValueError(
            f"smallest={smallest} leaves no row of {height}: at least {1 / height:g}."
        )

    def one(key: Key, image: Array) -> Array:
        draws = jax.random.uniform(key, (4,))  # one hash: quick to compile

        def pick(draw: Array, low: Any, high: Any) -> Array:  # of {low, ..., high}
            return low + (draw * (high - low + 1)).astype(jnp.int32)

        rows = pick(draws[0], low, height - 1)
        rows = jnp.where(draws[1] < probability, rows, height)
        columns = jnp.maximum(rows * width // height, 1)
        top = pick(draws[2], 0, height - rows)
        left = pick(draws[3], 0, width - columns)
        across = _nearest(height, rows, top, image.dtype)
        along = _nearest(width, columns, left, image.dtype)
        moved = jnp.einsum("ih,hwc,jw->ijc", across, image, along, precision=HIGHEST)
        canvas = 1 - across.sum(1)[:, None, None] * along.sum(1)[None, :, None]
        return moved + fill * canvas

    def score(x_adv: Array, key: Key | None) -> tuple[Array, Array]:
        if key is None:
            raise ValueError(
                "input_diversity draws transformations: call the problem's score with "
                "a key."
            )
        key_model, key_draw = jax.random.split(key)
        images = to_hwc(x_adv, image_axes)
        images = jax.vmap(one)(example_keys(key_draw, problem.index), images)
        seen = finite_gradient(from_hwc(images, image_axes))
        plain = problem.score(x_adv, key_model)
        through = problem.score(seen, key_model)
        return jax.tree.map(_value_and_path, plain, through)

    return problem._replace(score=score)


def translation_invariant(
    problem: Problem,
    *,
    size: int = 15,
    sigma: float | None = None,
    image_axes: str = "HWC",
) -> Problem:
    """TI: the gradient is smoothed by a Gaussian kernel, channel by channel.

    `W * grad_x score(x)`, W of `size` x `size` pixels and sum 1, zeros beyond the edge.
    That is nearly the mean gradient over translated images, weighted by W. Apply it
    last, outside of `input_diversity`, as the authors do.
    Reference: Dong et al., Evading Defenses to Transferable Adversarial Examples by
    Translation-Invariant Attacks, arXiv 1904.02884.
    Differs from the authors' code: nothing in the rule. Theirs are 15 pixels at 299; on
    small images take fewer (`size=3` at 28 pixels is more than in proportion).

    Args:
      problem: on images `[B, H, W, C]`, or `[B, C, H, W]` with `image_axes="CHW"`.
      size: pixels of the kernel's side, odd; 1 changes nothing.
      sigma: of the Gaussian, in pixels; None: `(size - 1) / 6`, as the authors.
      image_axes: "HWC" or "CHW".

    Raises:
      ValueError: an even size, a sigma of 0 or less, or inputs that are no images.

    >>> import jax.numpy as jnp, robustjax as rj
    >>> pixel = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1.0)
    >>> f = lambda x: jnp.sum(x * pixel, (1, 2, 3))[:, None]
    >>> problem = rj.maximize(f, pixel, rj.linf(0.1), lambda z: z[:, 0])
    >>> smooth = translation_invariant(problem, size=3, sigma=1e6)
    >>> rj.score_and_grad(smooth, pixel, None)[2].round(3).ravel()[:4].tolist()
    [0.111..., 0.111..., 0.111..., 0.111...]
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size={size}: a kernel has a middle, pass 1, 3, 5, ...")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma={sigma}: must be above 0 pixels.")
    height, width = image_size(problem.x, image_axes)
    weights = gaussian_weights(size, sigma)
    down, across = toeplitz(weights, height), toeplitz(weights, width)

    @jax.custom_vjp
    def smoothed(x: Array) -> Array:
        return x

    def bwd(_: None, grad: Array) -> tuple[Array]:
        images = to_hwc(jnp.where(jnp.isfinite(grad), grad, 0), image_axes)
        moved = jnp.einsum(
            "ih,bhwc,jw->bijc",
            *(down.astype(grad.dtype), images, across.astype(grad.dtype)),
            precision=HIGHEST,
        )
        return (from_hwc(moved, image_axes),)

    smoothed.defvjp(lambda x: (x, None), bwd)
    return problem._replace(score=lambda x, key: problem.score(smoothed(x), key))


def gaussian_weights(size: int, sigma: float | None = None) -> np.ndarray:
    """`[size]` weights `exp(-d^2 / (2 sigma^2))`, their sum 1; see the argument above.

    >>> gaussian_weights(3, 0.5).round(3).tolist()
    [0.107, 0.787, 0.107]
    """
    reach = size // 2
    sigma = reach / 3 if sigma is None else sigma
    distance = np.arange(-reach, reach + 1) / (sigma or 1.0)
    weights = np.exp(-0.5 * distance**2)
    return weights / weights.sum()


def toeplitz(weights: np.ndarray, length: int) -> np.ndarray:
    """`[length, length]`: convolves by `weights`, with zeros beyond the ends.

    >>> toeplitz(np.array([1.0, 2.0, 1.0]), 3).tolist()
    [[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]]
    """
    reach = len(weights) // 2
    away = np.arange(length)[None, :] - np.arange(length)[:, None] + reach
    inside = (away >= 0) & (away < len(weights))
    return np.where(inside, weights[np.clip(away, 0, len(weights) - 1)], 0.0)


def image_size(x: Array, image_axes: str) -> tuple[int, int]:
    """Height and width of images `[B, H, W, C]` or `[B, C, H, W]`; else ValueError."""
    if image_axes not in ("HWC", "CHW"):
        raise ValueError(f"image_axes={image_axes!r}: choose 'HWC' or 'CHW'.")
    if x.ndim != 4:
        raise ValueError(
            f"x has shape {x.shape}: input transformations need images, [B, H, W, C] "
            "or, with image_axes='CHW', [B, C, H, W]."
        )
    height, width = x.shape[1:3] if image_axes == "HWC" else x.shape[2:]
    return int(height), int(width)


def to_hwc(x: Array, image_axes: str) -> Array:
    """`[B, H, W, C]` of images in either order."""
    return x if image_axes == "HWC" else jnp.moveaxis(x, 1, -1)


def from_hwc(x: Array, image_axes: str) -> Array:
    """The inverse of `to_hwc`."""
    return x if image_axes == "HWC" else jnp.moveaxis(x, -1, 1)


@jax.custom_vjp
def finite_gradient(x: Array) -> Array:
    """The identity, whose gradient has 0 where it would not be finite.

    A matrix product spreads one NaN over a row of the image; this stops it before.

    >>> float(jax.grad(lambda x: jnp.sqrt(finite_gradient(x)))(0.0))
    0.0
    """
    return x


finite_gradient.defvjp(
    lambda x: (x, None),
    lambda _, grad: (jnp.where(jnp.isfinite(grad), grad, jnp.zeros_like(grad)),),
)


@jax.custom_vjp
def _value_and_path(value: Array, path: Array) -> Array:
    """`value`, differentiated as if it were `path`; no arithmetic, so inf stays inf."""
    return value


def _split(_: Any, grad: Array) -> tuple[Array, Array]:
    return jnp.zeros_like(grad), grad


_value_and_path.defvjp(lambda value, path: (value, None), _split)


def _nearest(size: int, shrunk: Array, offset: Array, dtype: Any) -> Array:
    """`[size, size]` 0 or 1: row i of the canvas reads pixel `(i - offset) * size //
    shrunk` of the image; nothing outside. One-hot: no gather, whose gradient scatters.
    """
    place = jnp.arange(size) - offset
    inside = (place >= 0) & (place < shrunk)
    source = place * size // shrunk
    return (inside[:, None] & (source[:, None] == jnp.arange(size)[None])).astype(dtype)
