"""Random noise: the baseline that every directed attack must beat."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustjax import threats
from robustjax.attacks.base import Attack, AttackFn, Info, evaluate_point, run
from robustjax.problems import Problem, example_keys
from robustjax.types import Array, Key

KINDS = ("uniform", "sign", "gaussian")


class NoiseState(NamedTuple):
    """The next sample, `[B, ...]`."""

    delta: Array


def noise(kind: str = "uniform", num_samples: int = 1) -> AttackFn:
    """The worst of `num_samples` random perturbations; no gradient is used.

    - `uniform`: uniform in the ball;
    - `sign`: random signs, scaled to norm epsilon (a corner of the Linf ball);
    - `gaussian`: a Gaussian direction, scaled to norm epsilon.

    Each sample is then projected on ball and box. Under L0 epsilon random coordinates
    change, by up to the width of the box.

    Args:
      kind: `"uniform"`, `"sign"` or `"gaussian"`.
      num_samples: forward passes per example.

    Raises:
      ValueError: for another kind, or fewer than one sample.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> noise("sign", 20)(jax.random.key(0), problem).success.tolist()
    [True]
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: use one of {', '.join(KINDS)}.")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: needs at least one sample.")

    def draw(key: Key, problem: Problem) -> Array:
        threat, x = problem.threat, problem.x
        key_ball, key_normal = jax.random.split(key)
        keys = example_keys(key_ball, problem.index)
        if kind == "uniform":
            return threats.random_start(threat, keys, x)
        # The signs of a uniform point of the ball are random signs; under L0 they stand
        # in random places as well.
        direction = jnp.sign(threats.sample(threat, keys, x))
        if kind == "gaussian":
            normal = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))
            keys_normal = example_keys(key_normal, problem.index)
            direction = jnp.abs(direction) * normal(keys_normal)
        return threats.project(threat, x, threats.rescale(threat, direction))

    def init(key: Key, problem: Problem) -> NoiseState:
        return NoiseState(draw(key, problem))

    def step(key: Key, state: NoiseState, problem: Problem) -> tuple[NoiseState, Info]:
        key_score, key_draw = jax.random.split(key)
        info = evaluate_point(problem, state.delta, key_score)
        return NoiseState(draw(key_draw, problem)), info

    kernel = Attack(init, step)
    # The driver also evaluates the last move: n samples are n - 1 steps.
    return run(kernel, num_samples - 1)
