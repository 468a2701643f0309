"""Random noise: the baseline that every directed attack must beat."""

from typing import NamedTuple

import jax

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

    Each sample is then projected on ball and box; under L0, where scaling has no
    meaning, that alone keeps epsilon coordinates.

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
        keys = example_keys(key, problem.index)
        if kind == "uniform":
            return threats.random_start(threat, keys, x)
        if kind == "sign":
            raw = jax.vmap(lambda k: jax.random.rademacher(k, x.shape[1:], x.dtype))
        else:
            raw = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))
        return threats.project(threat, x, threats.rescale(threat, raw(keys)))

    def init(key: Key, problem: Problem) -> NoiseState:
        return NoiseState(draw(key, problem))

    def step(key: Key, state: NoiseState, problem: Problem) -> tuple[NoiseState, Info]:
        key_score, key_draw = jax.random.split(key)
        info = evaluate_point(problem, state.delta, key_score)
        return NoiseState(draw(key_draw, problem)), info

    kernel = Attack(init, step)
    # The driver also evaluates the last move: n samples are n - 1 steps.
    return run(kernel, num_samples - 1)
