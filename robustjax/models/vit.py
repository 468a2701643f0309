"""Vision transformers: patches as a reshape and a dense layer, pre-norm blocks."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from robustjax.models.base import Model, from_linen
from robustjax.models.layers import Dense, normalize
from robustjax.types import Array

XAVIER = nn.initializers.xavier_uniform()


def patches(x: Array, size: int) -> Array:
    """Disjoint square patches as rows: `[B, H, W, C]` to `[B, T, size size C]`.

    A reshape and a transpose: on a TPU the gradient of a strided convolution with
    respect to the image costs a third of a plain ViT's attack, this one next to
    nothing.

    Raises:
      ValueError: when height or width is no multiple of `size`.

    >>> patches(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    b, height, width, channels = x.shape
    if height % size or width % size:
        raise ValueError(
            f"patch_size={size} does not divide images of {height}x{width} pixels: "
            "choose a divisor, or resize the images."
        )
    rows, columns = height // size, width // size
    cut = x.reshape(b, rows, size, columns, size, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, -1)


@jax.custom_jvp
def attention(query: Array, key: Array, value: Array) -> Array:
    """`softmax(query key^T / sqrt(D)) value`, head by head, softmax in float32.

    The derivative is written out, for the TPU compiler in bfloat16: autodiff rounds the
    gradient of the weights, `[B, H, T, T]`, to bfloat16 before it goes through the
    softmax, and that rounding takes most of the operation's time (docs/plan.md). Here
    it stays float32 until it is multiplied with keys and queries.

    Args:
      query: `[B, T, H, D]`: tokens, heads, channels.
      key: `[B, S, H, D]`.
      value: likewise.

    Returns:
      `[B, T, H, D]`.

    Reference: Vaswani et al., arXiv:1706.03762.

    >>> attention(*[jnp.ones((1, 3, 2, 4))] * 3).shape
    (1, 3, 2, 4)
    """
    return _attention(query, key, value)[0]


def _attention(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """What attention gives, and its weights, at least float32."""
    scores = _scores(query, key, _wide(query.dtype))
    weights = jax.nn.softmax(scores / query.shape[-1] ** 0.5)
    return _weighted(weights.astype(value.dtype), value), weights


@attention.defjvp
def _attention_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    (query, key, value), (query_t, key_t, value_t) = primals, tangents
    out, weights = _attention(query, key, value)
    wide, scale = weights.dtype, query.shape[-1] ** -0.5
    by_query = _scores(query_t.astype(wide), key.astype(wide), wide)
    by_key = _scores(query.astype(wide), key_t.astype(wide), wide)
    # Scaled in two orders, so that transposed these are two expressions with one use
    # each: of one with two uses the compiler makes a pass of its own over [T, S].
    moved = weights * (by_query * scale) + (weights * scale) * by_key
    weights_t = moved - weights * jnp.sum(moved, -1, keepdims=True)
    out_t = _weighted(weights_t, value.astype(wide)).astype(out.dtype)
    return out, out_t + _weighted(weights.astype(value.dtype), value_t)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _scores(query: Array, key: Array, dtype: Any) -> Array:
    return jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=dtype)


def _weighted(weights: Array, value: Array) -> Array:
    return jnp.einsum("bhts,bshd->bthd", weights, value)


class Block(nn.Module):
    """Attention and MLP, each on the normalized stream and added to it."""

    num_heads: int
    hidden: int
    tiny: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        shape = (*x.shape[:-1], self.num_heads, width // self.num_heads)

        def dense(features: int, name: str) -> Dense:
            return Dense(features, XAVIER, self.dtype, name=name)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=self.tiny, dtype=self.dtype, name=name)

        y = norm("norm1")(x)
        parts = (dense(width, name)(y) for name in ("query", "key", "value"))
        query, key, value = (part.reshape(shape) for part in parts)
        y = attention(query, key, value)
        x = x + dense(width, "out")(y.reshape(x.shape))
        y = nn.gelu(dense(self.hidden, "mlp1")(norm("norm2")(x)), approximate=True)
        return x + dense(width, "mlp2")(y)


class ViT(nn.Module):
    """A vision transformer; see `vit`."""

    patch_size: int
    width: int
    depth: int
    num_heads: int
    hidden: int
    num_classes: int
    pool: str
    remat: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tiny: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = patches(normalize(x, self.mean, self.std), self.patch_size)
        x = Dense(self.width, XAVIER, self.dtype, name="embed")(x)
        if self.pool == "token":
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
            token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
            x = jnp.concatenate([token.astype(self.dtype), x], 1)
        normal = nn.initializers.normal(0.02)
        place = self.param("place", normal, (1, x.shape[1], self.width))
        x = x + place.astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        # Unrolled: a scan stacks every layer's activations, three times the memory.
        for i in range(self.depth):
            options = (self.num_heads, self.hidden, self.tiny, self.dtype)
            x = block(*options, name=f"block{i + 1}")(x)
        x = nn.LayerNorm(epsilon=self.tiny, dtype=self.dtype, name="norm")(x)
        x = x[:, 0] if self.pool == "token" else jnp.mean(x, 1)
        head = Dense(self.num_classes, XAVIER, self.dtype, name="head")
        return head(x).astype(jnp.float32)


def vit(
    patch_size: int = 16,
    width: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    num_classes: int = 1000,
    *,
    mlp_ratio: int = 4,
    pool: Literal["mean", "token"] = "mean",
    remat: bool = False,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    tiny: float = 1e-6,
    dtype: Any = jnp.float32,
) -> Model:
    """A vision transformer with learned positions and pre-norm blocks.

    Args:
      patch_size: edge of the patches; must divide the images' edges.
      width: of the stream, a multiple of `num_heads`.
      depth: blocks.
      num_heads: attention heads of each.
      num_classes: number of logits.
      mlp_ratio: hidden units of a block's MLP, as a multiple of `width`.
      pool: "mean" of all patches (Beyer et al., arXiv:2205.01580), or a class "token"
        as published (an odd number of rows, which accelerators pad).
      remat: compute a block's activations again in the backward pass: less memory,
        a third more time.
      mean: of the inputs, per channel or one value.
      std: likewise.
      tiny: LayerNorm's addition to the variance.
      dtype: of the computation; weights, softmax and logits are float32.

    Returns:
      A model on `[B, H, W, C]` without `extra`; it is bound to the image size that
      `init` saw.

    Raises:
      ValueError: when `width` is no multiple of `num_heads`, or `pool` is unknown; in
        `init` and `apply` when patches do not divide the images.

    Reference: Dosovitskiy et al., arXiv:2010.11929. GELU by its tanh form.

    >>> model = vit(4, 8, 2, 2, num_classes=3)
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    >>> model.apply(params, extra, jnp.zeros((5, 8, 8, 3)))[0].shape
    (5, 3)
    """
    if width % num_heads:
        raise ValueError(
            f"width={width} is no multiple of num_heads={num_heads}: heads share it."
        )
    if pool not in ("mean", "token"):
        raise ValueError(f"pool={pool!r}: choose 'mean' or 'token'.")
    sizes = (patch_size, width, depth, num_heads, mlp_ratio * width, num_classes)
    return from_linen(ViT(*sizes, pool, remat, tuple(mean), tuple(std), tiny, dtype))


def vit_small(patch_size: int = 16, num_classes: int = 1000, **options: Any) -> Model:
    """ViT-S: width 384, 12 blocks, 6 heads (Touvron et al., arXiv:2012.12877).

    Args:
      patch_size, num_classes, options: see `vit`.
    """
    return vit(patch_size, 384, 12, 6, num_classes, **options)


def vit_base(patch_size: int = 16, num_classes: int = 1000, **options: Any) -> Model:
    """ViT-B: width 768, 12 blocks, 12 heads (Dosovitskiy et al., arXiv:2010.11929).

    Args:
      patch_size, num_classes, options: see `vit`.
    """
    return vit(patch_size, 768, 12, 12, num_classes, **options)
