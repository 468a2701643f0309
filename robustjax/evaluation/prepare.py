"""What stands between a user's model and the driver: its form, its clean answers."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.evaluation import checks as inputs
from robustjax.evaluation.driver import Driver, pad, plan
from robustjax.models.canonical import canonicalize
from robustjax.parallel import fetch
from robustjax.problems import predictions, takes_key
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key


def prepare_model(
    logits_fn: Callable[..., Array], x: np.ndarray, y: np.ndarray, batch_size: int
) -> tuple[Any, bool]:
    """The model as a pytree called `f(x, key)`, its answer's shape checked; and whether
    steps may run in a loop of the compiled program."""
    if not callable(logits_fn):
        raise TypeError(
            f"logits_fn is a {type(logits_fn).__name__}: pass a function f(x) that "
            "returns logits, such as robustjax.models.logits_fn(model, params, extra)."
        )
    f = logits_fn
    if not isinstance(f, jax.tree_util.Partial):
        f = jax.tree_util.Partial(f)
    if not takes_key(f):
        f = jax.tree_util.Partial(_without_key, f)
    rows = min(batch_size, len(x))
    shape = jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    inputs.check_logits(jax.eval_shape(f, shape, jax.random.key(0)), y, rows)
    looped = inputs.note_costs(f, shape)
    # On CPU an ordinary convolution inside an attack's loop is 10 times slower.
    return canonicalize(f), looped


def _without_key(f: Callable[..., Array], x: Array, key: Key | None = None) -> Array:
    return f(x)


def batches(size: int, batch_size: int) -> Iterator[tuple[slice, int, int]]:
    """Slices of equal shape over `size` rows: `(rows, how many count, padded to)`."""
    padded = min(batch_size, size)
    for begin in range(0, size, padded):
        yield slice(begin, begin + padded), min(padded, size - begin), padded


def of_rows(threat: ThreatModel, rows: Any) -> ThreatModel:
    """The threat of some rows, where each row has an epsilon of its own."""
    if np.ndim(threat.epsilon) == 0:
        return threat
    return dataclasses.replace(threat, epsilon=np.asarray(threat.epsilon)[rows])


@jax.jit
def _clean(model, x, key):
    with jax.default_matmul_precision("highest"):
        return model.logits_fn(x, key).astype(jnp.float32)


def clean_logits(driver: Driver, x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`[N, K]` logits of clean examples, at the judge's precision."""
    logits, begin = None, 0
    for shape in plan(len(x), driver.shapes):
        take = order[begin : begin + shape]
        here = driver.put(pad(x[take], shape))
        found = fetch(_clean(driver.model, here, driver.keys[0]))
        if logits is None:
            logits = np.zeros((len(x), found.shape[1]), np.float32)
        logits[take] = found[: len(take)]
        begin += shape
    assert logits is not None
    return logits


def predicted(logits: np.ndarray) -> np.ndarray:
    """`[N]` int32 predictions; -1 where a logit is NaN."""
    return np.where(np.isnan(logits).any(1), -1, logits.argmax(1)).astype(np.int32)


@jax.jit
def _answer(f: Any, x: Array, key: Key) -> Array:
    with jax.default_matmul_precision("highest"):
        return predictions(f(x, key).astype(jnp.float32))


def answers(f: Any, x: np.ndarray, key: Key, batch_size: int) -> np.ndarray:
    """`[N]` predictions of a prepared model at matmul precision `highest`; -1: NaN."""
    parts = [
        np.asarray(_answer(f, pad(x[rows], padded), key))[:count]
        for rows, count, padded in batches(len(x), batch_size)
    ]
    return np.concatenate(parts)
