"""A graph's values in float64, and how far float32 arithmetic can be from them."""

from collections.abc import Sequence

import numpy as np

from robustjax.certify.graph import Graph, Node, Value
from robustjax.certify.lipschitz import Constants, slope
from robustjax.certify.operator_norms import OUTWARD
from robustjax.certify.operators import Chain, Op, apply, fan_in

UNIT = 2.0**-24
"""The relative error of one float32 operation, at most."""
MORE = 16
"""Roundings granted beyond the sum itself: biases, factors, folded constants."""
MOVES_ONLY = ("reshape", "transpose", "pad", "slice", "broadcast")


def affine(
    value: Value, outputs: Sequence[np.ndarray], absolute: bool = False
) -> np.ndarray:
    """A value from its nodes' outputs, `[N, *shape]`; `absolute`: of all magnitudes.

    >>> value = Value(((0, ()),), np.array([[-3.0]]))
    >>> affine(value, [np.array([[2.0]])], absolute=True).tolist()
    [[5.0]]
    """
    total = np.abs(value.bias) if absolute else value.bias
    for base, chain in value.terms:
        total = total + apply(chain, outputs[base], absolute)
    return total


def nonlinear(node: Node, value: np.ndarray) -> np.ndarray:
    """What a node makes of its value, `[N, *in] -> [N, *shape]`.

    >>> nonlinear(Node("abs", None, (1,)), np.array([[-2.0]])).tolist()
    [[2.0]]
    """
    kind, data = node.kind, node.data
    if kind == "sum":
        return value
    if kind == "max":
        return np.maximum(value, data)
    if kind == "min":
        return np.minimum(value, data)
    if kind == "abs":
        return np.abs(value)
    if kind == "tanh":
        return np.tanh(value)
    if kind in ("logistic", "silu"):
        gate = 0.5 * (1 + np.tanh(value / 2))
        return gate if kind == "logistic" else value * gate
    if kind == "max_pool":
        return value.max(tuple(axis + 1 for axis in data))
    if kind == "window_max":
        return np.max(window_parts(node, value), 0)
    largest, smallest = value.max(1), value.min(1)
    if kind == "pair":
        return np.stack([largest, smallest], 1)
    return largest if kind == "larger" else smallest


def window_parts(node: Node, value: np.ndarray) -> list[np.ndarray]:
    """The strided parts of an input whose maximum is that of each window.

    A padding is minus infinity, as in JAX.

    Args:
      node: of kind "window_max".
      value: its input `[N, *in]`.

    Returns:
      One array `[N, *shape]` for each tap of the window.
    """
    window, strides, pads = node.data
    value = np.pad(value, [(0, 0), *pads], constant_values=-np.inf)
    parts = []
    for tap in np.ndindex(*window):
        cuts = zip(tap, strides, node.shape, strict=True)
        slices = [slice(u, u + s * (count - 1) + 1, s) for u, s, count in cuts]
        parts.append(value[(slice(None), *slices)])
    return parts


def values(graph: Graph, x: np.ndarray) -> list[np.ndarray]:
    """The output of every node at `x`, in float64.

    Args:
      graph: the net.
      x: `[N, ...]`.

    Returns:
      One array `[N, *shape]` for each node, the input first.
    """
    outputs = [np.asarray(x, np.float64).reshape(len(x), *graph.nodes[0].shape)]
    for node in graph.nodes[1:]:
        assert node.value is not None
        outputs.append(nonlinear(node, affine(node.value, outputs)))
    return outputs


def logits(graph: Graph, x: np.ndarray) -> np.ndarray:
    """The net in float64, `[N, ...] -> [N, K]`.

    >>> import jax.numpy as jnp
    >>> from robustjax.certify.trace import trace
    >>> net = trace(lambda x: jnp.maximum(x, 0.5) * 3, np.zeros((1, 2)))
    >>> logits(net, np.array([[0.0, 1.0]])).tolist()
    [[1.5, 3.0]]
    """
    return affine(graph.logits, values(graph, x))[:, 0]


def rounding(
    graph: Graph, x: np.ndarray, constants: Constants, reach: np.ndarray
) -> np.ndarray:
    """How far float32 can move the differences of logits near x, `[N, K, K]`.

    Every sum of n products, in whatever order, errs by at most `n u / (1 - n u)` of the
    sum of their magnitudes, u = 2^-24; 16 roundings more are granted for what is fused
    around it. A node's magnitudes are `|h_i(x)|`, plus how far it can move, plus its
    own error; the L2 norm of its fresh errors then grows by the operator norms of what
    follows.

    It is a bound for matrix products and convolutions that multiply and add in float32:
    CPU, or matmul precision `highest`; not for Winograd's form or half precision.

    Args:
      graph: the net.
      x: `[N, ...]`.
      constants: of the graph, in L2.
      reach: `[N]`, how far x itself may move in L2.

    Reference: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3.
    """
    exact = values(graph, x)
    spread = [np.zeros(len(x))]  # L2 norm of a node's error, per example
    largest = [np.abs(exact[0]) + _rows(reach, exact[0])]
    for i in range(1, len(graph.nodes)):
        node = graph.nodes[i]
        assert node.value is not None
        fresh = _fresh_error(node.value, largest)
        error = np.sqrt(np.square(fresh.reshape(len(x), -1)).sum(1))
        for (base, _), link in zip(node.value.terms, constants.links[i], strict=True):
            error = error + link * spread[base]
        error = error * slope(node, "L2")
        moved = np.abs(exact[i]) + _rows(constants.nodes[i] * reach, exact[i])
        if node.kind in ("tanh", "logistic", "silu"):
            own = _gamma(MORE) * (moved + _rows(error, moved) + 1)
            error = error + np.sqrt(np.square(own.reshape(len(x), -1)).sum(1))
        spread.append(error * OUTWARD)
        largest.append(moved + _rows(spread[-1], moved))
    fresh = _fresh_error(graph.logits, largest)[:, 0]
    total = fresh[:, :, None] + fresh[:, None, :]
    for (base, _), head in zip(graph.logits.terms, constants.heads, strict=True):
        total = total + head * spread[base][:, None, None]
    return total * OUTWARD


def _rows(value: np.ndarray, like: np.ndarray) -> np.ndarray:
    return value.reshape(-1, *[1] * (like.ndim - 1))


def _gamma(count: int) -> float:
    return count * UNIT / (1 - count * UNIT)


def _fresh_error(value: Value, largest: Sequence[np.ndarray]) -> np.ndarray:
    """What computing the value itself adds to each coordinate's error."""
    size, error = np.abs(value.bias), np.zeros_like(value.bias)
    for base, chain in value.terms:
        one, its = _chain_error(chain, largest[base], np.zeros_like(largest[base]))
        size, error = size + one, error + its
    return error + _gamma(len(value.terms) + MORE) * (size + error)


def _chain_error(
    chain: Chain, size: np.ndarray, error: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes and errors behind a chain, from those before it."""
    for op in chain:
        size, error = _op_error(op, size, error)
    return size, error


def _op_error(
    op: Op, size: np.ndarray, error: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if op.kind == "parallel":
        parts = [_chain_error(chain, size, error) for chain in op.data]
        size = np.sum([one for one, _ in parts], 0)
        error = np.sum([one for _, one in parts], 0)
        return size, error + _gamma(len(parts) + MORE) * (size + error)
    size, error = apply((op,), size, True), apply((op,), error, True)
    if op.kind in MOVES_ONLY:
        return size, error
    return size, error + _gamma(fan_in(op) + MORE) * (size + error)
