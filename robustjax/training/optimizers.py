"""Optimizers and learning-rate schedules as optax builds them, with published forms.

Everything here returns plain optax values: `sgd(one_cycle(0.2, 1000))` is a
`GradientTransformation`, and so is anything of your own.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from robustjax.types import PyTree

Schedule = optax.Schedule
Decay = Literal["all", "kernels"]


def constant(value: float, *, warmup_steps: int = 0) -> Schedule:
    """`value`, reached linearly from 0 in `warmup_steps`.

    >>> float(constant(0.1, warmup_steps=10)(5))
    0.05...
    """
    return _warmed(lambda step: jnp.full((), value), value, warmup_steps)


def cosine(
    peak: float, num_steps: int, *, warmup_steps: int = 0, final: float = 0.0
) -> Schedule:
    """`final + (peak - final) * (1 + cos(pi * t / T)) / 2` after a linear warm-up.

    Args:
      peak: the learning rate after the warm-up.
      num_steps: when `final` is reached, the warm-up included.
      warmup_steps: length of the rise from 0.
      final: the last learning rate.

    Reference: Loshchilov and Hutter 2017, arXiv:1608.03983.

    >>> [round(float(cosine(0.1, 100)(t)), 3) for t in (0, 50, 100)]
    [0.1, 0.05, 0.0]
    """
    length = _rest(num_steps, warmup_steps)

    def after(step):
        t = jnp.clip((step - warmup_steps) / length, 0, 1)
        return final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * t))

    return _warmed(after, peak, warmup_steps)


def one_cycle(
    peak: float, num_steps: int, *, warmup_steps: int | None = None, final: float = 0.0
) -> Schedule:
    """Linear from 0 to `peak`, then linear to `final`.

    Args:
      peak: the highest learning rate.
      num_steps: when `final` is reached.
      warmup_steps: when the peak is reached; None: `0.4 * num_steps`.
      final: the last learning rate.

    Reference: Smith and Topin 2018, arXiv:1708.07120; the linear form of Wong et al.
    2020, arXiv:2001.03994, which rises for two fifths of the training.

    >>> [round(float(one_cycle(0.2, 100)(t)), 3) for t in (0, 20, 40, 70, 100)]
    [0.0, 0.1, 0.2, 0.1, 0.0]
    """
    if warmup_steps is None:
        warmup_steps = round(0.4 * num_steps)
    length = _rest(num_steps, warmup_steps)

    def after(step):
        t = jnp.clip((step - warmup_steps) / length, 0, 1)
        return peak + (final - peak) * t

    return _warmed(after, peak, warmup_steps)


def cosine_cycle(
    peak: float,
    num_steps: int,
    *,
    warmup_steps: int,
    first: float = 1 / 25,
    final: float = 4e-6,
) -> Schedule:
    """Half a cosine up from `first * peak` to `peak`, another down to `final * peak`.

    `a + (b - a) * (1 - cos(pi * t / T)) / 2` from a to b in T steps.

    Args:
      peak: the highest learning rate.
      num_steps: when `final * peak` is reached.
      warmup_steps: when the peak is reached.
      first, final: fractions of the peak; PyTorch's OneCycleLR has these.

    Reference: Smith and Topin 2018, arXiv:1708.07120; in this form used by Rade and
    Moosavi-Dezfooli, ICLR 2022.

    >>> [round(float(cosine_cycle(1, 100, warmup_steps=40)(t)), 3) for t in (0, 40, 70)]
    [0.04, 1.0, 0.5]
    """
    length = _rest(num_steps, warmup_steps)

    def wave(start, stop, t):
        return start + (stop - start) * 0.5 * (1 - jnp.cos(jnp.pi * jnp.clip(t, 0, 1)))

    def schedule(step):
        step = jnp.asarray(step)
        up = wave(first * peak, peak, step / max(warmup_steps, 1))
        down = wave(peak, final * peak, (step - warmup_steps) / length)
        return jnp.where(step < warmup_steps, up, down)

    return schedule


def linear(values: Sequence[float], steps: Sequence[int]) -> Schedule:
    """Straight lines from one of `values` to the next, each reached at its step.

    Args:
      values: learning rates.
      steps: rising, one for each; before the first and after the last the rate stays.

    Raises:
      ValueError: not as many values as steps, or steps that do not rise.

    Reference: used so by Maini et al. 2020, arXiv:1909.04068.

    >>> [round(float(linear([0, 1, 0.5], [0, 10, 20])(t)), 3) for t in (5, 15, 30)]
    [0.5, 0.75, 0.5]
    """
    if len(values) != len(steps) or not len(values):
        raise ValueError(f"{len(values)} values for {len(steps)} steps; give as many.")
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"steps are {list(steps)}; give rising ones.")
    at, rates = jnp.asarray(steps, jnp.float32), jnp.asarray(values, jnp.float32)
    return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), at, rates)


def piecewise(
    value: float,
    boundaries: Sequence[int],
    *,
    factor: float = 0.1,
    warmup_steps: int = 0,
) -> Schedule:
    """`value`, multiplied by `factor` at every boundary.

    Args:
      value: the first learning rate.
      boundaries: steps, rising; from step b on the factor holds.
      factor: what each boundary multiplies by.
      warmup_steps: length of the linear rise from 0.

    Reference: the steps of Madry et al. 2018 (0.1; 40,000; 60,000), arXiv:1706.06083.

    >>> [round(float(piecewise(0.1, [40, 60])(t)), 4) for t in (39, 40, 60)]
    [0.1, 0.01, 0.001]
    """
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"boundaries are {list(boundaries)}; give rising steps.")
    at = jnp.asarray(list(boundaries), jnp.int32)

    def after(step):
        return value * factor ** jnp.sum(step >= at).astype(jnp.float32)

    return _warmed(after, value, warmup_steps)


def against(rate: Schedule, peak: float, high: float, low: float) -> Schedule:
    """Momentum that falls from `high` to `low` as the rate rises from 0 to `peak`.

    `high - (high - low) * rate(t) / peak`. With `one_cycle` it is the momentum of
    PyTorch's CyclicLR, whose defaults are 0.9 and 0.8.

    >>> momentum = against(one_cycle(0.2, 100, warmup_steps=50), 0.2, 0.9, 0.8)
    >>> [round(float(momentum(t)), 3) for t in (0, 25, 50, 75, 100)]
    [0.9, 0.85, 0.8, 0.85, 0.9]
    """
    return lambda step: high - (high - low) * rate(step) / peak


def sgd(
    learning_rate: float | Schedule,
    *,
    momentum: float | Schedule = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    decay: Decay = "all",
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay, as PyTorch's.

    `g <- g + weight_decay * w; m <- momentum * m + g; w <- w - lr * (g + momentum * m)`
    (without `nesterov`: `w <- w - lr * m`).

    Args:
      learning_rate: a number or a schedule.
      momentum: 0 to below 1, or a schedule: PyTorch's CyclicLR and OneCycleLR lower it
        while the rate rises (`against`).
      nesterov: look ahead.
      weight_decay: factor of the L2 penalty's gradient.
      decay: "all" weights, or "kernels" only: no norm scales and no biases.
      clip_norm: largest global norm of the gradient, before decay; None: no clipping.

    Returns:
      An optax transformation.
    """
    return _chain(
        clip_norm,
        _decayed(weight_decay, decay),
        _traced(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adam without weight decay.

    Reference: Kingma and Ba 2015, arXiv:1412.6980.
    """
    return _chain(
        clip_norm,
        optax.scale_by_adam(b1, b2),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 1e-2,
    decay: Decay = "kernels",
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay: `w <- w - lr * (adam + weight_decay * w)`.

    Args:
      learning_rate: a number or a schedule.
      b1: of the first moment.
      b2: of the second moment.
      weight_decay: multiplied by the learning rate.
      decay: "all" weights, or "kernels" only: no norm scales and no biases.
      clip_norm: largest global norm of the gradient; None: no clipping.

    Returns:
      An optax transformation.

    Reference: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    return _chain(
        clip_norm,
        optax.scale_by_adam(b1, b2),
        _decayed(weight_decay, decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def is_kernel(params: PyTree) -> PyTree:
    """True for every leaf of two or more axes: not for norm scales and biases.

    >>> is_kernel({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
    {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _decayed(weight_decay: float, decay: Decay) -> optax.GradientTransformation | None:
    if decay not in ("all", "kernels"):
        raise ValueError(
            f'decay is {decay!r}; give "all" or "kernels" (no norm scales, no biases).'
        )
    if weight_decay < 0:
        raise ValueError(f"weight_decay is {weight_decay}; give 0 or more.")
    if weight_decay == 0:
        return None
    return optax.add_decayed_weights(
        weight_decay, mask=is_kernel if decay == "kernels" else None
    )


def _traced(
    momentum: float | Schedule, nesterov: bool
) -> optax.GradientTransformation | None:
    if callable(momentum):
        inject = optax.inject_hyperparams(optax.trace, static_args=("nesterov",))
        scheduled = inject(decay=momentum, nesterov=nesterov)

        def update(updates, state, params=None):
            found = scheduled.update(updates, state, params)
            # The momentum is a float32 array here: low precision stays what it is.
            return jax.tree.map(
                lambda new, old: new.astype(old.dtype), found, (updates, state)
            )

        return optax.GradientTransformation(scheduled.init, update)
    return optax.trace(decay=momentum, nesterov=nesterov) if momentum else None


def _chain(
    clip_norm: float | None, *parts: optax.GradientTransformation | None
) -> optax.GradientTransformation:
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(f"clip_norm is {clip_norm}; give a positive number or None.")
    clip = [] if clip_norm is None else [_clipped(clip_norm)]
    return optax.chain(*clip, *(part for part in parts if part is not None))


def _clipped(clip_norm: float) -> optax.GradientTransformation:
    """`clip_by_global_norm`, but a norm that is NaN clips nothing: divided by it, every
    tensor would be NaN, and the first offender had no name."""
    clip = optax.clip_by_global_norm(clip_norm)

    def update(updates, state, params=None):
        clipped, state = clip.update(updates, state, params)
        broken = jnp.isnan(optax.tree.norm(updates))
        either = lambda a, b: jnp.where(broken, a, b)  # noqa: E731
        return jax.tree.map(either, updates, clipped), state

    return optax.GradientTransformation(clip.init, update)


def _rest(num_steps: int, warmup_steps: int) -> int:
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} of num_steps {num_steps}; "
            "give a number from 0 to below num_steps."
        )
    return num_steps - warmup_steps


def _warmed(after: Schedule, peak: float, warmup_steps: int) -> Schedule:
    if warmup_steps == 0:
        return lambda step: after(jnp.asarray(step))

    def schedule(step):
        step = jnp.asarray(step)
        return jnp.where(step < warmup_steps, peak * step / warmup_steps, after(step))

    return schedule
