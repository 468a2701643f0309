"""Multi-layer perceptron."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from robustjax.models.base import Model, from_linen
from robustjax.models.layers import Dense, activate, normalize
from robustjax.types import Array


class MLP(nn.Module):
    """Flatten, then dense layers with an activation between them."""

    features: tuple[int, ...]
    num_classes: int
    activation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = normalize(x, self.mean, self.std)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            x = Dense(width, dtype=self.dtype, name=f"dense{i + 1}")(x)
            x = activate(x, self.activation)
        return Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(
            jnp.float32
        )


def mlp(
    features: Sequence[int] = (256, 256),
    num_classes: int = 10,
    *,
    activation: str = "relu",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    dtype: Any = jnp.float32,
) -> Model:
    """A multi-layer perceptron on inputs of any rank, He-initialized.

    Args:
        features: widths of the hidden layers.
        num_classes: number of logits.
        activation: "relu", "silu" or "gelu".
        mean: of the inputs, per channel (last axis) or one value.
        std: likewise.
        dtype: of the computation; weights and logits are float32.

    Returns:
        A model without `extra`.

    >>> import jax, jax.numpy as jnp
    >>> model = mlp(features=(16,), num_classes=3)
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> model.apply(params, extra, jnp.zeros((5, 8, 8, 1)))[0].shape
    (5, 3)
    """
    return from_linen(
        MLP(tuple(features), num_classes, activation, tuple(mean), tuple(std), dtype)
    )
