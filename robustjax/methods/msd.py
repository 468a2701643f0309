"""MSD: each step of one attack takes the best of several norms' steepest moves."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from robustjax import threats as geometry
from robustjax.attacks.base import AttackFn, Result, select
from robustjax.gradients import score_and_grad
from robustjax.methods.base import BnMode, Method, from_stages, label_loss
from robustjax.methods.minimax import minimax_stages
from robustjax.models.base import Model
from robustjax.problems import Problem
from robustjax.threats import ThreatModel, l1, l2, linf
from robustjax.types import Array, Key, LossFn


def steepest_of_all(
    threats: Sequence[ThreatModel],
    step_sizes: Sequence[float],
    num_steps: int = 50,
    density: float = 0.004,
) -> AttackFn:
    """From x: one gradient, a projected move for each threat, the worst of these.

    `delta_i = project_i(x, delta + s_i epsilon_i steepest_i(grad))`,
    `delta <- the delta_i of highest score`, example by example. The move of highest
    score is kept. Each step costs one gradient and a forward pass for each threat.

    Args:
      threats: the union's members; the problem's own threat is not used.
      step_sizes: one for each, fractions of its epsilon.
      num_steps: how many steps.
      density: fraction of coordinates that an L1 move touches.
    """

    def candidate(
        i: int, key: Key, problem: Problem, delta: Array, grad: Array
    ) -> Result:
        threat, x = threats[i], problem.x
        slope = geometry.free_gradient(threat, x + delta, grad)
        move = jax.vmap(lambda g: threat.norm.sparse_steepest(g, density))(slope)
        delta = delta + geometry.scale(threat, step_sizes[i] * move)
        x_adv = geometry.apply(threat, x, geometry.project(threat, x, delta))
        score, logits = problem.score(x_adv, key)
        score = jnp.where(jnp.isnan(score), -jnp.inf, score)
        size = geometry.size(problem.threat, x_adv - x)
        return Result(x_adv, problem.success(logits), size, score)

    def attack_fn(key: Key, problem: Problem) -> Result:
        def body(carry: tuple[Array, Result], t: Array):
            x_adv, best = carry
            step_key = jax.random.fold_in(key, t)
            _, _, grad = score_and_grad(problem, x_adv, step_key)
            inputs = (step_key, problem, x_adv - problem.x, grad)
            worst = candidate(0, *inputs)
            for i in range(1, len(threats)):
                new = candidate(i, *inputs)
                worst = select(new.score > worst.score, new, worst)
            best = select(worst.score > best.score, worst, best)
            return (worst.x_adv, best), None

        x, rows = problem.x, problem.x.shape[:1]
        low = jnp.full(rows, -jnp.inf, x.dtype)
        nothing = Result(x, jnp.zeros(rows, bool), jnp.zeros(rows, x.dtype), low)
        (_, best), _ = jax.lax.scan(body, (x, nothing), jnp.arange(num_steps))
        return jax.lax.stop_gradient(best)

    return attack_fn


def msd(
    model: Model,
    threats: Sequence[ThreatModel],
    *,
    num_steps: int = 50,
    step_sizes: Sequence[float] | None = None,
    density: float = 0.004,
    bn_mode: BnMode = "batch",
    outer: LossFn = label_loss,
) -> Method:
    """Madry against the union of balls, attacked by `steepest_of_all`.

    Args:
      model, threats: what is trained, against which two or more threat models.
      num_steps, density: of the attack; 0.004 are 12 of CIFAR-10's coordinates.
      step_sizes: fractions of the epsilons; None: 0.1 each. The larger one is against
        the others, the more points end in its ball (docs/results.md).
      bn_mode: BatchNorm inside the attack.
      outer: what the weights lower, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss` and `accuracy`, both at the adversarial examples.

    Raises:
      ValueError: fewer than two threats, or not as many step sizes.

    Reference: Maini, Wong and Kolter 2020, Adversarial Robustness Against the Union of
    Multiple Perturbation Models, arXiv:1909.04068.

    Differs from the authors' code: the attack's passes use the batch's statistics as
    theirs do, but do not move the running ones; an L1 move touches a fixed fraction of
    the coordinates that have room, theirs a random 5 to 20 of those that are strictly
    inside the box (never a black pixel) and can move by a step without leaving it; ball
    and box are projected on together, and each image alone: on MNIST theirs, once one
    image of a batch is outside of the L1 ball, brings all of them to its surface.
    """
    sizes = [0.1] * len(threats) if step_sizes is None else list(step_sizes)
    if len(threats) < 2 or len(sizes) != len(threats):
        raise ValueError(
            f"{len(threats)} threats and {len(sizes)} step sizes; give two or more "
            "threats and as many step sizes."
        )
    attack_fn = steepest_of_all(threats, sizes, num_steps, density)
    stages = minimax_stages(model, attack_fn, threats[0], bn_mode=bn_mode, outer=outer)
    return from_stages(stages)


def cifar10(model: Model) -> Method:
    """The authors' CIFAR-10: Linf 0.03, L2 0.3, L1 12; steps of 0.003, 0.05 and 1."""
    sizes = (0.003 / 0.03, 0.05 / 0.3, 1 / 12)
    return msd(model, [linf(0.03), l2(0.3), l1(12.0)], step_sizes=sizes)


def mnist(model: Model) -> Method:
    """The defaults of the authors' MNIST code: Linf 0.3, L2 2, L1 10; 100 steps of
    0.01, 0.1 and 1. The command in its README has 0.8 under L1 instead of 1."""
    sizes = (0.01 / 0.3, 0.1 / 2.0, 1 / 10)
    return msd(
        *(model, [linf(0.3), l2(2.0), l1(10.0)]),
        num_steps=100,
        step_sizes=sizes,
        density=12.5 / 784,  # 12 pixels
    )
