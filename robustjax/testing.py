"""Test an attack against the truth: linear oracles and the conformance checks.

On a linear model with two classes the worst case is known in closed form, so an attack
is compared with mathematics and not with another attack. `check_attack` runs all checks
on an attack of your own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.attacks.base import AttackFn, Result
from robustjax.losses import margin, margin_loss
from robustjax.problems import untargeted
from robustjax.threats import ThreatModel, is_feasible
from robustjax.threats import threat as make_threat
from robustjax.types import Array


class LinearOracle(NamedTuple):
    """A linear model with two classes, and the exact worst case for each example.

    logits_fn:    `x -> [B, 2]`, margins `<w, x> + b` and their negation.
    x, y:         `[B, ...]`, `[B]`.
    threat:       the threat model.
    worst_margin: `[B]` float64, the least margin in ball and box.
    clean_margin: `[B]` float64.
    """

    logits_fn: Callable[[Array], Array]
    x: Array
    y: Array
    threat: ThreatModel
    worst_margin: np.ndarray
    clean_margin: np.ndarray


BUDGETS = {"Linf": 0.1, "L2": 0.4, "L1": 0.8, "L0": 2.0}


def linear_oracle(
    norm: str,
    *,
    shape: tuple[int, ...] = (12,),
    batch_size: int = 4,
    box_active: bool = False,
    epsilon: float | None = None,
    seed: int = 0,
) -> LinearOracle:
    """A random linear model with its exact worst case under one norm.

    With the box inactive it is `m - epsilon * ||w||_dual`. With the box [0, 1] active:
    Linf coordinate by coordinate; L2 `clip(-t w)` with t found by bisection; L1 and L0
    greedily. L0 always has the box active (it bounds nothing else).

    Args:
      norm: "Linf", "L2", "L1" or "L0".
      shape: of one example.
      batch_size: examples.
      box_active: inputs near the faces of [0, 1], instead of a box far away.
      epsilon: the budget; None takes `BUDGETS`.
      seed: of the model and the examples.

    >>> oracle = linear_oracle("Linf", shape=(3, 2))
    >>> bool((oracle.worst_margin < oracle.clean_margin).all())
    True
    """
    rng = np.random.default_rng(seed)
    epsilon = BUDGETS[norm] if epsilon is None else epsilon
    box_active = box_active or norm == "L0"
    w = rng.normal(size=shape)
    x = rng.uniform(0, 1, (batch_size, *shape))
    if box_active:  # a third of the coordinates on a face, as in images
        face = rng.uniform(size=x.shape)
        x = np.where(face < 0.17, 0.0, np.where(face > 0.83, 1.0, x))
    x = x.astype(np.float32).astype(np.float64)
    w = w.astype(np.float32).astype(np.float64)
    flat_x, flat_w = x.reshape(batch_size, -1), w.ravel()
    value = flat_x @ flat_w
    b = -float(np.float32(np.median(value)))
    y = np.where(value + b > 0, 0, 1)
    sign = np.where(y == 0, 1.0, -1.0)[:, None]
    clean = 2 * sign[:, 0] * (value + b)  # the two logits are z and -z
    box = (0.0, 1.0) if box_active else (-100.0, 100.0)
    drop = [
        _least(norm, s * flat_w, box[0] - row, box[1] - row, epsilon)
        for s, row in zip(sign, flat_x, strict=True)
    ]
    worst = clean + 2 * np.array(drop)

    weight, bias = jnp.asarray(w.ravel(), jnp.float32), jnp.float32(b)
    logits_fn = jax.tree_util.Partial(_linear, weight, bias)
    return LinearOracle(
        logits_fn,
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y, jnp.int32),
        make_threat(norm, epsilon, *box),
        worst,
        clean,
    )


def _linear(weight: Array, bias: Array, x: Array) -> Array:
    z = x.reshape(x.shape[0], -1) @ weight + bias
    return jnp.stack([z, -z], axis=-1)


def _least(
    norm: str, w: np.ndarray, low: np.ndarray, high: np.ndarray, epsilon: float
) -> float:
    """`min <w, d>` over the ball and `low <= d <= high`, in float64."""
    room = np.where(w > 0, -low, high)  # how far each coordinate can go downhill
    gain = np.abs(w)
    if norm == "Linf":
        return -float(np.sum(gain * np.minimum(room, epsilon)))
    if norm == "L0":
        return -float(np.sort(gain * room)[::-1][: int(epsilon)].sum())
    if norm == "L1":
        left, total = epsilon, 0.0
        for i in np.argsort(-gain):
            used = min(room[i], left)
            total, left = total + gain[i] * used, left - used
        return -float(total)
    below, above = 0.0, 1e9
    if np.linalg.norm(np.minimum(above * gain, room)) > epsilon:
        for _ in range(200):
            t = (below + above) / 2
            inside = np.linalg.norm(np.minimum(t * gain, room)) <= epsilon
            below, above = (t, above) if inside else (below, t)
    else:
        below = above
    return -float(np.sum(gain * np.minimum(below * gain, room)))


def shortfall(attack_fn: AttackFn, oracle: LinearOracle, seed: int = 0) -> np.ndarray:
    """How far an attack stays from the worst case, `[B]`.

    `(margin(x_adv) - worst) / (clean - worst)`: 0 is the worst case, 1 is no attack.

    >>> import robustjax as rj
    >>> bool((shortfall(rj.fgsm(), linear_oracle("Linf")) < 1e-5).all())
    True
    """
    result = _run(attack_fn, oracle, seed)
    reached = np.asarray(margin(oracle.logits_fn(result.x_adv), oracle.y), np.float64)
    return (reached - oracle.worst_margin) / (oracle.clean_margin - oracle.worst_margin)


def _run(
    attack_fn: AttackFn, oracle: LinearOracle, seed: int = 0, index: Any = None
) -> Result:
    index = np.arange(len(oracle.y)) if index is None else index
    return _attack(
        attack_fn,
        oracle.logits_fn,
        jax.random.key(seed),
        oracle.x,
        oracle.y,
        jnp.asarray(index, jnp.int32),
        oracle.threat,
    )


@functools.partial(jax.jit, static_argnums=0)
def _attack(attack_fn, logits_fn, key, x, y, index, threat):
    problem = untargeted(logits_fn, x, y, threat, loss=margin_loss, index=index)
    return attack_fn(key, problem)


def check_attack(
    attack_fn: AttackFn, norm: str = "Linf", tolerance: float = 1e-4
) -> None:
    """Run every conformance check; an `AssertionError` says which one failed.

    The attack reaches the linear oracles' worst case within `tolerance` (see
    `shortfall`; noise and score-based attacks need more), stays in ball and box, treats
    rows independently, and survives bad models.

    >>> import robustjax as rj
    >>> check_attack(rj.fgsm(), "Linf")
    """
    for box_active in (False, True):
        oracle = linear_oracle(norm, box_active=box_active)
        check_optimal(attack_fn, oracle, tolerance)
        check_feasible(attack_fn, oracle)
    check_independent(attack_fn, linear_oracle(norm, box_active=True))
    check_bad_models(attack_fn, norm)


def check_optimal(
    attack_fn: AttackFn, oracle: LinearOracle, tolerance: float = 1e-4
) -> None:
    """The attack reaches the exact worst case, and does not pass it."""
    missing = shortfall(attack_fn, oracle)
    assert (missing <= tolerance).all(), (
        f"stays {missing.max():.2e} of the way from the worst case, more than "
        f"{tolerance:.0e}"
    )
    assert (missing >= -1e-4).all(), (
        f"passes the worst case by {-missing.min():.2e}: it left the ball or the box"
    )


def check_feasible(attack_fn: AttackFn, oracle: LinearOracle) -> None:
    """`x_adv` is in ball and box; `success` and `size` are those of `x_adv`."""
    result = _run(attack_fn, oracle)
    inside = is_feasible(oracle.threat, oracle.x, result.x_adv)
    assert bool(inside.all()), (
        f"rows {np.flatnonzero(~np.asarray(inside))} left the set"
    )
    wins = jnp.argmax(oracle.logits_fn(result.x_adv), axis=-1) != oracle.y
    assert bool((wins == result.success).all()), "success is not that of x_adv"
    size = jax.vmap(oracle.threat.norm.size)(result.x_adv - oracle.x)
    assert np.allclose(size, result.size, atol=1e-4), "size is not that of x_adv"


def check_independent(attack_fn: AttackFn, oracle: LinearOracle) -> None:
    """A row's result does not depend on order or company, given its `index`."""

    count = len(oracle.y)
    rows = np.asarray(_run(attack_fn, oracle).x_adv)
    order = np.random.default_rng(1).permutation(count)
    permuted = oracle._replace(x=oracle.x[order], y=oracle.y[order])
    moved = np.asarray(_run(attack_fn, permuted, index=order).x_adv)
    assert (moved == rows[order]).all(), "another order of the rows gives other results"
    # The first row among strangers: same shapes, so the same program and the same bits.
    strangers = oracle.x.at[1:].set(0.5), oracle.y.at[1:].set(1 - oracle.y[1:])
    company = oracle._replace(x=strangers[0], y=strangers[1])
    index = np.arange(count) * 7
    alone = np.asarray(_run(attack_fn, company, index=index).x_adv)
    assert (alone[0] == rows[0]).all(), "a row's result depends on the other rows"


def check_bad_models(attack_fn: AttackFn, norm: str = "Linf") -> None:
    """Zero gradients, saturation, NaN and infinite logits never give a bad point."""
    oracle = linear_oracle(norm, box_active=True)
    for number, name in enumerate(BAD_MODELS):
        bad = jax.tree_util.Partial(_bad_model, jnp.int32(number), oracle.logits_fn)
        result = _run(attack_fn, oracle._replace(logits_fn=bad))
        assert bool(jnp.isfinite(result.x_adv).all()), f"{name}: x_adv is not finite"
        inside = is_feasible(oracle.threat, oracle.x, result.x_adv)
        assert bool(inside.all()), f"{name}: x_adv left the ball or the box"


BAD_MODELS = {
    "zero gradient": lambda z, x: jnp.round(jax.lax.stop_gradient(z)),
    "saturated": lambda z, x: 1e6 * z,
    "infinite": lambda z, x: jnp.where(z > 0.3, jnp.inf, z),
    "minus infinite": lambda z, x: jnp.where(z < -0.3, -jnp.inf, z),
    "NaN": lambda z, x: jnp.where(z > 0.3, jnp.nan, z),
    "NaN gradient": lambda z, x: z + 0 * jnp.sqrt(jnp.sum(x - x)),
    "constant": lambda z, x: jnp.zeros_like(z),
}


def _bad_model(number: Array, logits_fn: Callable[..., Array], x: Array) -> Array:
    # Chosen by data: one compiled program serves all of them.
    return jax.lax.switch(number, list(BAD_MODELS.values()), logits_fn(x), x)
