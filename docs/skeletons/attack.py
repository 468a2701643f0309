"""NAME: say in one line what this attack does that others do not."""

from typing import NamedTuple

import jax.numpy as jnp

from robustjax import threats
from robustjax.attacks.base import (
    Attack,
    AttackFn,
    Info,
    first_delta,
    inform,
    restarts,
    run,
)
from robustjax.gradients import score_and_grad
from robustjax.problems import Problem
from robustjax.types import Array, Key


class NAMEState(NamedTuple):
    """What the next step needs. The driver reads `delta`, the rest is yours.

    delta:    `[B, ...]` the point to evaluate next.
    previous: `[B, ...]` the gradient of the step before.
    """

    delta: Array
    previous: Array


def NAME(
    num_steps: int = 40, step_size: float = 0.1, num_restarts: int = 1
) -> AttackFn:
    """One line, then the update rule in math.

    `delta <- project(x, delta + step_size * epsilon * steepest(grad + previous / 2))`
    Reference: Authors, Title, arXiv NUMBER.
    Differs from the authors' code: say where, or "nothing".

    Args:
      num_steps: gradient evaluations.
      step_size: fraction of epsilon.
      num_restarts: random restarts, the worst is kept.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> from robustjax.attacks.NAME import NAME
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> NAME(20)(jax.random.key(0), problem).success.tolist()
    [True]
    """

    def init(key: Key, problem: Problem) -> NAMEState:
        delta = first_delta(problem, key, random_start=True)
        return NAMEState(delta, jnp.zeros_like(delta))

    def step(key: Key, state: NAMEState, problem: Problem) -> tuple[NAMEState, Info]:
        threat, x = problem.threat, problem.x
        x_adv = threats.apply(threat, x, state.delta)
        score, logits, grad = score_and_grad(problem, x_adv, key)
        info = inform(problem, state.delta, score, logits)
        # Your idea goes here. Everything is per row: no mean over the batch, no
        # `logits[arange(B), y]`, no sort, no `while_loop` on `any(...)`.
        move = threats.steepest(threat, grad + 0.5 * state.previous)
        delta = state.delta + threats.scale(threat, step_size * move)
        return NAMEState(threats.project(threat, x, delta), grad), info

    return restarts(run(Attack(init, step), num_steps), num_restarts)
