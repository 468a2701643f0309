"""Input-gradient penalty: adversarial training to first order, without an attack."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from robustjax import threats
from robustjax.attacks.pgd import fgsm
from robustjax.methods.base import (
    Aux,
    BnMode,
    Method,
    from_loss,
    label_loss,
    total_loss,
)
from robustjax.methods.minimax import check_inner
from robustjax.metrics import mean_of
from robustjax.models.base import Model
from robustjax.norms import L0
from robustjax.threats import ThreatModel
from robustjax.types import Array, LossFn


def dual_norm(threat: ThreatModel, grad: Array) -> Array:
    """`||grad||_dual = max <grad, d>` over the unit ball, `[B]`, safe to differentiate.

    The maximizer d is held fixed, so the derivative is d itself (Danskin): a
    subgradient where the norm has a corner, and 0, not NaN, where `grad` is 0.

    Args:
      threat: whose norm's dual is meant: L1 for Linf, L2 for L2, Linf for L1.
      grad: `[B, ...]`.

    >>> from robustjax.threats import linf
    >>> dual_norm(linf(0.1), jnp.array([[3.0, -4.0], [0.0, 0.0]])).tolist()
    [7.0, 0.0]
    """
    steepest = jax.lax.stop_gradient(threats.steepest(threat, grad))
    return jax.vmap(lambda g, d: jnp.vdot(g.ravel(), d.ravel()))(grad, steepest)


def gradient_penalty(
    model: Model,
    threat: ThreatModel,
    *,
    weight: float = 1.0,
    difference: float | None = None,
    bn_mode: BnMode = "batch",
    outer: LossFn = label_loss,
) -> Method:
    """`mean outer(f(x), y) + weight epsilon ||grad_x outer(f(x), y)||_dual`.

    With weight 1 this is the adversarial loss up to O(epsilon^2), by Taylor; the box is
    left out of account. The finite-difference form replaces the penalty by
    `weight (outer(f(x + h d)) - outer(f(x))) / difference`, `h = difference epsilon`,
    d the steepest direction, held fixed: no second derivative, but curvature along d
    counts. Its end `difference=1, weight=1` is training on FGSM's examples, for a model
    without BatchNorm and where the box does not cut the step.

    Args:
      model: the model that is trained.
      threat: norm and epsilon; a number or `[B]`.
      weight: of the penalty.
      difference: None: the exact gradient, differentiated twice. A number: the
        fraction of epsilon over which the difference is taken; 0.1 is small enough to
        be near the exact one, and large enough for float32.
      bn_mode: the BatchNorm of the *penalty*. "batch": the statistics of the batch, as
        the learning pass has them; the gradient flows through them too. "eval": running
        statistics, so that an example's gradient is its own, and one more forward pass;
        on CIFAR-10 a ResNet then became flat with running statistics and learned with
        the batch's alone (docs/results.md). The learning pass always runs in train
        mode, and it alone moves the running statistics.
      outer: what the weights lower, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss`, `penalty` (part of it) and `accuracy` (at x).

    Raises:
      TypeError: no model or threat model where one is due.
      ValueError: an L0 threat (a count is no length), an infinite epsilon, a difference
        of 0 or less, a negative weight, or another bn_mode.

    Reference: Drucker and LeCun 1992, Improving generalization performance using double
    backpropagation; Ross and Doshi-Velez 2018, arXiv:1711.09404; the dual norm: Simon-
    Gabriel et al. 2019, arXiv:1802.01421; finite differences: Finlay and Oberman 2019,
    arXiv:1905.11468.

    Differs from the authors' code: the dual norm itself, as the threat model has it;
    Ross and Doshi-Velez, and Finlay and Oberman under L2, square it.
    """
    check_inner(model, fgsm(), threat, bn_mode)  # the penalty stands for that attack
    _check(threat, weight, difference)
    train = bn_mode == "batch"

    def loss(params, extra, carry, batch, step, key):
        def at(x):
            logits, moved = model.apply(params, extra, x, train=train, key=key)
            values = outer(logits, batch.y)
            return values.sum(), (values, logits, moved)

        slope, (here, logits, moved) = jax.grad(at, has_aux=True)(batch.x)
        if difference is None:
            penalty = weight * threat.epsilon * dual_norm(threat, slope)
        else:
            direction = jax.lax.stop_gradient(threats.steepest(threat, slope))
            _, (ahead, *_) = at(batch.x + threats.scale(threat, difference * direction))
            penalty = weight * (ahead - here) / difference
        if not train:
            logits, moved = model.apply(params, extra, batch.x, train=True, key=key)
            here = outer(logits, batch.y)
        total, metrics = total_loss(here + penalty, batch, {"accuracy": logits})
        metrics["penalty"] = mean_of(penalty, batch.mask)
        return total, Aux(moved, carry, metrics)

    return from_loss(loss)


def _check(threat: ThreatModel, weight: float, difference: float | None) -> None:
    if any(isinstance(n, L0) for n in getattr(threat.norm, "members", (threat.norm,))):
        raise ValueError(
            "threat is L0, whose epsilon counts coordinates; the penalty needs a "
            "length: give linf, l2 or l1."
        )
    known = not isinstance(threat.epsilon, Tracer)
    if known and not np.all(np.isfinite(threat.epsilon)):
        raise ValueError(
            f"epsilon is {threat.epsilon}; the penalty is a multiple of it: give a "
            "finite budget."
        )
    if not weight >= 0:
        raise ValueError(f"weight is {weight}; give 0 or more.")
    if difference is not None and not difference > 0:
        raise ValueError(
            f"difference is {difference}; give a fraction of epsilon above 0, such as "
            "0.1, or None for the exact gradient."
        )
