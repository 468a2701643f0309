"""`attack`: one attack on N examples, batch by batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.attacks.base import AttackFn, Result
from robustjax.attacks.pgd import pgd
from robustjax.evaluation import checks as inputs
from robustjax.evaluation.judge import pad
from robustjax.evaluation.prepare import batches, of_rows, prepare_model
from robustjax.losses import cross_entropy
from robustjax.parallel import fetch, put_shared, put_split
from robustjax.problems import untargeted
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key, LossFn

# jit knows a function by its identity: made once, so that it is compiled once.
PGD = pgd(40)


def attack(
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    threat: ThreatModel,
    attack_fn: AttackFn = PGD,
    *,
    loss: LossFn = cross_entropy,
    key: Key | None = None,
    batch_size: int = 256,
    index: Any = None,
    mesh: Any = None,
) -> Result:
    """Attack N examples: the shortest way from a model to adversarial examples.

    Args:
      logits_fn: `f(x)` or `f(x, key)`, inputs `[B, ...]` to logits `[B, K]`. Best a
        `jax.tree_util.Partial` over its weights, as `robustjax.models.logits_fn`
        returns: then another checkpoint does not compile again.
      x: `[N, ...]` inputs in the box of `threat`, for images [0, 1].
      y: `[N]` integer labels.
      threat: `linf(8 / 255)`, `l2(0.5)`, `l1(12.0)`, `l0(20)`, ...; its epsilon may be
        an array `[N]`.
      attack_fn: the attack, PGD-40 by default. Make it once: a new `pgd()` compiles
        anew.
      loss: `(logits, y) -> [B]`, what the attack raises.
      key: `jax.random.key(0)` by default.
      batch_size: examples at once; changes speed and memory, not the result (but for
        the rounding of sums, and for random models: they draw by position).
      index: `[N]` integers, which example of its data set each row is. Give it when you
        attack a subset or another order: the same example then draws the same noise.
      mesh: `parallel.data_mesh(...)`: split the rows over devices, `batch_size` rows on
        each.

    Returns:
      `Result` for all N rows: `x_adv`, `success` (the prediction differs from `y`),
      `size`, `score`.

    Raises:
      TypeError, ValueError: for bad inputs; see `robustjax.evaluation.checks`.

    >>> import jax.numpy as jnp, robustjax as rj
    >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    >>> rj.attack(logits_fn, x, y, rj.linf(0.1)).success.tolist()
    [True, False]
    """
    x, y, index = inputs.check_inputs(x, y, threat, index, batch_size)
    key = inputs.check_key(key)
    inputs.check_attack_fn(attack_fn)
    f, _ = prepare_model(logits_fn, x, y, batch_size)
    f, key = put_shared((f, key), mesh)
    results = []
    for rows, count, padded in batches(len(x), batch_size, mesh):
        here = of_rows(threat, rows)
        if np.ndim(here.epsilon):
            epsilon = put_split(pad(here.epsilon, padded), mesh)
            here = dataclasses.replace(here, epsilon=epsilon)
        arrays = put_split([pad(array[rows], padded) for array in (x, y, index)], mesh)
        result = _attack_batch(attack_fn, loss, f, *arrays, here, key)
        results.append(jax.tree.map(lambda a, n=count: a[:n], fetch(result)))
    return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)), *results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attack_batch(attack_fn, loss, f, x, y, index, threat, key):
    return attack_fn(key, untargeted(f, x, y, threat, loss, index=index))
