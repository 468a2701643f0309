"""What a training method is: a value that turns a batch into gradients.

A method is a pair of pure functions, so a new one is a file that returns a `Method`
and a wrapper (weight perturbation, a second stream) is a function from `Method` to
`Method`. The one train step is `robustjax.training.step.make_train_step`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from robustjax.losses import cross_entropy, soft_cross_entropy
from robustjax.metrics import Mean, mean_of, value
from robustjax.models.base import Model
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


class Stages(NamedTuple):
    """A method's two halves: what it makes of a batch, and the loss on that.

    attack: `(params, extra, carry, batch, step, key) -> examples`, any pytree; no
            gradient flows through it.
    loss:   `(params, extra, carry, batch, examples, step, key) -> (scalar, Aux)`.

    Who wraps a method can take the loss at other weights without attacking again.
    """

    attack: Callable[..., PyTree]
    loss: Callable[..., tuple[Array, Aux]]


class Method(NamedTuple):
    """A training method.

    init:    `(params, batch) -> carry`; the batch tells shapes only.
    grads:   `(params, extra, carry, batch, step, key) -> (grads, Aux)`, pure.
    repeats: how many updates are made on every batch (Free-AT's m).
    stages:  the halves that `grads` consists of, or None where it has none.
    """

    init: Callable[[PyTree, Batch], PyTree]
    grads: Callable[..., tuple[PyTree, Aux]]
    repeats: int = 1
    stages: Stages | None = None


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


def from_stages(
    stages: Stages, init: Callable[[PyTree, Batch], PyTree] = no_carry
) -> Method:
    """The method that attacks, then follows the gradient of the loss on the result.

    The first half of the key goes to the attack, the second to the loss.

    Args:
      stages: attack and loss.
      init: `(params, batch) -> carry`.

    Returns:
      A `Method` that shows its stages.

    >>> loss = lambda p, extra, carry, b, seen, step, key: (p * seen, Aux(extra, 0, {}))
    >>> method = from_stages(Stages(lambda p, *rest: 3.0 * p, loss))
    >>> float(method.grads(2.0, {}, (), None, 0, jax.random.key(0))[0])
    6.0
    """
    return Method(init, jax.grad(joined(stages), has_aux=True), stages=stages)


def joined(stages: Stages) -> Loss:
    """Attack and loss as one loss; no gradient flows through the attack."""

    def loss(params, extra, carry, batch, step, key):
        attack_key, loss_key = jax.random.split(key)
        frozen = jax.lax.stop_gradient((params, extra, carry))
        examples = stages.attack(*frozen, batch, step, attack_key)
        examples = jax.lax.stop_gradient(examples)
        return stages.loss(params, extra, carry, batch, examples, step, loss_key)

    return loss


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
      The mean loss and the metrics `loss` and `accuracy`; see `total_loss`.
    """
    return total_loss(outer(logits, batch.y), batch, {"accuracy": logits})


def total_loss(
    values: Array, batch: Batch, logits: Mapping[str, Array]
) -> tuple[Array, dict[str, Mean]]:
    """The mean of losses `[B]`, and an accuracy for each pass through the model.

    Args:
      values: `[B]` losses, one per example.
      batch: for labels and mask; masked rows never count.
      logits: the metric's name -> `[B, K]`, of every pass that the losses came from.

    Returns:
      The mean loss and the metrics: `loss`, and for each name the fraction whose
      prediction is the (soft labels: most probable) label. Logits that are NaN or
      `+inf` make the loss NaN: an attack must bear a broken model, training must stop.
    """
    labels = hard_labels(batch.y)
    metrics = {}
    for name, z in logits.items():
        values = jnp.where(broken(z), jnp.nan, values)
        metrics[name] = mean_of(jnp.argmax(z, -1) == labels, batch.mask)
    loss = mean_of(values, batch.mask)
    return value(loss), {"loss": loss, **metrics}


def broken(logits: Array) -> Array:
    """`[B]` bool: a logit is NaN or `+inf`."""
    return (jnp.isnan(logits) | (logits == jnp.inf)).any(-1)


def branches(
    model: Model,
    params: PyTree,
    extra: PyTree,
    inputs: Mapping[str, Array],
    moved_by: Sequence[str],
    key: Key,
) -> tuple[dict[str, Array], PyTree]:
    """Several passes in train mode, each with the statistics of its own batch.

    Args:
      model, params, extra: the model and its state.
      inputs: the branch's name -> `[B, ...]`.
      moved_by: which branches move the running statistics, in which order; a name may
        stand there twice, as authors' code has it (the compiler merges equal passes).
      key: split over the branches.

    Returns:
      The logits of every branch, and the statistics after `moved_by`.
    """
    keys = dict(zip(inputs, jax.random.split(key, len(inputs)), strict=True))
    logits = {}
    for name in [*moved_by, *(n for n in inputs if n not in moved_by)]:
        logits[name], moved = model.apply(
            params, extra, inputs[name], train=True, key=keys[name]
        )
        extra = moved if name in moved_by else extra
    return logits, extra


def check_branches(moved_by: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError where `moved_by` names a branch that there is not.

    >>> check_branches(("clean",), ("natural", "adversarial"))
    Traceback (most recent call last):
    ...
    ValueError: moved_by names 'clean'; the branches are natural, adversarial.
    """
    for name in moved_by:
        if name not in names:
            raise ValueError(
                f"moved_by names {name!r}; the branches are {', '.join(names)}."
            )


def hard_labels(y: Array) -> Array:
    """Labels `[B]` int32: `y` itself, or the most probable of `[B, K]`."""
    return y if y.ndim == 1 else jnp.argmax(y, -1).astype(jnp.int32)
