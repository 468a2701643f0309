"""What an attacker may do: a ball around each example, inside the input box."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.norms import L0, L1, L2, AnyOf, Linf, Norm
from robustjax.types import Array, Key

L0_UNIT = 100.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["norm", "epsilon", "lower", "upper"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """`{x + delta: norm.size(delta) <= epsilon, lower <= x + delta <= upper}`.

    A pytree: a new budget never retraces. Build it with `linf, l2, l1, l0` or
    `threat`, which check their arguments.

    Args:
      norm: the geometry, itself a pytree.
      epsilon: scalar or `[B]`, in input units (L0: a number of coordinates).
      lower, upper: the input box, scalars or arrays that broadcast to one example
        (a box per channel: `[C]` where channels are last, `[C, 1, 1]` for CHW).
    """

    norm: Norm
    epsilon: Any
    lower: Any = 0.0
    upper: Any = 1.0


NORMS = {"linf": Linf(), "l2": L2(), "l1": L1(), "l0": L0()}


def _known(name: str, value: Any) -> np.ndarray | None:
    """The value as float32 from a number, an array or "8/255"; None for a tracer."""
    if isinstance(value, str):
        top, _, bottom = value.partition("/")
        try:
            value = float(top) / (float(bottom) if bottom else 1.0)
        except (ValueError, ZeroDivisionError):
            raise ValueError(
                f'{name}={value!r} is not a number; write it like 0.03 or "8/255"'
            ) from None
    try:
        return np.asarray(value, np.float32)
    except jax.errors.TracerArrayConversionError:
        return None
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}={value!r} is not a number or an array of numbers"
        ) from None


def _build(norm: Norm, epsilon: Any, lower: Any, upper: Any) -> ThreatModel:
    budget = _known("epsilon", epsilon)
    low, high = _known("lower", lower), _known("upper", upper)
    if jnp.ndim(budget if budget is not None else epsilon) > 1:
        raise ValueError(
            f"epsilon has shape {np.shape(epsilon)}; give one number, or one per "
            "example as an array [B]"
        )
    if budget is not None and not np.all(budget >= 0):
        raise ValueError(
            f"epsilon={epsilon} is negative or NaN; a budget is a number >= 0 "
            "(0: no perturbation, inf: the box alone)"
        )
    if low is not None and high is not None and not np.all(low < high):
        raise ValueError(
            f"lower={lower} is not below upper={upper}; give the model's input box, "
            "for images in [0, 1]: lower=0.0, upper=1.0"
        )

    def leaf(known: np.ndarray | None, value: Any) -> Array:
        return jnp.asarray(value if known is None else known, jnp.float32)

    return ThreatModel(norm, leaf(budget, epsilon), leaf(low, lower), leaf(high, upper))


def linf(epsilon: Any, lower: Any = 0.0, upper: Any = 1.0) -> ThreatModel:
    """`max |delta| <= epsilon` inside the box.

    Args:
      epsilon: number, `[B]` array or text such as "8/255", in input units.
      lower, upper: the input box, scalars or arrays that broadcast to one example.

    Raises:
      ValueError: epsilon negative or NaN, or lower not below upper.

    >>> print(linf("8/255").epsilon)
    0.03137255
    """
    return _build(Linf(), epsilon, lower, upper)


def l2(epsilon: Any, lower: Any = 0.0, upper: Any = 1.0) -> ThreatModel:
    """`||delta||_2 <= epsilon` inside the box; arguments as for `linf`.

    >>> float(l2(0.5).epsilon)
    0.5
    """
    return _build(L2(), epsilon, lower, upper)


def l1(epsilon: Any, lower: Any = 0.0, upper: Any = 1.0) -> ThreatModel:
    """`sum |delta| <= epsilon` inside the box; arguments as for `linf`.

    >>> float(l1(12).epsilon)
    12.0
    """
    return _build(L1(), epsilon, lower, upper)


def l0(epsilon: Any, lower: Any = 0.0, upper: Any = 1.0) -> ThreatModel:
    """At most `floor(epsilon)` coordinates change; other arguments as for `linf`.

    A coordinate is one number of the input: a color pixel has three.

    >>> float(l0(20).epsilon)
    20.0
    """
    return _build(L0(), epsilon, lower, upper)


def threat(norm: str, epsilon: Any, lower: Any = 0.0, upper: Any = 1.0) -> ThreatModel:
    """The threat model with the norm of that name, in any case.

    Raises:
      ValueError: the norm is unknown, or the numbers make no threat model.

    >>> threat("L2", 0.5).norm
    L2()
    """
    if norm.lower() not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose Linf, L2, L1 or L0")
    return _build(NORMS[norm.lower()], epsilon, lower, upper)


STANDARD = {
    ("mnist", "linf"): 0.3,
    ("mnist", "l2"): 2.0,
    ("mnist", "l1"): 10.0,
    ("fashion_mnist", "linf"): 0.1,
    ("cifar10", "linf"): 8 / 255,
    ("cifar10", "l2"): 0.5,
    ("cifar10", "l1"): 12.0,
    ("imagenet", "linf"): 4 / 255,
    ("imagenet", "l2"): 3.0,
}


def standard_threat(dataset: str, norm: str) -> ThreatModel:
    """The budget that the literature uses for images in [0, 1].

    MNIST: Maini et al. (arXiv 1909.04068); CIFAR-10: RobustBench (arXiv
    2010.09670), L1: Croce & Hein (arXiv 2103.01208); ImageNet: RobustBench.

    Raises:
      ValueError: no budget is customary for this pair.

    >>> print(standard_threat("cifar10", "L2").epsilon)
    0.5
    """
    pair = (dataset.lower(), norm.lower())
    if pair not in STANDARD:
        known = ", ".join(f"{d} {n.capitalize()}" for d, n in STANDARD)
        raise ValueError(
            f"no standard budget for dataset={dataset!r}, norm={norm!r}; known: "
            f"{known}; or give your own: threat({norm!r}, epsilon)"
        )
    return threat(norm, STANDARD[pair])


def _float32(x: Array) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _box(threat: ThreatModel, x: Array) -> tuple[Array, Array]:
    """The box in the shape of one example; a box per channel is broadcast."""
    lower, upper = jnp.asarray(threat.lower), jnp.asarray(threat.upper)
    return jnp.broadcast_to(lower, x.shape), jnp.broadcast_to(upper, x.shape)


def _room(threat: ThreatModel, x: Array) -> tuple[Array, Array]:
    """How far one example may move down (<= 0) and up (>= 0)."""
    lower, upper = _box(threat, x)
    return jnp.minimum(lower - x, 0), jnp.maximum(upper - x, 0)


def _per_example(threat: ThreatModel, call: Any, *batched: Array) -> Array:
    """`call(epsilon, *rows)` for every row; epsilon is shared or one per row."""
    axis = 0 if jnp.ndim(threat.epsilon) else None
    return jax.vmap(call, in_axes=(axis,) + (0,) * len(batched))(
        threat.epsilon, *batched
    )


def project(threat: ThreatModel, x: Array, delta: Array) -> Array:
    """The nearest feasible perturbation: ball and box at once, exactly.

    `argmin_d ||d - delta||_2` with `size(d) <= epsilon, lower <= x + d <= upper`.

    The bounds on d are `lower - x` and `upper - x` in floating point, so `x + d` can
    pass the box by a rounding error; `apply` is what never leaves the box.

    Args:
      x: `[B, ...]` clean inputs inside the box.
      delta: `[B, ...]` perturbations.

    Returns:
      `[B, ...]`, float32.

    >>> print(project(l2(1.0), jnp.array([[0.5, 0.5]]), jnp.array([[3.0, 4.0]])))
    [[0.5 0.5]]
    """

    def one(epsilon, x, delta):
        return threat.norm.project_box(delta, epsilon, *_room(threat, x))

    return _per_example(threat, one, _float32(x), delta)


def project_sequential(threat: ThreatModel, x: Array, delta: Array) -> Array:
    """Onto the ball, then onto the box: feasible, but not the nearest point.

    Only for parity with reference code that does so (L2 of AutoAttack and Foolbox).

    >>> x, delta = jnp.array([[0.75, 0.5]]), jnp.array([[3.0, 4.0]])
    >>> print(project_sequential(l2(0.5), x, delta))
    [[0.25 0.4 ]]
    """

    def one(epsilon, x, delta):
        return jnp.clip(threat.norm.project(delta, epsilon), *_room(threat, x))

    return _per_example(threat, one, _float32(x), delta)


def apply(threat: ThreatModel, x: Array, delta: Array) -> Array:
    """`clip(x + delta, lower, upper)`: the input the model sees, exactly in the box.

    >>> print(apply(linf(0.5), jnp.array([[0.9]]), jnp.array([[0.5]])))
    [[1.]]
    """

    def one(x, delta):
        return jnp.clip(x + delta, *_box(threat, x))

    return jax.vmap(one)(_float32(x), delta)


def size(threat: ThreatModel, delta: Array) -> Array:
    """`[B]` sizes of the perturbations `[B, ...]` in the threat's norm."""
    return jax.vmap(threat.norm.size)(delta)


def steepest(threat: ThreatModel, grad: Array) -> Array:
    """`[B, ...]` directions of steepest ascent in the unit ball, row by row.

    >>> print(steepest(linf(0.1), jnp.array([[-3.0, 2.0]])))
    [[-1.  1.]]
    """
    return jax.vmap(threat.norm.steepest)(grad)


def free_gradient(threat: ThreatModel, x_adv: Array, grad: Array) -> Array:
    """The gradient without what points out of the box, `[B, ...]`.

    A coordinate on a face of the box cannot move outwards: a step that is spent there
    is lost. So under L1, whose steepest step is one coordinate, and under L2. Under L0
    the gradient stays whole: it ranks the coordinates that are worth keeping.

    >>> print(free_gradient(linf(0.1), jnp.array([[1.0, 0.5]]), jnp.ones((1, 2))))
    [[0. 1.]]
    """

    def one(x_adv, grad):
        lower, upper = _box(threat, x_adv)
        stuck = (x_adv >= upper) & (grad > 0) | (x_adv <= lower) & (grad < 0)
        return threat.norm.free(grad, stuck)

    return jax.vmap(one)(x_adv, grad)


def scale(threat: ThreatModel, update: Array) -> Array:
    """`epsilon * update`, `[B, ...]`: a move in units of epsilon as a perturbation.

    Under L0, whose epsilon is a count, the unit is 100 times the box's width: a usual
    fraction then moves a coordinate beyond its face, and the projection chooses the
    coordinates whose gradient times room is largest, whatever was chosen before.
    0 stays 0 whatever epsilon is: `0 * inf` would be NaN.

    >>> print(scale(linf(jnp.array([0.1, 0.2])), jnp.ones((2, 2))))
    [[0.1 0.1]
     [0.2 0.2]]
    """

    def one(epsilon, update):
        stride = threat.norm.stride(epsilon, L0_UNIT * _width(threat, update))
        return jnp.where(update == 0, 0, stride * update)

    return _per_example(threat, one, _float32(update))


def rescale(threat: ThreatModel, direction: Array) -> Array:
    """`[B, ...]` directions stretched to size epsilon, the surface of the ball.

    L0 counts coordinates, which stretching does not change: there the box's width is
    the unit.

    >>> print(rescale(l1(1.0), jnp.array([[3.0, 1.0]])))
    [[0.75 0.25]]
    """

    def one(epsilon, direction):
        size = threat.norm.size(direction)
        stretches = threat.norm.size(2 * direction) > 1.5 * size
        length = threat.norm.stride(epsilon, _width(threat, direction))
        return direction * (length / jnp.where(stretches, size, 1))

    return _per_example(threat, one, _float32(direction))


def random_start(threat: ThreatModel, keys: Key, x: Array) -> Array:
    """Uniform in the ball, then the nearest feasible point.

    An infinite budget samples the smallest ball around x that covers the box.

    Args:
      keys: `[B]` keys, one per example.
      x: `[B, ...]` clean inputs.

    Returns:
      delta `[B, ...]`, float32.
    """

    return project(threat, x, sample(threat, keys, x))


def sample(threat: ThreatModel, keys: Key, x: Array) -> Array:
    """Uniform in the ball, whatever the box: `random_start` before its projection.

    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> print((sample(l0(1), keys, jnp.zeros((2, 3))) != 0).sum(-1))
    [1 1]
    """

    def one(epsilon, key, x):
        low, high = _room(threat, x)
        reach = threat.norm.size(jnp.maximum(-low, high))
        budget = jnp.where(jnp.isinf(epsilon), reach, epsilon)
        draw = threat.norm.sample(key, budget, x.shape, x.dtype)
        # L0 draws values in [-1, 1]: stretched to the box. Elsewhere this is 1.
        return draw * threat.norm.stride(1.0, _width(threat, x))

    return _per_example(threat, one, keys, _float32(x))


def _width(threat: ThreatModel, x: Array) -> Array:
    """How wide the box is, in the shape of one example `x`."""
    lower, upper = _box(threat, x)
    return jnp.broadcast_to(jnp.asarray(upper - lower, x.dtype), x.shape)


def is_feasible(
    threat: ThreatModel, x: Array, x_adv: Array, tolerance: float = 1e-6
) -> Array:
    """`[B]` bool: inside the box exactly, inside the ball up to rounding.

    The ball allows `tolerance * max(1, epsilon)`, and beside it the rounding of
    `x_adv - x`, a unit in the last place of every coordinate: it matters for boxes such
    as [0, 255], and for L1 in many dimensions. L0 counts, so neither matters.
    A NaN anywhere in an example makes it infeasible.

    >>> x = jnp.array([[0.5, 0.5]])
    >>> is_feasible(linf(0.1), x, x + 0.05).tolist()
    [True]
    >>> is_feasible(linf(0.1), x, x + 0.2).tolist()
    [False]
    """

    def one(epsilon, x, x_adv):
        slack = tolerance * jnp.maximum(1, epsilon)
        largest = jnp.maximum(jnp.abs(x), jnp.abs(x_adv)) * jnp.finfo(x.dtype).eps
        rounding = threat.norm.size(largest)
        lengths = threat.norm.size(2 * largest) > 1.5 * rounding
        slack += jnp.where(lengths, rounding, 0)
        inside = threat.norm.size(x_adv - x) <= epsilon + slack
        lower, upper = _box(threat, x)
        in_box = jnp.all((x_adv >= lower) & (x_adv <= upper))
        return inside & in_box

    return _per_example(threat, one, _float32(x), x_adv)


def too_wide(threat: ThreatModel) -> str | None:
    """What to say of a Linf budget that is wider than the box; None: nothing.

    Such a budget permits everything, as `inf` does, which says so; `linf(8)` is nearly
    always meant as `linf("8/255")`.

    >>> print(too_wide(linf(8)))
    epsilon=8 under Linf is wider than the box [0, 1]: every input is permitted. ...
    """
    if not isinstance(threat.norm, Linf):
        return None
    known = [
        _known(name, getattr(threat, name)) for name in ("epsilon", "lower", "upper")
    ]
    epsilon, low, high = known
    if epsilon is None or low is None or high is None:
        return None  # inside a trace nothing is known
    low, high = low.min(), high.max()
    wide = np.isfinite(epsilon) & (epsilon > high - low)
    if not wide.any():
        return None
    shown = epsilon[wide].max()
    return (
        f"epsilon={shown:g} under Linf is wider than the box [{low:g}, {high:g}]: "
        "every input is permitted. Budgets are in input units: for "
        f'{shown:g} of 255 write "{shown:g}/255"; if all of the box is meant, give inf.'
    )


def stack(threats: Sequence[ThreatModel]) -> ThreatModel:
    """Several threat models as one, with a leading axis N on every leaf.

    The norm becomes an `AnyOf`; run it under `jax.vmap` or `jax.lax.map`.

    Raises:
      ValueError: nothing to stack, or leaves of different shapes.
      TypeError: a threat is itself stacked.

    >>> stacked = stack([linf(0.1), l2(0.5)])
    >>> delta = jnp.array([[0.3, 0.4]])
    >>> print(jax.vmap(size, (0, None))(stacked, delta).ravel())
    [0.4 0.5]
    """
    threats = list(threats)
    if not threats:
        raise ValueError("threats is empty; give at least one threat model")
    if any(isinstance(t.norm, AnyOf) for t in threats):
        raise TypeError("a stacked threat cannot be stacked again; unstack it first")
    members = tuple(dict.fromkeys(t.norm for t in threats))
    index = jnp.array([members.index(t.norm) for t in threats], jnp.int32)

    def leaves(name):
        values = [jnp.asarray(getattr(t, name), jnp.float32) for t in threats]
        shapes = {v.shape for v in values if v.ndim}
        if len(shapes) > 1:
            raise ValueError(
                f"{name} has the shapes {sorted(shapes)}; give scalars or equal shapes"
            )
        shape = next(iter(shapes), ())
        return jnp.stack([jnp.broadcast_to(v, shape) for v in values])

    return ThreatModel(
        AnyOf(members, index), leaves("epsilon"), leaves("lower"), leaves("upper")
    )


def unstack(stacked: ThreatModel) -> list[ThreatModel]:
    """The list that `stack` was given; outside of jit only.

    >>> [t.norm for t in unstack(stack([linf(0.1), l2(0.5)]))]
    [Linf(), L2()]
    """
    norm = stacked.norm
    if not isinstance(norm, AnyOf):
        raise TypeError(f"norm={norm} is not stacked; give what stack returned")
    return [
        ThreatModel(
            norm.members[int(i)], stacked.epsilon[n], stacked.lower[n], stacked.upper[n]
        )
        for n, i in enumerate(np.asarray(norm.index))
    ]
