"""FGSM, PGD, MI-FGSM and Adam ascent: `attack_step` with four optax directions.

Step sizes are fractions of epsilon, so one number serves every norm: PGD with
`step_size=0.25` moves by `0.25 * epsilon`. An absolute step `alpha` is
`alpha / epsilon`.
"""

import warnings

import optax

from robustjax.attacks.base import AttackFn, Keep, restarts, run, worst
from robustjax.attacks.gradient import (
    first_scale,
    gradient_ascent,
    normalize_l1,
    sparse_steepest,
    steepest,
)


def fgsm(step_size: float = 1.0, random_start: bool = False) -> AttackFn:
    """Fast gradient sign method: one step of steepest ascent.

    `x_adv = project(x + step_size * epsilon * steepest(grad))`; the sign under Linf.
    The better of the first point and the last is returned.
    Reference: Goodfellow et al., arXiv 1412.6572. With `random_start=True` and
    `step_size=1.25` it is RS-FGSM of Wong et al., arXiv 2001.03994.
    Differs from the authors' code: any norm, and the box is part of the projection.

    Args:
      step_size: fraction of epsilon.
      random_start: begin uniformly in the ball instead of at `x`.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> fgsm()(jax.random.key(0), problem).x_adv
    Array([[0.4, 0.6]], dtype=float32)
    """
    _check_steps(1, step_size)
    kernel = gradient_ascent(
        lambda norm: optax.chain(steepest(norm), optax.scale(step_size)), random_start
    )
    return run(kernel, 1)


def pgd(
    num_steps: int = 40,
    step_size: float | None = None,
    *,
    num_restarts: int = 1,
    random_start: bool = True,
    density: float = 0.005,
    keep: Keep = worst,
) -> AttackFn:
    """Projected gradient descent: `num_steps` of steepest ascent, each one projected.

    `delta <- project(x, delta + step_size * epsilon * steepest(grad))`, from a uniform
    random point of the ball. Under L1 the step moves the top `density` fraction of
    coordinates; under L0 all, of which the projection keeps the best
    (`sparse_steepest`): there use PGD, the other attacks move one coordinate.
    Reference: Madry et al., arXiv 1706.06083; for L1, Tramer and Boneh, arXiv
    1904.13000.
    Differs from the authors' code: the best iterate is kept (`keep=worst`), so a
    success is never lost; `keep=last` is theirs. The projection is the nearest point
    of ball and box together.

    Args:
      num_steps: gradient evaluations for each restart.
      step_size: fraction of epsilon; None means `2.5 / num_steps`, at most 1, with
        which any point of the ball is reached and some steps are left.
      num_restarts: random restarts, the worst is kept.
      random_start: begin in the ball instead of at `x`.
      density: fraction of coordinates that an L1 step moves, at least one. On a
        CIFAR-10 net (ERAN's convSmall, L1 5, 100 images) 0.005 reached AutoAttack's
        accuracy, 0.40; 0.01 left 0.44 and 0.05 left 0.51.
      keep: `worst`, `last` or `smallest`.

    Raises:
      ValueError: for fewer than one step or restart, or a step size of 0 or less.
      UserWarning: the steps together reach less than half of epsilon.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.l2(0.1))
    >>> pgd(10)(jax.random.key(0), problem).x_adv
    Array([[0.427..., 0.568...]], dtype=float32)
    """
    size = default_step_size(num_steps) if step_size is None else step_size
    _check_steps(num_steps, size)
    kernel = gradient_ascent(
        lambda norm: optax.chain(sparse_steepest(norm, density), optax.scale(size)),
        random_start,
    )
    return restarts(run(kernel, num_steps, keep), num_restarts)


def momentum(
    num_steps: int = 10,
    step_size: float | None = None,
    *,
    decay: float = 1.0,
    num_restarts: int = 1,
    random_start: bool = False,
    keep: Keep = worst,
) -> AttackFn:
    """MI-FGSM: momentum over L1-normalized gradients makes attacks transfer.

    `g <- decay * g + grad / ||grad||_1`, then a step along `steepest(g)`.
    Reference: Dong et al., Boosting Adversarial Attacks with Momentum, arXiv
    1710.06081.
    Differs from the authors' code: the gradient is divided by the sum of its entries'
    magnitudes, as in the paper, not by their mean (under a sign step and a fixed decay
    the two move alike); any norm.

    Args:
      num_steps: gradient evaluations.
      step_size: fraction of epsilon; None means `1 / num_steps`, as in the paper.
      decay: of the accumulated gradient; 0 gives I-FGSM.
      num_restarts: random restarts; only of use with `random_start`.
      random_start: begin in the ball instead of at `x`.
      keep: `worst`, `last` or `smallest`.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> momentum(10)(jax.random.key(0), problem).success.tolist()
    [True]
    """
    size = 1.0 / max(num_steps, 1) if step_size is None else step_size
    _check_steps(num_steps, size)
    kernel = gradient_ascent(
        lambda norm: optax.chain(
            normalize_l1(), optax.trace(decay), steepest(norm), optax.scale(size)
        ),
        random_start,
    )
    return restarts(run(kernel, num_steps, keep), num_restarts)


def adam(
    num_steps: int = 40,
    learning_rate: float | optax.Schedule = 0.25,
    *,
    num_restarts: int = 1,
    random_start: bool = True,
    keep: Keep = worst,
) -> AttackFn:
    """Projected Adam ascent, as Gowal et al. attack in training and evaluation.

    `delta <- project(x, delta + learning_rate * epsilon * adam(grad))`.
    Reference: Gowal et al., arXiv 2010.03593.
    Differs from the authors' code: the learning rate is a fraction of epsilon (their
    0.1, at epsilon 8/255, is 3.19 here); gradients are divided by the largest entry of
    the example's first one, so that tiny and huge gradients move alike; any norm.

    Args:
      num_steps: gradient evaluations.
      learning_rate: fraction of epsilon, or an optax schedule of it.
      num_restarts: random restarts.
      random_start: begin in the ball instead of at `x`.
      keep: `worst`, `last` or `smallest`.

    >>> import jax, jax.numpy as jnp, robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> adam(20)(jax.random.key(0), problem).success.tolist()
    [True]
    """
    _check_steps(num_steps, 1.0 if callable(learning_rate) else learning_rate)
    kernel = gradient_ascent(
        # scale_by_learning_rate with its sign flipped: attacks ascend.
        lambda norm: optax.chain(
            first_scale(),
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        ),
        random_start,
    )
    return restarts(run(kernel, num_steps, keep), num_restarts)


def default_step_size(num_steps: int) -> float:
    """`2.5 / num_steps`, at most 1: the fraction of epsilon that PGD moves per step.

    >>> default_step_size(40), default_step_size(1)
    (0.0625, 1.0)
    """
    return min(1.0, 2.5 / max(num_steps, 1))


def _check_steps(num_steps: int, step_size: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: an attack needs at least one step.")
    if isinstance(step_size, str):
        raise TypeError(
            f"step_size={step_size!r}: give a number, a fraction of epsilon (2/255 of "
            "8/255 is 0.25)."
        )
    if not step_size > 0:
        raise ValueError(
            f"step_size={step_size}: must be above 0; it is a fraction of epsilon."
        )
    reach = num_steps * step_size
    if reach < 0.5:  # half as far is tried on purpose (experiments/duel.py)
        warnings.warn(
            f"step_size={step_size:.4g} is a fraction of epsilon: {num_steps} steps "
            f"reach {reach:.2g} epsilon, short of the edge of the ball: the attack "
            "is weak. 2/255 of 8/255 is 0.25; None is 2.5 / num_steps.",
            UserWarning,
            stacklevel=3,
        )
