"""Hashes by which one run knows another: of values, of weights, of what is computed."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from robustjax.parallel import fetch
from robustjax.types import PyTree

# Operations and parameters that only say where an array lies.
PLACING = ("device_put", "reshard", "sharding_constraint")
PLACES = ("sharding", "mesh", "layout")


def digest(*values: Any) -> str:
    """A hash of arrays, texts and numbers, in their order.

    >>> digest(np.zeros(2), "a") == digest(np.zeros(2), "a") != digest(np.zeros(3), "a")
    True
    """
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, str | int | float):
            found.update(repr(value).encode())
            continue
        array = np.asarray(fetch(value))
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def tree_digest(tree: PyTree) -> str:
    """A hash of a pytree's leaves; keys count as their data."""
    leaves = [
        jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array)
        and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for leaf in jax.tree.leaves(tree)
    ]
    return digest(*leaves)


def program_digest(closed: Any) -> str:
    """A hash of a traced program (`jax.make_jaxpr`): its operations and constants.

    Operations count in their order, with shapes and parameters; the bodies of inner
    functions, and the constants in them, are read wherever they are called, so that it
    does not matter what was traced before. What does not count: names of variables and
    of jitted functions, and on which devices an array lies. A function among the
    parameters counts by its name alone: a callback's, and the rule of a `custom_vjp`
    where the program takes no gradient.

    >>> trace = jax.make_jaxpr
    >>> one, same, two = (trace(lambda x, k=k: x * k)(1.0) for k in (1, 1, 2))
    >>> program_digest(one) == program_digest(same) != program_digest(two)
    True
    """
    return digest(*_parts(closed))


def _parts(traced: Any) -> Iterator[str]:
    """The text of a jaxpr, piece by piece."""
    if isinstance(traced, ClosedJaxpr):
        yield tree_digest([c for c in traced.consts if hasattr(c, "shape")])
        traced = traced.jaxpr
    names: dict[Any, str] = {}
    placed = 0

    def named(variable: Any) -> str:
        if isinstance(variable, Literal):
            return f"{variable.aval}={tree_digest(variable.val)}"
        kind = str(variable.aval)  # of a token; an array's may name axes of a mesh
        if hasattr(variable.aval, "shape"):
            kind = f"{variable.aval.dtype}{variable.aval.shape}"
        return names.setdefault(variable, f"{len(names) - placed}:{kind}")

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


def _parameter(value: Any) -> Iterator[str]:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        yield from _parts(value)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _parameter(one)
    elif isinstance(value, set | frozenset):
        yield " ".join(sorted(map(str, value)))  # their order is not the processes'
    elif isinstance(value, np.ndarray | jax.Array):
        yield tree_digest(value)
    else:
        yield re.sub(r"0x[0-9a-f]+", "", str(value))
