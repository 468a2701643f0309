"""Lipschitz constants of nets: global bounds layer by layer, and what is reached."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.certify.graph import Graph, Node, Value
from robustjax.certify.operator_norms import OUTWARD, operator_norm
from robustjax.certify.operators import Chain, adjoint
from robustjax.losses import margin
from robustjax.norms import L1, L2, Linf
from robustjax.types import Array, Key

NORMS = {"Linf": Linf(), "L2": L2(), "L1": L1()}
ORDERS = {"Linf": 1, "L2": 2, "L1": np.inf}
"""The dual norm's order, for `numpy.linalg.norm`."""


class Constants(NamedTuple):
    """Upper bounds on a net's Lipschitz constants, input and outputs in one norm p.

    norm:   "Linf", "L2" or "L1".
    nodes:  of each node's output, `|h(x) - h(x')|_p <= nodes[i] |x - x'|_p`.
    vector: of the logit vector, in the same norm p on both sides.
    each:   `[K]` of each logit.
    pairs:  `[K, K]` of each difference `z_i - z_j`.
    links:  of each node (the logits last), the operator norms of its value's chains.
    heads:  of each of the logits' chains `[K, K]`, the dual norms `|w_i - w_j|_q`.
    """

    norm: str
    nodes: tuple[float, ...]
    vector: float
    each: np.ndarray
    pairs: np.ndarray
    links: tuple[tuple[float, ...], ...]
    heads: tuple[np.ndarray, ...]


def lipschitz(graph: Graph, norm: str = "L2") -> Constants:
    """Global Lipschitz constants, by the product of operator norms.

    A linear chain multiplies the constant of what goes in by its operator norm, a sum
    of branches adds theirs, ReLU, MaxMin, abs, tanh and max-pooling over disjoint
    windows keep it (sigmoid: 1/4, SiLU: 1.09984; windows that overlap up to c times:
    `c^(1/p)`). The last chain, with rows w_i, is bounded row by row:
    `each_i = |w_i|_q L`, `pairs_ij = |w_i - w_j|_q L`, where q is the dual norm and L
    the constant of what goes into it; this is never worse than `2 max each`.

    Args:
      graph: the net, from `trace`.
      norm: "Linf", "L2" or "L1".

    Returns:
      `Constants`, each an upper bound, rounded outward.

    Reference: Szegedy et al., arXiv:1312.6199 (the product); Tsuzuku, Sato & Sugiyama,
    arXiv:1802.04034 (pairs).

    >>> from robustjax.certify.trace import trace
    >>> w = jnp.array([[3.0, 0.0], [4.0, 1.0]])
    >>> found = lipschitz(trace(lambda x: x @ w, np.zeros((1, 2))))
    >>> found.each.round(3).tolist(), found.pairs[0, 1].round(3).tolist()
    ([5.0, 1.0], 4.243)
    """
    measured: dict[int, float] = {}

    def size(chain: Chain) -> float:
        if id(chain) not in measured:  # the same chain may serve several values
            measured[id(chain)] = operator_norm(chain, norm)
        return measured[id(chain)]

    def into(value: Value) -> float:
        parts = (size(chain) * constants[base] for base, chain in value.terms)
        return sum(parts) * OUTWARD

    constants: list[float] = [1.0]
    links: list[tuple[float, ...]] = [()]
    for node in graph.nodes[1:]:
        assert node.value is not None
        links.append(tuple(size(chain) for _, chain in node.value.terms))
        constants.append(into(node.value) * slope(node, norm))
    links.append(tuple(size(chain) for _, chain in graph.logits.terms))
    each, heads = _rows(graph.logits, ORDERS[norm], constants)
    bases = [constants[base] for base, _ in graph.logits.terms]
    parts = [head * base for head, base in zip(heads, bases, strict=True)]
    pairs = np.sum(parts, 0) * OUTWARD
    vector = into(graph.logits)
    return Constants(norm, tuple(constants), vector, each, pairs, tuple(links), heads)


def slope(node: Node, norm: str) -> float:
    """The Lipschitz constant of a nonlinearity itself.

    >>> slope(Node("max", None, (3,)), "L2")
    1.0
    """
    if node.kind == "logistic":
        return 0.25
    if node.kind == "silu":
        return 1.09984  # the largest slope, 1.0998393..., at 2.3994
    if node.kind == "window_max":
        window, strides, _ = node.data
        ratio = [-(-w // s) for w, s in zip(window, strides, strict=True)]
        power = {"Linf": 0.0, "L2": 0.5, "L1": 1.0}[norm]
        return float(np.prod(ratio)) ** power * (OUTWARD if power else 1.0)
    return 1.0


def _rows(
    value: Value, order: float, constants: Sequence[float]
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    count = value.shape[-1]
    each, heads = np.zeros(count), []
    for base, chain in value.terms:
        rows = adjoint(chain, np.eye(count)[:, None]).reshape(count, -1)
        each += np.linalg.norm(rows, order, axis=1) * constants[base]
        norms = [np.linalg.norm(row - rows, order, axis=1) for row in rows]
        heads.append(np.stack(norms) * OUTWARD)
    return each * OUTWARD, tuple(heads)


def steepest_gradient(
    logits_fn: Callable[[Array], Array],
    x: Any,
    y: Any,
    norm: str = "L2",
    *,
    radius: float = np.inf,
    num_steps: int = 50,
    lower: float = 0.0,
    upper: float = 1.0,
    key: Key | None = None,
) -> np.ndarray:
    """The steepest gradient of the margin found near each example: a LOWER bound.

    `max |grad m(x')|_q` over the x' that a random search visits: each step proposes a
    point of the ball around x (of radius `radius`, in the box) at a random distance
    from the best one, and keeps it where the gradient is larger. Any Lipschitz constant
    of the margin in the ball is at least that. An estimate, never a certificate.

    Args:
      logits_fn: inputs `[B, ...]` to logits `[B, K]`.
      x, y: `[N, ...]`, `[N]`.
      norm: of the ball; the gradient is measured in its dual.
      radius: of the ball; infinite: the box alone.
      num_steps: proposals.
      lower, upper: the box.
      key: `jax.random.key(0)` by default.

    Returns:
      `[N]` float64.

    >>> f = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = jnp.array([[0.6, 0.5]]), jnp.array([0])
    >>> steepest_gradient(f, x, y, num_steps=1).round(3).tolist()
    [2.828]
    """
    key = jax.random.key(0) if key is None else key
    found = _search(
        NORMS[norm],
        num_steps,
        jax.tree_util.Partial(logits_fn),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y, jnp.int32),
        jnp.float32(radius),
        (jnp.float32(lower), jnp.float32(upper)),
        key,
    )
    return np.asarray(found, np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(norm, num_steps, logits_fn, x, y, radius, box, key):
    def steepness(at: Array) -> Array:
        grad = jax.grad(lambda x: margin(logits_fn(x), y).sum())(at)
        return jax.vmap(norm.dual)(grad)

    def into(at: Array) -> Array:
        delta = jax.vmap(norm.project, (0, None))(at - x, radius)
        return jnp.clip(x + delta, *box)

    def step(carry: tuple[Array, Array], key: Key):
        best, value = carry
        key_noise, key_size = jax.random.split(key)
        width = jnp.minimum(radius, box[1] - box[0])
        rows = (len(x),) + (1,) * (x.ndim - 1)
        size = width * jax.random.uniform(key_size, rows) ** 3
        at = into(best + size * jax.random.normal(key_noise, x.shape))
        new = steepness(at)
        better = new > value
        best = jnp.where(better.reshape(rows), at, best)
        return (best, jnp.where(better, new, value)), None

    keys = jax.random.split(key, num_steps)
    return jax.lax.scan(step, (x, steepness(x)), keys)[0][1]
