"""A net as linear chains between nonlinearities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from robustjax.certify.operators import Chain


class Value(NamedTuple):
    """`sum_i chain_i(node_i) + bias`: affine in the graph's nodes.

    terms: (number of a node, chain), each node once.
    bias:  `[1, *shape]` float64.
    """

    terms: tuple[tuple[int, Chain], ...]
    bias: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example, with its batch axis of 1 where the net has one."""
        return self.bias.shape[1:]


class Node(NamedTuple):
    """A nonlinearity of an affine value; number 0 is the input.

    kind:  "input", "sum" (the value itself), "max" and "min" (with the constant
           `data`), "abs", "tanh", "logistic", "silu", "max_pool" (`data`: axes),
           "window_max" (`data`: window, strides, pads), "larger" and "smaller" (of the
           two halves of axis 0) and "pair" (both).
    value: what goes in.
    shape: what comes out, of one example.
    """

    kind: str
    value: Value | None
    shape: tuple[int, ...]
    data: Any = None


class Graph(NamedTuple):
    """A net: nodes in the order in which they can be computed, and the logits."""

    nodes: tuple[Node, ...]
    logits: Value


def pruned(nodes: Sequence[Node], logits: Value) -> Graph:
    """The graph of these logits, without the nodes that they do not need.

    >>> value = Value(((0, ()),), np.zeros((1, 2)))
    >>> nodes = [Node("input", None, (2,)), Node("abs", value, (2,))]
    >>> len(pruned(nodes, value).nodes)
    1
    """
    needed, waiting = {0}, [logits]
    while waiting:
        for base, _ in waiting.pop().terms:
            value = nodes[base].value
            if base not in needed and value is not None:
                needed.add(base)
                waiting.append(value)
    numbers = {old: new for new, old in enumerate(sorted(needed))}

    def renamed(value: Value | None) -> Value | None:
        if value is None:
            return None
        terms = tuple((numbers[base], chain) for base, chain in value.terms)
        return value._replace(terms=terms)

    kept = [nodes[old]._replace(value=renamed(nodes[old].value)) for old in numbers]
    final = renamed(logits)
    assert final is not None
    return Graph(tuple(kept), final)
