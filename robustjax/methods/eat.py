"""E-AT: one norm per batch, the one that hurts most the most often."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustjax.attacks.apgd import apgd_training
from robustjax.attacks.base import AttackFn, Result
from robustjax.methods.base import (
    Aux,
    BnMode,
    Method,
    Stages,
    batch_loss,
    from_stages,
    label_loss,
)
from robustjax.methods.minimax import check_inner, inner_problem, raise_loss
from robustjax.metrics import Mean, mean_of
from robustjax.models.base import Model
from robustjax.threats import ThreatModel, l1, linf
from robustjax.types import Array, LossFn


class Attacked(NamedTuple):
    """What the attack hands to the loss: points, which threat, who was broken."""

    x_adv: Array
    which: Array
    success: Array


def eat(
    model: Model,
    threats: Sequence[ThreatModel],
    attack_fn: AttackFn | None = None,
    *,
    bn_mode: BnMode = "eval",
    outer: LossFn = label_loss,
) -> Method:
    """Madry under one threat per batch, drawn with `p_i ~ 1 - robust accuracy_i`.

    The robust accuracies are those of all training batches so far; until every threat
    was drawn once all are equally likely. They are the carry: a `Mean` of `[N]`.

    Args:
      model, threats: what is trained, against which two or more threat models.
      attack_fn: the inner maximization; None: `apgd_training(10)`. Who is robust is
        what its `success` denies.
      bn_mode: BatchNorm inside the attack.
      outer: what the weights lower, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss` and `accuracy` at the adversarial examples, and
      `share_i`, how often threat i was drawn.

    Raises:
      ValueError: fewer than two threats.

    Reference: Croce and Hein 2022, Adversarial Robustness against Multiple and Single
    lp-Threat Models via Quick Fine-Tuning of Robust Classifiers, arXiv:2105.12508.

    Differs from the authors' code: if no threat has broken anything yet, all are
    equally likely (there the draw raises).
    """
    if len(threats) < 2:
        raise ValueError(f"{len(threats)} threat given; give two or more.")
    if attack_fn is None:
        attack_fn = apgd_training(10)
    for threat in threats:
        check_inner(model, attack_fn, threat, bn_mode)
    problem_of = inner_problem(model, threats[0], raise_loss(), bn_mode)

    def init(params, batch):
        return Mean(jnp.zeros(len(threats)), jnp.zeros(len(threats)))

    def attack(params, extra, carry, batch, step, key):
        draw_key, attack_key = jax.random.split(key)
        problem = problem_of(params, extra, batch, attack_key)
        accuracy = carry.total / jnp.maximum(carry.count, 1)
        weight = jnp.where((carry.count > 0).all(), 1 - accuracy, 1.0)
        weight = jnp.where(weight.sum() > 0, weight, 1.0)
        which = jax.random.categorical(draw_key, jnp.log(weight))

        def under(threat: ThreatModel) -> Result:
            return attack_fn(attack_key, problem._replace(threat=threat))

        # Each threat has its own program: APGD's rule under L1 is another one.
        found = jax.lax.switch(which, [lambda t=t: under(t) for t in threats])
        return Attacked(found.x_adv, which, found.success)

    def loss(params, extra, carry, batch, examples, step, key):
        logits, extra = model.apply(params, extra, examples.x_adv, train=True, key=key)
        total, metrics = batch_loss(logits, batch, outer)
        drawn = jnp.arange(len(threats)) == examples.which
        right = mean_of(~examples.success, batch.mask)
        carry = Mean(
            carry.total + drawn * right.total, carry.count + drawn * right.count
        )
        for i in range(len(threats)):
            metrics[f"share_{i}"] = mean_of(drawn[i][None])
        return total, Aux(extra, carry, metrics)

    return from_stages(Stages(attack, loss), init)


def cifar10(model: Model) -> Method:
    """The authors' CIFAR-10: Linf 8/255 and L1 12 (L2 0.5 then comes for free)."""
    return eat(model, [linf("8/255"), l1(12.0)])
