"""GradAlign: gradients at x and near x shall point the same way."""

import jax
import jax.numpy as jnp

from robustjax import threats
from robustjax.attacks.pgd import fgsm
from robustjax.gradients import score_and_grad
from robustjax.methods.base import (
    Aux,
    BnMode,
    Method,
    Stages,
    from_stages,
    label_loss,
    total_loss,
)
from robustjax.methods.minimax import check_inner, inner_problem, raise_loss
from robustjax.metrics import mean_of, value
from robustjax.models.base import Model
from robustjax.problems import example_keys
from robustjax.threats import ThreatModel, linf
from robustjax.types import Array, LossFn

# The authors' weights on CIFAR-10 by epsilon of 255 (sh/ in their repository).
STRENGTHS = {
    1: 0.027,
    2: 0.036,
    3: 0.047,
    4: 0.063,
    5: 0.084,
    6: 0.112,
    7: 0.15,
    8: 0.2,
    9: 0.267,
    10: 0.356,
    11: 0.474,
    12: 0.632,
    13: 0.843,
    14: 1.124,
    15: 1.5,
    16: 2.0,
}
TINY = 1e-30  # below, a gradient is 0: its direction is not differentiated


def gradalign(
    model: Model,
    threat: ThreatModel,
    *,
    strength: float = 0.2,
    step_size: float = 1.25,
    through_clean: bool = False,
    bn_mode: BnMode = "batch",
    outer: LossFn = label_loss,
) -> Method:
    """`mean outer(f(x_adv), y) + strength (1 - mean cos(g(x), g(x + eta)))`.

    `g = grad_x outer`, `eta` uniform in the ball (and not in the box), `x_adv` one step
    of `step_size` epsilon from x along g(x), projected. Examples with a gradient of
    zero (no entry above 1e-30) have no angle and do not count in the mean.

    Args:
      model, threat: what is trained, against what.
      strength: the authors' lambda; `STRENGTHS` by epsilon.
      step_size: of the attack, fraction of epsilon.
      through_clean: whether g(x) is differentiated too, as the paper's formula reads;
        False: it is a constant, as in the authors' code, and costs no pass of its own.
      bn_mode: BatchNorm in the passes that give g. In mode "batch", the authors', a net
        may learn to read the label off the step: PreActResNet-18 did, and in mode
        "eval" it did not (docs/results.md).
      outer: the loss, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss`, `accuracy` (at x_adv) and `alignment`, the cosine.

    Reference: Andriushchenko and Flammarion 2020, Understanding and Improving Fast
    Adversarial Training, arXiv:2007.02617.

    Differs from the authors' code: the passes that give g use the batch's statistics as
    theirs do, but do not move the running ones. A batch of zero gradients has no
    penalty; theirs is NaN.
    """
    check_inner(model, fgsm(), threat, bn_mode)
    problem_of = inner_problem(model, threat, raise_loss(outer), bn_mode)

    def attack(params, extra, carry, batch, step, key):
        problem = problem_of(params, extra, batch, key)
        _, _, slope = score_and_grad(problem, problem.x, key)
        move = threats.scale(threat, step_size * threats.steepest(threat, slope))
        delta = threats.project(threat, problem.x, move)
        return threats.apply(threat, problem.x, delta), slope

    def loss(params, extra, carry, batch, examples, step, key):
        x_adv, clean = examples
        key, slope_key, noise_key = jax.random.split(key, 3)
        logits, moved = model.apply(params, extra, x_adv, train=True, key=key)

        def slope(x: Array) -> Array:
            problem = problem_of(params, extra, batch._replace(x=x), slope_key)
            return jax.grad(lambda x: problem.score(x, slope_key)[0].sum())(problem.x)

        problem = problem_of(params, extra, batch, slope_key)
        keys = example_keys(noise_key, problem.index)
        near = slope(problem.x + threats.sample(threat, keys, problem.x))
        if through_clean:
            clean = slope(problem.x)
        cosines, angle = jax.vmap(cosine)(clean, near)
        counted = angle if batch.mask is None else angle & batch.mask
        alignment = mean_of(cosines, counted)
        penalty = strength * jnp.where(
            alignment.count > 0,
            1 - alignment.total / jnp.maximum(alignment.count, 1),
            0,
        )
        values = outer(logits, batch.y)
        _, metrics = total_loss(values + penalty, batch, {"accuracy": logits})
        metrics["alignment"] = alignment
        return value(metrics["loss"]), Aux(moved, carry, metrics)

    return from_stages(Stages(attack, loss))


def cosine(a: Array, b: Array) -> tuple[Array, Array]:
    """Cosine of two gradients of one example, and whether there is an angle.

    Each is divided by its largest entry first: the squares of a confident example's
    gradient are 0 in float32, and so would be the length that it is divided by.
    """

    def largest(g: Array) -> Array:
        return jax.lax.stop_gradient(jnp.max(jnp.abs(g)))

    angle = (largest(a) > TINY) & (largest(b) > TINY)

    def unit(g: Array) -> Array:
        g = jnp.where(angle, g, 1)  # 0 would differentiate to NaN
        g = g / largest(g)
        return g / jnp.sqrt(jnp.sum(jnp.square(g)))

    return jnp.sum(unit(a) * unit(b)), angle


def cifar10(model: Model, epsilon: int = 8) -> Method:
    """The authors' CIFAR-10 at `epsilon` of 255, 1 to 16."""
    if epsilon not in STRENGTHS:
        raise ValueError(f"epsilon is {epsilon}; the authors give {list(STRENGTHS)}.")
    return gradalign(model, linf(f"{epsilon}/255"), strength=STRENGTHS[epsilon])
