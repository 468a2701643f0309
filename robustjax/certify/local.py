"""The Lipschitz constant in a ball around an example: which ReLUs can switch there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robustjax.certify.evaluate import (
    affine,
    logits,
    nonlinear,
    rounding,
    values,
    window_parts,
)
from robustjax.certify.graph import Graph, Node, Value
from robustjax.certify.lipschitz import ORDERS, Constants
from robustjax.certify.operator_norms import OUTWARD
from robustjax.certify.operators import Chain, adjoint, apply
from robustjax.certify.radius import certified_radius, pair_radius, weight

Interval = tuple[np.ndarray, np.ndarray]
TINY = 1e-12


def local_constants(
    graph: Graph,
    x: Any,
    y: Any,
    norm: str,
    radius: Any,
    constants: Mapping[str, Constants],
) -> np.ndarray:
    """Upper bounds on `|grad(z_y - z_j)|_q` in the ball around each example, `[N, K]`.

    Interval arithmetic bounds what goes into each nonlinearity; a ReLU whose input
    keeps its sign has slope 0 or 1, another [0, 1]. The Jacobian of every node is then
    an interval matrix, carried from the input to the last differences of logits, whose
    rows are bounded in the dual norm. At radius 0 it is the exact gradient; no row is
    larger than the global constant. Rigorous: float64 rounded outward. For small nets:
    it costs a pass for each number of the input.

    Args:
      graph: the net.
      x, y: `[N, ...]`, `[N]`.
      norm: of the ball; the constants are those for perturbations in it.
      radius: `[N]` or one number.
      constants: `all_constants(graph)`.

    Reference: Weng et al., arXiv:1804.09699 (Fast-Lip).

    >>> import jax
    >>> from robustjax.certify.radius import all_constants
    >>> from robustjax.certify.trace import trace
    >>> net = trace(lambda x: jax.nn.relu(x) * 3, np.zeros((1, 2)))
    >>> x, known = np.array([[1.0, -1.0]]), all_constants(net)
    >>> local_constants(net, x, [0], "Linf", 0.5, known).round(3).tolist()
    [[0.0, 3.0]]
    """
    x, y = np.asarray(x, np.float64), np.asarray(y)
    radii = np.broadcast_to(np.asarray(radius, np.float64), (len(x),))
    rows = [
        _one(graph, x[i : i + 1], int(y[i]), norm, float(radii[i]), constants[norm])
        for i in range(len(x))
    ]
    return np.stack(rows)


def local_radius(
    graph: Graph,
    x: Any,
    y: Any,
    norm: str,
    constants: Mapping[str, Constants],
    *,
    num_steps: int = 8,
) -> np.ndarray:
    """A certified radius from the local constants, `[N]` float32.

    The largest R found by bisection with `z_y - z_j - rho >= R C_j(R)` for every j,
    where C_j(R) bounds the slope in the ball of radius R; never below
    `certified_radius`.

    Args:
      graph, x, y, norm, constants: see `local_constants`.
      num_steps: of the bisection, each a `local_constants`.

    >>> import jax
    >>> from robustjax.certify.radius import all_constants
    >>> from robustjax.certify.trace import trace
    >>> net = trace(lambda x: jax.nn.relu(x) * 3, np.zeros((1, 2)))
    >>> x, known = np.array([[1.0, -1.0]]), all_constants(net)
    >>> bool(local_radius(net, x, [0], "Linf", known)[0] > 0.9)
    True
    """
    x, y = np.asarray(x, np.float32), np.asarray(y)
    low = certified_radius(graph, x, y, norm, constants).astype(np.float64)
    z = logits(graph, x)
    margins = z[np.arange(len(y)), y][:, None] - z
    # The gradient at x bounds what any radius can be: C(R) >= C(0).
    slopes = local_constants(graph, x, y, norm, 0.0, constants)
    high = np.minimum(pair_radius(margins, slopes, y), 1e6)
    reach = high * weight(norm, "L2", math.prod(x.shape[1:]))
    rho = rounding(graph, x, constants["L2"], reach)[np.arange(len(y)), y]
    high = np.maximum(high, low)
    for _ in range(num_steps):
        middle = (low + high) / 2
        slopes = local_constants(graph, x, y, norm, middle, constants)
        proven = pair_radius(margins - rho, slopes, y) >= middle * OUTWARD
        low, high = np.where(proven, middle, low), np.where(proven, high, middle)
    return np.nextafter(low.astype(np.float32), np.float32(0))


def _one(
    graph: Graph, x: np.ndarray, y: int, norm: str, radius: float, known: Constants
) -> np.ndarray:
    """The constants `[K]` of one example."""
    exact = values(graph, x)
    count = math.prod(x.shape[1:])
    start = np.eye(count).reshape(count, *graph.nodes[0].shape)
    bounds: list[Interval] = [(exact[0] - radius, exact[0] + radius)]
    jacobians: list[Interval] = [(start, start)]
    for i in range(1, len(graph.nodes)):
        node = graph.nodes[i]
        assert node.value is not None
        before = _range(node.value, bounds, exact, radius, norm, known)
        after = nonlinear(node, before[0]), nonlinear(node, before[1])
        if node.kind == "abs":
            largest = np.maximum(*after)
            crosses = (before[0] < 0) & (before[1] > 0)
            after = np.where(crosses, 0, np.minimum(*after)), largest
        if node.kind == "silu":  # not monotone: from its slope
            far = 1.1 * (before[1] - before[0])
            after = exact[i] - far, exact[i] + far
        # No coordinate moves further than the node's constant allows.
        far = known.nodes[i] * radius * OUTWARD
        bounds.append(
            (np.maximum(after[0], exact[i] - far), np.minimum(after[1], exact[i] + far))
        )
        jacobians.append(_through(node, before, _into(node.value, jacobians)))
    rows = np.zeros(graph.logits.shape[-1])
    size = len(rows)
    low, high = np.zeros((count, size)), np.zeros((count, size))
    for base, chain in graph.logits.terms:
        heads = adjoint(chain, np.eye(size)[:, None]).reshape(size, -1)
        slopes = (heads[y] - heads).T
        middle, spread = _halves(*(part.reshape(count, -1) for part in jacobians[base]))
        low += middle @ slopes - spread @ np.abs(slopes)
        high += middle @ slopes + spread @ np.abs(slopes)
    steepest = np.maximum(np.abs(low), np.abs(high))
    local = np.linalg.norm(steepest, ORDERS[norm], axis=0) * OUTWARD + TINY
    local[y] = 0.0
    return np.minimum(local, known.pairs[y])


def _halves(low: np.ndarray, high: np.ndarray) -> Interval:
    return (low + high) / 2, (high - low) / 2


def _range(
    value: Value,
    bounds: Sequence[Interval],
    exact: Sequence[np.ndarray],
    radius: float,
    norm: str,
    known: Constants,
) -> Interval:
    """What goes into a node, in the ball; from the input by the ball's own norm."""
    middles = [(low + high) / 2 for low, high in bounds]
    center = affine(value, middles)
    spread = np.zeros_like(center)
    for base, chain in value.terms:
        low, high = bounds[base]
        part = apply(chain, (high - low) / 2, absolute=True)
        if base == 0 and norm != "Linf":
            part = np.minimum(part, radius * _row_norms(chain, exact[0], norm))
        spread = spread + part
    # Outward: the rounding of center and spread is far below 1e-9 of what they sum.
    spread = spread + 1e-9 * (np.abs(center) + spread) + TINY
    return center - spread, center + spread


def _row_norms(chain: Chain, x: np.ndarray, norm: str) -> np.ndarray:
    """The dual norms of a chain's rows, in the shape of its output."""
    count = x.size
    columns = apply(chain, np.eye(count).reshape(count, *x.shape[1:]))
    return np.linalg.norm(columns, ORDERS[norm], axis=0)[None]


def _into(value: Value, jacobians: Sequence[Interval]) -> Interval:
    low = high = np.zeros(())
    for base, chain in value.terms:
        middle, spread = _halves(*jacobians[base])
        center = apply(chain, middle)
        if spread.any():
            spread = apply(chain, spread, absolute=True)
        else:
            spread = np.zeros_like(center)
        spread = spread + 1e-12 * (np.abs(center) + spread)
        low, high = low + center - spread, high + center + spread
    return low, high


def _through(node: Node, before: Interval, jacobian: Interval) -> Interval:
    """The Jacobian behind a nonlinearity whose input lies in `before`."""
    (low, high), (down, up) = before, jacobian
    kind = node.kind
    if kind == "sum":
        return jacobian
    if kind in ("max_pool", "window_max", "larger", "smaller", "pair"):
        return _chosen(node, before, jacobian)
    if kind == "max":
        least, most = low >= node.data, high > node.data
    elif kind == "min":
        least, most = high <= node.data, low < node.data
    elif kind == "abs":
        least, most = np.where(low >= 0, 1.0, -1.0), np.where(high > 0, 1.0, -1.0)
    elif kind == "silu":
        least, most = np.array(-0.1), np.array(1.1)
    else:
        ends = [_bell(kind, low), _bell(kind, high)]
        least, most = np.minimum(*ends), np.maximum(*ends)
        top = 1.0 if kind == "tanh" else 0.25
        most = np.where((low < 0) & (high > 0), top, most)
        least, most = least * (1 - 1e-9), most * OUTWARD
    corners = [a * b for a in (least, most) for b in (down, up)]
    return np.min(corners, 0), np.max(corners, 0)


def _bell(kind: str, at: np.ndarray) -> np.ndarray:
    if kind == "tanh":
        return 1 - np.tanh(at) ** 2
    return 0.25 * (1 - np.tanh(at / 2) ** 2)


def _chosen(node: Node, before: Interval, jacobian: Interval) -> Interval:
    """Maxima: the hull of the Jacobians of all inputs that can be the largest."""

    def hull(low, high, down, up, axis):
        able = high >= low.max(axis, keepdims=True)
        least = np.where(able, down, np.inf).min(axis)
        return least, np.where(able, up, -np.inf).max(axis)

    (low, high), (down, up) = before, jacobian
    if node.kind == "max_pool":
        return hull(low, high, down, up, tuple(axis + 1 for axis in node.data))
    if node.kind == "window_max":
        parts = [np.stack(window_parts(node, part), 1) for part in (low, high)]
        edges = [np.stack(window_parts(node, part), 1) for part in (down, up)]
        # Padding is never the largest, so that its -inf is never taken.
        return hull(parts[0], parts[1], edges[0], edges[1], 1)
    larger = hull(low, high, down, up, 1)
    smaller = hull(-high, -low, down, up, 1)
    if node.kind == "larger":
        return larger
    if node.kind == "smaller":
        return smaller
    return np.stack([larger[0], smaller[0]], 1), np.stack([larger[1], smaller[1]], 1)
