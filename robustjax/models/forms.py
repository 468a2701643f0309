"""Ways to compute one convolution on XLA:CPU, and the choice between them.

XLA:CPU packs a copy of every window before it multiplies; where a convolution has few
output channels, or reads zeros that a stride put there, the packing and the zeros cost
more than the arithmetic. Each form here computes the same sum in a cheaper order. The
figures in the docstrings are CPU milliseconds for a batch of 256 on one core (AMD EPYC,
JAX 0.12).
"""

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from robustjax.types import Array

Pads = tuple[tuple[int, int], tuple[int, int]]
Precision = lax.Precision | tuple[lax.Precision, lax.Precision] | None
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
FEW_CHANNELS = 4
CACHED = 2**20  # bytes of a cotangent that a core can read again and again
MOST_PARTS = 16  # of a cotangent; each is a convolution to compile
LARGEST_KERNEL = 7  # beyond it the "kernel" is a feature map: a weight gradient


class Geometry(NamedTuple):
    """Everything static about a two-dimensional convolution."""

    strides: tuple[int, int] = (1, 1)
    padding: Pads = ((0, 0), (0, 0))
    lhs_dilation: tuple[int, int] = (1, 1)
    rhs_dilation: tuple[int, int] = (1, 1)
    precision: Precision = None


def direct(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """XLA's own convolution, in its canonical dimension order."""
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.padding,
        geometry.lhs_dilation,
        geometry.rhs_dilation,
        DIMENSIONS,
        precision=geometry.precision,
    )


def convolve(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """The convolution, in the form that is cheapest on XLA:CPU.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[h, w, C, O]`.
        geometry: strides, padding and dilations.

    Returns:
        `[B, H', W', O]`.
    """
    height, width, channels, features = kernel.shape
    plain = (
        geometry.rhs_dilation == (1, 1)
        and x.dtype == kernel.dtype == jnp.float32
        and x.size > 0
    )
    if not plain or max(height, width) > LARGEST_KERNEL:
        return direct(x, kernel, geometry)
    if geometry.lhs_dilation != (1, 1) and geometry.strides != (1, 1):
        return direct(x, kernel, geometry)
    if (height, width) == (1, 1):
        return _pointwise(x, kernel, geometry)
    if geometry.lhs_dilation != (1, 1):
        return _by_phases(x, kernel, geometry)
    if geometry.strides != (1, 1):
        return direct(x, kernel, geometry)
    if features <= FEW_CHANNELS and channels >= 2 * features:
        return _by_taps(x, kernel, geometry)
    return direct(x, kernel, geometry)


def _pointwise(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """1 x 1: one matrix product on what the stride does not skip; zeros of a padding or
    a dilation come after it (3.1 -> 1.1 for the gradient of a strided shortcut,
    32 -> 16 at 32 x 32)."""
    features = kernel.shape[3]
    zero = jnp.zeros((), x.dtype)
    pads = [
        (*edges, dilation - 1)
        for edges, dilation in zip(geometry.padding, geometry.lhs_dilation, strict=True)
    ]
    if geometry.strides != (1, 1):
        x = lax.pad(x, zero, ((0, 0, 0), *pads, (0, 0, 0)))
        x = x[:, :: geometry.strides[0], :: geometry.strides[1]]
        pads = [(0, 0, 0), (0, 0, 0)]
    out = lax.dot(
        x.reshape(-1, x.shape[-1]),
        kernel.reshape(kernel.shape[2:]),
        precision=geometry.precision,
    ).reshape(*x.shape[:3], features)
    return lax.pad(out, zero, ((0, 0, 0), *pads, (0, 0, 0)))


def _by_taps(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """Few output channels, as in the gradient of an image: one matrix product gives
    every tap's contribution as a plane, then the planes are shifted and added
    (12.4 -> 4.6 for 32 -> 1, 5 x 5, 28 x 28; 14.5 -> 4.2 for 16 -> 3, 3 x 3, 32 x 32).
    """
    height, width, channels, features = kernel.shape
    taps = jnp.transpose(kernel, (0, 1, 3, 2)).reshape(-1, channels)
    planes = lax.dot_general(
        taps,
        x.reshape(-1, channels),
        (((1,), (1,)), ((), ())),
        precision=geometry.precision,
    ).reshape(height, width, features, *x.shape[:3])
    (top, bottom), (left, right) = geometry.padding
    zero = jnp.zeros((), x.dtype)
    shifted = [
        lax.pad(
            planes[u, v],
            zero,
            (
                (0, 0, 0),
                (0, 0, 0),
                (top - u, bottom - (height - 1 - u), 0),
                (left - v, right - (width - 1 - v), 0),
            ),
        )
        for u in range(height)
        for v in range(width)
    ]
    total = functools.reduce(jnp.add, shifted)
    return jnp.transpose(total, (1, 2, 3, 0))


def _phases(size: int, low: int, dilation: int) -> list[list[tuple[int, int]]]:
    """For each residue r of the output position: the (tap, offset) pairs that meet an
    element of the dilated input; `out[a d + r] = sum x[a + offset] k[tap]`."""
    return [
        [
            (tap, (r + tap - low) // dilation)
            for tap in range(size)
            if (r + tap - low) % dilation == 0
        ]
        for r in range(dilation)
    ]


def _by_phases(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """A dilated input, as in the gradient of a strided convolution, without its zeros:
    all phases of the output as channels of one small convolution, then interleaved
    (38.3 -> 8.2 for 32 -> 16, stride 2, to 32 x 32).
    """
    height, width, channels, features = kernel.shape
    axes = []
    for axis in range(2):
        dilation = geometry.lhs_dilation[axis]
        low, high = geometry.padding[axis]
        size = (x.shape[1 + axis] - 1) * dilation + 1 + low + high
        size -= kernel.shape[axis] - 1
        phases = _phases(kernel.shape[axis], low, dilation)
        offsets = [offset for phase in phases for _, offset in phase] or [0]
        axes.append((dilation, size, phases, min(offsets), max(offsets)))
    (d0, size0, phases0, first0, last0), (d1, size1, phases1, first1, last1) = axes
    if size0 <= 0 or size1 <= 0:
        return direct(x, kernel, geometry)
    length0, length1 = last0 - first0 + 1, last1 - first1 + 1
    # Gathering with a row of zeros appended: index `size` stands for "no tap here".
    rows = [
        [{o: t for t, o in phase}.get(first0 + i, height) for phase in phases0]
        for i in range(length0)
    ]
    columns = [
        [{o: t for t, o in phase}.get(first1 + j, width) for phase in phases1]
        for j in range(length1)
    ]
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    taps = padded[jnp.asarray(rows)][:, :, jnp.asarray(columns)]
    # [L0, d0, L1, d1, C, O] -> [L0, L1, C, d0 d1 O]
    taps = jnp.transpose(taps, (0, 2, 4, 1, 3, 5)).reshape(
        length0, length1, channels, d0 * d1 * features
    )
    count0, count1 = -(-size0 // d0), -(-size1 // d1)
    pads = (
        (-first0, count0 - x.shape[1] + first0 + length0 - 1),
        (-first1, count1 - x.shape[2] + first1 + length1 - 1),
    )
    out = convolve(x, taps, Geometry(padding=pads, precision=geometry.precision))
    out = out.reshape(-1, count0, count1, d0, d1, features)
    out = jnp.transpose(out, (0, 1, 3, 2, 4, 5))
    out = out.reshape(-1, count0 * d0, count1 * d1, features)
    return out[:, :size0, :size1]


def kernel_gradient(
    x: Array, g: Array, kernel_shape: tuple[int, ...], geometry: Geometry
) -> Array | None:
    """`sum_{b, i, j} x[b, s i + u - p, s j + v - p, c] g[b, i, j, o]`, in the form that
    is cheapest on XLA:CPU; None where there is none for this geometry.

    One matrix product of gathered windows pays for few input channels (31 -> 10 for
    1 -> 32, 5 x 5 at 28 x 28; 28 -> 15 for 3 -> 16, 3 x 3 at 32 x 32) and for 1 x 1
    kernels (21 -> 1.8). All others: `_by_planes`.
    """
    height, width, channels, features = kernel_shape
    if (
        geometry.rhs_dilation != (1, 1)
        or geometry.lhs_dilation != (1, 1)
        or max(height, width) > LARGEST_KERNEL
        or x.dtype != jnp.float32
        or x.size == 0
        or g.size == 0
    ):
        return None
    few = channels <= FEW_CHANNELS
    if not few and (height, width) != (1, 1):
        return _by_planes(x, g, kernel_shape, geometry)
    rows, columns = g.shape[1:3]
    (top, bottom), (left, right) = geometry.padding
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, ((0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)))
    s0, s1 = geometry.strides
    if few:  # channels first: whole planes are copied
        x = jnp.transpose(x, (3, 0, 1, 2))
        windows = jnp.stack(
            [
                x[:, :, u : u + s0 * (rows - 1) + 1 : s0][
                    :, :, :, v : v + s1 * (columns - 1) + 1 : s1
                ]
                for u in range(height)
                for v in range(width)
            ]
        ).reshape(height * width * channels, -1)
        contracted = 1
    else:
        windows = jnp.concatenate(
            [
                x[:, u : u + s0 * (rows - 1) + 1 : s0][
                    :, :, v : v + s1 * (columns - 1) + 1 : s1
                ]
                for u in range(height)
                for v in range(width)
            ],
            3,
        ).reshape(-1, height * width * channels)
        contracted = 0
    out = lax.dot_general(
        windows,
        g.reshape(-1, features),
        (((contracted,), (0,)), ((), ())),
        precision=geometry.precision,
    )
    return out.reshape(kernel_shape)


def _by_planes(
    x: Array, g: Array, kernel_shape: tuple[int, ...], geometry: Geometry
) -> Array:
    """The kernel's gradient as a convolution whose images are pairs of input channels,
    whose channels are the batch and whose window is the cotangent, dilated by the
    strides.

    The two channels of a pair lie side by side, so a row of outputs is twice the
    kernel's width: enough sums at a time to keep the processor's units busy, and few
    enough for its registers. With all channels side by side, as it was before, a
    processor without AVX-512 takes more (batch 128, other core busy: 37 -> 26 for
    16 -> 16, 3 x 3 at 32 x 32; 24 -> 17 for 64 -> 64 at 8 x 8; 347 -> 286 for 64 -> 64
    at 32 x 32). With AVX-512 it has not been measured.

    oneDNN reads the whole cotangent again for every few outputs, so a part of its rows
    at a time, of a size that stays in the cache. Its temporaries take three to five
    times the memory of x.
    """
    height, width, channels, features = kernel_shape
    batch, rows, columns = g.shape[:3]
    s0, s1 = geometry.strides
    top, left = geometry.padding[0][0], geometry.padding[1][0]
    right = s1 * (columns - 1) + width - x.shape[2] - left
    pair = 2 - channels % 2
    # What made x is not computed once more inside of the transposition (5.3 -> 0.7).
    # Flat before the second barrier, both are transposed in one pass instead of two.
    x, g = lax.optimization_barrier((x, g.reshape(batch, -1, features)))
    by_batch = jnp.transpose(x, (1, 2, 3, 0)).reshape(x.shape[1], -1, batch)
    by_place = jnp.transpose(g, (1, 0, 2)).reshape(rows * columns, batch * features)
    lhs, rhs = lax.optimization_barrier((by_batch, by_place))
    # The batch keeps an axis of its own: joined with the pair, its sharding over
    # devices could not be said, and all of x and g would be gathered on each of them.
    lhs = lhs.reshape(x.shape[1], x.shape[2], channels // pair, pair, batch)
    rhs = rhs.reshape(rows, columns, batch, features)
    out = jnp.zeros((channels // pair, height, width * pair, features), x.dtype)
    # A batch of unknown size (jax.export) is one part.
    row_bytes = rhs.nbytes // rows if isinstance(batch, int) else 0
    for begin, end in _parts(rows, row_bytes):
        # The rows of x that these rows of the cotangent meet; some may be padding.
        first, last = s0 * begin - top, s0 * (end - 1) + height - top
        met = slice(max(first, 0), min(last, x.shape[1]))
        if met.start >= met.stop:
            continue
        backward = Geometry(
            padding=(
                (met.start - first, last - met.stop),
                (left * pair, right * pair),
            ),
            rhs_dilation=(s0, s1 * pair),
            precision=geometry.precision,
        )
        planes = lax.optimization_barrier(jnp.transpose(lhs[met], (2, 0, 1, 3, 4)))
        planes = planes.reshape(channels // pair, met.stop - met.start, -1, batch)
        # Apart, or the sums become a chain of post-operations of the convolution.
        out += lax.optimization_barrier(direct(planes, rhs[begin:end], backward))
    out = lax.optimization_barrier(out)
    out = out.reshape(-1, height, width, pair, features)
    return jnp.transpose(out, (1, 2, 0, 3, 4)).reshape(kernel_shape)


def _parts(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """`(begin, end)` of equal runs of rows: as few as have `CACHED` bytes at most, but
    never more than `MOST_PARTS`.

    >>> _parts(32, 2**18)[:2]
    [(0, 4), (4, 8)]
    """
    count = max(1, min(rows, MOST_PARTS, -(-rows * row_bytes // CACHED)))
    edges = [number * rows // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))
