"""Logit pairing: two inputs shall have the same logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from robustjax.attacks.base import AttackFn, last
from robustjax.attacks.pgd import pgd
from robustjax.losses import cross_entropy, finite
from robustjax.methods.base import (
    Aux,
    BnMode,
    Method,
    Stages,
    from_loss,
    from_stages,
    label_loss,
    smoothed,
    total_loss,
)
from robustjax.methods.madry import cifar_code
from robustjax.methods.minimax import Raise, inner_attack, raise_loss
from robustjax.metrics import Mean, mean_of, value
from robustjax.models.base import Model, require_model
from robustjax.problems import example_keys
from robustjax.threats import ThreatModel, linf
from robustjax.types import Array, Batch, Key, LogitsFn, LossFn


def adversarial_logit_pairing(
    model: Model,
    threat: ThreatModel,
    attack_fn: AttackFn | None = None,
    *,
    strength: float = 0.5,
    raised: Raise | None = None,
    bn_mode: BnMode = "eval",
    outer: LossFn = label_loss,
) -> Method:
    """`mean (l(f(x)) + l(f(x_adv))) / 2 + strength |f(x) - f(x_adv)|^2 / K`, l = outer.

    Clean and adversarial examples go through the model in one pass, so BatchNorm's
    statistics are those of both together. The gradient flows through both logits.

    Args:
      model, threat: what is trained, against what.
      attack_fn: the inner maximization; None: `cifar_code()`.
      strength: weight of the pairing.
      raised: what the attack raises; None: the cross-entropy. The authors' attack is
        targeted: `least_likely`.
      bn_mode: BatchNorm inside the attack.
      outer: the loss, `(logits, y) -> [B]`; `smoothed(0.1)` on ImageNet.

    Returns:
      A `Method` with metrics `loss`, `accuracy` (at x_adv) and `clean_accuracy`.

    Reference: Kannan, Kurakin and Goodfellow 2018, Adversarial Logit Pairing,
    arXiv:1803.06373. Engstrom, Ilyas and Athalye 2018, arXiv:1807.10272, break the
    authors' ImageNet model: evaluate with strong attacks.

    Differs from the authors' code: untargeted attacks by default; `imagenet64` has
    their settings.
    """
    attack = inner_attack(
        model,
        cifar_code() if attack_fn is None else attack_fn,
        threat,
        raise_loss() if raised is None else raised,
        bn_mode=bn_mode,
    )

    def loss(params, extra, carry, batch, x_adv, step, key):
        # Neighbors, not halves: every pair stays on its device.
        both = jnp.stack([batch.x, x_adv], 1).reshape(-1, *batch.x.shape[1:])
        logits, extra = model.apply(params, extra, both, train=True, key=key)
        logits = logits.reshape(-1, 2, logits.shape[-1])
        clean, adversarial = logits[:, 0], logits[:, 1]
        values = (outer(clean, batch.y) + outer(adversarial, batch.y)) / 2
        values += strength * _distance(clean, adversarial)
        passes = {"accuracy": adversarial, "clean_accuracy": clean}
        total, metrics = total_loss(values, batch, passes)
        return total, Aux(extra, carry, metrics)

    return from_stages(Stages(attack, loss))


def least_likely(frozen: LogitsFn, batch: Batch, key: Key) -> Callable[[Array], Array]:
    """Lower the loss of the class that is least likely at the clean example."""
    target = jnp.argmin(frozen(batch.x), axis=-1)
    return lambda logits: -cross_entropy(logits, target)


def imagenet64(model: Model) -> Method:
    """Kannan et al.'s settings for ImageNet at 64 x 64, those their code's page gives.

    Ten steps of 2/255 towards the least likely class from a random start, epsilon
    16/255, weight 0.5, labels smoothed by 0.1.
    """
    return adversarial_logit_pairing(
        model,
        linf("16/255"),
        pgd(10, 2 / 16, keep=last),
        raised=least_likely,
        outer=smoothed(0.1),
    )


def clean_logit_pairing(
    model: Model,
    *,
    strength: float = 0.5,
    noise: float = 0.5,
    outer: LossFn = label_loss,
) -> Method:
    """`mean outer(f(x), y) + strength mean over pairs of |f(x) - f(x')|^2 / K`.

    No attack: x is the batch plus `noise * N(0, 1)`, and neighboring rows are pairs
    (the order of a shuffled batch is random).

    Args:
      model: what is trained.
      strength: weight of the pairing.
      noise: standard deviation of the Gaussian noise, in input units.
      outer: the loss, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss` and `accuracy` on the noisy examples. A batch of an
      odd number of rows raises ValueError.

    Reference: Kannan et al. 2018, arXiv:1803.06373, section 5. Mosbach et al. 2018,
    arXiv:1810.12042, show that what it gains fools gradient attacks only.
    """
    require_model(model)

    def loss(params, extra, carry, batch, step, key):
        rows = batch.x.shape[0]
        if rows % 2:
            raise ValueError(f"the batch has {rows} rows; pairs need an even number.")
        key, noise_key = jax.random.split(key)
        index = jnp.arange(rows) if batch.index is None else batch.index
        draw = jax.vmap(lambda k, x: jax.random.normal(k, x.shape, x.dtype))
        x = batch.x + noise * draw(example_keys(noise_key, index), batch.x)
        logits, extra = model.apply(params, extra, x, train=True, key=key)
        _, metrics = total_loss(outer(logits, batch.y), batch, {"accuracy": logits})
        mask = None if batch.mask is None else batch.mask.reshape(-1, 2).all(-1)
        pairs = mean_of(_distance(logits[::2], logits[1::2]), mask)
        penalty = strength * jnp.where(pairs.count > 0, value(pairs), 0)
        mean = metrics["loss"]
        metrics["loss"] = Mean(mean.total + penalty * mean.count, mean.count)
        return value(metrics["loss"]), Aux(extra, carry, metrics)

    return from_loss(loss)


def _distance(a: Array, b: Array) -> Array:
    """Mean squared difference of logits, over the classes, `[B]`."""
    return jnp.mean(jnp.square(finite(a) - finite(b)), axis=-1)
