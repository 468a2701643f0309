"""Convolutions that stay fast inside loops on XLA:CPU, forward and backward.

XLA's CPU compiler brings a convolution into its fast canonical form only outside
`while` bodies (jax-ml/jax issue 12868), and the gradient of a convolution, as JAX
writes it, is not canonical: inside a `scan` it runs 10 to 15 times slower. Here every
convolution, those of all derivatives included, reads NHWC x HWIO -> NHWC; transposes
and flips are written out and kept apart by optimization barriers. Elsewhere the
compiler chooses its own layouts, and well. Which it is is decided when a program is
lowered, by the platform that it is lowered for: a machine without a TPU can export or
plan for one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from robustjax.models.forms import (
    DIMENSIONS,
    Geometry,
    convolve,
    direct,
    kernel_gradient,
)
from robustjax.types import Array

Convolution = Literal["auto", "plain", "canonical"]
LANES = 128  # of a TPU's registers and matrix units


def has_own_rule(convolution: Convolution) -> bool:
    """Whether derivatives follow rules of this package; "plain": those of JAX.

    Args:
        convolution: "plain", "canonical", or "auto": canonical where a program is
            lowered for a CPU, as JAX writes it for other platforms.

    Raises:
        ValueError: on any other word.

    >>> has_own_rule("plain")
    False
    """
    if convolution not in ("auto", "plain", "canonical"):
        raise ValueError(
            f"convolution={convolution!r}: choose 'auto', 'plain' or 'canonical'."
        )
    return convolution != "plain"


def conv2d(
    x: Array,
    kernel: Array,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    *,
    convolution: Convolution = "auto",
) -> Array:
    """Two-dimensional convolution (cross-correlation), fast inside loops on CPU.

    `out[b, i, j, o] = sum_{u, v, c} x[b, s i + u - p, s j + v - p, c] k[u, v, c, o]`

    "auto" and "canonical" are custom reverse-mode rules, so they serve `grad`, `grad`
    of `grad`, `vmap` and `scan`, but on no platform forward mode: for `jvp`, `jacfwd`
    and `hessian` pass `convolution="plain"`.

    Args:
        x: inputs `[B, H, W, C]`.
        kernel: `[h, w, C, O]`.
        strides: of the window, in rows and columns.
        padding: "SAME", "VALID" or ((top, bottom), (left, right)).
        convolution: "auto" (derivatives canonical where the program is lowered for a
            CPU), "plain" or "canonical".

    Returns:
        `[B, H', W', O]`.

    Reference: jax-ml/jax issue 12868.

    >>> import jax.numpy as jnp
    >>> conv2d(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), (2, 2)).shape
    (1, 2, 2, 5)
    """
    if not has_own_rule(convolution):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=DIMENSIONS
        )
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    else:
        pads = padding
    rows, columns = ((int(low), int(high)) for low, high in pads)
    geometry = Geometry((strides[0], strides[1]), (rows, columns))
    if convolution == "canonical":
        return canonical_convolution(x, kernel, geometry)
    return _convolution(x, kernel, geometry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """As `canonical_convolution`, but derivatives are written for the platform."""
    return convolve(x, kernel, geometry)


def _convolution_forward(x: Array, kernel: Array, geometry: Geometry):
    # Here and not in `_convolution`, which who reads a net's graph finds undivided.
    def for_tpu(x: Array, kernel: Array) -> Array:
        return direct(x, packed(kernel), geometry)

    def default(x: Array, kernel: Array) -> Array:
        return _convolution(x, kernel, geometry)

    out = lax.platform_dependent(x, kernel, tpu=for_tpu, default=default)
    return out, (x, kernel)


def _convolution_backward(
    geometry: Geometry, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    # Two choices and not one: where only one gradient is used, the other is removed.
    def by_input(x: Array, kernel: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda x: direct(x, kernel, geometry), x)(g)[0]

    def by_kernel(x: Array, kernel: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda k: direct(x, k, geometry), kernel)(g)[0]

    def choose(default: Callable[..., Array], **rules: Callable[..., Array]) -> Array:
        return lax.platform_dependent(*residuals, g, default=default, **rules)

    def for_tpu(x: Array, kernel: Array, g: Array) -> Array:
        return tpu_input_gradient(x, kernel, g, geometry)

    return (
        choose(
            by_input,
            cpu=lambda x, k, g: _input_gradient(x, k, g, geometry),
            tpu=for_tpu,
        ),
        choose(
            by_kernel, cpu=lambda x, k, g: _kernel_gradient(geometry, k.shape, x, g)
        ),
    )


_convolution.defvjp(_convolution_forward, _convolution_backward)


def packed(kernel: Array) -> Array:
    """The same kernel, written out as a matrix of rows (taps x channels), for TPUs.

    Left to itself the compiler lays a kernel, or that of its input gradient, with the
    channels that are summed over in the lanes, and pads 160 of them to 256. The matrix
    is written once, before an attack's loop. Multiples of 128 need no padding.

    Args:
        kernel: `[h, w, C, O]`.

    >>> packed(jnp.ones((3, 3, 2, 5))).shape
    (3, 3, 2, 5)
    """
    if kernel.shape[2] % LANES == 0:
        return kernel
    matrix = kernel.reshape(-1, kernel.shape[3])
    return lax.optimization_barrier(matrix).reshape(kernel.shape)


def tpu_input_gradient(x: Array, kernel: Array, g: Array, geometry: Geometry) -> Array:
    """Input gradient of a convolution, in the form for TPUs.

    Without strides: the cotangent against the kernel turned by 180 degrees, its
    channels swapped and packed. 1 x 1 with strides: likewise, and the zeros between the
    pixels come after the product, not before it. Else as JAX writes it.

    The barrier before the cotangent keeps the compiler from computing the convolution
    that made it once more inside of this one: for 128 images that took four times as
    long as the two in turn (docs/plan.md).

    Args:
        x: inputs `[B, H, W, C]`; only the shape counts.
        kernel: `[h, w, C, O]`.
        g: cotangent `[B, H', W', O]`.
        geometry: of the convolution; dilations are 1.

    Returns:
        `[B, H, W, C]`.

    >>> import jax.numpy as jnp
    >>> kernel, g = jnp.ones((3, 3, 2, 5)), jnp.ones((1, 4, 4, 5))
    >>> geometry = Geometry(padding=((1, 1), (1, 1)))
    >>> tpu_input_gradient(jnp.ones((1, 4, 4, 2)), kernel, g, geometry).shape
    (1, 4, 4, 2)
    """
    g = lax.optimization_barrier(g)
    size, strides = kernel.shape[:2], geometry.strides
    pixelwise = size == (1, 1) and geometry.padding == ((0, 0), (0, 0))
    if strides != (1, 1) and not pixelwise:
        return jax.linear_transpose(lambda x: direct(x, kernel, geometry), x)(g)[0]
    turned = packed(jnp.transpose(jnp.flip(kernel, (0, 1)), (0, 1, 3, 2)))
    pads = [
        (k - 1 - low, k - 1 - high)
        for k, (low, high) in zip(size, geometry.padding, strict=True)
    ]
    backward = Geometry(padding=(pads[0], pads[1]), precision=geometry.precision)
    out = direct(g, turned, backward)
    if strides == (1, 1):
        return out
    # (before, after, between): what the stride skipped.
    holes = [
        (0, n - (m - 1) * stride - 1, stride - 1)
        for n, m, stride in zip(x.shape[1:3], g.shape[1:3], strides, strict=True)
    ]
    return lax.pad(out, jnp.zeros((), out.dtype), ((0, 0, 0), *holes, (0, 0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def canonical_convolution(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """The convolution of `geometry`, whose derivatives are canonical convolutions.

    Args:
        x: inputs `[B, H, W, C]`.
        kernel: `[h, w, C, O]`, of the same dtype.
        geometry: strides, padding and dilations.

    Returns:
        `[B, H', W', O]`.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.ones((3, 3, 2, 5))
    >>> canonical_convolution(jnp.ones((1, 4, 4, 2)), kernel, Geometry()).shape
    (1, 2, 2, 5)
    """
    return convolve(x, kernel, geometry)


def _forward(x: Array, kernel: Array, geometry: Geometry):
    return canonical_convolution(x, kernel, geometry), (x, kernel)


def _backward(geometry: Geometry, residuals: tuple[Array, Array], g: Array):
    x, kernel = residuals
    return (
        _input_gradient(x, kernel, g, geometry),
        _kernel_gradient(geometry, kernel.shape, x, g),
    )


canonical_convolution.defvjp(_forward, _backward)


def _dilated(size: int, dilation: int) -> int:
    return 0 if size == 0 else (size - 1) * dilation + 1


def _input_gradient(x: Array, kernel: Array, g: Array, geometry: Geometry) -> Array:
    """The cotangent, dilated by the strides, against the flipped kernel."""
    strides, padding, lhs_dilation, rhs_dilation, precision = geometry
    pads = []
    for axis in range(2):
        window = _dilated(kernel.shape[axis], rhs_dilation[axis])
        low = window - padding[axis][0] - 1
        full = _dilated(x.shape[1 + axis], lhs_dilation[axis]) + window - 1
        pads.append((low, full - _dilated(g.shape[1 + axis], strides[axis]) - low))
    flipped = lax.optimization_barrier(
        jnp.transpose(jnp.flip(kernel, (0, 1)), (0, 1, 3, 2))
    )
    backward = Geometry(
        lhs_dilation, (pads[0], pads[1]), strides, rhs_dilation, precision
    )
    return canonical_convolution(g, flipped, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel_gradient(
    geometry: Geometry, kernel_shape: tuple[int, ...], x: Array, g: Array
) -> Array:
    """Inputs against cotangents; bilinear, so both its derivatives are convolutions."""
    gradient = kernel_gradient(x, g, kernel_shape, geometry)
    if gradient is not None:
        return gradient
    strides, padding, lhs_dilation, rhs_dilation, precision = geometry
    pads = []
    for axis in range(2):
        low = padding[axis][0]
        dilated = _dilated(g.shape[1 + axis], strides[axis])
        size = _dilated(x.shape[1 + axis], lhs_dilation[axis])
        window = _dilated(kernel_shape[axis], rhs_dilation[axis])
        pads.append((low, dilated - size + window - low - 1))
    # The batch becomes the contracted channel.
    lhs, rhs = lax.optimization_barrier(
        (jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(g, (1, 2, 0, 3)))
    )
    backward = Geometry(
        rhs_dilation, (pads[0], pads[1]), lhs_dilation, strides, precision
    )
    out = lax.optimization_barrier(convolve(lhs, rhs, backward))
    return jnp.transpose(out, (1, 2, 0, 3))


def _kernel_gradient_forward(geometry, kernel_shape, x, g):
    return _kernel_gradient(geometry, kernel_shape, x, g), (x, g)


def _kernel_gradient_backward(geometry, kernel_shape, residuals, h):
    # `<h, kernel_gradient(x, g)> = <g, convolution(x, h)>`
    del kernel_shape
    x, g = residuals
    return _input_gradient(x, h, g, geometry), canonical_convolution(x, h, geometry)


_kernel_gradient.defvjp(_kernel_gradient_forward, _kernel_gradient_backward)
