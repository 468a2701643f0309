"""Training against several threat models: the average and the maximum of the losses."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from robustjax.attacks.base import AttackFn, Result, last, over_threats, select
from robustjax.attacks.pgd import pgd
from robustjax.losses import margin_loss
from robustjax.methods.base import (
    Aux,
    BnMode,
    Method,
    Stages,
    branches,
    from_stages,
    hard_labels,
    label_loss,
    total_loss,
)
from robustjax.methods.minimax import inner_attack, minimax_stages, raise_loss
from robustjax.metrics import mean_of
from robustjax.models.base import Model
from robustjax.problems import Problem
from robustjax.threats import ThreatModel, l1, l2, linf
from robustjax.types import Key, LossFn

How = Literal["vmap", "map", "loop"]


def average(
    model: Model,
    threats: Sequence[ThreatModel],
    attack_fn: AttackFn | Sequence[AttackFn] | None = None,
    *,
    how: How = "vmap",
    bn_mode: BnMode = "eval",
    inner: LossFn = label_loss,
    outer: LossFn = label_loss,
) -> Method:
    """`mean over threats and examples of outer(f(x_adv under the threat), y)`.

    Each threat has a pass of its own through the model, in the order given; each moves
    the running statistics.

    Args:
      model: what is trained.
      threats: two or more threat models.
      attack_fn: the inner maximization, one for all threats or one for each; None: ten
        steps of PGD.
      how: over the threats, see `over_threats`; one attack for each means "loop".
      bn_mode: BatchNorm inside the attacks.
      inner, outer: what attacks raise and the weights lower, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss` and `accuracy`: correct under every threat.

    Reference: Tramer and Boneh 2019, Adversarial Training and Robustness for Multiple
    Perturbations, arXiv:1904.13000.

    Differs from the authors' code: the loss is the cross-entropy in attacks too, where
    theirs raise the margin (`average_cifar10` does); each attack begins uniformly in
    its ball, theirs under L2 and L1 on the sphere, and on CIFAR-10 with the image cut
    to [0, 1] where its values go to 255; one pass for each threat, theirs one for all;
    the batch stays whole, theirs may shrink with the number of attacks. From Maini et
    al.'s, for CIFAR-10: there each norm makes an update of its own, and the attacks use
    the batch's statistics (`bn_mode="batch"`) and move the running ones with every
    pass.
    """
    many = every_threat(attack_fn, threats, how)
    raised = raise_loss(inner)
    attack = inner_attack(model, many, threats[0], raised, bn_mode=bn_mode)

    def loss(params, extra, carry, batch, x_adv, step, key):
        inputs = {f"accuracy_{i}": x for i, x in enumerate(x_adv)}
        logits, extra = branches(model, params, extra, inputs, list(inputs), key)
        each = jnp.stack([outer(z, batch.y) for z in logits.values()])
        total, metrics = total_loss(each.mean(0), batch, logits)
        labels = hard_labels(batch.y)
        right = [jnp.argmax(z, -1) == labels for z in logits.values()]
        metrics["accuracy"] = mean_of(jnp.stack(right).all(0), batch.mask)
        return total, Aux(extra, carry, metrics)

    return from_stages(Stages(attack, loss))


def maximum(
    model: Model,
    threats: Sequence[ThreatModel],
    attack_fn: AttackFn | Sequence[AttackFn] | None = None,
    *,
    how: How = "vmap",
    bn_mode: BnMode = "eval",
    inner: LossFn = label_loss,
    outer: LossFn = label_loss,
) -> Method:
    """`mean outer(f(x_adv), y)`, x_adv the worst over the threats, example by example.

    The worst has the highest `inner` at the end of its attack, in the attack's
    BatchNorm mode. Arguments, reference and differences: see `average`; whichever loss
    attacks raise, the authors take the point of the highest cross-entropy.

    Returns:
      A `Method` with metrics `loss` and `accuracy` at the worst examples.
    """
    many = every_threat(attack_fn, threats, how)

    def worst(key: Key, problem: Problem) -> Result:
        found = many(key, problem)
        best = jax.tree.map(lambda v: v[0], found)
        for i in range(1, len(threats)):
            new = jax.tree.map(lambda v, i=i: v[i], found)
            best = select(new.score > best.score, new, best)
        return best

    losses = {"inner": inner, "outer": outer}
    stages = minimax_stages(model, worst, threats[0], bn_mode=bn_mode, **losses)
    return from_stages(stages)


def every_threat(
    attack_fn: AttackFn | Sequence[AttackFn] | None,
    threats: Sequence[ThreatModel],
    how: How = "vmap",
) -> AttackFn:
    """One attack on one problem under every threat: results with a leading axis `[N]`.

    Raises:
      ValueError: fewer than two threats, or attacks that are not as many as threats.
    """
    if len(threats) < 2:
        raise ValueError(f"{len(threats)} threat given; give two or more.")
    if attack_fn is None:
        attack_fn = pgd(10, keep=last)
    if callable(attack_fn):
        return over_threats(attack_fn, threats, how)
    if len(attack_fn) != len(threats):
        raise ValueError(f"{len(attack_fn)} attacks for {len(threats)} threats.")
    each = [
        over_threats(a, [t], "loop") for a, t in zip(attack_fn, threats, strict=True)
    ]

    def attacked(key: Key, problem: Problem) -> Result:
        found = [one(key, problem) for one in each]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)

    return attacked


def cifar10_threats() -> list[ThreatModel]:
    """Linf 8/255, L2 0.5 and L1 12: Croce and Hein's, arXiv:2105.12508."""
    return [linf("8/255"), l2(0.5), l1(12.0)]


def average_cifar10(model: Model) -> Method:
    """Against the three norms of Tramer and Boneh's `config_cifar10.json`, together.

    Linf 8/255 (10 steps of a quarter of it), L2 80/255 (40 of a sixteenth), L1 2000/255
    (100 of 2 on a hundredth of the coordinates), each raising the margin. That file
    lists the attacks and trains on the first; which ones are joined is left to its
    user. Their spatial attack is left out.
    """
    return average(model, *_of_tramer(), inner=margin_loss)


def maximum_cifar10(model: Model) -> Method:
    """`average_cifar10`, on the worst of the three points."""
    return maximum(model, *_of_tramer(), inner=margin_loss)


def _of_tramer() -> tuple[list[ThreatModel], list[AttackFn]]:
    threats = [linf("8/255"), l2("80/255"), l1(2000 / 255)]
    plain = [pgd(10, keep=last), pgd(40, keep=last)]
    sparse = pgd(100, 2 / (2000 / 255), density=0.01, keep=last)
    return threats, [*plain, sparse]
