"""Serve a user's own network: its convolutions, rewritten so that XLA:CPU is fast.

A network from anywhere holds ordinary convolutions, whose gradients inside a `scan` run
10 to 15 times slower on CPU (see convolution.py). `canonicalize` traces the function to
a jaxpr and evaluates it anew, with canonical convolutions and pooling in place of those
that fit. Nothing else changes, and weights stay data.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from robustjax.models.convolution import canonical_convolution
from robustjax.models.forms import Geometry
from robustjax.models.layers import max_pool
from robustjax.problems import takes_key
from robustjax.types import Array, Key, LogitsFn

CONVOLUTION = "conv_general_dilated"
POOLING = "reduce_window_max"
CALLS = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINTS = ("remat", "remat2", "checkpoint")
OURS = ("canonical_convolution", "_convolution", "_kernel_gradient")


@dataclass(frozen=True)
class _Canonical:
    """Evaluates a logits function by its rewritten jaxpr; equal for equal functions."""

    takes_key: bool

    def __call__(self, logits_fn: LogitsFn, x: Array, key: Key | None = None) -> Array:
        arguments = (x, key) if self.takes_key and key is not None else (x,)
        closed, shape = jax.make_jaxpr(lambda f, *rest: f(*rest), return_shape=True)(
            logits_fn, *arguments
        )
        leaves = jax.tree.leaves((logits_fn, *arguments))
        outputs = _evaluate(*_opened(closed), leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)


def canonicalize(logits_fn: Callable[..., Array]) -> LogitsFn:
    """The same function with its convolutions and poolings in canonical form.

    On CPU, inside `scan` and `fori_loop`, gradients of the result run about as fast as
    those of this package's own models. Values and gradients agree with the original's
    to float32 rounding (where pixels tie, 2 x 2 max-pooling shares the gradient).
    Elsewhere than on CPU the function is only wrapped. The result serves reverse mode
    only: for `jvp` and `jacfwd` keep the original.

    Replaced are two-dimensional convolutions without groups, in any dimension order,
    and non-overlapping 2 x 2 max-pooling, also within `jit` and `checkpoint`. What lies
    inside `scan`, `while`, `cond` or a custom derivative rule is left as it is:
    `count_convolutions` tells how many that concerns.

    Args:
        logits_fn: `(x)` or `(x, key=None) -> logits`. The leaves of a
            `jax.tree_util.Partial` remain leaves: data, not constants.

    Returns:
        A `Partial` with the signature `(x, key=None)`.

    >>> import jax.numpy as jnp
    >>> from jax import lax
    >>> kernel = jnp.ones((3, 3, 1, 4))
    >>> def f(x):
    ...     return lax.conv_general_dilated(
    ...         x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ...     ).mean((1, 2))
    >>> canonicalize(f)(jnp.ones((2, 8, 8, 1))).shape
    (2, 4)
    """
    partial = _as_partial(logits_fn)
    if jax.default_backend() != "cpu":  # it runs the result, here and now
        return partial
    return jax.tree_util.Partial(_Canonical(takes_key(logits_fn)), partial)


def count_convolutions(
    logits_fn: Callable[..., Array], x: Array | jax.ShapeDtypeStruct
) -> tuple[int, int]:
    """How many convolutions `canonicalize` replaces, and how many it leaves.

    Args:
        logits_fn: the function before `canonicalize`.
        x: inputs `[B, ...]`, or their shape and dtype.

    Returns:
        `(replaced, left)`; convolutions that are canonical already count in neither.

    >>> import jax.numpy as jnp
    >>> count_convolutions(lambda x: x.sum((1, 2)), jnp.ones((2, 8, 8, 1)))
    (0, 0)
    """
    closed = jax.make_jaxpr(lambda f, x: f(x))(_as_partial(logits_fn), x)
    return _count(_opened(closed)[0], True)


def _as_partial(logits_fn: Callable[..., Array]) -> LogitsFn:
    if isinstance(logits_fn, jax.tree_util.Partial):
        return logits_fn
    return jax.tree_util.Partial(logits_fn)


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants; JAX 0.12 no longer tells open from closed ones."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_opened(item)[0], "eqns"):
                yield item


def _is_ours(jaxpr: Any) -> bool:
    source = str(getattr(jaxpr.debug_info, "func_src_info", ""))
    return source.split(" ")[0] in OURS


def _count(jaxpr: Any, reached: bool) -> tuple[int, int]:
    replaced = left = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == CONVOLUTION:
            if reached and _convolution_fits(equation):
                replaced += 1
            else:
                left += 1
        for inner in _inner(equation):
            inner, _ = _opened(inner)
            if _is_ours(inner):
                continue
            counts = _count(inner, reached and name in CALLS + CHECKPOINTS)
            replaced, left = replaced + counts[0], left + counts[1]
    return replaced, left


def _contains(jaxpr: Any) -> bool:
    """Whether there is something to replace anywhere inside."""
    return any(
        equation.primitive.name in (CONVOLUTION, POOLING)
        or any(_contains(_opened(inner)[0]) for inner in _inner(equation))
        for equation in jaxpr.eqns
    )


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr, with replacements."""
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        results = _replay(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _replay(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """The results of one equation."""
    name, params = equation.primitive.name, equation.params
    if name == CONVOLUTION and _convolution_fits(equation):
        return [_convolve(params, *inputs)]
    if name == POOLING and _pooling_fits(equation):
        return [_pool(params, *inputs)]
    if name in CALLS + CHECKPOINTS:
        jaxprs = list(_inner(equation))
        inner, consts = _opened(jaxprs[0]) if len(jaxprs) == 1 else (None, ())
        if inner is not None and _contains(inner):
            if name in CALLS:
                return _evaluate(inner, consts, inputs)
            return jax.checkpoint(
                lambda *arguments: _evaluate(inner, consts, arguments),
                prevent_cse=params["prevent_cse"],
                policy=params["policy"],
            )(*inputs)
    outputs = equation.primitive.bind(
        *inputs, **equation.primitive.get_bind_params(params)
    )
    return outputs if equation.primitive.multiple_results else [outputs]


def _convolution_fits(equation: Any) -> bool:
    x, kernel = (atom.aval for atom in equation.invars)
    params = equation.params
    return (
        x.ndim == 4
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and x.dtype == kernel.dtype == equation.outvars[0].aval.dtype
        and jnp.issubdtype(x.dtype, jnp.floating)
    )


def _convolve(params: dict[str, Any], x: Array, kernel: Array) -> Array:
    spec = params["dimension_numbers"]  # positions of batch, feature, rows, columns
    (top, bottom), (left, right) = params["padding"]
    batch, feature, *space = spec.lhs_spec
    features, channels, *window = spec.rhs_spec
    x = jnp.transpose(x, (batch, *space, feature))
    kernel = jnp.transpose(kernel, (*window, channels, features))
    out = canonical_convolution(
        x,
        kernel,
        Geometry(
            tuple(params["window_strides"]),
            ((top, bottom), (left, right)),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            params["precision"],
        ),
    )
    batch, feature, *space = spec.out_spec
    order = {batch: 0, space[0]: 1, space[1]: 2, feature: 3}
    return jnp.transpose(out, [order[axis] for axis in range(4)])


def _pooling_fits(equation: Any) -> bool:
    """2 x 2 windows, side by side, on two axes of four, without padding."""
    x, params = equation.invars[0].aval, equation.params
    window = tuple(params["window_dimensions"])
    return (
        x.ndim == 4
        and sorted(window) == [1, 1, 2, 2]
        and tuple(params["window_strides"]) == window
        and all(tuple(edges) == (0, 0) for edges in params["padding"])
        and all(d == 1 for d in params["base_dilation"])
        and all(d == 1 for d in params["window_dilation"])
        and all(size >= width for size, width in zip(x.shape, window, strict=True))
    )


def _pool(params: dict[str, Any], x: Array) -> Array:
    window = params["window_dimensions"]
    space = [axis for axis in range(4) if window[axis] == 2]
    rest = [axis for axis in range(4) if window[axis] == 1]
    order = (rest[0], *space, rest[1])
    out = max_pool(jnp.transpose(x, order))
    return jnp.transpose(out, [order.index(axis) for axis in range(4)])
