"""What stands between a user's model and the driver: its form, its clean answers."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.attacks.base import AttackFn, Result
from robustjax.evaluation import checks as inputs
from robustjax.evaluation.judge import Driver, pad, plan
from robustjax.models.canonical import canonicalize
from robustjax.parallel import fetch, num_devices, put_shared, put_split
from robustjax.problems import predictions, takes_key, untargeted
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
    kinds = {c.__module__.split(".")[0] for c in type(logits_fn).__mro__}
    if "flax" in kinds:  # NNX modules can be called, and carry state
        raise TypeError(
            f"logits_fn is the Flax module {type(logits_fn).__name__}: pass a function "
            "of x with its weights bound; docs/evaluate.md shows Linen and NNX."
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


@jax.jit  # models of one program, other weights, are traced once
def _slope(f: Any, x: Array) -> Array:
    def total(x: Array) -> Array:
        return jnp.sum(f(x, jax.random.key(0)).astype(jnp.float32))

    return jax.grad(total)(x)


def no_gradient(f: Any, x: Any) -> str | None:
    """Why `f(x, key)` cannot be differentiated by JAX; None: it can.

    As with `jax.jit`, a function that changes what it computes must be a new one.

    >>> no_gradient(lambda x, key: 2 * x, np.ones((1, 2), np.float32)) is None
    True
    """
    if not isinstance(f, jax.tree_util.Partial):
        f = jax.tree_util.Partial(f)
    try:
        jax.eval_shape(_slope, f, jax.ShapeDtypeStruct(x.shape, x.dtype))
    except Exception as error:  # pure_callback, while_loop, ...: each has its own
        return str(error).split("\n")[0]
    return None


def traced_attacks(
    attacks: Mapping[str, AttackFn],
    f: Any,
    x: np.ndarray,
    y: np.ndarray,
    threat: ThreatModel,
) -> dict[str, Any]:
    """The program of each attack on two rows, nothing being computed.

    As in the evaluation, every row has an epsilon of its own. Raises TypeError or
    ValueError where one does not return a `Result` of its rows; an error of its own
    gets its name as a note.
    """
    rows = slice(0, min(2, len(x)))
    few = of_rows(threat, rows)
    epsilon = np.broadcast_to(np.asarray(few.epsilon, np.float32), rows.stop)

    def call(attack_fn: AttackFn, key: Key, x: Array, y: Array, epsilon: Array) -> Any:
        here = dataclasses.replace(few, epsilon=epsilon)
        return attack_fn(key, untargeted(f, x, y, here))

    programs = {}
    for name, attack_fn in attacks.items():
        arguments = (jax.random.key(0), x[rows], y[rows], epsilon)
        trace = jax.make_jaxpr(functools.partial(call, attack_fn), return_shape=True)
        try:
            programs[name], found = trace(*arguments)
        except Exception as error:
            error.add_note(
                f"raised by attacks[{name!r}], traced on {rows.stop} rows under "
                f"{threat.norm}; problem.threat.epsilon is traced, of shape "
                f"[{rows.stop}], a budget for each row."
            )
            raise
        if not isinstance(found, Result):
            raise TypeError(
                f"attacks[{name!r}] returned a {type(found).__name__}: return "
                "robustjax.Result(x_adv, success, size, score)."
            )
        for field, leaf in found._asdict().items():
            shape = x[rows].shape if field == "x_adv" else (rows.stop,)
            if tuple(np.shape(leaf)) != shape:
                raise ValueError(
                    f"attacks[{name!r}] returned {field} of shape "
                    f"{tuple(np.shape(leaf))} for x of shape {x[rows].shape}: it must "
                    f"be {shape}."
                )
        if found.success.dtype != np.bool_:
            raise TypeError(
                f"attacks[{name!r}] returned success of {found.success.dtype}: it must "
                "be bool."
            )
    return programs


def _without_key(f: Callable[..., Array], x: Array, key: Key | None = None) -> Array:
    return f(x)


def batches(
    size: int, batch_size: int, mesh: Any = None
) -> Iterator[tuple[slice, int, int]]:
    """Slices of equal shape over `size` rows: `(rows, how many count, padded to)`.

    A mesh's devices have at most `batch_size` rows each, and equally many.
    """
    devices = num_devices(mesh)
    padded = devices * min(batch_size, -(-size // devices))
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


def answers(
    f: Any, x: np.ndarray, key: Key, batch_size: int, mesh: Any = None
) -> np.ndarray:
    """`[N]` predictions of a prepared model at matmul precision `highest`; -1: NaN."""
    f, key = put_shared((f, key), mesh)
    parts = [
        fetch(_answer(f, put_split(pad(x[rows], padded), mesh), key))[:count]
        for rows, count, padded in batches(len(x), batch_size, mesh)
    ]
    return np.concatenate(parts)
