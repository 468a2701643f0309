"""The layers of the zoo: Flax Linen modules on the canonical convolution."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from robustjax.models.convolution import Convolution, conv2d, has_own_rule
from robustjax.types import Array

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""`N(0, 2 / (h w O))`, He et al., arXiv:1502.01852: what WideResNets start from."""


def normalize(x: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """`(x - mean) / std`, channel by channel; one value serves all channels.

    Args:
        x: inputs `[..., C]` in the model's input box.
        mean: `C` values or one.
        std: `C` positive values or one.

    Returns:
        float32, the shape of `x`.

    >>> import jax.numpy as jnp
    >>> normalize(jnp.ones((1, 2)), (0.5,), (0.25,))
    Array([[2., 2.]], dtype=float32)
    """
    if len(mean) not in (1, x.shape[-1]) or len(std) not in (1, x.shape[-1]):
        raise ValueError(
            f"mean has {len(mean)} values and std {len(std)}, but x has "
            f"{x.shape[-1]} channels (last axis): give one value, or one per channel."
        )
    shape = (1,) * (x.ndim - 1) + (-1,)
    shift = jnp.asarray(mean, jnp.float32).reshape(shape)
    scale = 1.0 / jnp.asarray(std, jnp.float32).reshape(shape)
    return (x.astype(jnp.float32) - shift) * scale


def max_pool(x: Array, size: int = 2, *, convolution: Convolution = "auto") -> Array:
    """Maximum over disjoint windows, by reshape: on CPU far cheaper than
    `lax.reduce_window`, whose gradient scatters.

    A tie shares the gradient evenly (`reduce_window` gives it to the first). Rows and
    columns beyond a multiple of `size` are dropped.

    Args:
        x: `[B, H, W, C]`.
        size: edge and stride of the window.
        convolution: "plain" where forward mode is wanted; else there is a reverse-mode
            rule of its own, which takes half the time (on CPU).

    Returns:
        `[B, H // size, W // size, C]`.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    windows = _windows(x, size)
    if not has_own_rule(convolution):
        return jnp.max(windows, (2, 4))
    rows, columns = windows.shape[1] * size, windows.shape[3] * size
    return _max_pool(x[:, :rows, :columns], size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: Array, size: int) -> Array:
    return jnp.max(_windows(x, size), (2, 4))


def _max_pool_forward(x: Array, size: int) -> tuple[Array, tuple[Array, Array]]:
    out = _max_pool(x, size)
    return out, (x, out)


def _max_pool_backward(
    size: int, residuals: tuple[Array, Array], g: Array
) -> tuple[Array]:
    # As autodiff writes it, but counting and dividing once per window instead of once
    # per pixel: 1.8 instead of 3.5 ms at [128, 28, 28, 32].
    x, out = residuals
    windows = _windows(x, size)
    ties = sum(
        (windows[:, :, u, :, v] == out).astype(g.dtype)
        for u in range(size)
        for v in range(size)
    )
    share = (g / ties)[:, :, None, :, None, :]
    is_largest = windows == out[:, :, None, :, None, :]
    return (jnp.where(is_largest, share, 0).reshape(x.shape),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def average_pool(x: Array, size: int = 2) -> Array:
    """Mean over disjoint windows, by reshape.

    Args:
        x: `[B, H, W, C]`.
        size: edge and stride of the window.

    Returns:
        `[B, H // size, W // size, C]`.

    >>> import jax.numpy as jnp
    >>> average_pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).tolist()
    [[[[1.5]]]]
    """
    return jnp.mean(_windows(x, size), (2, 4))


def _windows(x: Array, size: int) -> Array:
    batch, height, width, channels = x.shape
    if height < size or width < size:
        raise ValueError(
            f"cannot pool {height} x {width} pixels by {size}: use larger images or "
            "fewer poolings."
        )
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    return x.reshape(batch, rows, size, columns, size, channels)


def activate(x: Array, activation: str) -> Array:
    """Apply an activation by name.

    Args:
        x: anything.
        activation: "relu", "silu" or "gelu".

    >>> import jax.numpy as jnp
    >>> activate(jnp.array([-1.0, 2.0]), "relu").tolist()
    [0.0, 2.0]
    """
    if activation == "relu":
        return jax.nn.relu(x)
    if activation == "silu":
        return jax.nn.silu(x)
    if activation == "gelu":
        return jax.nn.gelu(x)
    raise ValueError(f"activation={activation!r}: choose 'relu', 'silu' or 'gelu'.")


def cast(kernel: Array, dtype: Any) -> Array:
    """`kernel.astype(dtype)`, bit for bit.

    To bfloat16 the rounding is written by itself: the TPU compiler then makes a fusion
    of it, which it estimates at 60 % of a conversion alone (docs/plan.md).

    >>> cast(jnp.ones(2), jnp.bfloat16).dtype
    dtype(bfloat16)
    """
    if dtype == jnp.bfloat16 and kernel.dtype == jnp.float32:
        kernel = jax.lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=7)
    return kernel.astype(dtype)


class Conv(nn.Module):
    """A convolution: float32 weights, computed in `dtype`, fast in loops on CPU."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | str | tuple[tuple[int, int], tuple[int, int]] = "SAME"
    use_bias: bool = False
    kernel_init: Any = he_fan_out
    dtype: Any = jnp.float32
    convolution: Convolution = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = self.kernel_size
        kernel = self.param(
            "kernel", self.kernel_init, (size, size, x.shape[-1], self.features)
        )
        pads = self.padding
        if isinstance(pads, int):
            pads = ((pads, pads), (pads, pads))
        out = conv2d(
            x.astype(self.dtype),
            cast(kernel, self.dtype),
            (self.stride, self.stride),
            pads,
            convolution=self.convolution,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            out = out + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return out


class Dense(nn.Module):
    """An affine layer: float32 weights, computed in `dtype`."""

    features: int
    kernel_init: Any = nn.initializers.he_normal()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        out = x.astype(self.dtype) @ cast(kernel, self.dtype)
        shape = (1,) * (out.ndim - 1) + (-1,)
        return out + bias.astype(self.dtype).reshape(shape)


class BatchNorm(nn.Module):
    """Batch normalization, with statistics per group of the batch (ghost BatchNorm).

    With `batch_groups=G` rows `[g B/G, (g+1) B/G)` are normalized by their own
    statistics; when G is a multiple of the number of devices no device needs another's.
    Statistics are float32 and follow PyTorch: normalized by the biased variance,
    running ones from the unbiased variance (averaged over groups). `momentum` is the
    weight of the old value (0.9 is PyTorch's 0.1).

    Reference: Ioffe & Szegedy, arXiv:1502.03167; Hoffer et al., arXiv:1705.08741.
    """

    momentum: float = 0.9
    tiny: float = 1e-5
    batch_groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        running_mean = self.variable(
            "batch_stats", "mean", zeros, None, (channels,), jnp.float32
        )
        running_var = self.variable(
            "batch_stats", "var", ones, None, (channels,), jnp.float32
        )
        if not train:
            factor = scale * jax.lax.rsqrt(running_var.value + self.tiny)
            shift = bias - running_mean.value * factor
            shape = (1,) * (x.ndim - 1) + (channels,)
            out = x * factor.reshape(shape) + shift.reshape(shape)
            return out.astype(self.dtype)
        groups = self.batch_groups
        if x.shape[0] % groups:
            raise ValueError(
                f"batch_groups={groups} does not divide the batch of {x.shape[0]}."
            )
        values = x.astype(jnp.float32).reshape(groups, -1, channels)
        out, mean, var = _normalize_batch(values, scale, bias, self.tiny)
        if not self.is_initializing():
            count = values.shape[1]
            unbiased = jnp.mean(var, 0) * (count / max(count - 1, 1))
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * jnp.mean(
                mean, 0
            )
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        return out.reshape(x.shape).astype(self.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _normalize_batch(
    x: Array, scale: Array, bias: Array, tiny: float
) -> tuple[Array, Array, Array]:
    """`scale (x - mean) / sqrt(var + tiny) + bias` over axis 1 of `[G, N, C]`; mean
    and variance are `[G, C]`.

    The derivative is written out: autodiff does not see that the variance does not
    change with the mean, nor that the gradients of scale and bias are the two sums that
    the gradient of x needs. Two sums over the batch then, and none waits for the other
    (one pass over the data, one all-reduce), where autodiff writes four.
    """
    mean = jnp.mean(x, 1)
    centered = x - mean[:, None, :]
    var = jnp.mean(jnp.square(centered), 1)
    factor = scale[None, :] * jax.lax.rsqrt(var + tiny)
    return centered * factor[:, None, :] + bias.reshape(1, 1, -1), mean, var


@_normalize_batch.defjvp
def _normalize_batch_jvp(
    tiny: float,
    primals: tuple[Array, Array, Array],
    tangents: tuple[Array, Array, Array],
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    x, scale, bias = primals
    x_t, scale_t, bias_t = tangents
    out, mean, var = _normalize_batch(x, scale, bias, tiny)
    inverse = jax.lax.rsqrt(var + tiny)
    normalized = (x - mean[:, None, :]) * inverse[:, None, :]
    mean_t = jnp.mean(x_t, 1)
    along = jnp.mean(normalized * x_t, 1)
    # Channels are multiplied before they are spread over the batch, so that transposed
    # they are summed first, and the sums are those of scale and bias.
    factor = scale[None, :] * inverse
    shift = jnp.broadcast_to(bias_t[None, :], mean.shape) - factor * mean_t
    slope = jnp.broadcast_to(scale_t[None, :], mean.shape) - factor * along
    out_t = (
        factor[:, None, :] * x_t + shift[:, None, :] + normalized * slope[:, None, :]
    )
    return (out, mean, var), (out_t, mean_t, 2 * along / inverse)
