"""Semi-supervised and generated data: a second stream, mixed into every batch."""

import math

import jax
import jax.numpy as jnp

from robustjax.attacks.base import last
from robustjax.attacks.pgd import pgd
from robustjax.methods.base import Method, Stages, smoothed
from robustjax.methods.trades import deepmind, trades
from robustjax.models.base import Model
from robustjax.threats import linf
from robustjax.types import Array, Batch


def with_stream(
    method: Method,
    name: str = "generated",
    *,
    smoothing: float = 0.0,
    num_classes: int | None = None,
) -> Method:
    """The method on one batch of the batch's rows and its stream's rows together.

    `B` rows of the batch and `G` of `batch.streams[name]` go through attack and loss as
    `B + G` rows of equal weight, so BatchNorm sees the mixture. The fraction is that of
    the stream's rows: `split_batch`. Where a model has labeled the stream (Carmon et
    al.), its labels are that model's predictions.

    Args:
      method: any; what it carries between updates has `B + G` rows.
      name: of the stream.
      smoothing: of the stream's labels: `(1 - s) onehot(y) + s / K`.
      num_classes: K; needed for smoothing. Where one side's labels are soft `[B, K]`,
        K is theirs, and the other's become one-hot.

    Returns:
      A `Method`; its metrics count the rows of both.

    Raises:
      ValueError: smoothing without num_classes, or outside [0, 1); and in the first
        step, where the batch has no such stream.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; give a number from 0 to below 1.")
    if smoothing and num_classes is None:
        raise ValueError(f"smoothing is {smoothing}; it needs num_classes.")

    def mixed(batch: Batch) -> Batch:
        streams = dict(batch.streams or {})
        if name not in streams:
            known = ", ".join(streams) or "none"
            raise ValueError(f"the batch has no stream {name!r}; it has {known}.")
        other = streams.pop(name)
        y, y_other = batch.y, other.y
        if smoothing or y.ndim != y_other.ndim:
            soft = y if y.ndim == 2 else y_other  # without num_classes one is
            classes = num_classes or soft.shape[-1]
            y, y_other = _probabilities(y, classes), _probabilities(y_other, classes)
            y_other = (1 - smoothing) * y_other + smoothing / classes
        mask = None
        if batch.mask is not None or other.mask is not None:
            mask = side_by_side(_mask(batch), _mask(other))
        return Batch(
            side_by_side(batch.x, other.x),
            side_by_side(y, y_other),
            # Below 0: an example of the stream shares its noise with none of the batch.
            side_by_side(_index(batch), ~_index(other)),
            mask,
            streams or None,
        )

    def grads(params, extra, carry, batch, step, key):
        return method.grads(params, extra, carry, mixed(batch), step, key)

    stages = None
    if method.stages is not None:
        attack, loss = method.stages
        stages = Stages(
            lambda p, e, c, batch, *rest: attack(p, e, c, mixed(batch), *rest),
            lambda p, e, c, batch, *rest: loss(p, e, c, mixed(batch), *rest),
        )
    return Method(
        lambda params, batch: method.init(params, mixed(batch)),
        grads,
        method.repeats,
        stages,
    )


def side_by_side(a: Array, b: Array) -> Array:
    """`[B, ...]` and `[G, ...]` as `[B + G, ...]`, in turns of B/g and G/g rows.

    With g the greatest common divisor: where rows are split over devices whose number
    divides g, every row stays on its device.

    >>> side_by_side(jnp.array([0, 1]), jnp.array([5, 6, 7, 8])).tolist()
    [0, 5, 6, 1, 7, 8]
    """
    turns, rest = math.gcd(len(a), len(b)), a.shape[1:]
    both = (a.reshape(turns, -1, *rest), b.reshape(turns, -1, *rest))
    return jnp.concatenate(both, axis=1).reshape(-1, *rest)


def split_batch(batch_size: int, fraction: float) -> tuple[int, int]:
    """How many rows of `batch_size` are the batch's own, and how many the stream's.

    >>> split_batch(1024, 0.7)
    (307, 717)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; give a number between 0 and 1.")
    stream = round(batch_size * fraction)
    if not 0 < stream < batch_size:
        raise ValueError(f"batch_size {batch_size} cannot be split by {fraction}.")
    return batch_size - stream, stream


def _probabilities(y: Array, classes: int) -> Array:
    return y if y.ndim == 2 else jax.nn.one_hot(y, classes)


def _index(batch: Batch) -> Array:
    return (
        jnp.arange(len(batch.x), dtype=jnp.int32)
        if batch.index is None
        else batch.index
    )


def _mask(batch: Batch) -> Array:
    return jnp.ones(len(batch.x), bool) if batch.mask is None else batch.mask


def carmon(model: Model) -> Method:
    """Carmon et al. 2019, arXiv:1905.13736: TRADES, half of a batch pseudo-labeled.

    Their TRADES passes the attacked images first, then the natural ones, once.
    """
    moved_by = ("adversarial", "natural")
    return with_stream(trades(model, linf(0.031), moved_by=moved_by))


def rebuffi(model: Model) -> Method:
    """Rebuffi et al. 2021, arXiv:2103.01946: 0.7 of each batch, smoothed by 0.1."""
    return with_stream(deepmind(model), smoothing=0.1, num_classes=10)


def wang(model: Model) -> Method:
    """Wang et al. 2023, arXiv:2302.04638: 0.7 of each batch, TRADES with beta 5.

    10 steps of 2/255 at epsilon 8/255; all labels smoothed by 0.1.
    """
    method = trades(
        model,
        linf("8/255"),
        pgd(10, 2 / 8, keep=last),
        beta=5.0,
        bn_mode="batch",
        moved_by=("natural", "adversarial"),
        start_noise=None,
        outer=smoothed(0.1),
    )
    return with_stream(method)
