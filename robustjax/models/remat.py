"""Less memory for the backward pass, for any model: compute again what is cheap."""

import functools
from dataclasses import dataclass
from typing import Any

import jax

from robustjax.models.base import Apply, Model, require_model
from robustjax.types import Array, Key, PyTree

PRODUCTS = ("conv_general_dilated", "dot_general")


@dataclass(frozen=True)
class _Rematerialized:
    """Equal for equal models: the cache hits."""

    apply: Apply

    def __call__(
        self,
        params: PyTree,
        extra: PyTree,
        x: Array,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Array, PyTree]:
        apply = functools.partial(self.apply, train=train, key=key)
        return jax.checkpoint(apply, policy=_is_product)(params, extra, x)


def rematerialized(model: Model) -> Model:
    """The model, keeping for its backward pass only what it multiplied.

    Outputs of convolutions and matrix products are kept; normalizations, activations
    and casts between them are computed again. Values and gradients are the same up to
    rounding. Nets of blocks save more by their own `remat=True`, which keeps a block's
    input and computes its products again, too.

    Args:
      model: any.

    Returns:
      A model with the same `init`.

    Raises:
      TypeError: this is no `Model`.

    Reference: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost,
    arXiv:1604.06174.

    >>> import jax.numpy as jnp
    >>> from robustjax.models.mlp import mlp
    >>> model = rematerialized(mlp(features=(8,), num_classes=3))
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> model.apply(params, extra, jnp.zeros((2, 4)))[0].shape
    (2, 3)
    """
    require_model(model)
    return Model(model.init, _Rematerialized(model.apply))


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in PRODUCTS
