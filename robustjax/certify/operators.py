"""Linear operators in float64: what lies between two nonlinearities of a net.

A chain is a tuple of operations, applied from the first to the last. Every operation
knows its value, its adjoint and its absolute value (weights replaced by magnitudes), on
arrays `[N, *source]`; from these three come dense matrices and operator norms.
"""

import math
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Op(NamedTuple):
    """One linear operation.

    kind:   "scale", "dot", "conv", "reshape", "transpose", "pad", "slice", "sum",
            "broadcast" or "parallel" (the sum of several chains).
    source: shape of its input, without the leading N.
    target: shape of its output.
    data:   scale: an array of the source's shape; dot: a matrix `[n, m]` for the last
            axis; conv: (kernel HWIO, strides, pads); transpose: the permutation; pad:
            (low, high, interior) of each axis; slice: (start, stop, step) of each axis;
            sum: axes; broadcast: the target's axes that the source's become; parallel:
            chains.
    """

    kind: str
    source: Shape
    target: Shape
    data: Any = None


Chain = tuple[Op, ...]


def apply(chain: Chain, x: np.ndarray, absolute: bool = False) -> np.ndarray:
    """The chain's value at `x`, `[N, *source] -> [N, *target]`.

    Args:
      chain: operations; the empty chain is the identity.
      x: float64.
      absolute: with the magnitudes of all weights, `|A_k| ... |A_1| x`.

    >>> double = Op("scale", (2,), (2,), np.array([2.0, -2.0]))
    >>> apply((double,), np.ones((1, 2))).tolist()
    [[2.0, -2.0]]
    """
    for op in chain:
        x = _forward(op, x, absolute)
    return x


def adjoint(chain: Chain, g: np.ndarray, absolute: bool = False) -> np.ndarray:
    """The transposed chain at `g`, `[N, *target] -> [N, *source]`.

    `<g, apply(chain, x)> = <adjoint(chain, g), x>`; `absolute` as in `apply`.

    >>> op = Op("dot", (2,), (1,), np.array([[1.0], [-3.0]]))
    >>> adjoint((op,), np.ones((1, 1)), absolute=True).tolist()
    [[1.0, 3.0]]
    """
    for op in reversed(chain):
        g = _backward(op, g, absolute)
    return g


def _weight(value: np.ndarray, absolute: bool) -> np.ndarray:
    return np.abs(value) if absolute else value


def _forward(op: Op, x: np.ndarray, absolute: bool) -> np.ndarray:
    n, data = len(x), op.data
    if op.kind == "scale":
        return x * _weight(data, absolute)
    if op.kind == "dot":
        return x @ _weight(data, absolute)
    if op.kind == "conv":
        kernel, strides, pads = data
        kernel = _weight(kernel, absolute)
        x = _grown(x, [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
        out = np.zeros((n, *op.target))
        for taps, window in _windows(op):
            out += x[window] @ kernel[taps]
        return out
    if op.kind == "reshape":
        return x.reshape(n, *op.target)
    if op.kind == "transpose":
        return x.transpose(0, *(axis + 1 for axis in data))
    if op.kind == "pad":
        return _grown(x, data)
    if op.kind == "slice":
        return x[(slice(None), *(slice(*part) for part in data))]
    if op.kind == "sum":
        return x.sum(tuple(axis + 1 for axis in data))
    if op.kind == "broadcast":
        shape = [1] * len(op.target)
        for axis, size in zip(data, op.source, strict=True):
            shape[axis] = size
        return np.broadcast_to(x.reshape(n, *shape), (n, *op.target))
    return np.sum([apply(chain, x, absolute) for chain in data], 0)


def _backward(op: Op, g: np.ndarray, absolute: bool) -> np.ndarray:
    n, data = len(g), op.data
    if op.kind == "scale":
        return g * _weight(data, absolute)
    if op.kind == "dot":
        return g @ _weight(data, absolute).T
    if op.kind == "conv":
        kernel, strides, pads = data
        kernel = _weight(kernel, absolute)
        edges = [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)]
        out = np.zeros((n, *_grown_shape(op.source, edges)))
        for taps, window in _windows(op):
            out[window] += g @ kernel[taps].T
        return _shrunk(out, op.source, edges)
    if op.kind == "reshape":
        return g.reshape(n, *op.source)
    if op.kind == "transpose":
        return g.transpose(0, *(int(axis) + 1 for axis in np.argsort(data)))
    if op.kind == "pad":
        return _shrunk(g, op.source, data)
    if op.kind == "slice":
        out = np.zeros((n, *op.source))
        out[(slice(None), *(slice(*part) for part in data))] = g
        return out
    if op.kind == "sum":
        kept = [1 if i in data else size for i, size in enumerate(op.source)]
        return np.broadcast_to(g.reshape(n, *kept), (n, *op.source))
    if op.kind == "broadcast":
        axes = [axis for axis, size in zip(data, op.source, strict=True) if size > 1]
        axes = [axis for axis in range(len(op.target)) if axis not in axes]
        return g.sum(tuple(axis + 1 for axis in axes)).reshape(n, *op.source)
    return np.sum([adjoint(chain, g, absolute) for chain in data], 0)


def _windows(op: Op):
    """For each tap of a convolution the part of the padded input that meets it."""
    kernel, (down, right), _ = op.data
    rows, columns = op.target[1:3]
    for u in range(kernel.shape[0]):
        for v in range(kernel.shape[1]):
            yield (
                (u, v),
                (
                    slice(None),
                    slice(None),
                    slice(u, u + down * (rows - 1) + 1, down),
                    slice(v, v + right * (columns - 1) + 1, right),
                ),
            )


def _grown_shape(shape: Shape, edges) -> Shape:
    return tuple(
        low + high + (size + inner * (size - 1) if size else 0)
        for size, (low, high, inner) in zip(shape, edges, strict=True)
    )


def _places(shape: Shape, edges):
    """Where the old elements lie in the padded array, and which of them are left."""
    there, here = [slice(None)], [slice(None)]
    grown = _grown_shape(shape, edges)
    for size, (low, _, inner), length in zip(shape, edges, grown, strict=True):
        step = inner + 1
        first = max(0, -(low // step)) if low < 0 else 0
        places = [low + step * i for i in range(first, size)]
        last = first + sum(place < length for place in places)
        here.append(slice(first, last))
        begin = low + step * first
        there.append(slice(begin, max(begin, low + step * (last - 1) + 1), step))
    return tuple(there), tuple(here)


def _grown(x: np.ndarray, edges) -> np.ndarray:
    there, here = _places(x.shape[1:], edges)
    out = np.zeros((len(x), *_grown_shape(x.shape[1:], edges)))
    out[there] = x[here]
    return out


def _shrunk(g: np.ndarray, source: Shape, edges) -> np.ndarray:
    there, here = _places(source, edges)
    out = np.zeros((len(g), *source))
    out[here] = g[there]
    return out


def sizes(chain: Chain) -> tuple[int, int]:
    """The number of inputs and of outputs of a chain that is not empty.

    >>> sizes((Op("sum", (2, 3), (2,), (1,)),))
    (6, 2)
    """
    return math.prod(chain[0].source), math.prod(chain[-1].target)


def dense(chain: Chain) -> np.ndarray:
    """The chain as a matrix `[n_in, n_out]`, so that `y = x @ matrix`.

    >>> dense((Op("sum", (2, 2), (2,), (0,)),)).tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    n_in, n_out = sizes(chain)
    if n_in <= n_out:
        rows = np.eye(n_in).reshape(n_in, *chain[0].source)
        return apply(chain, rows).reshape(n_in, n_out)
    columns = np.eye(n_out).reshape(n_out, *chain[-1].target)
    return adjoint(chain, columns).reshape(n_out, n_in).T


def fan_in(op: Op) -> int:
    """How many products an output of the operation sums, at most.

    >>> fan_in(Op("dot", (5,), (2,), np.ones((5, 2))))
    5
    """
    if op.kind == "dot":
        return op.data.shape[0]
    if op.kind == "conv":
        return math.prod(op.data[0].shape[:3])
    if op.kind == "sum":
        return math.prod(op.source[axis] for axis in op.data)
    if op.kind == "parallel":
        return sum(1 + sum(fan_in(part) for part in chain) for chain in op.data)
    return 1
