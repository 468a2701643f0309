"""The binarization test: can this attack find what is certain to be there?

On the features of a model a new linear readout is trained, one for each example, that
calls almost all of its ball clean and one planted point adversarial. An attack that
does not find such points proves little when it finds none on the model itself.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import threats
from robustjax.attacks.base import AttackFn
from robustjax.evaluation.checks import Flag
from robustjax.losses import cross_entropy
from robustjax.norms import L0, Linf
from robustjax.problems import example_keys, predictions, untargeted, with_key
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key, LogitsFn, LossFn

ENOUGH = 0.95  # the authors' bound for an attack that works
INNER = 0.95  # inner points lie in a ball smaller by this factor
RIDGE = 1e-4


class Binarization(NamedTuple):
    """What the test found.

    success_rate: of the problems that were tested, the fraction that the attack solved;
                  NaN where none was.
    random_rate:  of all separable problems, the fraction that random search solved.
                  Those are too easy and are not tested.
    tested:       `[N]` bool: a planted point exists, and random search misses.
    solved:       `[N]` bool.
    """

    success_rate: float
    random_rate: float
    tested: np.ndarray
    solved: np.ndarray


def binarization_test(
    features_fn: Callable[..., Array],
    x: Any,
    threat: ThreatModel,
    attack_fn: AttackFn,
    key: Key,
    *,
    loss: LossFn = cross_entropy,
    index: Any = None,
    num_inner: int = 999,
    num_random: int = 200,
    batch_size: int = 64,
) -> Binarization:
    """How often an attack finds a planted adversarial point.

    For each example: `num_inner` points of a ball of 0.95 epsilon, the example and one
    point on the surface of the epsilon ball (Linf, L0: in a corner), all in the box.
    With features h, mean mu and covariance S of the inner ones, the readout
    `s(x) = w . h(x) - t`, `w = (S + ridge)^-1 (h_planted - mu)`, has its threshold t in
    the middle between the planted point and the highest inner one. The attack must
    raise s above 0 in ball and box: its points are judged, whatever its `success` says.
    Where the inner points reach the planted one, there is no problem to test; where
    random surface points solve it, it is too easy.

    Source: Zimmermann et al., Increasing Confidence in Adversarial Robustness
    Evaluations, arXiv 2206.13991; repository google-research/active-adversarial-tests.
    Differs from the authors' code: a discriminant in closed form instead of logistic
    regression, so thousands of readouts take seconds; easy problems are left out, where
    the authors report the rate of random search beside.

    Args:
      features_fn: `f(x)` or `f(x, key)` to features `[B, ...]`, or the logits.
      x: `[N, ...]` clean inputs in the box.
      threat: the threat model.
      attack_fn: an attack as you use it on the model; it sees two logits, label 0.
      key: of the points and of the attack.
      loss: what the attack raises.
      index: `[N]` integers, or None for `0..N-1`.
      num_inner: inner points; more make harder problems.
      num_random: surface points that random search tries.
      batch_size: examples attacked at once.

    >>> import robustjax as rj
    >>> x = np.random.default_rng(0).uniform(size=(8, 20)).astype(np.float32)
    >>> key, threat = jax.random.key(0), rj.linf(0.1)
    >>> binarization_test(jnp.tanh, x, threat, rj.pgd(20), key).success_rate
    1.0
    """
    x = np.asarray(x, np.float32)
    index = np.arange(len(x)) if index is None else np.asarray(index)
    f = features_fn
    f = f if isinstance(f, jax.tree_util.Partial) else jax.tree_util.Partial(f)
    key_points, key_attack = jax.random.split(key)
    epsilon = np.broadcast_to(np.asarray(threat.epsilon, np.float32), len(x))
    keys = example_keys(key_points, jnp.asarray(index, jnp.int32))
    fits = [
        _fit(num_inner, num_random, f, x[i], keys[i], _with(threat, epsilon[i]))
        for i in range(len(x))
    ]
    weights, threshold, separable, easy = (
        np.stack([np.asarray(fit[part]) for fit in fits]) for part in range(4)
    )
    solved = np.zeros(len(x), bool)
    size = min(batch_size, len(x))
    for begin in range(0, len(x), size):
        # The last batch looks back, so one shape serves all.
        first = min(begin, len(x) - size)
        rows = slice(first, first + size)
        few = f, x[rows], weights[rows], threshold[rows], _with(threat, epsilon[rows])
        which = index[rows].astype(np.int32)
        x_adv = _attack(attack_fn, loss, *few, which, key_attack)
        solved[rows] = np.asarray(_is_solved(*few, x_adv, key_attack))
    tested = separable & ~easy
    return Binarization(
        float(solved[tested].mean()) if tested.any() else float("nan"),
        float(easy[separable].mean()) if separable.any() else float("nan"),
        tested,
        solved & tested,
    )


def flag(found: Binarization) -> Flag | None:
    """The flag "attack fails the binarization test", below a rate of 0.95.

    >>> flag(Binarization(1.0, 0.0, np.array([True]), np.array([True])))
    """
    count = int(found.tested.sum())
    if not count or found.success_rate >= ENOUGH:
        return None
    return Flag(
        "attack fails the binarization test",
        f"the attack found {found.solved.sum()} of {count} planted adversarial points "
        f"({found.success_rate:.0%}; {ENOUGH:.0%} are expected): it would miss "
        "adversarial examples of this model too. Attack adaptively.",
    )


def _with(threat: ThreatModel, epsilon: Any) -> ThreatModel:
    return ThreatModel(threat.norm, epsilon, threat.lower, threat.upper)


def _features(f: Any, x: Array, key: Key | None) -> Array:
    h = with_key(f)(x, key)
    return h.reshape(x.shape[0], -1).astype(jnp.float32)


def _surface(threat: ThreatModel, key: Key, x: Array, count: int) -> Array:
    """`[count, ...]` points of the ball's surface (Linf: corners), inside the box."""
    keys = jax.random.split(key, count)
    many = jnp.broadcast_to(x[None], (count, *x.shape))
    draw = threats.sample(threat, keys, many)
    if isinstance(threat.norm, Linf):
        draw = jnp.sign(draw) * threat.epsilon
    elif not isinstance(threat.norm, L0):
        draw = threats.rescale(threat, draw)
    return threats.apply(threat, many, threats.project(threat, many, draw))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(num_inner, num_random, f, x, key, threat):
    """A readout for one example: weights, threshold, is it separable, is it easy."""
    key_inner, key_surface, key_model = jax.random.split(key, 3)
    smaller = _with(threat, INNER * threat.epsilon)
    many = jnp.broadcast_to(x[None], (num_inner, *x.shape))
    inside = threats.random_start(smaller, jax.random.split(key_inner, num_inner), many)
    inner = jnp.concatenate([x[None], threats.apply(threat, many, inside)])
    outer = _surface(threat, key_surface, x, 1 + num_random)
    h = _features(f, jnp.concatenate([inner, outer]), key_model)
    h, planted, tries = h[: num_inner + 1], h[num_inner + 1], h[num_inner + 2 :]
    mean = jnp.mean(h, 0)
    centered, gap = h - mean[None], planted - mean
    # (S + r I)^-1 gap by the smaller of S and the Gram matrix.
    count, size = centered.shape
    ridge = RIDGE * jnp.sum(centered**2) / count / min(count, size) + 1e-20
    if size <= count:
        covariance = centered.T @ centered / count + ridge * jnp.eye(size)
        weights = jnp.linalg.solve(covariance, gap)
    else:
        gram = centered @ centered.T / count + ridge * jnp.eye(count)
        inner_part = centered.T @ jnp.linalg.solve(gram, centered @ gap) / count
        weights = (gap - inner_part) / ridge
    weights = weights / jnp.maximum(jnp.linalg.norm(weights), 1e-30)
    scores, top = h @ weights, planted @ weights
    highest = jnp.max(scores)
    threshold = 0.5 * (top + highest)
    # The clean point's margin becomes 5, whatever the features' scale.
    stretch = 5 / jnp.maximum(threshold - scores[0], 1e-30)
    separable = (top > highest) & jnp.isfinite(top)
    separable &= top - highest > 1e-5 * jnp.abs(top)
    easy = jnp.any(tries @ weights > threshold)
    return stretch * weights, stretch * threshold, separable, easy


def _binarized(f: Any, weights: Array, threshold: Array) -> LogitsFn:
    """The readouts as a model of two classes; row by row another one."""

    def logits_fn(x: Array, key: Key | None = None) -> Array:
        score = jnp.sum(_features(f, x, key) * weights, -1) - threshold
        return jnp.stack([-0.5 * score, 0.5 * score], -1)

    return logits_fn


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attack(attack_fn, loss, f, x, weights, threshold, threat, index, key):
    logits_fn, y = _binarized(f, weights, threshold), jnp.zeros(x.shape[0], jnp.int32)
    problem = untargeted(logits_fn, x, y, threat, loss, index=index)
    return attack_fn(key, problem).x_adv


@jax.jit
def _is_solved(f, x, weights, threshold, threat, x_adv, key):
    """A fresh look at the points: what the attack itself says of them counts nothing.

    In a program of its own, as `judge`: it sees the very points that were returned.
    """
    wrong = predictions(_binarized(f, weights, threshold)(x_adv, key)) != 0
    return wrong & threats.is_feasible(threat, x, x_adv)
