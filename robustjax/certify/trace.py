"""Read a net from its own jaxpr, as linear chains between nonlinearities.

`trace` follows one example through `logits_fn`, in float64 and with the weights as
constants. What it cannot follow it refuses: a graph is the net, or there is none.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from robustjax.certify.equations import broadcast, linear_chain, permute, place, scale
from robustjax.certify.graph import Graph, Node, Value, pruned
from robustjax.certify.operators import Chain, Op, Shape, apply
from robustjax.types import Array

INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
CALLS = dict.fromkeys(
    ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
    + ("custom_vjp_call_jaxpr", "remat", "remat2", "checkpoint"),
    INNER,
)
SAME = ("convert_element_type", "copy", "stop_gradient", "optimization_barrier")


def trace(logits_fn: Callable[..., Array], x: Any) -> Graph:
    """Read a net: nonlinear nodes with affine values between them.

    Known are dense layers and convolutions in any form, BatchNorm in eval mode, sums of
    branches, padding, slicing, reshaping, concatenation, mean pooling; ReLU, maximum,
    minimum and clipping at constants, absolute value, tanh, sigmoid, SiLU, max-pooling,
    and the maximum and minimum of two values (MaxMin).

    Args:
      logits_fn: `f(x)`, inputs `[B, ...]` to logits `[B, K]`, as
        `robustjax.models.logits_fn` returns it.
      x: `[N, ...]` examples; only their shape counts.

    Returns:
      The graph of the net for one example. Weights are float32 numbers in float64;
      what the net computes from weights alone (BatchNorm's factors) is taken as JAX
      computes it, operation by operation.

    Raises:
      ValueError: naming the operation that is not known.

    >>> net = trace(lambda x: jax.nn.relu(x) @ jnp.ones((2, 3)), np.zeros((1, 2)))
    >>> [node.kind for node in net.nodes]
    ['input', 'max']
    """
    x = jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), jnp.float32)
    closed = jax.make_jaxpr(lambda x: logits_fn(x))(x)
    walk = _Walk([Node("input", None, x.shape)], {}, {})
    value = Value(((0, ()),), np.zeros((1, *x.shape)))
    outputs = walk.run(closed.jaxpr, closed.consts, [value])
    logits = outputs[0]
    if not isinstance(logits, Value):
        raise ValueError("the logits do not depend on x: there is nothing to certify.")
    if len(outputs) != 1 or len(logits.shape) != 2 or logits.shape[0] != 1:
        raise ValueError(
            f"logits_fn gave {len(outputs)} outputs, the first of shape "
            f"{logits.shape}; logits [B, K] are needed."
        )
    return pruned(walk.nodes, logits)


class _Walk(NamedTuple):
    nodes: list[Node]
    # By the identity of values, which are kept beside: it means something as long as
    # its object lives.
    halves: dict[tuple[int, int], tuple[Value, ...]]
    sums: dict[int, tuple[Value, Value]]

    def run(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list:
        known: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else known[atom]

        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))
        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[Any]) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        for field in CALLS.get(name, ()):
            if field in params:
                inner = params[field]
                jaxpr = getattr(inner, "jaxpr", inner)
                return self.run(jaxpr, getattr(inner, "consts", ()), inputs)
        follows = [isinstance(value, Value) for value in inputs]
        if not any(follows):
            outputs = equation.primitive.bind(
                *inputs, **equation.primitive.get_bind_params(params)
            )
            return outputs if equation.primitive.multiple_results else [outputs]
        dtypes = {atom.aval.dtype for atom in equation.outvars}
        if not dtypes <= {np.dtype("float32"), np.dtype("float64")}:
            raise ValueError(
                f"the net computes {name!r} in {', '.join(map(str, dtypes))}: "
                "certificates are about nets that compute in float32 throughout."
            )
        if name in SAME:
            return inputs
        if name == "split":
            return self.split(inputs[0], params["sizes"], params["axis"])
        shape = tuple(equation.outvars[0].aval.shape)
        found = self.known(name, params, inputs, follows, shape)
        if found is None:
            raise ValueError(
                f"the net applies {name!r} to what depends on x in a way that "
                "certificates do not know. They follow dense layers, convolutions, "
                "BatchNorm in eval mode, sums, pooling, ReLU, MaxMin, abs, tanh, "
                "sigmoid and SiLU."
            )
        return [found]

    def known(
        self, name: str, params: Any, inputs: list, follows: list[bool], shape: Shape
    ) -> Value | None:
        """The value of an equation with one result; None if it is not known."""
        first: Any = inputs[0]
        second: Any = inputs[1] if len(inputs) > 1 else None
        if name in ("add", "add_any"):
            return self.add(first, second, shape)
        if name == "sub":
            second = self.scaled(second, -1.0) if follows[1] else -second
            return self.add(first, second, shape)
        if name == "neg":
            return self.scaled(first, -1.0)
        if name == "mul":
            if all(follows):
                return self.silu(first, second)
            value, factor = inputs if follows[0] else inputs[::-1]
            return self.linear(value, scale(factor, value.shape, shape))
        if name == "div" and follows == [True, False]:
            factor = 1 / np.asarray(second, np.float64)
            return self.linear(first, scale(factor, first.shape, shape))
        if name in ("max", "min"):
            return self.extreme(name, first, second, shape)
        if name == "clamp" and follows == [False, True, False]:
            above = self.extreme("max", second, first, shape)
            return self.extreme("min", above, inputs[2], shape)
        if name in ("abs", "tanh", "logistic"):
            return self.node(name, first, shape)
        if name == "reduce_max":
            return self.node("max_pool", first, shape, tuple(params["axes"]))
        if name == "reduce_window_max":
            if any(
                d != 1 for d in (*params["base_dilation"], *params["window_dilation"])
            ):
                return None
            fields = ("window_dimensions", "window_strides", "padding")
            return self.node(
                "window_max", first, shape, tuple(params[f] for f in fields)
            )
        if name == "concatenate":
            return self.concatenate(inputs, params["dimension"], shape)
        if sum(follows) != 1 or len(inputs) > 2:
            return None
        place = follows.index(True)
        constant = inputs[1 - place] if len(inputs) == 2 else None
        value = inputs[place]
        chain = linear_chain(name, params, value.shape, constant, place, shape)
        return None if chain is None else self.linear(value, chain)

    def node(self, kind: str, value: Value, shape: Shape, data: Any = None) -> Value:
        self.nodes.append(Node(kind, value, shape, data))
        return Value(((len(self.nodes) - 1, ()),), np.zeros((1, *shape)))

    def linear(self, value: Value, chain: Chain) -> Value:
        if not chain:
            return value
        ((base, before),) = (value := self.single(value)).terms
        return Value(((base, before + chain),), apply(chain, value.bias))

    def single(self, value: Value) -> Value:
        """A value of several terms as a node of its own; the same one each time."""
        if len(value.terms) == 1:
            return value
        if id(value) not in self.sums:
            self.sums[id(value)] = self.node("sum", value, value.shape), value
        return self.sums[id(value)][0]

    def scaled(self, value: Value, factor: float) -> Value:
        return self.linear(value, scale(factor, value.shape, value.shape))

    def add(self, first: Any, second: Any, shape: Shape) -> Value:
        if not isinstance(first, Value):
            first, second = second, first
        first = self.linear(first, broadcast(first.shape, shape))
        if not isinstance(second, Value):
            return first._replace(bias=first.bias + np.asarray(second, np.float64))
        second = self.linear(second, broadcast(second.shape, shape))
        first, second = self.single(first), self.single(second)
        terms = dict(first.terms)
        for base, chain in second.terms:
            if base in terms:
                chain = self.parallel(base, terms[base], chain, shape)
            terms[base] = chain
        return Value(tuple(terms.items()), first.bias + second.bias)

    def parallel(self, base: int, one: Chain, other: Chain, shape: Shape) -> Chain:
        chains = []
        for chain in (one, other):
            grouped = len(chain) == 1 and chain[0].kind == "parallel"
            chains += chain[0].data if grouped else [chain]
        return (Op("parallel", self.nodes[base].shape, shape, tuple(chains)),)

    def extreme(self, name: str, first: Any, second: Any, shape: Shape) -> Value:
        if not isinstance(first, Value):
            first, second = second, first
        if not isinstance(second, Value):
            first = self.linear(first, broadcast(first.shape, shape))
            constant = np.broadcast_to(np.asarray(second, np.float64), shape)
            return self.node(name, first, shape, constant)
        kind = {"max": "larger", "min": "smaller"}[name]
        return self.node(kind, self.beside(first, second, shape), shape)

    def beside(self, first: Value, second: Value, shape: Shape) -> Value:
        """Two values side by side on a new first axis; the same object each time."""
        for pair in ((first, second), (second, first)):
            if (found := self.halves.get((id(pair[0]), id(pair[1])))) is not None:
                return found[0]
        both = self.concatenate(
            [
                self.linear(
                    value,
                    (
                        *broadcast(value.shape, shape),
                        Op("reshape", shape, (1, *shape)),
                    ),
                )
                for value in (first, second)
            ],
            0,
            (2, *shape),
        )
        self.halves[id(first), id(second)] = both, first, second
        return both

    def concatenate(self, inputs: list, axis: int, shape: Shape) -> Value:
        nodes: list[Any] = [self.whole(value) for value in inputs]
        if [node and node.kind for node in nodes] == ["larger", "smaller"]:
            if nodes[0].value is nodes[1].value:
                return self.pair(nodes[0], axis, shape)
        total, start = None, 0
        for value in inputs:
            here = value.shape if isinstance(value, Value) else np.shape(value)
            chain = place(tuple(here), shape, axis, start)
            start += here[axis]
            if isinstance(value, Value):
                part = self.linear(value, chain)
            else:
                part = apply(chain, np.asarray(value, np.float64)[None])[0]
            total = part if total is None else self.sum(total, part, shape)
        assert isinstance(total, Value)
        return total

    def sum(self, first: Any, second: Any, shape: Shape) -> Any:
        if isinstance(first, Value) or isinstance(second, Value):
            return self.add(first, second, shape)
        return first + second

    def pair(self, node: Node, axis: int, shape: Shape) -> Value:
        """MaxMin: both of two values, the larger ones first along `axis`."""
        assert node.value is not None
        half = node.shape
        order = [*range(1, axis + 1), 0, *range(axis + 1, len(half) + 1)]
        value = self.node("pair", node.value, (2, *half))
        value = self.linear(value, permute((2, *half), order))
        return self.linear(value, (Op("reshape", value.shape, shape),))

    def whole(self, value: Any) -> Node | None:
        """The node that a value is, if it is one, unchanged."""
        if not isinstance(value, Value) or len(value.terms) != 1 or value.bias.any():
            return None
        base, chain = value.terms[0]
        return None if chain else self.nodes[base]

    def silu(self, first: Value, second: Value) -> Value | None:
        """`u * logistic(u)`, the one product of two values that is known."""
        for value, gate in ((first, second), (second, first)):
            node = self.whole(gate)
            if node is not None and node.kind == "logistic" and node.value is value:
                return self.node("silu", value, value.shape)
        return None

    def split(self, value: Value, parts: Sequence[int], axis: int) -> list[Value]:
        found, start = [], 0
        for size in parts:
            shape = list(value.shape)
            cut = [(0, length, 1) for length in shape]
            shape[axis], cut[axis] = size, (start, start + size, 1)
            op = Op("slice", value.shape, tuple(shape), tuple(cut))
            found.append(self.linear(value, (op,)))
            start += size
        return found
