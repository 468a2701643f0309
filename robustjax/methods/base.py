"""What a training method is: a value that turns a batch into gradients.

A method is a pair of pure functions, so a new one is a file that returns a `Method`
and a wrapper (weight perturbation, gradient accumulation) is a function from `Method`
to `Method`. The one train step is `robustjax.training.step.make_train_step`.
"""

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from robustjax.attacks.base import AttackFn, check_attack_fn
from robustjax.losses import cross_entropy, soft_cross_entropy
from robustjax.metrics import Mean, mean_of, value
from robustjax.models.base import Model, logits_fn, require_model
from robustjax.problems import maximize, predictions
from robustjax.threats import ThreatModel, too_wide
from robustjax.types import Array, Batch, Key, LossFn, PyTree

BnMode = Literal["eval", "batch"]


class Aux(NamedTuple):
    """What a method hands back beside the gradients.

    extra:   the model's statistics after this update.
    carry:   what the method remembers from update to update (`()` for most).
    metrics: name -> `Mean`, merged on device and divided when logged.
    """

    extra: PyTree
    carry: PyTree
    metrics: dict[str, Mean]


Loss = Callable[[PyTree, PyTree, PyTree, Batch, Array, Key], tuple[Array, Aux]]
"""`(params, extra, carry, batch, step, key) -> (scalar, Aux)`"""


class Method(NamedTuple):
    """A training method.

    init:    `(params, batch) -> carry`; the batch tells shapes only.
    grads:   `(params, extra, carry, batch, step, key) -> (grads, Aux)`, pure.
    repeats: how many updates are made on every batch (Free-AT's m).
    """

    init: Callable[[PyTree, Batch], PyTree]
    grads: Callable[..., tuple[PyTree, Aux]]
    repeats: int = 1


def no_carry(params: PyTree, batch: Batch) -> tuple[()]:
    """The carry of a method that remembers nothing."""
    return ()


def from_loss(loss: Loss, init: Callable[[PyTree, Batch], PyTree] = no_carry) -> Method:
    """The method that follows the gradient of a loss.

    Args:
      loss: `(params, extra, carry, batch, step, key) -> (scalar, Aux)`.
      init: `(params, batch) -> carry`.

    Returns:
      A `Method`.

    >>> loss = lambda p, extra, carry, batch, step, key: (p**2, Aux(extra, carry, {}))
    >>> grads, _ = from_loss(loss).grads(jnp.array(3.0), {}, (), None, 0, None)
    >>> float(grads)
    6.0
    """
    return Method(init, jax.grad(loss, has_aux=True))


def label_loss(logits: Array, y: Array) -> Array:
    """Cross-entropy `[B]` with labels `[B]` int32 or `[B, K]` probabilities."""
    return cross_entropy(logits, y) if y.ndim == 1 else soft_cross_entropy(logits, y)


def smoothed(smoothing: float) -> LossFn:
    """Cross-entropy with smoothed labels: `q = (1 - s) * onehot(y) + s / K`.

    Args:
      smoothing: s, from 0 to below 1.

    Returns:
      `(logits [B, K], y) -> [B]`, where y is `[B]` int32 or `[B, K]` probabilities.

    >>> loss = smoothed(0.2)(jnp.array([[2.0, 0.0]]), jnp.array([0]))
    >>> round(float(loss[0]), 4)  # 0.9 * 0.1269 + 0.1 * 2.1269
    0.3269
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; give a number from 0 to below 1.")

    def loss(logits: Array, y: Array) -> Array:
        num_classes = logits.shape[-1]
        if y.ndim == 1:
            y = jax.nn.one_hot(y, num_classes, dtype=logits.dtype)
        return soft_cross_entropy(logits, (1 - smoothing) * y + smoothing / num_classes)

    return loss


def batch_loss(
    logits: Array, batch: Batch, outer: LossFn = label_loss
) -> tuple[Array, dict[str, Mean]]:
    """Loss and accuracy of a batch, where masked rows count in neither.

    Args:
      logits: `[B, K]`.
      batch: its `y` is `[B]` int32 or `[B, K]` probabilities, its `mask` is honored.
      outer: `(logits, y) -> [B]`.

    Returns:
      The mean loss and the metrics `loss` and `accuracy` (soft labels: the fraction
      whose prediction is the most probable label). NaN or infinite logits make the loss
      NaN: an attack must bear a broken model, training must stop.
    """
    values = outer(logits, batch.y)
    broken = (jnp.isnan(logits) | (logits == jnp.inf)).any(-1)
    values = jnp.where(broken, jnp.nan, values)
    loss = mean_of(values, batch.mask)
    correct = mean_of(jnp.argmax(logits, -1) == hard_labels(batch.y), batch.mask)
    return value(loss), {"loss": loss, "accuracy": correct}


def hard_labels(y: Array) -> Array:
    """Labels `[B]` int32: `y` itself, or the most probable of `[B, K]`."""
    return y if y.ndim == 1 else jnp.argmax(y, -1).astype(jnp.int32)


def minimax_loss(
    model: Model,
    attack_fn: AttackFn,
    threat: ThreatModel,
    *,
    bn_mode: BnMode = "eval",
    inner: LossFn = label_loss,
    outer: LossFn = label_loss,
) -> Loss:
    """The loss of adversarial training: attack the batch, then learn from the result.

    `mean outer(model(x_adv), y)`, `x_adv = attack_fn` maximizing `inner` in `threat`.
    No gradient flows through the attack, which sees frozen weights.

    Args:
      model: the model that is trained.
      attack_fn: `(key, problem) -> Result`. Build it with `keep=last`: then the
        evaluation of the final iterate is dead code and costs nothing.
      threat: norm, epsilon and box.
      bn_mode: how BatchNorm runs *inside the attack*: "eval" (running statistics) or
        "batch" (the batch's own). The attack never changes the running statistics;
        the one forward pass at `x_adv` does.
      inner: what the attack raises, `(logits, y) -> [B]`; y is the batch's.
      outer: what the weights lower, `(logits, y) -> [B]`: see `smoothed`.

    Returns:
      A loss for `from_loss`, with metrics `loss` and `accuracy`, both at `x_adv`.

    Raises:
      TypeError: no model, threat model or attack where one is due.
      ValueError: bn_mode is neither "eval" nor "batch".

    Reference: Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial
    Attacks, arXiv:1706.06083.
    """
    require_model(model)
    check_attack_fn(attack_fn)
    if not isinstance(threat, ThreatModel):
        raise TypeError(
            f'threat is {threat!r}, no ThreatModel: give one such as linf("8/255").'
        )
    if (message := too_wide(threat)) is not None:
        warnings.warn(message, UserWarning, stacklevel=3)
    if bn_mode not in ("eval", "batch"):
        raise ValueError(
            f'bn_mode is {bn_mode!r}; give "eval" (the attack sees the running '
            'statistics) or "batch" (it sees the statistics of the batch).'
        )

    def loss(params, extra, carry, batch, step, key):
        attack_key, train_key = jax.random.split(key)
        frozen = logits_fn(
            model, *jax.lax.stop_gradient((params, extra)), train=bn_mode == "batch"
        )
        labels = hard_labels(batch.y)
        problem = maximize(
            frozen,
            batch.x,
            threat,
            lambda logits: inner(logits, batch.y),
            lambda logits: predictions(logits) != labels,
            index=batch.index,
            y=labels,
        )
        x_adv = jax.lax.stop_gradient(attack_fn(attack_key, problem).x_adv)
        logits, extra = model.apply(params, extra, x_adv, train=True, key=train_key)
        total, metrics = batch_loss(logits, batch, outer)
        return total, Aux(extra, carry, metrics)

    return loss
