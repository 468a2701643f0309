"""What an attack maximizes, and when it has won.

Signs, targets and randomness live here and nowhere else. A `Problem` lives inside a
trace: it holds functions, so it never crosses a jit boundary.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from robustjax.losses import classes, cross_entropy, finite
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key, LogitsFn, LossFn


class Problem(NamedTuple):
    """One maximization per row of a batch.

    x:       `[B, ...]` clean inputs.
    threat:  where `x + delta` may be.
    index:   `[B]` int32, which example each row is; the only source of randomness.
    start:   `[B, ...]` a point to begin at, or None for the attack's own start.
    y:       `[B]` the label that `success` judges, or None where there is none.
    score:   `(x_adv, key) -> (score [B], logits [B, K])`; attacks MAXIMIZE it.
    success: `(logits) -> [B]` bool, whether the attack has won.
    """

    x: Array
    threat: ThreatModel
    index: Array
    start: Array | None
    y: Array | None
    score: Callable[[Array, Key | None], tuple[Array, Array]]
    success: Callable[[Array], Array]


def example_keys(key: Key, index: Array) -> Array:
    """One key per example, `[B]`: `fold_in(key, index)`.

    A row's randomness depends on which example it is, and on nothing else: not on
    its position, the batch size, or the number of devices.

    >>> import jax, jax.numpy as jnp
    >>> keys = example_keys(jax.random.key(0), jnp.array([7, 3]))
    >>> swapped = example_keys(jax.random.key(0), jnp.array([3, 7]))
    >>> bool((keys[0] == swapped[1]).all())
    True
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def with_key(logits_fn: Callable[..., Array]) -> LogitsFn:
    """Accept both `f(x)` and `f(x, key)`: always called as `f(x, key)` afterwards.

    >>> with_key(lambda x: x + 1)(1, key=None)
    2
    """
    if takes_key(logits_fn):
        return lambda x, key=None: logits_fn(x, key)
    return lambda x, key=None: logits_fn(x)


def takes_key(fn: Any) -> bool:
    """Whether a function takes `(x, key)`, and not `(x)` alone.

    >>> takes_key(lambda x, key: x), takes_key(lambda x, scale=2: x)
    (True, False)
    """
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a callable without a signature: assume f(x)
        return False
    positional = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(positional) > 1 and (
        positional[1].name == "key" or positional[1].default is inspect.Parameter.empty
    )


def never(logits: Array) -> Array:
    """A success rule that no point meets, `[B]` False.

    >>> import jax.numpy as jnp
    >>> never(jnp.zeros((2, 3))).tolist()
    [False, False]
    """
    return jnp.zeros(logits.shape[:1], bool)


def predictions(logits: Array) -> Array:
    """Predicted classes `[B]`; -1 where a logit is NaN, which equals no label.

    A model that answers NaN inside the ball has failed there: `untargeted` counts it
    as broken, whatever `argmax` makes of it.

    >>> import jax.numpy as jnp
    >>> predictions(jnp.array([[0.0, 1.0], [jnp.nan, 1.0]])).tolist()
    [1, -1]
    """
    broken = jnp.any(jnp.isnan(logits), axis=-1)
    return jnp.where(broken, -1, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def maximize(
    logits_fn: Callable[..., Array],
    x: Array,
    threat: ThreatModel,
    surrogate: Callable[[Array], Array],
    success: Callable[[Array], Array] = never,
    *,
    index: Array | None = None,
    start: Array | None = None,
    y: Array | None = None,
) -> Problem:
    """Maximize `surrogate(logits) -> [B]`, judge by `success(logits) -> [B]`.

    The general form: TRADES raises a KL divergence while success is judged on labels.

    Args:
      logits_fn: `f(x)` or `f(x, key)`, inputs `[B, ...]` to logits `[B, K]`.
      x: `[B, ...]` clean inputs in the box of `threat`.
      threat: the threat model.
      surrogate: logits to score `[B]`, larger is better for the attacker.
      success: logits to bool `[B]`.
      index: `[B]` int32; None means `0..B-1`.
      start: `[B, ...]` first point, or None.
      y: `[B]` label that `success` judges, or None.

    >>> import jax, jax.numpy as jnp
    >>> from robustjax.threats import linf
    >>> p = maximize(lambda x: x, jnp.ones((1, 2)), linf(.1), lambda z: z.sum(-1))
    >>> p.score(p.x, None)[0].tolist()
    [2.0]
    """
    call = with_key(logits_fn)
    x = jnp.asarray(x)  # attacks compute in float32, on half-precision inputs too
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if index is None:
        index = jnp.arange(x.shape[0], dtype=jnp.int32)

    def score(x_adv: Array, key: Key | None) -> tuple[Array, Array]:
        # In the type of x, whatever the model computes in: so attacks carry scores.
        logits = call(x_adv, key).astype(x.dtype)
        return surrogate(logits), logits

    return Problem(x, threat, index, start, y, score, success)


def untargeted(
    logits_fn: Callable[..., Array],
    x: Array,
    y: Array,
    threat: ThreatModel,
    loss: LossFn = cross_entropy,
    *,
    index: Array | None = None,
    start: Array | None = None,
) -> Problem:
    """Raise `loss(logits, y)`; won when the prediction differs from `y`.

    See `maximize` for the arguments; `y` is `[B]` int32.

    >>> import jax, jax.numpy as jnp
    >>> from robustjax.threats import linf
    >>> p = untargeted(lambda x: x, jnp.eye(2), jnp.array([0, 0]), linf(.1))
    >>> p.success(p.score(p.x, None)[1]).tolist()
    [False, True]
    """
    return maximize(
        logits_fn,
        x,
        threat,
        lambda logits: loss(logits, y),
        lambda logits: predictions(logits) != y,
        index=index,
        start=start,
        y=y,
    )


def targeted(
    logits_fn: Callable[..., Array],
    x: Array,
    target: Array,
    threat: ThreatModel,
    loss: LossFn = cross_entropy,
    *,
    index: Array | None = None,
    start: Array | None = None,
) -> Problem:
    """Raise `-loss(logits, target)`; won when the prediction is `target`.

    >>> import jax, jax.numpy as jnp
    >>> from robustjax.threats import linf
    >>> p = targeted(lambda x: x, jnp.eye(2), jnp.array([0, 0]), linf(.1))
    >>> p.success(p.score(p.x, None)[1]).tolist()
    [True, False]
    """
    return maximize(
        logits_fn,
        x,
        threat,
        lambda logits: -loss(logits, target),
        lambda logits: predictions(logits) == target,
        index=index,
        start=start,
    )


def ranked_class(logits: Array, y: Array, rank: int) -> Array:
    """The class of rank `rank` (1 = best) among those other than `y`, `[B]` int32.

    Ties go to the smaller class. By repeated argmax, not a sort: see `losses`.

    >>> import jax.numpy as jnp
    >>> ranked_class(jnp.array([[5.0, 1.0, 3.0]]), jnp.array([0]), 2).tolist()
    [1]
    """
    rest = jnp.where(y[:, None] == classes(logits), -jnp.inf, finite(logits))
    best = jnp.argmax(rest, axis=-1)
    for _ in range(rank - 1):
        rest = jnp.where(best[:, None] == classes(logits), -jnp.inf, rest)
        best = jnp.argmax(rest, axis=-1)
    return best.astype(jnp.int32)
