"""Convolutional nets for digits: Madry's for 28 x 28, a small one for 8 x 8."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from robustjax.models.base import Model, from_linen
from robustjax.models.convolution import Convolution
from robustjax.models.layers import Conv, Dense, max_pool, normalize
from robustjax.types import Array


class PoolingCNN(nn.Module):
    """Convolution, ReLU and 2 x 2 max-pooling per entry of `channels`, one hidden dense
    layer, logits. He-initialized by fan-in."""

    channels: tuple[int, ...]
    hidden: int
    kernel_size: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any
    convolution: Convolution

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = normalize(x, self.mean, self.std)
        for i, width in enumerate(self.channels):
            x = Conv(
                width,
                self.kernel_size,
                use_bias=True,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                convolution=self.convolution,
                name=f"conv{i + 1}",
            )(x)
            # ReLU is monotone: after the pooling it gives the same for less work.
            x = jax.nn.relu(max_pool(x, convolution=self.convolution))
        x = x.reshape(x.shape[0], -1)
        x = jax.nn.relu(Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        return Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


def madry_mnist(
    num_classes: int = 10,
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 1024,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    dtype: Any = jnp.float32,
    convolution: Convolution = "auto",
) -> Model:
    """Madry's MNIST net: conv 5x5x32, pool, conv 5x5x64, pool, dense 1024, logits.

    Args:
        num_classes: number of logits.
        channels: of the two convolutions (SAME padding).
        hidden: width of the dense layer.
        mean: of the inputs, per channel or one value.
        std: likewise.
        dtype: of the computation; weights and logits are float32.
        convolution: "auto", "plain" (needed for forward mode) or "canonical".

    Returns:
        A model on `[B, H, W, C]` without `extra`.

    Reference: Madry et al., arXiv:1706.06083.
    Differs from the authors' code: He initialization (theirs: truncated normal of 0.1,
    biases 0.1).

    >>> import jax
    >>> model = madry_mnist()
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    3274634
    """
    return from_linen(
        PoolingCNN(
            tuple(channels),
            hidden,
            5,
            num_classes,
            tuple(mean),
            tuple(std),
            dtype,
            convolution,
        )
    )


def small_cnn(
    num_classes: int = 10,
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 128,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    dtype: Any = jnp.float32,
    convolution: Convolution = "auto",
) -> Model:
    """A small net for 8 x 8 digits: conv 3x3x32, pool, conv 3x3x64, pool, dense layer.

    Args:
        num_classes: number of logits.
        channels: of the convolutions (SAME padding), each followed by 2 x 2 pooling.
        hidden: width of the dense layer.
        mean: of the inputs, per channel or one value.
        std: likewise.
        dtype: of the computation; weights and logits are float32.
        convolution: "auto", "plain" (needed for forward mode) or "canonical".

    Returns:
        A model on `[B, H, W, C]` without `extra`.

    >>> import jax
    >>> model = small_cnn()
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> model.apply(params, extra, jnp.zeros((5, 8, 8, 1)))[0].shape
    (5, 10)
    """
    return from_linen(
        PoolingCNN(
            tuple(channels),
            hidden,
            3,
            num_classes,
            tuple(mean),
            tuple(std),
            dtype,
            convolution,
        )
    )
