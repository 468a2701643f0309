"""Whether two traced functions are the same: what tells one training from another."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from robustjax.parallel import fetch
from robustjax.types import PyTree

PACKAGES = ("jax", "flax", "optax", "robustjax")
# Operations and parameters that only say where an array lies.
PLACING = ("device_put", "reshard", "sharding_constraint")
PLACES = ("sharding", "mesh", "layout")


def fingerprint_of(function: Callable[..., Any], *arguments: PyTree) -> dict[str, Any]:
    """What a function computes, as a short text that two processes can compare.

    The SHA-256 of the operations that JAX traces, in their order, with their shapes,
    their parameters and the values of all constants; the bodies of inner functions are
    read wherever they are called. What does not count: names of variables and of inner
    functions; on which devices an array lies; functions among the parameters, which
    have no text: a callback's, and the rule of a `custom_vjp` where the gradient is no
    part of `function`.

    Args:
      function: a function of arrays.
      *arguments: arrays or their shapes.

    Returns:
      "digest", and "versions", by package: other ones may trace the same function in
      another way.

    >>> import jax.numpy as jnp
    >>> twice = fingerprint_of(lambda x: 2 * x, jnp.ones(3))
    >>> twice == fingerprint_of(lambda y: 2 * y, jnp.ones(3))
    True
    >>> twice == fingerprint_of(lambda x: 3 * x, jnp.ones(3))
    False
    """
    traced = jax.make_jaxpr(function)(*arguments)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"versions": versions, "digest": _digest(_parts(traced))}


def digest_of(tree: PyTree) -> str:
    """The same of the values of all leaves.

    >>> digest_of({"a": np.zeros(2)}) == digest_of({"a": np.ones(2)})
    False
    """
    return _digest(map(_value, jax.tree.leaves(tree)))


def _digest(parts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _parts(traced: Any) -> Iterator[str]:
    """The text of a jaxpr, piece by piece; calls are followed where they stand."""
    if isinstance(traced, ClosedJaxpr):
        for value in traced.consts:
            yield _value(value)
        traced = traced.jaxpr
    names: dict[Any, str] = {}
    placed = 0

    def named(variable: Any) -> str:
        if isinstance(variable, Literal):
            return f"{variable.aval}={_value(variable.val)}"
        return names.setdefault(variable, f"{len(names) - placed}:{_type(variable)}")

    yield " ".join([named(v) for v in (*traced.constvars, *traced.invars)])
    for equation in traced.eqns:
        if equation.primitive.name in PLACING:
            for before, after in zip(equation.invars, equation.outvars, strict=True):
                names[after] = named(before)
                placed += 1
            continue
        yield equation.primitive.name
        yield " ".join([named(v) for v in (*equation.invars, *equation.outvars)])
        for name, value in sorted(equation.params.items()):
            if name != "name" and not any(place in name for place in PLACES):
                yield name
                yield from _parameter(value)
    yield " ".join([named(v) for v in traced.outvars])


def _type(variable: Any) -> str:
    """Without the axes of a mesh, which the text of an `aval` may have."""
    return f"{variable.aval.dtype}{variable.aval.shape}"


def _parameter(value: Any) -> Iterator[str]:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        yield from _parts(value)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _parameter(one)
    elif isinstance(value, set | frozenset):
        yield " ".join(sorted(map(str, value)))  # their order is not the processes'
    elif isinstance(value, np.ndarray | jax.Array):
        yield _value(value)
    elif not callable(value) and " at 0x" not in (text := str(value)):
        yield text


def _value(value: Any) -> str:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        value = jax.random.key_data(value)
    array = np.asarray(fetch(value))
    content = hashlib.sha256(array.tobytes()).hexdigest()
    return f"{array.dtype}{array.shape}{content}"
