"""A net that is 1-Lipschitz in L2 by construction: AOL layers and MaxMin."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from robustjax.models.base import Model, from_linen
from robustjax.models.convolution import Convolution, conv2d
from robustjax.types import Array

TINY = 1e-12


def aol_dense(kernel: Array) -> Array:
    """A matrix `[n, m]` rescaled so that `x @ matrix` is 1-Lipschitz in L2.

    Row i is divided by `sqrt(sum_j |K K^T|_ij)`.

    Reference: Prach & Lampert, arXiv:2208.03160 (almost-orthogonal layers).

    >>> aol_dense(jnp.diag(jnp.array([3.0, -2.0]))).tolist()
    [[1.0, 0.0], [0.0, -1.0]]
    """
    total = jnp.sum(jnp.abs(kernel @ kernel.T), 1)
    return kernel * lax.rsqrt(total + TINY)[:, None]


def aol_conv(kernel: Array, *, convolution: Convolution = "auto") -> Array:
    """A kernel `[h, w, C, O]` rescaled so that its convolution is 1-Lipschitz in L2.

    Input channel c is divided by the root of `sum |<k_c, shifted k_c'>|` over all
    shifts and channels c'. It holds for every stride and zero padding: both only leave
    terms out.

    Reference: Prach & Lampert, arXiv:2208.03160.

    >>> float(aol_conv(jnp.full((1, 1, 1, 1), 5.0))[0, 0, 0, 0])
    1.0
    """
    rows, columns = kernel.shape[:2]
    pads = ((rows - 1, rows - 1), (columns - 1, columns - 1))
    # The channels as images of O channels, each against each.
    products = conv2d(
        jnp.transpose(kernel, (2, 0, 1, 3)),
        jnp.transpose(kernel, (0, 1, 3, 2)),
        (1, 1),
        pads,
        convolution=convolution,
    )
    total = jnp.sum(jnp.abs(products), (1, 2, 3))
    return kernel * lax.rsqrt(total + TINY).reshape(1, 1, -1, 1)


def max_min(x: Array) -> Array:
    """MaxMin: both halves of the last axis, sorted pair by pair; 1-Lipschitz.

    Reference: Anil, Lucas & Grosse, arXiv:1811.05381 (GroupSort of size 2).

    >>> max_min(jnp.array([[1.0, 5.0, 3.0, 2.0]])).tolist()
    [[3.0, 5.0, 1.0, 2.0]]
    """
    half = x.shape[-1] // 2
    if 2 * half != x.shape[-1]:
        raise ValueError(f"MaxMin pairs channels: {x.shape[-1]} is an odd number.")
    first = lax.slice_in_dim(x, 0, half, axis=-1)
    second = lax.slice_in_dim(x, half, 2 * half, axis=-1)
    both = jnp.maximum(first, second), jnp.minimum(first, second)
    return jnp.concatenate(both, -1)


def squeeze(x: Array, size: int = 2) -> Array:
    """Pixels into channels, `[B, H, W, C] -> [B, H / s, W / s, s^2 C]`: an isometry.

    >>> squeeze(jnp.zeros((1, 4, 4, 3))).shape
    (1, 2, 2, 12)
    """
    batch, rows, columns, channels = x.shape
    if rows % size or columns % size:
        raise ValueError(
            f"{rows} x {columns} pixels cannot be squeezed by {size}: pad the images "
            "or use fewer convolutions."
        )
    x = x.reshape(batch, rows // size, size, columns // size, size, channels)
    x = jnp.transpose(x, (0, 1, 3, 2, 4, 5))
    return x.reshape(batch, rows // size, columns // size, size * size * channels)


def _center_orthogonal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32):
    """A kernel whose center tap is orthogonal and whose other taps are 0."""
    center = nn.initializers.orthogonal()(key, tuple(shape[2:]), dtype)
    return jnp.zeros(shape, dtype).at[shape[0] // 2, shape[1] // 2].set(center)


class LipschitzNet(nn.Module):
    """AOL convolution, MaxMin, `squeeze` per entry of `channels`; then AOL layers."""

    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    num_classes: int
    shift: float
    convolution: Convolution

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = x.astype(jnp.float32) - self.shift
        for i, width in enumerate(self.channels):
            kernel = self.param(
                f"conv{i + 1}", _center_orthogonal, (3, 3, x.shape[-1], width)
            )
            bias = self.param(f"conv{i + 1}_bias", nn.initializers.zeros, (width,))
            kernel = aol_conv(kernel, convolution=self.convolution)
            x = conv2d(x, kernel, (1, 1), "SAME", convolution=self.convolution)
            x = squeeze(max_min(x + bias.reshape(1, 1, 1, -1)))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((*self.hidden, self.num_classes)):
            name = f"dense{i + 1}" if i < len(self.hidden) else "head"
            kernel = self.param(
                name, nn.initializers.orthogonal(), (x.shape[-1], width)
            )
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (width,))
            x = x @ aol_dense(kernel) + bias.reshape(1, -1)
            if i < len(self.hidden):
                x = max_min(x)
        return x


def lipschitz_net(
    num_classes: int = 10,
    *,
    channels: Sequence[int] = (16, 64),
    hidden: Sequence[int] = (128,),
    shift: float = 0.0,
    convolution: Convolution = "auto",
) -> Model:
    """A net whose logit vector is 1-Lipschitz in L2, whatever its weights.

    `|z(x) - z(x')|_2 <= |x - x'|_2` in exact arithmetic: so `margin / sqrt(2)` is a
    certified radius in L2. Convolutions are 3 x 3, each followed by MaxMin and 2 x 2
    pixels that become channels; then dense layers. Weights begin orthogonal.

    Args:
        num_classes: number of logits.
        channels: of the convolutions, even numbers; the image's edges must be multiples
            of 2 to the power of their count. Empty: dense layers alone.
        hidden: widths of the dense layers, even numbers.
        shift: subtracted from the inputs; scaling them would change the constant.
        convolution: "auto", "plain" (needed for forward mode) or "canonical".

    Returns:
        A model on `[B, H, W, C]` without `extra`.

    Reference: Prach & Lampert, arXiv:2208.03160; MaxMin: Anil et al., arXiv:1811.05381.
    Differs from the authors' code: a small net for 8 x 8 digits, after the paper's
    formulas.

    >>> import jax
    >>> key, x = jax.random.key(0), jnp.zeros((1, 8, 8, 1))
    >>> params, extra = jax.eval_shape(lipschitz_net().init, key, x)
    >>> params["head"].shape
    (128, 10)
    """
    odd = [width for width in (*channels, *hidden) if width % 2]
    if odd:
        raise ValueError(
            f"widths {odd} are odd: MaxMin pairs channels, give even ones."
        )
    return from_linen(
        LipschitzNet(tuple(channels), tuple(hidden), num_classes, shift, convolution)
    )
