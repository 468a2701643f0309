"""HAT: TRADES, and beyond the adversarial point the answer of a helper."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from robustjax.attacks.base import AttackFn, last
from robustjax.attacks.pgd import pgd
from robustjax.losses import cross_entropy, kl
from robustjax.methods.base import (
    Aux,
    BnMode,
    Method,
    Stages,
    branches,
    check_branches,
    from_stages,
    label_loss,
    total_loss,
)
from robustjax.methods.minimax import inner_attack
from robustjax.methods.trades import cifar_attack, raise_divergence
from robustjax.models.base import Model
from robustjax.problems import with_key
from robustjax.threats import ThreatModel, linf
from robustjax.types import Batch, LogitsFn, LossFn, PyTree

BRANCHES = ("natural", "adversarial", "helped")


def hat(
    model: Model,
    threat: ThreatModel,
    helper: LogitsFn,
    attack_fn: AttackFn | None = None,
    *,
    beta: float = 2.5,
    gamma: float = 0.5,
    reach: float = 2.0,
    bn_mode: BnMode = "eval",
    moved_by: Sequence[str] = BRANCHES,
    start_noise: float | None = 1e-3,
    outer: LossFn = label_loss,
) -> Method:
    """`mean outer(f(x), y) + beta KL(p(x) || p(x_adv)) + gamma CE(f(x_far), y_helper)`.

    `x_far = x + reach (x_adv - x)`, which may leave the box; `y_helper` is what the
    helper predicts at x_adv. x_adv raises the divergence, as in TRADES.

    Args:
      model, threat: what is trained, against what.
      helper: a net trained without attacks, `logits_fn(model, params, extra)`: its
        weights are the method's carry, so they go through jit as data.
      attack_fn: the inner maximization; None: TRADES' `cifar_attack()`.
      beta, gamma: weights of divergence and helper.
      reach: how far beyond, the authors' h.
      bn_mode: BatchNorm inside the attack.
      moved_by: which train-mode passes move the running statistics, in which order.
      start_noise: the attack begins at `x + start_noise * N(0, 1)`; None: at its own
        start.
      outer: the loss of the clean pass, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss`, `accuracy` (at x_adv) and `clean_accuracy`.

    Reference: Rade and Moosavi-Dezfooli 2022, Reducing Excessive Margin to Achieve a
    Better Accuracy vs. Robustness Trade-off, ICLR 2022.

    Differs from the authors' code: the noisy start is put inside the box before its
    first gradient.
    """
    check_branches(moved_by, BRANCHES)
    find = inner_attack(
        model,
        cifar_attack() if attack_fn is None else attack_fn,
        threat,
        raise_divergence(),
        bn_mode=bn_mode,
        start_noise=start_noise,
    )
    bound = isinstance(helper, jax.tree_util.Partial)
    leaves, structure = jax.tree.flatten(helper) if bound else ([], None)

    def init(params: PyTree, batch: Batch) -> PyTree:
        return tuple(leaves)

    def attack(params, extra, carry, batch, step, key):
        x_adv = find(params, extra, carry, batch, step, key)
        ask = jax.tree.unflatten(structure, carry) if bound else helper
        answer = with_key(ask)(x_adv, jax.random.fold_in(key, 3))
        return x_adv, jnp.argmax(answer, -1).astype(jnp.int32)

    def loss(params, extra, carry, batch, examples, step, key):
        x_adv, answer = examples
        far = batch.x + reach * (x_adv - batch.x)
        inputs = {"natural": batch.x, "adversarial": x_adv, "helped": far}
        logits, extra = branches(model, params, extra, inputs, moved_by, key)
        natural, adversarial = logits["natural"], logits["adversarial"]
        values = outer(natural, batch.y) + beta * kl(adversarial, natural)
        values += gamma * cross_entropy(logits["helped"], answer)
        passes = {"accuracy": adversarial, "clean_accuracy": natural}
        total, metrics = total_loss(values, batch, passes)
        return total, Aux(extra, carry, metrics)

    return from_stages(Stages(attack, loss), init)


def cifar10(model: Model, helper: LogitsFn) -> Method:
    """The authors' CIFAR-10: epsilon 8/255, 10 steps of 2/255, h 2, beta 2.5."""
    attack_fn = pgd(10, 2 / 8, random_start=False, keep=last)
    return hat(model, linf("8/255"), helper, attack_fn)
