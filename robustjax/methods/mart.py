"""MART: misclassified examples weigh more."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from robustjax.attacks.base import AttackFn
from robustjax.losses import classes, cross_entropy, finite
from robustjax.methods.base import (
    Aux,
    BnMode,
    Method,
    Stages,
    branches,
    check_branches,
    from_stages,
    hard_labels,
    total_loss,
)
from robustjax.methods.minimax import inner_attack, raise_loss
from robustjax.methods.trades import cifar_attack
from robustjax.models.base import Model
from robustjax.threats import ThreatModel, linf
from robustjax.types import Array

TINY = 1e-12


def mart(
    model: Model,
    threat: ThreatModel,
    attack_fn: AttackFn | None = None,
    *,
    beta: float = 6.0,
    bn_mode: BnMode = "eval",
    moved_by: Sequence[str] = ("natural", "adversarial"),
    start_noise: float | None = 1e-3,
) -> Method:
    """`mean BCE(x_adv, y) + beta KL(p(x) || p(x_adv)) (1 - p_y(x))`.

    `BCE = -log p_y(x_adv) - log(1.0001 - max_{k != y} p_k(x_adv))`; x_adv raises the
    cross-entropy. The gradient flows through everything but the choice of k.

    Args:
      model, threat: what is trained, against what.
      attack_fn: the inner maximization; None: TRADES' `cifar_attack()`.
      beta: weight of the divergence.
      bn_mode: BatchNorm inside the attack.
      moved_by: which train-mode passes move the running statistics, in which order.
      start_noise: the attack begins at `x + start_noise * N(0, 1)`; None: at its own
        start.

    Returns:
      A `Method` with metrics `loss`, `accuracy` (at x_adv) and `clean_accuracy`.
      Soft labels count as their most probable class.

    Reference: Wang et al. 2020, Improving Adversarial Robustness Requires Revisiting
    Misclassified Examples, ICLR 2020.

    Differs from the authors' code: the noisy start is put inside the box before its
    first gradient.
    """
    check_branches(moved_by, ("natural", "adversarial"))
    attack = inner_attack(
        model,
        cifar_attack() if attack_fn is None else attack_fn,
        threat,
        raise_loss(),
        bn_mode=bn_mode,
        start_noise=start_noise,
    )

    def loss(params, extra, carry, batch, x_adv, step, key):
        inputs = {"natural": batch.x, "adversarial": x_adv}
        logits, extra = branches(model, params, extra, inputs, moved_by, key)
        natural, adversarial = logits["natural"], logits["adversarial"]
        y = hard_labels(batch.y)
        values = boosted_cross_entropy(adversarial, y)
        p = jax.nn.softmax(finite(natural))
        q = jax.nn.softmax(finite(adversarial))
        # As in torch's KLDivLoss: 0 log 0 = 0, and the guard stands in one logarithm.
        divergence = jnp.sum(_xlogx(p) - p * jnp.log(q + TINY), axis=-1)
        true = jnp.take_along_axis(p, y[:, None], axis=-1)[:, 0]
        values = values + beta * divergence * (1.0000001 - true)
        passes = {"accuracy": adversarial, "clean_accuracy": natural}
        total, metrics = total_loss(values, batch, passes)
        return total, Aux(extra, carry, metrics)

    return from_stages(Stages(attack, loss))


def boosted_cross_entropy(logits: Array, y: Array) -> Array:
    """`-log p_y - log(1.0001 - max_{k != y} p_k)`, `[B]`.

    >>> round(float(boosted_cross_entropy(jnp.zeros((1, 2)), jnp.array([0]))[0]), 3)
    1.386
    """
    p = jax.nn.softmax(finite(logits))
    wrong = jnp.max(jnp.where(y[:, None] == classes(logits), -1.0, p), axis=-1)
    return cross_entropy(logits, y) - jnp.log(1.0001 - wrong + TINY)


def _xlogx(p: Array) -> Array:
    return p * jnp.log(jnp.where(p > 0, p, 1.0))


def resnet18(model: Model) -> Method:
    """The authors' ResNet-18 on CIFAR-10: epsilon 0.031, beta 5."""
    return mart(model, linf(0.031), beta=5.0)


def wide_resnet(model: Model) -> Method:
    """The authors' WideResNet-34-10 on CIFAR-10: epsilon 0.031, beta 6."""
    return mart(model, linf(0.031), beta=6.0)
